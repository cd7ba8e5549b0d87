"""The benchmark of verdicts in its quick form, on the built-in model and drawn images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent.parent.parent / "benchmarks")
    import method_verdicts
    import verdict_maps
    import verdict_tables
    import verdicts
    from verdict_cases import randomised

from api_schemas.methods import METHODS
from service.cam import verdict
from service.cam.verdict import design


@pytest.mark.timeout(60)
def test_the_quick_form_judges_every_kind_of_map(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    made = verdicts.main(["--quick", "--images", "3", "--results", str(results)])
    (rows,) = (
        part["found"]
        for part in json.loads(results.read_text()).values()
        if "group" in part["settings"]
    )
    for row in (*verdict_tables.CONTROLS, *verdict_tables.METHODS, *verdict_tables.DEPTHS):
        judged = sum(rows[row].get(each, 0) for each in verdict_tables.VERDICTS)
        reasons = sum(rows[row].values()) - judged
        assert judged in {2, 3, 4}, row
        assert reasons == rows[row].get("inconclusive", 0), row
    assert "| builtin, drawn | " in made
    again = verdicts.main(["--quick", "--images", "3", "--results", str(results)])
    assert again == made, "kept, not measured again"


@pytest.mark.large
@pytest.mark.timeout(120)
def test_every_method_is_judged_on_an_image(tmp_path: Path) -> None:
    """Methods that follow attention are left out for a network without any."""
    data = verdicts.ROOT.parent / "shared" / "data"
    if not (data / "flowers128.tar").exists():
        pytest.skip("the flowers of shared/data are absent")
    options = ["--data", str(data), "--models", "builtin", "--images", "2", "--slow", "1"]
    made = method_verdicts.main([*options, "--results", str(tmp_path / "results.json")])
    rows = dict(line.strip("| ").split(" | ") for line in made.splitlines()[2:])
    assert set(METHODS) - set(rows) == {"attention_rollout", "gae"}
    assert all("/1 = " in rows[name] for name in ("rise", "scorecam", "occlusion", "ablationcam"))
    assert all("/2 = " in rows[name] for name in ("gradcam", "guided_backprop", "eigencam"))


def test_a_moved_map_is_one_of_the_copies_that_the_null_has() -> None:
    generator = torch.Generator().manual_seed(0)
    cells = torch.rand(14, 14, generator=generator).double()
    copies = verdict._copies(cells)[0]
    for move in ((0, 0, 0), (1, 3, 13), (2, 7, 1), (3, 5, 5), (4, 2, 9), (7, 13, 13)):
        moved = verdict_maps._moved(cells, move).flatten()
        assert bool((copies == moved).all(dim=1).any()), move


def test_a_map_that_is_placed_in_a_padded_input_is_compared_as_it_is() -> None:
    plan = design((84, 112), (0.25, 0.0, 0.5, 1.0))
    cells = torch.rand(plan.shape).double()
    large = verdict_maps.placed(plan, cells)
    assert float(large[:, :28].abs().max()) == 0
    compared = plan.compared(large, verdict.WHOLE)
    assert torch.corrcoef(torch.stack([compared.flatten(), cells.flatten()]))[0, 1] > 0.9


def test_randomised_weights_are_the_same_numbers_in_another_order() -> None:
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    changed = {"head": {3}, "last half": {2, 3}, "all": {0, 1, 2, 3}}
    for depth, layers in changed.items():
        made = randomised(net, depth, 0)
        assert isinstance(made, nn.Sequential)
        for index, (own, other) in enumerate(zip(net, made, strict=True)):
            assert torch.equal(own.weight, other.weight) == (index not in layers)
            assert torch.equal(own.weight.flatten().sort()[0], other.weight.flatten().sort()[0])
