"""The HTML report of a comparison: one self-contained file that loads nothing from any host."""

from __future__ import annotations

import base64
import heapq
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources

from service import __version__
from service.cam.encoding import encode
from service.cam.heatmap import Style
from service.cli.report.page import FLAGS, head
from service.evaluation.compare import (
    ComparedImage,
    Comparison,
    Differences,
    Outcome,
    Side,
    UncomparedImage,
)
from service.evaluation.gates import GateResult
from service.images.image_files import text_of
from service.models.loaded import LoadedModel
from service.pipeline import response

STYLE = Style("source", "turbo", "jpeg", 0.5)

HEADINGS = ("images", "flips", "score", "|score|", "maps", "overlap", "centre", "off object")
"""Of `cells`."""

LEGEND = (
    "flips: images whose label differs. score, |score|: mean change of the score of A's class, and "
    "of its absolute value. maps: median rank correlation of the maps of A's class, 1 if they are "
    "equal. overlap: median share of the evidence that both maps have. centre: median distance of "
    "the centres of the evidence, as a share of the image's diagonal. off object: how much more of "
    "B's evidence lies off the object."
)


class WorstImages:
    """The cards of the images that differ most: changed labels first, then the least alike maps.

    count: how many are kept; only these are drawn.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._heap: list[tuple[tuple[bool, float], int, str]] = []
        self._seen = 0

    def add(self, outcome: Outcome) -> None:
        """Keep the card of an image if it is among the worst so far."""
        self._seen += 1
        if isinstance(outcome, UncomparedImage) or self._count == 0:
            return
        rank = severity(outcome)
        if len(self._heap) == self._count and rank <= self._heap[0][0]:
            return
        entry = rank, -self._seen, _card(outcome)
        if len(self._heap) < self._count:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heapreplace(self._heap, entry)

    def cards(self) -> list[str]:
        """Return the cards, the worst first."""
        return [card for _, _, card in sorted(self._heap, reverse=True)]


def severity(image: ComparedImage) -> tuple[bool, float]:
    """Whether the label or the set of labels differs; then how unlike the maps or scores are."""
    change = abs(image.score_change or 0.0)
    unlike = change if image.maps is None else 1 - image.maps.correlation + change
    return image.flipped or not image.shared, unlike


def cells(found: Differences) -> list[str]:
    """Return the figures of a set of images as text; – where there is none."""

    def shown(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return [
        str(found.images),
        f"{found.flips} ({found.flip_share:.1%})",
        f"{found.score_change:+.3f}",
        f"{found.score_distance:.3f}",
        shown(found.correlation, ".3f"),
        shown(found.overlap, ".3f"),
        shown(found.centre_shift, ".3f"),
        shown(found.outside_shift, "+.3f"),
    ]


def comparison_page(comparison: Comparison, gates: Sequence[GateResult], worst: WorstImages) -> str:
    """Return the page: gates, figures by class, the worst images side by side, and what failed."""
    style = resources.files("service.cli.report").joinpath("report.css").read_text("utf-8")
    style += resources.files("service.cli.compare").joinpath("comparison.css").read_text("utf-8")
    one, other = comparison.one, comparison.other
    return f"""{head(f"Comparison: {one.name} and {other.name}", style)}<body>
<header><h1>Comparison</h1><dl>{_model("A", one)}{_model("B", other)}</dl></header>
{_gates(gates)}
{_list("Notes", comparison.notes)}
{_figures({"all": comparison.overall, **comparison.classes})}
<h2>The most different images, A and B</h2>
<main>
{chr(10).join(worst.cards())}
</main>
{_list("Changed labels", [f"{text_of(n)}: {a} → {b}" for n, a, b in comparison.flips])}
{_list("Left out: B does not have the class", _left_out(comparison))}
{_list("Not compared", [failure(each) for each in comparison.failed])}
<footer>camserve {__version__}, {datetime.now(UTC):%d %B %Y, %H:%M} UTC. The colors show where a
model found evidence for the class that A predicts, not whether the prediction is correct.</footer>
</body>
</html>
"""


def _model(letter: str, model: LoadedModel) -> str:
    about = f"{model.name} {model.version} ({model.spec.builder})"
    return f"<div><dt>{letter}</dt><dd>{escape(about)}</dd></div>"


def _gates(gates: Sequence[GateResult]) -> str:
    lines = "".join(
        f'<li class="{"kept" if gate.is_kept else "refused"}">'
        f"<b>{'kept' if gate.is_kept else 'refused'}</b> {escape(str(gate))}</li>"
        for gate in gates
    )
    return f'<section class="gates"><h2>Gates</h2><ul>{lines}</ul></section>' if lines else ""


def _figures(sets: Mapping[str, Differences]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in ("class of A", *HEADINGS))
    rows = "".join(
        f"<tr><th>{escape(label)}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells(found))
        + "</tr>"
        for label, found in sets.items()
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<section class="figures">{table}<p class="name">{escape(LEGEND)}</p></section>'


def _list(heading: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<section class="failed"><h2>{escape(heading)}</h2><ul>{items}</ul></section>'


def _left_out(comparison: Comparison) -> list[str]:
    return [f"{text_of(name)}: {label}" for name, label in comparison.left_out]


def failure(failed: UncomparedImage) -> str:
    """Return a line on an image that a model failed on."""
    return f"{text_of(failed.name)} ({' and '.join(failed.models)}): {failed.detail}"


def _card(image: ComparedImage) -> str:
    explained = image.one.label
    figures = "".join(
        _figure(letter, side, text_of(image.name), explained)
        for letter, side in (("A", image.one), ("B", image.other))
    )
    title = (
        explained if image.one.label == image.other.label else f"{explained} → {image.other.label}"
    )
    change = "" if image.score_change is None else f"score {image.score_change:+.3f}"
    alike = "no maps"
    if image.maps is not None:
        alike = f"maps {image.maps.correlation:.2f}, overlap {image.maps.overlap:.2f}"
        if image.maps.outside is not None:
            before, after = image.maps.outside
            alike += f", off the object {before:.0%} → {after:.0%}"
    facts = ", ".join(filter(None, (change, alike)))
    return f"""<article><div class="pair">{figures}</div>
<h2>{escape(title)}</h2><p class="name">{escape(text_of(image.name))}</p>
<p>{escape(facts)}</p></article>"""


def _figure(letter: str, side: Side, name: str, explained: str) -> str:
    """Return one model's map over the image; the image alone where it has no map."""
    assert side.upload.preview is not None
    notes = ""
    if side.explanation is None:
        data = encode(side.upload.preview, "jpeg")
    else:
        data = response.overlay(side.upload, side.explanation, STYLE).data
        notes = "".join(
            f'<p class="note">{escape(FLAGS.get(flag, flag.replace("_", " ")))}</p>'
            for flag in side.explanation.flags
        )
    score = "" if side.score is None else f" ({explained} {side.score:.1%})"
    caption = f"{letter}: {side.label}{score}"
    source = base64.b64encode(data).decode("ascii")
    alternative = f"{name}, model {letter}: evidence for {explained}"
    return f"""<figure><img alt="{escape(alternative)}" src="data:image/jpeg;base64,{source}">
<figcaption>{escape(caption)}{notes}</figcaption></figure>"""
