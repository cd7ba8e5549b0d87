"""What the methods are held against: healthy models, float64 twins, full backward passes, peers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from pytorch_grad_cam.base_cam import BaseCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.nn import functional
from torchcam.methods.gradient import _GradCAM

from service.errors import CamserveError
from service.images.decode import Preprocessing
from service.inference.batch import Unfinished, run
from service.inference.questions import Explanation, InferenceResult, Question
from service.models.catalog import ModelSpec, parse_model
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.pool import ModelPool, Replica
from service.models.probes.layers import trace_layers
from service.models.replicas import replicate

WEIGHTS = Path(__file__).parents[3] / "shared" / "data" / "weights"


def picture(seed: int = 0, height: int = 224, width: int = 224) -> Tensor:
    """A seeded uint8 image (3, height, width) with coarse shapes and fine grain."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    smooth = functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    grain = 0.1 * torch.randn(3, height, width, generator=generator)
    return ((smooth[0] + grain).clamp(0, 1) * 255).to(torch.uint8)


def served(module: nn.Module, height: int, width: int, name: str = "tested") -> LoadedModel:
    """A module as the pool wants it, for inputs of one size, with ImageNet's mean and std."""
    module = module.eval().requires_grad_(requires_grad=False)
    tried = trace_layers(replicate(module), torch.zeros(1, 3, height, width))
    return LoadedModel(
        ModelSpec(name, "tests"),
        module,
        tuple(f"class {index}" for index in range(tried.classes)),
        Preprocessing(height, (height, width)),
        tried.target_layer,
        tried.layers,
        version="0" * 12,
    )


@functools.lru_cache(maxsize=1)  # the largest take half a gigabyte: tests are ordered by model
def architecture(name: str, height: int = 224, width: int = 224) -> LoadedModel:
    """A torchvision architecture with weights under which it computes something.

    Fresh weights scale features down layer by layer, to 1e-9 in the deepest ones, and some heads
    start at zero: any two maps would agree there.
    """
    options: dict[str, object] = {"init_weights": False} if name == "googlenet" else {}
    if name.startswith("vit"):
        options["image_size"] = height
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torchvision.models.get_model(name, weights=None, **options)
        _make_healthy(module, convolutional=not name.startswith(("vit", "swin")))
    norms = [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    if norms:
        with torch.no_grad():
            for seed in (11, 12):
                batch = torch.stack([picture(seed + 2 * each, height, width) for each in range(2)])
                module(_normalised(batch, Preprocessing()))
    return served(module, height, width, name)


@functools.lru_cache(maxsize=1)
def real(name: str) -> LoadedModel:
    """An architecture with the real weights of shared/data."""
    return load_model(parse_model(f"torchvision/{name}@{WEIGHTS / name}.fp16.safetensors"))


def _make_healthy(module: nn.Module, *, convolutional: bool) -> None:
    linear = [each for each in module.modules() if isinstance(each, nn.Linear)]
    for each in module.modules():
        if convolutional and isinstance(each, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(each.weight, nonlinearity="relu")
    if linear:
        nn.init.normal_(linear[-1].weight, std=0.05)
    for path, parameter in module.named_parameters():
        if path.endswith("layer_scale"):  # ConvNeXt starts with blocks that do nothing
            nn.init.constant_(parameter, 0.5)
        if path.endswith(("class_token", "relative_position_bias_table")):
            nn.init.normal_(parameter, std=0.5)


def _normalised(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    mean, std = (
        torch.tensor(each)[:, None, None] for each in (preprocessing.mean, preprocessing.std)
    )
    return (pixels / 255 - mean) / std


class Double(nn.Module):
    """A model that computes in float64 throughout; its layers are found below `net`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(module).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double())


def in_double(model: LoadedModel) -> LoadedModel:
    """The float64 twin of a model, with parameters of its own."""
    module = Double(model.module).eval().requires_grad_(requires_grad=False)
    layers = tuple(replace(layer, path=f"net.{layer.path}") for layer in model.layers)
    return replace(model, module=module, layers=layers, target_layer=f"net.{model.target_layer}")


@contextmanager
def leased(model: LoadedModel) -> Iterator[Replica]:
    with ModelPool([model], replicas=1).lease(model.name) as replica:
        yield replica


def answers(model: LoadedModel, *questions: Question) -> list[InferenceResult | CamserveError]:
    """What `run` says to a batch of questions, the stepwise ones worked off to the end."""
    with leased(model) as replica:
        return [finished(replica, each) for each in run(replica, questions)]


def finished(
    replica: Replica, answer: InferenceResult | CamserveError | Unfinished
) -> InferenceResult | CamserveError:
    while isinstance(answer, Unfinished):
        try:
            answer = answer.step(replica) or answer
        except CamserveError as error:
            return error
    return answer


def explained(model: LoadedModel, *questions: Question) -> list[Explanation]:
    """The only explanation of each question."""
    found = []
    for answer in answers(model, *questions):
        assert isinstance(answer, InferenceResult), answer
        (explanation,) = answer.explanations
        found.append(explanation)
    return found


def raw(explanation: Explanation) -> Tensor:
    """The map before it was scaled, float64."""
    largest = max(abs(explanation.low), abs(explanation.high))
    return torch.from_numpy(explanation.grid.astype(np.float64)) * largest


def distance(found: Explanation | Tensor, expected: Tensor) -> float:
    """The largest difference from an expected raw map, as a share of that map's largest value."""
    found = raw(found) if isinstance(found, Explanation) else found
    assert found.shape == expected.shape
    largest = float(expected.abs().max())
    assert largest > 0, "an empty map would agree with anything"
    return float((found.double() - expected.double()).abs().max()) / largest


@contextmanager
def without_in_place(module: nn.Module) -> Iterator[nn.Module]:
    """A twin of a model (parameters shared) that overwrites nothing, which the oracles need.

    DenseNet calls the function `relu(…, inplace=True)` beside its modules.
    """
    twin = replicate(module)
    for each in twin.modules():
        if getattr(each, "inplace", False):
            each.inplace = False
    relu = functional.relu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "relu", lambda input, inplace=False: relu(input))  # noqa: A006, ARG005
        yield twin


def input_of(model: LoadedModel, pixels: Tensor) -> Tensor:
    """The model input (1, 3, H, W) of an image."""
    return model.normalised(pixels[None])


def best(model: LoadedModel, pixels: Tensor) -> int:
    with torch.no_grad():
        return int(model.replicate()(input_of(model, pixels)).argmax())


def full_backward(
    model: LoadedModel,
    layer: str,
    pixels: Tensor,
    value: Callable[[Tensor], Tensor],
    to_map: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> tuple[Tensor, Tensor]:
    """A layer's output and the gradient of a value of the logits at it, by `.backward()`.

    Through the whole model down to its input, with nothing of ours but the forward pass. Of a layer
    that runs several times the last call. Both (C, h, w).
    """
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        output.retain_grad()
        kept.append(output)
        return output.clone()  # ResNet's `out += identity` overwrites what it is given

    image = input_of(model, pixels).requires_grad_()
    with without_in_place(model.module) as net:
        net.get_submodule(layer).register_forward_hook(keep)
        value(net(image)[0]).backward()
    gradient = kept[-1].grad
    assert gradient is not None
    return to_map(kept[-1].detach())[0], to_map(gradient)[0]


def tokens_to_map(height: int, width: int) -> Callable[[Tensor], Tensor]:
    """The `reshape_transform` that users of the peers write for ViT."""

    def transform(tokens: Tensor) -> Tensor:
        maps = tokens[:, 1:].reshape(tokens.shape[0], height, width, tokens.shape[2])
        return maps.permute(0, 3, 1, 2)

    return transform


def channels_first(maps: Tensor) -> Tensor:
    """The `reshape_transform` for Swin."""
    return maps.permute(0, 3, 1, 2)


def by_grad_cam(
    method: type[BaseCAM],
    net: nn.Module,
    layers: Sequence[str],
    image: Tensor,
    target: int,
    *,
    to_map: Callable[[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    """pytorch-grad-cam's map at each layer before its ReLU and scaling; one call of the peer."""
    kept: list[Tensor] = []
    extractor = method(net, [net.get_submodule(layer) for layer in layers], to_map)
    extractor.compute_input_gradient = True  # the parameters are frozen
    compute = extractor.get_cam_image

    def compute_and_keep(*args: object, **kwargs: object) -> object:
        cam = compute(*args, **kwargs)
        kept.append(torch.from_numpy(np.array(cam))[0])
        return cam

    extractor.get_cam_image = compute_and_keep
    with extractor:
        extractor(image, [ClassifierOutputTarget(target)])
    return kept


def by_torchcam(
    methods: Sequence[type[_GradCAM]],
    net: nn.Module,
    layers: Sequence[str],
    image: Tensor,
    target: int,
    *,
    to_map: Callable[[Tensor], Tensor] | None = None,
) -> list[list[Tensor]]:
    """TorchCAM's raw map of each method at each layer, from one forward pass."""
    extractors = [
        method(net, list(layers), image.shape[1:], reshape_transform=to_map) for method in methods
    ]
    image = image.clone().requires_grad_()
    scores = net(image)
    found = [
        [cam[0] for cam in extractor(target, scores, normalized=False, retain_graph=True)]
        for extractor in extractors
    ]
    for extractor in extractors:
        extractor.remove_hooks()
    return found
