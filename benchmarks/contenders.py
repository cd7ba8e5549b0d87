"""Grad-CAM at one layer by the service, by three libraries, and the forward passes that bound them.

Each contender is a function without arguments: it predicts and explains one fixed batch and gives
the maps (batch, h, w), or None where it only predicts. Each works on its own copy of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

import cv2
import numpy as np
import openvino
import torch
from captum.attr import LayerGradCam
from numpy.typing import NDArray
from pytorch_grad_cam import GradCAM
from torch import Tensor, nn
from torchcam.methods import GradCAM as TorchCAM

from service.inference.batch import run, run_compiled
from service.inference.questions import InferenceResult, Question, lane_of
from service.models.catalog import parse_model
from service.models.compiled.lane import Compiler
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.pool import ModelPool

Maps = NDArray[np.float32]
Contender = Callable[[], "Maps | None"]
Lane = Literal["hooked", "compiled"]

ONE_THREAD = {
    "INFERENCE_NUM_THREADS": 1,
    "NUM_STREAMS": 1,
    "INFERENCE_PRECISION_HINT": "f32",
    "ENABLE_CPU_PINNING": False,
}


def load(builder: str, *, compiled: bool = True) -> LoadedModel:
    """A model with seeded random weights: speed does not depend on them."""
    compiler = Compiler() if compiled else None
    return load_model(parse_model(builder), allow_random_weights=True, compiler=compiler)


def plain(model: LoadedModel) -> nn.Module:
    """A copy of its module as torchvision gives it: every parameter wants a gradient."""
    return copy.deepcopy(model.module).to(memory_format=torch.contiguous_format).requires_grad_()


def has(model: LoadedModel, lane: Lane) -> bool:
    """Whether the service has that lane for the model."""
    return lane == "hooked" or model.compiled is not None


def ours(model: LoadedModel, lane: Lane, pixels: Tensor, stack: ExitStack) -> Contender:
    """The service from uint8 pixels (batch, 3, h, w) to frozen answers, in one of its lanes.

    The hooked lane runs on the folded form of the model where such a question would.
    """
    assert model.target_layer is not None
    questions = [Question(image, layers=(model.target_layer,)) for image in pixels]
    if lane == "compiled":
        return lambda: _maps(run_compiled(model, questions))
    hooked = replace(model, compiled=None)
    folded = lane_of(hooked, questions[0]) == "folded"
    pool = ModelPool([hooked], replicas=1)
    replica = stack.enter_context(pool.lease(hooked, folded=folded))
    return lambda: _maps(run(replica, questions))


def _maps(answers: Iterable[object]) -> Maps:
    found = []
    for answer in answers:
        assert isinstance(answer, InferenceResult), answer
        found.append(answer.explanations[0].grid)
    return np.stack(found)


class Peers:
    """The other contenders, for a normalised batch (batch, 3, h, w).

    They are given the batch as they take it; that the service converts and normalises the pixels
    itself is on its own bill. `tuned` adds what their documents do not tell: channels last, and a
    graph that begins at the target layer because no earlier parameter wants a gradient.
    """

    def __init__(self, model: LoadedModel, pixels: Tensor, stack: ExitStack) -> None:
        assert model.target_layer is not None
        self.path = model.target_layer
        self.layout = model.layer(self.path).layout
        self.batch = model.normalised(pixels).contiguous()
        self._model = model
        self._stack = stack

    def all(self) -> dict[str, Contender]:
        """Every contender by name; Captum knows no tokens, so it is absent where the layer has."""
        found = {
            "eager forward": self.eager(tuned=False),
            "eager forward, tuned": self.eager(tuned=True),
            "OpenVINO forward": self.openvino(),
            "pytorch-grad-cam": self.gradcam(tuned=False),
            "pytorch-grad-cam, tuned": self.gradcam(tuned=True),
            "TorchCAM": self.torchcam(tuned=False),
            "TorchCAM, tuned": self.torchcam(tuned=True),
        }
        if self._reshape() is None:
            found["Captum, class known"] = self.captum(known=True)
            found["Captum"] = self.captum(known=False)
        return found

    def eager(self, *, tuned: bool) -> Contender:
        """The limit of what runs in eager torch."""
        net, batch = self._copy(tuned=tuned)

        def forward() -> None:
            with torch.inference_mode():
                net(batch).argmax(1)

        return forward

    def openvino(self) -> Contender:
        """The limit of what OpenVINO runs: the whole model, float32, this batch size alone."""
        net, batch = self._copy(tuned=False)
        with torch.no_grad():
            converted = openvino.convert_model(net, example_input=batch, input=[tuple(batch.shape)])
        compiled = openvino.Core().compile_model(converted, "CPU", ONE_THREAD)
        request, values = compiled.create_infer_request(), batch.numpy()

        def forward() -> None:
            request.infer([values])
            request.get_output_tensor(0).data.argmax(1)

        return forward

    def gradcam(self, *, tuned: bool) -> Contender:
        """pytorch-grad-cam as its README shows it."""
        net, batch = self._copy(tuned=tuned)
        layer = net.get_submodule(self.path)
        cam = GradCAM(model=net, target_layers=[layer], reshape_transform=self._reshape())
        self._stack.callback(cam.activations_and_grads.release)
        return lambda: np.asarray(cam(input_tensor=batch, targets=None), np.float32)

    def torchcam(self, *, tuned: bool) -> Contender:
        """TorchCAM as its README shows it."""
        net, batch = self._copy(tuned=tuned)
        extractor = TorchCAM(net, target_layer=self.path, reshape_transform=self._reshape())
        self._stack.callback(extractor.remove_hooks)

        def explain() -> Maps:
            logits = net(batch)
            maps: Tensor = extractor(logits.argmax(1).tolist(), logits)[0]
            return maps.numpy()

        return explain

    def captum(self, *, known: bool) -> Contender:
        """Captum as its tutorial shows it; it does not say what was predicted, so ask before."""
        net, batch = self._copy(tuned=False)
        method = LayerGradCam(net, net.get_submodule(self.path))
        with torch.inference_mode():
            given: list[int] = net(batch).argmax(1).tolist()

        def explain() -> Maps:
            classes = given
            if not known:
                with torch.inference_mode():
                    classes = net(batch).argmax(1).tolist()
            maps = method.attribute(batch, target=classes, relu_attributions=True)
            return np.asarray(maps.detach()[:, 0].numpy(), np.float32)

        return explain

    def _copy(self, *, tuned: bool) -> tuple[nn.Module, Tensor]:
        net = plain(self._model)
        if self._model.select is not None:  # peers and limits take a tensor alone
            net.register_forward_hook(lambda _net, _args, output: self._model.logits(output))
        if not tuned:
            return net, self.batch
        net.requires_grad_(requires_grad=False).to(memory_format=torch.channels_last)
        list(net.get_submodule(self.path).parameters())[-1].requires_grad_()
        return net, self.batch.to(memory_format=torch.channels_last)

    def _reshape(self) -> Callable[[Tensor], Tensor] | None:
        layout = self.layout
        return None if layout is None or layout.kind == "chw" else layout.as_map


def agreement(maps: Maps, other: Maps) -> float:
    """The least correlation of two sets of maps (batch, h, w), both at the size of the larger."""
    size = max(maps.shape[1:], other.shape[1:])
    scaled = [np.stack([cv2.resize(each, size[::-1]) for each in group]) for group in (maps, other)]
    pairs = zip(*(each.reshape(len(each), -1) for each in scaled), strict=True)
    return min(1.0 if _flat(a) and _flat(b) else float(np.corrcoef(a, b)[0, 1]) for a, b in pairs)


def _flat(values: NDArray[Any]) -> bool:
    return bool(np.ptp(values) < 1e-6)
