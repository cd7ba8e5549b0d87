"""Images fetched by their URL: from allowed hosts alone, at addresses that were checked.

The address that was checked is the one that is connected to: the request goes to it by number, with
the name in `Host` and in TLS, so that a name that changes its address in between changes nothing.
Each redirect is judged like the first URL. Nothing of the environment's proxies, no cookie, no kept
connection and no content coding takes part.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urljoin

import certifi
import httpx
import structlog

from service.addresses import AllowedHost, Place, is_allowed, locate
from service.errors import ImageError, ImageUrlFailed, ImageUrlRefused

_log = structlog.get_logger(__name__)

MAX_REDIRECTS = 3
MAX_CONNECTIONS = 32
"""Connections at once, of all requests; others wait within their time."""

_REDIRECTS = (301, 302, 303, 307, 308)
_TYPES = ("", "application/octet-stream", "binary/octet-stream")
_ADDRESSES_TRIED = 3


class _Unusable(Exception):
    """Why an image could not be fetched: for the log alone."""


class Fetcher:
    """Fetches images from the allowed hosts.

    max_bytes: of one image. seconds: for one image, with all its redirects.
    """

    def __init__(
        self,
        hosts: Sequence[AllowedHost],
        *,
        max_bytes: int,
        seconds: float,
    ) -> None:
        self._hosts = hosts
        self._max_bytes = max_bytes
        self._seconds = seconds
        # Threads of its own: a resolver that hangs must not hold up anything else.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="resolver")
        # A kept connection was proved for one name only, and would serve every name of its address.
        self._transport = httpx.AsyncHTTPTransport(
            verify=_trust(),
            trust_env=False,
            limits=httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=0),
        )

    async def fetch(self, url: str, take: Callable[[int], None]) -> bytes:
        """The bytes behind a URL; `take` is told of each chunk's size and may raise.

        Raises ImageUrlRefused for what the URL says, and ImageUrlFailed, always in the same words,
        for all that is learnt on the way, so that nobody can explore a network by it.
        """
        place = locate(url, self._hosts)
        try:
            async with asyncio.timeout(self._seconds):
                return await self._follow(place, take)
        except (_Unusable, ImageUrlRefused, httpx.HTTPError, OSError, ValueError) as error:
            _log.info("image_url_failed", host=place.host, reason=_reason(error))
            raise ImageUrlFailed(
                f"No image could be fetched from this URL within {self._seconds:g} seconds and "
                f"{self._max_bytes} bytes; check that it answers anybody, without detours, with an "
                "image."
            ) from error

    async def aclose(self) -> None:
        """Close what is still open."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._transport.aclose()

    async def _follow(self, place: Place, take: Callable[[int], None]) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._get(place)
            try:
                if response.status_code not in _REDIRECTS:
                    return await self._read(response, take)
                location = urljoin(place.url, response.headers.get("location", ""))
            finally:
                await response.aclose()
            leads_to = locate(location, self._hosts)
            if place.scheme == "https" and leads_to.scheme == "http":
                raise _Unusable("redirected from https to http")
            place = leads_to
        raise _Unusable(f"more than {MAX_REDIRECTS} redirects")

    async def _get(self, place: Place) -> httpx.Response:
        addresses = await self._resolve(place.host, place.port)
        if not all(is_allowed(each, private=place.private) for each in addresses):
            raise _Unusable("the host has an address that is not allowed")
        failed: httpx.TransportError | None = None
        for address in addresses[:_ADDRESSES_TRIED]:
            try:
                return await self._transport.handle_async_request(self._request(place, address))
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failed = error
        raise failed or _Unusable("no address")

    async def _resolve(self, host: str, port: int) -> Sequence[str]:
        """The addresses of a host, as the system's resolver gives them."""
        ask = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        return list(dict.fromkeys(str(address[0]) for *_, address in found))

    def _request(self, place: Place, address: str) -> httpx.Request:
        return httpx.Request(
            "GET",
            httpx.URL(
                scheme=place.scheme,
                host=address,
                port=place.port,
                raw_path=place.target.encode("ascii"),
            ),
            headers={
                "Host": place.host_header,
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "Connection": "close",
                "User-Agent": "camserve",
            },
            extensions={
                "sni_hostname": place.host,
                # Time is bounded round the whole; this leaves some for the next address.
                "timeout": {"connect": self._seconds / _ADDRESSES_TRIED},
            },
        )

    async def _read(self, response: httpx.Response, take: Callable[[int], None]) -> bytes:
        if response.status_code != 200:
            raise _Unusable(f"status {response.status_code}")
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not kind.startswith("image/") and kind not in _TYPES:
            raise _Unusable("not an image's content type")
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise _Unusable("a content coding that was not asked for")
        length = response.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_bytes:
            raise _Unusable("too many bytes")
        chunks: list[bytes] = []
        size = 0
        async for chunk in response.aiter_raw():
            size += len(chunk)
            if size > self._max_bytes:
                raise _Unusable("too many bytes")
            take(len(chunk))
            chunks.append(chunk)
        return b"".join(chunks)


def _reason(error: Exception) -> str:
    """What to log of a failure: never the URL, whose query may hold a signature."""
    if isinstance(error, (_Unusable, ImageError)):
        return str(error)
    return type(error).__name__


def _trust() -> ssl.SSLContext:
    """Public authorities, those of the system, and those that SSL_CERT_FILE names."""
    context = ssl.create_default_context(cafile=certifi.where())
    context.load_default_certs()
    return context
