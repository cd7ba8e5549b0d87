"""Fetch images by URL, only from allowed hosts and verified addresses.

The connection goes to the verified address, with the name in `Host` and in TLS, so that DNS
rebinding has no effect. Each redirect is checked like the first URL. Proxies of the environment,
cookies, persistent connections and content codings are not used.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urljoin

import certifi
import httpx
import structlog

from service.errors import ImageError, ImageUrlFailed, ImageUrlRefused
from service.security.addresses import AllowedHost, ImageLocation, is_allowed, parse_image_url

_log = structlog.get_logger(__name__)

MAX_REDIRECTS = 3
MAX_CONNECTIONS = 32
"""Concurrent connections of all requests; others wait until their timeout."""

_REDIRECTS = (301, 302, 303, 307, 308)
_TYPES = ("", "application/octet-stream", "binary/octet-stream")
_ACCEPT = "image/*, */*;q=0.5"  # Label Studio answers 406 for `image/*` alone
_ADDRESSES_TRIED = 3
_MAX_ANSWER = 1 << 16
"""Maximum bytes of the response to a `post`."""


class _Unusable(Exception):
    """Why an image could not be fetched, for the log only."""


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
        # Separate threads, so that a resolver that hangs delays nothing else.
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="resolver")
        # A persistent connection is verified for one name, but would serve all of its address.
        self._transport = httpx.AsyncHTTPTransport(
            verify=_trust(),
            trust_env=False,
            limits=httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=0),
        )

    async def fetch(
        self, url: str, take: Callable[[int], None], authorization: str | None = None
    ) -> bytes:
        """The bytes at a URL; calls `take` with the size of each chunk, which may raise.

        authorization: the header, only for the host and port of the URL, not for redirects.
        Raises ImageUrlRefused for the text of the URL, and ImageUrlFailed, always with the same
        message, for every other reason, so that clients cannot scan a network.
        """
        location = parse_image_url(url, self._hosts)
        return await self._in_time(location, self._follow(location, take, authorization))

    async def post(self, url: str, body: bytes) -> bytes:
        """The response to JSON that is sent to a URL, without redirects. Raises as `fetch` does."""
        location = parse_image_url(url, self._hosts)
        return await self._in_time(location, self._exchange(location, body))

    async def aclose(self) -> None:
        """Close threads and connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._transport.aclose()

    async def _in_time(self, location: ImageLocation, answer: Coroutine[Any, Any, bytes]) -> bytes:
        try:
            async with asyncio.timeout(self._seconds):
                return await answer
        except (_Unusable, ImageUrlRefused, httpx.HTTPError, OSError, ValueError) as error:
            _log.info("image_url_failed", host=location.host, reason=_reason(error))
            raise ImageUrlFailed(
                f"No image could be fetched from this URL within {self._seconds:g} seconds and "
                f"{self._max_bytes} bytes; check that it returns an image without "
                "authentication."
            ) from error

    async def _exchange(self, location: ImageLocation, body: bytes) -> bytes:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        response = await self._send(location, headers, body)
        try:
            if response.status_code != 200:
                raise _Unusable(f"status {response.status_code}")
            chunks = bytearray()
            async for chunk in response.aiter_raw():
                chunks += chunk
                if len(chunks) > _MAX_ANSWER:
                    raise _Unusable("too many bytes")
            return bytes(chunks)
        finally:
            await response.aclose()

    async def _follow(
        self, location: ImageLocation, take: Callable[[int], None], authorization: str | None
    ) -> bytes:
        headers = {"Accept": _ACCEPT}
        if authorization is not None:
            headers["Authorization"] = authorization
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._send(location, headers)
            try:
                if response.status_code not in _REDIRECTS:
                    return await self._read(response, take)
                redirect = urljoin(location.url, response.headers.get("location", ""))
            finally:
                await response.aclose()
            redirected = parse_image_url(redirect, self._hosts)
            if location.scheme == "https" and redirected.scheme == "http":
                raise _Unusable("redirected from https to http")
            if (redirected.host, redirected.port) != (location.host, location.port):
                headers.pop("Authorization", None)
            location = redirected
        raise _Unusable(f"more than {MAX_REDIRECTS} redirects")

    async def _send(
        self, location: ImageLocation, headers: Mapping[str, str], body: bytes | None = None
    ) -> httpx.Response:
        """GET, or POST with a body."""
        addresses = await self._resolve(location.host, location.port)
        if not all(is_allowed(address, private=location.private) for address in addresses):
            raise _Unusable("the host has an address that is not allowed")
        failed: httpx.TransportError | None = None
        for address in addresses[:_ADDRESSES_TRIED]:
            try:
                request = self._request(location, address, headers, body)
                return await self._transport.handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failed = error
        raise failed or _Unusable("no address")

    async def _resolve(self, host: str, port: int) -> Sequence[str]:
        """The addresses of a host, as the system's resolver gives them."""
        ask = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        results = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        return list(dict.fromkeys(str(address[0]) for *_, address in results))

    def _request(
        self, location: ImageLocation, address: str, headers: Mapping[str, str], body: bytes | None
    ) -> httpx.Request:
        return httpx.Request(
            "GET" if body is None else "POST",
            httpx.URL(
                scheme=location.scheme,
                host=address,
                port=location.port,
                raw_path=location.target.encode("ascii"),
            ),
            headers={
                "Host": location.host_header,
                "Accept-Encoding": "identity",
                "Connection": "close",
                "User-Agent": "camserve",
                **headers,
            },
            content=body,
            extensions={
                "sni_hostname": location.host,
                # The total time is limited elsewhere; this leaves some for the next address.
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
            raise _Unusable("a content coding that was not requested")
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
    """The reason in the log: never the URL, whose query may contain a signature."""
    if isinstance(error, (_Unusable, ImageError)):
        return str(error)
    return type(error).__name__


def _trust() -> ssl.SSLContext:
    """Public authorities, those of the system, and those that SSL_CERT_FILE names."""
    context = ssl.create_default_context(cafile=certifi.where())
    context.load_default_certs()
    return context
