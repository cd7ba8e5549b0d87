"""Weights files: reading them without running code, and saying what does not fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from service.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Weights:
    """A state dict, the text beside it, and the sha256 of where it came from."""

    tensors: Mapping[str, Tensor]
    sha256: str
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_weights(path: Path) -> Weights:
    """Read a safetensors file, or a state dict that `torch.save` wrote (`weights_only=True`).

    Raises ConfigurationError where the file is missing, is neither, or would run code.
    """
    try:
        sha256 = _sha256(path)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                names = file.keys()
                return Weights({name: file.get_tensor(name) for name in names}, sha256, metadata)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the weights file {path}: {error.strerror}."
        ) from error
    except SafetensorError as error:
        raise ConfigurationError(f"{path} is not a safetensors file: {error}.") from error
    except Exception as error:  # torch.load raises almost anything for a file that is not its own
        raise ConfigurationError(
            f"{path} is not a state dict that can be read without running code. Save it again "
            "with torch.save(model.state_dict(), …) or as safetensors."
        ) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ConfigurationError(
            f"{path} holds {type(found).__name__}, not a state dict of tensors. Save it again "
            "with torch.save(model.state_dict(), …)."
        )
    return Weights(dict(found), sha256)


def load_into(module: nn.Module, weights: Weights, source: str) -> None:
    """Copy every tensor of `weights` into `module`.

    Raises ConfigurationError that lists missing, unexpected and mis-shaped keys.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in weights.tensors]
    unexpected = [key for key in weights.tensors if key not in wanted]
    misshaped = [
        f"{key}: {tuple(weights.tensors[key].shape)} in the file, {tuple(wanted[key].shape)} here"
        for key in wanted
        if key in weights.tensors and weights.tensors[key].shape != wanted[key].shape
    ]
    # A counter that inference never reads; files converted from other formats lack it.
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected or misshaped:
        raise ConfigurationError(
            f"{source} does not fit the model. {_few('missing', missing)}"
            f"{_few('unexpected', unexpected)}{_few('wrong shape', misshaped)}"
            "Is it the weights of another architecture?"
        )
    module.load_state_dict(dict(weights.tensors), strict=False)


def classes_in(module: nn.Module, weights: Weights, default: int = 1000) -> int:
    """How many classes the file has: the first dimension where only the head's shape differs."""
    for key, tensor in module.state_dict().items():
        other = weights.tensors.get(key)
        if other is not None and other.ndim and tensor.ndim and tensor.shape[:1] == (default,):
            return int(other.shape[0])
    return default


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of a state dict: names, dtypes, shapes and bytes in order of name."""
    hasher = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        hasher.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def labels_in(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """The labels that a safetensors file carries as a JSON list, or None."""
    if "labels" not in metadata:
        return None
    try:
        labels: Any = json.loads(metadata["labels"])
    except ValueError:
        labels = None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ConfigurationError("the metadata `labels` of the weights file is not a JSON list.")
    return tuple(labels)


def _few(what: str, keys: list[str], count: int = 5) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return f"{what}: {', '.join(keys[:count])}{more}. "


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
