"""What one forward pass recorded, and the part of each image in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from service.cam.hooks import Calls, Recording, calls_of
from service.cam.layouts import Layout
from service.inference.questions import Activation, Kind, Question
from service.models.loaded import LoadedModel

Place = tuple[Kind, str, int]
"""A point to differentiate at: which side of which layer (and part), at which call."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass: `found` has the gradient (K, B, ...) at each recorded point."""

    model: LoadedModel
    questions: Sequence[Question]
    targets: Sequence[tuple[int, ...]]
    seen: Recording
    found: Mapping[Place, Tensor]


@dataclass(frozen=True, slots=True)
class Part:
    """What the shared forward pass gave one image.

    logits:      (classes,) float32 on the CPU.
    targets:     the class ids to explain, empty where nothing is to be explained.
    activations: each target layer's output (1, ...) in its own layout, by image, detached.
    maps:        the CAM of each target (h, w) on the CPU; empty for methods that go on from here.
    captured:    what was asked to be captured.
    repeated:    whether a target layer ran several times in this pass.
    """

    model: LoadedModel
    question: Question
    logits: Tensor
    targets: tuple[int, ...]
    activations: Mapping[str, Tensor]
    maps: Sequence[Tensor]
    captured: tuple[Activation, ...]
    repeated: bool

    def value(self, logits: Tensor, place: int) -> Tensor:
        """What is explained for a target, of any logits (..., classes): its logit, or its lead."""
        value = logits[..., self.targets[place]]
        contrast = self.question.contrast
        return value if contrast is None else value - logits[..., contrast]


def captures(done: Pass, image: int) -> Iterator[Activation]:
    """What one image asked to be captured, call by call."""
    question = done.questions[image]
    sides: dict[Kind, Calls] = {
        "output": done.seen.outputs,
        "input": done.seen.inputs,
        "grad_output": done.seen.targets,
        "grad_input": done.seen.input_targets,
    }
    for path, kind in product(question.activations, question.kinds):
        layer = done.model.layer(path)
        for part, call, values in calls_of(sides[kind], path):
            alone = (layer.taken if kind.endswith("input") else layer.given).get((part, call))
            if not kind.startswith("grad"):
                own = _own_part(values, image, len(done.questions), alone)
            elif (kind, path + part, call) in done.found:
                if len(done.questions) > 1 and values.shape == alone:
                    # Its gradient is the sum over all images. The scheduler then asks one by one.
                    raise RuntimeError(f"{path}{part} has no dimension that tells images apart")
                found = done.found[kind, path + part, call][0]
                own = _own_part(found, image, len(done.questions), alone)
            else:
                continue
            yield Activation(path, kind, call, part, frozen(own))


def _own_part(values: Tensor, index: int, batch_size: int, alone: tuple[int, ...] | None) -> Tensor:
    """One image's part of a recorded tensor, as if the image had been alone in the pass.

    alone: its shape then. In a batch one dimension is that many times as long (where the model cuts
    images into windows, the first is a multiple of the batch), or none: such a tensor, a table of
    positions for instance, is the same for all images. Where a model's shapes depend on what it
    sees, the first dimension is taken to be the batch.
    """
    if batch_size > 1 and values.ndim and values.shape != alone:
        axis = _batch_axis(tuple(values.shape), batch_size, alone)
        rows, rest = divmod(values.shape[axis], batch_size)
        values = values if rest else values.narrow(axis, index * rows, rows)
    return values[0] if values.ndim and values.shape[0] == 1 else values


def _batch_axis(shape: tuple[int, ...], batch_size: int, alone: tuple[int, ...] | None) -> int:
    alone = alone or ()
    for axis, length in enumerate(alone):
        if shape == (*alone[:axis], length * batch_size, *alone[axis + 1 :]):
            return axis
    return 0


def frozen(values: Tensor) -> NDArray[np.float32]:
    """A read-only float32 copy on the CPU, so that no result keeps a whole batch alive."""
    array = np.array(values.detach().float().cpu().numpy(), dtype=np.float32, order="C")
    array.flags.writeable = False
    return array


def layout_of_layer(model: LoadedModel, path: str) -> Layout:
    """The layout of a layer that was checked to have one."""
    layout = model.layer(path).layout
    assert layout is not None
    return layout
