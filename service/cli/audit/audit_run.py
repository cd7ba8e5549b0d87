"""Run `camserve audit`: scan the images, audit the classes that are left, write the results."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from rich.markup import escape
from rich.progress import Progress
from torch import Tensor

from service import logs
from service.app import model_loader, model_specs
from service.cli.audit import audit_page
from service.cli.audit.labelled_images import (
    ImageFiles,
    Masks,
    class_ids,
    detail_of,
    listed,
    read_labels,
)
from service.cli.bulk.identity import of_model, of_spec
from service.cli.bulk.result_folder import Identity, open_results
from service.cli.flags import ERR, print_left_out
from service.durable import whole, write_whole
from service.errors import CamserveError, ConfigurationError
from service.evaluation.audit.audit import as_json, classes_in
from service.evaluation.audit.class_audit import audit_class, cast_images
from service.evaluation.audit.findings import ClassAudit, Verdict
from service.evaluation.audit.passes import Passes
from service.evaluation.audit.sample import Scanned
from service.images.budget import DecodeBudget
from service.images.image_files import text_of
from service.models.loaded import LoadedModel
from service.settings import Settings

VERDICTS: tuple[str, ...] = get_args(Verdict)

CHUNK = 256
"""Images between two files of the scan: the most that a kill loses."""

ALGORITHM = 1
"""Changes with the results: a folder holds those of one algorithm."""

TRIALS = pa.schema(
    [
        ("class_id", pa.int32()),
        ("label", pa.string()),
        ("kind", pa.string()),
        ("place", pa.string()),
        ("stage", pa.string()),
        ("flips", pa.int32()),
        ("n", pa.int32()),
        ("control", pa.int32()),
        ("control_n", pa.int32()),
        ("net", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)

IMAGES = pa.schema(
    [
        ("path", pa.string()),
        ("class_id", pa.int32()),
        ("label", pa.string()),
        ("score", pa.float32()),
        ("given_label", pa.string()),
        ("error_code", pa.string()),
        ("error_detail", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class AuditJob:
    """What is audited: a model on the images of a folder, with labels and masks if there are."""

    settings: Settings
    folder: Path
    labels: str | None
    masks: Path | None
    seed: int

    def identity(self, names: Sequence[str]) -> Identity:
        """What determines the results, without loading a model. Raises OSError."""
        return {
            "command": "audit",
            "algorithm": ALGORITHM,
            "source": text_of(self.folder.resolve()),
            "images": _hash("\n".join(names).encode()),
            "labels": self.labels and _content(Path(self.labels)),
            "masks": self.masks and _content(self.masks),
            "model": of_spec(model_specs(self.settings)[0]),
            "precision": self.settings.precision,
            "random_weights": self.settings.allow_random_weights,
            "seed": self.seed,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """The images that could be read, and the error (code, detail) of each that could not."""

    scanned: Scanned
    given: Sequence[str | None]
    failed: dict[str, tuple[str, str]]


def run(job: AuditJob, out: Path, fail_on: Sequence[str]) -> None:
    """Audit a folder. Raises typer.Exit(1) if a class has a verdict of `fail_on`."""
    if unknown := [each for each in fail_on if each not in VERDICTS]:
        raise ConfigurationError(
            f"--fail-on {unknown[0]}: there is no such verdict; give one of {', '.join(VERDICTS)}."
        )
    logs.configure_command()
    paths = listed(job.folder)
    names = [text_of(path.relative_to(job.folder)) for path in paths]
    given = read_labels(job.labels, job.folder, paths)
    masks = None if job.masks is None else Masks.read(job.masks)
    if masks is not None:
        count = masks.check(job.folder, paths)
        if count < len(paths):
            ERR.print(f"{count:,} of {len(paths):,} images have a mask.")
    try:
        identity = job.identity(names)
    except OSError as error:
        raise ConfigurationError(f"{error.filename}: {error.strerror or error}.") from error
    with open_results(out, identity) as results:
        model = model_loader(job.settings)(model_specs(job.settings)[0])
        results.check_model(of_model(model))
        rows = _audited(job, model, paths, given, masks, out)
    print_left_out([str(job.folder)])
    _conclude(rows, out, fail_on)


def _audited(  # noqa: PLR0917 - what a job has read
    job: AuditJob,
    model: LoadedModel,
    paths: Sequence[Path],
    given: Sequence[str | None],
    masks: Masks | None,
    out: Path,
) -> dict[str, Any]:
    """Scan and audit what is left, and write all results; they are returned as JSON."""
    model.check_classifies("camserve audit")
    passes = Passes.of(model)
    files = ImageFiles(
        model, paths, job.settings.max_pixels, DecodeBudget(job.settings.max_decode_bytes)
    )
    with Progress(console=ERR, disable=not ERR.is_terminal) as bars:
        images = _scanned(job, passes, files, given, masks, out, bars)
        states = list(_classes(job, passes, images.scanned, out, bars))
    nothing = next((state["nothing"] for state in states if state["nothing"]), None)
    found = as_json(model, len(images.scanned.names), nothing, [each["class"] for each in states])
    found["failed"] = [
        {"path": name, "code": code, "detail": detail}
        for name, (code, detail) in images.failed.items()
    ]
    page = audit_page.page(found, [state["card"] for state in states])
    _table(out / "images.parquet", _image_rows(model, images), IMAGES)
    _table(
        out / "trials.parquet",
        list(chain.from_iterable(map(_trial_rows, found["classes"]))),
        TRIALS,
    )
    write_whole(out / "audit.html", page.encode())
    write_whole(out / "audit.json", orjson.dumps(found, option=orjson.OPT_INDENT_2))
    return found


def _scanned(  # noqa: PLR0917 - as `_audited`
    job: AuditJob,
    passes: Passes,
    files: ImageFiles,
    given: Sequence[str | None],
    masks: Masks | None,
    out: Path,
    bars: Progress,
) -> Images:
    """Predict all images, or take what an interrupted run has predicted."""
    names = [text_of(path.relative_to(job.folder)) for path in files.paths]
    kept, failed, found = list[int](), dict[str, tuple[str, str]](), list[Tensor]()
    objects: list[Tensor | None] = []
    bar = bars.add_task("scanning", total=len(names))
    for start in range(0, len(names), CHUNK):
        some = range(start, min(start + CHUNK, len(names)))
        file = out / f"scan-{start // CHUNK:05}.npz"
        logits, problems = _stored(file) if file.exists() else _chunk(passes, files, some, file)
        kept += [index for index in some if str(index) not in problems]
        failed |= {names[int(index)]: (code, text) for index, (code, text) in problems.items()}
        found.append(logits)
        bars.advance(bar, len(some))
    if masks is not None:
        objects = [
            masks.mask(job.folder, files.paths[index], files.opened(index)[1]) for index in kept
        ]
    labels = class_ids(passes.model, [given[index] for index in kept])
    scanned = Scanned(
        ImageFiles(files.model, [files.paths[i] for i in kept], files.max_pixels, files.budget),
        torch.cat(found),
        labels,
        objects or [None] * len(kept),
        [names[index] for index in kept],
    )
    if not kept:
        first = next(iter(failed.items()))
        raise ConfigurationError(f"no image could be read; {first[0]}: {first[1][1]}")
    return Images(scanned, [given[index] for index in kept], failed)


def _chunk(
    passes: Passes, files: ImageFiles, some: range, file: Path
) -> tuple[Tensor, dict[str, tuple[str, str]]]:
    problems: dict[str, tuple[str, str]] = {}

    def readable() -> Iterator[Tensor]:
        for index in some:
            try:
                yield files.opened(index)[0]
            except CamserveError as error:
                problems[str(index)] = error.code, error.detail
            except OSError as error:
                problems[str(index)] = "unreadable_file", detail_of(error)

    logits = passes.logits(readable())
    with whole(file) as draft, draft.open("wb") as opened:
        text = np.frombuffer(orjson.dumps(problems), dtype=np.uint8)
        np.savez(opened, logits=logits.numpy(), problems=text)
    return logits, problems


def _stored(file: Path) -> tuple[Tensor, dict[str, tuple[str, str]]]:
    try:
        with np.load(file, allow_pickle=False) as found:
            return torch.from_numpy(found["logits"]), orjson.loads(found["problems"].tobytes())
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"{file} cannot be read ({error}). Remove it; its images are then scanned again."
        ) from error


def _classes(
    job: AuditJob, passes: Passes, scanned: Scanned, out: Path, bars: Progress
) -> Iterator[dict[str, Any]]:
    """The state of each class: its JSON, its part of the page; audited or read."""
    ids, casts = classes_in(scanned), None
    bar = bars.add_task("auditing", total=len(ids))
    for class_id in ids:
        file = out / f"class-{class_id:05}.json"
        if file.exists():
            yield orjson.loads(file.read_bytes())
        else:
            casts = casts or cast_images(passes, scanned, job.seed)
            one = audit_class(passes, scanned, casts, class_id, job.seed)
            label = passes.model.labels[casts.nothing[0]]
            state = {
                "class": one.as_json(),
                "card": audit_page.card(one),
                "nothing": [label, casts.nothing[1]],
            }
            write_whole(file, orjson.dumps(state))
            _told(one)
            yield state
        bars.advance(bar)


def _told(one: ClassAudit) -> None:
    places = ", ".join(finding.place for finding in one.findings if finding.confirmed)
    ERR.print(
        escape(f"{one.label}: {one.verdict}{f' ({places})' if places else ''}"), soft_wrap=True
    )


def _image_rows(model: LoadedModel, images: Images) -> list[dict[str, Any]]:
    scanned = images.scanned
    scores = model.scores(scanned.logits)
    rows: list[dict[str, Any]] = [
        {
            "path": name,
            "class_id": class_id,
            "label": model.labels[class_id],
            "score": float(scores[index, class_id]),
            "given_label": images.given[index],
        }
        for index, (name, class_id) in enumerate(zip(scanned.names, scanned.predicted, strict=True))
    ]
    rows += [
        {"path": name, "error_code": code, "error_detail": detail}
        for name, (code, detail) in images.failed.items()
    ]
    return sorted(rows, key=lambda row: row["path"])


def _trial_rows(one: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each search, and one for each finding that was measured again."""
    of_class = {"class_id": one["class_id"], "label": one["label"]}
    stages = [("search", trial) for trial in one["tried"]]
    stages += [("confirm", found) for found in one["findings"] if found["flips"]]
    for stage, found in stages:
        control = found["control"] or {"k": None, "n": None}
        yield of_class | {
            "kind": found["kind"],
            "place": found["place"],
            "stage": stage,
            "flips": found["flips"]["k"],
            "n": found["flips"]["n"],
            "control": control["k"],
            "control_n": control["n"],
            "net": found["net"],
            "low": found["interval"][0],
            "high": found["interval"][1],
        }


def _table(file: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    with whole(file) as draft:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), draft, compression="zstd")


def _conclude(found: dict[str, Any], out: Path, fail_on: Sequence[str]) -> None:
    """Print what was found, and exit with code 1 if `fail_on` is met."""
    verdicts = [one["verdict"] for one in found["classes"]]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in VERDICTS if v in verdicts)
    failed = f"; {len(found['failed']):,} images could not be read" if found["failed"] else ""
    ERR.print(
        f"{found['images']:,} images, {len(verdicts)} classes: {counts}{failed} → "
        f"{escape(text_of(out / 'audit.html'))}",
        soft_wrap=True,
    )
    if met := [each for each in fail_on if each in verdicts]:
        ERR.print(f"--fail-on {met[0]} is met.")
        raise typer.Exit(1)


def _content(path: Path) -> str:
    """The hash of a file; its name if it is none (`by-folder`)."""
    return _hash(path.read_bytes()) if path.is_file() else str(path)


def _hash(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
