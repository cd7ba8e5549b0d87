"""What makes a model the same one: of its description before it is loaded, and once it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from service.models.catalog import ModelSpec
from service.models.loaded import LoadedModel


def of_spec(spec: ModelSpec) -> Mapping[str, Any]:
    """A description, files by what is in them: the same weights may lie elsewhere.

    Raises OSError where a file cannot be read.
    """
    said = asdict(spec)
    del said["source"], said["device"]  # where it was described and runs: the numbers are the same
    return said | {
        "labels": None if spec.labels is None else _labels(spec.labels),
        "weights": _content(spec.weights),
        "int8": None if spec.int8 is None else [_content(each) for each in _files(spec.int8)],
    }


def of_model(model: LoadedModel) -> Mapping[str, Any]:
    """A model as it was loaded: what its description leaves to files and builders, too."""
    return {
        "name": model.name,
        "version": model.version,
        "labels": _labels(model.labels),
        "classes": len(model.labels),
        "target_layer": model.target_layer,
        "input": asdict(model.preprocessing),
        "output": model.output,
        "select": model.select,
        "random_weights": model.random_weights,
    }


def _files(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.is_file())


def _content(path: Path | None) -> str | None:
    """The sha256 of a file; a name of weights that are no file is itself."""
    if path is None:
        return None
    if not path.exists():
        return str(path)
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _labels(labels: Sequence[str]) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(labels).encode()).hexdigest()}"
