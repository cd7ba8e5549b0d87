"""Measure a detector or a segmenter when it is loaded, before it is served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from service.cam.hooks import tensors_in
from service.errors import first_line
from service.models.probes.behaviour import Behaviour, Finding, preserved, seeded
from service.models.probes.torch_state import kept_torch_state
from service.models.replicas import replicate

Run = Callable[[nn.Module, Tensor], Sequence[Any]]
"""Runs a module on images (B, C, h, w); the output of each image."""

TOLERANCE = 1e-4
"""The largest difference of numbers that are the same, relative to the largest one."""

SKIPPED = (
    Finding("output", True, "Not measured: scores are those that the model returns."),
    Finding(
        "gradients",
        True,
        "Not measured: each target has a backward pass, since one for all is not faster here.",
    ),
    Finding(
        "places",
        True,
        "Not measured: layers are maps (channels, height, width), or the tokens of YOLOS.",
    ),
)


def task_behaviour(master: nn.Module, images: Tensor, run: Run) -> tuple[Behaviour, nn.Module]:
    """The behaviour of a built and frozen model, and the module that requests run.

    images: two that differ, normalised (2, C, h, w), of one size.
    """
    served, reason = _copied(master, images, run)
    alone = [_given(served, image[None], run) for image in images]
    again = _given(served, images[:1], run, seed=1)
    together = _given(served, images, run)
    steady = _alike(alone[0], again)
    pairs = zip(together, alone, strict=True)
    batched = steady and all(_alike([one], other) for one, other in pairs)
    findings = (
        Finding(
            "isolation",
            reason is None,
            reason or "Replicas return the same as the master.",
            None if reason is None else "It is served by one replica, one batch at a time.",
        ),
        Finding(
            "batch",
            batched,
            f"Two images of one size get {'the same' if batched else 'something else'} together "
            f"{'as' if batched else 'than'} alone.",
            None if batched else "Each image has a forward pass of its own.",
        ),
        Finding(
            "determinism",
            steady,
            f"The same image gets {'the same' if steady else 'something else'} twice.",
            None if steady else "Explanations carry the flag not_deterministic.",
        ),
        *SKIPPED,
    )
    behaves = Behaviour(
        isolated=reason is None,
        batchable=batched,
        deterministic=steady,
        vectorised=False,
        findings=findings,
    )
    return behaves, served


def _copied(master: nn.Module, images: Tensor, run: Run) -> tuple[nn.Module, str | None]:
    """The module that requests run: a replica, or the master with the reason."""
    try:
        replica = replicate(master)
        same = _alike(_given(replica, images[:1], run), _given(master, images[:1], run))
    except Exception as error:  # noqa: BLE001 - a module may raise anything when it is copied
        return master, f"A copy cannot be used ({type(error).__name__}: {first_line(error)})."
    return (replica, None) if same else (master, "A copy returns something else than the master.")


def _given(module: nn.Module, images: Tensor, run: Run, seed: int = 0) -> Sequence[Any]:
    with torch.no_grad(), seeded(seed), kept_torch_state(random=False), preserved(module):
        return run(module, images)


def _alike(ones: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether the outputs of the same images are the same within rounding."""
    for one, other in zip(ones, others, strict=True):
        pairs = zip(tensors_in(one), tensors_in(other), strict=False)
        if any(not _close(mine, theirs) for (_, mine), (_, theirs) in pairs):
            return False
    return True


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.double(), other.double()
    largest = float(one.abs().max()) if one.numel() else 0.0
    return bool(torch.allclose(one, other, rtol=0, atol=TOLERANCE * largest, equal_nan=True))
