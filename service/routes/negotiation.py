"""Content negotiation: whether `/explain` answers with an image instead of JSON, and with which.

The most preferred type of `Accept` decides (RFC 9110 §12.5.1). What one image cannot show is
refused, not dropped.
"""

from __future__ import annotations

from collections.abc import Iterator

from api_schemas.options import CommonOptions, ExplainOptions
from service.errors import NotAcceptable

FORMATS = {"image/jpeg": "jpeg", "image/png": "png", "image/webp": "webp"}

_OTHERS = ("image/*", "*/*", "application/*", "application/json")
_JSON_ONLY = ("top_k", "uncertainty", "activations", "mask", "threshold", "verify")
"""Options whose results an image has no place for."""

_HOW = "accept application/json, or"


def as_image(accept: str, options: CommonOptions, images: int) -> ExplainOptions | None:
    """The options of the one overlay or heatmap that is the whole response, or None for JSON.

    `include=heatmap` gives the bare heatmap, an indexed PNG; without `include` it is the overlay.

    accept: the header. images: how many were sent. Raises NotAcceptable.
    """
    if not isinstance(options, ExplainOptions):  # predictions are JSON
        return None
    preferred = preferred_image(accept, options.format)
    if preferred is None:
        return None
    _refuse_several(options, images)
    drawn = _drawn(options)
    image_format = _format(accept, options, preferred, drawn)
    return options.model_copy(update={"format": image_format, "include": [drawn]})


def preferred_image(accept: str, default: str) -> str | None:
    """The image format that an `Accept` header prefers, or None for JSON.

    `image/*` takes `default`. Types that the service cannot produce are ignored.
    """
    best, best_quality = None, 0.0
    for kind, quality in _accepted(accept):
        if quality > best_quality and (kind in FORMATS or kind in _OTHERS):
            best, best_quality = kind, quality
    if best == "image/*":
        return default
    return FORMATS.get(best or "")


def quality_of(accept: str, kind: str) -> float:
    """How far an `Accept` header accepts a media type, 0..1, by its most specific entry."""
    qualities = dict(_accepted(accept))
    ranges = (kind, f"{kind.partition('/')[0]}/*", "*/*")
    return next((qualities[each] for each in ranges if each in qualities), 0.0)


def _accepted(accept: str) -> Iterator[tuple[str, float]]:
    for item in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        yield kind, _quality(parameters)


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def _refuse_several(options: ExplainOptions, images: int) -> None:
    if images > 1:
        raise NotAcceptable(
            f"{images} images cannot be answered with one image; {_HOW} send one image per request."
        )
    count = max(len(options.targets), options.explain_top)
    if count > 1:
        raise NotAcceptable(
            f"{count} explanations cannot be answered with one image; {_HOW} request one target "
            "per request."
        )
    named = [f"`{name}`" for name in _JSON_ONLY if name in options.model_fields_set]
    if named:
        raise NotAcceptable(
            f"An image has no place for the result of {' and '.join(named)}; {_HOW} leave out "
            f"{' and '.join(named)}."
        )


def _drawn(options: ExplainOptions) -> str:
    """What the image shows: `overlay` or `heatmap`."""
    if "include" not in options.model_fields_set:
        return "overlay"
    if options.include in (["overlay"], ["heatmap"]):
        return options.include[0]
    raise NotAcceptable(
        f"One image cannot contain include={','.join(options.include)}; {_HOW} request "
        "include=overlay or include=heatmap alone."
    )


def _format(accept: str, options: ExplainOptions, preferred: str, drawn: str) -> str:
    """The format of the image: `png` for a heatmap, else `format` if it is given."""
    wanted, what = preferred, f"`format={options.format}`"
    if drawn == "heatmap":
        wanted, what = "png", "`include=heatmap`, which is a PNG"
    elif "format" in options.model_fields_set:
        wanted = options.format
    if quality_of(accept, f"image/{wanted}") > 0:
        return wanted
    raise NotAcceptable(
        f"The request accepts {accept[:100]!r}, which contradicts {what}; accept image/{wanted} "
        "or application/json, or leave out the option."
    )
