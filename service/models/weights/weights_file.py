"""Read weights files without running code, load them, and report what does not fit."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from service.errors import ConfigurationError, nearest
from service.models.weights.checkpoints import (
    CheckpointTensor,
    SelectedWeights,
    checkpoint_tensors,
    select_weights,
)
from service.models.weights.labels import labels_of_text
from service.models.weights.unpickling import read_inert

_log = structlog.get_logger(__name__)

SHOWN = 5
"""Number of keys of each kind that an error lists."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The contents of a weights file: tensors, metadata, and the sha256 of the file.

    key: the prefix that the user chose (`checkpoints.select_weights`); None: it is found.
    """

    entries: Sequence[CheckpointTensor]
    sha256: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None

    @property
    def version(self) -> str:
        """The sha256 of the file; different for another set of weights in the same file."""
        if self.key is None:
            return self.sha256
        return hashlib.sha256(f"{self.sha256} {self.key}".encode()).hexdigest()


def read_weights(
    path: Path, sha256: str | None = None, where: str | None = None, key: str | None = None
) -> Weights:
    """Read a safetensors file or a file of `torch.save`; nothing in it is executed.

    sha256: the expected digest; another file is not opened.
    key:    prefix of the weights to use, such as `state_dict_ema`; None: it is found.
    where:  beginning of errors, such as `models.toml: model[0].weights`.

    Raises ConfigurationError if the file is missing, has another format, or would run code.
    """
    name = f"{where}: {path}" if where else f"{path}"
    try:
        file_sha256 = _sha256(path)
    except OSError as error:
        beside = [each.name for each in path.parent.glob("*")]
        raise ConfigurationError(
            f"{where + ': ' if where else ''}cannot read the weights file {path}: {error.strerror}."
            f"{nearest(path.name, beside, 1)}"
        ) from error
    if sha256 is not None and file_sha256 != sha256.lower():
        raise ConfigurationError(
            f"{name} has the sha256 {file_sha256}, not {sha256}; it is not the pinned "
            "file, and was not opened."
        )
    if path.suffix == ".safetensors":
        metadata, entries = _read_safetensors(path, name)
    else:
        metadata, entries = {}, _state_dicts(_unpickled(path, name), name)
    if key is not None and not any(entry.name.startswith(f"{key}.") for entry in entries):
        known = sorted({entry.name.partition(".")[0] for entry in entries})
        raise ConfigurationError(
            f"{name} has no weights under weights_key {key!r}; its names begin with "
            f"{', '.join(known[:SHOWN])}{' …' if len(known) > SHOWN else ''}."
        )
    return Weights(entries, file_sha256, metadata, key)


def _read_safetensors(path: Path, name: str) -> tuple[dict[str, str], list[CheckpointTensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            keys = file.keys()
            return metadata, [CheckpointTensor("", key, file.get_tensor(key)) for key in keys]
    except (SafetensorError, OSError) as error:
        raise ConfigurationError(f"{name} is not a safetensors file: {error}.") from error


def _unpickled(path: Path, name: str) -> Any:
    try:
        return read_inert(path)
    except Exception as error:  # torch.load raises many types for other files
        program = _program_in(path)
        if program:
            raise ConfigurationError(
                f"{name} is {program[0]}, a program and not weights: serve it by a function, "
                f"def build(): return {program[1]}, with --model MODULE:build."
            ) from error
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" It tries to run {wanted[1]}, which was refused." if wanted else ""
        raise ConfigurationError(
            f"{name} is not a state dict that can be read without running code.{what} Save it "
            "again with torch.save(model.state_dict(), …) or as safetensors."
        ) from error


def _program_in(path: Path) -> tuple[str, str] | None:
    """What a file of TorchScript or torch.export is, and the call that loads it; else None."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
    if "constants.pkl" in names:
        return "a TorchScript file", f"torch.jit.load({path.name!r})"
    if "archive_format" in names or any("exported_program" in name for name in names):
        return "an exported program", f"torch.export.load({path.name!r}).module()"
    return None


def _state_dicts(checkpoint: Any, name: str) -> list[CheckpointTensor]:
    """The tensors of every state dict in a checkpoint."""
    entries = list(checkpoint_tensors(checkpoint))
    if not entries:
        raise ConfigurationError(
            f"{name} holds {type(checkpoint).__name__}, not a state dict of tensors. Save it again "
            "with torch.save(model.state_dict(), …)."
        )
    return entries


def load_into(
    module: nn.Module,
    weights: Weights,
    source: str,
    unused: Callable[[str], object] | None = None,
) -> None:
    """Copy the matching tensors of `weights` into a module (`checkpoints.select_weights`).

    unused: whether a key that the module lacks belongs to a part that predictions do not need.

    Raises ConfigurationError with missing, unexpected and mis-shaped keys, or with several sets of
    weights that fit.
    """
    wanted = module.state_dict()
    chosen = selected_from(weights, wanted, source)
    spare = [key for key in chosen.tensors if unused and key not in wanted and unused(key)]
    tensors = {key: value for key, value in chosen.tensors.items() if key not in spare}
    _log_selection(chosen, spare, source)
    # A counter that inference does not use; files converted from other formats lack it.
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
            f"{source} does not fit the model. {_listed('missing', close)}"
            f"{_listed('unexpected', unexpected)}{_listed('wrong shape', misshaped)}"
            f"{_suggestion(chosen, only_more=not missing and not misshaped)}"
        )
    module.load_state_dict(tensors, strict=False)


def _suggestion(chosen: SelectedWeights, *, only_more: bool) -> str:
    under = chosen.prefix.rstrip(".")
    if not (chosen.fits and only_more and under):
        return "Is it the weights of another architecture?"
    return (
        f"All keys of the model are there under {under!r}: serve the whole trained model, or "
        f"ignore the rest with weights_key = {json.dumps(under)} in models.toml."
    )


def selected_from(weights: Weights, wanted: Mapping[str, Tensor], source: str) -> SelectedWeights:
    """Select the tensors that fit a model's state dict best (`checkpoints.select_weights`).

    Raises ConfigurationError if several sets of weights fit.
    """
    chosen = select_weights(weights.entries, wanted, weights.key)
    if chosen.others:
        names = [f"{weights.key}.{prefix}" if weights.key else prefix for prefix in chosen.others]
        raise ConfigurationError(
            f"{source} holds several weights that fit the model: "
            f"{', '.join(map(repr, names))}. Choose one with weights_key in "
            f"models.toml, for instance weights_key = {json.dumps(names[0])}."
        )
    return chosen


def _log_selection(chosen: SelectedWeights, spare: Sequence[str], source: str) -> None:
    """Log what was used of a file that contains more than the keys of the model."""
    details = {
        "under": chosen.prefix.rstrip("."),
        "dropped": _first_keys([*chosen.dropped, *spare]),
        "averages_not_used": ", ".join(prefix.rstrip(".") for prefix in chosen.averaged),
    }
    if chosen.fits and any(details.values()):
        _log.info("weights_taken", source=source, **{k: v for k, v in details.items() if v})


def _with_nearest(key: str, unexpected: list[str]) -> str:
    close = difflib.get_close_matches(key, unexpected, n=1, cutoff=0.6)
    return f"{key} (the file has {close[0]})" if close else key


def shapes_fit(module: nn.Module, weights: Weights, source: str) -> bool:
    """Whether weights with the keys of the module have its shapes; True for other keys.

    Raises ConfigurationError if several sets of weights fit.
    """
    wanted = module.state_dict()
    chosen = selected_from(weights, wanted, source)
    pairs = ((chosen.tensors[key], wanted[key]) for key in chosen.tensors if key in wanted)
    return not chosen.fits or all(tensor.shape == other.shape for tensor, other in pairs)


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
    """The labels in the metadata, as JSON, or None. Raises ConfigurationError."""
    if "labels" not in metadata:
        return None
    try:
        return labels_of_text(metadata["labels"], ".json")
    except ValueError as error:
        raise ConfigurationError(
            f"the metadata `labels` of the weights file {error}; it must be a JSON list of strings."
        ) from error


def _first_keys(keys: Sequence[str], count: int = SHOWN) -> str:
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return f"{', '.join(keys[:count])}{more}"


def _listed(what: str, keys: list[str], count: int = SHOWN) -> str:
    return f"{what}: {_first_keys(keys, count)}. " if keys else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
