"""Maps of one image and the controls that know nothing of it, each judged by `verdicts.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional
from verdict_cases import Case, randomised

from service.cam.verdict import WHOLE, Design, Evidence, Verdict, average, judge
from service.errors import CamserveError
from service.inference.batch import Unfinished, run, run_compiled
from service.inference.questions import InferenceResult, Question
from service.models.pool import Replica

BLOBS = (0.12, 0.18, 0.25)
"""Standard deviations of centred maps, as shares of the side."""

JITTER = 0.06
STEPS = 8
"""Of integrated gradients."""

DEPTHS = ("head", "last half", "all")
DRAW = 5
"""Images that share a draw of randomised weights."""


def answer(replica: Replica, question: Question) -> InferenceResult:
    """The answer to one question; raises the error of the service."""
    (found,) = run(replica, [question])
    while isinstance(found, Unfinished):
        found = found.step(replica) or found
    if isinstance(found, CamserveError):
        raise found
    return found


def predicted(replica: Replica, pixels: Tensor) -> InferenceResult:
    """Predictions alone, through the compiled lane where there is one."""
    question = Question(pixels, top_k=2, method=None)
    if replica.model.compiled is None:
        return answer(replica, question)
    (found,) = run_compiled(replica.model, [question])
    assert isinstance(found, InferenceResult), found
    return found


@dataclass
class Tally:
    """How often each verdict was given, by row, and the reasons of those that are inconclusive."""

    verdicts: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, row: str, verdict: Verdict) -> None:
        counts = self.verdicts.setdefault(row, Counter())
        counts[verdict.verdict] += 1
        if verdict.reason:
            counts[verdict.reason] += 1


@dataclass
class Bench:
    """One model on trial.

    original: the built-in network as it is, whose map says where the flower is.
    pixel, randomised: images with integrated gradients and with maps of randomised weights.
    """

    replica: Replica
    original: Replica
    pixel: int
    randomised: int
    tally: Tally = field(default_factory=Tally)
    count: int = 0
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    _before: list[Tensor] = field(default_factory=list)
    _drawn: dict[str, Replica] = field(default_factory=dict)

    def is_of_use(self, case: Case) -> bool:
        """Whether the answer is right and certain, and, with a tag, falls without it."""
        model = self.replica.model
        best = predicted(self.replica, case.pixels).predictions[0]
        if best.score <= 0.5 or (case.labels is not None and best.class_id not in case.labels):
            return False
        if case.plain is None:
            return True
        other = predicted(self.replica, case.plain).predictions[0]
        return other.class_id != best.class_id or (model.output == "sigmoid" and other.score <= 0.5)

    def look(self, case: Case) -> None:
        """Judge every map of one image."""
        model = self.replica.model
        best, *rest = predicted(self.replica, case.pixels).predictions
        assert model.target_layer is not None
        targets = [best.class_id]
        if rest and not case.tiles:
            others = [i for i in range(len(model.labels)) if i != best.class_id]
            drawn = int(torch.randint(len(others), (1,), generator=self._generator))
            targets += [rest[0].class_id, others[drawn]]
        if case.tiles:
            targets += [each for each in case.tiles if each != best.class_id][:1]
        plain = Question(
            case.pixels,
            top_k=1,
            targets=(best.class_id,),
            layers=(model.target_layer,),
            verify=True,
            seen=case.seen,
        )
        first = answer(self.replica, replace(plain, targets=tuple(dict.fromkeys(targets))))
        evidence = first.evidence
        assert evidence is not None
        plain = replace(plain, evidence=evidence)
        own = first.explanations[0]
        assert own.verdict is not None
        self.tally.add("gradcam", own.verdict)
        rows = ["another quarter's class"] if case.tiles else ["second class", "random class"]
        by_class = {each.class_id: torch.tensor(each.grid) for each in first.explanations}
        for row, class_id in zip(rows, targets[1:], strict=False):
            self.judge(row, evidence, by_class[class_id], best.class_id)
        finer = model.finer_layers((model.target_layer,))
        by_layer = [by_class[best.class_id]]
        for layer in finer:
            each = answer(self.replica, replace(plain, layers=(layer,))).explanations[0]
            by_layer.append(torch.tensor(each.grid))
        self.search("gradcam", evidence, by_layer, best.class_id)
        if not case.tiles:
            self.methods(plain, finer[:1])
            self.controls(evidence, by_layer, best.class_id)
            self.planted(case, evidence, best.class_id)
            if self.count < self.randomised:
                self.without_knowledge(plain)
        self._before = by_layer
        self.count += 1

    def judge(self, row: str, evidence: Evidence, grid: Tensor, class_id: int) -> None:
        self.tally.add(row, judge(evidence, grid, class_id))

    def search(self, row: str, evidence: Evidence, maps: Sequence[Tensor], class_id: int) -> None:
        """`verify=search`, and what it would be without dividing the level by the looks."""
        self.tally.add(f"{row}, search", searched(evidence, maps, class_id, len(maps)))
        self.tally.add(f"{row}, search, undivided", searched(evidence, maps, class_id, 1))

    def methods(self, plain: Question, finer: Sequence[str]) -> None:
        questions = {
            "layercam": replace(plain, method="layercam"),
            "eigencam": replace(plain, method="eigencam"),
        }
        if finer:
            questions["layercam, earlier layer"] = replace(
                plain, method="layercam", layers=tuple(finer)
            )
        if self.count < self.pixel:
            questions["integrated_gradients"] = replace(
                plain, method="integrated_gradients", layers=(), steps=STEPS
            )
        for row, question in questions.items():
            (explanation,) = answer(self.replica, question).explanations
            assert explanation.verdict is not None
            self.tally.add(row, explanation.verdict)

    def controls(self, evidence: Evidence, by_layer: Sequence[Tensor], class_id: int) -> None:
        """Maps that know nothing of where the evidence is."""
        plan = evidence.plan
        compared = [plan.compared(grid, _lies_over(plan, grid, evidence)) for grid in by_layer]
        cells = _seen_cells(plan, by_layer[0], evidence)
        order = torch.randperm(cells.numel(), generator=self._generator)
        permuted = cells.flatten()[order].reshape(cells.shape)
        sigma = BLOBS[self.count % len(BLOBS)]
        moved = torch.randn(2, generator=self._generator) * JITTER
        move = tuple(
            int(torch.randint(n, (1,), generator=self._generator)) for n in (8, *plan.shape)
        )
        shifted = [_moved(each, move) for each in compared]
        maps = {
            "cells permuted": permuted,
            "shifted or turned": shifted[0],
            "centred": blob(plan.shape, sigma),
            "centred, jittered": blob(plan.shape, sigma, (float(moved[0]), float(moved[1]))),
        }
        found = {"shifted or turned": [placed(plan, each) for each in shifted]}
        if self._before:
            found["other image's map"] = self._before
            self.judge("other image's map", evidence, self._before[0], class_id)
        for row, cells in maps.items():
            self.judge(row, evidence, placed(plan, cells), class_id)
        for row, layers in found.items():
            self.search(row, evidence, layers, class_id)

    def planted(self, case: Case, evidence: Evidence, class_id: int) -> None:
        """The tag itself, and the flower in its stead."""
        if case.plain is None or case.mask is None:
            return
        self.judge("the tag's mask", evidence, case.mask.float(), class_id)
        size = self.original.model.preprocessing.crop
        shown = functional.interpolate(case.plain[None].float(), size, mode="bilinear")[0]
        layer = self.original.model.target_layer
        assert layer is not None
        question = Question(shown.round().to(torch.uint8), top_k=1, layers=(layer,))
        (flower,) = answer(self.original, question).explanations
        self.judge("the flower's map", evidence, torch.tensor(flower.grid), class_id)

    def without_knowledge(self, plain: Question) -> None:
        """Grad-CAM of randomised weights."""
        model = self.replica.model
        if self.count % DRAW == 0:
            for depth in DEPTHS:
                module = randomised(model.module, depth, self.count)
                self._drawn[depth] = replace(self.replica, module=module)
        for depth, replica in self._drawn.items():
            question = replace(plain, verify=False, evidence=None)
            (explanation,) = answer(replica, question).explanations
            assert plain.evidence is not None
            grid = torch.tensor(explanation.grid)
            self.judge(f"weights permuted: {depth}", plain.evidence, grid, plain.targets[0])


def searched(evidence: Evidence, maps: Sequence[Tensor], class_id: int, looks: int) -> Verdict:
    """What `verify=search` answers: the first supported of a layer and earlier ones.

    looks: what the level of the earlier layers is divided by.
    """
    first = judge(evidence, maps[0], class_id)
    if first.verdict == "inconclusive":
        for grid in maps[1:]:
            other = judge(replace(evidence, looks=looks), grid, class_id)
            if other.verdict == "supported":
                return other
    return first


def placed(plan: Design, cells: Tensor) -> Tensor:
    """A map of the seen area (rows, columns) as a map of the model input, zero around it."""
    left, top, width, height = plan.area
    grid = torch.zeros(plan.size)
    large = functional.interpolate(cells[None, None].float(), (height, width), mode="nearest-exact")
    grid[top : top + height, left : left + width] = large[0, 0]
    return grid


def blob(shape: tuple[int, int], sigma: float, off: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """A Gaussian in the middle of (rows, columns), or off it, in shares of the sides."""
    rows, columns = (
        ((torch.arange(n) + 0.5) / n - 0.5 - by).square() for n, by in zip(shape, off, strict=True)
    )
    return torch.exp(-(rows[:, None] + columns[None]) / (2 * sigma**2))


def _lies_over(plan: Design, grid: Tensor, evidence: Evidence) -> tuple[float, float, float, float]:
    return WHOLE if tuple(grid.shape) == plan.size else evidence.covers


def _seen_cells(plan: Design, grid: Tensor, evidence: Evidence) -> Tensor:
    """About the map's own cells that lie over the seen area."""
    left, top, width, height = plan.area
    covers = _lies_over(plan, grid, evidence)
    rows, columns = (
        average(max(2, round(part / over * cells)), cells, (start - begin) / over, part / over)
        for part, start, cells, begin, over in (
            (height / plan.size[0], top / plan.size[0], grid.shape[0], covers[1], covers[3]),
            (width / plan.size[1], left / plan.size[1], grid.shape[1], covers[0], covers[2]),
        )
    )
    return rows @ grid.double() @ columns.T


def _moved(cells: Tensor, move: tuple[int, ...]) -> Tensor:
    """A mirrored, turned and shifted copy of a map."""
    symmetry, down, across = move
    square = cells.shape[0] == cells.shape[1]
    if symmetry % 2:
        cells = cells.flip(0)
    if symmetry // 2 % 2:
        cells = cells.flip(1)
    if symmetry // 4 and square:
        cells = cells.T
    return cells.roll((down, across), (0, 1))
