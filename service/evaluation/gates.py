"""Thresholds of a comparison: which release is refused.

Defaults are those at which `benchmarks/compares.py` tells a retraining from a successor with a
planted cue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from service.errors import ConfigurationError, nearest
from service.evaluation.compare import Comparison, Differences

MIN_CLASS = 20
"""Images that a class needs for the gates by class: of fewer, one image decides.
Where no class has as many, all images are measured."""

NEEDS_MASKS = "outside"

DEFAULTS = "defaults"
"""The name of all gates of GATES at their default thresholds."""


@dataclass(frozen=True, slots=True)
class Gate:
    """A figure of `Differences` and its threshold.

    least: whether the figure must be at least the threshold; otherwise at most.
    by_class: whether the worst class of MIN_CLASS images or more is measured, not all images.
    """

    threshold: float
    text: str
    read: Callable[[Differences], float | None]
    least: bool = False
    by_class: bool = False


def _gates(
    name: str,
    thresholds: tuple[float, float],
    text: str,
    read: Callable[[Differences], float | None],
    *,
    least: bool = False,
) -> dict[str, Gate]:
    """Return a gate on all images, and one on the worst class."""
    return {
        name: Gate(thresholds[0], text, read, least),
        f"class_{name}": Gate(
            thresholds[1], f"{text}, in the worst class", read, least, by_class=True
        ),
    }


GATES: Mapping[str, Gate] = MappingProxyType(
    {
        **_gates("flips", (0.15, 0.3), "share of changed labels", lambda d: d.flip_share),
        **_gates(
            "scores", (0.15, 0.25), "mean absolute change of the score", lambda d: d.score_distance
        ),
        **_gates(
            "maps",
            (0.8, 0.75),
            "median rank correlation of the maps",
            lambda d: d.correlation,
            least=True,
        ),
        **_gates(
            "overlap", (0.8, 0.7), "median overlap of the maps", lambda d: d.overlap, least=True
        ),
        **_gates(
            "outside", (0.1, 0.15), "more of the evidence off the object", lambda d: d.outside_shift
        ),
    }
)
"""By name. `outside` needs masks."""


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate on one comparison.

    value: None if it could not be measured, which refuses like a threshold that is exceeded.
    where: the class of the value, by class.
    """

    name: str
    threshold: float
    value: float | None
    where: str | None
    is_kept: bool

    def __str__(self) -> str:
        gate = GATES[self.name]
        relation = "at least" if gate.least else "at most"
        measured = "not measured" if self.value is None else f"{self.value:.3f}"
        where = f" ({self.where})" if self.where is not None else ""
        return f"{self.name} {measured}{where}, {relation} {self.threshold:g}: {gate.text}"


def parse_gates(given: Sequence[str], *, has_masks: bool) -> dict[str, float]:
    """Read thresholds: NAME, NAME=VALUE with a number or a percentage, or `defaults`.

    has_masks: whether the gates that need masks are among the defaults.

    Raises ConfigurationError for another name or value.
    """
    thresholds: dict[str, float] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if name == DEFAULTS and not equals:
            thresholds = {**_defaults(has_masks=has_masks), **thresholds}
            continue
        if name not in GATES:
            raise ConfigurationError(
                f"--fail-on {text}: there is no gate {name!r}; the gates are {', '.join(GATES)}, "
                f"and {DEFAULTS} for all of them.{nearest(name, GATES)}"
            )
        thresholds[name] = _number(text, value) if equals else GATES[name].threshold
    return thresholds


def _defaults(*, has_masks: bool) -> dict[str, float]:
    return {
        name: gate.threshold
        for name, gate in GATES.items()
        if has_masks or not name.endswith(NEEDS_MASKS)
    }


def _number(text: str, value: str) -> float:
    try:
        number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        number = float("nan")
    if not -1 <= number <= 1:
        raise ConfigurationError(
            f"--fail-on {text}: the threshold must be a number from -1 to 1, or a percentage such "
            "as 2%."
        )
    return number


def check_gates(comparison: Comparison, thresholds: Mapping[str, float]) -> list[GateResult]:
    """Return the result of each gate, in the order of the thresholds."""
    return [_result(comparison, name, threshold) for name, threshold in thresholds.items()]


def _result(comparison: Comparison, name: str, threshold: float) -> GateResult:
    gate = GATES[name]
    measured = dict(_values(comparison, gate))
    if not measured:
        return GateResult(name, threshold, None, None, is_kept=False)
    worst = (min if gate.least else max)(measured, key=lambda where: measured[where])
    value = measured[worst]
    is_kept = value >= threshold if gate.least else value <= threshold
    return GateResult(name, threshold, value, worst or None, is_kept)


def _values(comparison: Comparison, gate: Gate) -> Iterator[tuple[str, float]]:
    """Yield the class and the value of each set of images; "" for all images."""
    sets = {"": comparison.overall}
    if gate.by_class:
        enough = comparison.classes.items()
        sets = {label: found for label, found in enough if found.images >= MIN_CLASS} or sets
    for where, found in sets.items():
        value = gate.read(found) if found.images else None
        if value is not None:
            yield where, value
