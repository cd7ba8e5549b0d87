"""The errors of the client, as one tree.

Classes that share a name with one of `service.errors` are the client's form of that code.

ClientError
├── ServiceError         an error of the service; the status chooses the class
│   ├── Unauthorized     401
│   ├── NotFound         404: `detail` names the nearest models, layers or classes
│   ├── ImageRefused     400, 413, 415, 424: this body or this image
│   ├── InvalidOption    422
│   ├── Busy             429, 503: `retry_after` says when to retry
│   └── DeadlineExceeded 504
├── ConnectionFailed     no connection, or a lost one
├── TimedOut             no answer within `timeout`
├── UnexpectedAnswer     an answer that is not from this service
└── UnreadableImage      the image could not be read; nothing was sent
"""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
import pydantic

from api_schemas.answers import Problem


class ClientError(Exception):
    """The base. `code` is stable, `detail` a sentence; `status` and `request_id` if known."""

    code = "client_error"

    def __init__(
        self,
        detail: str,
        *,
        code: str | None = None,
        status: int | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code or type(self).code
        self.status = status
        self.request_id = request_id


class ServiceError(ClientError):
    """The service answered with an error; `code` is one of docs/reference/errors.md."""

    code = "http_error"


class Unauthorized(ServiceError):
    """The API key is missing or unknown: the client's form of `unauthorized`."""


class NotFound(ServiceError):
    """No such model, layer or class."""


class ImageRefused(ServiceError):
    """The image format is unsupported, or the image is too large or could not be fetched."""


class InvalidOption(ServiceError):
    """An option that the service refuses: the client's form of `invalid_option`."""


class Busy(ServiceError):
    """The queue is full, a key's limit is reached, or no model is ready.

    retry_after: seconds from now, or None if the service gave no time.
    """

    retry_after: float | None = None


class DeadlineExceeded(ServiceError):
    """The deadline passed before the answer: the client's form of `deadline_exceeded`."""


class ConnectionFailed(ClientError):
    """The connection failed, or ended before the answer."""

    code = "connection_failed"


class TimedOut(ClientError):
    """No answer within the client's `timeout`."""

    code = "timed_out"


class UnexpectedAnswer(ClientError):
    """Something else answered, or a service of another version."""

    code = "unexpected_answer"


class UnreadableImage(ClientError):
    """A file that cannot be read, or an array that is not an image."""

    code = "unreadable_image"


_CLASSES: dict[int, type[ServiceError]] = {
    400: ImageRefused,
    401: Unauthorized,
    404: NotFound,
    413: ImageRefused,
    415: ImageRefused,
    422: InvalidOption,
    424: ImageRefused,
    429: Busy,
    503: Busy,
    504: DeadlineExceeded,
}


def service_error(
    status: int, code: str | None, detail: str, request_id: str | None
) -> ServiceError:
    """Return the error of an answer, or of one image of several."""
    kind = _CLASSES.get(status, ServiceError)
    return kind(detail, code=code, status=status, request_id=request_id)


def failure(received: httpx.Response | httpx.RequestError) -> ClientError:
    """Return the error for an unsuccessful answer, or for a failed request."""
    if isinstance(received, httpx.Response):
        return _of_response(received)
    if isinstance(received, httpx.ConnectTimeout) or not isinstance(
        received, httpx.TimeoutException
    ):
        why = str(received) or type(received).__name__
        return ConnectionFailed(f"No answer from {received.request.url}: {why}.")
    return TimedOut(f"{received.request.url} did not answer in time.")


def _of_response(response: httpx.Response) -> ClientError:
    status, request_id = response.status_code, response.headers.get("x-request-id")
    try:
        problem = Problem.model_validate_json(response.content)
    except pydantic.ValidationError:
        if status < 400:
            where = f"{response.request.method} {response.request.url}"
            return UnexpectedAnswer(
                f"{where} answered {status}, which camserve does not; check that the URL is "
                "that of a camserve service.",
                status=status,
                request_id=request_id,
            )
        # A proxy's page, or another server: only its first words are known.
        words = response.text[:200].strip() or response.reason_phrase
        error = service_error(status, None, f"{status} from {response.request.url}: {words}", None)
    else:
        error = service_error(
            status, problem.code, problem.detail, problem.request_id or request_id
        )
    if isinstance(error, Busy):
        error.retry_after = _seconds(response.headers.get("retry-after", ""))
    return error


def _seconds(retry_after: str) -> float | None:
    """Read `Retry-After`: seconds, or a date (RFC 9110 §10.2.3)."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        when = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
