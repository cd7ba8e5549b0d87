"""The HTML report: one self-contained file that loads nothing from any host."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Self

from api_schemas.answers import Prediction, Result, Verification, verdict_sentence
from api_schemas.options import ExplainOptions
from service import __version__
from service.cam.encoding import encode
from service.cam.heatmap import Style, render_heatmap
from service.cli.explain_files import Explained, Failed, Outcome
from service.cli.report.contact_sheet import scaled_down
from service.durable import write_whole
from service.errors import ConfigurationError
from service.images.image_files import text_of
from service.inference.questions import Explanation
from service.models.loaded import LoadedModel
from service.pipeline.resolve import method_of
from service.pipeline.response import geometry_of

SIDE = 720
"""Longer side of an image, in pixels."""

LISTED = 20
"""Boxes that are listed of an image; a detector may find a hundred."""

NOTHING = "nothing found"

FLAGS = {
    "all_zero": "The map is zero everywhere: there is no evidence for this class.",
    "target_not_predicted": "The model does not predict this class here.",
    "saturated": "The score is at its limit: it hardly changes.",
    "low_resolution": "The layer has few cells; an earlier layer has a finer grid.",
    "random_weights": "The weights are random: this map is meaningless.",
    "not_per_box": "This method averages over the image: its map shows other objects, too.",
    "edge_clipped": "The edge is at the border of the image: nothing in the image moves it.",
    "layer_not_used": "This box or region does not depend on the layer.",
}


class HtmlReport:
    """Cards in the order of the images' names; written when the `with` ends without an error."""

    def __init__(self, path: Path, model: LoadedModel, options: ExplainOptions) -> None:
        self._path = path
        self._model = model
        self._options = options
        self._cards: dict[Path, str] = {}
        self._failed: dict[Path, Failed] = {}
        self._labels: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if kind is None:
            try:
                write_whole(self._path, self._page().encode())
            except OSError as failed:
                raise ConfigurationError(
                    f"{text_of(self._path)} cannot be written: {failed.strerror}."
                ) from failed

    def add(self, outcome: Outcome) -> None:
        """Add a card for an image, or a line for its failure."""
        if isinstance(outcome, Failed):
            with self._lock:
                self._failed[outcome.name] = outcome
            return
        card = _card(outcome)
        with self._lock:
            self._cards[outcome.name] = card
            self._labels[_title(outcome)[0]] += 1

    def _page(self) -> str:
        files = resources.files("service.cli.report")
        style = files.joinpath("report.css").read_text(encoding="utf-8")
        style += f":root {{ --opacity: {self._options.opacity:g}; }}\n"
        script = files.joinpath("report.js").read_text(encoding="utf-8")
        cards = "\n".join(card for _, card in sorted(self._cards.items()))
        return f"""{head(f"Explanations: {self._model.name}", style, script)}<body>
{self._header()}
{self._controls()}
<main>
{cards}
</main>
{_failures(self._failed.values())}
<footer>camserve {__version__}, {datetime.now(UTC):%d %B %Y, %H:%M} UTC. The colors show
where the model found evidence for the named class, not whether the prediction is correct.</footer>
<dialog aria-label="Enlarged"></dialog>
<script>{script}</script>
</body>
</html>
"""

    def _header(self) -> str:
        facts = {
            "model": f"{self._model.name} {self._model.version}",
            "method": method_of(self._model, self._options),
            "layer": ", ".join(self._options.layer or self._model.default_layers)
            or self._model.target_layer
            or "none",
            "images": str(len(self._cards)),
        }
        if self._options.contrast:
            facts["contrast"] = ", ".join(self._options.contrast)
        if self._failed:
            facts["failed"] = str(len(self._failed))
        terms = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
        return f"<header><h1>Explanations</h1><dl>{terms}</dl></header>"

    def _controls(self) -> str:
        most = max(self._labels.values(), default=1)
        classes = "".join(
            f'<li><button type="button" aria-pressed="false" value="{escape(label)}">'
            f"<span>{escape(label)}</span> {_bar(count / most)} <b>{count}</b></button></li>"
            for label, count in self._labels.most_common()
        )
        return f"""<section class="controls" hidden aria-label="Filter and display">
<ul class="classes">{classes}</ul>
<label>Opacity <input type="range" id="opacity" min="0" max="1" step="0.01"
 value="{self._options.opacity:g}"></label>
<label>Order <select id="order"><option value="name">by name</option>
<option value="low">lowest score first</option><option value="high">highest score first</option>
</select></label>
</section>"""


def _title(outcome: Explained) -> tuple[str, float]:
    """The best prediction and its score, 0 where a detector finds nothing."""
    found = outcome.result.predictions
    return (found[0].label, found[0].score) if found else (NOTHING, 0.0)


def _card(outcome: Explained) -> str:
    label, score = _title(outcome)
    mark = hashlib.sha256(text_of(outcome.name).encode()).hexdigest()[:12]
    figures = "".join(
        _figure(outcome, explanation, wire.verify, mark, index)
        for index, (explanation, wire) in enumerate(
            zip(outcome.answer.explanations, outcome.result.explanations or [], strict=True)
        )
    )
    notes = "".join(map(_note, _hidden(outcome.result)))
    shown = f" <b>{score:.1%}</b>" if outcome.result.predictions else ""
    return f"""<article data-label="{escape(label)}" data-score="{score:.6f}">
{figures or _plain(outcome)}
<h2>{escape(label)}{shown}</h2>
<p class="name">{escape(text_of(outcome.path))}</p>
<ol>{_others(outcome.result.predictions or [])}</ol>
{notes}
</article>"""


def _plain(outcome: Explained) -> str:
    """Return the image alone, of one without an explanation."""
    preview = scaled_down(outcome.upload, SIDE).preview
    assert preview is not None
    data = _data("image/jpeg", encode(preview, "jpeg"))
    return f'<figure><img alt="{escape(text_of(outcome.path))}" src="{data}"></figure>'


def _box(explanation: Explanation, scale: float) -> str:
    """Return the outline of the explained box, white on black."""
    if explanation.box is None:
        return ""
    edges = " ".join(
        f'{name}="{value * scale:.1f}"'
        for name, value in zip(("x", "y", "width", "height"), explanation.box, strict=True)
    )
    return f'<rect class="box under" {edges}/><rect class="box" {edges}/>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _figure(
    outcome: Explained,
    explanation: Explanation,
    verdict: Verification | None,
    mark: str,
    index: int,
) -> str:
    """Return the map over the image, which is in the page once for all its maps."""
    upload, options = scaled_down(outcome.upload, SIDE), outcome.options
    assert upload.preview is not None
    height, width = upload.preview.shape[:2]
    geometry = upload.model_input.geometry
    style = Style("source", options.colormap, "jpeg", options.opacity)
    covered = geometry_of(upload, explanation)
    heat = render_heatmap(explanation.grid, covered, style, max(width, height))
    scale = width / upload.width
    seen = " ".join(
        f'{name}="{value * scale:.1f}"'
        for name, value in zip(("x", "y", "width", "height"), geometry.seen, strict=True)
    )
    size = f'width="{width}" height="{height}"'
    source = f'<use href="#image-{mark}"/>'
    if index == 0:
        data = _data("image/jpeg", encode(upload.preview, "jpeg"))
        source = f'<image id="image-{mark}" {size} href="{data}"/>'
    label = outcome.model.labels[explanation.class_id]
    clip = f"seen-{mark}-{index}"
    alternative = f"{text_of(outcome.path)}: evidence for {label}"
    flags = [FLAGS.get(flag, flag.replace("_", " ")) for flag in explanation.flags]
    is_named = flags or len(outcome.answer.explanations) > 1
    caption = f"{escape(label)} {explanation.score:.1%}" if is_named else ""
    caption += "".join(map(_note, flags))
    caption += "" if verdict is None else _verdict(verdict)
    return f"""<figure><button type="button" aria-label="Enlarge {escape(text_of(outcome.path))}">
<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(alternative)}">
<clipPath id="{clip}"><rect {seen}/></clipPath>
{source}<g class="heat"><image {size} clip-path="url(#{clip})" preserveAspectRatio="none"
 href="{_data(heat.media_type, heat.data)}"/></g><rect class="seen" {seen}/>
{_box(explanation, scale)}</svg></button>
{f"<figcaption>{caption}</figcaption>" if caption else ""}</figure>"""


def _verdict(found: Verification) -> str:
    """Return the verdict as a sentence, with its numbers in a fold."""
    terms = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in _numbers(found)
    )
    return (
        f'<details class="verdict {found.verdict}"><summary><b>{found.verdict.capitalize()}.</b> '
        f"{escape(verdict_sentence(found))}</summary><dl>{terms}</dl></details>"
    )


def _numbers(found: Verification) -> Iterator[tuple[str, str]]:
    """Yield the names and values of a verdict's numbers."""
    fills, elsewhere, baselines = found.agreement_by_fill, found.elsewhere, found.baselines
    yield "agreement", f"{found.agreement:z.2f}"
    yield "filled with the mean", f"{fills.mean:z.2f}"
    yield "filled with a blur", f"{fills.blur:z.2f}"
    yield "elsewhere, median", f"{elsewhere.median:z.2f}"
    yield "elsewhere, best", f"{elsewhere.best:z.2f}"
    yield "p by place", f"{found.p_place:z.3f}"
    yield "p by central place", f"{found.p_centred:z.3f}"
    yield "central blob", f"{baselines.centre:z.2f}"
    yield "contrast of the image", f"{baselines.contrast:z.2f}"
    if found.p_class is not None:
        yield "p by class", f"{found.p_class:z.3f}"
    for tried in found.tried or []:
        yield f"at {tried.layer}", f"{tried.verdict}, {tried.agreement:z.2f}"
    if found.try_layer is not None:
        yield "earlier layer to try", found.try_layer
    yield "design", f"{found.design}, {found.forwards} forward passes"


def _others(predictions: Sequence[Prediction]) -> str:
    return "".join(
        f"<li><span>{escape(p.label)}</span> {_bar(p.score)} <b>{p.score:.1%}</b></li>"
        for number, p in enumerate(predictions)
        if p.box is None or number < LISTED
    )


def _hidden(result: Result) -> list[str]:
    """Return a sentence per class on the effect of the mask."""
    changes = result.masked.changes if result.masked is not None else []
    return [
        f"With the part hidden: {each.label} {each.score:.1%} ({each.score_change * 100:+.1f} "
        "points)."
        for each in changes
    ]


def _failures(failed: Iterable[Failed]) -> str:
    lines = "".join(
        f"<li><b>{escape(text_of(each.path))}</b> {escape(each.detail)}</li>"
        for each in sorted(failed, key=lambda each: each.name)
    )
    if not lines:
        return ""
    heading = '<section class="failed" aria-label="Not explained"><h2>Not explained</h2>'
    return f"{heading}<ul>{lines}</ul></section>"


def _bar(share: float) -> str:
    return (
        '<svg class="bar" viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{share * 100:.1f}" height="1"/></svg>'
    )


def _data(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def head(title: str, style: str, script: str = "") -> str:
    """The start of a report, up to its body: it loads nothing, and runs this style and script."""
    scripts = f"script-src {csp_hash(script)}; " if script else ""
    policy = (
        f"default-src 'none'; img-src data:; style-src {csp_hash(style)}; {scripts}"
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="generator" content="camserve {__version__}">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
"""


def csp_hash(text: str) -> str:
    """Return the source of an inline style or script for a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
