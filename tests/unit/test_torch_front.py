"""The front of a cut model on a device of its own: the same numbers, and nobody else's."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from played_device import NAME, played_device
from structlog.testing import capture_logs
from tiny import SmallNet
from torch import Tensor, nn

from service.inference.batch import run, run_compiled
from service.inference.questions import Question
from service.models.catalog import InputSpec, ModelSpec
from service.models.compiled import torch_front
from service.models.compiled.cut import split
from service.models.compiled.front import CompiledLane
from service.models.compiled.lane import TOLERANCES, Compiler, parity_on
from service.models.compiled.torch_front import Graphs, TorchFront
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.pool import ModelPool

pytestmark = pytest.mark.timeout(120)

SIZE = 64


def residual() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torchvision.models.resnet18(weights=None, num_classes=11)


def plain() -> nn.Module:
    return SmallNet(classes=11)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """`package.module:function` builders come from this file."""
    monkeypatch.setitem(sys.modules, "test_torch_front_models", sys.modules[__name__])


@pytest.fixture(params=[NAME, pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == NAME:
        with played_device():
            yield NAME
        return
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    yield "cuda"


def load(function: str, device: str, **more) -> LoadedModel:
    size = InputSpec(size=(SIZE, SIZE), resize=SIZE)
    spec = ModelSpec(function, f"test_torch_front_models:{function}", input=size)
    compiler = Compiler(largest=6, **more)
    return load_model(spec, device=device, allow_random_weights=True, compiler=compiler)


def questions(model: LoadedModel, count: int, **options) -> list[Question]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    return [Question(each, layers=model.target_layers(()), **options) for each in pixels]


@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize("function", ["residual", "plain"])
def test_it_answers_as_the_hooked_lane_does(device: str, function: str, count: int) -> None:
    model = load(function, device)
    assert model.compiled, model.not_compiled
    asked = questions(model, count, targets=(0, 7))
    with ModelPool([model], replicas=1).lease(model) as replica:
        expected = run(replica, asked)
    for one, other in zip(run_compiled(model, asked), expected, strict=True):
        for mine, theirs in zip(one.explanations, other.explanations, strict=True):
            assert mine.class_id == theirs.class_id
            np.testing.assert_allclose(mine.grid, theirs.grid, atol=1e-3)
        assert one.predictions[0].class_id == other.predictions[0].class_id
        assert one.predictions[0].score == pytest.approx(other.predictions[0].score, rel=1e-3)


@pytest.mark.gpu
def test_bf16_on_a_gpu_says_so_and_is_near() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    exact, rounded = load("residual", "cuda"), load("residual", "cuda", precision="bf16")
    assert rounded.compiled.precision == "bf16", rounded.compiled.instead
    asked = questions(exact, 6, targets=(3,))
    for one, other in zip(run_compiled(rounded, asked), run_compiled(exact, asked), strict=True):
        assert (one.precision, other.precision) == ("bf16", "float32")
        maps = one.explanations[0].grid, other.explanations[0].grid
        assert 0 < np.abs(maps[0] - maps[1]).max() < 0.1


def test_an_int8_front_is_for_the_cpu(tmp_path: Path) -> None:
    with played_device():
        size = InputSpec(size=(SIZE, SIZE), resize=SIZE)
        spec = ModelSpec("p", "test_torch_front_models:plain", input=size, int8=tmp_path)
        model = load_model(spec, device=NAME, allow_random_weights=True, compiler=Compiler())
    assert model.compiled is None
    assert "for the CPU" in model.not_compiled


# ---- recordings, with one that is played: it computes what the recorded function would


def recorder(made: list[int]):
    def record(run, pixels: Tensor):
        made.append(len(pixels))
        output = run(pixels)[0].clone()
        return lambda: output.copy_(run(pixels)[0]), (output,)

    return record


def doubled(pixels: Tensor) -> tuple[Tensor, ...]:
    return (pixels.flatten(1).float() * 2,)


def pixels_of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(1, [1]), (4, [4, 2, 1]), (6, [6, 4, 2, 1]), (64, [64, 32, 16, 8, 4, 2, 1])],
)
def test_there_is_a_recording_for_every_doubling_and_the_largest(largest: int, sizes) -> None:
    made: list[int] = []
    Graphs(doubled, torch.zeros(largest, 3, 2, 2, dtype=torch.uint8), recorder(made))
    assert made == sizes, "the largest first: the others fit into its memory"


def test_a_batch_gets_its_own_rows_in_its_own_memory() -> None:
    graphs = Graphs(doubled, torch.zeros(6, 3, 2, 2, dtype=torch.uint8), recorder([]))
    kept = [
        graphs(pixels_of(*values))[0] for values in ((1, 2, 3, 4, 5, 6), (7, 8, 9), (10,), (11, 12))
    ]
    rows = [answer[:, 0].tolist() for answer in kept]
    assert rows == [[2, 4, 6, 8, 10, 12], [14, 16, 18], [20], [22, 24]]


# ---- what the CPU can tell of the rest


def uncompiled(function: str) -> LoadedModel:
    size = InputSpec(size=(SIZE, SIZE), resize=SIZE)
    spec = ModelSpec(function, f"test_torch_front_models:{function}", input=size)
    return load_model(spec, allow_random_weights=True)


def front_of(model: LoadedModel, **more) -> tuple[TorchFront, CompiledLane]:
    layer = model.target_layers(())[0]
    front, tail = split(model.module, layer)
    made = TorchFront(model, front, **more)
    return made, CompiledLane(layer, made, tail)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("function", ["residual", "plain"])
def test_its_numbers_are_near_the_hooked_lanes(function: str, precision) -> None:
    model = uncompiled(function)
    _, lane = front_of(model, precision=precision)
    found = parity_on(model, lane, [torch.stack([q.pixels for q in questions(model, 3)])])
    assert found.is_within(TOLERANCES[precision])
    assert (found.activation > 1e-4) == (precision == "bf16")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
@pytest.mark.timeout(300)
def test_what_torch_compiles_gives_the_same_for_any_batch(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = uncompiled("plain")
    compiled, _ = front_of(model, precision="bf16")
    plainly, _ = front_of(model, precision="bf16")
    pixels = torch.stack([question.pixels for question in questions(model, 5)])
    with capture_logs() as logs:
        compiled._compile(pixels[:2], None)
    assert not logs
    assert compiled._module is not plainly._module
    for count in (1, 2, 5):
        (found,), (expected,) = compiled(pixels[:count]), plainly(pixels[:count])
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02 * float(expected.max()))


def test_every_front_is_compiled_however_many_there_are(monkeypatch) -> None:
    """Torch gives up on code that it compiled eight times."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, before = uncompiled("plain"), compiled_graphs()
    pixels = torch.stack([question.pixels for question in questions(model, 2)])
    for _ in range(10):
        front_of(model)[0]._compile(pixels, None)
    assert compiled_graphs() - before == 10


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_what_torch_cannot_compile_runs_as_it_is_and_says_so(monkeypatch) -> None:
    def broken(*_args, **_kwargs):
        def fail(_pixels: Tensor) -> Tensor:
            raise RuntimeError("no Triton\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    model = uncompiled("plain")
    front, _ = front_of(model)
    pixels = torch.stack([question.pixels for question in questions(model, 2)])
    (expected,) = front(pixels)
    with capture_logs() as logs:
        front._compile(pixels, None)
    assert [(each["event"], each["detail"]) for each in logs] == [
        ("front_runs_uncompiled", "no Triton")
    ]
    assert torch.equal(front(pixels)[0], expected)


def test_weights_are_cast_once_in_a_copy() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    copy = torch_front._in_bf16(module)
    assert [p.dtype for p in copy.parameters()] == [
        *[torch.bfloat16] * 2,
        *[torch.float32] * 2,
        *[torch.bfloat16] * 2,
    ]
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert copy[1].weight.data_ptr() == module[1].weight.data_ptr(), "the rest is shared"
