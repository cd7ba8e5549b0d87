"""The images that the built-in model learns from, and how they reach a network."""

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

FOLDERS = {
    "daisy": "daisy",
    "dandelion": "dandelion",
    "roses": "rose",
    "sunflowers": "sunflower",
    "tulips": "tulip",
}
"""Folder of the data set to label of the model, in class order."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZE = CROP = 160


@dataclass(frozen=True)
class Photos:
    """Photographs (uint8, 3 x H x W, sizes differ) and their class numbers."""

    images: list[Tensor]
    labels: Tensor

    def __getitem__(self, chosen: Tensor) -> Self:
        """Return the chosen ones."""
        return type(self)([self.images[i] for i in chosen.tolist()], self.labels[chosen])


def read_photos(tar: Path, split: str) -> Photos:
    """Read `train` or `val`, in the order of the file names."""
    images, labels = [], []
    with tarfile.open(tar) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            parts = Path(member.name).parts
            file = archive.extractfile(member)
            if file is None or parts[-3] != split:
                continue
            image = Image.open(io.BytesIO(file.read())).convert("RGB")
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())
            labels.append(list(FOLDERS).index(parts[-2]))
    return Photos(images, torch.tensor(labels))


def hold_out(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Split the indices: to train on, and held out, the same `share` of each class."""
    generator = torch.Generator().manual_seed(0)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for number in range(len(FOLDERS)):
        members = (labels == number).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        held[members[: int(share * len(members))]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def normalise(batch: Tensor) -> Tensor:
    """Turn uint8 images into what the network reads."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((batch / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def centre(image: Tensor) -> Tensor:
    """Prepare an image as the service does: shorter side to RESIZE, then the centre square."""
    resized: Tensor = transforms.resize(image, [RESIZE], antialias=True)
    cropped: Tensor = transforms.center_crop(resized, [CROP, CROP])
    return cropped


def cut(images: list[Tensor], boxes: Tensor, side: int) -> Tensor:
    """Take one crop of each image, resized to a square."""
    return torch.stack(
        [
            transforms.resized_crop(image, *box, size=[side, side], antialias=True)
            for image, box in zip(images, boxes.tolist(), strict=True)
        ]
    )


def draw_boxes(images: list[Tensor], count: int) -> Tensor:
    """Draw random crops of a third of the image to all of it: N, count, 4."""
    crop = RandomResizedCrop(CROP, scale=(0.3, 1.0))
    sides = ("top", "left", "height", "width")
    drawn = [[crop.make_params([image]) for _ in range(count)] for image in images]
    return torch.tensor([[[params[side] for side in sides] for params in each] for each in drawn])


def colour(batch: Tensor) -> Tensor:
    """Change each image's brightness, contrast and saturation at random, by one affine map."""
    n = len(batch)
    bright, contrast, vivid = (1 + 0.3 * (2 * torch.rand(3, n, 1, 1) - 1)).unbind()
    grey = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    matrix = bright * contrast * (vivid * torch.eye(3) + (1 - vivid) * grey)
    pixels = batch.float().flatten(2)
    level = (grey @ pixels.mean(2, keepdim=True)) * bright * (1 - contrast)
    return torch.baddbmm(level, matrix, pixels).clamp_(0, 255).view(batch.shape)
