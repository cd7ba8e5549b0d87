"""The compiled lane: offered where its numbers are the hooked lane's, refused with a reason."""

from __future__ import annotations

import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
import torchvision
from disks import playing
from tiny import SmallNet
from torch import nn

from service.cam.hooks import record
from service.errors import ConfigurationError
from service.inference.batch import run, run_compiled
from service.inference.contrast import Contrast
from service.inference.questions import Question, lane_of
from service.models.catalog import ModelSpec
from service.models.compiled import lane as lanes
from service.models.compiled import openvino_front
from service.models.compiled.front import Normalised, Parity
from service.models.compiled.lane import TOLERANCES, Compiler, NotCompiled
from service.models.compiled.openvino_front import converted
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.pool import ModelPool

pytestmark = pytest.mark.timeout(60)

SIZE = 64
RESIDENT = r"({}/\S+)\n(?:.+\n)*?Rss: +(\d+) kB"


def make() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torchvision.models.resnet18(weights=None, num_classes=11)


def simple() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SmallNet()


def branching() -> nn.Module:
    class Branching(SmallNet):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    return Branching()


def stateful() -> nn.Module:
    """Its traced graph is not what it does: the number is fixed where it was traced."""

    class Stateful(SmallNet):
        def forward(self, x):
            return super().forward(x + float(torch.rand(())))

    return Stateful()


def traced_otherwise() -> nn.Module:
    """Its traced graph is not what it does, and it answers the same each time."""

    class TracedOtherwise(SmallNet):
        def forward(self, x):
            return super().forward(x if isinstance(x, torch.Tensor) else x + 1)

    return TracedOtherwise()


def thrice() -> nn.Module:
    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3)
            self.block = nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x)
            for _ in range(3):
                x = self.block(x).relu()
            return self.head(x.mean((2, 3)))

    return Thrice()


def spec_of(function: str, **more) -> ModelSpec:
    size = replace(ModelSpec("x", "y").input, size=(SIZE, SIZE), resize=SIZE)
    return ModelSpec(function, f"test_lane_models:{function}", input=size, **more)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """`package.module:function` builders come from this file."""
    monkeypatch.setitem(sys.modules, "test_lane_models", sys.modules[__name__])


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model_of("make", Compiler(streams=2, single_request_threads=2))


def load_model_of(function: str, compiler: Compiler | None, **more) -> LoadedModel:
    sys.modules.setdefault("test_lane_models", sys.modules[__name__])
    return load_model(spec_of(function, **more), allow_random_weights=True, compiler=compiler)


def picture(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def questions(count: int = 4, **options) -> list[Question]:
    return [Question(picture(seed), layers=("layer4",), **options) for seed in range(count)]


def hooked(model: LoadedModel, asked: list[Question]):
    with ModelPool([model], replicas=1).lease(model) as replica:
        return [run(replica, [each])[0] for each in asked]


METHODS = ("gradcam", "gradcampp", "hirescam", "layercam", "xgradcam", "eigencam", "cam")


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_it_answers_as_the_hooked_lane_does(model, method: str, wide: bool) -> None:
    asked = questions(3, method=method, targets=(0, 7), contrast=Contrast((3,)))
    for one, other in zip(run_compiled(model, asked, wide=wide), hooked(model, asked), strict=True):
        for mine, theirs in zip(one.explanations, other.explanations, strict=True):
            np.testing.assert_allclose(mine.grid, theirs.grid, atol=1e-4)
            assert (mine.class_id, mine.flags, mine.layers) == (
                theirs.class_id,
                theirs.flags,
                theirs.layers,
            )
            assert mine.high == pytest.approx(theirs.high, rel=1e-3)
        for mine, theirs in zip(one.predictions, other.predictions, strict=True):
            assert mine.class_id == theirs.class_id
            assert mine.score == pytest.approx(theirs.score, rel=1e-4)


def test_predictions_and_explanations_mix_in_a_batch(model) -> None:
    asked = [*questions(2), *questions(2, method=None)]
    answers = run_compiled(model, asked)
    assert [len(answer.explanations) for answer in answers] == [1, 1, 0, 0]
    for one, other in zip(answers, hooked(model, asked), strict=True):
        assert one.predictions[0].class_id == other.predictions[0].class_id
        for mine, theirs in zip(one.explanations, other.explanations, strict=True):
            assert theirs.grid.any()
            np.testing.assert_allclose(mine.grid, theirs.grid, atol=1e-4)


needs_bf16 = pytest.mark.skipif(
    not openvino_front.has_bf16(), reason="this processor computes no bf16"
)


@needs_bf16
def test_bf16_is_near_and_said_in_every_answer(model) -> None:
    rounded = load_model_of("make", Compiler(precision="bf16"))
    assert rounded.compiled.precision == "bf16"
    assert rounded.compiled.instead is None
    asked = questions(3, targets=(0, 7))
    for wide in (False, True):
        found = run_compiled(rounded, asked, wide=wide)
        for one, other in zip(found, run_compiled(model, asked), strict=True):
            assert (one.precision, other.precision) == ("bf16", "float32")
            for mine, theirs in zip(one.explanations, other.explanations, strict=True):
                assert 0 < np.abs(mine.grid - theirs.grid).max() < 0.1, "rounded, and no more"


@needs_bf16
@pytest.mark.parametrize(("said", "of_service"), [("bf16", "float32"), ("float32", "bf16")])
def test_what_is_said_of_a_model_goes_before_what_is_said_of_all(said: str, of_service) -> None:
    found = load_model_of("make", Compiler(precision=of_service), precision=said)
    assert found.compiled.precision == said


@needs_bf16
def test_bf16_that_is_too_far_off_is_refused_for_float32(monkeypatch) -> None:
    strict = dict(lanes.TOLERANCES) | {"bf16": lanes.Tolerance(1e-6, 1e-6, 1e-6)}
    monkeypatch.setattr(lanes, "TOLERANCES", strict)
    found = load_model_of("make", Compiler(precision="bf16")).compiled
    assert found.precision == "float32"
    assert found.parity.is_within(lanes.TOLERANCES["float32"])
    assert "In bf16 its numbers differ from the hooked lane's" in found.instead


def test_a_processor_without_bf16_gives_float32_and_says_why(monkeypatch) -> None:
    monkeypatch.setattr(openvino_front, "has_bf16", lambda: False)
    found = load_model_of("make", Compiler(precision="bf16")).compiled
    assert found.precision == "float32"
    assert "In bf16 this processor cannot compute" in found.instead


def test_fusing_before_compiling_leaves_the_numbers(model) -> None:
    front, _ = lanes._split(model, model.module, model.compiled.layer)
    graphs = [openvino_front.graph_of(model, front, None, "", fuse=fuse) for fuse in (False, True)]
    plain, fused = ({node.get_type_name() for node in graph.get_ordered_ops()} for graph in graphs)
    assert "BatchNormInference" in plain - fused
    pixels = torch.stack([picture(seed) for seed in range(3)])
    (one,), (other,) = (openvino_front.OpenVinoFront(graph)(pixels) for graph in graphs)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(one.abs().max()))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_loaded_model_holds_neither_its_folded_form_nor_pages_of_its_graph(tmp_path) -> None:
    """Both are there again when a request needs them."""
    found = load_model_of("make", Compiler(cache=tmp_path))
    assert found.folded._module is None
    sizes = dict(re.findall(RESIDENT.format(tmp_path), Path("/proc/self/smaps").read_text()))
    assert set(sizes.values()) == {"0"}, sizes
    pixels = torch.stack([picture(seed) for seed in range(5)])
    expected = found.replicate()
    with record(expected, targets=[found.compiled.layer]) as seen, torch.no_grad():
        expected(found.normalised(pixels))
    (activation,) = found.compiled.front(pixels)
    actual = seen.targets[found.compiled.layer][-1].detach()
    torch.testing.assert_close(activation, actual, rtol=0, atol=3e-3 * float(actual.max()))


def test_what_the_cut_cannot_show_goes_to_the_hooked_lane(model) -> None:
    (plain,) = questions(1)
    assert lane_of(model, plain) == "compiled"
    assert lane_of(model, replace(plain, method=None, layers=())) == "compiled"
    assert lane_of(model, replace(plain, layers=("layer3",))) == "folded"
    assert lane_of(model, replace(plain, layers=("layer4", "layer3"))) == "folded"
    assert lane_of(model, replace(plain, method="scorecam")) == "compiled"
    assert lane_of(model, replace(plain, method="scorecam", layers=("layer3",))) == "folded"
    assert lane_of(model, replace(plain, method="rise", layers=())) == "compiled"
    assert lane_of(model, replace(plain, method="ablationcam")) == "folded"
    assert lane_of(model, replace(plain, method="integrated_gradients", layers=())) == "folded"
    assert lane_of(model, replace(plain, activations=("layer4",))) == "folded"
    assert lane_of(model, replace(plain, activations=("layer4.0.conv1",))) == "hooked"
    assert lane_of(replace(model, compiled=None), plain) == "folded"


@pytest.mark.parametrize(
    ("height", "width"), [(SIZE // 2, SIZE // 2), (SIZE * 2, SIZE * 2), (SIZE, SIZE * 2)]
)
def test_an_image_of_another_size_goes_to_the_hooked_lane(model, height: int, width: int) -> None:
    (plain,) = questions(1)
    pixels = torch.zeros(3, height, width, dtype=torch.uint8)
    assert lane_of(model, replace(plain, pixels=pixels)) == "folded"
    assert lane_of(model, replace(plain, pixels=pixels, method=None, layers=())) == "folded"


def test_four_threads_disturb_neither_each_other_nor_their_inputs(model) -> None:
    """OpenVINO 2026.4 wrote into other callers' arrays where inputs were shared."""
    lane = model.compiled
    batches = [torch.stack([picture(10 * n + i) for i in range(1 + n % 3)]) for n in range(12)]
    copies = [batch.clone() for batch in batches]
    alone = [lane.front(batch)[0] for batch in batches]
    kept = [activation.clone() for activation in alone]
    start = threading.Barrier(4)

    def work(first: int) -> list[tuple[int, torch.Tensor]]:
        start.wait(10)
        return [(n, lane.front(batches[n])[0]) for _ in range(10) for n in range(first, 12, 4)]

    with ThreadPoolExecutor(4) as threads:
        results = [each for found in threads.map(work, range(4)) for each in found]
    assert len(results) == 120
    for number, found in results:
        torch.testing.assert_close(found, kept[number], rtol=0, atol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(batches, copies, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(alone, kept, strict=True))


@pytest.mark.parametrize(
    ("single_request_threads", "largest", "expected"),
    [
        (1, 4, ["1", "4", "?"]),
        (2, 4, ["1", "4", "?", "?"]),
        (2, 2, ["1", "2", "?", "?"]),
        (2, 1, ["1", "1", "?", "?"]),
        (2, 64, ["1", "?", "?"]),
    ],
)
@pytest.mark.parametrize("is_small", [True, False])
def test_few_weights_are_packed_for_the_usual_batch_sizes_too(
    monkeypatch, single_request_threads: int, largest: int, expected: list[str], is_small: bool
) -> None:
    """Each program is compared with the hooked lane at load, and batches of any size are right."""
    made, ran = [], set()

    class Watched(openvino_front._Program):
        def __init__(self, graph, *about):
            super().__init__(graph, *about)
            self.size = str(graph.inputs[0].get_partial_shape()[0])
            made.append(self)

        def __call__(self, pixels):
            if pixels.any():  # zeros are run for their memory alone
                ran.add(self)
            assert self.size in ("?", str(len(pixels)))
            return super().__call__(pixels)

    monkeypatch.setattr(openvino_front, "_Program", Watched)
    if not is_small:
        monkeypatch.setattr(openvino_front, "FIXED_UP_TO", 0)
    compiler = Compiler(streams=2, single_request_threads=single_request_threads, largest=largest)
    model = load_model_of("simple", compiler)
    sizes = sorted(program.size for program in made)
    assert sizes == (expected if is_small else ["?"] * expected.count("?"))
    assert ran == set(made)
    for size in range(1, 6):
        batch = torch.stack([picture(seed) for seed in range(size)])
        parity = lanes.parity_on(model, model.compiled, [batch, batch])
        assert parity.is_within(TOLERANCES["float32"])


def test_the_picture_that_is_not_finite_fails_alone() -> None:
    model = load_model_of("make", Compiler())
    tail = model.compiled.tail

    def spoiled(*crossing: torch.Tensor) -> torch.Tensor:
        logits = tail(*crossing)
        return torch.where(torch.arange(len(logits))[:, None] == 1, torch.nan, logits)

    broken = replace(model, compiled=replace(model.compiled, tail=spoiled))
    first, second, third = run_compiled(broken, questions(3))
    assert second.code == "non_finite_output"
    assert first.explanations
    assert third.explanations


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("branching", "cannot be traced"),
        ("thrice", "runs several times"),
        ("stateful", "logits vary"),
        ("traced_otherwise", "differ from the hooked lane's"),
    ],
)
def test_where_it_cannot_be_right_it_says_why(function: str, reason: str) -> None:
    model = load_model_of(function, Compiler())
    assert model.compiled is None
    assert reason in model.not_compiled


def test_other_numbers_than_float32_stay_in_the_hooked_lane() -> None:
    model = load_model_of("make", Compiler(), dtype="bfloat16")
    assert "bfloat16" in model.not_compiled


def test_without_a_compiler_it_says_that_it_is_switched_off() -> None:
    assert "switched off" in load_model_of("make", None).not_compiled


def test_a_front_that_is_off_is_refused_with_the_numbers(monkeypatch) -> None:
    monkeypatch.setattr(lanes, "parity_on", lambda *_: Parity(0.5, 0.25, 0.125))
    model = load_model_of("make", Compiler())
    assert "activation by 0.5, map by 0.2, logits by 0.1" in model.not_compiled


def test_a_second_start_takes_the_front_from_disk(tmp_path: Path, monkeypatch) -> None:
    first = load_model_of("make", Compiler(cache=tmp_path))
    assert first.compiled
    (kept,) = tmp_path.glob("*.xml")
    assert kept.with_suffix(".bin").exists()
    assert len(list(tmp_path.iterdir())) == 2, "no draft is left"

    def convert(*_):
        raise AssertionError("converted again")

    monkeypatch.setattr("service.models.compiled.openvino_front._convert", convert)
    second = load_model_of("make", Compiler(cache=tmp_path))
    assert second.compiled
    assert second.compiled.parity == first.compiled.parity


def test_a_front_has_its_name_once_its_weights_are_on_the_disk(tmp_path: Path, monkeypatch) -> None:
    named = []
    with playing(tmp_path, monkeypatch) as disk:

        def check(path: Path) -> None:
            named.append(path.suffix)
            assert path.stat().st_ino in disk.synced
            if path.suffix == ".xml":
                assert disk.is_kept(path.with_suffix(".bin"))

        disk.when_named.append(check)
        load_model_of("make", Compiler(cache=tmp_path))
        assert disk.is_kept(next(tmp_path.glob("*.xml")))
    assert named == [".bin", ".xml"]


def test_an_int8_front_that_is_half_written_is_none(tmp_path: Path, monkeypatch) -> None:
    graph = converted(nn.Flatten(), torch.zeros(1, 3, 4, 4, dtype=torch.uint8), None, "")
    openvino_front.write(graph, tmp_path, {"identity": "a model"})

    def cut(*_: object) -> None:
        raise OSError("cut")

    monkeypatch.setattr("service.durable.sync", cut)
    with pytest.raises(OSError, match="cut"):
        openvino_front.write(graph, tmp_path, {"identity": "a model"})
    with pytest.raises(ConfigurationError, match="contains no int8 front"):
        openvino_front.read(tmp_path, "a model")


def test_a_front_on_disk_that_is_another_models_is_made_anew(tmp_path: Path) -> None:
    """The code of a builder can change while the weights' digest does not."""
    load_model_of("make", Compiler(cache=tmp_path))
    (kept,) = tmp_path.glob("*.xml")
    stranger = nn.Sequential(nn.Conv2d(3, 512, 32, stride=32)).eval().requires_grad_(False)
    front = Normalised(stranger, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).eval()
    wrong = converted(front, torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), None, "")
    openvino.save_model(wrong, kept, compress_to_fp16=False)
    again = load_model_of("make", Compiler(cache=tmp_path))
    assert again.compiled
    assert again.compiled.parity.is_within(TOLERANCES["float32"])
    assert load_model_of("make", Compiler(cache=tmp_path)).compiled, "and the disk holds it now"


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert load_model_of("make", Compiler(cache=blocked / "cache")).compiled


def test_it_refuses_to_compile_what_was_not_loaded_for_it() -> None:
    model = replace(load_model_of("make", None), target_layer=None)
    with pytest.raises(NotCompiled, match="no target layer"):
        Compiler().lane(model)
