"""Run `camserve compare`: load both models, compare every image, judge, write."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import typer
from rich.markup import escape
from rich.progress import track

from service import logs
from service.app import model_loader
from service.cli.compare.comparison_page import (
    HEADINGS,
    WorstImages,
    cells,
    comparison_page,
    failure,
)
from service.cli.compare.junit import junit_xml
from service.cli.flags import ERR, explain_options, print_left_out, print_tables, table
from service.cli.model_commands import one_model
from service.durable import write_whole
from service.errors import ConfigurationError
from service.evaluation.compare import (
    Comparison,
    Differences,
    Outcome,
    compare_files,
    summarise,
)
from service.evaluation.gates import GateResult, check_gates, parse_gates
from service.evaluation.object_masks import read_masks
from service.images.image_files import find_images, text_of
from service.models.loaded import LoadedModel
from service.settings import Settings

SIDE = 480
"""Longer side of the images in the report, in pixels."""


@dataclass(frozen=True, slots=True)
class Destinations:
    """Where the result goes, and how many images the report shows."""

    report: Path | None
    worst: int
    junit: Path | None
    as_json: bool


def run(  # noqa: PLR0917 - what the command takes
    settings: Settings,
    given: tuple[str, str],
    folder: str,
    fail_on: Sequence[str],
    masks_file: Path | None,
    method: str | None,
    outputs: Destinations,
) -> None:
    """Compare two models; exits with code 1 if a gate refuses the second one.

    Raises ConfigurationError for wrong usage, a model that cannot be loaded, and files that cannot
    be read or written.
    """
    logs.configure_command()
    thresholds = parse_gates(fail_on, has_masks=masks_file is not None)
    _check(method, outputs)
    masks = None if masks_file is None else read_masks(masks_file)
    files = find_images([folder])
    one, other = _load(settings, given)
    outcomes = compare_files(
        one,
        other,
        files,
        method=method,
        masks=masks,
        max_pixels=settings.max_pixels,
        preview_side=SIDE if outputs.report else None,
    )
    worst = WorstImages(outputs.worst if outputs.report else 0)
    watched = _with_progress(outcomes, len(files), worst)
    comparison = summarise(one, other, watched, method)
    _check_any(comparison)
    gates = check_gates(comparison, thresholds)
    lost = [each for each in comparison.failed if each.models == (other.name,)]
    _write(comparison, gates, len(lost), worst, outputs)
    print_left_out([folder])
    refused = [gate for gate in gates if not gate.is_kept]
    for gate in refused:
        ERR.print(f"[red]refused:[/] {escape(str(gate))}", soft_wrap=True)
    if lost:
        ERR.print(f"[red]refused:[/] {len(lost)} images that only {one.name} answers.")
    if refused or lost:
        raise typer.Exit(1)


def _check(method: str | None, outputs: Destinations) -> None:
    """Raises ConfigurationError before any work."""
    if method is not None:
        explain_options(method=method)  # raises for another name
    for flag, path in (("--report", outputs.report), ("--junit", outputs.junit)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigurationError(f"{flag} {path}: there is no folder {path.parent}.")
        if path is not None and path.is_dir():
            raise ConfigurationError(f"{flag} {path}: this is a folder; name a file.")


def _load(settings: Settings, given: tuple[str, str]) -> tuple[LoadedModel, LoadedModel]:
    """Load both models; equal names become A and B."""
    load = model_loader(settings.uncompiled())
    one, other = (load(one_model(settings, text)) for text in given)
    if one.name == other.name:
        one, other = (
            replace(model, spec=replace(model.spec, name=f"{model.name} ({letter})"))
            for model, letter in ((one, "A"), (other, "B"))
        )
    return one, other


def _with_progress(
    outcomes: Iterator[Outcome], count: int, worst: WorstImages
) -> Iterator[Outcome]:
    """Yield the outcomes, with a progress bar on a terminal; the worst ones are kept."""
    hidden = count < 2 or not ERR.is_terminal
    for outcome in track(outcomes, "comparing", total=count, console=ERR, disable=hidden):
        worst.add(outcome)
        yield outcome


def _check_any(comparison: Comparison) -> None:
    """Raises ConfigurationError if no image could be compared."""
    if comparison.overall.images or comparison.left_out:
        return
    if not comparison.failed:
        raise ConfigurationError("neither model detects anything in these images.")
    first = comparison.failed[0]
    raise ConfigurationError(
        f"none of {len(comparison.failed)} images could be compared; {text_of(first.name)}: "
        f"{first.detail}"
    )


def _write(
    comparison: Comparison,
    gates: Sequence[GateResult],
    lost: int,
    worst: WorstImages,
    outputs: Destinations,
) -> None:
    """Write what is wanted. Raises ConfigurationError."""
    if outputs.as_json:
        sys.stdout.buffer.write(orjson.dumps(as_json(comparison, gates)) + b"\n")
        sys.stdout.buffer.flush()
    else:
        _print(comparison, gates)
    if outputs.junit is not None:
        _write_file(outputs.junit, junit_xml(comparison, gates, lost))
    if outputs.report is not None:
        _write_file(outputs.report, comparison_page(comparison, gates, worst).encode())


def _write_file(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}.") from error
    ERR.print(f"→ {escape(text_of(path))}", soft_wrap=True)


def _print(comparison: Comparison, gates: Sequence[GateResult]) -> None:
    rows = table("class of A", *HEADINGS, right=HEADINGS)
    for label, found in {"all": comparison.overall, **comparison.classes}.items():
        rows.add_row(escape(label), *cells(found))
    print_tables(rows)
    for note in comparison.notes:
        ERR.print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    if comparison.left_out:
        labels = ", ".join(sorted({label for _, label in comparison.left_out}))
        ERR.print(
            f"[yellow]note:[/] {len(comparison.left_out)} images are left out: "
            f"{escape(comparison.other.name)} does not have their class ({escape(labels)}).",
            soft_wrap=True,
        )
    for failed in comparison.failed:
        ERR.print(f"[red]failed:[/] {escape(failure(failed))}", soft_wrap=True)
    for gate in gates:
        if gate.is_kept:
            ERR.print(f"kept: {escape(str(gate))}", soft_wrap=True)


def as_json(comparison: Comparison, gates: Sequence[GateResult]) -> Mapping[str, Any]:
    """Return the result as JSON values."""
    return {
        "models": [
            {"name": model.name, "builder": model.spec.builder, "version": model.version}
            for model in (comparison.one, comparison.other)
        ],
        "overall": _figures(comparison.overall),
        "classes": [
            {"label": label, **_figures(found)} for label, found in comparison.classes.items()
        ],
        "flips": [
            {"image": text_of(name), "from": before, "to": after}
            for name, before, after in comparison.flips
        ],
        "left_out": [
            {"image": text_of(name), "label": label} for name, label in comparison.left_out
        ],
        "failed": [
            {"image": text_of(each.name), "models": each.models, "detail": each.detail}
            for each in comparison.failed
        ],
        "gates": [
            {
                "name": gate.name,
                "threshold": gate.threshold,
                "value": gate.value,
                "class": gate.where,
                "kept": gate.is_kept,
            }
            for gate in gates
        ],
        "notes": comparison.notes,
    }


def _figures(found: Differences) -> Mapping[str, Any]:
    return {
        "images": found.images,
        "flips": found.flips,
        "flip_share": found.flip_share,
        "flip_interval": found.flip_interval,
        "score_change": found.score_change,
        "score_distance": found.score_distance,
        "maps": found.maps,
        "correlation": found.correlation,
        "overlap": found.overlap,
        "centre_shift": found.centre_shift,
        "outside": found.outside,
        "outside_shift": found.outside_shift,
    }
