"""What a pretrained network sees in the images: features, and from them probabilities."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torchvision
from photos import FOLDERS, cut, normalise
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

TEACHER_SIDE, TEACHER_WIDTH = 160, 1280
MAP_WIDTH = 96
"""Principal components of the teacher's features that the network learns to predict."""
HEAD_DECAY = 0.02


@dataclass(frozen=True)
class Seen:
    """What the teacher saw in N x K crops, before anything is known of the classes."""

    boxes: Tensor  # N, K, 4: top, left, height, width in pixels
    pooled: Tensor  # N, K, TEACHER_WIDTH
    maps: Tensor  # N, K, MAP_WIDTH, h, w

    def __getitem__(self, chosen: Tensor) -> Self:
        """Return what was seen in the chosen images."""
        return type(self)(self.boxes[chosen], self.pooled[chosen], self.maps[chosen])


def load_teacher(file: Path) -> nn.Module:
    """Load the convolutions of a mobilenet_v2 and fold its (trivial) batch normalisation in."""
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict({k: v.float() for k, v in load_file(file).items()}, strict=True)
    model.eval().requires_grad_(False)
    for part in model.modules():
        if isinstance(part, nn.Sequential):
            for i, (conv, norm) in enumerate(itertools.pairwise(part)):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    part[i] = nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
                    part[i + 1] = nn.Identity()
    features: nn.Module = model.features
    return features.to(memory_format=torch.channels_last)


@torch.inference_mode()
def show_teacher(teacher: nn.Module, images: list[Tensor], boxes: Tensor) -> Seen:
    """Run the teacher on every crop; its maps keep MAP_WIDTH principal components, scaled to 1."""
    pooled, maps = [], []
    basis, offset = torch.empty(0), torch.empty(0)
    for k in range(boxes.shape[1]):
        grids = torch.cat(
            [
                teacher(normalise(cut(images[i : i + 32], boxes[i : i + 32, k], TEACHER_SIDE)))
                for i in range(0, len(images), 32)
            ]
        )
        if not k:
            places = grids.permute(0, 2, 3, 1).flatten(0, 2)
            offset = places.mean(0)
            _, _, basis = torch.pca_lowrank(places - offset, MAP_WIDTH, center=False, niter=4)
            basis /= ((places - offset) @ basis).square().mean().sqrt()
        pooled.append(grids.mean((2, 3)).half())
        grids = torch.einsum("nchw,cd->ndhw", grids - offset.view(-1, 1, 1), basis)
        maps.append(grids.half())
    return Seen(boxes, torch.stack(pooled, 1), torch.stack(maps, 1))


def fit_head(features: Tensor, labels: Tensor) -> nn.Linear:
    """Fit a multinomial logistic regression with L2 regularisation, by L-BFGS."""
    head = nn.Linear(features.shape[1], len(FOLDERS))
    nn.init.zeros_(head.weight)
    solver = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = functional.cross_entropy(head(features), labels)
        value = value + HEAD_DECAY / 2 * head.weight.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return head.requires_grad_(False)
