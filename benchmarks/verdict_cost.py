"""What a verdict costs, and what methods without gradients gain from the compiled lane.

The unit is a plain forward pass of the compiled lane, of one image in a batch of CHUNK, measured in
turn with everything else. A verdict is the CPU time of an answer with it less that of one without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from measuring import Times, in_turn, ratio
from verdict_cases import loaded

from service.inference.batch import Unfinished, run, run_compiled
from service.inference.perturbation import CHUNK
from service.inference.questions import InferenceResult, Question
from service.models.catalog import ModelSpec
from service.models.compiled.lane import Compiler
from service.models.loading import load_model
from service.models.pool import Replica
from service.models.probes.condition import Condition

METHODS = ("rise", "occlusion", "scorecam")
CHUNKS = 1
"""Chunks of a method that are timed in a round."""

MODELS = ("mobilenet_v2", "resnet50")


def measured(seconds: float, *, quick: bool = False) -> dict[str, dict[str, Any]]:
    """By model: a verdict in forward passes, and the ratios of each method."""
    if quick:
        return {"builtin": of_model(loaded(ModelSpec("builtin", "builtin")), seconds, 1)}
    found = {}
    for name in MODELS:
        spec = ModelSpec(name, f"torchvision/{name}")
        model = load_model(spec, allow_random_weights=True, compiler=Compiler(largest=CHUNK))
        module = model.replicate()
        found[name] = of_model(Replica(model, module, Condition.of(module)), seconds, 7)
    return found


def of_model(replica: Replica, seconds: float, least: int) -> dict[str, Any]:
    """Both measurements of one model, `seconds` long each."""
    model = replica.model
    assert model.compiled is not None
    assert model.target_layer is not None
    size = (model.preprocessing.channels, *model.preprocessing.crop)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, size, generator=generator, dtype=torch.uint8)
    batch = pixels.repeat(CHUNK, 1, 1, 1)
    lane = model.compiled

    def forward() -> None:
        with torch.no_grad():
            model.logits(lane.tail(*lane.front(batch)))

    def asked(question: Question) -> Callable[[], None]:
        def once() -> None:
            (found,) = run_compiled(model, [question])
            while isinstance(found, Unfinished):
                found = found.step(replica) or found
            assert isinstance(found, InferenceResult), found

        return once

    plain = Question(pixels, top_k=1, layers=(model.target_layer,))
    times = in_turn(
        {
            "forward": forward,
            "with": asked(replace(plain, verify=True)),
            "without": asked(plain),
        },
        seconds,
        least,
    )
    unit = [each / CHUNK for each in times["forward"].cpu]
    extra = [a - b for a, b in zip(times["with"].cpu, times["without"].cpu, strict=True)]
    hooked = replace(replica, model=replace(model, compiled=None))
    variants: dict[str, Callable[[], object]] = {"forward": forward}
    for method in METHODS:
        for lane_name, each in (("compiled", replica), ("hooked", hooked)):
            variants[f"{method} {lane_name}"] = chunks(
                each, replace(plain, method=method, samples=10_000)
            )
    in_chunks = in_turn(variants, seconds, least)
    return {
        "verdict": list(_triple(ratio(extra, unit))),
        "rounds": len(unit),
        **{method: _of_method(in_chunks, method) for method in METHODS},
    }


def chunks(replica: Replica, question: Question) -> Callable[[], None]:
    """Runs CHUNKS chunks of a method each time, and begins again where it ends."""
    layers = question.layers if question.method == "scorecam" else ()
    question = replace(question, layers=layers, targets=(0,))
    state: list[Unfinished] = []

    def begin() -> None:
        (found,) = run(replica, [question])
        assert isinstance(found, Unfinished), found
        state[:] = [found]

    def some() -> None:
        for _ in range(CHUNKS):
            if state[0].step(replica) is not None:
                begin()

    begin()
    return some


def _of_method(times: Mapping[str, Times], method: str) -> dict[str, list[float]]:
    compiled, hooked = times[f"{method} compiled"], times[f"{method} hooked"]
    unit = [each * CHUNKS for each in times["forward"].cpu]
    return {
        "of_hooked": list(_triple(ratio(compiled.wall, hooked.wall))),
        "of_forward": list(_triple(ratio(compiled.cpu, unit))),
    }


def _triple(found: Any) -> tuple[float, float, float]:
    return found.median, found.low, found.high
