"""Hostile images: many pixels, costly modes, metadata, large answers (A3, A7, B11, C13)."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import hostile_images as files
from hostile_http import (
    LABEL_STUDIO,
    LABELING,
    Hostile,
    Names,
    Pieces,
    asked,
    form,
    posted_json,
    text,
)
from measuring import photograph

SIDE = files.SIDE


def images() -> Iterator[Hostile]:
    """All of them."""
    yield from _modes()
    yield from _routes()
    yield from _metadata()
    yield from _answers()
    yield from _costs()


def _sent(item: str, name: str, build: Callable[[], bytes], **more: Any) -> Hostile:
    return Hostile(item, name, lambda _: asked("/explain", {}, build()), **more)


def _modes() -> Iterator[Hostile]:
    """Files of 64 megapixels in one colour."""
    tiffs: dict[str, tuple[int, ...]] = {
        "16 bits": (16, 1, 1, 1),
        "16 bits, signed": (16, 1, 2, 1),
        "32 bits": (32, 1, 2, 1),
        "float": (32, 1, 3, 1),
        "64-bit float": (64, 1, 3, 1),
        "RGB of 16 bits": (16, 3, 1, 2),
        "RGBA": (8, 4, 1, 2, 2),
        "RGBA of 16 bits": (16, 4, 1, 2, 2),
        "CMYK": (8, 4, 1, 5),
        "CMYK of 16 bits": (16, 4, 1, 5),
        "LAB": (8, 3, 1, 8),
        "grey, inverted": (8, 1, 1, 0),
        "1 bit": (1, 1, 1, 1),
    }
    for name, of in tiffs.items():
        yield _sent("A3", f"TIFF, {name}, 64 MP", lambda o=of: files.tiff(*o))
    for name, (mode, compression) in {
        "float, LZW": ("F", "tiff_lzw"),
        "RGBA, LZW": ("RGBA", "tiff_lzw"),
        "16 bits, packed bits": ("I;16", "packbits"),
        "1 bit, group 4": ("1", "group4"),
        "JPEG inside": ("RGB", "jpeg"),
    }.items():
        yield _sent(
            "A3",
            f"TIFF, {name}, 64 MP",
            lambda m=mode, c=compression: files.plain(m, "TIFF", compression=c),
        )
    for name, (depth, colour, interlaced) in {
        "grey of 16 bits": (16, 0, False),
        "RGB of 16 bits": (16, 2, False),
        "grey of 16 bits with alpha": (16, 4, False),
        "RGBA": (8, 6, False),
        "RGBA of 16 bits": (16, 6, False),
        "RGBA of 16 bits, interlaced": (16, 6, True),
        "palette": (8, 3, False),
        "1 bit": (1, 0, False),
    }.items():
        yield _sent(
            "A3",
            f"PNG, {name}, 64 MP",
            lambda d=depth, c=colour, i=interlaced: files.png(d, c, interlaced=i),
        )
    for name, build in {
        "palette with transparency, 64 MP": lambda: files.plain(
            "P", "PNG", transparency=bytes(256)
        ),
        "grey, 64 million × 1": lambda: files.png(8, 0, 64_000_000, 1),
        "RGBA of 16 bits, 1 × 8 million": lambda: files.png(16, 6, 1, 8_000_000),
    }.items():
        yield _sent("A3", f"PNG, {name}", build)
    others: dict[str, Callable[[], bytes]] = {
        "WebP, RGBA, lossless, 64 MP": lambda: files.plain(
            "RGBA", "WEBP", lossless=True, method=0, quality=0
        ),
        "WebP, lossy, 64 MP": lambda: files.plain("RGB", "WEBP", method=0),
        "GIF, 64 MP": lambda: files.plain("L", "GIF"),
        "GIF, interlaced, 64 MP": lambda: files.plain("L", "GIF", interlace=True),
        "BMP, run lengths, 64 MP": files.run_length_bmp,
        "BMP, 1 bit, 64 MP": lambda: files.plain("1", "BMP"),
        "JPEG, 64 MP": lambda: files.plain("RGB", "JPEG", quality=10),
        "JPEG, progressive, 64 MP": lambda: files.plain("RGB", "JPEG", progressive=True),
        "JPEG, progressive CMYK, 64 MP": lambda: files.plain("CMYK", "JPEG", progressive=True),
        "JPEG, progressive, 60 more scans, 64 MP": lambda: files.scanned_jpeg(60),
        "JPEG, progressive, 10,000 scans, 1 MP": lambda: files.scanned_jpeg(10_000, 1000),
        "TIFF, CMYK, 64 million × 1": lambda: files.plain(
            "CMYK", "TIFF", 64_000_000, 1, compression="tiff_adobe_deflate"
        ),
        "TIFF, CMYK, 65,535 × 976": lambda: files.plain(
            "CMYK", "TIFF", 65_535, 976, compression="tiff_adobe_deflate"
        ),
        "TIFF, 100 MP": lambda: files.tiff(16, side=9984),
        "PNG of 10 gigapixels": lambda: files.png(1, 0, 100_000, 100_000),
    }
    for name, build in others.items():
        yield _sent("A3", name, build)


def _deep() -> bytes:
    """64 MP of 16 bits."""
    return files.tiff(16)


def _routes() -> Iterator[Hostile]:
    """The same by every way that an image comes in."""
    for count in (2, 3, 8):
        yield Hostile(
            "A3",
            f"{count} TIFFs of 16 bits and 64 MP in a form",
            lambda _, c=count: form("/explain", [_deep()] * c),
        )
    yield Hostile(
        "A3",
        "3 TIFFs of floats and 64 MP in JSON",
        lambda _: posted_json("/predict", {"images": [{"data": text(files.tiff(32, 1, 3))}] * 3}),
    )
    for count, name, build in (
        (4, "PNGs of RGBA", lambda: files.png(8, 6)),
        (4, "PNGs of grey of 16 bits with alpha", lambda: files.png(16, 4)),
        (
            32,
            "WebPs of RGBA",
            lambda: files.plain("RGBA", "WEBP", lossless=True, method=0, quality=0),
        ),
        (32, "PNGs of 1 bit", lambda: files.png(1, 0)),
        (
            32,
            "PNGs of a palette with transparency",
            lambda: files.plain("P", "PNG", transparency=bytes(256)),
        ),
        (32, "TIFFs of 1 bit", lambda: files.tiff(1)),
        (4, "GIFs", lambda: files.plain("L", "GIF")),
    ):
        yield Hostile(
            "A3",
            f"{count} {name} and 64 MP in a form",
            lambda _, c=count, b=build: form("/explain", [b()] * c),
            beside=True,
            patience=60,
        )
    yield Hostile(
        "A3",
        "4 PNGs of RGBA and 64 MP in a form, all pictures of 5 classes",
        lambda _: form(
            "/explain",
            [files.png(8, 6)] * 4,
            include=["overlay", "heatmap", "regions"],
            explain_top=5,
            fit="pad",
        ),
        beside=True,
        patience=60,
    )
    yield Hostile(
        "A3",
        "32 PNGs of RGBA and 64 MP in a form",
        lambda _: form("/explain", [files.png(8, 6)] * 32),
        patience=60,
    )
    yield Hostile(
        "A3",
        "TIFF of 16 bits and 64 MP, to 8 connections at once",
        lambda _: asked("/explain", {}, _deep()),
        connections=8,
        patience=60,
    )
    yield Hostile(
        "A3",
        "TIFF of 16 bits and 64 MP to V1",
        lambda n: posted_json(f"/v1/models/{n.model}:predict", {"instances": [text(_deep())] * 3}),
    )
    yield Hostile(
        "A3",
        "TIFF of 16 bits and 64 MP to V2",
        lambda n: posted_json(
            f"/v2/models/{n.model}/infer",
            {
                "inputs": [
                    {"name": "i", "shape": [3], "datatype": "BYTES", "data": [text(_deep())] * 3}
                ]
            },
        ),
    )
    yield Hostile(
        "A3",
        "TIFF of 16 bits and 64 MP to TorchServe",
        lambda n: asked(f"/explanations/{n.model}", {}, _deep()),
    )
    uri = "data:image/tiff;base64,"
    yield Hostile(
        "A3",
        "TIFF of 16 bits and 64 MP to X-AnyLabeling",
        lambda n: posted_json(LABELING, {"model": n.model, "image": uri + text(_deep())}),
    )
    config = (
        '<View><Image name="i" value="$image"/><BrushLabels name="b" toName="i">'
        '<Label value="cam"/></BrushLabels></View>'
    )
    yield Hostile(
        "A3",
        "TIFF of 16 bits and 64 MP, 3 tasks of Label Studio",
        lambda _: posted_json(
            f"{LABEL_STUDIO}/predict",
            {
                "tasks": [{"id": n, "data": {"image": uri + text(_deep())}} for n in range(3)],
                "label_config": config,
            },
        ),
    )
    for fill in ("mean", "blur", "grey"):
        mask = json.dumps({"boxes": [[0, 0, SIDE, SIDE / 2]] * 1000, "fill": fill})
        yield Hostile(
            "A3",
            f"1,000 boxes ({fill}) on 64 MP",
            lambda _, m=mask: asked("/explain", {"mask": m}, files.png(8, 2)),
            patience=60,
        )
    runs = {"rle": {"size": [SIDE, SIDE], "counts": [320] * (SIDE * SIDE // 320)}}
    yield Hostile(
        "A3",
        "200,000 runs on 64 MP",
        lambda _: posted_json(
            "/explain", {"images": [{"data": text(files.png(8, 0))}], "mask": runs}
        ),
    )


def _metadata() -> Iterator[Hostile]:
    """Small images with much beside their pixels."""
    entry = files.exif(1)
    floods: dict[str, Callable[[], bytes]] = {
        "JPEG, 100,000 EXIF segments, 2 MB": lambda: files.marked_jpeg(0xE1, entry[:14], 100_000),
        "JPEG, 45,000 EXIF segments": lambda: files.marked_jpeg(0xE1, entry[:14], 45_000),
        "JPEG, 1.5 million EXIF segments, 30 MB": lambda: files.marked_jpeg(
            0xE1, entry[:14], 1_500_000
        ),
        "JPEG, 480 EXIF segments of 64 kB": lambda: files.marked_jpeg(
            0xE1, b"Exif\0\0" + bytes(65_000), 480
        ),
        "JPEG, 3,000 EXIF entries": lambda: files.marked_jpeg(0xE1, files.exif(3000), 1),
        "JPEG, 200,000 comments": lambda: files.marked_jpeg(0xFE, b"c", 200_000),
        "JPEG, 90,000 profile segments": lambda: files.marked_jpeg(
            0xE2, b"ICC_PROFILE\0\1\1", 45_000
        ),
        "JPEG, 40,000 Photoshop segments": lambda: files.marked_jpeg(
            0xED, b"Photoshop 3.0\x008BIM", 40_000
        ),
        "JPEG, 100,000 XMP segments": lambda: files.marked_jpeg(
            0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>", 25_000
        ),
        "JPEG, 200,000 segments of application 5": lambda: files.marked_jpeg(0xE5, b"a", 190_000),
        "JPEG, 200,000 quantization tables": lambda: files.marked_jpeg(0xDB, bytes(65), 14_000),
        "JPEG, 30 MB of fill bytes": lambda: files.filled_jpeg(30_000_000),
        "JPEG, 900 kB of fill bytes": lambda: files.filled_jpeg(900_000),
        "JPEG, 6 million comments, 30 MB": lambda: files.marked_jpeg(0xFE, b"c", 6_000_000),
        "MPO, 60,000 segments": lambda: files.marked_jpeg(0xE2, b"MPF\0II*\0\x08\0\0\0", 50_000),
        "PNG, 60,000 texts": lambda: files.chunked_png(b"tEXt", b"a\0b", 60_000),
        "PNG, 2 million texts, 30 MB": lambda: files.chunked_png(b"tEXt", b"a\0b", 2_000_000),
        "PNG, 60,000 international texts": lambda: files.chunked_png(
            b"iTXt", b"a\0\0\0\0\0b", 48_000
        ),
        "PNG, 900 packed texts of 1 MB": lambda: files.chunked_png(
            b"zTXt", b"a\0\0" + files.bomb(1 << 20), 800
        ),
        "PNG, a profile of 64 MB": lambda: files.chunked_png(
            b"iCCP", b"a\0\0" + files.bomb(64 << 20), 1
        ),
        "PNG, 60,000 EXIF chunks": lambda: files.chunked_png(b"eXIf", b"II*\0\x08\0\0\0", 45_000),
        "PNG, 70,000 unknown chunks": lambda: files.chunked_png(b"abCd", b"", 70_000),
        "PNG, 70,000 animation frames": lambda: files.chunked_png(b"fcTL", bytes(26), 25_000),
        "PNG, 2.5 million empty chunks, 30 MB": lambda: files.chunked_png(b"abCd", b"", 2_500_000),
        "GIF, 190,000 comments": lambda: files.commented_gif(190_000),
        "GIF, 6 million comments, 30 MB": lambda: files.commented_gif(6_000_000),
        "GIF, 3,500 comments of 255 bytes": lambda: files.commented_gif(3500, 255),
        "GIF, 120,000 graphic controls": lambda: files.extended_gif(0xF9, b"\4\0\0\0\0\0", 110_000),
        "GIF, 70,000 application extensions": lambda: files.extended_gif(
            0xFF, b"\x0bNETSCAPE2.0\3\1\0\0\0", 48_000
        ),
        "GIF, 20,000 frames": lambda: files.framed_gif(20_000),
        "WebP, 100,000 chunks": lambda: files.chunked_webp(b"ABCD", b"", 120_000),
        "WebP, 3 million chunks, 30 MB": lambda: files.chunked_webp(b"ABCD", b"", 3_500_000),
        "WebP, 60,000 EXIF chunks": lambda: files.chunked_webp(b"EXIF", entry[6:], 30_000),
        "TIFF, 30,000 tags": lambda: files.tagged_tiff(30_000),
        "TIFF, 50,000 directories": lambda: files.chained_tiff(50_000),
        "TIFF, 1,000 pages": lambda: files.tiff(8, side=160, pages=1000),
    }
    for name, build in floods.items():
        yield _sent("B11", name, build, patience=60)
    yield Hostile(
        "B11",
        "32 JPEGs of 45,000 EXIF segments in a form",
        lambda _: form("/explain", [files.marked_jpeg(0xE1, entry[:14], 45_000)] * 32),
        patience=60,
    )
    yield Hostile(
        "B11",
        "V1: 45,000 EXIF segments",
        lambda n: posted_json(
            f"/v1/models/{n.model}:predict",
            {"instances": [text(files.marked_jpeg(0xE1, entry[:14], 40_000))]},
        ),
    )


def _answers() -> Iterator[Hostile]:
    """Small questions with large answers."""
    large = functools.cache(lambda: files.noise(2048, 2048, quality=20))
    small = functools.cache(lambda: photograph(0, 64, 48))
    overlays = {"include": "overlay", "format": "png", "explain_top": 5}
    yield Hostile(
        "A7",
        "4 noise images, 5 PNG overlays each",
        lambda _: form("/explain", [large()] * 4, **overlays),
        patience=60,
    )
    yield Hostile(
        "A7",
        "8 noise images, everything of 5 classes",
        lambda _: form(
            "/explain",
            [files.noise(2048, 2048, quality=10)] * 8,
            **{**overlays, "include": ["overlay", "heatmap", "grid", "regions"]},
        ),
        patience=60,
    )
    yield Hostile(
        "A7",
        "one noise image, 5 WebP overlays",
        lambda _: asked("/explain", {**overlays, "format": "webp"}, large()),
    )
    yield Hostile(
        "A7",
        "32 images, all activations as arrays",
        lambda _: form("/explain", [small()] * 32, activations="**", activation_as="array"),
        patience=60,
    )
    yield Hostile(
        "A7",
        "one image, all activations as images and arrays",
        lambda _: asked(
            "/predict",
            {"activations": "**", "activation_as": ["array", "image", "stats"]},
            small(),
        ),
    )
    yield Hostile(
        "A7",
        "one image, all activations 16 times as arrays",
        lambda _: asked(
            "/predict",
            {"activations": ["**", "*", "type:*"] * 30, "activation_as": ["array"] * 16},
            small(),
        ),
    )
    yield Hostile(
        "A7",
        "V1: 4 noise images, 5 PNG overlays each",
        lambda n: posted_json(
            f"/v1/models/{n.model}:explain",
            {"instances": [text(large())] * 4, "parameters": overlays},
        ),
        patience=60,
    )
    yield Hostile(
        "A7",
        "V2: 4 noise images, PNG overlays",
        lambda n: _v2_overlays(n, [large()] * 4),
        patience=60,
    )
    yield Hostile(
        "A7",
        "V2: one noise image, the overlay 100 times",
        lambda n: _v2_overlays(n, [large()], outputs=[{"name": "overlay"}] * 100),
        patience=60,
    )
    config = (
        '<View><Image name="i" value="$image"/><BrushLabels name="b" toName="i">'
        '<Label value="cam"/></BrushLabels></View>'
    )
    uri = "data:image/jpeg;base64,"
    yield Hostile(
        "A7",
        "Label Studio: 4 brushes over 64 MP",
        lambda _: posted_json(
            f"{LABEL_STUDIO}/predict",
            {
                "tasks": [
                    {"id": n, "data": {"image": uri + text(files.plain("L", "JPEG", quality=10))}}
                    for n in range(4)
                ],
                "label_config": config,
            },
        ),
        patience=60,
    )
    brushes = "".join(
        f'<BrushLabels name="b{n}" toName="i"><Label value="cam"/></BrushLabels>'
        for n in range(500)
    )
    yield Hostile(
        "A7",
        "Label Studio: 500 brushes over 4 MP",
        lambda _: posted_json(
            f"{LABEL_STUDIO}/predict",
            {
                "tasks": [{"id": 1, "data": {"image": uri + text(large())}}],
                "label_config": f'<View><Image name="i" value="$image"/>{brushes}</View>',
            },
        ),
        patience=60,
    )


def _v2_overlays(names: Names, pictures: list[bytes], **more: Any) -> Pieces:
    data = [text(each) for each in pictures]
    tensor = {"name": "i", "shape": [len(data)], "datatype": "BYTES", "data": data}
    more = {"outputs": [{"name": "overlay"}], **more}
    body = {"inputs": [tensor], "parameters": {"format": "png", "explain_top": 5}, **more}
    return posted_json(f"/v2/models/{names.model}/explain", body)


def _costs() -> Iterator[Hostile]:
    """Questions that take many forward and backward passes."""
    small = functools.cache(lambda: photograph(0, 64, 48))
    for name, options in {
        "explain_top=100 at an early layer": {"explain_top": 100, "layer": "EARLY"},
        "explain_top=100 at 16 layers": {"explain_top": 100, "layer": ["EARLY"] * 16},
        "layercam at an early layer, 5 classes": {
            "explain_top": 5,
            "layer": "EARLY",
            "method": "layercam",
        },
        "eigencam at an early layer, 5 classes": {
            "explain_top": 5,
            "layer": "EARLY",
            "method": "eigencam",
        },
        "scorecam at an early layer": {"layer": "EARLY", "method": "scorecam", "explain_top": 5},
        "ablationcam at an early layer": {"layer": "EARLY", "method": "ablationcam"},
        "2,000 masks of rise": {"method": "rise", "samples": 1990},
        "100,000 masks of rise": {"method": "rise", "samples": 100_000},
        "integrated gradients, 390 steps, 5 classes": {
            "method": "integrated_gradients",
            "steps": 390,
            "explain_top": 5,
        },
        "guided backpropagation, 100 classes": {"method": "guided_backprop", "explain_top": 100},
    }.items():
        yield Hostile(
            "C13",
            name,
            lambda n, o=options: asked("/explain", _early(n, o), small()),
            patience=90,
        )
    yield Hostile(
        "C13",
        "V1: five instances of 2,000 masks",
        lambda n: posted_json(
            f"/v1/models/{n.model}:explain",
            {
                "instances": [text(small())] * 5,
                "parameters": {"method": "rise", "samples": 1990, "include": "none"},
            },
        ),
        patience=90,
    )
    yield Hostile(
        "C13",
        "32 images, explain_top=100 at an early layer",
        lambda n: form("/explain", [small()] * 32, explain_top=100, layer=n.early, include="none"),
        patience=90,
    )
    yield Hostile(
        "C13",
        "32 images of 2,000 masks",
        lambda _: form("/explain", [small()] * 32, method="rise", samples=1990, include="none"),
        patience=90,
    )


def _early(names: Names, options: dict[str, Any]) -> dict[str, Any]:
    layers = options.get("layer")
    if layers is None:
        return options
    return {**options, "layer": names.early if isinstance(layers, str) else [names.early] * 16}
