"""Experiments on the images of one request: from options and edits to what each edit changed.

    trials = await conduct(plan, recipe, uploads, index)          # one image
    result(plan, upload, trials, failure)                         # its place in the answer

An edit is made in the upright source's pixels, as a `mask` of `/explain` is, and the edited image
is then fitted to the model as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from api_schemas import answers as answered
from api_schemas import options as wire
from api_schemas.options import ExplainOptions, PredictOptions
from service.cam.regions import find_regions, mask_rle
from service.errors import CamserveError, InvalidOption
from service.images.budget import DecodeBudget
from service.images.declared_size import Size
from service.images.decode import Fit, Geometry, ModelInput, Preprocessing, Source, fit_to_model
from service.images.masks import filling, overlaid
from service.images.run_lengths import RLE, rle_decode
from service.images.upload import Upload, area_mask, for_model
from service.inference import pixel_edits as pixels_of
from service.inference.pixel_edits import Mask, Pixels
from service.inference.questions import (
    ChannelEdit,
    Edit,
    Effect,
    Explanation,
    GradientEdit,
    ImageEdit,
    InferenceResult,
    Prediction,
    Question,
    TrackedEffect,
)
from service.models.loaded import LoadedModel
from service.models.probes.logits import as_logits
from service.pipeline import response
from service.pipeline.answer_size import NUMBER_BYTES, AnswerSizes, longest_label
from service.pipeline.experiment_plan import ExperimentPlan, donors
from service.pipeline.process import result_of, run_question
from service.pipeline.resolve import place_of
from service.pipeline.service import Clock, Recipe, Service

Opened = Sequence[Upload | BaseException]
"""The images of a request, or why each could not be opened."""

Mark = tuple[int, wire.Region]
"""A region that a map of an image marks: the image's place, and what is asked of its map."""

Marks = Mapping[Mark, RLE]

_ENTRY, _EDIT, _NUMBERS, _CHANNEL = 1024, 512, 640, 6
"""Bytes in JSON: of an image's entry, of an edit, of a prediction or change, of a channel."""

_WORK = 6
"""Bytes that an edit takes at most for each byte of the source's pixels."""


@dataclass(frozen=True, slots=True, eq=False)
class Trials:
    """The answer about one unedited image, and the effect of each edit, or why it failed."""

    answer: InferenceResult
    effects: Sequence[Effect | TrackedEffect | CamserveError]


def recipe(service: Service, plan: ExperimentPlan, deadline: float | None, clock: Clock) -> Recipe:
    """How each image of a request is opened, with its pixels kept."""
    return Recipe(
        service=service,
        model=plan.model,
        options=PredictOptions(top_k=plan.options.top_k, fit=plan.options.fit),
        question=partial(Question, top_k=plan.options.top_k, method=None),
        hiding=None,
        deadline=deadline,
        clock=clock,
        keeps_source=True,
    )


async def conduct(plan: ExperimentPlan, recipe: Recipe, opened: Opened, index: int) -> Trials:
    """Make every edit of one image and its controls, in steps between other requests.

    opened: all images of the request, each with its `source`; edits may take from any of them.
    Raises why this image could not be opened, InvalidOption, DeadlineExceeded, and what the
    scheduler does.
    """
    upload = opened[index]
    if isinstance(upload, BaseException):
        raise upload
    question = _question(plan, upload.model_input)
    marks = await _marked(plan, recipe, opened, index)
    within = None
    if question.tracks:
        tracked = (await run_question(recipe, question)).tracked
        within = None if not tracked else _box(tracked[0], upload.model_input.geometry)
    setting = _Setting(plan, recipe.service.decoding, recipe.deadline, opened, index, marks, within)
    prepared = await result_of(
        recipe.service.scheduler.call_in_turn(id(recipe.clock), setting.edits)
    )
    edits = tuple(each for each in prepared if not isinstance(each, CamserveError))
    answer = await run_question(recipe, replace(question, edits=edits))
    effects = iter(answer.effects)
    return Trials(
        answer,
        [each if isinstance(each, CamserveError) else next(effects) for each in prepared],
    )


def _question(plan: ExperimentPlan, shown: ModelInput) -> Question:
    """What is asked of the unedited image; of a detector or segmenter, with what is tracked."""
    options = plan.options
    question = Question(**shown.placed, top_k=options.top_k, method=None)
    if plan.model.task == "classification":
        return question
    return replace(
        question,
        targets=plan.targets,
        places=tuple(place_of(place) for place in options.places()),
        min_score=plan.min_score,
        tracks=True,
    )


def _box(tracked: Prediction, geometry: Geometry) -> pixels_of.Area | None:
    """The pixels of the source around a detection or a region."""
    if tracked.box is None:
        assert tracked.mask is not None
        rle, _ = mask_rle(tracked.mask, geometry)
        return pixels_of.bounds(rle_decode(rle.size, rle.counts))
    return pixels_of.window(tracked.box, geometry.source_size)


async def _marked(plan: ExperimentPlan, recipe: Recipe, opened: Opened, index: int) -> Marks:
    """The regions that maps mark, of this image and of those that edits paste from."""
    found: dict[Mark, RLE] = {}
    for edit in plan.edits:
        region = getattr(edit, "region", None)
        if region is None or region.of is None:
            continue
        image = edit.image if isinstance(edit, wire.Paste) else index
        upload = opened[image]
        if (image, region) in found or isinstance(upload, BaseException):
            continue
        shown = upload.model_input
        question = replace(plan.marks[region], **shown.placed)
        answer = await run_question(recipe, question)
        grid = answer.explanations[0].grid
        side = recipe.service.limits.render_side
        call = recipe.service.scheduler.call(
            find_regions, grid, shown.geometry, region.threshold, side
        )
        found[image, region] = (await result_of(call)).rle
    return found


@dataclass(slots=True)
class _Kept:
    """What the edit whose controls are being made shows, so that it is made once."""

    name: str = ""
    pixels: Pixels | None = None

    def of(self, name: str, make: Callable[[], Pixels]) -> Pixels:
        if self.pixels is None or self.name != name:
            self.pixels = None  # one at a time
            self.name, self.pixels = name, make()
        return self.pixels


@dataclass(frozen=True, slots=True)
class _Setting:
    """What the edits of one image are made from.

    within: the box of what is tracked: controls of an edit that covers a part of it lie in it.
    """

    plan: ExperimentPlan
    memory: DecodeBudget
    deadline: float | None
    opened: Opened
    index: int
    marks: Marks
    within: pixels_of.Area | None = None
    kept: _Kept = field(default_factory=_Kept)

    def edits(self) -> list[Edit | CamserveError]:
        """Each edit with its controls; an error where the image that it takes from failed.

        Raises InvalidOption for a region that does not fit this image.
        """
        prepared: list[Edit | CamserveError] = []
        for number, (edit, inside) in enumerate(
            zip(self.plan.edits, self.plan.inside, strict=True)
        ):
            failed = next((name for _, name in donors(edit) if self._failed(name)), None)
            if failed is not None:
                prepared.append(
                    InvalidOption(f"The edit takes from image {failed}, which could not be read.")
                )
            elif inside is not None:
                prepared.append(self._inside(edit, inside))
            else:
                prepared.append(self._edit(edit, f"edits.{number}.{edit.edit}.region"))
        return prepared

    def _failed(self, image: int) -> bool:
        return isinstance(self.opened[image], BaseException)

    def _inside(self, edit: wire.Edit, inside: ChannelEdit | GradientEdit) -> Edit:
        """An edit of the model, for this image."""
        if isinstance(inside, GradientEdit):
            shown = self.input(self.index)
            return replace(inside, question=replace(inside.question, **shown.placed))
        assert isinstance(edit, wire.Channels)
        if isinstance(edit.set, wire.FromImage):
            return replace(inside, donor=self.input(edit.set.image).pixels)
        return inside

    def _edit(self, edit: wire.Edit, place: str) -> ImageEdit:
        source = self.source(self.index)
        variant: Callable[[int], Pixels] = partial(self._whole, edit)
        controls = 0
        region = getattr(edit, "region", None)
        if region is not None:
            placed = self._placed(edit, region, place)
            variant, controls = placed.pixels, len(placed.places)
        model, fit = self.plan.model, self.plan.options.fit

        def make(number: int) -> Tensor:
            with self.memory.take(_WORK * source.pixels.nbytes, self.deadline):
                return fitted(source, variant(number), model.preprocessing, fit)

        return ImageEdit(1 + controls, make)

    def input(self, image: int) -> ModelInput:
        """What the model sees of one of the images."""
        upload = self.opened[image]
        assert isinstance(upload, Upload)
        return upload.model_input

    def source(self, image: int) -> Source:
        """One of the decoded images."""
        upload = self.opened[image]
        assert isinstance(upload, Upload)
        assert upload.source is not None
        return upload.source

    def _whole(self, edit: wire.Edit, _number: int) -> Pixels:
        """An edit without a place."""
        pixels = self.source(self.index).pixels
        if isinstance(edit, wire.Flip):
            return pixels_of.flipped(pixels, edit.axis)
        if isinstance(edit, wire.Shift):
            return pixels_of.laid(pixels, (edit.x, edit.y), filling(pixels, edit.fill))
        if isinstance(edit, wire.Scale):
            return pixels_of.scaled(pixels, edit.factor, filling(pixels, edit.fill))
        assert isinstance(edit, wire.Recolour)
        return _recoloured(pixels, edit.to)

    def _placed(self, edit: wire.Edit, region: wire.Region, place: str) -> _Placed:
        """An edit of a region, and where else it is made."""
        source = self.source(self.index)
        image = edit.image if isinstance(edit, wire.Paste) else self.index
        mask = partial(self._mask, image, region, place)
        own = at = (0, 0)
        if isinstance(edit, wire.Paste) and edit.at is not None:
            area = pixels_of.bounds(mask())
            at = own if area is None else (edit.at[0] - area[0], edit.at[1] - area[1])
        laid = partial(_laid_by, mask, at, source.size)
        area = pixels_of.window(self.input(self.index).geometry.seen, source.size)
        if self.within is not None and _is_part(laid(), self.within):
            area = self.within
        left, top, width, height = area
        visible = pixels_of.bounds(laid()[top : top + height, left : left + width])
        controls, seed = self.plan.options.controls, self.plan.options.seed
        places = pixels_of.other_places(visible, (width, height), controls, seed)
        return _Placed(self, edit, laid, at, area, places)

    def _mask(self, image: int, region: wire.Region, place: str) -> Mask:
        """Bool (height, width) of an image's source. Raises InvalidOption."""
        if region.of is not None:
            marked = self.marks[image, region]
            return rle_decode(marked.size, marked.counts)
        rle = None if region.rle is None else (region.rle.size, region.rle.counts)
        return area_mask(self.source(image).size, region.boxes, rle, place)


def _is_part(mask: Mask, of: pixels_of.Area) -> bool:
    """Whether a mask lies in an area and leaves half of it or more free."""
    left, top, width, height = of
    inside, whole = int(mask[top : top + height, left : left + width].sum()), int(mask.sum())
    return 0 < inside == whole <= width * height / 2


def _laid_by(mask: Callable[[], Mask], at: tuple[int, int], size: tuple[int, int]) -> Mask:
    found = mask()
    if at == (0, 0) and found.shape == size[::-1]:
        return found
    return pixels_of.laid_mask(found, at, size)


@dataclass(frozen=True, slots=True)
class _Placed:
    """An edit of a region of one image, and the same edit at other places.

    mask:   makes the region, bool (height, width) of this image's source.
    at:     where the upper left of the image that is pasted from lies.
    seen:   what the model sees, in whole pixels. places: by how much each control is moved in it.
    """

    setting: _Setting
    edit: wire.Edit
    mask: Callable[[], Mask]
    at: tuple[int, int]
    seen: pixels_of.Area
    places: Sequence[tuple[int, int]]

    def pixels(self, number: int) -> Pixels:
        """The source's pixels with the edit (0) or a control made."""
        setting, edit, mask = self.setting, self.edit, self.mask()
        pixels = setting.source(setting.index).pixels
        if number:
            by = self.places[number - 1]
            mask = pixels_of.moved(mask.view(np.uint8), by, self.seen).view(np.bool_)
        over = setting.kept.of(self.edit.name, self._over)
        if number and isinstance(edit, wire.Paste):
            over = pixels_of.moved(over, by, self.seen)
        if isinstance(edit, wire.Keep | wire.Background):
            return overlaid(over.copy(), mask, pixels)
        return overlaid(pixels.copy(), mask, over)

    def _over(self) -> Pixels:
        """What the region shows, or everything outside it, in the size of the source."""
        setting, edit = self.setting, self.edit
        source = setting.source(setting.index)
        if isinstance(edit, wire.Paste):
            return pixels_of.laid(setting.source(edit.image).pixels, self.at, source.pixels)
        if isinstance(edit, wire.Recolour):
            return _recoloured(source.pixels, edit.to)
        if isinstance(edit, wire.Background):
            return pixels_of.stretched(setting.source(edit.image).pixels, source.size)
        assert isinstance(edit, wire.Hide | wire.Keep)
        if isinstance(edit.fill, wire.FromImage):
            return pixels_of.stretched(setting.source(edit.fill.image).pixels, source.size)
        return filling(source.pixels, edit.fill)


def fitted(source: Source, pixels: Pixels, preprocessing: Preprocessing, fit: Fit | None) -> Tensor:
    """An edited source as the model's input, uint8 (channels, height, width)."""
    edited = for_model(replace(source, pixels=pixels), preprocessing.channels)
    return fit_to_model(edited, preprocessing, fit).pixels


def _recoloured(pixels: Pixels, to: str | wire.Hue) -> Pixels:
    if isinstance(to, wire.Hue):
        return pixels_of.turned(pixels, to.hue)
    return pixels_of.grey(pixels) if to == "grey" else pixels_of.swapped(pixels, to)


def result(
    plan: ExperimentPlan,
    upload: Upload,
    trials: Trials,
    failure: Callable[[CamserveError], answered.ImageFailure],
    side: int,
) -> answered.ExperimentResult:
    """One image's place in the answer.

    failure: what an edit that failed says of it. side: the longest of what is drawn, in pixels.
    Raises RenderFailed.
    """
    answer = trials.answer
    fields: dict[str, Any] = {}
    if answer.precision != "float32":
        fields["precision"] = answer.precision
    measured: Callable[[wire.Edit, Any], answered.EditResult] = partial(_tracked, plan, answer)
    if plan.model.task == "classification":
        targets = plan.targets or (answer.predictions[0].class_id,)
        draw = partial(_map, plan.model, upload, side)
        measured = partial(_effect, plan, targets, draw)
    edits = [
        answered.EditResult(name=edit.name, edit=edit.edit, error=failure(effect))
        if isinstance(effect, CamserveError)
        else measured(edit, effect)
        for edit, effect in zip(plan.edits, trials.effects, strict=True)
    ]
    return answered.ExperimentResult(
        image=response.image_entry(upload),
        seen=upload.model_input.geometry.seen,
        predictions=[response.prediction_entry(plan.model, each) for each in answer.predictions],
        edits=edits,
        forwards=plan.price,
        **fields,
    )


def _tracked(
    plan: ExperimentPlan, answer: InferenceResult, edit: wire.Edit, effect: TrackedEffect
) -> answered.EditResult:
    """What an edit does to boxes or regions."""
    has_place = getattr(edit, "region", None) is not None
    changes = [
        _tracked_change(plan, target, effect, number, has_place=has_place)
        for number, target in enumerate(answer.tracked)
    ]
    return answered.EditResult(
        name=edit.name,
        edit=edit.edit,
        predictions=[response.prediction_entry(plan.model, each) for each in effect.predictions],
        changes=changes,
        control=changes[0].control if changes else None,
    )


def _tracked_change(
    plan: ExperimentPlan, target: Prediction, effect: TrackedEffect, number: int, *, has_place: bool
) -> answered.EditChange:
    score, overlap = effect.values[0, :, number].tolist()
    scores = effect.values[:, 0, number] - effect.unedited[0, number]
    after, before = as_logits(
        torch.stack([effect.values[0, 0, number], effect.unedited[0, number]]), "sigmoid"
    ).tolist()
    fields: dict[str, Any] = {}
    if target.box is not None:
        fields = {"detection": target.detection, "box": target.box}
    kept = score >= plan.min_score and overlap > 0 if target.box is not None else overlap >= 0.5
    return answered.EditChange(
        class_id=target.class_id,
        label=plan.model.labels[target.class_id],
        score=score,
        logit=after,
        score_change=float(scores[0]),
        logit_change=after - before,
        overlap=overlap,
        stays=kept,
        control=_control_of_scores(scores) if has_place else None,
        **fields,
    )


def _control_of_scores(changes: Tensor) -> answered.EditControl:
    """changes: of the score, by the edit and then by each control."""
    control = _control(changes)
    return control.model_copy(update={"logit_changes": [], "score_changes": changes[1:].tolist()})


def _effect(
    plan: ExperimentPlan,
    targets: Sequence[int],
    draw: Callable[[wire.GradientMap, Explanation], answered.Explanation],
    edit: wire.Edit,
    effect: Effect,
) -> answered.EditResult:
    model = plan.model
    has_place = isinstance(edit, wire.Channels) or getattr(edit, "region", None) is not None
    logits, unedited = effect.logits[0], effect.unedited
    scores, before = model.scores(logits), model.scores(unedited)
    best = logits.topk(min(plan.options.top_k, len(logits))).indices.tolist()
    changes = [
        answered.EditChange(
            class_id=one,
            label=model.labels[one],
            score=float(scores[one]),
            logit=float(logits[one]),
            score_change=float(scores[one] - before[one]),
            logit_change=float(logits[one] - unedited[one]),
            control=_control(effect.logits[:, one] - unedited[one]) if has_place else None,
        )
        for one in targets
    ]
    further: dict[str, Any] = {}
    if effect.channels:
        further["channels"] = list(effect.channels)
    if isinstance(edit, wire.Gradient) and effect.explanation is not None:
        further["explanation"] = draw(edit.explain, effect.explanation)
    return answered.EditResult(
        name=edit.name,
        edit=edit.edit,
        predictions=[
            response.prediction_entry(
                model, Prediction(one, float(scores[one]), float(logits[one]))
            )
            for one in best
        ],
        changes=changes,
        control=changes[0].control,
        **further,
    )


def _map(
    model: LoadedModel,
    upload: Upload,
    side: int,
    asked: wire.GradientMap,
    explanation: Explanation,
) -> answered.Explanation:
    """The map of a changed gradient, drawn. Raises RenderFailed."""
    return response.explanation_entry(model, upload, explanation, drawing(asked), side)


def drawing(asked: wire.GradientMap) -> ExplainOptions:
    """How the map of a changed gradient is drawn."""
    return ExplainOptions(
        include=list(asked.include),
        threshold=asked.threshold,
        size=asked.size,
        colormap=asked.colormap,
    )


def _control(changes: Tensor) -> answered.EditControl:
    """changes: of the logit, by the edit and then by each control."""
    own, others = changes[0], changes[1:]
    if not len(others):
        return answered.EditControl(n=0, mean=None, low=None, high=None, smaller=0)
    return answered.EditControl(
        n=len(others),
        mean=float(others.mean()),
        low=float(others.min()),
        high=float(others.max()),
        smaller=int((others.abs() < own.abs()).sum()),
        logit_changes=others.tolist(),
    )


def entry_bytes(plan: ExperimentPlan, render_side: int, source: Size) -> int:
    """The bytes in JSON of one image's entry at most, by the size of its upright source."""
    targets = max(1, len(plan.targets), len(plan.options.at))
    is_detector = plan.model.task == "detection"
    listed = plan.options.top_k
    numbers = (listed if is_detector else min(listed, len(plan.model.labels))) + targets
    listed = _EDIT + numbers * (_NUMBERS + longest_label(plan.model.labels))
    listed += (1 + targets) * plan.options.controls * NUMBER_BYTES
    size = _ENTRY + (1 + len(plan.edits)) * listed
    for edit, inside in zip(plan.edits, plan.inside, strict=True):
        if isinstance(edit, wire.Gradient) and isinstance(inside, GradientEdit):
            options = drawing(edit.explain)
            sizes = AnswerSizes(plan.model, options, inside.question, render_side)
            size += sizes.explanation(source)
        if isinstance(inside, ChannelEdit):
            size += _CHANNEL * (len(inside.channels) or inside.top)
    return size
