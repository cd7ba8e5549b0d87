"""Verdicts: 40 forward passes of an image, shared by all its targets and maps."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import torch

from service.cam.verdict import RUNS, WHOLE, Evidence, contrasts, design, filled, hidden, judge
from service.inference.forward_pass import ImagePass
from service.inference.perturbation import chunked_logits
from service.inference.questions import InferenceResult
from service.models.pool import Replica

ROUNDING = 1e-5
"""What logits in float32 differ by without a reason, as a share of the largest."""


def gather(image_pass: ImagePass) -> Generator[None, Replica, Evidence]:
    """Run the design on the image of a question; yields where it needs a replica."""
    model, question = image_pass.model, image_pass.question
    plan = design((question.pixels.shape[1], question.pixels.shape[2]), question.seen)
    fills = filled(question.pixels, plan)
    logits = yield from chunked_logits(
        model, RUNS, lambda runs: hidden(question.pixels, plan, runs, fills)
    )
    return Evidence(
        plan,
        image_pass.logits - logits,
        contrasts(question.pixels, plan),
        model.preprocessing.covers or WHOLE,
        rounding=ROUNDING * float(image_pass.logits.abs().max()),
    )


def judged(result: InferenceResult, evidence: Evidence) -> InferenceResult:
    """The result with a verdict for each explanation."""
    explanations = [
        replace(one, verdict=judge(evidence, torch.tensor(one.grid), one.class_id, one.contrast))
        for one in result.explanations
    ]
    return replace(result, explanations=tuple(explanations), evidence=evidence)
