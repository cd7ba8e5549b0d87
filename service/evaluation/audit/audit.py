"""Audit a model on images in memory: all classes that have enough of them, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from service.evaluation.audit.class_audit import Casts, audit_class, cast_images
from service.evaluation.audit.findings import ClassAudit
from service.evaluation.audit.passes import Passes
from service.evaluation.audit.sample import Scanned
from service.models.loaded import LoadedModel


@dataclass(frozen=True, slots=True)
class Audit:
    """The audit of a model: classes in order of class id.

    nothing: the class that strongly blurred images mostly become, and the share of them that do.
    """

    model: LoadedModel
    images: int
    classes: Sequence[ClassAudit]
    nothing: tuple[str, float] | None

    def as_json(self) -> dict[str, Any]:
        """All figures as JSON, without images."""
        classes = [one.as_json() for one in self.classes]
        return as_json(self.model, self.images, self.nothing, classes)


def as_json(
    model: LoadedModel,
    images: int,
    nothing: tuple[str, float] | None,
    classes: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The audit of a model as JSON, of its classes as JSON."""
    return {
        "model": {"name": model.name, "version": model.version},
        "images": images,
        "nothing": None if nothing is None else {"label": nothing[0], "share": nothing[1]},
        "classes": list(classes),
    }


def audit(
    model: LoadedModel,
    images: Sequence[Tensor],
    *,
    labels: Sequence[int | None] | None = None,
    masks: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
    on_class: Callable[[ClassAudit], None] = lambda _: None,
) -> Audit:
    """What turns images of other classes into each class, for all classes with an image.

    images: uint8 (C, h, w) at the model's input size; read several times, and may be lazy.
    labels: the right class of each; an image with a class's label is no recipient for it.
    masks:  bool (h, w) of the object in each; without them a part is never a suspected cue.
    names:  for the report. on_class: called with each class when it is done.

    Deterministic for a seed. At most 1,100 forward passes a class, and one an image.
    """
    passes = Passes.of(model)
    nothing = [None] * len(images)
    scanned = Scanned(
        images,
        passes.logits(images),
        nothing if labels is None else labels,
        nothing if masks is None else masks,
        [f"{index}" for index in range(len(images))] if names is None else names,
    )
    ids = classes_in(scanned)
    casts = cast_images(passes, scanned, seed) if ids else None
    classes = list[ClassAudit]()
    for class_id in ids:
        classes.append(audit_class(passes, scanned, casts, class_id, seed))
        on_class(classes[-1])
    return concluded(model, scanned, casts, classes)


def classes_in(scanned: Scanned) -> list[int]:
    """The classes that an image is predicted as or labelled with, in order."""
    labelled = {label for label in scanned.labels if label is not None}
    return sorted({*scanned.predicted, *labelled})


def concluded(
    model: LoadedModel, scanned: Scanned, casts: Casts | None, classes: Sequence[ClassAudit]
) -> Audit:
    """The audit of a model, of those of its classes."""
    nothing = None if casts is None else (model.labels[casts.nothing[0]], casts.nothing[1])
    return Audit(model, len(scanned.names), classes, nothing)
