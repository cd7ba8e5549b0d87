"""Weights files: reading them without running code, and saying what does not fit."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, permutations
from pathlib import Path
from typing import Any

import structlog
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from service.errors import ConfigurationError

_log = structlog.get_logger(__name__)

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts save the state dict."""

PREFIXES = ("module.", "model.", "_orig_mod.")
"""What DataParallel, Lightning and torch.compile put before every key."""

SHOWN = 5
"""How many keys of a kind a report names."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A state dict, the text beside it, and the sha256 of where it came from."""

    tensors: Mapping[str, Tensor]
    sha256: str
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_weights(path: Path, sha256: str | None = None, where: str | None = None) -> Weights:
    """Read a safetensors file, or a state dict that `torch.save` wrote (`weights_only=True`).

    sha256: what the file must have; one that has not is not opened.
    where:  how errors begin, such as `models.toml: model[0].weights`.

    Raises ConfigurationError where the file is missing, is neither, or would run code.
    """
    name = f"{where}: {path}" if where else f"{path}"
    try:
        found = _sha256(path)
    except OSError as error:
        raise ConfigurationError(
            f"{where + ': ' if where else ''}cannot read the weights file {path}: {error.strerror}."
        ) from error
    if sha256 is not None and found != sha256.lower():
        raise ConfigurationError(
            f"{name} has the sha256 {found}, not {sha256}; it is another file than the one that "
            "was pinned, and was not opened."
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path, name, found)
    return Weights(_unwrapped(_unpickled(path, name), name), found)


def _read_safetensors(path: Path, name: str, sha256: str) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"{name} is not a safetensors file: {error}.") from error
    return Weights(tensors, sha256, metadata)


def _unpickled(path: Path, name: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises almost anything for a file that is not its own
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" It wants to run {wanted[1]}, which was not done." if wanted else ""
        raise ConfigurationError(
            f"{name} is not a state dict that can be read without running code.{what} Save it "
            "again with torch.save(model.state_dict(), …) or as safetensors."
        ) from error


def _unwrapped(found: Any, name: str) -> dict[str, Tensor]:
    """The state dict in what training scripts save around it."""
    inside: list[str] = []
    while isinstance(found, Mapping):
        wrapper = next((key for key in WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if wrapper is None:
            break
        inside.append(wrapper)
        found = found[wrapper]
    if inside:
        _log.info("weights_unwrapped", file=name, found_under=".".join(inside))
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ConfigurationError(
            f"{name} holds {type(found).__name__}, not a state dict of tensors. Save it again "
            "with torch.save(model.state_dict(), …)."
        )
    return dict(found)


def load_into(module: nn.Module, weights: Weights, source: str) -> None:
    """Copy every tensor of `weights` into `module`; prefixes that wrappers leave are taken off.

    Raises ConfigurationError that lists missing, unexpected and mis-shaped keys.
    """
    wanted = module.state_dict()
    tensors, prefixes = _without_prefixes(weights.tensors, wanted)
    if prefixes:
        _log.info("weights_prefixes_removed", source=source, prefixes=prefixes)
    # A counter that inference never reads; files converted from other formats lack it.
    missing = [
        key for key in wanted if key not in tensors and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in tensors if key not in wanted]
    misshaped = [
        f"{key}: {tuple(tensors[key].shape)} in the file, {tuple(wanted[key].shape)} here"
        for key in wanted
        if key in tensors and tensors[key].shape != wanted[key].shape
    ]
    if missing or unexpected or misshaped:
        close = [_with_nearest(key, unexpected) for key in missing[:SHOWN]] + missing[SHOWN:]
        raise ConfigurationError(
            f"{source} does not fit the model. {_few('missing', close)}"
            f"{_few('unexpected', unexpected)}{_few('wrong shape', misshaped)}"
            "Is it the weights of another architecture?"
        )
    module.load_state_dict(tensors, strict=False)


def _without_prefixes(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Any]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the keys that fit best, and the prefixes that were taken off for it.

    A prefix is taken off where most keys have it; the others stay as they are, and are reported if
    nothing wants them.
    """
    best, taken = dict(tensors), list[str]()
    for prefixes in chain.from_iterable(permutations(PREFIXES, n) for n in (1, 2, 3)):
        shorter = tensors
        for prefix in prefixes:
            if 2 * sum(key.startswith(prefix) for key in shorter) <= len(shorter):
                break
            shorter = {key.removeprefix(prefix): value for key, value in shorter.items()}
        fits = sum(key in wanted for key in shorter)
        if len(shorter) == len(tensors) and fits > sum(key in wanted for key in best):
            best, taken = dict(shorter), list(prefixes)
    return best, taken


def _with_nearest(key: str, unexpected: list[str]) -> str:
    close = difflib.get_close_matches(key, unexpected, n=1, cutoff=0.6)
    return f"{key} (the file has {close[0]})" if close else key


def classes_in(module: nn.Module, weights: Weights, default: int = 1000) -> int:
    """How many classes the file has: the first dimension where only the head's shape differs."""
    wanted = module.state_dict()
    tensors, _ = _without_prefixes(weights.tensors, wanted)
    for key, tensor in wanted.items():
        other = tensors.get(key)
        if other is not None and other.ndim and tensor.ndim and tensor.shape[:1] == (default,):
            return int(other.shape[0])
    return default


def digest(state: Mapping[str, Any]) -> str:
    """The sha256 of a state dict: names, dtypes, shapes and bytes in order of name."""
    hasher = hashlib.sha256()
    for key, value in sorted(state.items()):
        _digest_into(hasher, key, value)
    return hasher.hexdigest()


def _digest_into(hasher: Any, key: str, value: object) -> None:
    if isinstance(value, (tuple, list)):  # the packed weights of quantised layers
        for index, part in enumerate(value):
            _digest_into(hasher, f"{key}[{index}]", part)
    elif isinstance(value, Tensor):
        tensor = value.detach().cpu()
        tensor = (tensor.int_repr() if tensor.is_quantized else tensor).contiguous()
        hasher.update(f"{key} {value.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    else:
        hasher.update(f"{key} {value!r}\n".encode())


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


def _few(what: str, keys: list[str], count: int = SHOWN) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return f"{what}: {', '.join(keys[:count])}{more}. "


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
