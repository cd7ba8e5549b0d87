"""Hostile connections: silent and slow peers, and what comes after a request's head (B8–B10, E)."""

from __future__ import annotations

from collections.abc import Iterator

from hostile_http import JSON, OCTETS, Hostile, chunked, get, head, post
from measuring import photograph

MEBIBYTE = 1 << 20
LARGE_ANSWER = "/predict?activations=**&activation_as=array"
"""Six MiB that take little work."""


def connections() -> Iterator[Hostile]:
    """All of them."""
    yield from _first()
    yield from _readers()
    yield from _uploads()
    yield from _after_the_head()
    yield from _protocol()


def _first() -> Iterator[Hostile]:
    """What is made when it is first requested."""
    yield Hostile("E", "GET /openapi.json, the first", lambda _: get("/openapi.json"), fresh=True)
    for target in ("/openapi.json", "/docs", "/", "/metrics", "/models", "/v2/models"):
        yield Hostile("E", f"GET {target}", lambda _, t=target: get(t))
    yield Hostile("E", "a model's layers", lambda n: get(f"/models/{n.model}/layers"))
    yield Hostile("E", "a layer's kernels", lambda n: get(f"/models/{n.model}/kernels/{n.early}"))


def _readers() -> Iterator[Hostile]:
    photo = photograph(0, 640, 480)
    for count in (6, 60):
        yield Hostile(
            "B8",
            f"{count} readers that do not read for 20 s",
            lambda _: post(LARGE_ANSWER, photo, "image/jpeg"),
            connections=count,
            reads=False,
            hold=20,
            beside=True,
            patience=60,
        )
    yield Hostile(
        "B8",
        "500 requests for the OpenAPI document on a connection that does not read for 10 s",
        lambda _: [get("/openapi.json")[0] * 500],
        answers=500,
        reads=False,
        hold=10,
        beside=True,
    )


def _uploads() -> Iterator[Hostile]:
    start = {"content_type": "image/jpeg"}
    for name, count, length in (
        ("64 heads without bodies", 64, "1000"),
        ("8 heads that declare 32 MiB", 8, str(32 * MEBIBYTE)),
        ("64 heads that declare 32 MiB", 64, str(32 * MEBIBYTE)),
    ):
        yield Hostile(
            "B9",
            name,
            lambda _, n=length: [head("POST", "/explain", content_length=n, **start)],
            connections=count,
            beside=True,
            patience=8,
        )
    yield Hostile(
        "B9",
        "64 chunked bodies without a chunk",
        lambda _: [chunked("/explain", [])],
        connections=64,
        beside=True,
        patience=8,
    )
    yield Hostile(
        "B9",
        "64 bodies of a byte a second",
        lambda _: [
            head("POST", "/explain", content_length=str(32 * MEBIBYTE), **start),
            *[b"\xff"] * 10,
        ],
        connections=64,
        pause=1.0,
        beside=True,
        patience=12,
    )
    yield Hostile(
        "B9",
        "400 half heads",
        lambda _: [b"POST /explain HTTP/1.1\r\nhost: 127.0.0.1\r\n"],
        connections=400,
        beside=True,
        patience=8,
    )
    yield Hostile(
        "B9", "400 connections that say nothing", lambda _: [b""], connections=400, beside=True,
        patience=8,
    )  # fmt: skip
    for route in ("/v1/models/{}:predict", "/v2/models/{}/infer", "/predictions/{}"):
        yield Hostile(
            "B9",
            f"64 heads without bodies to {route.format('…')}",
            lambda n, r=route: [
                head("POST", r.format(n.model), content_length="1000", content_type=JSON)
            ],
            connections=64,
            beside=True,
            patience=8,
        )
    yield Hostile(
        "B9",
        "64 heads without bodies to Label Studio's setup",
        lambda _: [
            head(
                "POST",
                "/integrations/label-studio/setup",
                content_length=str(MEBIBYTE),
                content_type=JSON,
            )
        ],
        connections=64,
        beside=True,
        patience=8,
    )


def _after_the_head() -> Iterator[Hostile]:
    photo = photograph(0, 64, 48)
    trailer = b"".join(b"x-%d: %b\r\n" % (n, b"a" * 980) for n in range(4000))
    yield Hostile(
        "B10",
        "4 MB of trailers",
        lambda _: [chunked("/explain", [photo]) + b"0\r\n" + trailer + b"\r\n"],
    )
    short = b"".join(b"a%d:\r\n" % n for n in range(100_000))
    yield Hostile(
        "B10",
        "100,000 trailers",
        lambda _: [chunked("/explain", [photo]) + b"0\r\n" + short + b"\r\n"],
    )
    yield Hostile(
        "B10",
        "a trailer of 30 MB",
        lambda _: [chunked("/explain", [photo]) + b"0\r\nx: " + b"a" * 30_000_000 + b"\r\n\r\n"],
    )
    yield Hostile(
        "B10",
        "trailers to a probe, 4 MB",
        lambda _: [chunked("/health/live", [b"a"]) + b"0\r\n" + trailer + b"\r\n"],
    )
    extended = b"1;" + b"x=y;" * 1_000_000 + b"\r\na\r\n"
    yield Hostile(
        "B10",
        "a chunk's extension of 4 MB",
        lambda _: [chunked("/explain", []) + extended + b"0\r\n\r\n"],
    )
    yield Hostile(
        "B10",
        "100,000 chunks of one byte with extensions",
        lambda _: [chunked("/explain", []) + b"1;a=b\r\nx\r\n" * 90_000 + b"0\r\n\r\n"],
    )
    yield Hostile(
        "B10",
        "5 million chunks of one byte, 30 MB",
        lambda _: [chunked("/explain", []) + b"1\r\nx\r\n" * 5_000_000 + b"0\r\n\r\n"],
        patience=60,
    )
    yield Hostile(
        "B10",
        "a chunk's size of 1 MB of zeros",
        lambda _: [chunked("/explain", []) + b"0" * 990_000 + b"1\r\na\r\n0\r\n\r\n"],
    )
    answered = get("/health/live")[0]
    yield Hostile(
        "B10",
        "one line end behind an answer, silent for 90 s",
        lambda _: [answered, b"\r\n"],
        pause=1.0,
        answers=2,
        patience=90,
    )
    yield Hostile(
        "B10",
        "a line end every second behind an answer, 85 times",
        lambda _: [answered, *[b"\r\n"] * 85],
        pause=1.0,
        answers=2,
        patience=90,
    )
    yield Hostile("B10", "900 kB of line ends before a request", lambda _: [b"\r\n" * 450_000])
    yield Hostile(
        "B10",
        "a body behind a head that said there is none, 900 kB",
        lambda _: [head("POST", "/explain", content_length="0") + b"a" * 900_000],
        answers=2,
    )


def _protocol() -> Iterator[Hostile]:
    photo = photograph(0, 64, 48)
    live = get("/health/live")[0]
    yield Hostile("E", "16,000 probes on one connection", lambda _: [live * 16_000], answers=16_000)
    yield Hostile(
        "E",
        "3,000 requests for the page on one connection",
        lambda _: [get("/")[0] * 3000],
        answers=3000,
    )
    yield Hostile(
        "E",
        "400 explanations on one connection",
        lambda _: [post("/explain", photo, "image/jpeg")[0] * 400],
        answers=400,
        patience=60,
    )
    yield Hostile(
        "E",
        "15,000 headers",
        lambda _: [head("GET", "/health/live", **{f"x{n}": "" for n in range(30_000)})],
    )
    yield Hostile("E", "a header of 255 kB", lambda _: get("/health/live", x="a" * 255_000))
    yield Hostile("E", "a head of 16 MB", lambda _: get("/health/live", x="a" * 16_000_000))
    yield Hostile("E", "a path of 250 kB", lambda _: get("/" + "%2e%2e%2f" * 27_000))
    yield Hostile(
        "E", "a path of 200 kB, no such model", lambda _: get("/models/" + "a/" * 100_000)
    )
    yield Hostile("E", "HEAD", lambda _: [head("HEAD", "/health/live")], patience=5)
    yield Hostile("E", "no Host", lambda _: [b"GET /health/live HTTP/1.1\r\n\r\n"])
    yield Hostile(
        "E", "two Hosts", lambda _: [b"GET /health/live HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n"]
    )
    yield Hostile(
        "E",
        "a chunked body of HTTP/1.0",
        lambda _: [
            chunked("/explain", [photo]).replace(b"HTTP/1.1", b"HTTP/1.0", 1) + b"0\r\n\r\n"
        ],
    )
    yield Hostile(
        "E",
        "a body that waits for 100 Continue, 64 times",
        lambda _: [
            head(
                "POST",
                "/explain",
                content_length="1000",
                expect="100-continue",
                content_type=OCTETS,
            )
        ],
        connections=64,
        beside=True,
        patience=8,
    )
