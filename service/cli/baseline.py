"""`camserve baseline`: distributions of a model's answers on known images, to watch for drift."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import typer
from rich.markup import escape

from service import logs
from service.cli.flags import ERR, OF_MODELS, explain_options, with_settings
from service.errors import ConfigurationError, install_hint
from service.settings import Settings

COLUMNS = ("model", "version", "label", "score", "answer")
"""Of the Parquet files of `camserve bulk`; rows with an error have no label."""


@with_settings(OF_MODELS)
def baseline(
    settings: Settings,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="Folder of images, or results of `camserve bulk`: their folder or a Parquet file.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("baseline.json"),
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify",
            help="Test each map, and record its verdict; for services whose clients ask for it.",
        ),
    ] = False,
) -> None:
    """Write the distributions of a model's answers, to watch a service for drift.

    Serve with --baseline FILE: the last 500 answers are compared with it, as metrics.
    """
    from service.durable import write_whole  # noqa: PLC0415
    from service.evaluation.drift import Baseline  # noqa: PLC0415 - loads torch

    logs.configure_command()
    if not out.absolute().parent.is_dir():
        raise ConfigurationError(f"--out {out}: there is no folder {out.parent}.")
    shards = _shards(source)
    known = _from_results(shards) if shards else _from_images(settings, source, verify=verify)
    made = Baseline.of(known.model, known.version, known.method, known.layers, known.observed)
    try:
        write_whole(out, made.write())
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be written: {error.strerror}.") from error
    left = f", {known.failed} left out" if known.failed else ""
    ERR.print(f"{made.images} images{left} → {escape(str(out))}", soft_wrap=True)


@dataclass(slots=True)
class _Known:
    """Observations of one model's answers; `failed`: images without an answer."""

    model: str = ""
    version: str = ""
    method: str = ""
    layers: tuple[str, ...] = ()
    observed: list[Any] = field(default_factory=list)
    failed: int = 0


def _shards(source: Path) -> Sequence[Path]:
    """The Parquet files of a run of bulk; none if the source is images."""
    if source.suffix == ".parquet":
        return [source]
    return sorted(source.glob("part-*.parquet")) if source.is_dir() else []


def _from_images(settings: Settings, folder: Path, *, verify: bool) -> _Known:
    """Explain images as the service does by default."""
    from service.app import build_service  # noqa: PLC0415 - loads torch
    from service.cli.explain_files import Explained, explain_files  # noqa: PLC0415
    from service.evaluation.drift import observe  # noqa: PLC0415
    from service.images.image_files import find_images  # noqa: PLC0415

    images = find_images([folder])
    options = explain_options(verify="true" if verify else "false")
    service = build_service(settings.uncompiled())
    known = _Known()
    with explain_files(service, images, options, (), ERR) as outcomes:
        for outcome in outcomes:
            if not isinstance(outcome, Explained):
                known.failed += 1
                continue
            model, best = outcome.model, outcome.answer.predictions[0]
            found = outcome.answer.explanations[0]
            verdict = None if found.verdict is None else found.verdict.verdict
            known.model, known.version = model.name, model.version
            known.method, known.layers = found.method, found.layers
            label = model.labels[best.class_id]
            pixels = outcome.upload.model_input.pixels.numpy()
            known.observed.append(observe(label, best.score, found.grid, verdict, pixels))
    return known


def _from_results(shards: Sequence[Path]) -> _Known:
    """Read the rows of `camserve bulk`. Raises ConfigurationError."""
    from service.evaluation.drift import observe  # noqa: PLC0415

    known = _Known()
    for shard in shards:
        for row in _rows(shard):
            if row["label"] is None:
                known.failed += 1
                continue
            try:
                explanation = orjson.loads(row["answer"])["explanations"][0]
                layer = explanation["layer"]
                layers = () if layer is None else (layer,) if isinstance(layer, str) else layer
                source = row["model"], row["version"], explanation["method"], tuple(layers)
                grid = _grid(explanation["grid"])
                verdict = (explanation.get("verify") or {}).get("verdict")
            except (ValueError, KeyError, IndexError, TypeError, binascii.Error) as error:
                raise ConfigurationError(
                    f"{shard}: a row's `answer` has no map ({type(error).__name__} {error}); a "
                    "baseline needs results of camserve bulk with explanations."
                ) from error
            before = known.model, known.version, known.method, known.layers
            if known.observed and source != before:
                raise ConfigurationError(
                    f"{shard} holds answers of {source}, and the rows before it of {before}; a "
                    "baseline is of one model, method and layer."
                )
            known.model, known.version, known.method, known.layers = source
            known.observed.append(observe(row["label"], row["score"], grid, verdict))
    return known


def _rows(shard: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError as error:
        raise ConfigurationError(
            f"reading Parquet needs {error.name}, which is not installed: {install_hint('bulk')}."
        ) from error
    try:
        for batch in pq.ParquetFile(shard).iter_batches(256, columns=list(COLUMNS)):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ConfigurationError(f"{shard} cannot be read: {error}.") from error


def _grid(found: Any) -> Any:
    """The map of a wire grid, float32 (h, w). Raises ValueError, KeyError or TypeError."""
    values = np.frombuffer(base64.b64decode(found["data"]), dtype="<f4")
    return values.reshape(found["shape"]).astype(np.float32)
