"""Train heads that find flowers in scenes: `python tools/flower_scenes/train_heads.py`.

The backbone is frozen, so that its features are computed once for each scene; a head learns from
these. The photographs of the scenes are those of `train`; what is printed is measured on scenes of
`val`. Writes a safetensors file for each network beside this file, the head alone in float16.
About 15 minutes of one core.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flower_networks
import torch
from flower_networks import HERE, SIDE
from safetensors.torch import save_file
from scenes import ROOT, Scene, scenes, validation
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

sys.path.append(str(ROOT / "tools" / "builtin_model"))
from photos import MEAN, STD, normalise, read_photos

NETWORKS = ("faster_rcnn", "retinanet", "lraspp")
BATCH = 4
Features = dict[str, Tensor]


@torch.inference_mode()
def features_of(body: nn.Module, drawn: list[Scene]) -> list[Features]:
    """What the frozen backbone gives for each scene, in float16."""
    return [
        {key: value[0].half() for key, value in body(normalise(scene.pixels[None])).items()}
        for scene in drawn
    ]


def batches(
    drawn: list[Scene], features: list[Features], steps: int, seed: int
) -> Iterator[tuple[Features, list[Scene]]]:
    """Batches of features and their scenes."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(drawn), (BATCH,), generator=generator).tolist()
        stacked = {
            key: torch.stack([features[i][key] for i in chosen]).float() for key in features[0]
        }
        yield stacked, [drawn[i] for i in chosen]


def detector_loss(net: Any, seen: Features, drawn: list[Scene]) -> Tensor:
    """Sum of torchvision's own losses, from the features on."""
    images = ImageList(torch.empty(len(drawn), 3, SIDE, SIDE), [(SIDE, SIDE)] * len(drawn))
    targets = [{"boxes": scene.boxes, "labels": scene.labels + 1} for scene in drawn]
    pyramid = net.backbone.fpn(seen)
    if hasattr(net, "roi_heads"):
        proposals, losses = net.rpn(images, pyramid, targets)
        _, more = net.roi_heads(pyramid, proposals, images.image_sizes, targets)
        return torch.stack([*losses.values(), *more.values()]).sum()
    levels = list(pyramid.values())
    losses = net.compute_loss(targets, net.head(levels), net.anchor_generator(images, levels))
    return torch.stack([*losses.values()]).sum()


def segmenter_loss(net: Any, seen: Features, drawn: list[Scene]) -> Tensor:
    """Mean cross entropy over the pixels of the head's grid."""
    logits = functional.interpolate(net.classifier(seen), size=(SIDE // 4,) * 2, mode="bilinear")
    truth = torch.stack([scene.classes() for scene in drawn])[:, 2::4, 2::4]
    return functional.cross_entropy(logits, truth)


def fit(
    net: nn.Module,
    loss_of: Callable[[Any, Features, list[Scene]], Tensor],
    drawn: list[Scene],
    features: list[Features],
    options: argparse.Namespace,
) -> None:
    """Train all but the frozen backbone, with one cycle of the learning rate."""
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    names = flower_networks.head_of(net)
    trained = [p for name, p in net.named_parameters() if name in names]
    for parameter in trained:
        parameter.requires_grad_(True)
    solver = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-4)
    cycle = torch.optim.lr_scheduler.OneCycleLR(solver, 2e-3, total_steps=options.steps)
    net.train()
    mean, begun = 2.0, time.process_time()
    for step, (seen, some) in enumerate(batches(drawn, features, options.steps, options.seed)):
        loss = loss_of(net, seen, some)
        solver.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 5.0)
        solver.step()
        cycle.step()
        mean += (loss.item() - mean) / 50
        if step % 100 == 0:
            print(f"step {step}, loss {mean:.3f}, {time.process_time() - begun:.0f} s", flush=True)
    net.eval()


@torch.inference_mode()
def report_detector(net: nn.Module, held: list[Scene]) -> str:
    """Recall and precision at a score of .5 and an IoU of .5."""
    right = said = there = 0
    for scene in held:
        (answer,) = net([scene.pixels / 255])
        kept = answer["scores"] > 0.5
        boxes, labels = answer["boxes"][kept], answer["labels"][kept] - 1
        matched = (box_iou(boxes, scene.boxes) > 0.5) & (labels[:, None] == scene.labels)
        right += int(matched.any(dim=0).sum())
        said, there = said + len(boxes), there + len(scene.boxes)
    return f"recall {right / there:.2f}, precision {right / max(said, 1):.2f}, {there} objects"


@torch.inference_mode()
def report_segmenter(net: nn.Module, held: list[Scene]) -> str:
    """Mean over the classes of the intersection over the union of all scenes."""
    classes = len(flower_networks.LABELS)
    counts = torch.zeros(classes, classes)
    for scene in held:
        named = net(normalise(scene.pixels[None]))["out"][0].argmax(dim=0)
        counts += torch.bincount(
            (scene.classes() * classes + named).flatten(), minlength=classes**2
        ).reshape(classes, classes)
    both = counts.diagonal()
    return f"mean IoU {(both / (counts.sum(0) + counts.sum(1) - both)).mean():.2f}"


def save(net: nn.Module, file: Path) -> None:
    """Write the head in float16, with what a reader must know."""
    metadata = {
        "labels": ",".join(flower_networks.LABELS),
        "mean": ",".join(map(str, MEAN)),
        "std": ",".join(map(str, STD)),
        "source": "trained by tools/flower_scenes on TensorFlow flower_photos (CC BY 2.0)",
        "backbone": "features of mobilenet_v2.fp16.safetensors, frozen",
    }
    state = {
        key: value.half().contiguous() if value.is_floating_point() else value
        for key, value in flower_networks.head_of(net).items()
    }
    save_file(state, file, metadata)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = ROOT.parent / "shared" / "data"
    add = parser.add_argument
    add("--data", type=Path, default=data / "flowers128.tar", help="tar of train/ and val/")
    add("--out", type=Path, default=HERE, help="folder of the weights")
    add("--only", nargs="+", choices=NETWORKS, default=NETWORKS)
    add("--scenes", type=int, default=1200, help="scenes to train on")
    add("--steps", type=int, default=2400, help="batches of a training")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Train, write and report each network."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    drawn = list(scenes(read_photos(options.data, "train"), options.scenes, options.seed))
    held = validation(options.data, 60)
    print(f"{len(drawn)} scenes drawn", flush=True)
    kept: dict[tuple[str, ...], list[Features]] = {}
    for name in options.only:
        net = flower_networks.with_backbone(getattr(flower_networks, f"new_{name}")())
        body = net.backbone if name == "lraspp" else net.backbone.body
        net.eval()
        key = tuple(sorted(body.return_layers))
        kept = {key: kept.get(key) or features_of(body, drawn)}
        print(f"{name}: features computed", flush=True)
        fit(net, segmenter_loss if name == "lraspp" else detector_loss, drawn, kept[key], options)
        save(net, options.out / f"{name}.safetensors")
        report = report_segmenter if name == "lraspp" else report_detector
        read = flower_networks.trained(
            getattr(flower_networks, f"new_{name}"), options.out / f"{name}.safetensors"
        )
        print(f"{name}: {report(read, held)}", flush=True)


if __name__ == "__main__":
    main()
