"""Do the maps of a transformer show where the evidence is? Every method that runs, with intervals.

    PYTHONPATH=. .venv/bin/python tools/planted_cues/train.py --dinov2 vit_s_focus.onnx
    PYTHONPATH=. .venv/bin/python benchmarks/transformer_maps.py --write

A DINOv2-S names flowers by its class token, or by the mean of its patches. Mosaics of four held-out
photographs of four classes, each named with a score over 0.8 on its own: the share of a map in the
quarter of its class, and whether its maximum lies there. Single photographs: insertion minus
deletion. Each beside Grad-CAM at the default layer, with the 95 % interval of the paired difference
over mosaics or photographs. Methods from one gradient are also measured with `correction=libra`.
--write puts the tables into docs/reference/localisation.md.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import verdict_tables
from localisation_cases import quarter
from localisation_maps import ours, trivial
from localisation_measures import Curves, Table, energy
from measuring import ROOT, Results
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms
from verdict_cases import Case, Data, flowers, loaded, trained
from verdict_maps import predicted

from api_schemas.methods import METHODS
from service.errors import CamserveError
from service.inference.method_table import why_not
from service.models.pool import Replica

PAGE = ROOT / "docs" / "reference" / "localisation.md"
MARKS = "<!-- transformers:begin -->", "<!-- transformers:end -->"
MODELS = {"dinov2_token": "class token", "dinov2_mean": "mean of the patches"}
MEASURES = ("energy in the right quarter", "maximum in the right quarter", "insertion − deletion")
SURE = 0.8
TRIVIAL = ("centre", "random")
LIBRA = ", libra"
"""Behind a method's name: with corrected gradients."""


def sure(replica: Replica, data: Data, count: int) -> list[tuple[Tensor, int]]:
    """The first held-out photographs that are named right and surely, with their classes."""
    chosen: list[tuple[Tensor, int]] = []
    for case in flowers()(data, replica):
        best = predicted(replica, case.pixels).predictions[0]
        if best.score > SURE and is_right(case, best.class_id):
            chosen.append((case.pixels, best.class_id))
        if len(chosen) == count:
            break
    return chosen


def is_right(case: Case, class_id: int) -> bool:
    """Whether a photograph is of the class."""
    return case.labels is not None and class_id in case.labels


def mosaics(
    photos: Sequence[tuple[Tensor, int]], count: int
) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Four photographs of four classes at half of their side: uint8 (3, h, w), their classes."""
    chance = random.Random(0)  # noqa: S311 - a seeded choice
    while count:
        four = chance.sample(list(photos), 4)
        if len({label for _, label in four}) < 4:
            continue
        small = [transforms.resize(pixels, [pixels.shape[1] // 2] * 2) for pixels, _ in four]
        pixels = torch.cat([torch.cat(small[:2], 2), torch.cat(small[2:], 2)], 1)
        yield pixels, tuple(label for _, label in four)
        count -= 1


class Bench:
    """One model, and what is measured of it."""

    def __init__(self, replica: Replica, slow: int) -> None:
        self.replica, self.slow = replica, slow
        self.tables = {name: Table(name) for name in MEASURES}
        self.refused: dict[str, str] = {}

    def maps(
        self, pixels: Tensor, targets: Sequence[int], *, slow: bool
    ) -> Iterator[tuple[str, list[Any]]]:
        """The maps of each method, at the size of the image. slow: also those of many passes."""
        size = (int(pixels.shape[1]), int(pixels.shape[2]))
        for name, cam in trivial(size, int(pixels.sum())).items():
            yield name, [cam] * len(targets)
        for record in METHODS.values():
            if record.times != "once" and not slow:
                continue
            reason = why_not(self.replica.model, record.name)
            if reason is not None:
                self.refused[record.name] = reason
                continue
            for libra in (False, True) if record.is_correctable else (False,):
                found = ours(self.replica, pixels, record.name, targets, libra=libra)
                assert not isinstance(found, CamserveError), found
                yield record.name + (LIBRA if libra else ""), found

    def look_at_mosaic(self, number: int, pixels: Tensor, targets: Sequence[int]) -> None:
        """Where the map of each of the four classes lies."""
        size = (int(pixels.shape[1]), int(pixels.shape[2]))
        for method, maps in self.maps(pixels, targets, slow=number < self.slow):
            for index, cam in enumerate(maps):
                case, right = (f"mosaic {number}", index), quarter(index, size)
                self.tables[MEASURES[0]].add(method, "ours", case, energy(cam, right))
                hit = bool(right.flat[int(cam.argmax())]) and float(cam.max()) > 0
                self.tables[MEASURES[1]].add(method, "ours", case, float(hit))

    def draw_curves(self, number: int, pixels: Tensor, target: int) -> None:
        """Insertion minus deletion."""
        curves = Curves(self.replica, pixels, target, 0)
        for method, (cam,) in self.maps(pixels, [target], slow=number < self.slow):
            inserted, deleted = curves.areas(cam)
            case = (f"photograph {number}", 0)
            self.tables[MEASURES[2]].add(method, "ours", case, inserted - deleted)

    def rows(self) -> dict[str, list[str]]:
        """A cell a measure for each method: the mean, and its difference from Grad-CAM."""
        methods = [*TRIVIAL]
        for name, record in METHODS.items():
            if name not in self.refused:
                methods += [name, name + LIBRA] if record.is_correctable else [name]
        return {
            name: [self._cell(table, name) for table in self.tables.values()] for name in methods
        }

    def _cell(self, table: Table, method: str) -> str:
        values = table.values.get((method, "ours"), {})
        if not values:
            return "–"
        mean = f"{sum(values.values()) / len(values):.2f}"
        found = table.difference(method, ("gradcam", "ours"))
        if method == "gradcam" or found is None:
            return f"{mean} (n = {len(values)})"
        return f"{mean}; {found[0]:+.2f} [{found[1]:+.2f}, {found[2]:+.2f}]"


def measured(name: str, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """What the maps of one model show."""
    replica = loaded(trained(name, name)(data))
    bench = Bench(replica, options.slow)
    photos = sure(replica, data, options.photographs)
    for number, (pixels, targets) in enumerate(mosaics(photos, options.mosaics)):
        bench.look_at_mosaic(number, pixels, targets)
        print(f"{name}: mosaic {number + 1}", file=sys.stderr, flush=True)
    for number, (pixels, target) in enumerate(photos[: options.curves]):
        bench.draw_curves(number, pixels, target)
        print(f"{name}: curves {number + 1}", file=sys.stderr, flush=True)
    layer = replica.model.target_layer
    return {
        "layer": layer,
        "photographs": len(photos),
        "rows": bench.rows(),
        "refused": bench.refused,
    }


def tables(parts: dict[str, Any]) -> str:
    """A table for each model."""
    lines: list[str] = []
    for name, title in MODELS.items():
        if name not in parts:
            continue
        found = parts[name]["found"]
        lines += [f"**{title}**, default layer `{found['layer']}`", ""]
        lines += [f"| method | {' | '.join(MEASURES)} |", f"|{'---|' * (1 + len(MEASURES))}"]
        lines += [f"| {method} | {' | '.join(cells)} |" for method, cells in found["rows"].items()]
        refused = ", ".join(f"`{method}`" for method in found["refused"])
        lines += ["", f"Refused by this model: {refused or 'none'}.", ""]
    return "\n".join(lines).strip()


def main(arguments: list[str] | None = None) -> str:
    """Measure what is not kept with the same settings, and return the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=ROOT.parent / "shared" / "data", help="the photographs")
    add("--trained", type=Path, default=ROOT / "build" / "planted_cues", help="what was trained")
    add("--photographs", type=int, default=60, help="photographs that mosaics are made of")
    add("--mosaics", type=int, default=30)
    add("--curves", type=int, default=20, help="photographs with insertion and deletion")
    add("--slow", type=int, default=6, help="of each, with the methods of many passes")
    add("--models", nargs="+", choices=MODELS, default=tuple(MODELS))
    add("--results", type=Path, default=ROOT / "build" / "transformer_maps.json")
    add("--again", action="store_true", help="measure what is kept again")
    add("--write", action="store_true", help="write the tables into the page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = Data(options.data, options.trained, None)
    results = Results(options.results, again=options.again)
    settings = {
        name: getattr(options, name) for name in ("photographs", "mosaics", "curves", "slow")
    }
    for name in options.models:
        if not results.has(name, settings):
            results.keep(name, settings, measured(name, data, options))
    made = tables(results.parts)
    if options.write:
        verdict_tables.write(PAGE, made, MARKS)
    return made


if __name__ == "__main__":
    print(main())
