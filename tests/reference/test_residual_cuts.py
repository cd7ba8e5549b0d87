"""The compiled lane of transformers: a residual goes beside the cut, the numbers stay the hooked's.

Small networks of the families' own code, with random weights.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch

from service.inference.batch import Unfinished, run, run_compiled
from service.inference.contrast import Contrast
from service.inference.questions import Question, lane_of
from service.models.catalog import ModelSpec
from service.models.compiled.lane import Compiler
from service.models.loaded import LoadedModel
from service.models.loading import load_model

small_transformers = pytest.importorskip("small_transformers", reason="timm is not installed")

pytestmark = [pytest.mark.reference, pytest.mark.timeout(120)]

SIDE = small_transformers.SIDE
CUT = [name for name in small_transformers.MODELS if name not in small_transformers.OTHERS]


def compiled(name: str) -> LoadedModel:
    size = ModelSpec("x", "y").input
    spec = ModelSpec(
        name,
        f"small_transformers:{name}",
        input=type(size)(size=(SIDE, SIDE), resize=SIDE),
    )
    return load_model(
        spec,
        allow_random_weights=True,
        compiler=Compiler(streams=2, single_request_threads=2, largest=5),
    )


@pytest.mark.parametrize("name", CUT)
def test_the_compiled_lane_answers_as_the_hooked_one_in_batches_of_any_size(name: str) -> None:
    model = compiled(name)
    assert model.compiled is not None, model.not_compiled
    layers = model.target_layers(())
    for count in (1, 3, 5):
        asked = [
            Question(
                oracles.picture(seed, SIDE, SIDE),
                targets=(2, 7),
                contrast=Contrast((5,)),
                layers=layers,
            )
            for seed in range(count)
        ]
        assert {lane_of(model, each) for each in asked} == {"compiled"}
        with oracles.leased(model) as replica:
            expected = run(replica, asked)
        assert any(each.grid.any() for answer in expected for each in answer.explanations)
        for one, other in zip(run_compiled(model, asked), expected, strict=True):
            for mine, theirs in zip(one.explanations, other.explanations, strict=True):
                np.testing.assert_allclose(mine.grid, theirs.grid, atol=2e-4)
                assert mine.high == pytest.approx(theirs.high, rel=1e-3)
            for mine, theirs in zip(one.predictions, other.predictions, strict=True):
                assert mine.score == pytest.approx(theirs.score, rel=1e-3)


@pytest.mark.parametrize("method", ["rise", "scorecam", "occlusion"])
def test_methods_of_forward_passes_and_verdicts_run_through_a_residual_cut(method: str) -> None:
    model = compiled("timm_vit")
    layers = model.target_layers(()) if method == "scorecam" else ()
    question = Question(
        oracles.picture(1, SIDE, SIDE), method=method, layers=layers, samples=40, verify=True
    )
    assert lane_of(model, question) == "compiled"
    (expected,) = oracles.answers(replace(model, compiled=None), question)
    with oracles.leased(model) as replica:
        (steps,) = run_compiled(model, [question])
        assert isinstance(steps, Unfinished)
        found = oracles.finished(replica, steps)
    (ours,), (theirs,) = found.explanations, expected.explanations
    np.testing.assert_allclose(ours.grid, theirs.grid, atol=1e-3)
    assert ours.verdict.verdict == theirs.verdict.verdict
    assert ours.verdict.agreement == pytest.approx(theirs.verdict.agreement, abs=1e-3)


def test_four_threads_get_what_crosses_their_own_cut() -> None:
    model = compiled("timm_vit")
    front = model.compiled.front
    batches = [
        torch.stack([oracles.picture(10 * n + i, SIDE, SIDE) for i in range(1 + n % 3)])
        for n in range(8)
    ]
    alone = [front(batch) for batch in batches]
    assert [len(each) for each in alone] == [2] * 8, "the norm's output and its residual"
    start = threading.Barrier(4)

    def work(first: int) -> list[tuple[int, tuple[torch.Tensor, ...]]]:
        start.wait(10)
        return [(n, front(batches[n])) for _ in range(10) for n in range(first, 8, 4)]

    with ThreadPoolExecutor(4) as threads:
        results = [each for found in threads.map(work, range(4)) for each in found]
    assert len(results) == 80
    for number, found in results:
        torch.testing.assert_close(found, alone[number], rtol=0, atol=1e-4)
