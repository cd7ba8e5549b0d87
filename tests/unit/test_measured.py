"""What is measured of a model at load: each probe sees the model that fails it, and no other."""

from __future__ import annotations

from collections.abc import Callable

import misbehaving
import pytest
import torch
from misbehaving import SIDE
from tiny import SmallNet
from torch import nn

from service.cam.layouts import Layout, token_layout
from service.models.probes import behaviour as module
from service.models.probes import cell_positions
from service.models.probes.behaviour import Behaviour, Trial, behaviour, trial_images
from service.models.probes.cell_positions import covered, measure_cell_positions
from service.models.probes.layers import trace_layers
from service.models.replicas import replicate


def trial_of(module: nn.Module) -> Trial:
    images = trial_images((3, SIDE, SIDE)).float() / 255
    return Trial(module.eval().requires_grad_(requires_grad=False), images, None)


def measured_of(module: nn.Module) -> Behaviour:
    return behaviour(trial_of(module))


FAILING: dict[str, list[Callable[[], nn.Module]]] = {
    "isolation": [
        misbehaving.ReadsClosure,
        misbehaving.ReadsGlobal,
        misbehaving.KeepsOnClass,
        misbehaving.Locked,
        misbehaving.forward_of_master,
    ],
    "batch": [
        misbehaving.BatchStatistics,
        misbehaving.HiddenNorm,
        misbehaving.ViewOfOne,
        misbehaving.MixesBatch,
        misbehaving.MeanOfBatch,
    ],
    "determinism": [misbehaving.Drops],
    "output": [
        misbehaving.softmax,
        misbehaving.log_softmax,
        misbehaving.sigmoid,
        misbehaving.one_probability,
    ],
    "gradients": [misbehaving.OwnFunction],
}


def failed(found: Behaviour) -> set[str]:
    return {finding.name for finding in found.findings if not finding.passed}


def test_a_plain_model_passes_every_probe() -> None:
    assert failed(measured_of(SmallNet())) == set()
    assert failed(measured_of(misbehaving.tokens_at_start())) == set()


@pytest.mark.parametrize(
    ("name", "build"), [(name, build) for name, builds in FAILING.items() for build in builds]
)
def test_a_probe_fails_the_model_that_it_is_for(name: str, build: Callable[[], nn.Module]) -> None:
    found = measured_of(build())
    # What is not deterministic cannot be compared with itself in a batch or beside another.
    also = {"isolation", "batch"} if name == "determinism" else set()
    assert failed(found) == {name} | also
    assert all(finding.follows for finding in found.findings if not finding.passed)


@pytest.mark.parametrize(
    ("name", "parts", "broken", "build"),
    [
        ("isolation", ["_unlike_master", "_shared_state"], None, misbehaving.ReadsClosure),
        ("isolation", ["_shared_state"], None, misbehaving.ReadsGlobal),
        ("isolation", ["_unlike_master"], None, misbehaving.forward_of_master),
        ("batch", ["differ"], False, misbehaving.MeanOfBatch),
        ("output", ["output_activation"], None, misbehaving.softmax),
        ("gradients", ["gradients"], [], misbehaving.OwnFunction),
    ],
)
def test_the_tests_above_notice_a_probe_that_is_broken(
    name: str, parts: list[str], broken: object, build: Callable[[], nn.Module], monkeypatch
) -> None:
    for part in parts:
        monkeypatch.setattr(module, part, lambda *_args, **_more: broken)
    assert name not in failed(measured_of(build()))


def test_a_model_that_draws_numbers_is_flagged_though_its_logits_are_the_same() -> None:
    class DrawsAside(misbehaving.SmallNet):
        def forward(self, x):
            return super().forward(x) + 0 * torch.rand(1)

    found = measured_of(DrawsAside())
    assert failed(found) == {"determinism"}
    assert not found.deterministic
    assert "Maps may vary" in found.findings[2].follows


def test_what_a_lease_restores_after_each_call_does_not_count_as_other_answers() -> None:
    assert failed(measured_of(misbehaving.Counts())) == set()


def test_a_batch_is_compared_where_probabilities_are_saturated() -> None:
    class Sure(misbehaving.BatchStatistics):
        def forward(self, x):
            return (super().forward(x) + 9).sigmoid()

    assert "batch" in failed(measured_of(Sure()))


def test_the_activation_in_a_model_is_named() -> None:
    kinds = {
        build.__name__: measured_of(build()).output_activation
        for build in (misbehaving.softmax, misbehaving.log_softmax, misbehaving.sigmoid)
    }
    assert kinds == {name: name for name in ("softmax", "log_softmax", "sigmoid")}


def test_small_logits_that_lie_in_0_to_1_by_chance_are_logits() -> None:
    net = SmallNet(3)
    with torch.no_grad():
        net.head.weight.mul_(0.01)
        net.head.bias.fill_(0.5)
    assert measured_of(net).output_activation is None


def test_a_sigmoid_is_found_behind_what_only_moves_and_scales_it() -> None:
    class Scaled(misbehaving.SmallNet):
        def forward(self, x):
            return (super().forward(x)[:, None].tanh() / 2 + 0.5).squeeze(1)

    assert measured_of(Scaled(3)).output_activation == "sigmoid"


def test_measuring_leaves_buffers_and_random_numbers_as_they_were() -> None:
    net = misbehaving.BatchStatistics().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measured_of(net)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_what_the_first_call_builds_is_no_state_and_not_left_in_the_master() -> None:
    net = misbehaving.BuildsTable()
    images = trial_of(net).images
    expected = misbehaving.BuildsTable().eval()(images[:1])
    trial = trial_of(net)
    assert failed(behaviour(trial)) == set()
    assert net.table.shape == (1, 1)
    assert net.columns == 0
    assert torch.allclose(replicate(net)(images[:1]), expected)


# ---- where cells look


def places_of(module: nn.Module, size: tuple[int, int] = (SIDE, SIDE)):
    module = module.eval().requires_grad_(requires_grad=False)
    image = trial_images((3, *size))[:1].float() / 255
    return measure_cell_positions(module, trace_layers(module, image).layers, image, batchable=True)


def layout_at(found, path: str):
    return next(layer.layout for layer in found.layers if layer.path == path)


def test_cells_of_a_plain_model_look_where_their_shape_says() -> None:
    found = places_of(SmallNet())
    assert set(found.verdicts.values()) == {"confirmed"}


@pytest.mark.parametrize(
    ("build", "first", "second"),
    [
        (misbehaving.tokens_at_start, 4, 5),
        (misbehaving.tokens_at_end, 0, 1),
        (misbehaving.tokens_inside, 0, 1),
        (misbehaving.tokens_by_column, 1, 9),
    ],
)
def test_tokens_are_laid_out_where_they_look(
    build: Callable[[], nn.Module], first: int, second: int
) -> None:
    """`first` and `second`: which tokens the first two cells of the first row are."""
    layout = layout_at(places_of(build()), "blocks.1.norm1")
    length = 64 + {"tokens_inside": 3, "tokens_by_column": 1}.get(build.__name__, 4)
    numbered = torch.arange(length, dtype=torch.float32)[None, :, None]
    cells = layout.as_map(numbered)[0, 0]
    assert cells.shape == (8, 8)
    assert cells[0, :2].tolist() == [first, second]
    if build is misbehaving.tokens_inside:  # behind the third of 35 tokens that are no patches
        assert cells[3, 7] == 31
        assert cells[4, 0] == 35


def test_the_dimension_of_the_images_is_found() -> None:
    found = places_of(misbehaving.sequence_first())
    layout = layout_at(found, "encoder.layers.0.norm2")
    assert (layout.batch_axis, layout.prefix, layout.grid) == (1, 1, (8, 8))


def test_a_transposed_map_is_turned_back() -> None:
    layout = layout_at(places_of(misbehaving.Transposed()), "features")
    numbered = torch.arange(64, dtype=torch.float32).reshape(1, 1, 8, 8)
    assert torch.equal(layout.as_map(numbered), numbered.transpose(2, 3))


def test_few_tokens_with_a_place_are_no_other_layout() -> None:
    found = places_of(misbehaving.Summarises())
    assert found.verdicts["summaries"] != "corrected"
    assert found.verdicts["features"] == "confirmed"


def test_a_shape_that_no_grid_fits_is_measured_too() -> None:
    assert places_of(misbehaving.OddlyShaped()).verdicts["features"] == "confirmed"


@pytest.mark.parametrize("build", [misbehaving.scrambled, misbehaving.Rolled])
def test_no_map_is_drawn_from_cells_in_no_known_order(build: Callable[[], nn.Module]) -> None:
    found = places_of(build())
    path = "norm" if build is misbehaving.scrambled else "features"
    assert found.verdicts[path] == "scattered"
    assert layout_at(found, path) is None


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (SmallNet, None),
        (misbehaving.Crops, (0.25, 0.25, 0.5, 0.5)),
        (misbehaving.CutsCorner, (0.0, 0.0, 0.5, 0.5)),
    ],
)
def test_the_part_of_the_input_that_is_looked_at_is_measured(
    build: Callable[[], nn.Module], expected: tuple[float, ...] | None
) -> None:
    module = build().eval().requires_grad_(requires_grad=False)
    image = trial_images((3, SIDE, SIDE))[:1].float() / 255
    assert covered(module, "features", image) == expected


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("extra", [0, 3])
def test_all_places_of_a_gap_are_scored_as_each_alone(by_column: bool, extra: int) -> None:
    generator = torch.Generator().manual_seed(4)
    output = torch.randn(5, 12 + extra, 6, generator=generator)
    looks = cell_positions._MeasuredPositions(output, (12 + extra, 6))
    scores = looks.by_start(Layout("tokens", (3, 4), extra), by_column=by_column)
    each = [
        looks.score(token_layout(12 + extra, (3, 4), start, by_column=by_column))
        for start in range(13)
    ]
    assert scores.tolist() == pytest.approx(each)
    assert max(each) - min(each) > 0.1 or not extra


def test_no_map_is_drawn_where_neither_shape_nor_measurement_speaks_for_one() -> None:
    found = places_of(misbehaving.Unfolds())
    assert found.verdicts["unfolded"] == "unclear"
    assert layout_at(found, "unfolded") is None


def test_replicas_run_in_turn_for_a_bounded_time(monkeypatch) -> None:
    turns: list[int] = []
    take = module._Turns._wait

    def counted(self, number: int) -> None:
        turns.append(number)
        take(self, number)

    monkeypatch.setattr(module._Turns, "_wait", counted)
    assert failed(measured_of(SmallNet())) == set()
    in_turn = len(turns)
    turns.clear()
    monkeypatch.setattr(module, "TURNS_SECONDS", -1.0)
    assert failed(measured_of(SmallNet())) == set()
    assert len(turns) < 5 < in_turn


def test_what_other_layers_look_at_does_not_fail_the_target_layer() -> None:
    found = places_of(misbehaving.OddlyShaped())
    assert found.verdicts["rows"] == "scattered"
    assert found.finding("features").passed
    assert not found.finding("rows").passed


def test_what_cannot_be_told_apart_is_laid_out_as_others_of_its_shape() -> None:
    at_end = places_of(misbehaving.mixed_at_end())
    assert at_end.verdicts["mean"] == "unclear"
    assert layout_at(at_end, "mean") == layout_at(at_end, "blocks.1.norm1")
    assert layout_at(at_end, "mean").prefix == 0
    scrambled = places_of(misbehaving.mixed_scrambled())
    assert scrambled.verdicts["mean"] == "scattered"
    assert layout_at(scrambled, "mean") is None
