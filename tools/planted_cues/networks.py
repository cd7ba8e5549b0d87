"""The networks that `train.py` writes weights for, as builders of the service."""

import timm
import torchvision.models
from torch import Tensor, nn

from service.models.builtin.network import FlowerNet

SIDE = 112
"""Side of the transformer's input."""
LARGE = 224
"""That of the transformers whose maps are drawn on mosaics."""


def flowers(num_classes: int) -> nn.Module:
    """Return the built-in network."""
    return FlowerNet(num_classes)


def squeezenet1_1(num_classes: int) -> nn.Module:
    """Return SqueezeNet 1.1 with a linear head on its pooled features."""
    return Probe(torchvision.models.squeezenet1_1().features, 512, num_classes)


def mobilenet_v2(num_classes: int) -> nn.Module:
    """Return MobileNet v2 with a linear head on its pooled features."""
    return Probe(torchvision.models.mobilenet_v2().features, 1280, num_classes)


def dinov2(num_classes: int) -> nn.Module:
    """Return the transformer of DINOv2-S with a linear head on its mean patch."""
    return _dinov2(num_classes, SIDE, "avg")


def dinov2_mean(num_classes: int) -> nn.Module:
    """Return the same for larger images."""
    return _dinov2(num_classes, LARGE, "avg")


def dinov2_token(num_classes: int) -> nn.Module:
    """Return the transformer of DINOv2-S with a linear head on its class token."""
    return _dinov2(num_classes, LARGE, "token")


def _dinov2(num_classes: int, side: int, pool: str) -> nn.Module:
    net: nn.Module = timm.create_model(
        "vit_small_patch14_dinov2",
        img_size=side,
        num_classes=num_classes,
        global_pool=pool,
        fc_norm=False,
    )
    return net


class Probe(nn.Module):
    """Images (N, 3, H, W) to logits (N, classes), linear in the mean of `features`."""

    def __init__(self, features: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.fc(self.flatten(self.avgpool(self.features(x))))
        return logits
