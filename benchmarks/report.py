"""What the results say: a section of the page, its plot, and each target with its figure."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import core
import over_http
from measuring import ROOT, Ratio, Results, ratio
from over_http import (
    ALONE,
    BF16,
    BUSY,
    EAGER,
    EXPLAINERS,
    HEATMAP,
    INT8,
    LOADS,
    MARKED,
    NARROW,
    OPENVINO,
    OURS,
    OURS_PREDICT,
    ROWS,
    series,
)

PAGE = ROOT / "docs" / "reference" / "benchmarks.md"
PLOT = ROOT / "docs" / "images" / "benchmarks.svg"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


@dataclass(frozen=True, slots=True)
class Target:
    """What is promised: a figure, and the bound that it must not be over (or, `least`, under).

    limit: the same figure of OpenVINO's forward pass alone, which no explanation can do without.
    """

    text: str
    figure: Callable[[Results], Ratio | None]
    bound: float
    least: bool = False
    limit: Callable[[Results], Ratio | None] = lambda _: None

    def verdict(self, results: Results) -> str:
        """One line of the list."""
        found = self.figure(results)
        wanted = f"{'at least' if self.least else 'at most'} {self.bound:g}"
        if found is None:
            return f"- not measured: {self.text}, {wanted}"
        met = found.median >= self.bound if self.least else found.median <= self.bound
        limit = self.limit(results)
        beside = "" if limit is None else f"; OpenVINO's forward pass alone: {limit.median:.2f}"
        return f"- **{'met' if met else 'missed'}**: {self.text}, {wanted}: {found}{beside}"


def targets() -> list[Target]:
    """Every target, in the order of the list."""
    return [*_core_targets(), *_http_targets(), *_memory_targets()]


def _core_targets() -> list[Target]:
    def of(name: str, over: str, under: str) -> Callable[[Results], Ratio | None]:
        def figure(results: Results) -> Ratio | None:
            found = results.found(f"core/{name}/1")
            return None if found is None else core.against(found, over, under)

        return figure

    eager, openvino = core.LIMITS
    hooked = [
        Target(f"{name}, explain ÷ eager forward, hooked", of(name, core.HOOKED, eager), 1.10)
        for name in ("resnet50", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny")
    ]
    bounds: dict[str, tuple[float | None, float | None]] = {
        "resnet50": (1.10, 0.65),
        "mobilenet_v3_large": (1.45, 0.60),
        "efficientnet_b0": (1.20, 0.60),
        "convnext_tiny": (1.10, None),
        "vit_b_16": (None, 0.62),
    }
    compiled = []
    for name, (of_openvino, of_eager) in bounds.items():
        text = f"{name}, compiled explain ÷"
        if of_openvino is not None:
            figure = of(name, core.COMPILED, openvino)
            compiled.append(Target(f"{text} OpenVINO forward", figure, of_openvino))
        if of_eager is not None:
            figure = of(name, core.COMPILED, eager)
            limit = of(name, openvino, eager)
            compiled.append(Target(f"{text} eager forward", figure, of_eager, limit=limit))
    return [*hooked, *compiled]


def _http_targets() -> list[Target]:
    def times(other: str, own: str = OURS) -> Callable[[Results], Ratio | None]:
        return lambda results: over_http.against(results, BUSY, "rate", own, other)

    faster = {
        "FastAPI + pytorch-grad-cam": 6,
        "FastAPI + TorchCAM": 2.8,
        "LitServe + TorchCAM": 2.1,
        EAGER: 2,
    }
    nearly = {OPENVINO: 0.90, OURS_PREDICT: 0.95}
    return [
        *(
            Target(
                f"16 clients, requests/s ÷ {other}'s",
                times(other),
                bound,
                least=True,
                limit=times(other, OPENVINO),
            )
            for other, bound in faster.items()
        ),
        *(
            Target(f"16 clients, requests/s ÷ {other}'s", times(other), bound, least=True)
            for other, bound in nearly.items()
        ),
        Target("1 client, one thread, p50 ÷ the fastest peer's", _lone(NARROW), 0.75),
        Target("1 client, all cores, p50 ÷ the fastest peer's", _lone(OURS), 0.60),
        Target("16 clients, p99 ÷ p50", _spread, 2),
        Target(
            f"16 clients, CPU seconds per request ÷ {OPENVINO}'s",
            lambda results: over_http.against(results, BUSY, "cpu", OURS, OPENVINO),
            1.1,
        ),
        Target(f"{_LARGE}, heatmap", _large(HEATMAP), 1.5),
        Target(f"{_LARGE}, overlay of 2048 pixels", _large(OURS), 1.5),
        *(
            Target(
                f"16 clients, bf16 front, requests/s ÷ {other}'s",
                times(other, BF16),
                bound,
                least=True,
            )
            for other, bound in faster.items()
        ),
        Target("1 client, bf16 front, all cores, p50 ÷ the fastest peer's", _lone(BF16), 0.60),
        Target(
            f"16 clients, int8 front, requests/s ÷ {OPENVINO}'s in float32",
            lambda results: over_http.against(results, BUSY, "rate", INT8, OPENVINO),
            1.5,
            least=True,
        ),
    ]


_LARGE = "4 clients, a 12 MP image ÷ a 640x480 one, in time"


def _memory_targets() -> list[Target]:
    def one(value: float) -> Ratio:
        return Ratio(value, value, value)

    def replica(results: Results) -> Ratio | None:
        found = results.found("memory/replica")
        return None if found is None else one(found)

    def slope(results: Results) -> Ratio | None:
        found = results.found("memory/slope")
        return None if found is None else one(found["slope"])

    return [
        Target("an additional replica of resnet50, MiB", replica, 1),
        Target("ten thousand mixed requests, MiB per thousand", slope, 1),
    ]


def _lone(name: str) -> Callable[[Results], Ratio | None]:
    """A row's p50 with a lone client in units of the fastest peer's, within each round."""

    def figure(results: Results) -> Ratio | None:
        ours = series(results, ALONE, name, "p50")
        peers = [series(results, ALONE, peer, "p50") for peer in EXPLAINERS]
        numbers = [n for n in sorted(ours) if any(n in peer for peer in peers)]
        if not numbers:
            return None
        fastest = [min(peer[n] for peer in peers if n in peer) for n in numbers]
        return ratio([ours[n] for n in numbers], fastest)

    return figure


def _spread(results: Results) -> Ratio | None:
    p50, p99 = (series(results, BUSY, OURS, name) for name in ("p50", "p99"))
    return ratio(list(p99.values()), list(p50.values())) if p50 else None


def _large(name: str) -> Callable[[Results], Ratio | None]:
    """A row's time for a large image in units of that for a small one."""

    def figure(results: Results) -> Ratio | None:
        small, large = (series(results, load, name, "rate") for load in ("640x480/4", "12MP/4"))
        both = sorted(small.keys() & large.keys())
        return ratio([small[n] for n in both], [large[n] for n in both]) if both else None

    return figure


def verdicts(results: Results) -> str:
    """Every target: met, missed or not measured, with its figure."""
    return "\n".join(target.verdict(results) for target in targets())


OF_ALL = (
    "Generated by `make bench`. All figures are from one run, the variants in turn. Ratios are "
    "medians, with the interval that covers the true median 19 times out of 20; with fewer than "
    "six rounds it is the whole range."
)
OF_CORE = (
    "One thread, Grad-CAM of the predicted class at the last layer, in units of one eager "
    "`inference_mode` forward pass of the same batch; the compiled lane also in units of "
    "OpenVINO's forward pass of the whole model. The service starts from uint8 pixels and ends "
    "with finished results, the others start from the normalized batch. *Tuned* goes beyond the "
    "documentation of the libraries: channels last, and only the last parameter of the target "
    "layer requires a gradient. Random weights: speed does not depend on them."
)
OF_HTTP = (
    "resnet50, real servers on loopback that share all cores with the clients' process. Every "
    "server that explains returns predictions and a JPEG overlay of the size of the image, 2048 "
    "pixels at most. The other servers are in `benchmarks/peers/`; each was verified to return "
    "the same class and the same map before it was measured."
)


def section(results: Results) -> str:
    """What stands between the markers of the page."""
    parts = [OF_ALL, f"{results.found('machine')}.", "### The core", OF_CORE, core.table(results)]
    parts += _http(results)
    return "\n\n".join([*parts, "### Targets", verdicts(results)])


def _http(results: Results) -> list[str]:
    measured = {part.split("/", 2)[2] for part in results.parts if part.startswith("http/")}
    if not measured:
        return []
    parts = ["### Over HTTP", OF_HTTP]
    if BUSY in measured:
        parts.append("![Requests per second](../images/benchmarks.svg)")
    for load in (load for load in LOADS if load in measured):
        size, clients = load.split("/")
        many = "s" if clients != "1" else ""
        parts.append(f"{size} images, {clients} client{many}:")
        parts.append(over_http.table(results, load))
    wrong = results.found("http-check") or {}
    parts += [f"Left out: {row} ({what})." for row, what in wrong.items() if what]
    for load in (load for load in MARKED if load in measured):
        model, size, clients = re.split("[ /]", load)
        parts.append(f"{model}, {size} images, {clients} client{'s' if clients != '1' else ''}:")
        parts.append(over_http.table(results, load))
    return parts


def write(results: Results, page: Path = PAGE, plot: Path = PLOT) -> None:
    """Draw the plot, and put the section between the page's markers, or at its end."""
    draw(results, plot)
    text = page.read_text(encoding="utf-8")
    made = f"{BEGIN}\n\n{section(results)}\n\n{END}"
    if BEGIN in text:
        before, rest = text.split(BEGIN, 1)
        text = before + made + rest.split(END, 1)[1]
    else:
        text = f"{text.rstrip()}\n\n## Comparison with other libraries\n\n{made}\n"
    page.write_text(text, encoding="utf-8")


def draw(results: Results, path: Path) -> None:
    """Bars of the requests a second at 16 clients, with the range over the rounds."""
    found = {row.name: list(series(results, BUSY, row.name, "rate").values()) for row in ROWS}
    found = {name: rates for name, rates in found.items() if rates}
    if not found:
        return
    # It takes a second to import, and comes with the peers: the service does not need it.
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "camserve"}
    names = sorted(found, key=lambda name: statistics.median(found[name]))
    middles = [statistics.median(found[name]) for name in names]
    ranges = [
        [middle - min(found[name]) for name, middle in zip(names, middles, strict=True)],
        [max(found[name]) - middle for name, middle in zip(names, middles, strict=True)],
    ]
    figure = Figure(figsize=(8, 0.45 * len(names) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(names, middles, xerr=ranges, color=_colours(names), ecolor="#444444", capsize=3)
    axes.set_xlabel("requests per second, resnet50, 640×480 images, 16 clients")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def _colours(names: Sequence[str]) -> list[Any]:
    """Ours, those that explain, and those that only predict."""
    return [
        "#d9480f"
        if name.startswith("camserve")
        else "#1971c2"
        if "/predict" not in name
        else "#adb5bd"
        for name in names
    ]
