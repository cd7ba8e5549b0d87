"""Weights files: reading them without running code, and saying what does not fit."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from service.errors import ConfigurationError
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
"""How many keys of a kind a report names."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What a weights file holds: tensors, the text beside them, and the sha256 of the file.

    key: the prefix that the user chose (`checkpoints.select_weights`); None: it is found.
    """

    entries: Sequence[CheckpointTensor]
    sha256: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None

    @property
    def version(self) -> str:
        """The sha256 of the file; of another set of weights in the same file it is another one."""
        if self.key is None:
            return self.sha256
        return hashlib.sha256(f"{self.sha256} {self.key}".encode()).hexdigest()


def read_weights(
    path: Path, sha256: str | None = None, where: str | None = None, key: str | None = None
) -> Weights:
    """Read a safetensors file, or what `torch.save` wrote; nothing in it is executed.

    sha256: what the file must have; one that has not is not opened.
    key:    names in front of the weights to use, such as `state_dict_ema`; None finds them.
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
            f"{name} has the sha256 {found}, not {sha256}; it is not the pinned "
            "file, and was not opened."
        )
    if path.suffix == ".safetensors":
        metadata, entries = _read_safetensors(path, name)
    else:
        metadata, entries = {}, _state_dicts(_unpickled(path, name), name)
    if key is not None and not any(each.name.startswith(f"{key}.") for each in entries):
        known = sorted({each.name.partition(".")[0] for each in entries})
        raise ConfigurationError(
            f"{name} has no weights under weights_key {key!r}; its names begin with "
            f"{', '.join(known[:SHOWN])}{' …' if len(known) > SHOWN else ''}."
        )
    return Weights(entries, found, metadata, key)


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
    except Exception as error:  # torch.load raises almost anything for a file that is not its own
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" It tries to run {wanted[1]}, which was refused." if wanted else ""
        raise ConfigurationError(
            f"{name} is not a state dict that can be read without running code.{what} Save it "
            "again with torch.save(model.state_dict(), …) or as safetensors."
        ) from error


def _state_dicts(found: Any, name: str) -> list[CheckpointTensor]:
    """The tensors of every state dict in what training scripts save around it."""
    entries = list(checkpoint_tensors(found))
    if not entries:
        raise ConfigurationError(
            f"{name} holds {type(found).__name__}, not a state dict of tensors. Save it again "
            "with torch.save(model.state_dict(), …)."
        )
    return entries


def load_into(
    module: nn.Module,
    weights: Weights,
    source: str,
    unused: Callable[[str], object] | None = None,
) -> None:
    """Copy the tensors of `weights` that are the module's into it (`checkpoints.select_weights`).

    unused: whether a key that the module lacks is of a part that predictions do not need.

    Raises ConfigurationError that lists missing, unexpected and mis-shaped keys, or the several
    sets of weights that fit.
    """
    wanted = module.state_dict()
    chosen = selected_from(weights, wanted, source)
    spare = [key for key in chosen.tensors if unused and key not in wanted and unused(key)]
    tensors = {key: value for key, value in chosen.tensors.items() if key not in spare}
    _tell(chosen, spare, source)
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
            f"{_way_out(chosen, only_more=not missing and not misshaped)}"
        )
    module.load_state_dict(tensors, strict=False)


def _way_out(chosen: SelectedWeights, *, only_more: bool) -> str:
    under = chosen.prefix.rstrip(".")
    if not (chosen.fits and only_more and under):
        return "Is it the weights of another architecture?"
    return (
        f"All keys of the model are there under {under!r}: serve the whole trained model, or "
        f"ignore the rest with weights_key = {json.dumps(under)} in models.toml."
    )


def selected_from(weights: Weights, wanted: Mapping[str, Tensor], source: str) -> SelectedWeights:
    """What of a weights file fits a model's state dict best (`checkpoints.select_weights`).

    Raises ConfigurationError where several weights fit.
    """
    chosen = select_weights(weights.entries, wanted, weights.key)
    if chosen.others:
        names = [f"{weights.key}.{each}" if weights.key else each for each in chosen.others]
        raise ConfigurationError(
            f"{source} holds several weights that fit the model: "
            f"{', '.join(repr(each) for each in names)}. Choose one with weights_key in "
            f"models.toml, for instance weights_key = {json.dumps(names[0])}."
        )
    return chosen


def _tell(chosen: SelectedWeights, spare: Sequence[str], source: str) -> None:
    """Say in one line what was taken of a file that holds more than the model's own keys."""
    said = {
        "under": chosen.prefix.rstrip("."),
        "dropped": _few_of([*chosen.dropped, *spare]),
        "averages_not_used": ", ".join(each.rstrip(".") for each in chosen.averaged),
    }
    if chosen.fits and any(said.values()):
        _log.info("weights_taken", source=source, **{k: v for k, v in said.items() if v})


def _with_nearest(key: str, unexpected: list[str]) -> str:
    close = difflib.get_close_matches(key, unexpected, n=1, cutoff=0.6)
    return f"{key} (the file has {close[0]})" if close else key


def shapes_fit(module: nn.Module, weights: Weights, source: str) -> bool:
    """Whether the weights that have the module's keys have its shapes, too; True for other keys.

    Raises ConfigurationError where several weights fit.
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
    """The labels that a safetensors file carries as JSON, or None. Raises ConfigurationError."""
    if "labels" not in metadata:
        return None
    try:
        return labels_of_text(metadata["labels"], ".json")
    except ValueError as error:
        raise ConfigurationError(
            f"the metadata `labels` of the weights file {error}; it must be a JSON list of strings."
        ) from error


def _few_of(keys: Sequence[str], count: int = SHOWN) -> str:
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return f"{', '.join(keys[:count])}{more}"


def _few(what: str, keys: list[str], count: int = SHOWN) -> str:
    return f"{what}: {_few_of(keys, count)}. " if keys else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
