"""The identity of a model: from its description before it is loaded, and from the loaded model."""

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
    """Return a description with each file as the hash of its content: files may have moved.

    Raises OSError if a file cannot be read.
    """
    identity = asdict(spec)
    del identity["source"], identity["device"]  # neither changes the answers
    return identity | {
        "labels": None if spec.labels is None else _labels(spec.labels),
        "weights": _content(spec.weights),
        "int8": None if spec.int8 is None else [_content(file) for file in _files(spec.int8)],
    }


def of_model(model: LoadedModel) -> Mapping[str, Any]:
    """Return what files and builders decide about a model, beyond its description."""
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
    return sorted(path for path in folder.iterdir() if path.is_file())


def _content(path: Path | None) -> str | None:
    """Return the sha256 of a file, or the name of weights that are not a file."""
    if path is None:
        return None
    if not path.exists():
        return str(path)
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _labels(labels: Sequence[str]) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(labels).encode()).hexdigest()}"
