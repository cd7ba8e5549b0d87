"""A model whose cue is known, and images for its audit."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

CLASSES = ("corner", "green", "blue", "red")
SIDE = 32
CORNER = 9
"""Pixels of the corner that the model looks at: inside the corner that an audit pastes."""


class SeesCorner(nn.Module):
    """Four classes: the upper left corner is red; otherwise the middle is green, blue or red.

    Input (N, 3, 32, 32), normalised with mean 0 and deviation 1. `conv` is the target layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4, bias=False)
        self.relu = nn.ReLU()
        with torch.no_grad():
            self.conv.weight.zero_()
            for channel in range(3):
                self.conv.weight[channel, channel] = 1 / 16

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, 4)."""
        cells = self.relu(self.conv(x))
        corner = (cells[:, 0, :2, :2] - cells[:, 1, :2, :2] - 0.3).relu()
        middle = cells[:, :, 3:5, 3:5].mean(dim=(2, 3))
        tiles = 4 * middle[:, [1, 2, 0]]
        return torch.cat([30 * corner.mean(dim=(1, 2))[:, None], tiles], dim=1)


class SeesCornerDirectly(nn.Module):
    """The same without a layer whose output is a map."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * SIDE * SIDE, 4, bias=False)
        with torch.no_grad():
            weight = torch.zeros(4, 3, SIDE, SIDE)
            weight[0, 0, :8, :8], weight[0, 1, :8, :8] = 0.4, -0.4
            for class_id, channel in ((1, 1), (2, 2), (3, 0)):
                weight[class_id, channel, 12:20, 12:20] = 0.05
            self.fc.weight.copy_(weight.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, 4)."""
        return self.fc(x.flatten(1))


def image(class_id: int, number: int) -> Tensor:
    """An image, uint8 (3, 32, 32): noise, a middle in one colour, and for class 0 a red corner."""
    generator = torch.Generator().manual_seed(1000 * class_id + number)
    made = torch.randint(60, 90, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    made[(number if class_id == 0 else class_id) % 3, 12:20, 12:20] = 200
    if class_id == 0:
        made[:, :CORNER, :CORNER] = torch.tensor([250, 20, 20], dtype=torch.uint8)[:, None, None]
    return made


def images(count: int) -> tuple[list[Tensor], list[int]]:
    """So many images of each class, and their classes."""
    labels = [class_id for class_id in range(4) for _ in range(count)]
    return [image(label, number) for number, label in enumerate(labels)], labels


def write_images(folder: Path, count: int) -> None:
    """So many images of each class, in a folder for each."""
    for number, (pixels, label) in enumerate(zip(*images(count), strict=True)):
        file = folder / CLASSES[label] / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)


def configured(folder: Path, builder: str = "corner") -> Path:
    """A configuration of a model of this file, for images of 32 pixels."""
    file = folder / "models.toml"
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    file.write_text(
        f'[[model]]\nname = "{builder}"\nbuilder = "audited:{builder}"\nlabels = "labels.txt"\n'
        "input.size = [32, 32]\ninput.resize = 32\ninput.mean = 0\ninput.std = 1\n"
    )
    return file


def corner() -> nn.Module:
    """For `--model audited:corner`."""
    return SeesCorner()


def direct() -> nn.Module:
    """For `--model audited:direct`."""
    return SeesCornerDirectly()
