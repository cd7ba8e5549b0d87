"""From results to the wire: draw images, encode arrays in base64, all in a worker thread."""

from __future__ import annotations

import base64
import time
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from api_schemas import answers as wire
from api_schemas.options import CommonOptions, ExplainOptions
from service.cam.encoding import EncodedImage
from service.cam.heatmap import Style, render_heatmap, render_overlay
from service.cam.regions import find_regions, mask_rle
from service.cam.tiles import channel_grid
from service.cam.verdict import DESIGN, RUNS, Verdict
from service.errors import CamserveError, RenderFailed
from service.images.decode import Geometry
from service.images.upload import Upload
from service.inference.questions import Activation, Explanation, InferenceResult, Prediction
from service.models.loaded import LoadedModel
from service.pipeline.service import ProcessedImage, Recipe


def single_response(
    recipe: Recipe, request_id: str, processed: ProcessedImage, ready: float
) -> bytes:
    """The whole answer to a request with a single image as JSON, rendered in one call.

    ready: as of `rendered_result`. Raises RenderFailed.
    """
    result = rendered_result(recipe, processed, ready)
    recipe.clock.stop()
    return response_body(recipe, request_id, [result])


def rendered_result(recipe: Recipe, processed: ProcessedImage, ready: float) -> wire.Result:
    """One image's result in the answer to a request.

    ready: when the image was processed, on `time.monotonic()`'s clock; rendering counts from then.
    Raises RenderFailed.
    """
    side = recipe.service.limits.render_side
    result = image_result(recipe.model, recipe.options, side, processed)
    recipe.clock.add("render", time.monotonic() - ready)
    return result


def response_body(
    recipe: Recipe,
    request_id: str,
    results: list[Any],
    form: type[wire.Answer | wire.ExperimentAnswer] = wire.Answer,
) -> bytes:
    """The answer to a request as JSON; its clock has stopped."""
    answer = form(
        id=request_id,
        model=wire.ModelVersion(name=recipe.model.name, version=recipe.model.version),
        results=results,
        timing_ms=wire.Timing(**recipe.clock.milliseconds()),
    )
    return orjson.dumps(answer.model_dump(exclude_unset=True))


def image_result(
    model: LoadedModel, options: CommonOptions, side: int, processed: ProcessedImage
) -> wire.Result:
    """One image's result in the answer; `side`: the longer side of what is drawn, in pixels.

    Raises RenderFailed, with the cause, for an unexpected error.
    """
    upload, inference, masked = processed.upload, processed.inference, processed.masked
    try:
        fields: dict[str, Any] = {
            "image": image_entry(upload),
            "seen": upload.model_input.geometry.seen,
            "predictions": [
                prediction_entry(model, one, upload.model_input.geometry)
                for one in inference.predictions
            ],
        }
        if options.uncertainty:
            fields["uncertainty"] = uncertainty_entry(inference)
        if isinstance(options, ExplainOptions):
            fields["explanations"] = [
                explanation_entry(model, upload, explanation, options, side)
                for explanation in inference.explanations
            ]
        if options.activations:
            fields["activations"] = [
                _activation(model, activation, options.activation_as)
                for activation in inference.activations
            ]
        if masked is not None and upload.masked is not None:
            assert isinstance(options, ExplainOptions)
            fields["masked"] = wire.Masked(
                predictions=[prediction_entry(model, one) for one in masked.predictions],
                changes=_changes(model, inference, masked),
                explanations=[
                    explanation_entry(model, upload.masked, explanation, options, side)
                    for explanation in masked.explanations
                ],
            )
        if inference.precision != "float32":
            fields["precision"] = inference.precision
        return wire.Result(**fields)
    except CamserveError:
        raise
    except Exception as error:
        raise RenderFailed(
            "The answer was computed and could not be drawn; use include=none for the numbers "
            "alone. The server's log has the cause."
        ) from error


def prediction_entry(
    model: LoadedModel, prediction: Prediction, geometry: Geometry | None = None
) -> wire.Prediction:
    """One class of a model with its label. geometry: of what has a box or a mask."""
    fields: dict[str, Any] = {}
    if prediction.box is not None:
        fields |= {"detection": prediction.detection, "box": prediction.box}
    if prediction.mask is not None and geometry is not None:
        rle, area = mask_rle(prediction.mask, geometry)
        fields |= {"mask": wire.MaskRLE(size=rle.size, counts=rle.counts), "area": float(area)}
    return wire.Prediction(
        class_id=prediction.class_id,
        label=model.labels[prediction.class_id],
        score=prediction.score,
        logit=prediction.logit,
        **fields,
    )


def uncertainty_entry(inference: InferenceResult) -> wire.Uncertainty:
    """How undecided a classifier is."""
    return wire.Uncertainty(margin=inference.margin, entropy=inference.entropy)


def geometry_of(upload: Upload, explanation: Explanation) -> Geometry:
    """Where a map lies in the source: over the model input, or over what the model made of it."""
    geometry = upload.model_input.geometry
    return geometry if explanation.window is None else replace(geometry, window=explanation.window)


def image_entry(upload: Upload) -> wire.ImageInfo:
    """What is said of a decoded image."""
    return wire.ImageInfo(
        width=upload.width, height=upload.height, format=upload.format, sha256=upload.sha256
    )


def _changes(
    model: LoadedModel, inference: InferenceResult, masked: InferenceResult
) -> list[wire.Change]:
    return [
        wire.Change(
            class_id=after.class_id,
            label=model.labels[after.class_id],
            score=after.score,
            logit=after.logit,
            score_change=after.score - before.score,
            logit_change=after.logit - before.logit,
        )
        for before, after in zip(inference.explanations, masked.explanations, strict=True)
    ]


def heatmap(
    upload: Upload, explanation: Explanation, style: Style, render_side: int
) -> EncodedImage:
    """The map alone, as a file."""
    style = _of_whole(style, explanation)
    return render_heatmap(explanation.grid, geometry_of(upload, explanation), style, render_side)


def _of_whole(style: Style, explanation: Explanation) -> Style:
    """A detector receives the source itself, so that its input has the size of the source."""
    is_whole = explanation.box is not None and style.size == "model"
    return replace(style, size="source") if is_whole else style


def overlay(upload: Upload, explanation: Explanation, style: Style) -> EncodedImage:
    """The image with the map over it, as a file."""
    assert upload.preview is not None
    style = _of_whole(style, explanation)
    pixels = upload.model_input.pixels.permute(1, 2, 0).contiguous().numpy()
    try:
        return render_overlay(
            explanation.grid,
            geometry_of(upload, explanation),
            style,
            upload.preview,
            pixels,
            box=explanation.box,
        )
    except ValueError as error:
        raise RenderFailed("The overlay could not be drawn; the server's log says why.") from error


def picture(
    upload: Upload, explanation: Explanation, options: ExplainOptions, render_side: int
) -> EncodedImage:
    """The one image that the options include: the heatmap or the overlay."""
    style = style_of(options)
    if "overlay" in options.include:
        return overlay(upload, explanation, style)
    return heatmap(upload, explanation, style, render_side)


def style_of(options: ExplainOptions) -> Style:
    """The drawing options."""
    return Style(options.size, options.colormap, options.format, options.opacity)


def _contrast(model: LoadedModel, explanation: Explanation) -> dict[str, Any]:
    """The only class of a contrast, or all with their weights, and the difference of logits."""
    contrast = explanation.contrast
    if not contrast:
        return {"contrast": None}
    difference = {"logit_difference": explanation.logit_difference}
    if len(contrast) == 1 and set(contrast.values()) == {1.0}:
        return {"contrast": next(iter(contrast)), **difference}
    entries = [
        wire.Contrast(class_id=class_id, label=model.labels[class_id], weight=weight)
        for class_id, weight in contrast.items()
    ]
    return {"contrast": None, "contrasts": entries, **difference}


def explanation_entry(
    model: LoadedModel,
    upload: Upload,
    explanation: Explanation,
    options: ExplainOptions,
    render_side: int,
) -> wire.Explanation:
    """One explanation, with what its options ask to be drawn."""
    layers = explanation.layers
    fields: dict[str, Any] = {
        "class_id": explanation.class_id,
        "label": model.labels[explanation.class_id],
        "score": explanation.score,
        **_contrast(model, explanation),
        "method": explanation.method,
        "layer": (layers[0] if len(layers) == 1 else list(layers)) if layers else None,
        "range": (explanation.low, explanation.high),
        "flags": list(explanation.flags),
        "cost": wire.Cost(forwards=explanation.cost),
    }
    if explanation.libra:
        fields["correction"] = "libra"
    if explanation.box is not None:
        fields |= {
            "detection": explanation.detection,
            "box": explanation.box,
            "of": explanation.of,
        }
    if explanation.region is not None:
        rle, _ = mask_rle(explanation.region, upload.model_input.geometry)
        fields["region"] = wire.MaskRLE(size=rle.size, counts=rle.counts)
    style = style_of(options)
    if "heatmap" in options.include:
        fields["heatmap"] = _encoded(heatmap(upload, explanation, style, render_side))
    if "overlay" in options.include:
        fields["overlay"] = _encoded(overlay(upload, explanation, style))
    if "grid" in options.include:
        fields["grid"] = wire.Grid(
            shape=list(explanation.grid.shape), dtype="float32", data=_numbers(explanation.grid)
        )
    if "regions" in options.include:
        fields["regions"] = _regions(explanation, upload, options.threshold, render_side)
    if explanation.verdict is not None:
        fields["verify"] = _verification(model, explanation, explanation.verdict)
    return wire.Explanation(**fields)


def _verification(
    model: LoadedModel, explanation: Explanation, verdict: Verdict
) -> wire.Verification:
    mean, blur = verdict.agreement_by_fill
    median, best = verdict.elsewhere
    fields: dict[str, Any] = {
        "verdict": verdict.verdict,
        "reason": verdict.reason,
        "agreement": verdict.agreement,
        "agreement_by_fill": wire.Fills(mean=mean, blur=blur),
        "elsewhere": wire.Elsewhere(median=median, best=best),
        "p_place": verdict.p_place,
        "p_centred": verdict.p_centred,
        "baselines": wire.Baselines(centre=verdict.centre, contrast=verdict.contrast),
        "forwards": RUNS,
        "design": DESIGN,
    }
    if verdict.p_class is not None:
        fields["p_class"] = verdict.p_class
    if explanation.tried:
        fields["tried"] = [
            wire.Tried(layer=layer, verdict=one.verdict, agreement=one.agreement)
            for layer, one in explanation.tried
        ]
    elif verdict.verdict == "inconclusive" and (finer := model.finer_layers(explanation.layers)):
        fields["try_layer"] = finer[0]
    return wire.Verification(**fields)


def _regions(explanation: Explanation, upload: Upload, threshold: float, side: int) -> wire.Regions:
    regions = find_regions(explanation.grid, geometry_of(upload, explanation), threshold, side)
    return wire.Regions(
        threshold=regions.threshold,
        peak=regions.peak,
        boxes=[(x, y, w, h) for x, y, w, h in regions.boxes],
        polygons=regions.polygons,
        rle=wire.MaskRLE(size=regions.rle.size, counts=regions.rle.counts),
    )


def activation_image(model: LoadedModel, activation: Activation) -> tuple[EncodedImage, int]:
    """An activation as a grid of its channels, and how many of them are left out.

    Tokens and maps with channels last are laid out as maps, as the layer's explanations are; other
    tables of numbers are one tile, stacks of tables (windows, attention heads) one tile per table.
    """
    return channel_grid(_by_channel(model, activation))


def _by_channel(model: LoadedModel, activation: Activation) -> NDArray[np.float32]:
    """An activation as maps (C, h, w), or a vector (C,). Raises RenderFailed."""
    values, layer = activation.values, model.layer(activation.layer)
    is_map = activation.kind.endswith("output") and values.shape == layer.shape
    if is_map and layer.layout is not None:
        values = layer.layout.as_map(torch.from_numpy(values.copy())[None])[0].numpy()
    elif values.ndim != 1:
        values = values.reshape(-1, *(1, 1, *values.shape)[-2:])
    if not values.size or not np.isfinite(values).all():
        raise RenderFailed(
            f"The activation of layer {activation.layer!r} cannot be drawn or summarized by "
            "channel: it is empty, or contains NaN or infinity. Use activation_as=array."
        )
    return values


def _channel_stats(channels: NDArray[np.float32]) -> wire.ChannelStats:
    values = channels.reshape(len(channels), -1)
    return wire.ChannelStats(
        mean=values.mean(axis=1, dtype=np.float64).tolist(), max=values.max(axis=1).tolist()
    )


def _activation(
    model: LoadedModel, activation: Activation, forms: Collection[str]
) -> wire.Activation:
    values = activation.values
    fields: dict[str, Any] = {
        "layer": activation.layer,
        "kind": activation.kind,
        "call": activation.call,
        "shape": list(values.shape),
        "dtype": "float32",
    }
    if activation.part:
        fields["part"] = activation.part
    if "stats" in forms:
        fields["stats"] = _stats(values)
    if "channels" in forms:
        fields["channels"] = _channel_stats(_by_channel(model, activation))
    if "image" in forms:
        image, left_out = activation_image(model, activation)
        fields["image"] = wire.ChannelGrid(
            **_encoded(image).model_dump(), channels_left_out=left_out
        )
    if "array" in forms:
        # A gradient is often below what float16 can hold, a rare activation above it.
        largest = float(np.abs(values).max(initial=0, where=np.isfinite(values)))
        wide = activation.kind.startswith("grad") or largest > float(np.finfo(np.float16).max)
        dtype = "float32" if wide else "float16"
        fields["array"] = wire.Array(dtype=dtype, data=_numbers(values.astype(dtype)))
    return wire.Activation(**fields)


def _stats(values: NDArray[np.float32]) -> wire.Stats:
    if not values.size:
        return wire.Stats(min=0, max=0, mean=0, std=0, zero_fraction=0)
    return wire.Stats(
        min=float(values.min()),
        max=float(values.max()),
        mean=float(values.mean(dtype=np.float64)),
        std=float(values.std(dtype=np.float64)),
        zero_fraction=1 - np.count_nonzero(values) / values.size,
    )


def _encoded(image: EncodedImage) -> wire.Encoded:
    return wire.Encoded(
        media_type=image.media_type,
        width=image.width,
        height=image.height,
        data=base64.b64encode(image.data).decode("ascii"),
    )


def _numbers(values: NDArray[Any]) -> str:
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(np.ascontiguousarray(little).data).decode("ascii")
