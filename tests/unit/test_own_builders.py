"""What builders bring: classes that the weights count, lazy layers, exported and frozen modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SmallNet
from torch import Tensor, nn

from service.cli.check import check_models
from service.errors import ConfigurationError, InvalidOption
from service.inference.batch import run
from service.inference.questions import InferenceResult, Question
from service.models.catalog import InputSpec, ModelSpec
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.pool import Replica
from service.models.probes.condition import Condition
from service.routes import kernel_images

pytestmark = pytest.mark.timeout(60)

MADE: dict[str, Callable[..., nn.Module]] = {}
"""What the builders of this module make, by the test."""


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], str]:
    """Make a function the builder `own_models:net`."""

    def use(function: Callable[..., Any]) -> str:
        monkeypatch.setattr("own_models.net", function)
        return "own_models:net"

    return use


def saved(path: Path, net: nn.Module) -> Path:
    torch.save(net.state_dict(), path)
    return path


def load(builder: str, weights: Path | None = None, **more: Any) -> LoadedModel:
    more = {"input": InputSpec(size=(32, 32))} | more
    return load_model(ModelSpec("a", builder, weights, **more))


# ---- classes


@pytest.mark.parametrize(
    "name", ["num_classes", "n_classes", "nb_classes", "classes", "num_labels"]
)
@pytest.mark.parametrize("default", ["= 7", "= 1000", ""])
def test_a_function_that_takes_the_number_of_classes_gets_that_of_the_weights(
    tmp_path: Path, builder, name: str, default: str
) -> None:
    scope: dict[str, Any] = {"SmallNet": SmallNet}
    exec(f"def make(*, {name}{default}): return SmallNet({name})", scope)  # noqa: S102 - its name
    trained = SmallNet(classes=4, seed=3)
    model = load(builder(scope["make"]), saved(tmp_path / "w.pt", trained))
    assert len(model.labels) == 4
    assert torch.equal(model.module.head.weight, trained.head.weight)


def test_a_number_that_was_said_is_kept(tmp_path: Path, builder) -> None:
    with pytest.raises(ConfigurationError, match=r"head.bias: \(4,\) in the file, \(6,\) here"):
        load(
            builder(lambda classes=7: SmallNet(classes)),
            saved(tmp_path / "w.pt", SmallNet(classes=4)),
            arguments={"classes": 6},
        )


def test_a_function_is_called_once_where_the_number_fits(tmp_path: Path, builder) -> None:
    calls = []

    def make(classes: int = 7) -> nn.Module:
        calls.append(classes)
        return SmallNet(classes)

    load(builder(make), saved(tmp_path / "w.pt", SmallNet(seed=3)))
    assert calls == [7]


def test_what_cannot_be_sketched_is_refused_as_before(tmp_path: Path, builder) -> None:
    def make(classes: int = 7) -> nn.Module:
        if classes > 1000:
            raise RuntimeError("planted")
        return SmallNet(classes)

    with pytest.raises(ConfigurationError, match=r"head.bias: \(4,\) in the file, \(7,\) here"):
        load(builder(make), saved(tmp_path / "w.pt", SmallNet(classes=4)))


class TwoHeads(SmallNet):
    def __init__(self, classes: int = 7, other: int | None = None) -> None:
        super().__init__(classes)
        self.coarse = nn.Linear(16, classes if other is None else other)


def test_heads_that_disagree_are_named(tmp_path: Path, builder) -> None:
    file = saved(tmp_path / "w.pt", TwoHeads(3, other=5))
    with pytest.raises(ConfigurationError, match="wrong shape") as error:
        load(builder(lambda classes=7: TwoHeads(classes)), file)
    for words in ("coarse.weight: (5, 16) in the file", "head.weight: (3, 16) in the file"):
        assert words in error.value.detail


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("resnet10t", 5),
        ("convnext_atto.d2_in1k", 1000),
        ("mobilenetv3_small_050", 3),
        ("deit_tiny_distilled_patch16_224", 6),  # two heads
        ("convnext_nano.in12k", 4),  # its own are 11,821
        ("convnext_nano.in12k", 1000),
    ],
)
def test_timm_has_the_classes_of_the_file(tmp_path: Path, name: str, classes: int) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    trained = timm.create_model(name, num_classes=classes)
    model = load_model(ModelSpec("a", f"timm/{name}", saved(tmp_path / "w.pt", trained)))
    assert model.labels == tuple(f"class {index}" for index in range(classes))


# ---- lazy layers


def lazy(classes: int = 3) -> nn.Module:
    return nn.Sequential(
        *(nn.LazyConv2d(8, 3, 2, 1), nn.LazyBatchNorm2d(), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(classes)),
    )


@pytest.mark.parametrize("channels", [3, 5])
def test_lazy_layers_are_completed_before_anything_is_read_of_them(builder, channels: int) -> None:
    size = InputSpec(size=(32, 48), channels=channels, mean=(0.5,), std=(0.2,))
    model = load(builder(lazy), input=size)
    assert model.module[0].weight.shape == (8, channels, 3, 3)
    assert len(model.labels) == 3
    assert model.target_layer == "4"


@pytest.mark.parametrize("classes", [3, 5])
def test_lazy_layers_take_the_weights_of_a_file(tmp_path: Path, builder, classes: int) -> None:
    trained = lazy(classes)
    image = torch.rand(2, 3, 32, 32)
    trained(image)
    model = load(builder(lazy), saved(tmp_path / "w.pt", trained))
    assert len(model.labels) == classes
    trained.eval()
    with torch.no_grad():
        torch.testing.assert_close(model.module(image), trained(image))


def test_lazy_layers_that_the_image_does_not_fit_are_told(builder) -> None:
    with pytest.raises(ConfigurationError, match=r"has lazy layers, .*3×4×4 fails") as error:
        load(
            builder(lambda: nn.Sequential(nn.LazyConv2d(4, 9), nn.Flatten(), nn.LazyLinear(2))),
            input=InputSpec(size=(4, 4)),
        )
    assert "`input.size` and `input.channels`" in error.value.detail


# ---- exported and frozen


def exported(net: nn.Module, count: int, tmp_path: Path, *, dynamic: bool) -> nn.Module:
    sizes: Any = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(net, (torch.zeros(count, 3, 32, 32),), dynamic_shapes=sizes)
        torch.export.save(program, tmp_path / "net.pt2")
        return torch.export.load(tmp_path / "net.pt2").module()


def reloaded(module: Any, tmp_path: Path) -> nn.Module:
    """A TorchScript module as a user has it: loaded from a file, which renames its classes."""
    torch.jit.save(module, tmp_path / "scripted.pt")
    return torch.jit.load(tmp_path / "scripted.pt")


def forms(tmp_path: Path) -> dict[str, Callable[[], nn.Module]]:
    net = SmallNet(seed=3).eval()

    def quiet(make: Callable[[], Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            return make()

    return {
        "frozen": lambda: quiet(lambda: torch.jit.freeze(torch.jit.script(net))),
        "traced": lambda: quiet(
            lambda: torch.jit.freeze(torch.jit.trace(net, torch.zeros(1, 3, 32, 32)))
        ),
        "scripted in a file": lambda: quiet(lambda: reloaded(torch.jit.script(net), tmp_path)),
        "traced in a file": lambda: quiet(
            lambda: reloaded(torch.jit.trace(net, torch.zeros(1, 3, 32, 32)), tmp_path)
        ),
        "optimised": lambda: quiet(lambda: torch.jit.optimize_for_inference(torch.jit.script(net))),
        "exported": lambda: exported(net, 2, tmp_path, dynamic=True),
        "one at a time": lambda: exported(net, 1, tmp_path, dynamic=False),
    }


@pytest.mark.parametrize(
    "form",
    [
        *("frozen", "traced", "optimised", "scripted in a file", "traced in a file"),
        *("exported", "one at a time"),
    ],
)
def test_exported_and_frozen_modules_predict(tmp_path: Path, builder, form: str) -> None:
    model = load(builder(forms(tmp_path)[form]))
    assert model.no_layers is not None
    assert "serve the module that it was made from" in model.no_layers
    assert model.compiled is None
    module = model.replicate()
    replica = Replica(model, module, Condition.of(module))
    image = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0))
    (answer,) = run(replica, [Question(image.to(torch.uint8), top_k=7)])
    assert isinstance(answer, InferenceResult)
    with torch.no_grad():
        expected = SmallNet(seed=3).eval()(model.normalised(image[None].to(torch.uint8)))
    scores = {each.class_id: each.score for each in answer.predictions}
    found = torch.tensor([scores[index] for index in range(7)])
    torch.testing.assert_close(found, expected[0].softmax(0), rtol=1e-4, atol=1e-5)
    assert replica.condition.faults() == []


@pytest.mark.parametrize(
    ("form", "call"),
    [
        ("scripted in a file", "torch.jit.load('scripted.pt')"),
        ("exported", "torch.export.load('net.pt2').module()"),
    ],
)
def test_a_file_that_is_a_program_is_named_with_the_call_that_loads_it(
    tmp_path: Path, form: str, call: str
) -> None:
    forms(tmp_path)[form]()
    (file,) = tmp_path.iterdir()
    with pytest.raises(ConfigurationError) as error:
        load("torchvision/resnet18", file)
    assert f"def build(): return {call}" in error.value.detail


def test_layers_and_kernels_of_a_scripted_file_are_shown(tmp_path: Path, builder) -> None:
    model = load(builder(forms(tmp_path)["scripted in a file"]))
    assert model.layer("features.0").type == "Conv2d"
    assert kernel_images._draw(model, "features.0", 64).kernels == 8 * 3
    with pytest.raises(InvalidOption, match="has no kernels; inside it"):
        kernel_images._draw(model, "features", 64)


def test_check_says_that_they_predict_only(tmp_path: Path, builder) -> None:
    spec = ModelSpec("a", builder(forms(tmp_path)["exported"]), input=InputSpec(size=(32, 32)))
    (checked,) = check_models([spec], load_model)
    assert checked.problem is None


def test_what_was_exported_in_training_mode_is_refused(tmp_path: Path, builder) -> None:
    """Its answers would depend on who shares the batch, and nothing can change that."""
    net = SmallNet(seed=3).train()
    made = exported(net, 2, tmp_path, dynamic=True)
    with pytest.raises(ConfigurationError, match=r"exported in training mode .*model\.eval"):
        load(builder(lambda: made))


class Dropping(SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def test_dropout_that_was_exported_in_training_mode_is_refused(tmp_path: Path, builder) -> None:
    net = Dropping(seed=3).eval()
    net.training = True
    made = exported(net, 2, tmp_path, dynamic=True)
    with pytest.raises(ConfigurationError, match="exported in training mode"):
        load(builder(lambda: made))


def test_an_error_of_a_batch_that_was_exported_for_one_is_of_that_batch(
    tmp_path: Path, builder
) -> None:
    """The scheduler runs each alone then."""
    model = load(builder(forms(tmp_path)["one at a time"]))
    module = model.replicate()
    replica = Replica(model, module, Condition.of(module))
    question = Question(torch.zeros(3, 32, 32, dtype=torch.uint8))
    with pytest.raises(AssertionError, match="Guard failed"):
        run(replica, [question, question])
    (answer,) = run(replica, [question])
    assert isinstance(answer, InferenceResult)
