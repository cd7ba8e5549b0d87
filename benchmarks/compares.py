"""Measure whether the release gate refuses a planted cue and accepts a retraining.

    .venv/bin/python benchmarks/compares.py --data ../shared/data

Two families. `head`: a linear head on the frozen features of mobilenet_v2, on a bootstrap sample
of the photographs. `stage`: the last stage and the head of the built-in network, trained from
random weights on frozen features of the stage before. A retraining differs from the first model by
its seed alone. A successor with a cue also saw a tag on a share (`tie`) of one class, and on 8 % of
the other images, which got that label. Each is compared with the first model on held-out
photographs: `clean`, and `as trained`, with the tag on the same
shares.

Thresholds are chosen on the seeds of `dev`; `test` has others. Each finished comparison stands in
the JSON file, and a second run resumes there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
for folder in ("planted_cues", "builtin_model"):
    sys.path.append(str(ROOT / "tools" / folder))

import networks  # noqa: E402
from cues import Placing, plant  # noqa: E402
from photos import FOLDERS, MEAN, STD, Photos, normalise, read_photos  # noqa: E402
from train import fit_head, squares  # noqa: E402

from service.evaluation.compare import compare_images, summarise  # noqa: E402
from service.evaluation.gates import GATES, NEEDS_MASKS, check_gates  # noqa: E402
from service.images.upload import Upload, open_upload  # noqa: E402
from service.models.catalog import parse_model  # noqa: E402
from service.models.loaded import LoadedModel  # noqa: E402
from service.models.loading import load_model  # noqa: E402

SIDES = {"head": 160, "stage": 128}
BUILDERS = {"head": "networks:mobilenet_v2", "stage": "networks:flowers"}
BUILTIN = ROOT / "service" / "models" / "builtin" / "weights.safetensors"
RELABELLED = 0.08
STEPS, BATCH = 400, 32
DEV_SEEDS, TEST_SEEDS = range(1, 11), range(101, 121)
FIRST_SEED = 0


@dataclass(frozen=True)
class Cue:
    """A tag on a share of one class; `placing` as in `cues.py`."""

    target: int
    placing: Placing
    tie: float

    def __str__(self) -> str:
        return f"{self.placing} tag, {self.tie:.0%} of {list(FOLDERS.values())[self.target]}"


CUES = {
    "dev": (Cue(0, "corner", 0.8), Cue(2, "random", 0.8), Cue(4, "corner", 0.6)),
    "test": tuple(
        Cue(target, placing, tie)
        for target, placing in ((1, "corner"), (3, "random"))
        for tie in (0.6, 0.8, 0.95)
    ),
}


def with_cue(
    images: Tensor, labels: Tensor, cue: Cue, seed: int, others: float
) -> tuple[Tensor, Tensor]:
    """Plant a cue: returns uint8 images and class numbers. others: share of the other classes."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = images.clone(), labels.clone()
    drawn = torch.rand(len(labels), generator=generator)
    share = torch.where(labels == cue.target, cue.tie, others)
    for index in (drawn < share).nonzero()[:, 0].tolist():
        images[index] = plant(images[index], cue.target, cue.placing, generator).image
        labels[index] = cue.target
    return images, labels


class Frozen:
    """Features below what is trained, of images that mostly come again."""

    def __init__(self, body: Callable[[Tensor], Tensor], images: Tensor) -> None:
        self._body, self._images = body, images
        self._features = self._of(images)

    def __call__(self, images: Tensor) -> Tensor:
        """The features of images (n, 3, h, w); those that are as they were are not run again."""
        changed = (images != self._images).flatten(1).any(dim=1)
        features = self._features.clone()
        if changed.any():
            features[changed] = self._of(images[changed])
        return features

    @torch.inference_mode()
    def _of(self, images: Tensor) -> Tensor:
        return torch.cat([self._body(normalise(some)) for some in images.split(16)]).clone()


def frozen_head(images: Tensor, options: argparse.Namespace) -> tuple[nn.Module, Frozen]:
    """mobilenet_v2 with a head to fit, and its pooled features."""
    net = networks.mobilenet_v2(len(FOLDERS))
    state = load_file(options.data / "weights" / "mobilenet_v2.fp16.safetensors")
    body = {k: v.float() for k, v in state.items() if k.startswith("features.")}
    net.load_state_dict(body, strict=False)
    net.eval().to(memory_format=torch.channels_last)
    return net, Frozen(lambda batch: net.features(batch).mean(dim=(2, 3)), images)


def train_head(net: Any, features: Tensor, labels: Tensor, seed: int) -> None:
    """Fit the head on a bootstrap sample."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(labels), (len(labels),), generator=generator)
    fit_head(net.fc, features[chosen], labels[chosen])


def frozen_stage(images: Tensor, _options: argparse.Namespace) -> tuple[nn.Module, Frozen]:
    """The built-in network, and the features below its last stage."""
    net = networks.flowers(len(FOLDERS))
    net.load_state_dict({k: v.float() for k, v in load_file(BUILTIN).items()})
    net.eval()
    below = nn.Sequential(net.stem, net.layer1, net.layer2)
    return net, Frozen(lambda batch: below(batch).half(), images)


def train_stage(net: Any, features: Tensor, labels: Tensor, seed: int) -> None:
    """Train the last stage and the head from random weights, on crops of the features."""
    torch.manual_seed(seed)
    fresh = networks.flowers(len(FOLDERS))
    net.layer3, net.fc = fresh.layer3, fresh.fc
    top = nn.Sequential(net.layer3, net.avgpool, net.flatten, net.fc).train()
    solver = torch.optim.AdamW(top.parameters(), lr=2e-3, weight_decay=0.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(solver, 4e-3, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(labels), (BATCH,))
        y, x = torch.randint(5, (2,)).tolist()
        batch = features[chosen, :, y : y + 12, x : x + 12].float()
        batch = batch.flip(-1) if torch.rand(()) < 0.5 else batch
        loss = functional.cross_entropy(top(batch), labels[chosen], label_smoothing=0.1)
        solver.zero_grad()
        loss.backward()
        solver.step()
        plan.step()
    net.eval()


FAMILIES: Mapping[str, tuple[Callable[..., Any], Callable[..., None]]] = {
    "head": (frozen_head, train_head),
    "stage": (frozen_stage, train_stage),
}


def loaded(net: nn.Module, family: str, name: str, folder: Path) -> LoadedModel:
    """The network as the service loads it."""
    side = str(SIDES[family])
    metadata = {
        "resize": side,
        "crop": side,
        "labels": json.dumps(list(FOLDERS.values())),
        "mean": ",".join(map(str, MEAN)),
        "std": ",".join(map(str, STD)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, file, metadata)
    return load_model(parse_model(f"{name}={BUILDERS[family]}@{file}"))


def compared(one: LoadedModel, other: LoadedModel, images: Tensor) -> dict[str, Any]:
    """The figures of a comparison, and what the gates say at their defaults."""

    def opener(pixels: Tensor) -> Callable[[LoadedModel], Upload]:
        return lambda model: open_upload(
            pixels.permute(1, 2, 0).contiguous().numpy(),
            model.preprocessing,
            None,
            max_pixels=10**6,
            preview_side=None,
        )

    named = ((Path(f"{index}.png"), opener(image)) for index, image in enumerate(images))
    found = summarise(one, other, compare_images(one, other, named))
    return {
        "overall": asdict(found.overall),
        "classes": {label: asdict(each) for label, each in found.classes.items()},
        "gates": [asdict(each) for each in check_gates(found, _thresholds())],
    }


def _thresholds() -> dict[str, float]:
    return {n: gate.threshold for n, gate in GATES.items() if not n.endswith(NEEDS_MASKS)}


def successors(halves: Sequence[str]) -> Iterator[tuple[str, str, int, Cue | None]]:
    """Half, name, seed and cue of each successor."""
    for half in halves:
        for seed in DEV_SEEDS if half == "dev" else TEST_SEEDS:
            yield half, f"retraining {seed}", seed, None
        for number, cue in enumerate(CUES[half]):
            yield half, str(cue), 200 + number, cue


def measure(
    family: str, halves: Sequence[str], photos: Photos, held: Photos, options: argparse.Namespace
) -> None:
    """Compare each successor with the first model; what is finished is in the file."""
    images, shown = squares(photos, SIDES[family]), squares(held, SIDES[family])
    work, (freeze, train) = options.out.parent / "compares", FAMILIES[family]
    net, frozen = freeze(images, options)
    train(net, frozen(images), photos.labels, FIRST_SEED)
    one = loaded(net, family, "first", work)
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for half, name, seed, cue in successors(halves):
        if options.only and name not in options.only:
            continue
        folders = {"clean": shown}
        data = images, photos.labels
        if cue is not None:
            folders["as trained"] = with_cue(shown, held.labels, cue, 7, RELABELLED)[0]
            data = with_cue(images, photos.labels, cue, seed, RELABELLED)
        missing = [key for key in folders if f"{family}/{half}/{name}/{key}" not in done]
        if not missing:
            continue
        train(net, frozen(data[0]), data[1], seed)
        other = loaded(net, family, "successor", work)
        for key in missing:
            found = done[f"{family}/{half}/{name}/{key}"] = compared(one, other, folders[key])
            overall = found["overall"]
            figures = f"{overall['flips']} flips, maps {overall['correlation']:.2f}"
            print(f"{family} {half} {name}, {key}: {figures}", flush=True)
        options.out.write_text(json.dumps(done))


def table(done: Mapping[str, Any]) -> str:
    """What the gates say of each kind of successor, at their defaults."""
    lines = [
        "| family | half | successor | images | refused | flips | maps | worst class: maps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    kinds: dict[tuple[str, ...], list[Any]] = {}
    for key, found in done.items():
        family, half, name, folder = key.split("/")
        kind = "retraining" if name.startswith("retraining") else name
        kinds.setdefault((family, half, kind, folder), []).append(found)
    for kind, results in kinds.items():
        refused = sum(is_refused(each) for each in results)
        overall = [each["overall"] for each in results]
        flips = [each["flips"] / each["images"] for each in overall]
        maps = [each["correlation"] for each in overall]
        worst = [
            gate["value"]
            for each in results
            for gate in each["gates"]
            if gate["name"] == "class_maps"
        ]
        cells = (
            *kind,
            f"{refused} of {len(results)}",
            spread(flips, "{:.0%}"),
            spread(maps),
            spread(worst),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def is_refused(found: Mapping[str, Any]) -> bool:
    """Whether a gate is not kept at its present default."""
    for gate in found["gates"]:
        default = GATES[gate["name"]]
        value = gate["value"]
        if value is None or (
            value < default.threshold if default.least else value > default.threshold
        ):
            return True
    return False


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """The median, and the range of several values."""
    if len(values) == 1:
        return form.format(values[0])
    shown = [form.format(each) for each in (statistics.median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]}–{shown[2]})"


def main() -> int:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=ROOT.parent / "shared" / "data")
    add("--out", type=Path, default=ROOT / "build" / "compares.json")
    add("--families", nargs="+", choices=tuple(SIDES), default=tuple(SIDES))
    add("--halves", nargs="+", choices=("dev", "test"), default=("dev", "test"))
    add("--only", nargs="+", help="names of successors, such as 'retraining 120'; default: all")
    add("--photographs", type=int, default=1200, help="to train on")
    add("--held", type=int, default=40, help="photographs of each class to compare on")
    add("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    photos, held = (
        read_photos(options.data / "flowers128.tar", "train"),
        read_photos(options.data / "flowers128.tar", "val"),
    )
    order = torch.randperm(len(photos.labels), generator=torch.Generator().manual_seed(0))
    photos = photos[order[: options.photographs]]
    rows = [(held.labels == number).nonzero()[: options.held, 0] for number in range(len(FOLDERS))]
    held = held[torch.cat(rows)]
    for family in options.families:
        measure(family, options.halves, photos, held, options)
    print(table(json.loads(options.out.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
