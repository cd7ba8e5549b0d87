"""The configured Label Studio, from which images of tasks are fetched with its token.

    host = LabelStudioHost("http://label-studio:8080", token, allowed=(), max_bytes=…, seconds=10)
    await host.fetch("/data/upload/1/ab12-cat.jpg", task=7, take=permit_bytes)

The operator configures host and token; a host in a request is never contacted. The token is sent
only to that host, and only to the paths under which Label Studio keeps images.
"""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

import orjson
from fastapi import Request

from service.errors import ConfigurationError, ImageUrlFailed, ImageUrlRefused
from service.security.addresses import MAX_URL, AllowedHost, parse_image_url
from service.security.fetcher import Fetcher
from service.security.overlay_tokens import check_secret

ACCESS_SECONDS = 240.0
"""How long an access token is used; Label Studio gives it for 300 seconds."""

Score = Literal["probability", "margin", "entropy"]

MAX_PROJECTS, MAX_PROJECTS_BYTES = 1000, 4 << 20
"""Projects whose extra parameters are kept, and bytes of these with the projects' names; beyond
either the project with the oldest setup is evicted."""

_LEGACY = re.compile(r"[0-9a-f]{40}")
_STORAGE = re.compile(r"(?!https?:)[a-z][a-z0-9+.-]*://.+", re.IGNORECASE)
_IMAGE_PATHS = re.compile(
    r"/(data/upload|data/local-files|storage-data/uploaded|(tasks|projects)/\d+/(resolve|presign))/"
)
_REFUSED = (
    "Label Studio keeps no images under this path; send one under /data/upload/, "
    "/data/local-files/, /storage-data/uploaded/ or /tasks/N/resolve/."
)


class LabelStudioHost:
    """Fetches images from one Label Studio.

    url:       its address, with the path it is served under; a private address is allowed.
    token:     a personal access token, or a legacy one (40 hexadecimal digits); None sends none.
    allowed:   hosts that it may redirect to: cloud storage behind presigned links.
    max_bytes: of one image. seconds: for one image, with all its redirects.

    Raises ConfigurationError for an invalid URL.
    """

    def __init__(
        self,
        url: str,
        token: str | None,
        *,
        allowed: Sequence[AllowedHost],
        max_bytes: int,
        seconds: float,
    ) -> None:
        host = _allowed_host(url)
        try:
            location = parse_image_url(url, (host,))
        except ImageUrlRefused as error:
            raise _no_url(url) from error
        self._base = location.url.rstrip("/")
        self._path = location.target.rstrip("/")
        self._origin = self._base.removesuffix(self._path)
        self._host = host
        self._token = token
        self._access, self._good_until = "", 0.0
        self._lock = asyncio.Lock()
        self._fetcher = Fetcher((host, *allowed), max_bytes=max_bytes, seconds=seconds)

    def is_its(self, url: str) -> bool:
        """Whether an absolute URL leads to this host."""
        try:
            location = parse_image_url(url, (self._host,))
        except ImageUrlRefused:
            return False
        return location.url.startswith(f"{self._origin}/")

    async def fetch(self, source: str, task: object, take: Callable[[int], None]) -> bytes:
        """An image by its path or URL in Label Studio, or its address in a storage of Label Studio.

        task: its number; Label Studio resolves `s3://…` and the like for a task.
        Raises ImageUrlRefused, ImageUrlFailed, and whatever `take` raises.
        """
        if len(source) > MAX_URL:
            raise ImageUrlRefused(f"The address of an image has at most {MAX_URL} characters.")
        target = self._target(source, task)
        authorization = await self._authorization()
        return await self._fetcher.fetch(f"{self._origin}{target}", take, authorization)

    async def aclose(self) -> None:
        """Close open connections."""
        await self._fetcher.aclose()

    def _target(self, source: str, task: object) -> str:
        """Path and query on this host. Raises ImageUrlRefused."""
        if _STORAGE.fullmatch(source):
            address = base64.urlsafe_b64encode(source.encode()).decode()
            return f"{self._path}/tasks/{quote(str(task), safe='')}/resolve/?fileuri={address}"
        if not source.startswith("/"):
            parts = urlsplit(source)
            source = parts.path + (f"?{parts.query}" if parts.query else "")
        source = quote(source.removeprefix(self._path), safe="/%?=&:+,;@!$'()*~")
        path = unquote(source.partition("?")[0])
        dot_segments = {".", ".."} & set(path.split("/"))
        if not _IMAGE_PATHS.match(source) or dot_segments or "\\" in path or "//" in path:
            raise ImageUrlRefused(_REFUSED)
        return self._path + source

    async def _authorization(self) -> str | None:
        """The header; a personal access token is exchanged for an access token first."""
        if self._token is None:
            return None
        if _LEGACY.fullmatch(self._token):
            return f"Token {self._token}"
        async with self._lock:  # so that many tasks share one exchange
            if time.monotonic() >= self._good_until:
                self._access = await self._exchange(self._token)
                self._good_until = time.monotonic() + ACCESS_SECONDS
            return f"Bearer {self._access}"

    async def _exchange(self, token: str) -> str:
        url = f"{self._base}/api/token/refresh/"
        answer = await self._fetcher.post(url, orjson.dumps({"refresh": token}))
        try:
            access = orjson.loads(answer)["access"]
        except (ValueError, TypeError, KeyError):
            access = None
        if not isinstance(access, str) or not re.fullmatch(r"[!-~]+", access):
            raise ImageUrlFailed(
                "Label Studio returned no access token for CAMSERVE_LABEL_STUDIO_TOKEN."
            )
        return access


@dataclass(frozen=True, slots=True)
class LabelStudio:
    """The Label Studio of this service, and the parameters of its projects.

    host:   where images are fetched from; None if the operator configured none.
    secret: signs the tokens of overlays; None: no overlays.
    score:  what the score of a prediction is: `probability`, `margin` or `entropy`.

    Raises ConfigurationError for a secret that is short enough to be guessed.
    """

    host: LabelStudioHost | None = None
    secret: str | None = None
    score: Score = "probability"
    _extra: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.secret is not None:
            check_secret(self.secret)

    def remember(self, project: str, extra: bytes) -> None:
        """Keep a project's extra parameters, JSON, which only its setup contains."""
        self._extra.pop(project, None)
        if extra:
            self._extra[project] = extra
        while len(self._extra) > MAX_PROJECTS or self.bytes_kept > MAX_PROJECTS_BYTES:
            self._extra.pop(next(iter(self._extra)))

    @property
    def bytes_kept(self) -> int:
        """Bytes of all extra parameters, and characters of their projects' names four times."""
        return sum(4 * len(project) + len(extra) for project, extra in self._extra.items())

    def extra_of(self, project: str) -> bytes | None:
        """A project's extra parameters, JSON, or None."""
        return self._extra.get(project)


def label_studio_of(request: Request) -> LabelStudio:
    """The Label Studio of the app that handles this request."""
    known = request.app.state.label_studio
    assert isinstance(known, LabelStudio)
    return known


def _allowed_host(url: str) -> AllowedHost:
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError) as error:
        raise _no_url(url) from error
    if parts.query or parts.fragment:
        raise _no_url(url)
    return AllowedHost(parts.hostname or "", port, private=True)


def _no_url(url: str) -> ConfigurationError:
    return ConfigurationError(
        f"--label-studio-url: {url!r} is not the address of a Label Studio, such as "
        "http://localhost:8080."
    )
