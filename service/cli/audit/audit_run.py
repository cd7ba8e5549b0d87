"""Run `camserve audit`: scan the images, audit the classes that are left, write the results."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.markup import escape
from rich.progress import Progress

from service import logs
from service.app import model_specs
from service.cli.audit import audit_page
from service.cli.audit.auditor import Auditor, AuditWork, Images, Kind
from service.cli.audit.labelled_images import Masks, listed, read_labels
from service.cli.bulk.identity import of_spec
from service.cli.bulk.job import RayResources, no_ray
from service.cli.bulk.result_folder import Identity, ResultFolder, open_results
from service.cli.flags import ERR, print_left_out
from service.durable import whole, write_whole
from service.errors import ConfigurationError
from service.evaluation.audit.audit import as_json, classes_in
from service.evaluation.audit.findings import Verdict
from service.images.image_files import text_of
from service.models.loaded import LoadedModel
from service.settings import Settings

VERDICTS: tuple[str, ...] = get_args(Verdict)

BARS: Mapping[Kind, str] = {"scan": "scanning", "class": "auditing"}

Do = Callable[[Kind, Sequence[int]], Iterable[int]]
"""Does the tasks of numbers; yields the number of each when its file is there."""

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


def run(
    job: AuditJob, out: Path, fail_on: Sequence[str], cluster: RayResources | None = None
) -> None:
    """Audit a folder, here or on Ray. Raises typer.Exit(1) for a class with a verdict of `fail_on`.

    Raises ConfigurationError.
    """
    if unknown := [each for each in fail_on if each not in VERDICTS]:
        raise ConfigurationError(
            f"--fail-on {unknown[0]}: there is no such verdict; give one of {', '.join(VERDICTS)}."
        )
    logs.configure_command()
    work = _read(job, out)
    try:
        identity = job.identity(work.names)
    except OSError as error:
        raise ConfigurationError(f"{error.filename}: {error.strerror or error}.") from error
    with open_results(out, identity) as results:
        found = _audited(work, results, cluster)
    print_left_out([str(job.folder)])
    _conclude(found, out, fail_on)


def _read(job: AuditJob, out: Path) -> AuditWork:
    paths = listed(job.folder)
    given = read_labels(job.labels, job.folder, paths)
    masks = None if job.masks is None else Masks.read(job.masks)
    if masks is not None:
        count = masks.check(job.folder, paths)
        if count < len(paths):
            ERR.print(f"{count:,} of {len(paths):,} images have a mask.")
    return AuditWork(job.settings, job.seed, job.folder, paths, given, masks, out)


def _audited(
    work: AuditWork, results: ResultFolder, cluster: RayResources | None
) -> dict[str, Any]:
    """Scan and audit what is left, and write all results; they are returned as JSON."""
    auditor = work.auditor(results)
    with (
        _doing(auditor, work, results, cluster) as do,
        Progress(console=ERR, disable=not ERR.is_terminal) as bars,
    ):
        for _ in _left(work, "scan", work.chunks, do, bars):
            pass
        ids = classes_in(auditor.images.scanned)
        for class_id in _left(work, "class", ids, do, bars):
            _told(_state(work, class_id)["class"])
    found = _written(work, auditor, [_state(work, class_id) for class_id in ids])
    write_whole(work.out / "audit.json", orjson.dumps(found, option=orjson.OPT_INDENT_2))
    return found


@contextmanager
def _doing(
    auditor: Auditor, work: AuditWork, results: ResultFolder, cluster: RayResources | None
) -> Iterator[Do]:
    """Yields what does tasks here or on Ray, and says of each when it is done."""
    if cluster is None:
        yield lambda kind, numbers: (auditor.run(kind, number) for number in numbers)
        return
    try:
        from service.cli.audit.audit_on_ray import actors  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise no_ray(error) from error
    with actors(work, results, cluster) as do:
        yield do


def _left(
    work: AuditWork, kind: Kind, numbers: Sequence[int], do: Do, bars: Progress
) -> Iterator[int]:
    """Do those tasks that have no file yet; yields the number of each when it is done."""
    left = [number for number in numbers if not work.file(kind, number).exists()]
    bar = bars.add_task(BARS[kind], total=len(numbers), completed=len(numbers) - len(left))
    for number in do(kind, left) if left else ():
        bars.advance(bar)
        yield number


def _state(work: AuditWork, class_id: int) -> dict[str, Any]:
    state: dict[str, Any] = orjson.loads(work.file("class", class_id).read_bytes())
    return state


def _written(work: AuditWork, auditor: Auditor, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write tables and report; returns the audit as JSON."""
    images, out = auditor.images, work.out
    nothing = next((state["nothing"] for state in states if state["nothing"]), None)
    classes = [each["class"] for each in states]
    found = as_json(auditor.model, len(images.scanned.names), nothing, classes)
    found["failed"] = [
        {"path": name, "code": code, "detail": detail}
        for name, (code, detail) in images.failed.items()
    ]
    page = audit_page.page(found, [state["card"] for state in states])
    _table(out / "images.parquet", _image_rows(auditor.model, images), IMAGES)
    _table(out / "trials.parquet", list(chain.from_iterable(map(_trial_rows, classes))), TRIALS)
    write_whole(out / "audit.html", page.encode())
    return found


def _told(one: dict[str, Any]) -> None:
    places = ", ".join(each["place"] for each in one["findings"] if each["confirmed"])
    text = f"{one['label']}: {one['verdict']}{f' ({places})' if places else ''}"
    ERR.print(escape(text), soft_wrap=True)


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
