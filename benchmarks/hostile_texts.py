"""Hostile texts: patterns, names, JSON, tensors, templates and configurations (A1, A2, A4–A6, B12).

The images beside them are good and small.
"""

from __future__ import annotations

import functools
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from hostile_http import (
    JSON,
    LABEL_STUDIO,
    LABELING,
    OCTETS,
    Hostile,
    Names,
    Pieces,
    asked,
    form,
    get,
    post,
    posted_json,
    text,
)
from hostile_images import bomb
from measuring import photograph

STARS = "**" * 14 + "Z"
MEGABYTE = 1_000_000


@functools.cache
def _photo() -> bytes:
    return photograph(0, 64, 48)


def texts() -> Iterator[Hostile]:
    """All of them."""
    yield from _patterns()
    yield from _names()
    yield from _searched()
    yield from _arrays()
    yield from _templates()
    yield from _counted()
    yield from _structures()
    yield from _labelings()


def _explained(**options: Any) -> Pieces:
    return asked("/explain", options, _photo(), "image/jpeg")


def _predicted(**options: Any) -> Pieces:
    return asked("/predict", options, _photo(), "image/jpeg")


def _json_explained(**fields: Any) -> Pieces:
    return posted_json("/explain", {"images": [{"data": text(_photo())}], **fields})


def _v1(names: Names, verb: str, instances: Any, **parameters: Any) -> Pieces:
    body = {"instances": instances, "parameters": parameters}
    return posted_json(f"/v1/models/{names.model}:{verb}", body)


def _v2(names: Names, tensor: dict[str, Any], verb: str = "infer", **more: Any) -> Pieces:
    body = {"inputs": [{"name": "image", **tensor}], **more}
    return posted_json(f"/v2/models/{names.model}/{verb}", body)


def _v2_binary(names: Names, elements: bytes, shape: list[int], datatype: str = "BYTES") -> Pieces:
    tensor = {"name": "image", "shape": shape, "datatype": datatype}
    tensor["parameters"] = {"binary_data_size": len(elements)}
    start = json.dumps({"inputs": [tensor]}).encode()
    length = {"Inference_Header_Content_Length": str(len(start))}
    return post(f"/v2/models/{names.model}/infer", start + elements, OCTETS, **length)


def _element(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def _patterns() -> Iterator[Hostile]:
    many = [f"{'*a' * 245}{number}" for number in range(100)]
    for name, pattern in (
        ("`**` 14 times and a Z", STARS),
        ("500 stars", "*" * 499 + "Z"),
        ("`*a` 250 times", "*a" * 249 + "Z"),
        ("`*?` 250 times", "*?" * 249 + "Z"),
        ("`**.` 166 times", "**." * 166 + "Z"),
        ("type: and 490 stars", f"type:{'*' * 490}Z"),
        ("brackets", "[" * 250 + "!" * 250),
        ("a regex's own", "(a+)+" * 99),
    ):
        yield Hostile("A1", f"activations: {name}", lambda _, p=pattern: _explained(activations=p))
    yield Hostile("A1", "activations of /predict", lambda _: _predicted(activations=STARS))
    yield Hostile(
        "A1", "activations in JSON, 100 patterns", lambda _: _json_explained(activations=many)
    )
    yield Hostile(
        "A1",
        "activations in JSON, 100 times `**` 250 times",
        lambda _: _json_explained(activations=["**" * 249 + str(n) for n in range(100)]),
    )
    yield Hostile(
        "A1", "activations in the query, 100 patterns", lambda _: _explained(activations=many)
    )
    yield Hostile("A1", "a pattern as target layer", lambda _: _explained(layer=STARS))
    yield Hostile(
        "A1",
        "activations as an option of V1",
        lambda n: _v1(n, "explain", [text(_photo())], activations=[STARS]),
    )


def _names() -> Iterator[Hostile]:
    """Unknown names, for which the nearest known ones are looked for."""
    ladder = "features.layer." * 32
    yield Hostile("A1", "16 unknown layers", lambda _: _explained(layer=[ladder[:499]] * 16))
    labels = [f"{'tulip rose ' * 17}{n}" for n in range(100)]
    yield Hostile("A1", "100 unknown targets", lambda _: _json_explained(targets=labels))
    long = "model" * 40_000
    yield Hostile("A1", "a model's name of 200 kB", lambda _: _explained(model=long))
    yield Hostile("A1", "a model's name of 4 MB", lambda _: _json_explained(model=long * 20))
    yield Hostile("A1", "a path of 200 kB", lambda _: get(f"/models/{long}/layers"))
    options = {f"include{'e' * 60}{n}": "" for n in range(999)}
    yield Hostile("A1", "1,000 unknown options", lambda _: _explained(**options))
    yield Hostile("A1", "1,001 options", lambda _: _explained(**{f"o{n}": "" for n in range(1001)}))
    fields = {f"activation{'s' * 40}{n}": 0 for n in range(18_000)}
    yield Hostile("A1", "18,000 unknown fields", lambda _: _json_explained(**fields))
    yield Hostile("A1", "an option of 200 kB", lambda _: _explained(**{"include" * 30_000: "1"}))
    yield Hostile("A1", "a field of 900 kB", lambda _: _json_explained(**{"include" * 128_000: 1}))
    yield Hostile(
        "A1",
        "a task's name of 900 kB",
        lambda n: posted_json(
            LABELING,
            {
                "model": n.model,
                "image": f"data:image/jpeg;base64,{text(_photo())}",
                "params": {"current_task": "cam_polygon" * 80_000},
            },
        ),
    )
    yield Hostile(
        "A1",
        "600,000 values of an option",
        lambda _: _json_explained(include=["x"] * 590_000),
    )


def _searched() -> Iterator[Hostile]:
    """Texts that expressions look through."""
    spaced = b"a" + b" " * 40_000 + b"\0"
    for name, element in (
        ("letters, 40,000 spaces, a NUL", b"letters" + spaced),
        ("40,000 letters and spaces in turn, a NUL", b"a " * 20_000 + b"\0"),
        ("letters, 40,000 `=` and a NUL", b"letters" + b"=" * 40_000 + b"\0"),
        ("900 kB of line ends", b"a" + b"\r\n" * 450_000 + b"\0"),
        ("data: and 900 kB of spaces", b"data:" + b" " * 900_000),
    ):
        yield Hostile(
            "A2",
            f"a BYTES element: {name}",
            lambda n, e=element: _v2_binary(n, _element(e), [1]),
        )
    yield Hostile(
        "A2",
        "a BYTES element in JSON: 900 kB of spaces",
        lambda n: _v2(n, {"shape": [1], "datatype": "BYTES", "data": ["a" + " " * 900_000]}),
    )
    for name, header in (
        ("Accept", {"accept": "image/png;q=" * 20_000}),
        ("Accept, 40,000 types", {"accept": "a/b;q=.1," * 28_000}),
        ("Content-Type", {"content_type": "multipart/form-data;" + ' a="\\"' * 30_000}),
        (
            "a boundary of 200 kB",
            {"content_type": f"multipart/form-data; boundary={'-' * 200_000}"},
        ),
        ("X-Request-ID", {"X_Request_ID": "a" * 200_000 + "!"}),
        ("traceparent", {"traceparent": "00-" + "0" * 200_000}),
        ("Range, 30,000 ranges", {"range": "bytes=" + ",".join(f"{n}-" for n in range(30_000))}),
    ):
        yield Hostile(
            "A2",
            f"a long header: {name}",
            lambda _, h=header: post(
                "/explain", _photo(), **{"kind": "image/jpeg", "content_type": "image/jpeg", **h}
            ),
        )
    ranges = "bytes=" + ",".join(f"{n}-{n}" for n in range(0, 60_000, 2))
    for target in ("/docs/static/swagger-ui-bundle.js", "/", "/static/page.js"):
        yield Hostile("A2", f"30,000 ranges of {target}", lambda _, t=target: get(t, range=ranges))
    for name in ("top_k", "seed", "opacity", "threshold"):
        yield Hostile(
            "A2", f"{name} of 200,000 digits", lambda _, n=name: _explained(**{n: "9" * 200_000})
        )
    yield Hostile(
        "A2", "top_k of 900,000 digits in JSON", lambda _: post("/explain", _number("9" * 900_000))
    )
    yield Hostile(
        "A2",
        "a length header of 5,000 digits",
        lambda n: post(
            f"/v2/models/{n.model}/infer",
            b"{}",
            OCTETS,
            Inference_Header_Content_Length="9" * 5000,
        ),
    )
    yield Hostile(
        "A2", "an overlay's source of 200 kB", lambda _: get(f"{_OVERLAY}&src={'%2F' * 66_000}")
    )
    yield Hostile("A2", "an overlay's key of 200 kB", lambda _: get(f"{_OVERLAY}{'.' * 200_000}"))


_OVERLAY = f"{LABEL_STUDIO}/overlay.png?key=a"


def _number(digits: str) -> bytes:
    return b'{"images":[{"data":"%b"}],"top_k":%b}' % (text(_photo()).encode(), digits.encode())


def _arrays() -> Iterator[Hostile]:
    """Nested lists that numpy would make something large of."""
    wide = ["a" * 200_000] + [0] * 100_000
    rows: list[tuple[str, Any]] = [
        ("a string of 200 kB and 1,000 numbers", ["a" * 200_000] + [0] * 1000),
        ("a string of 2 kB and 100,000 numbers", ["a" * 2000, *[0] * 100_000]),
        ("a number of 4,000 digits and numbers", [10**4000, *[0] * 1000]),
        ("numbers as texts", ["1"] * 150_000),
        ("booleans", [True] * 150_000),
        ("nulls", [None] * 150_000),
        ("floats and nulls", [0.5, None] * 75_000),
        ("large integers", [1 << 63] * 40_000),
        ("objects", [{}] * 15_000),
        ("lists of other lengths", [[0] * (n % 7) for n in range(30_000)]),
        ("an empty list 150,000 times", [[]] * 150_000),
        ("NaN as a text", ["NaN", *[0.5] * 100_000]),
    ]
    for name, row in rows:
        yield Hostile("A4", f"V1: a row of {name}", lambda n, r=row: _v1(n, "predict", [[r, r]]))
    yield from _numbers()
    for datatype in ("FP32", "UINT8", "INT64", "BYTES"):
        yield Hostile(
            "A4",
            f"V2, {datatype}: a string of 200 kB and 1,000 numbers",
            lambda n, d=datatype: _v2(
                n, {"shape": [1001], "datatype": d, "data": ["a" * 200_000] + [0] * 1000}
            ),
        )
        yield Hostile(
            "A4",
            f"V2, {datatype}: lists of other lengths",
            lambda n, d=datatype: _v2(
                n, {"shape": [9], "datatype": d, "data": [[0] * (k % 7) for k in range(90_000)]}
            ),
        )
    yield Hostile(
        "A4",
        "TorchServe: a string of 200 kB and 100,000 numbers",
        lambda n: posted_json(f"/predictions/{n.model}", {"data": [wide[:1001]]}),
    )
    for depth in (900, 100_000):
        nested = b"[" * depth + b"]" * depth
        yield Hostile(
            "A4",
            f"V1: {depth:,} lists in each other",
            lambda n, b=nested: post(f"/v1/models/{n.model}:predict", b'{"instances":' + b + b"}"),
        )
    objects = b'{"b64":' * 900 + b'""' + b"}" * 900
    yield Hostile(
        "A4",
        "V1: 900 objects in each other",
        lambda n: post(f"/v1/models/{n.model}:predict", b'{"instances":[' + objects + b"]}"),
    )
    for depth in (300, 100_000):
        mask = '{"rle":' + "[" * depth + "]" * depth + "}"
        yield Hostile("A4", f"a mask of {depth:,} lists", lambda _, m=mask: _json_explained(mask=m))
    million = "1" * 999_900
    for name, mask in (
        ("run lengths of a million characters", {"rle": {"size": [48, 64], "counts": million}}),
        ("450,000 runs", {"rle": {"size": [48, 64], "counts": [0] * 450_000}}),
        ("a run of 19 digits", {"rle": {"size": [48, 64], "counts": [10**18, 1]}}),
        ("a billion pixels", {"rle": {"size": [1 << 30, 1 << 30], "counts": [1 << 60]}}),
        ("1,000 boxes", {"boxes": [[0, 0, 64, 48]] * 1000}),
        ("boxes of 1e308", {"boxes": [[-1e308, 0, 1e308, 1e308]] * 1000}),
    ):
        yield Hostile(
            "A4",
            f"a mask of {name}",
            lambda _, m=mask: _json_explained(mask=json.dumps(m, separators=(",", ":"))),
        )


def _numbers() -> Iterator[Hostile]:
    """As many numbers as a body may have, and as many as are under 1 MB."""
    pixel = b"[0,0,0],"
    shapes: dict[str, tuple[bytes, int, int]] = {
        "490,000 numbers": (b"0," * 490_000, 1, 30),
        "490,000 numbers, over 8 connections": (b"0," * 490_000, 8, 30),
        "120,000 pixels in lists": (pixel * 120_000, 1, 30),
        "2.5 million numbers, 5 MB": (b"0," * 2_490_000, 1, 60),
        "2.5 million fractions, 30 MB": (b"0.123456789," * 2_490_000, 1, 60),
        "830,000 pixels in lists, 7 MB": (pixel * 830_000, 1, 60),
        "2.5 million fractions, 30 MB, over 4 connections": (b"0.123456789," * 2_490_000, 4, 60),
        "5 million numbers, 10 MB": (b"0," * 4_990_000, 1, 60),
    }
    for name, (values, connections, patience) in shapes.items():
        body = b'{"instances":[[[%b0]]]}' % values
        if b"[" in values:
            body = b'{"instances":[[%b[0,0,0]]]}' % values
        yield Hostile(
            "A4",
            f"V1: {name}",
            lambda n, b=body: post(f"/v1/models/{n.model}:predict", b),
            connections=connections,
            patience=patience,
            beside=connections > 1,
        )
    runs = {"rle": {"size": [48, 64], "counts": [0] * 490_000}}
    yield Hostile("A4", "a mask as an object of 490,000 runs", lambda _: _json_explained(mask=runs))
    yield Hostile(
        "A4",
        "a mask as an object of 490,000 runs, over 8 connections",
        lambda _: _json_explained(mask=runs),
        connections=8,
        beside=True,
    )
    most = {"rle": {"size": [48, 64], "counts": [10] * 299_000}}
    yield Hostile(
        "A4",
        "a mask as an object of 299,000 runs, over 8 connections",
        lambda _: _json_explained(mask=most),
        connections=8,
        beside=True,
    )
    for name in ("targets", "layer", "activations"):
        values = [0] * 490_000 if name == "targets" else [""] * 330_000
        yield Hostile(
            "A4", f"{name} of 1 MB", lambda _, k=name, v=values: _json_explained(**{k: v})
        )
    tasks = [{"id": 1, "data": {"image": "", "numbers": [0] * 490_000}}]
    config = f'<View><Image name="i" value="$image"/>{_CHOICES}</View>'
    yield Hostile(
        "A4",
        "Label Studio: a task of 490,000 numbers",
        lambda _: posted_json(f"{LABEL_STUDIO}/predict", {"tasks": tasks, "label_config": config}),
    )


def _templates() -> Iterator[Hostile]:
    """Label Studio's values that stand for others."""

    def predicted(value: str, data: dict[str, Any], tasks: int = 1) -> Pieces:
        config = f'<View><Image name="i" value="{value}"/>{_CHOICES}</View>'
        body = {"tasks": [{"id": n, "data": data} for n in range(tasks)], "label_config": config}
        return posted_json(f"{LABEL_STUDIO}/predict", body)

    yield Hostile("A5", "`$a` 100 times, of 100 kB", lambda _: predicted("$a" * 100, _a(100_000)))
    yield Hostile(
        "A5", "`$a` 10,000 times, of 20 kB", lambda _: predicted("$a" * 10_000, _a(20_000))
    )
    yield Hostile(
        "A5", "`$a.b.c…` of 200,000 keys", lambda _: predicted("$a" + ".b" * 200_000, _a(10))
    )
    yield Hostile("A5", "450,000 `$`", lambda _: predicted("$" * 450_000, _a(10)))
    yield Hostile(
        "A5", "`$a` 1,000 times in 100 tasks", lambda _: predicted("$a" * 1000, _a(2000), 100)
    )


_CHOICES = '<Choices name="c" toName="i"><Choice value="rose"/></Choices>'


def _a(size: int) -> dict[str, Any]:
    return {"a": "x" * size}


def _counted() -> Iterator[Hostile]:
    """More images than are allowed."""
    for verb in ("explain", "predict"):
        yield Hostile(
            "A6", f"V1 {verb}: 60,000 empty strings", lambda n, v=verb: _v1(n, v, [""] * 60_000)
        )
    yield Hostile("A6", "V1: 300,000 zeros", lambda n: _v1(n, "explain", [0] * 300_000))
    yield Hostile("A6", "V1: 19,000 objects", lambda n: _v1(n, "explain", [{"b64": ""}] * 19_000))
    yield Hostile(
        "A6",
        "V2: 60,000 empty strings",
        lambda n: _v2(n, {"shape": [60_000], "datatype": "BYTES", "data": [""] * 60_000}),
    )
    yield Hostile(
        "A6",
        "V2 explain: 60,000 empty strings",
        lambda n: _v2(
            n, {"shape": [60_000], "datatype": "BYTES", "data": [""] * 60_000}, "explain"
        ),
    )
    yield Hostile(
        "A6",
        "V2 binary: 240,000 empty elements",
        lambda n: _v2_binary(n, bytes(960_000), [240_000]),
    )
    yield Hostile(
        "A6",
        "V2 binary: 300,000 images of 1 x 1",
        lambda n: _v2_binary(n, bytes(900_000), [300_000, 1, 1, 3], "UINT8"),
    )
    yield Hostile(
        "A6",
        "V2 binary: a shape of 10^18",
        lambda n: _v2_binary(n, bytes(3), [1 << 60, 1 << 60, 1 << 60, 3], "UINT8"),
    )
    yield Hostile(
        "A6",
        "V2 binary: FP64 of 30 MB",
        lambda n: _v2_binary(n, bytes(24 * 1_250_000), [1, 1_250_000, 1, 3], "FP64"),
    )
    yield Hostile(
        "A6",
        "V2: 4,900 inputs",
        lambda n: posted_json(
            f"/v2/models/{n.model}/infer",
            {"inputs": [{"name": "", "shape": [1], "datatype": "BYTES"}] * 4900},
        ),
    )
    yield Hostile(
        "A6",
        "V2: 9,000 outputs, all of them the overlay",
        lambda n: _v2(
            n,
            {"shape": [1], "datatype": "BYTES", "data": [text(_photo())]},
            outputs=[{"name": "overlay"}] * 9000,
        ),
    )
    yield Hostile(
        "A6", "JSON: 19,000 images", lambda _: posted_json("/explain", {"images": [{}] * 19_000})
    )
    yield Hostile("A6", "a form of 10,000 images", lambda _: form("/explain", [b""] * 10_000))
    yield Hostile(
        "A6",
        "TorchServe: a form of 10,000 images",
        lambda n: form(f"/explanations/{n.model}", [b""] * 10_000),
    )
    yield Hostile(
        "A6",
        "Label Studio: 6,000 tasks",
        lambda _: posted_json(
            f"{LABEL_STUDIO}/predict",
            {
                "tasks": [{"id": 1, "data": {"image": ""}}] * 6000,
                "label_config": f'<View><Image name="i" value="$image"/>{_CHOICES}</View>',
            },
        ),
    )


def _structures() -> Iterator[Hostile]:
    """Bodies that unpack, and forms and base64 that are slow to take apart."""
    spaced = "A " * (12 * MEGABYTE)
    yield Hostile(
        "B12",
        "base64 with a space every two characters, 24 MB",
        lambda _: posted_json("/explain", {"images": [{"data": spaced}]}),
        patience=60,
    )
    yield Hostile(
        "B12",
        "the same of 900 kB",
        lambda _: posted_json("/explain", {"images": [{"data": "A " * 450_000}]}),
    )
    yield Hostile(
        "B12",
        "base64 of lines of one character, 15 MB",
        lambda _: posted_json("/explain", {"images": [{"data": "A\n" * 5_000_000}]}),
        patience=60,
    )
    yield Hostile("B12", "V1: spaced base64, 24 MB", lambda n: _v1(n, "predict", [spaced]))
    yield Hostile(
        "B12",
        "V2: spaced base64, 24 MB",
        lambda n: _v2(n, {"shape": [1], "datatype": "BYTES", "data": [spaced]}),
    )
    yield Hostile(
        "B12",
        "V2 binary: spaced base64, 24 MB",
        lambda n: _v2_binary(n, _element(spaced.encode()), [1]),
    )
    yield Hostile(
        "B12",
        "X-AnyLabeling: spaced base64, 24 MB",
        lambda n: posted_json(
            LABELING, {"model": n.model, "image": f"data:image/png;base64,{spaced}"}
        ),
    )
    yield Hostile(
        "B12",
        "Label Studio: spaced base64, 24 MB",
        lambda _: posted_json(
            f"{LABEL_STUDIO}/predict",
            {
                "tasks": [{"id": 1, "data": {"image": f"data:image/png;base64,{spaced}"}}],
                "label_config": f'<View><Image name="i" value="$image"/>{_CHOICES}</View>',
            },
        ),
    )
    for size in (64 << 20, 1 << 30):
        packed = _gzipped(size)
        for route, kind in (("/explain", "image/jpeg"), ("/predict", JSON), ("v2", JSON)):
            yield Hostile(
                "B12",
                f"gzip of {size >> 20} MiB to {route}",
                lambda n, p=packed, r=route, k=kind: post(
                    f"/v2/models/{n.model}/infer" if r == "v2" else r,
                    p,
                    k,
                    content_encoding="gzip",
                ),
            )
    yield Hostile(
        "B12",
        "deflate of 1 GiB",
        lambda _: post("/explain", bomb(1 << 30), "image/jpeg", content_encoding="deflate"),
    )
    yield Hostile(
        "B12",
        "200 encodings",
        lambda _: post("/explain", _photo(), "image/jpeg", content_encoding="gzip," * 200),
    )
    yield Hostile(
        "B12", "a form of boundaries, 16 MB", lambda _: _raw_form(b"\r\n--edg" * 2_300_000)
    )
    yield Hostile("B12", "a form of hyphens, 900 kB", lambda _: _raw_form(b"\r\n--" * 225_000))
    headers = b"".join(b"x-%d: a\r\n" % n for n in range(70_000))
    yield Hostile(
        "B12", "a part of 70,000 headers", lambda _: _raw_form(b"--edge\r\n" + headers + b"\r\n")
    )


def _gzipped(size: int) -> bytes:
    """That many zeros, without ever holding them."""
    block, check = bytes(1 << 20), 0
    for _ in range(size >> 20):
        check = zlib.crc32(block, check)
    start = b"\x1f\x8b\x08\0\0\0\0\0\2\xff"
    return start + bomb(size)[2:-4] + struct.pack("<II", check, size)


def _raw_form(body: bytes) -> Pieces:
    return post("/explain", body, "multipart/form-data; boundary=edge")


def _labelings() -> Iterator[Hostile]:
    """Label Studio's configurations and parameters."""

    def predicted(config: str) -> Pieces:
        task = {"id": 1, "data": {"image": f"data:image/jpeg;base64,{text(_photo())}"}}
        return posted_json(f"{LABEL_STUDIO}/predict", {"tasks": [task], "label_config": config})

    def set_up(config: str, project: str = "1", **more: Any) -> Pieces:
        body = {"project": project, "schema": config, **more}
        return posted_json(f"{LABEL_STUDIO}/setup", body)

    def view(inner: str, images: int = 1) -> str:
        tags = "".join(f'<Image name="{"i" * (n + 1)}" value="$image"/>' for n in range(images))
        return f"<View>{tags}{inner}</View>"

    labels = "".join(f'<Label value="l{n}"/>' for n in range(18_000))
    configs = {
        "18,000 labels × 250,000 names": view(
            f'<RectangleLabels name="r" toName="{"i," * 250_000}">{labels}</RectangleLabels>'
        ),
        "40 controls × 10,000 names": view(
            "".join(
                f'<BrushLabels name="b{n}" toName="{"i," * 10_000}">'
                '<Label value="a"/></BrushLabels>'
                for n in range(40)
            )
        ),
        "3,000 images × 3,000 controls": "<View>"
        + "".join(f'<Image name="i{n}" value="$image"/>' for n in range(3000))
        + "".join(
            f'<Choices name="c{n}" toName="i{n}"><Choice value="rose"/></Choices>'
            for n in range(3000)
        )
        + "</View>",
        "one image's name 6,000 times": "<View>"
        + '<Image name="i" value="$image"/>' * 6000
        + _CHOICES * 6000
        + "</View>",
        "9,000 controls in each other": view(
            '<Choices name="c" toName="i"><Choice value="a"/>' * 9000 + "</Choices>" * 9000
        ),
        "60,000 tags in each other": view("<View>" * 60_000 + "</View>" * 60_000),
        "130,000 predicted values": view(
            '<Choices name="c" toName="i"><Choice value="a" '
            f'predicted_values="{"ab,xy," * 130_000}"/></Choices>'
        ),
        "60,000 attributes": view("<View " + " ".join(f'a{n}=""' for n in range(60_000)) + "/>"),
        "entities": '<!DOCTYPE x [<!ENTITY a "aaaa">]><View>' + "&a;" * 100_000 + "</View>",
        "a threshold of 500,000 digits": view(
            f'<Choices name="c" toName="i" model_score_threshold="{"9" * 500_000}">'
            '<Choice value="a"/></Choices>'
        ),
        "900,000 spaces": view(" " * 900_000),
    }
    for name, config in configs.items():
        yield Hostile("B12", f"Label Studio: {name}", lambda _, c=config: predicted(c))
        yield Hostile("B12", f"Label Studio's setup: {name}", lambda _, c=config: set_up(c))
    click = [{"from_name": "c", "type": "choices", "value": {"choices": ["x"] * 200_000}}]
    yield Hostile(
        "B12",
        "Label Studio: a click of 200,000 choices",
        lambda _: posted_json(
            f"{LABEL_STUDIO}/predict",
            {
                "tasks": [{"id": 1, "data": {"image": ""}}],
                "label_config": view("".join(_CHOICES for _ in range(1000))),
                "params": {"context": {"result": click}},
            },
        ),
    )
    mapping = {f"class {n}": "rose" for n in range(18_000)}
    yield Hostile(
        "C19",
        "Label Studio: 18,000 labels of a project",
        lambda _: set_up(view(_CHOICES), extra_params={"labels": mapping}),
    )
    parameters = {"labels": {"rose": "r" * 1_000_000}}
    yield Hostile(
        "C19",
        "Label Studio: 200 projects with parameters of 1 MB",
        lambda _: [set_up(view(_CHOICES), f"p{n}", extra_params=parameters)[0] for n in range(200)],
        answers=200,
        patience=60,
    )
