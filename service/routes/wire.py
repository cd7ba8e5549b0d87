"""From results to the wire: pictures rendered, arrays in base64, everything in a worker thread."""

from __future__ import annotations

import base64
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from api_schemas import answers as wire
from api_schemas.options import ExplainOptions, PredictOptions
from service.cam.heatmap import Picture, Style, channel_grid, render_heatmap, render_overlay
from service.errors import CamserveError, RenderFailed
from service.inference import Activation, Answer, Explanation
from service.models.loaded import LoadedModel
from service.upload import Upload


def result(
    model: LoadedModel,
    upload: Upload,
    answer: Answer,
    options: PredictOptions,
    render_side: int,
) -> wire.Result:
    """One image's place in the answer. Raises RenderFailed, with the cause, for whatever breaks."""
    try:
        fields: dict[str, Any] = {
            "image": wire.ImageInfo(
                width=upload.width,
                height=upload.height,
                format=upload.format,
                sha256=upload.sha256,
            ),
            "seen": upload.model_input.geometry.seen,
            "predictions": [
                wire.Prediction(
                    class_id=prediction.class_id,
                    label=model.labels[prediction.class_id],
                    score=prediction.score,
                    logit=prediction.logit,
                )
                for prediction in answer.predictions
            ],
        }
        if isinstance(options, ExplainOptions):
            fields["explanations"] = [
                _explanation(model, upload, explanation, options, render_side)
                for explanation in answer.explanations
            ]
        if options.activations:
            fields["activations"] = _activations(answer, options.activation_as)
        return wire.Result(**fields)
    except CamserveError:
        raise
    except Exception as error:
        raise RenderFailed(
            "The answer was computed and could not be drawn; ask with include=none for the "
            "numbers alone. The server's log has the cause."
        ) from error


def overlay(upload: Upload, explanation: Explanation, style: Style) -> Picture:
    """The photo with the map over it, as a file."""
    assert upload.photo is not None
    pixels = upload.model_input.pixels.permute(1, 2, 0).contiguous().numpy()
    return render_overlay(
        explanation.grid, upload.model_input.geometry, style, upload.photo, pixels
    )


def style_of(options: ExplainOptions) -> Style:
    """The drawing options."""
    return Style(options.size, options.colormap, options.format, options.opacity)


def _explanation(
    model: LoadedModel,
    upload: Upload,
    explanation: Explanation,
    options: ExplainOptions,
    render_side: int,
) -> wire.Explanation:
    layers = explanation.layers
    fields: dict[str, Any] = {
        "class_id": explanation.class_id,
        "label": model.labels[explanation.class_id],
        "score": explanation.score,
        "contrast": None,
        "method": explanation.method,
        "layer": layers[0] if len(layers) == 1 else list(layers),
        "range": (explanation.low, explanation.high),
        "flags": list(explanation.flags),
        "cost": wire.Cost(forwards=1.0),
    }
    style = style_of(options)
    if "heatmap" in options.include:
        geometry = upload.model_input.geometry
        fields["heatmap"] = _picture(render_heatmap(explanation.grid, geometry, style, render_side))
    if "overlay" in options.include:
        fields["overlay"] = _picture(overlay(upload, explanation, style))
    if "grid" in options.include:
        fields["grid"] = wire.Grid(
            shape=list(explanation.grid.shape), dtype="float32", data=_numbers(explanation.grid)
        )
    return wire.Explanation(**fields)


def _activations(answer: Answer, forms: Collection[str]) -> list[wire.Activation]:
    counts: dict[str, int] = {}
    found = []
    for activation in answer.activations:
        call = counts.get(activation.layer, 0)
        counts[activation.layer] = call + 1
        found.append(_activation(activation, call, forms))
    return found


def _activation(activation: Activation, call: int, forms: Collection[str]) -> wire.Activation:
    values = activation.values
    fields: dict[str, Any] = {
        "layer": activation.layer,
        "kind": activation.kind,
        "call": call,
        "shape": list(values.shape),
        "dtype": "float32",
    }
    if "stats" in forms:
        fields["stats"] = _stats(values)
    if "image" in forms:
        picture, left_out = channel_grid(values)
        fields["image"] = wire.ChannelGrid(
            **_picture(picture).model_dump(), channels_left_out=left_out
        )
    if "array" in forms:
        fields["array"] = wire.Array(dtype="float16", data=_numbers(values.astype("<f2")))
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


def _picture(picture: Picture) -> wire.Encoded:
    return wire.Encoded(
        media_type=picture.media_type,
        width=picture.width,
        height=picture.height,
        data=base64.b64encode(picture.data).decode("ascii"),
    )


def _numbers(values: NDArray[Any]) -> str:
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(np.ascontiguousarray(little).data).decode("ascii")
