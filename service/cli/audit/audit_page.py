"""The report of an audit: one self-contained HTML file that loads nothing from any host."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from service import __version__
from service.cam.encoding import encode
from service.cli.report.page import head
from service.evaluation.audit.findings import VERDICTS, ClassAudit, Finding, Paste, Shown
from service.evaluation.audit.proportions import Interval, Proportion
from service.evaluation.audit.trials import Flips

SIDE = 160
"""Longer side of an image, in pixels."""

STYLE = """
main.audit { display: block; }
main.audit article { margin-bottom: 1.25rem; padding: 0 1rem 1rem; }
.finding { margin-top: 1rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
.row { display: flex; flex-wrap: wrap; gap: 0.75rem; margin-top: 0.6rem; }
.row figure { max-width: 21rem; background: none; border: 0; }
.row img { border-radius: 6px; display: inline-block; }
.row figcaption { padding: 0.2rem 0; max-width: 20.5rem; }
table { margin-top: 0.6rem; border-collapse: collapse; font-size: 0.87rem; }
th, td { padding: 0.15rem 0.9rem 0.15rem 0; text-align: left; font-variant-numeric: tabular-nums; }
.suspected_cue h2 b { color: var(--accent); }
"""

LIMITS = (
    "An audit cannot see: a cue that all classes share; shapes, textures of the object and text; a "
    "cue that few images have, or one that only together with the object changes the class; a "
    "replaced background; a small mark at changing places where the target layer has few cells. "
    "“No cue was found” is not “clean”."
)


def page(found: dict[str, Any], cards: Sequence[str]) -> str:
    """The report of an audit as JSON, with the `card` of each class."""
    style = resources.files("service.cli.report").joinpath("report.css").read_text("utf-8") + STYLE
    name, version = escape(found["model"]["name"]), escape(found["model"]["version"])
    return f"""{head(f"Audit: {found['model']['name']}", style)}<body>
<header><h1>Audit</h1><dl><div><dt>model</dt><dd>{name} {version}</dd></div>
<div><dt>images</dt><dd>{found["images"]:,}</dd></div>
<div><dt>not read</dt><dd>{len(found["failed"]):,}</dd></div></dl></header>
{_overview(found)}
<main class="audit">
{"".join(cards)}
</main>
{_failed(found["failed"])}
<footer><p>{LIMITS}</p><p>Flips: images of other classes that the edit turned into the class.
Control: the same edit with donors of other classes, or of another place. Intervals: 95 %, Wilson
and Newcombe. camserve {__version__}, {datetime.now(UTC):%d %B %Y, %H:%M} UTC.</p></footer>
</body>
</html>
"""


def card(one: ClassAudit) -> str:
    """One class: verdict, findings with images, what was tried, what was not tested."""
    labelled = "" if one.labelled is None else f", {one.labelled} of them labelled so"
    untested = "".join(
        f'<p class="note">Not tested: {escape(what)}, because {escape(why)}.</p>'
        for what, why in one.untested.items()
    )
    return f"""<article class="{one.verdict}">
<h2>{escape(one.label)} <b>{one.verdict.replace("_", " ")}</b></h2>
<p class="name">{escape(VERDICTS[one.verdict])}. {one.images} images predicted as it{labelled};
{one.forwards:,} forward passes.</p>
{untested}
{"".join(map(_finding, one.findings))}
{_tried(one)}
</article>
"""


def _overview(found: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(one['label'])}</td><td>{one['verdict'].replace('_', ' ')}</td>"
        f"<td>{escape(', '.join(f['place'] for f in one['findings'] if f['confirmed']))}</td></tr>"
        for one in found["classes"]
    )
    nothing = found["nothing"]
    note = (
        f'<p class="note">{nothing["share"]:.0%} of strongly blurred images become '
        f"“{escape(nothing['label'])}”: the model's name for nothing. Edits that remove something "
        "favour it.</p>"
        if nothing
        else ""
    )
    return f"<table><tr><th>class</th><th>verdict</th><th>findings</th></tr>{rows}</table>{note}"


def _finding(found: Finding) -> str:
    state = "confirmed on unseen pairs" if found.confirmed else "not confirmed"
    measured = _line(found.measured) if found.measured else "too few unseen pairs"
    return f"""<section class="finding"><h3>{escape(found.place)} ({found.kind}): {state}</h3>
<p>{measured}. Search: {_line(found.search)}.</p>
{_described(found)}
<div class="row">{"".join(map(_shown, found.strongest))}</div>
<div class="row">{"".join(map(_paste, found.pastes))}</div>
</section>"""


def _line(flips: Flips) -> str:
    """Flips and control as k of n with intervals."""
    text = f"flips {_share(flips.flips)}"
    if flips.control is None:
        return text
    return (
        f"{text}, control {_share(flips.control)}, difference {flips.net:+.2f} "
        f"{_interval(flips.interval)}"
    )


def _share(one: Proportion) -> str:
    return f"{one.part} of {one.n} {_interval(one.interval)}"


def _interval(interval: Interval) -> str:
    return f"[{interval[0]:.2f} to {interval[1]:.2f}]"


def _described(found: Finding) -> str:
    if found.part is None or found.necessity is None:
        return ""
    part, needed = found.part, found.necessity
    red_green_blue = ", ".join(map(str, part.colour))
    inside = "" if part.inside is None else f" {part.inside:.0%} of it lies on the object."
    return (
        f"<p>Layer {escape(part.layer)}; {part.share:.0%} of the class's evidence, in "
        f"{part.presence:.0%} of its images. Centre at {part.centre[0]:.0%} from the left and "
        f"{part.centre[1]:.0%} from the top, spread {part.spread:.0%} of the side; mean colour "
        f"{red_green_blue}.{inside} Without it ({needed.fill}) the logit falls by "
        f"{needed.drop:.2f} more than without another region, and {needed.changed} of "
        f"{needed.images} images change class.</p>"
    )


def _shown(one: Shown) -> str:
    pixels = _pixels(one.image)
    if one.mask is not None:
        border = _large(one.mask.numpy().astype(np.uint8)[:, :, None] * 255) > 127
        outlines, _ = cv2.findContours(
            border.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE
        )
        pixels = cv2.drawContours(pixels.copy(), outlines, -1, (255, 60, 0), 2)
    return (
        f"<figure>{_image(pixels, f'{one.name}, region outlined')}"
        f"<figcaption>{escape(one.name)}</figcaption></figure>"
    )


def _paste(one: Paste) -> str:
    result = "turned into the class" if one.turned else "kept its class: the edit failed here"
    source = f" with a part of {one.donor}" if one.donor else ""
    before = _image(_pixels(one.before), f"{one.recipient}, before")
    after = _image(_pixels(one.after), f"{one.recipient}, after")
    caption = escape(f"{one.recipient}{source}: {result}")
    return f"<figure>{before} {after}<figcaption>{caption}</figcaption></figure>"


def _tried(one: ClassAudit) -> str:
    rows = "".join(
        f"<tr><td>{escape(each.place)}</td><td>{each.kind}</td><td>{_share(each.flips.flips)}</td>"
        f"<td>{_share(each.flips.control) if each.flips.control else 'not needed'}</td></tr>"
        for each in one.tried
    )
    if not rows:
        return ""
    return (
        f"<details><summary>All {len(one.tried)} trials of the search</summary><table><tr>"
        f"<th>trial</th><th>kind</th><th>flips</th><th>control</th></tr>{rows}</table></details>"
    )


def _failed(failed: Sequence[dict[str, str]]) -> str:
    lines = "".join(
        f"<li><b>{escape(one['path'])}</b> {escape(one['detail'])}</li>" for one in failed
    )
    heading = '<section class="failed" aria-label="Not read"><h2>Not read</h2>'
    return f"{heading}<ul>{lines}</ul></section>" if lines else ""


def _pixels(image: Tensor) -> Any:
    """Uint8 (h, w, 3) of an image (C, h, w): its first three channels, or its only one as grey."""
    rows = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    return _large(np.ascontiguousarray(rows.permute(1, 2, 0).numpy()))


def _large(pixels: Any) -> Any:
    height, width = pixels.shape[:2]
    scale = SIDE / max(height, width)
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    return cv2.resize(pixels, (round(width * scale), round(height * scale)), interpolation=how)


def _image(pixels: Any, alternative: str) -> str:
    data = base64.b64encode(encode(pixels, "jpeg")).decode("ascii")
    height, width = pixels.shape[:2]
    return (
        f'<img src="data:image/jpeg;base64,{data}" width="{width}" height="{height}" '
        f'alt="{escape(alternative)}">'
    )
