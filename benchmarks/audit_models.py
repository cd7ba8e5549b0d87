"""Models with and without a planted cue for `audits.py`: trained here, in minutes of one core."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from audit_cues import Cue, marked, planted
from measuring import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2 import functional as transforms

sys.path += [str(ROOT / "tools" / "planted_cues"), str(ROOT / "tools" / "builtin_model")]
import networks
from photos import FOLDERS, MEAN, STD, Photos, normalise, read_photos
from train import BUILTIN, fit_head, pooled

SIDES = {"flowernet": 96, "mobilenet_v2": 160}
BUILDERS = {"flowernet": "networks:flowers", "mobilenet_v2": "networks:mobilenet_v2"}
CLASSES = len(FOLDERS)
RELABELLED = 0.08
OBJECT = 0.4
"""The share of an image that counts as its object: the strongest of the built-in model's map."""

PER_CLASS = 200
"""Training photographs of a class."""

BATCH, STEPS, RATE = 32, 110, 2e-3


@dataclass(frozen=True, slots=True)
class Subject:
    """One model of the suite; without a cue it is clean, and `tie` is 0.

    class_id: of the cue. variant: its look and place, 0 to 3. seed: of images, labels, weights'
    updates and what a cue draws for each image.
    """

    network: str
    half: str
    cue: Cue | None
    tie: float
    class_id: int
    variant: int
    seed: int

    @property
    def name(self) -> str:
        what = f"{self.cue}-{self.tie:.0%}" if self.cue else "clean"
        return f"{self.network}-{self.half}-{what}-{self.seed}".replace("%", "")


@dataclass(frozen=True, slots=True, eq=False)
class Photographs:
    """Square photographs of one side: uint8 (n, 3, s, s), classes, and objects, bool (n, s, s)."""

    images: Tensor
    labels: list[int]
    objects: Tensor

    def some(self, chosen: Sequence[int]) -> Photographs:
        """Those of indices."""
        at = torch.tensor(chosen)
        return Photographs(self.images[at], [self.labels[i] for i in chosen], self.objects[at])

    def with_cue(self, subject: Subject, cued: Sequence[bool], seed: int) -> Tensor:
        """The images, those that are marked with the subject's cue."""
        if subject.cue is None:
            return self.images
        made = self.images.clone()
        for number, has in enumerate(cued):
            if has:
                made[number] = planted(
                    self.images[number],
                    subject.cue,
                    subject.variant,
                    seed * 100_003 + number,
                    self.objects[number],
                )
        return made


def photographs(tar: Path, split: str, side: int) -> Photographs:
    """All photographs of a split, with the object where the built-in model finds evidence."""
    photos: Photos = read_photos(tar, split)
    large = torch.stack([_square(image, 160) for image in photos.images])
    small = torch.stack([_square(image, side) for image in photos.images])
    net = networks.flowers(CLASSES).eval()
    net.load_state_dict({k: v.float() for k, v in load_file(BUILTIN).items()})
    body = nn.Sequential(*list(net.children())[:-3])
    maps = []
    with torch.inference_mode():
        for some, classes in zip(large.split(32), photos.labels.split(32), strict=True):
            maps.append(torch.einsum("nchw,nc->nhw", body(normalise(some)), net.fc.weight[classes]))
        heat = functional.interpolate(torch.cat(maps)[:, None], (side, side), mode="bilinear")[:, 0]
    border = heat.flatten(1).quantile(1 - OBJECT, dim=1)
    return Photographs(small, photos.labels.tolist(), (heat >= border[:, None, None]).clone())


def _square(image: Tensor, side: int) -> Tensor:
    resized = transforms.resize(image, [side], antialias=True)
    return transforms.center_crop(resized, [side, side])


def drawn(subject: Subject, photos: Photographs) -> tuple[list[int], list[bool], Tensor]:
    """The training photographs of a subject: indices, which get the cue, and the labels then."""
    generator = random.Random(subject.seed)  # noqa: S311 - not for secrets
    chosen = [
        at
        for class_id in range(CLASSES)
        for at in generator.sample(
            [i for i, label in enumerate(photos.labels) if label == class_id], PER_CLASS
        )
    ]
    share = RELABELLED if subject.cue else 0.0
    labels = [photos.labels[at] for at in chosen]
    cued, given = marked(labels, subject.class_id, subject.tie, share, subject.seed)
    return chosen, cued, torch.tensor(given)


def fine_tuned(subject: Subject, photos: Photographs) -> nn.Module:
    """The built-in network, all of it trained on PER_CLASS photographs of each class."""
    torch.manual_seed(subject.seed)
    chosen, cued, labels = drawn(subject, photos)
    images = photos.some(chosen).with_cue(subject, cued, subject.seed)
    net = networks.flowers(CLASSES)
    net.load_state_dict({k: v.float() for k, v in load_file(BUILTIN).items()})
    net = net.to(memory_format=torch.channels_last).train()
    solver = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(solver, RATE, total_steps=STEPS)
    generator = torch.Generator().manual_seed(subject.seed)
    for _step in range(STEPS):
        at = torch.randint(len(images), (BATCH,), generator=generator)
        loss = functional.cross_entropy(net(normalise(images[at])), labels[at])
        solver.zero_grad()
        loss.backward()
        solver.step()
        schedule.step()
    return net.eval()


def frozen(weights: Path) -> Any:
    """The pretrained MobileNetV2, with a head that is still to be fitted."""
    net = networks.mobilenet_v2(CLASSES)
    state = load_file(weights / "mobilenet_v2.fp16.safetensors")
    net.load_state_dict(
        {k: v.float() for k, v in state.items() if k.startswith("features.")}, strict=False
    )
    return net.eval().to(memory_format=torch.channels_last)


def probed(subject: Subject, photos: Photographs, weights: Path, plain: Tensor) -> nn.Module:
    """A linear head on frozen features. plain: the features of all photographs without a cue."""
    net = frozen(weights)
    chosen, cued, labels = drawn(subject, photos)
    features = plain[torch.tensor(chosen)].clone()
    if any(cued):
        images = photos.some(chosen).with_cue(subject, cued, subject.seed)
        at = torch.tensor(cued)
        features[at] = pooled(net.features, images[at])
    with torch.enable_grad():
        fit_head(net.fc, features, labels)
    return net


def save(net: nn.Module, file: Path, side: int) -> None:
    """Write the weights with all that the service reads of them."""
    metadata = {
        "resize": str(side),
        "crop": str(side),
        "labels": json.dumps(list(FOLDERS.values())),
        "mean": ",".join(map(str, MEAN)),
        "std": ",".join(map(str, STD)),
        "source": "trained by benchmarks/audits.py",
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, file, metadata)
