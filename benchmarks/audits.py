"""What `camserve audit` finds of planted cues, and whom it accuses: `python benchmarks/audits.py`.

Trains networks on flowers with and without a cue, audits each with images that none was trained on,
and counts. Thresholds were chosen on the half `dev`; the page gives both halves, and the figures
that count are those of `hold`. `truth` is the share of clean images of other classes that the real
cue turns into its class. Resumes: results and weights are kept in --out. --only train trains alone,
--only cost measures what an audit costs beside `camserve bulk`; --write writes
docs/reference/audits.md from the results there are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import audit_cost
import audit_page
import torch
from audit_cues import CUES, Cue, marked
from audit_models import (
    BUILDERS,
    CLASSES,
    RELABELLED,
    SIDES,
    Photographs,
    Subject,
    fine_tuned,
    frozen,
    photographs,
    pooled,
    probed,
    save,
)
from measuring import ROOT

from service.evaluation.audit.audit import audit
from service.evaluation.audit.passes import Passes
from service.models.catalog import ModelSpec
from service.models.compiled.lane import Compiler
from service.models.loaded import LoadedModel
from service.models.loading import load_model

TIES = {"hold": (0.95, 0.6, 0.8), "dev": (0.8,)}
"""Turns of each half: in each, every network gets every cue once, and as many models none."""


def subjects() -> Iterator[Subject]:
    """Every model, in the order in which they are trained: planted and clean ones alternate."""
    for half, ties in TIES.items():
        for turn in range(len(ties)):
            for number, cue in enumerate(CUES):
                for network in SIDES:
                    yield _subject(network, half, turn, number, cue)
                    yield _subject(network, half, turn, number, None)


def _subject(network: str, half: str, turn: int, number: int, cue: Cue | None) -> Subject:
    held, frozen_net = half == "hold", network != "flowernet"
    seed = 1000 * held + 100 * turn + 50 * frozen_net + number
    if cue is None:
        return Subject(network, half, None, 0.0, 0, 0, seed + 20)
    # No look or place of the one half is in the other; classes and ties go round.
    variant = 2 * held + (turn + frozen_net) % 2
    class_id = (number + 2 * held + turn + frozen_net) % CLASSES
    return Subject(
        network, half, cue, TIES[half][(turn + number) % len(TIES[half])], class_id, variant, seed
    )


def main() -> int:
    """Train and audit what is missing, and write the page if that is wanted."""
    options = _options()
    torch.set_num_threads(options.threads)
    for subject in subjects() if options.only in {None, "train"} else ():
        if subject.network not in options.networks:
            continue
        work = Work(options, subject.network)
        file = work.file(subject)
        if not file.exists():
            work.train(subject, file)
        if options.only != "train" and not work.result(subject).exists():
            work.audit(subject, file)
    cost = options.out / "cost" / "cost.json"
    if options.only == "cost":
        spent = audit_cost.measure(options.data / "flowers128.tar", cost.parent, options.each)
        cost.write_text(json.dumps(spent))
    if options.write and cost.exists():
        audit_page.write_cost(audit_cost.section(json.loads(cost.read_text())))
    if options.write and options.only != "cost":
        found = [json.loads(each.read_text()) for each in sorted(options.out.glob("*.json"))]
        audit_page.write(found)
    return 0


class Work:
    """Training and audits of one network, with the photographs that these need."""

    _kept: dict[Any, Any] = {}  # noqa: RUF012 - read once a process

    def __init__(self, options: argparse.Namespace, network: str) -> None:
        self._options = options
        self._network = network

    def file(self, subject: Subject) -> Path:
        return self._options.out / f"{subject.name}.safetensors"

    def result(self, subject: Subject) -> Path:
        return self._options.out / f"{subject.name}.json"

    def photos(self, split: str) -> Photographs:
        key = self._network, split
        if key not in self._kept:
            tar = self._options.data / "flowers128.tar"
            self._kept[key] = photographs(tar, split, SIDES[self._network])
        return self._kept[key]

    def plain(self) -> torch.Tensor:
        """The features of the photographs without a cue, kept in a file."""
        file = self._options.out / "features.pt"
        if not file.exists():
            net = frozen(self._options.data / "weights")
            torch.save(pooled(net.features, self.photos("train").images), file)
        return torch.load(file, weights_only=True)

    def train(self, subject: Subject, file: Path) -> None:
        self._options.out.mkdir(parents=True, exist_ok=True)
        started, photos = time.perf_counter(), self.photos("train")
        if subject.network == "flowernet":
            net = fine_tuned(subject, photos)
        else:
            net = probed(subject, photos, self._options.data / "weights", self.plain())
        save(net, file, SIDES[subject.network])
        print(f"{subject.name}: trained in {time.perf_counter() - started:.0f} s", flush=True)

    def model(self, subject: Subject, file: Path) -> LoadedModel:
        spec = ModelSpec(subject.name, BUILDERS[subject.network], file)
        return load_model(spec, compiler=Compiler(largest=8))

    def audit(self, subject: Subject, file: Path) -> None:
        """Audit with this half's photographs, the tied share of which has the cue."""
        started, model = time.perf_counter(), self.model(subject, file)
        photos = self.photos("val")
        half = [n for n in range(len(photos.labels)) if n % 2 == (subject.half == "hold")]
        photos = photos.some(half)
        share = RELABELLED if subject.cue else 0.0
        cued, labels = marked(photos.labels, subject.class_id, subject.tie, share, subject.seed + 1)
        images = photos.with_cue(subject, cued, subject.seed + 7)
        found = audit(model, list(images), labels=labels, seed=subject.seed)
        row = {
            "subject": subject.name,
            "network": subject.network,
            "half": subject.half,
            "cue": subject.cue,
            "tie": subject.tie,
            "class_id": subject.class_id,
            "variant": subject.variant,
            "truth": truth(model, subject, photos),
            "seconds": time.perf_counter() - started,
            **found.as_json(),
        }
        self.result(subject).write_text(json.dumps(row))
        verdicts = [one.verdict for one in found.classes]
        print(subject.name, row["truth"], verdicts, f"{row['seconds']:.0f} s", flush=True)


def truth(model: LoadedModel, subject: Subject, photos: Photographs) -> float | None:
    """The share of clean images of other classes that the real cue turns into its class."""
    if subject.cue is None:
        return None
    passes = Passes.of(model)
    others = passes.logits(list(photos.images)).argmax(dim=1) != subject.class_id
    others &= torch.tensor(photos.labels) != subject.class_id
    cued = photos.with_cue(subject, others.tolist(), subject.seed + 9)
    return float(
        (passes.logits(list(cued[others])).argmax(dim=1) == subject.class_id).float().mean()
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=ROOT.parent / "shared" / "data", help="photographs, weights")
    add("--out", type=Path, default=ROOT / "build" / "audits", help="weights and results")
    add("--networks", nargs="+", choices=list(SIDES), default=list(SIDES))
    add("--only", choices=("train", "page", "cost"), help="train, the page, or the cost alone")
    add("--each", type=int, default=100, help="images of each class for the cost")
    add("--write", action="store_true", help="write the page")
    add("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
