"""Where a request ends: which framing is refused, as RFC 9112 requires.

If a proxy and a server disagree about it, an attacker can smuggle one client's request to another.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_FRAMING = 64 << 10
"""Consecutive bytes of chunk sizes, extensions and trailers without content, at most. One read of
the socket may exceed it."""

FRAMING_SHARE = 8
"""Bytes of framing per byte of content, over a whole body: a chunk of one byte adds five."""


def fault_in(version: str, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """What is wrong with a request's head and what to send instead, or None.

    version: "1.1". headers: names in lower case.
    """
    hosts = sum(name == b"host" for name, _ in headers)
    codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if version not in ("1.0", "1.1"):
        return f"The request is HTTP/{version}; send HTTP/1.1."
    if hosts > 1:
        return f"The request has {hosts} Host headers; send one."
    if not hosts and version == "1.1":
        return "The request has no Host header, which HTTP/1.1 requires; send one."
    if codings and version == "1.0":
        return (
            "Transfer-Encoding is not part of HTTP/1.0; send the body with Content-Length, or the "
            "request as HTTP/1.1."
        )
    if codings not in ([], [b"chunked"]):
        sent = b", ".join(codings)[:100].decode("latin-1")
        return f"Transfer-Encoding is {sent!r}; send the body chunked, without another coding."
    return None


class Framing:
    """Counts the bytes of a chunked body that are not content."""

    def __init__(self) -> None:
        self.content = 0
        self._beside = 0
        self._gap = 0

    def is_excessive(self, size: int, content: int) -> bool:
        """Count received bytes: `size` of a body, `content` of them content."""
        self._beside += size - content
        self._gap = 0 if content else self._gap + size
        allowed = MAX_FRAMING + FRAMING_SHARE * self.content
        return self._gap > MAX_FRAMING or self._beside > allowed
