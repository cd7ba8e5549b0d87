"""Draw `sunflower.jpg`, the sample photograph: `python examples/draw_sample.py [--out FILE]`.

The picture is the project's own work: every pixel comes from this script and its seed. The flower
stands off-centre, so that a heatmap which follows it says more than one that marks the middle.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 640, 480
FLOWER_CENTRE = (228, 204)
"""x, y in pixels of the picture."""
FLOWER_RADIUS = 142
"""From the centre to the tips of the petals, in pixels."""
SEED = 7
SCALE = 3
"""Everything is drawn so many times larger, then averaged down."""

Floats = NDArray[np.float64]
Shade = Callable[[Floats, Floats, np.random.Generator], Floats]
"""The colour of a blade at u along it (0..1) and v across it (-1..1)."""


def noise(rng: np.random.Generator, cells: int, smooth: float) -> Floats:
    """Make a smooth random field over the whole picture, about -1..1."""
    small = rng.random((cells, cells)) * 255
    image = Image.fromarray(small.astype(np.uint8)).resize(
        (WIDTH * SCALE, HEIGHT * SCALE), Image.Resampling.BICUBIC
    )
    blurred = image.filter(ImageFilter.GaussianBlur(smooth * SCALE))
    return np.asarray(blurred, dtype=np.float64) / 127.5 - 1


def mix(low: Floats, high: Floats, share: Floats) -> Floats:
    """Blend two colours by a field in 0..1."""
    return low + (high - low) * np.clip(share, 0, 1)[..., None]


def rgb(*values: int) -> Floats:
    """Make a colour."""
    return np.array(values, dtype=np.float64)


def background(rng: np.random.Generator) -> Floats:
    """Paint a hazy sky over a line of trees and a field, all far out of focus."""
    y = np.linspace(0, 1, HEIGHT * SCALE)[:, None] + np.zeros((1, WIDTH * SCALE))
    sky = mix(rgb(96, 152, 214), rgb(206, 224, 236), y / 0.5)
    clouds = sum(noise(rng, cells, 8) / k for k, cells in enumerate((6, 11, 21), 1))
    sky = mix(sky, rgb(247, 247, 246), 0.8 * np.clip(np.asarray(clouds) - 0.1, 0, 1))
    trees = mix(rgb(52, 84, 50), rgb(98, 128, 74), 0.5 + 0.8 * noise(rng, 26, 6))
    field = mix(rgb(70, 112, 44), rgb(128, 158, 66), 0.45 + 0.7 * noise(rng, 30, 5))
    field = mix(field, rgb(40, 72, 28), (y - 0.62) * 1.9)
    ridge = 0.47 + 0.05 * noise(rng, 9, 12)
    scene = mix(sky, trees, (y - ridge) * 26)
    scene = mix(scene, field, (y - 0.6 - 0.02 * noise(rng, 8, 10)) * 22)
    image = Image.fromarray(scene.clip(0, 255).astype(np.uint8))
    brush = ImageDraw.Draw(image, "RGBA")
    for _ in range(70):  # discs of light between the leaves
        x, h = rng.uniform(0, WIDTH) * SCALE, rng.uniform(0.5, 1) * HEIGHT * SCALE
        r = rng.uniform(4, 17) * SCALE
        tint = (168, 196, 92) if rng.random() < 0.7 else (212, 222, 170)
        brush.ellipse((x - r, h - r, x + r, h + r), fill=(*tint, int(rng.uniform(14, 46))))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(3.2 * SCALE)), dtype=np.float64)


def shade_leaf(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    """Colour a leaf."""
    veins = np.cos((u * 9 - np.abs(v) * 2.2) * 2 * math.pi) ** 12
    tone = 0.45 + 0.3 * v + 0.25 * np.sin(3 * u + rng.uniform(0, 6))
    colour = mix(rgb(38, 74, 28), rgb(112, 152, 62), tone)
    return mix(colour, rgb(150, 182, 96), 0.25 * veins + 0.5 * np.exp(-((v / 0.05) ** 2)))


def shade_petal(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    """Colour a petal."""
    phase = rng.uniform(0, 6, 3)
    streaks = np.sin(v * 11 + phase[0]) * 0.5 + np.sin(v * 23 + 2 * u + phase[1]) * 0.35
    colour = mix(rgb(206, 112, 6), rgb(253, 204, 20), 0.15 + 1.5 * u)
    colour = mix(colour, rgb(255, 228, 84), 0.6 * np.clip(u - 0.35, 0, 1) * (1 + np.sin(phase[2])))
    light = 0.93 + 0.055 * streaks - 0.2 * np.abs(v) ** 3 - 0.07 * np.exp(-((v / 0.07) ** 2))
    light = light + 0.05 * v * math.sin(phase[2]) - 0.22 * np.clip(u - 0.85, 0, 1)
    shaded: Floats = colour * light[..., None]
    return shaded


@dataclass(frozen=True)
class Blade:
    """A petal or a leaf; lengths in pixels of the finished picture."""

    root: tuple[float, float]
    angle: float
    length: float
    width: float
    bend: float
    """How far the tip leans sideways, in lengths."""
    light: float
    shade: Shade


def paint(layer: Floats, blade: Blade, rng: np.random.Generator) -> None:
    """Paint one blade, and the soft shadow that it throws on the blades below."""
    reach = blade.length * 1.25 + 12
    left, top = (max(0, int((c - reach) * SCALE)) for c in blade.root)
    right, bottom = (int((c + reach) * SCALE) for c in blade.root)
    patch = layer[top:bottom, left:right]
    y, x = np.mgrid[top : top + patch.shape[0], left : left + patch.shape[1]] / SCALE
    x, y = x - blade.root[0], y - blade.root[1]
    cos, sin = math.cos(blade.angle), math.sin(blade.angle)
    u = (x * cos + y * sin) / blade.length
    across = (y * cos - x * sin - blade.bend * blade.length * u**2) / blade.width
    inside = np.clip(u, 1e-6, 1)
    v = across / np.maximum(np.sin(math.pi * inside**0.7) ** 0.75, 1e-3)
    mask = ((np.abs(v) < 1) & (u > 0) & (u < 1)).astype(np.float64)
    soft = Image.fromarray((mask * 255).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(3.0 * SCALE)
    )
    shadow = np.roll(np.asarray(soft, dtype=np.float64) / 255, (3 * SCALE, -2 * SCALE), (0, 1))
    patch[..., :3] *= 1 - 0.42 * shadow[..., None]
    over(patch, blade.shade(inside, np.clip(v, -1, 1), rng) * blade.light, mask)


def over(layer: Floats, colour: Floats, mask: Floats) -> None:
    """Lay a colour over a layer of red, green, blue and opacity."""
    layer[..., :3] += (colour - layer[..., :3]) * mask[..., None]
    np.maximum(layer[..., 3], mask, out=layer[..., 3])


def stalk(layer: Floats, rng: np.random.Generator) -> None:
    """Paint the stem, from the head down to the edge of the picture, and its leaves."""
    y, x = np.mgrid[0 : layer.shape[0], 0 : layer.shape[1]] / SCALE
    centre = FLOWER_CENTRE[0] + 26 * ((y - FLOWER_CENTRE[1]) / 270) ** 2
    across = (x - centre) / (7.5 + 0.008 * y)
    mask = ((np.abs(across) < 1) & (y > FLOWER_CENTRE[1])).astype(np.float64)
    colour = mix(rgb(132, 162, 72), rgb(48, 78, 32), 0.5 - 0.5 * across + 0.1 * noise(rng, 90, 1))
    over(layer, colour, mask)
    paint(layer, Blade((243, 410), 0.35, 150, 42, 0.1, 0.95, shade_leaf), rng)
    paint(layer, Blade((238, 392), 2.75, 128, 38, -0.14, 0.82, shade_leaf), rng)


def petals(layer: Floats, rng: np.random.Generator) -> None:
    """Paint three rings of petals, the back one darkest, lit from the upper right."""
    for ring, (count, reach, tone) in enumerate(
        ((21, 1.0, 0.8), (21, 0.96, 0.92), (17, 0.86, 1.0))
    ):
        for i in rng.permutation(count):
            angle = 2 * math.pi * (i + ring / 3) / count + rng.normal(0, 0.07)
            length = (
                FLOWER_RADIUS * reach * rng.uniform(0.84, 1.0) * (1 - 0.07 * abs(math.sin(angle)))
            )
            root = (
                FLOWER_CENTRE[0] + 0.22 * FLOWER_RADIUS * math.cos(angle),
                FLOWER_CENTRE[1] + 0.22 * FLOWER_RADIUS * math.sin(angle),
            )
            width = FLOWER_RADIUS * rng.uniform(0.11, 0.145)
            light = tone * rng.uniform(0.92, 1.06) * (1 + 0.08 * math.cos(angle + 0.9))
            bend = rng.normal(0, 0.09)
            paint(layer, Blade(root, angle, 0.78 * length, width, bend, light, shade_petal), rng)


def head(picture: Image.Image, rng: np.random.Generator) -> None:
    """Paint the disc: florets on a golden-angle spiral (Vogel 1979), lit from the upper right."""
    radius = 0.43 * FLOWER_RADIUS
    brush = ImageDraw.Draw(picture, "RGBA")

    def dot(x: float, y: float, r: float, fill: tuple[int, ...]) -> None:
        x, y = (c * SCALE for c in (FLOWER_CENTRE[0] + x, FLOWER_CENTRE[1] + y * 0.96))
        brush.ellipse((x - r * SCALE, y - r * SCALE, x + r * SCALE, y + r * SCALE), fill=fill)

    for i in range(12):  # the shadow round the disc
        dot(-1, 1.5, radius + 7 - i * 0.6, (60, 26, 2, 16))
    dot(0, 0, radius, (58, 32, 12, 255))
    count = 620
    for i in range(count, 0, -1):
        out, angle = math.sqrt(i / count), i * math.pi * (3 - math.sqrt(5))
        x, y = radius * out * math.cos(angle), radius * out * math.sin(angle)
        colour = mix(rgb(116, 98, 34), rgb(112, 58, 16), np.array((out - 0.42) / 0.3))
        if out > 0.8:
            colour = mix(rgb(150, 82, 14), rgb(226, 158, 32), np.array(rng.random()))
        colour = colour * (0.86 + 0.24 * (x - y) / radius) * rng.uniform(0.75, 1.2)
        size = 1.15 + 1.35 * out
        dot(x - 0.4, y + 0.7, size, (34, 17, 6, 200))
        dot(x, y, size * 0.86, tuple(colour.clip(0, 255).astype(int)))
        dot(x + 0.35 * size, y - 0.35 * size, size * 0.3, (255, 226, 150, 96))


def draw() -> Image.Image:
    """Draw the picture: the same one, always."""
    rng = np.random.default_rng(SEED)
    scene = background(rng)
    layer = np.zeros((*scene.shape[:2], 4))
    stalk(layer, rng)
    petals(layer, rng)
    scene += (layer[..., :3] - scene) * layer[..., 3:]
    large = Image.fromarray(scene.clip(0, 255).astype(np.uint8))
    head(large, rng)
    lens = large.filter(ImageFilter.GaussianBlur(0.45 * SCALE))
    pixels = np.asarray(lens.resize((WIDTH, HEIGHT), Image.Resampling.BOX), dtype=np.float64)
    y, x = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    pixels = pixels * (1.04 - 0.16 * (x**2 + y**2))[..., None]
    grain = rng.normal(0, 2.6, (HEIGHT, WIDTH, 1)) + rng.normal(0, 1.2, (HEIGHT, WIDTH, 3))
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))


def main() -> None:
    """Write the picture and say where the flower is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("sunflower.jpg"))
    file = parser.parse_args().out
    draw().save(file, quality=90, optimize=True)
    print(f"{file}: flower at {FLOWER_CENTRE}, radius {FLOWER_RADIUS}")


if __name__ == "__main__":
    main()
