"""What one forward pass recorded, and the share of each image in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from service.cam.hooks import Calls, Recording, calls_of
from service.cam.layouts import Layout
from service.inference.contrast import Contrast
from service.inference.questions import Activation, ActivationKind, Question
from service.models.compiled.front import Precision
from service.models.loaded import LoadedModel

GradientPoint = tuple[ActivationKind, str, int]
"""A tensor to differentiate at: which side of which layer (and part), in which call."""


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One forward pass of a batch: `gradients` has (K, B, ...) for each recorded point."""

    model: LoadedModel
    questions: Sequence[Question]
    targets: Sequence[tuple[int, ...]]
    recording: Recording
    gradients: Mapping[GradientPoint, Tensor]
    precision: Precision = "float32"


@dataclass(frozen=True, slots=True)
class ImagePass:
    """What the shared forward pass gave one image.

    logits:      (classes,) float32 on the CPU.
    targets:     the class ids to explain, empty where nothing is to be explained.
    target_activations: each target layer's output (1, ...) in its own layout, by image, detached.
    maps:        the CAM of each target (h, w) on the CPU; empty for methods that need more passes.
    activations: the captured activations.
    repeated:    whether a target layer ran several times in this pass.
    precision:   of the engine that ran it.
    """

    model: LoadedModel
    question: Question
    logits: Tensor
    targets: tuple[int, ...]
    target_activations: Mapping[str, Tensor]
    maps: Sequence[Tensor]
    activations: tuple[Activation, ...]
    repeated: bool
    precision: Precision = "float32"

    def target_value(self, logits: Tensor, position: int) -> Tensor:
        """What is explained for the target at a position, of any logits (..., classes)."""
        target = self.targets[position]
        contrast = self.contrast(target)
        return logits[..., target] if contrast is None else contrast.lead(logits, target)

    def contrast(self, target: int) -> Contrast | None:
        """What a target's logit is compared with in this image."""
        contrast = self.question.contrast
        return None if contrast is None else contrast.at(self.logits, target)


def activations_of(forward_pass: ForwardPass, image: int) -> Iterator[Activation]:
    """The activations that one image's question names, call by call."""
    question, recording = forward_pass.questions[image], forward_pass.recording
    batch_size = len(forward_pass.questions)
    sides: dict[ActivationKind, Calls] = {
        "output": recording.outputs,
        "input": recording.inputs,
        "grad_output": recording.targets,
        "grad_input": recording.input_targets,
    }
    for path, kind in product(question.activations, question.kinds):
        layer = forward_pass.model.layer(path)
        shapes = layer.taken if kind.endswith("input") else layer.given
        for part, call, recorded in calls_of(sides[kind], path):
            single_shape, values = shapes.get((part, call)), recorded
            if kind.startswith("grad"):
                point = (kind, path + part, call)
                if point not in forward_pass.gradients:
                    continue
                if batch_size > 1 and recorded.shape == single_shape:
                    # Its gradient is the sum over all images: the scheduler runs each alone then.
                    raise RuntimeError(f"{path}{part} has no dimension that tells images apart")
                values = forward_pass.gradients[point][0]
            values = _image_slice(values, image, batch_size, single_shape)
            yield Activation(path, kind, call, part, read_only_array(values))


def _image_slice(
    values: Tensor, image: int, batch_size: int, single_shape: tuple[int, ...] | None
) -> Tensor:
    """One image's part of a recorded tensor, as if the image had been alone in the pass.

    single_shape: the tensor's shape for a single image. In a batch one dimension is that many times
    as long (where the model cuts images into windows, the first is a multiple of the batch), or
    none: such a tensor, a table of positions for instance, is the same for all images. Where a
    model's shapes depend on the pixels, the first dimension is taken to be the batch.
    """
    if batch_size > 1 and values.ndim and values.shape != single_shape:
        axis = _batch_axis(tuple(values.shape), batch_size, single_shape or ())
        rows, rest = divmod(values.shape[axis], batch_size)
        values = values if rest else values.narrow(axis, image * rows, rows)
    return values[0] if values.ndim and values.shape[0] == 1 else values


def _batch_axis(shape: tuple[int, ...], batch_size: int, single_shape: tuple[int, ...]) -> int:
    for axis, length in enumerate(single_shape):
        if shape == (*single_shape[:axis], length * batch_size, *single_shape[axis + 1 :]):
            return axis
    return 0


def read_only_array(values: Tensor) -> NDArray[np.float32]:
    """A read-only float32 copy on the CPU, so that no result keeps a whole batch alive."""
    array = np.array(values.detach().float().cpu().numpy(), dtype=np.float32, order="C")
    array.flags.writeable = False
    return array


def feature_layout(model: LoadedModel, path: str) -> Layout:
    """The layout of a layer that was checked to have one."""
    layout = model.layer(path).layout
    assert layout is not None
    return layout
