"""Does the map of a box lie on that box? Detections and regions of scenes with known objects.

    PYTHONPATH=. .venv/bin/python benchmarks/detectors.py --write

A detector and a segmenter of flowers (`tools/flower_scenes`) on scenes of held-out photographs
whose boxes and masks are known. For each detection and each region that is right: the share of its
map in its own box and in the boxes of other objects; and how much of its score is left when the 5 %
of the image's pixels with the highest values are hidden, beside random pixels, a random square and
the centre of its own box. Intervals are 95 %, by resampling scenes. Maps are computed in plain
torch (`detector_maps.py`), but for camserve's default and D-RISE, its `rise`. --write puts the
tables into docs/reference/detectors.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import verdict_tables
from detector_maps import METHODS, Map, Target, detections, drawn, kept_score, regions
from localisation_measures import Table, energy, pointed
from measuring import ROOT, Results
from torch import Tensor
from torchvision.ops import box_iou

from service.inference.batch import Unfinished, run
from service.inference.questions import InferenceResult, Question
from service.models.catalog import ModelSpec
from service.models.loading import load_model
from service.models.pool import Replica
from service.models.probes.condition import Condition

sys.path += [str(ROOT / "tools" / each) for each in ("builtin_model", "flower_scenes")]
import flower_networks
from photos import Photos, normalise, read_photos
from scenes import SIDE, Scene, scenes

PAGE = ROOT / "docs" / "reference" / "detectors.md"
MARKS = "<!-- detectors:begin -->", "<!-- detectors:end -->"
SEED = 1
"""Of the scenes."""
HIDDEN = SIDE * SIDE // 20
"""Pixels that deletion hides: 5 % of the image."""
FILL = torch.tensor((124, 116, 104), dtype=torch.uint8)[:, None, None]
"""The mean colour of ImageNet."""
SURE = 0.5
LEAST = 1000
"""Pixels of a region that is explained."""
SERVED = "camserve's default"
DELETED = (*(f"{each}, P" for each in ("hirescam", "layercam", "gradcam")), SERVED, "D-RISE")
"""Maps whose highest pixels are hidden, and those at C5."""
TRIVIAL = ("random pixels", "random square", "centre")
TITLES = {
    "faster_rcnn": "Faster R-CNN, boxes",
    "retinanet": "RetinaNet, boxes",
    "lraspp": "LR-ASPP, regions",
}
SHORT = {
    "faster_rcnn": {"C4": "C1", "C5": "C2"},
    "retinanet": {"C4": "C0", "C5": "C1"},
    "lraspp": {"C5": "high"},
}
"""Names of layers as in the literature: the backbone's at stride 16, and its last ones."""


class Served:
    """A detector as camserve serves it."""

    def __init__(self, name: str) -> None:
        self._model = load_model(ModelSpec(name, f"flower_networks:{name}"))
        module = self._model.replicate()
        self._replica = Replica(self._model, module, Condition.of(module))

    def maps(self, scene: Scene, method: str, samples: int = 1) -> list[Map]:
        """Of every detection with a score over SURE, best first: what speaks for its class.

        float32 (SIDE, SIDE); `hirescam` at the default layers.
        """
        question = Question(
            scene.pixels,
            top_k=100,
            explain_top=100,
            min_score=SURE,
            method=method,
            layers=self._model.default_layers if method == "hirescam" else (),
            samples=samples,
        )
        (result,) = run(self._replica, [question])
        while isinstance(result, Unfinished):
            result = result.step(self._replica) or result
        assert isinstance(result, InferenceResult), result
        return [drawn(torch.tensor(each.grid).relu(), SIDE) for each in result.explanations]


class Bench:
    """One network, and the measures of its maps: own, other, peak, left."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.net: Any = getattr(flower_networks, name)()
        self.served = None if name == "lraspp" else Served(name)
        self.tables = {key: Table(key) for key in ("own", "other", "peak", "left", "mask")}
        self._case = 0

    def measure(self, number: int, scene: Scene) -> None:
        """All that is right in one scene."""
        targets = self._targets(scene)
        served: dict[str, list[Map]] = {}
        if self.served and targets:
            served[SERVED] = self.served.maps(scene, "hirescam")
            if number < self.options.slow:
                served["D-RISE"] = self.served.maps(scene, "rise", self.options.masks)
            assert all(len(each) == len(targets) for each in served.values())
        for index, target in enumerate(targets):
            true = truth_of(target, scene)
            if true is None:
                continue
            maps = dict(self._maps(target))
            maps["random"] = np.random.default_rng(self._case).random((SIDE, SIDE), np.float32)
            maps |= {row: each[index] for row, each in served.items()}
            self._note((str(number), self._case), scene, target, true, maps)
            self._case += 1

    def _targets(self, scene: Scene) -> list[Target]:
        if self.name == "lraspp":
            return regions(self.net, normalise(scene.pixels[None]), LEAST)
        return detections(self.net, scene.pixels, SURE)

    def _maps(self, target: Target) -> Iterator[tuple[str, Map]]:
        layers = SHORT[self.name] | ({} if self.name == "lraspp" else {"P": target.own})
        for short, layer in layers.items():
            for method, formula in METHODS.items():
                cells = formula(*target.layers[layer])
                yield f"{method}, {short}", drawn(cells, SIDE)

    def _note(
        self,
        case: tuple[str, int],
        scene: Scene,
        target: Target,
        true: int,
        maps: dict[str, Map],
    ) -> None:
        own = inside(target.box)
        other = np.zeros((SIDE, SIDE), dtype=bool)
        for index, box in enumerate(scene.boxes):
            if index != true:
                other |= inside(box)
        other &= ~own
        for row, cam in maps.items():
            self.tables["own"].add(row, "ours", case, energy(cam, own))
            self.tables["other"].add(row, "ours", case, energy(cam, other))
            self.tables["peak"].add(row, "ours", case, pointed(cam, [tuple(target.box.tolist())]))
            if target.mask is not None:
                self.tables["mask"].add(row, "ours", case, energy(cam, target.mask.numpy()))
        if int(own.sum()) >= 2 * HIDDEN:
            hiding = {
                row: highest(cam, case[1])
                for row, cam in maps.items()
                if row in DELETED or row.endswith("C5")
            }
            hiding |= trivial(target.box, case[1])
            for row, hidden in hiding.items():
                self.tables["left"].add(row, "ours", case, self._left(scene, target, hidden))

    @torch.inference_mode()
    def _left(self, scene: Scene, target: Target, hidden: Tensor) -> float:
        """The share of the score that is left when pixels have the mean colour."""
        pixels = torch.where(hidden, FILL, scene.pixels)
        if target.mask is not None:
            scores = self.net(normalise(pixels[None]))["out"][0].softmax(dim=0)
            return float(scores[target.label][target.mask].mean()) / target.score
        (answer,) = self.net([pixels / 255])
        return kept_score(answer, target.label, target.box) / target.score

    def found(self) -> dict[str, Any]:
        """Rows of the table, and how many cases and scenes they are of."""
        own = self.tables["own"].values
        rows = sorted({row for table in self.tables.values() for row, _ in table.values})
        counts = {
            "cases": len(own["random", "ours"]),
            "scenes": len({scene for scene, _ in own["random", "ours"]}),
            "hidden": len(self.tables["left"].values["random pixels", "ours"]),
        }
        return counts | {"rows": {row: self._row(row) for row in rows}}

    def _row(self, row: str) -> dict[str, Any]:
        means = {
            key: float(np.mean(list(values.values())))
            for key, table in self.tables.items()
            if (values := table.values.get((row, "ours"), {}))
        }
        left = self.tables["left"]
        over = {
            f"over {other}": left.difference(row, (other, "ours"))
            for other in TRIVIAL
            if (row, "ours") in left.values and row not in TRIVIAL
        }
        return {**means, **over, "cases": len(self.tables["own"].values.get((row, "ours"), ()))}


def truth_of(target: Target, scene: Scene) -> int | None:
    """The number of the object that a detection or region is right about: same class, IoU of .5."""
    if target.mask is None:
        overlap = box_iou(target.box[None], scene.boxes)[0]
    else:
        both = (scene.masks & target.mask).sum(dim=(1, 2))
        overlap = both / (scene.masks | target.mask).sum(dim=(1, 2))
    overlap = torch.where(scene.labels + 1 == target.label, overlap, 0)
    best = int(overlap.argmax())
    return best if float(overlap[best]) >= 0.5 else None


def inside(box: Tensor) -> Any:
    """The pixels whose centre is in a box: bool (SIDE, SIDE)."""
    left, top, right, bottom = box.tolist()
    at = np.arange(SIDE) + 0.5
    return ((at >= top) & (at <= bottom))[:, None] & ((at >= left) & (at <= right))[None, :]


def highest(cam: Map, seed: int) -> Tensor:
    """The HIDDEN pixels with the highest values, ties in a random order: bool (SIDE, SIDE)."""
    ties = np.random.default_rng(seed).permutation(cam.size)
    chosen = np.zeros(cam.size, dtype=bool)
    chosen[np.lexsort((ties, -cam.ravel()))[:HIDDEN]] = True
    return torch.from_numpy(chosen.reshape(cam.shape))


def trivial(box: Tensor, seed: int) -> dict[str, Tensor]:
    """HIDDEN pixels of a box chosen without the model: scattered, one square, its centre."""
    chance, own = np.random.default_rng(seed), inside(box)
    left, top, right, bottom = box.tolist()
    y, x = np.nonzero(own)
    some = chance.permutation(len(x))[:HIDDEN]
    scattered = np.zeros((SIDE, SIDE), dtype=bool)
    scattered[y[some], x[some]] = True
    at = chance.integers(len(x))
    places = {"random square": (x[at], y[at])}
    places["centre"] = ((left + right) / 2, (top + bottom) / 2)
    made = {"random pixels": torch.from_numpy(scattered)}
    for name, (column, row) in places.items():
        far = np.maximum(
            np.abs(np.arange(SIDE) - row)[:, None], np.abs(np.arange(SIDE) - column)[None, :]
        )
        made[name] = highest(np.where(own, -far, -1e9).astype(np.float32), seed)
    return made


def tables(parts: dict[str, Any]) -> str:
    """A table for each network."""
    lines: list[str] = []
    for name, title in TITLES.items():
        if name not in parts:
            continue
        found = parts[name]["found"]
        counts = (
            f"**{title}**: {found['cases']} right ones in {found['scenes']} scenes; deletion of "
            f"{found['hidden']} whose box is at least 10 % of the image."
        )
        lines += [counts, "", *_lines(found["rows"], masks=name == "lraspp"), ""]
    return "\n".join(lines).strip()


def _lines(rows: dict[str, Any], *, masks: bool) -> list[str]:
    heads = ["map", "n", "own box", *(["own mask"] if masks else []), "other boxes"]
    heads += ["maximum in own box", "score left", "− random pixels", "− random square"]
    made = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    order = sorted(rows, key=lambda row: (row in TRIVIAL, row != SERVED, "P" not in row, row))
    for row in order:
        keys = ["own", *(["mask"] if masks else []), "other", "peak", "left"]
        cells = [row, str(rows[row]["cases"] or ""), *(_number(rows[row].get(key)) for key in keys)]
        cells += [_interval(rows[row].get(f"over {other}")) for other in TRIVIAL[:2]]
        made.append(f"| {' | '.join(cells)} |")
    return made


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _interval(found: Sequence[float] | None) -> str:
    return "" if found is None else f"{found[0]:+.2f} [{found[1]:+.2f}, {found[2]:+.2f}]"


def measured(name: str, photos: Photos, options: argparse.Namespace) -> dict[str, Any]:
    """One network's rows."""
    bench = Bench(name, options)
    for number, scene in enumerate(scenes(photos, options.scenes, SEED)):
        bench.measure(number, scene)
        if number % 10 == 9:
            print(f"{name}: scene {number + 1}", file=sys.stderr, flush=True)
    return bench.found()


def main(arguments: list[str] | None = None) -> str:
    """Measure what is not kept with the same settings, and return the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    data = ROOT.parent / "shared" / "data" / "flowers128.tar"
    add("--data", type=Path, default=data, help="tar of train/ and val/")
    heads = [name for name in TITLES if (flower_networks.HERE / f"{name}.safetensors").exists()]
    add("--networks", nargs="+", choices=TITLES, default=heads)
    add("--scenes", type=int, default=64)
    add("--slow", type=int, default=64, help="of these, scenes with D-RISE")
    add("--masks", type=int, default=300, help="forward passes of D-RISE for a scene")
    add("--results", type=Path, default=ROOT / "build" / "detectors.json")
    add("--again", action="store_true", help="measure what is kept again")
    add("--write", action="store_true", help="write the tables into the page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = Results(options.results, again=options.again)
    settings = {name: getattr(options, name) for name in ("scenes", "slow", "masks")}
    photos = read_photos(options.data, "val")
    for name in options.networks:
        if not results.has(name, settings):
            results.keep(name, settings, measured(name, photos, options))
    made = tables(results.parts)
    if options.write:
        verdict_tables.write(PAGE, made, MARKS)
    return made


if __name__ == "__main__":
    print(main())
