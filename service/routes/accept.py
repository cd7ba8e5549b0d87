"""Content negotiation: whether the client would rather have a picture than JSON."""

from __future__ import annotations

_FORMATS = {"image/jpeg": "jpeg", "image/png": "png", "image/webp": "webp"}


def preferred_image(accept: str, default: str) -> str | None:
    """The overlay format that an `Accept` header asks for, or None where JSON is as welcome.

    The most preferred type counts (RFC 9110 §12.5.1); `image/*` takes `default`. Types that we
    cannot make are passed over.
    """
    best, best_quality = None, 0.0
    for item in accept.split(","):
        kind, *parameters = (part.strip().lower() for part in item.split(";"))
        quality = _quality(parameters)
        if quality > best_quality and _makes(kind):
            best, best_quality = kind, quality
    if best == "image/*":
        return default
    return _FORMATS.get(best or "")


def _makes(kind: str) -> bool:
    return kind in _FORMATS or kind in ("image/*", "*/*", "application/*", "application/json")


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0
