"""Where a request ends: what of its framing is refused, as RFC 9112 wants it.

A proxy and a server that disagree about it can be made to hand one client's request to another.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_FRAMING = 64 << 10
"""Bytes of chunk sizes, extensions and trailers that may come one after the other without content.
What one read of the socket brings may come on top."""

FRAMING_SHARE = 8
"""Bytes of framing to a byte of content, over a whole body: a chunk of one byte takes five more."""


def fault_in(version: str, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """What is wrong with the head of a request and what to send instead, or None.

    version: "1.1". headers: names in lower case.
    """
    hosts = sum(name == b"host" for name, _ in headers)
    codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if version not in ("1.0", "1.1"):
        return f"The request says HTTP/{version}; send HTTP/1.1."
    if hosts > 1:
        return f"The request has {hosts} Host headers; send one."
    if not hosts and version == "1.1":
        return "The request has no Host header, which HTTP/1.1 demands; send one."
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
    """Counts what a chunked body has beside its content."""

    def __init__(self) -> None:
        self.content = 0
        self._beside = 0
        self._gap = 0

    def is_excessive(self, size: int, content: int) -> bool:
        """Count what came: `size` bytes of a body, with `content` among them."""
        self._beside += size - content
        self._gap = 0 if content else self._gap + size
        allowed = MAX_FRAMING + FRAMING_SHARE * self.content
        return self._gap > MAX_FRAMING or self._beside > allowed
