"""The exceptions of the service, as one tree.

    CamserveError
    ├── RequestError                what the client sent cannot be answered
    │   ├── MalformedRequest        malformed_request
    │   ├── HostNotAllowed          host_not_allowed
    │   ├── EmptyBody               empty_body
    │   ├── InvalidOption           invalid_option
    │   ├── HeadTooLarge            head_too_large
    │   ├── BodyTooLarge            body_too_large
    │   ├── SlowUpload              slow_upload
    │   ├── UnsupportedMediaType    unsupported_media_type
    │   ├── NotAcceptable           not_acceptable
    │   ├── UnknownModel            unknown_model
    │   │   └── UnknownVersion      unknown_version
    │   ├── UnknownLayer            unknown_layer
    │   └── UnknownClass            unknown_class
    ├── Unauthorized                unauthorized
    ├── ImageError                  one image cannot be used
    │   ├── InvalidImageData        invalid_image_data
    │   ├── EmptyImage              empty_image
    │   ├── UnsupportedImage        unsupported_image
    │   ├── CorruptImage            corrupt_image
    │   ├── ImageTooLarge           image_too_large
    │   ├── ImageUrlRefused         image_url_refused
    │   └── ImageUrlFailed          image_url_failed
    ├── Refused                     not now: try again after `retry_after` seconds
    │   ├── QueueFull               queue_full
    │   ├── KeyLimit                key_limit
    │   ├── ShuttingDown            shutting_down
    │   ├── OutOfMemory             out_of_memory
    │   └── ModelNotReady           model_not_ready
    ├── DeadlineExceeded            deadline_exceeded
    ├── InferenceFailed             inference_failed
    │   ├── InferenceHangs          inference_hangs
    │   └── NonFiniteOutput         non_finite_output
    ├── RenderFailed                render_failed
    └── ConfigurationError          the service cannot start like this

`code` is stable: clients may depend on it. `detail` is a sentence that says what to do. Only
`service/routes/problems.py` maps classes to HTTP status codes. Classes with the same names in
`api_schemas/client/errors.py` are the wire form of these: a client raises them for a response.
"""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable
from typing import ClassVar


class CamserveError(Exception):
    """Base of the tree. `str(error)` is `detail`, truncated to `longest` characters.

    It may repeat the input of a client, which may have any length.
    """

    code: ClassVar[str] = "internal_error"
    longest: ClassVar[int] = 2000

    def __init__(self, detail: str) -> None:
        if len(detail) > self.longest:
            detail = f"{detail[: self.longest]}…"
        super().__init__(detail)
        self.detail = detail


class RequestError(CamserveError):
    """The request is invalid."""

    code = "malformed_request"


class MalformedRequest(RequestError):
    """The body does not match its declared format."""


class HostNotAllowed(RequestError):
    """The `Host` header names a host that this service does not accept."""

    code = "host_not_allowed"


class EmptyBody(RequestError):
    """The body is empty."""

    code = "empty_body"


class InvalidOption(RequestError):
    """An option is unknown, out of range, or contradicts another."""

    code = "invalid_option"


class HeadTooLarge(RequestError):
    """Request line and headers exceed the limit."""

    code = "head_too_large"


class BodyTooLarge(RequestError):
    """The body, or the number of its images, exceeds the limit."""

    code = "body_too_large"


class SlowUpload(RequestError):
    """The body did not arrive in time, or arrived too slowly."""

    code = "slow_upload"


class UnsupportedMediaType(RequestError):
    """Unsupported content type."""

    code = "unsupported_media_type"


class NotAcceptable(RequestError):
    """The response is not available in a media type that `Accept` allows."""

    code = "not_acceptable"


class UnknownModel(RequestError):
    """No model with this name is served."""

    code = "unknown_model"


class UnknownVersion(UnknownModel):
    """The model is served, but not in this version."""

    code = "unknown_version"


class UnknownLayer(RequestError):
    """The model has no module at this path."""

    code = "unknown_layer"


class UnknownClass(RequestError):
    """The model has no class with this id or label."""

    code = "unknown_class"


class Unauthorized(CamserveError):
    """The request has no valid key for this route."""

    code = "unauthorized"


class ImageError(CamserveError):
    """One image cannot be used; the others of its request still can."""

    code = "corrupt_image"


class InvalidImageData(ImageError):
    """The image field is invalid: not base64, or a URL where none is allowed."""

    code = "invalid_image_data"


class EmptyImage(ImageError):
    """The image has no bytes."""

    code = "empty_image"


class UnsupportedImage(ImageError):
    """Unsupported image format or kind."""

    code = "unsupported_image"


class CorruptImage(ImageError):
    """The bytes start like an image but cannot be decoded completely."""


class ImageTooLarge(ImageError):
    """The image has more pixels or metadata, or needs more memory, than the limit."""

    code = "image_too_large"


class ImageUrlRefused(ImageError):
    """The host of the URL is not allowed."""

    code = "image_url_refused"


class ImageUrlFailed(ImageError):
    """The image could not be fetched from the URL; the cause is not disclosed."""

    code = "image_url_failed"


class Refused(CamserveError):
    """Not now; the same request may succeed after `retry_after` seconds."""

    code = "queue_full"

    def __init__(self, detail: str, retry_after: int = 1) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class QueueFull(Refused):
    """The queue of images, or the memory for responses, is full."""


class KeyLimit(Refused):
    """The key exceeds its limit: requests per minute, concurrent requests, or their cost."""

    code = "key_limit"


class ShuttingDown(Refused):
    """The service finishes admitted requests and accepts no new ones."""

    code = "shutting_down"


class OutOfMemory(Refused):
    """The device is out of memory, even for this image alone."""

    code = "out_of_memory"


class ModelNotReady(Refused):
    """The model is loading, or failed to load."""

    code = "model_not_ready"


class DeadlineExceeded(CamserveError):
    """The deadline passed before the response was ready."""

    code = "deadline_exceeded"


class InferenceFailed(CamserveError):
    """The model, a hook or the backward pass raised."""

    code = "inference_failed"


class InferenceHangs(InferenceFailed):
    """The inference did not end, and was abandoned."""

    code = "inference_hangs"


class NonFiniteOutput(InferenceFailed):
    """The model returned NaN or infinity."""

    code = "non_finite_output"


class RenderFailed(CamserveError):
    """The result was computed but could not be rendered or encoded."""

    code = "render_failed"


class ConfigurationError(CamserveError):
    """The service cannot start with these settings, models or weights."""

    code = "configuration_error"
    longest = 100_000  # it lists keys of the operator's files


def install_hint(extra: str) -> str:
    """How to install an extra. From the checkout or the wheel: no index has this project."""
    return (
        f"in the checkout run .venv/bin/pip install -e '.[{extra}]', or beside the wheel "
        f"pip install './camserve-VERSION-py3-none-any.whl[{extra}]'"
    )


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, 200 characters at most; without one its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")


NEAREST_LENGTH, NEAREST_NAMES = 100, 1000
"""Maximum length of a compared name, and maximum number of names: the time of a comparison is the
product of both lengths."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Suggest the `known` names that are closest to a mistyped one.

    Returns a sentence such as " Did you mean 'layer4' or 'layer3'?" with a leading space, or "".
    Names that differ in case and punctuation only take precedence.
    Of more than NEAREST_NAMES known names, those with the nearest length are compared; a name with
    more than NEAREST_LENGTH characters gets no suggestion.
    """
    if len(name) > NEAREST_LENGTH:
        return ""
    comparable = (candidate for candidate in known if len(candidate) <= NEAREST_LENGTH)
    alike = heapq.nsmallest(NEAREST_NAMES, comparable, key=lambda each: abs(len(each) - len(name)))
    same = [each for each in alike if _bare(each) == _bare(name)][:count]
    close = same or difflib.get_close_matches(name, alike, n=count, cutoff=0.5)
    if not close:
        return ""
    return f" Did you mean {' or '.join(repr(match) for match in close)}?"


def _bare(name: str) -> str:
    """A name without case and punctuation: `gradcampp` for "Grad-CAM++"."""
    return "".join(filter(str.isalnum, name.lower().replace("+", "p")))
