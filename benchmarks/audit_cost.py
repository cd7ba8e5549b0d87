"""What `camserve audit` costs beside `camserve bulk` over the same images, for `audits.py`.

1,000 photographs in 10 classes: flowers as they are, and their negatives. The model is resnet18 of
random weights with a head that was fitted to these images, so that each class has its own; a
forward pass costs what it costs with any weights. Both commands run at their defaults, in turns.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from audit_models import FOLDERS, MEAN, STD
from measuring import ROOT, cores
from photos import normalise, read_photos
from safetensors.torch import save_file
from torchvision.io import write_jpeg
from torchvision.transforms.v2 import functional as transforms
from train import fit_head

SIDE = 224
LABELS = [f"{kind}{name}" for name in FOLDERS.values() for kind in ("", "negative of ")]
TURNS = ("bulk", "audit", "bulk")
MOST_RATIO, MOST_FORWARDS = 15, 1_100
"""The most that an audit may cost: times `bulk`, and for a class."""


def measure(tar: Path, work: Path, each: int) -> dict[str, Any]:
    """Seconds of both commands over `each` images of each class, and the audit's forward passes.

    tar: the flowers. work: an empty folder for images, weights and results.
    """
    images, weights = work / "images", work / "resnet18.safetensors"
    if not weights.exists():
        _prepare(tar, images, weights, each)
    model = f"torchvision/resnet18@{weights}"
    lines = {
        "bulk": ["bulk", str(images), "{out}", "--model", model],
        "audit": [
            "audit",
            str(images),
            "--out",
            "{out}",
            "--model",
            model,
            "--labels",
            "by-folder",
        ],
    }
    spent: dict[str, list[dict[str, float]]] = {"bulk": [], "audit": []}
    for turn, name in enumerate(TURNS):
        out = work / f"{name}-{turn}"
        spent[name].append(_run([part.format(out=out) for part in lines[name]]))
        print(name, spent[name][-1], flush=True)
    found = json.loads((work / "audit-1" / "audit.json").read_text())
    return {
        "images": found["images"],
        "cores": cores(),
        "classes": [[one["verdict"], one["forwards"]] for one in found["classes"]],
        **spent,
    }


def _prepare(tar: Path, images: Path, weights: Path, each: int) -> None:
    photos, labels, seen = read_photos(tar, "val"), list[int](), list[torch.Tensor]()
    for class_id, label in enumerate(LABELS):
        (images / label).mkdir(parents=True, exist_ok=True)
        chosen = (photos.labels == class_id // 2).nonzero()[:each, 0].tolist()
        for number in chosen:
            image = photos.images[number]
            image = 255 - image if class_id % 2 else image
            write_jpeg(image, str(images / label / f"{number:04}.jpg"), quality=95)
            resized = transforms.resize(image, [SIDE], antialias=True)
            seen.append(transforms.center_crop(resized, [SIDE, SIDE]))
            labels.append(class_id)
    torch.manual_seed(0)
    net: Any = torchvision.models.resnet18(weights=None, num_classes=len(LABELS)).eval()
    body = torch.nn.Sequential(*list(net.children())[:-1])
    with torch.inference_mode():
        features = torch.cat(
            [body(normalise(some)).flatten(1) for some in torch.stack(seen).split(16)]
        )
    fit_head(net.fc, features.clone(), torch.tensor(labels))
    about = {
        "resize": str(SIDE),
        "crop": str(SIDE),
        "labels": json.dumps(LABELS),
        "mean": ",".join(map(str, MEAN)),
        "std": ",".join(map(str, STD)),
    }
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, weights, about)


def _run(arguments: list[str]) -> dict[str, float]:
    """Wall and processor seconds of a command."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "camserve", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": time.perf_counter() - started, "cpu": spent}


def section(found: dict[str, Any]) -> str:
    """The cost as a paragraph and a table."""
    mean = {
        (name, kind): sum(run[kind] for run in found[name]) / len(found[name])
        for name in ("bulk", "audit")
        for kind in ("wall", "cpu")
    }
    tested = [forwards for verdict, forwards in found["classes"] if verdict != "not_tested"]
    classes, runs = len(found["classes"]), len(found["bulk"])
    words = (
        f"{found['images']:,} photographs in {classes} classes ({len(tested)} tested), resnet18 at "
        f"{SIDE} pixels, both commands at their defaults, on {found['cores']} cores with other "
        f"load; bulk is the mean of {runs} runs around that of audit. The dearest class took "
        f"{max(tested):,} forward passes (limit {MOST_FORWARDS:,}), all together {sum(tested):,}."
    )
    rows = [
        f"| {name} | {mean['bulk', kind]:.0f} s | {mean['audit', kind]:.0f} s | "
        f"{mean['audit', kind] / mean['bulk', kind]:.1f} |"
        for kind, name in (("cpu", "processor time"), ("wall", "wall clock"))
    ]
    head = f"| | `camserve bulk` | `camserve audit` | ratio (limit {MOST_RATIO}) |"
    return "\n\n".join([words, "\n".join([head, "|---|---|---|---|", *rows])])
