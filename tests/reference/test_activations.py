"""Captures held against plain hooks on a private copy of the model, and batches against singles."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from tiny import SmallNet, loaded
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, Bottleneck

from service.inference.batch import run
from service.inference.contrast import Contrast
from service.inference.questions import Activation, ActivationKind, InferenceResult, Question
from service.models.loaded import LoadedModel
from service.models.pool import ModelPool

pytestmark = [pytest.mark.reference, pytest.mark.timeout(120)]

KINDS: tuple[ActivationKind, ...] = ("output", "input", "grad_output", "grad_input")
SIDE = 64

Found = dict[tuple[str, ActivationKind, int, str], NDArray[np.float32]]


def pictures(count: int, side: int = SIDE) -> Tensor:
    """Seeded uint8 pictures (count, 3, side, side)."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 7, 7, generator=generator)
    smooth = functional.interpolate(coarse, size=side, mode="bilinear", align_corners=False)
    grain = 0.2 * torch.randn(count, 3, side, side, generator=generator)
    return ((smooth + grain).clamp(0, 1) * 255).to(torch.uint8)


def healthy(architecture: str, side: int = SIDE) -> LoadedModel:
    """Seeded random weights; one pass gives every batch norm the statistics of what reaches it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torchvision.models.get_model(architecture, weights=None, num_classes=20)
        for each in module.modules():
            if isinstance(each, nn.BatchNorm2d):
                each.momentum = None  # the mean of all passes: of this one
        with torch.no_grad():
            module.train()(pictures(8, side).float() / 255)
    return loaded(module, architecture, side=side)


def answers(model: LoadedModel, questions: Sequence[Question]) -> list[InferenceResult]:
    """What one batch of these questions is answered; the replica is clean afterwards."""
    pool = ModelPool([model], replicas=1)
    with pool.lease(model.name) as replica:
        found = run(replica, questions)
    assert not sum(pool.replaced.values())
    assert all(isinstance(each, InferenceResult) for each in found), found
    return [each for each in found if isinstance(each, InferenceResult)]


def by_place(activations: Sequence[Activation]) -> Found:
    """Captures by layer, kind, call and part; none is given twice."""
    found = {(each.layer, each.kind, each.call, each.part): each.values for each in activations}
    assert len(found) == len(activations)
    return found


def asking(picture: Tensor, paths: Sequence[str], **options: Any) -> Question:
    return Question(
        picture,
        method=None,
        activations=tuple(paths),
        **{"kinds": KINDS, "targets": (5,), **options},
    )


class _BottleneckOutOfPlace(Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class _BasicBlockOutOfPlace(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


OUT_OF_PLACE = {Bottleneck: _BottleneckOutOfPlace, BasicBlock: _BasicBlockOutOfPlace}


def private_copy(module: nn.Module) -> nn.Module:
    """A copy in which nothing works in place, so that full backward hooks can be used."""
    private = copy.deepcopy(module)
    for each in private.modules():
        if hasattr(each, "inplace"):
            each.inplace = False
        each.__class__ = OUT_OF_PLACE.get(type(each), type(each))
    return private


def by_plain_hooks(model: LoadedModel, picture: Tensor, class_id: int = 5) -> Found:
    """Every module's four kinds by torch's own hooks; each recorded at once, by a copy."""
    module = private_copy(model.module)
    found: Found = {}
    calls: dict[tuple[str, ActivationKind], int] = defaultdict(int)

    def keep(path: str, kind: ActivationKind, tensors: tuple[Tensor | None, ...]) -> None:
        call = calls[path, kind]
        calls[path, kind] += 1
        for tensor in tensors:
            if tensor is not None:
                assert len(tensors) == 1
                values = tensor.detach()[0].numpy()
                found[path, kind, call, ""] = values.astype(np.float32, copy=True)

    def watch(path: str, each: nn.Module) -> None:
        each.register_forward_hook(lambda _m, _a, output: keep(path, "output", (output,)))
        each.register_forward_pre_hook(lambda _m, args: keep(path, "input", args))

        def backward(_module: Any, grad_in: Any, grad_out: Any) -> None:
            keep(path, "grad_input", grad_in)
            keep(path, "grad_output", grad_out)

        each.register_full_backward_hook(backward)

    for path, each in module.named_modules():
        if path:
            watch(path, each)
    x = model.normalised(picture[None]).requires_grad_()
    module(x)[0, class_id].backward()
    return dict(in_order_of_calls(found))


def in_order_of_calls(found: Found) -> Iterator[tuple[tuple[str, ActivationKind, int, str], Any]]:
    """Backward hooks meet the calls of a module from the last to the first."""
    most: dict[tuple[str, ActivationKind], int] = defaultdict(int)
    for path, kind, call, _ in found:
        most[path, kind] = max(most[path, kind], call)
    for (path, kind, call, part), values in found.items():
        turned = most[path, kind] - call if kind.startswith("grad") else call
        yield (path, kind, turned, part), values


def assert_equal(mine: Found, theirs: Found, tolerance: float = 1e-5) -> None:
    """The same places, and at each the same values, to a share of their maximum."""
    assert mine.keys() == theirs.keys()
    for place, expected in theirs.items():
        values = mine[place]
        assert values.shape == expected.shape, place
        largest = float(np.abs(expected).max(initial=0))
        assert np.abs(values - expected).max(initial=0) <= tolerance * largest, place


@pytest.mark.parametrize("architecture", ["resnet50", "resnet18", "squeezenet1_1", "mobilenet_v2"])
def test_activations_at_every_module_equal_plain_hooks(architecture: str) -> None:
    """All four kinds; a module called several times gives each call."""
    model = healthy(architecture)
    (picture,) = pictures(1)
    paths = [layer.path for layer in model.layers if layer.given]
    (answer,) = answers(model, [asking(picture, paths)])
    mine = by_place(answer.activations)
    assert {kind for _, kind, _, _ in mine} == set(KINDS)
    assert_equal(mine, by_plain_hooks(model, picture))
    if architecture == "resnet50":
        assert len(paths) == 150
        assert {call for path, _, call, _ in mine if path == "layer1.0.relu"} == {0, 1, 2}


def test_what_else_is_captured_changes_no_gradient() -> None:
    """A block's input also goes round the block: the gradient at its convolution is of it alone."""
    model = healthy("resnet18")
    (picture,) = pictures(1)
    path = "layer3.1.conv1"
    (alone,) = answers(model, [asking(picture, [path])])
    everything = [layer.path for layer in model.layers if layer.given]
    (beside,) = answers(model, [asking(picture, everything)])
    among = {place: v for place, v in by_place(beside.activations).items() if place[0] == path}
    assert_equal(by_place(alone.activations), among)


def singles_and_batch(model: LoadedModel, paths: Sequence[str], **options: Any) -> None:
    """Two different pictures, asked together and one by one: the same activations."""
    questions = [
        asking(each, paths, **options) for each in pictures(2, model.preprocessing.crop[0])
    ]
    together = answers(model, questions)
    for question, answer in zip(questions, together, strict=True):
        (alone,) = answers(model, [question])
        assert_equal(by_place(answer.activations), by_place(alone.activations), 1e-4)
    first, second = (by_place(answer.activations) for answer in together)
    assert any(not np.array_equal(first[place], second[place]) for place in first)


@pytest.mark.parametrize("architecture", ["swin_t", "resnet18"])
def test_a_batch_of_two_is_captured_as_two_single_ones_are(architecture: str) -> None:
    model = healthy(architecture)
    singles_and_batch(model, [layer.path for layer in model.layers if layer.given])


def test_a_vision_transformer_in_a_batch_is_captured_as_alone() -> None:
    """Its norms, projections and attention (three inputs, a tuple as output) among others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=7)
    nn.init.normal_(module.heads.head.weight, std=0.02)
    model = loaded(module, side=32)
    singles_and_batch(model, [layer.path for layer in model.layers if layer.given])


# ---- modules of unusual shape


class Odd(nn.Module):
    """A small net, before or in which a subclass does something unusual."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet()


class Windows(Odd):
    """Cuts each image into four windows, as Swin does: rows are a multiple of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.windowed = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        count, _, height, width = x.shape
        cut = x.reshape(count, 3, 2, height // 2, 2, width // 2).permute(0, 2, 4, 1, 3, 5)
        cut = self.windowed(cut.reshape(count * 4, 3, height // 2, width // 2))
        whole = cut.reshape(count, 2, 2, 3, height // 2, width // 2).permute(0, 3, 1, 4, 2, 5)
        return self.net(whole.reshape(x.shape))


def test_windows_belong_to_their_image() -> None:
    model = loaded(Windows())
    singles_and_batch(model, ["windowed", "net.features.0"])
    (answer,) = answers(model, [asking(pictures(1, 32)[0], ["windowed"], kinds=("output",))])
    assert answer.activations[0].values.shape == (4, 3, 16, 16)


class SequenceFirst(Odd):
    """Gives (length, batch, channels), as older transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing, self.head = nn.Linear(16, 16), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.net.features(x).flatten(2).permute(2, 0, 1)
        return self.head(self.mixing(tokens).mean(dim=0))


def test_the_batch_may_be_another_dimension_than_the_first() -> None:
    singles_and_batch(loaded(SequenceFirst()), ["mixing"])


class Table(nn.Module):
    """A table of positions: the same for every image, and as long as a batch may be."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.arange(rows * 16.0).reshape(rows, 16) / 99)
        self.asked = nn.Identity()

    def forward(self, positions: Tensor) -> Tensor:
        return self.asked(self.values[positions])


class Positioned(Odd):
    """Weighs its channels by that table."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table, self.rows = Table(rows), rows

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table(torch.arange(self.rows)).mean(dim=0)[:, None, None]
        return self.net.head((self.net.features(x) * (1 + bias)).mean(dim=(2, 3)))


@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_what_is_the_same_for_every_image_is_given_whole(rows: int) -> None:
    model = loaded(Positioned(rows))
    singles_and_batch(model, ["table", "table.asked", "net.features"], kinds=("output", "input"))


def test_a_gradient_that_mixes_the_images_of_a_batch_is_not_given() -> None:
    """The scheduler then runs each image alone, where it is right."""
    model = loaded(Positioned(2))
    questions = [asking(each, ["table"], kinds=("grad_output",)) for each in pictures(2, 32)]
    with pytest.raises(RuntimeError, match="tells images apart"):
        answers(model, questions)
    (alone,) = answers(model, questions[:1])
    (activation,) = alone.activations
    assert activation.values.shape == (2, 16)
    assert activation.values.any()


def test_integer_inputs_are_captured_and_have_no_gradient() -> None:
    model = loaded(Positioned(3))
    (answer,) = answers(model, [asking(pictures(1, 32)[0], ["table"])])
    found = by_place(answer.activations)
    assert set(found) == {("table", kind, 0, "") for kind in ("input", "output", "grad_output")}
    assert found["table", "input", 0, ""].tolist() == [0, 1, 2]


class Parts(nn.Module):
    """Takes two tensors, one by name, and a number; gives a dict with a tuple in it."""

    def forward(self, x: Tensor, *, other: Tensor, scale: float) -> dict[str, Any]:
        return {"sum": x + scale * other, "both": (x * 2, other * 3), "note": "no tensor"}


class InParts(Odd):
    """Makes its input of those parts."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = Parts()

    def forward(self, x: Tensor) -> Tensor:
        given = self.parts(x, other=x.flip(3), scale=0.5)
        assert given["note"] == "no tensor"
        return self.net(given["sum"] + given["both"][0] - given["both"][1])


def test_every_tensor_of_a_module_with_several_has_its_part() -> None:
    model = loaded(InParts())
    (picture,) = pictures(1, 32)
    (answer,) = answers(model, [asking(picture, ["parts"])])
    found = by_place(answer.activations)
    x = model.normalised(picture[None])
    expected = {
        ("input", "[0]"): x,
        ("input", "[other]"): x.flip(3),
        ("output", "[sum]"): x + 0.5 * x.flip(3),
        ("output", "[both][0]"): x * 2,
        ("output", "[both][1]"): x.flip(3) * 3,
    }
    for (kind, part), values in expected.items():
        assert np.allclose(found["parts", kind, 0, part], values[0]), part  # type: ignore[index]
    given = {
        part: found["parts", "grad_output", 0, part] for _, _, _, part in found if "sum" in part
    }
    into = given["[sum]"]
    gradients = {
        part: found["parts", "grad_output", 0, part] for part in ("[both][0]", "[both][1]")
    }
    assert np.allclose(gradients["[both][0]"], into, atol=1e-7)
    assert np.allclose(gradients["[both][1]"], -into, atol=1e-7)
    assert np.allclose(found["parts", "grad_input", 0, "[0]"], 3 * into, atol=1e-6)
    assert np.allclose(found["parts", "grad_input", 0, "[other]"], -2.5 * into, atol=1e-6)
    singles_and_batch(model, ["parts"])


def test_gradients_of_an_activation_are_the_first_target_s_beside_many_targets() -> None:
    """In one batch with a request for five maps, and with a contrast."""
    model = healthy("resnet18")
    first, second = pictures(2)
    capturing = asking(first, ["layer4", "fc"], contrast=Contrast((3,)))
    many = Question(second, targets=(0, 2, 4, 6, 8), layers=("layer4",))
    together, explained = answers(model, [capturing, many])
    (alone,) = answers(model, [capturing])
    assert_equal(by_place(together.activations), by_place(alone.activations), 1e-4)
    assert len(explained.explanations) == 5
    logits = by_place(together.activations)["fc", "grad_output", 0, ""]
    assert logits.tolist() == [-1.0 if i == 3 else 1.0 if i == 5 else 0.0 for i in range(20)]
