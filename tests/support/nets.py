"""Nets to be served: those of the hook tutorials, and some of unusual shape."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch
import torch
from tiny import SmallNet
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

CIFAR = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_MEAN = (0.4948052, 0.48568845, 0.44682974)
CIFAR_STD = (0.24580306, 0.24236229, 0.2603115)


def argument(
    folder: Path,
    builder: Callable[[], nn.Module],
    side: int,
    *,
    mean: Sequence[float] = (0, 0, 0),
    std: Sequence[float] = (1, 1, 1),
    **metadata: str,
) -> str:
    """`NAME=BUILDER@FILE` for `--model`: the file's metadata says how to feed the model.

    The input is a square of `side` pixels; builder: a function of this module.
    """
    file = folder / f"{builder.__name__}.safetensors"
    fed = {
        "resize": str(side),
        "crop": str(side),
        "mean": ",".join(map(str, mean)),
        "std": ",".join(map(str, std)),
    }
    safetensors.torch.save_file(builder().state_dict(), file, fed | metadata)
    return f"nets:{builder.__name__}@{file}"


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A net with the random weights of seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


# ---- the tutorials'


class FeatureMaps(nn.Module):
    """Kernels of ones and of twos, and a pooling; the logits are the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 2, 3, bias=False), nn.MaxPool2d(2)
        ones = torch.ones(1, 3, 3)
        self.conv.weight = nn.Parameter(torch.stack([ones, 2 * ones]))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x[:, :1])).flatten(1)


class Perceptron(nn.Module):
    """Two linear layers and a ReLU on the mean of each colour; one logit."""

    last = (1.0, 2.0, 3.0, 4.0)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second = nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)
        rows = [[1.0, 2, 3], [-4, -5, -6], [7, 8, 9], [-10, -11, -12]]
        self.first.weight = nn.Parameter(torch.tensor(rows))
        self.first.bias = nn.Parameter(torch.tensor([1.0, 2, 3, 4]))
        self.second.weight = nn.Parameter(torch.tensor([self.last]))
        self.second.bias = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.relu(self.first(x.mean(dim=(2, 3)))))


class Negative(Perceptron):
    """The same with a negative weight: guided backpropagation gives something else here."""

    last = (1.0, 2.0, -3.0, 4.0)


class LeNet(nn.Module):
    """The tutorial's net for 32×32 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.pool, self.relu = nn.MaxPool2d(2), nn.ReLU()
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x))).flatten(1)
        return self.fc3(self.relu(self.fc2(self.relu(self.fc1(x)))))


def feature_maps() -> nn.Module:
    return FeatureMaps()


def perceptron() -> nn.Module:
    return Perceptron()


def negative() -> nn.Module:
    return Negative()


def lenet() -> nn.Module:
    return seeded(LeNet)


LENET_METADATA = {"labels": json.dumps(CIFAR), "target_layer": "conv2"}


class CueNet(nn.Module):
    """A small net that can learn a cue: convolutions, global average pooling, one linear layer."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


def cue_net() -> nn.Module:
    return seeded(CueNet)


# ---- of unusual shape


def resnet() -> nn.Module:
    """Torchvision's ResNet with one block a stage."""
    return seeded(lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4))


class Loud(SmallNet):
    """Shows layers with values beyond float16, infinity, many maps, tables, stacks, one number."""

    def __init__(self) -> None:
        super().__init__(classes=5)
        self.loud, self.endless, self.windows = nn.Identity(), nn.Identity(), nn.Identity()
        self.table, self.number, self.many = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        self.many(x.repeat(1, 30, 1, 1))
        self.loud(features * 1e6)
        self.endless(torch.full_like(x[:, :, :2, :2], torch.inf))
        self.windows(x[:, :, :8, :8].reshape(len(x), 3, 2, 4, 8))
        self.table(features.flatten(2)[:, :, :5])
        self.number(features.sum())
        return self.head(features.mean(dim=(2, 3)))


def loud() -> nn.Module:
    return Loud()


class Counted(SmallNet):
    """Counts the images of all its forward passes, in every copy; can be made to wait.

    before: called before each pass with the number of images in it.
    """

    images = 0
    before: Callable[[int], None] | None = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        super().__init__(classes=3)

    def forward(self, x: Tensor) -> Tensor:
        if Counted.before is not None:
            Counted.before(len(x))
        with Counted._lock:
            Counted.images += len(x)
        return super().forward(x)


def counted() -> nn.Module:
    return Counted()
