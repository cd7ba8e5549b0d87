"""Results as HTML, which notebooks show (`_repr_html_`). Text from the service is escaped.

The results are those of `api_schemas.client.results`, which imports this module.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape
from typing import Any

import PIL.Image

from api_schemas.answers import verdict_summary

SIDE = 360
"""Longer side of an image on the page, in CSS pixels."""

SHOWN = 8
"""Number of explanations of one image that are shown at most."""


def result_html(result: Any) -> str:
    """The maps of a result beside its predictions; of a failed one the error."""
    if result.error is not None:
        return f"<p><b>{escape(result.error.code)}</b>: {escape(result.error.detail)}</p>"
    figures = "".join(map(explanation_html, result.explanations[:SHOWN]))
    rows = "".join(
        f"<tr><td>{each.class_id}</td><td>{escape(each.label)}</td><td>{each.score:.1%}</td></tr>"
        for each in result.predictions
    )
    head = "<tr><th>class</th><th>label</th><th>score</th></tr>"
    style = "display:flex;flex-wrap:wrap;gap:12px;align-items:flex-start"
    return f'<div style="{style}">{figures}<table>{head}{rows}</table></div>'


def explanation_html(explanation: Any) -> str:
    """One map, as overlay or heatmap if it was requested, with its caption."""
    image = explanation.overlay or explanation.heatmap
    shown = "" if image is None else _image_html(image, explanation.label)
    caption = "<br>".join(map(escape, _caption(explanation)))
    caption = f"<figcaption>{caption}</figcaption>"
    return f'<figure style="margin:0;max-width:{SIDE}px">{shown}{caption}</figure>'


def _caption(explanation: Any) -> Iterator[str]:
    yield f"{explanation.label} {explanation.score:.1%}"
    layer = explanation.layer
    layers = layer if isinstance(layer, str) else ", ".join(layer or [])
    yield f"{explanation.method} at {layers}" if layers else explanation.method
    if explanation.flags:
        yield ", ".join(explanation.flags)
    if explanation.verify is not None:
        yield verdict_summary(explanation.verify)


def _image_html(image: PIL.Image.Image, label: str) -> str:
    kind = image.format or "PNG"
    file = io.BytesIO()
    image.save(file, kind)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    alternative = escape(f"evidence for {label}", quote=True)
    style = f"max-width:{SIDE}px;max-height:{SIDE}px"
    return (
        f'<img alt="{alternative}" style="{style}" src="data:image/{kind.lower()};base64,{data}">'
    )
