"""Train the built-in model from scratch: `python tools/builtin_model/train.py --data TAR`.

TAR holds `<root>/train/<class>/*.jpg` and `<root>/val/<class>/*.jpg`. With `--teacher FILE` (a
torchvision mobilenet_v2 whose batch normalisation is folded) every image's crops carry two
targets beside the label: the class probabilities of a linear head fitted on the teacher's pooled
features, and the teacher's features at every place, which is what makes the maps sit on the flower.
`--tune 0.15` holds that part of `train/` out, reports on it and leaves `val/` unread.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from photos import (
    CROP,
    FOLDERS,
    MEAN,
    RESIZE,
    STD,
    Photos,
    centre,
    colour,
    cut,
    draw_boxes,
    hold_out,
    normalise,
    read_photos,
)
from safetensors.torch import load_file, save_file
from teacher import MAP_WIDTH, Seen, fit_head, load_teacher, show_teacher
from torch import Tensor, nn
from torch.nn import functional

from service.models.builtin.network import FlowerNet

TARGET_LAYER = "layer3"
BATCH = 32
SMALL, LARGE, SMALL_SHARE = 96, 128, 0.6
"""Crop sides; the small ones serve that share of the time. On why 160 is best afterwards see
Touvron et al. 2019, arXiv:1906.06423."""
LABEL_SHARE = 0.3
"""Share of the label in a target; the rest is the teacher's probabilities."""


@dataclass(frozen=True)
class Views:
    """Crops of N images, K of each, and what the network should say about them."""

    boxes: Tensor  # N, K, 4: top, left, height, width in pixels
    targets: Tensor  # N, K, classes: probabilities
    maps: Tensor | None  # N, K, MAP_WIDTH, h, w: the teacher's features


def plain_views(photos: Photos, boxes: Tensor) -> Views:
    """Aim at the labels alone, smoothed."""
    labels = functional.one_hot(photos.labels, len(FOLDERS)).float()
    targets = labels * 0.9 + 0.1 / len(FOLDERS)
    return Views(boxes, targets[:, None].expand(-1, boxes.shape[1], -1), None)


def taught_views(photos: Photos, seen: Seen) -> Views:
    """Aim at the labels mixed with what a head on the teacher's features says, and at its maps."""
    labels = photos.labels[:, None].expand(-1, seen.boxes.shape[1])
    features = seen.pooled.float()
    opinion = fit_head(features.flatten(0, 1), labels.flatten())(features).softmax(-1)
    truth = functional.one_hot(labels, len(FOLDERS)).float()
    return Views(seen.boxes, torch.lerp(opinion, truth, LABEL_SHARE), seen.maps)


def spread(cells: int, grid: int) -> Tensor:
    """Weigh the teacher's row of cells for the centres of our grid: grid x cells.

    The teacher halves with 3x3 stride 2, so its cell i is centred on pixel i * stride of its input.
    """
    at = ((torch.arange(grid) + 0.5) / grid * cells - 0.5 / 32).clamp(0, cells - 1)
    return (1 - (at[:, None] - torch.arange(cells)).abs()).clamp_min(0)


@dataclass
class Batch:
    """Images ready for the network, and their targets."""

    images: Tensor
    targets: Tensor
    maps: Tensor | None


def make_batch(photos: Photos, views: Views, chosen: Tensor, side: int) -> Batch:
    """Take a random view of each image; mirror half of them, mix a fifth of the batches."""
    view = torch.randint(views.boxes.shape[1], (len(chosen),))
    images = colour(cut(photos[chosen].images, views.boxes[chosen, view], side))
    targets, maps, grid = views.targets[chosen, view], None, side // 16
    if views.maps is not None:
        weights = spread(views.maps.shape[-1], grid)
        maps = weights @ views.maps[chosen, view].float() @ weights.T
    mirrored = torch.rand(len(chosen)) < 0.5
    order = torch.randperm(len(chosen))
    h, w = torch.randint(grid // 4, 3 * grid // 4 + 1, (2,)).tolist()
    y, x = int(torch.randint(grid - h + 1, ())), int(torch.randint(grid - w + 1, ()))
    mixed = bool(torch.rand(()) < 0.2)
    for tensor, cell in ((images, 16), (maps, 1)):
        if tensor is None:
            continue
        tensor[mirrored] = tensor[mirrored].flip(-1)
        if mixed:  # CutMix (arXiv:1905.04899) on whole cells, so that the maps can be mixed alike
            place = (..., slice(y * cell, (y + h) * cell), slice(x * cell, (x + w) * cell))
            tensor[place] = tensor[place][order]
    if mixed:
        targets = torch.lerp(targets, targets[order], h * w / grid**2)
    return Batch(normalise(images), targets, maps)


def make_solver(parameters: list[nn.Parameter], rate: float) -> torch.optim.AdamW:
    """Build the optimizer; only matrices decay."""
    matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05}
    vectors = {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=rate)


def train(
    net: nn.Module, photos: Photos, views: Views, options: argparse.Namespace
) -> Iterator[nn.Module]:
    """Train by AdamW for the minutes given; yield the weights' moving average each epoch.

    Warm-up, cosine and crop side follow the clock, so that a slow machine ends with a trained
    model too.
    """
    average = copy.deepcopy(net).eval()
    *layers, pool, flatten, linear = net.children()
    body, head = nn.Sequential(*layers), nn.Sequential(pool, flatten, linear)
    adapter = nn.LazyConv2d(MAP_WIDTH, 1)
    adapter(body(torch.zeros(1, 3, SMALL, SMALL)))  # makes its weights
    solver = make_solver([*net.parameters(), *adapter.parameters()], options.rate)
    began, steps, epoch, passed = time.monotonic(), 0, 0, 0.0
    while passed < 1:
        losses = []
        side = SMALL if passed < SMALL_SHARE else LARGE
        for chosen in torch.randperm(len(photos.labels)).split(BATCH)[:-1]:
            batch = make_batch(photos, views, chosen, side)
            features = body(batch.images)
            parts = [functional.cross_entropy(head(features), batch.targets)]
            if batch.maps is not None:
                parts.append(
                    options.map_weight * functional.mse_loss(adapter(features), batch.maps)
                )
            solver.zero_grad()
            torch.stack(parts).sum().backward()
            passed = min(1.0, (time.monotonic() - began) / (60 * options.minutes))
            for group in solver.param_groups:
                cosine = (1 + math.cos(math.pi * passed)) / 2
                group["lr"] = options.rate * cosine * min(1, passed / 0.04)
            solver.step()
            steps += 1
            follow(average, net, max(0.003, 1 / steps))
            losses.append([part.item() for part in parts])
        epoch += 1
        mean = [sum(column) / len(losses) for column in zip(*losses, strict=True)]
        shown = ", ".join(f"{part:.3f}" for part in mean)
        print(f"epoch {epoch}, {passed:.0%} of the time: loss {shown}", flush=True)
        yield average


@torch.no_grad()
def follow(average: nn.Module, net: nn.Module, share: float) -> None:
    """Move the average a little towards the network, running statistics included."""
    for old, new in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
        old.lerp_(new, share) if old.is_floating_point() else old.copy_(new)


@torch.inference_mode()
def confusion(net: nn.Module, photos: Photos) -> Tensor:
    """Count the images by true class (row) and predicted class (column)."""
    counts = torch.zeros(len(FOLDERS), len(FOLDERS), dtype=torch.long)
    for image, label in zip(photos.images, photos.labels.tolist(), strict=True):
        counts[label, net(normalise(centre(image)[None])).argmax()] += 1
    return counts


def report(counts: Tensor) -> None:
    """Print the accuracy, overall and of each class."""
    right, all_ = counts.diagonal(), counts.sum(1)
    print(f"accuracy {right.sum() / all_.sum():.4f} ({right.sum()} of {all_.sum()})")
    for number, label in enumerate(FOLDERS.values()):
        share = right[number] / all_[number]
        print(f"{label:>10} {share:.3f} of {all_[number]}, named {counts[number].tolist()}")


def save(net: nn.Module, file: Path) -> None:
    """Write the weights, matrices in half precision, with all that a server must know."""
    numbers = {"resize": str(RESIZE), "crop": str(CROP), "target_layer": TARGET_LAYER}
    metadata = numbers | {
        "labels": json.dumps(list(FOLDERS.values())),
        "mean": ",".join(map(str, MEAN)),
        "std": ",".join(map(str, STD)),
        "licence": "Apache-2.0",
        "source": "trained by tools/builtin_model/train.py on TensorFlow flower_photos (CC BY 2.0)",
    }
    tensors = {k: v.half() if v.ndim > 1 else v for k, v in net.state_dict().items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, metadata)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="tar of train/ and val/")
    parser.add_argument("--teacher", type=Path, help="mobilenet_v2 weights to learn from")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("weights.safetensors"))
    parser.add_argument("--seen", type=Path, help="keep what the teacher saw here, or read it")
    parser.add_argument("--tune", type=float, default=0.0, help="share of train/ to hold out")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time")
    parser.add_argument("--views", type=int, default=12, help="crops of each image")
    parser.add_argument("--rate", type=float, default=0.002, help="peak learning rate")
    parser.add_argument("--map-weight", type=float, default=1.0, help="weight of the feature loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Train, report and write the weights."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    photos = read_photos(options.data, "train")
    boxes, seen = draw_boxes(photos.images, options.views), None
    if options.seen and options.seen.exists():
        seen = Seen(**torch.load(options.seen))
    elif options.teacher:
        print(f"the teacher looks at {boxes[..., 0].numel()} crops", flush=True)
        seen = show_teacher(load_teacher(options.teacher), photos.images, boxes)
        if options.seen:
            torch.save(vars(seen), options.seen)
    kept, held = hold_out(photos.labels, options.tune)
    photos, held_photos = photos[kept], photos[held]
    views = taught_views(photos, seen[kept]) if seen else plain_views(photos, boxes[kept])
    net = FlowerNet(len(FOLDERS)).to(memory_format=torch.channels_last)
    if options.start:
        net.load_state_dict(load_file(options.start))
    for average in train(net, photos, views, options):
        save(average, options.out)
    report(confusion(average, held_photos if options.tune else read_photos(options.data, "val")))


if __name__ == "__main__":
    main()
