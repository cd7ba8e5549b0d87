"""Find the state dict of a model in a checkpoint of a training script.

    found = checkpoint_tensors(checkpoint)             # every tensor below a name, at any depth
    chosen = select_weights(found, model.state_dict())  # those of the model, under its own keys

The rule: all keys of the model are present after one prefix, which may consist of names of dicts
around the state dict, names of modules around the model, or both. Names that `torch.compile` and
wrappers for several devices insert are removed. The same dict may contain nothing else but known
remainders of training: buffers of losses and metrics, counters of averages, and a moving average
(EMA) of the same weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEPTH = 8
"""Maximum depth of nested dicts."""

_BETWEEN = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Names that wrappers insert between those of the model."""

_OF_TRAINING = re.compile(
    r"(\w+_)?(criterions?|loss(es)?|loss_?(fn|func|function)s?|metrics?|acc|accuracy|auroc|f1)(_\w+)?"
    r"|(\w+_)?(class|pos)_weights?|n_averaged|num_updates|decay"
)
"""Names of modules and buffers of training that are not part of a model."""

_AVERAGED = re.compile(
    r"(?:^|[._])(ema|swa|avg|averaged?|shadow|ema_?model|model_?ema)(?:[._]|$)", re.IGNORECASE
)
"""Prefixes of moving averages, such as `state_dict_ema`, `model_ema.module`, `swa_model`."""


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor. parents: names of the dicts around it, joined by dots; key: its own name."""

    parents: str
    key: str
    tensor: Tensor

    @property
    def name(self) -> str:
        return f"{self.parents}.{self.key}" if self.parents else self.key


@dataclass(frozen=True, slots=True)
class SelectedWeights:
    """The tensors of a checkpoint that a model gets.

    tensors: under the keys of the model; unmatched tensors keep their names.
    prefix:  the removed prefix, with its last dot. fits: whether all keys of the model are present.
    dropped: names of tensors that are not part of a model. averaged: prefixes of moving averages
    that fit, too, and are not used. others: prefixes that fit, too, with different values.
    """

    tensors: Mapping[str, Tensor]
    prefix: str = ""
    fits: bool = False
    dropped: Sequence[str] = ()
    averaged: Sequence[str] = ()
    others: Sequence[str] = ()


def checkpoint_tensors(
    checkpoint: Any, parents: str = "", depth: int = 0
) -> Iterator[CheckpointTensor]:
    """Every tensor in nested dicts with string keys; lists count as dicts."""
    if isinstance(checkpoint, (list, tuple)):
        checkpoint = {
            str(index): item for index, item in enumerate(checkpoint) if isinstance(item, Mapping)
        }
    if not isinstance(checkpoint, Mapping) or depth > DEPTH:
        return
    for key, value in checkpoint.items():
        if not isinstance(key, str):  # the state of an optimiser, by the index of the parameter
            continue
        if isinstance(value, Tensor):
            yield CheckpointTensor(parents, key, value)
        else:
            yield from checkpoint_tensors(value, f"{parents}.{key}" if parents else key, depth + 1)


def select_weights(
    entries: Sequence[CheckpointTensor], wanted: Mapping[str, Tensor], under: str | None = None
) -> SelectedWeights:
    """Select the tensors of a checkpoint that fit a model best.

    wanted: the model's state dict. under: the prefix that the user requires.
    """
    if under is not None:
        entries = [_below(entry, under) for entry in entries if entry.name.startswith(f"{under}.")]
    names, by_prefix = _spelt(entries, wanted)
    required = [key for key in wanted if not key.endswith("num_batches_tracked")] or list(wanted)
    fitting = [p for p, keys in by_prefix.items() if all(key in keys for key in required)]
    fitting = [p for p in fitting if _has_shapes(entries, by_prefix[p], wanted)] or fitting
    if not fitting:
        return _nearest(entries, names, by_prefix)
    plain = [p for p in fitting if not _AVERAGED.search(p.rstrip("."))] or fitting
    prefix, *rest = sorted(plain, key=lambda p: (p.count("."), p))
    keys = by_prefix[prefix]
    # Without a prefix it is what a plain `load_state_dict` accepts, whatever else is there.
    others = [p for p in rest if prefix and not _same(entries, keys, by_prefix[p], required)]
    of_fitting = {index for p in fitting for index in by_prefix[p].values()}
    parents = {entries[index].parents for index in keys.values()}
    tensors = {key: entries[index].tensor for key, index in keys.items()}
    dropped = []
    for index, (entry, name) in enumerate(zip(entries, names, strict=True)):
        if entry.parents not in parents or index in of_fitting:
            continue
        left = name.removeprefix(prefix) if name.startswith(prefix) else entry.key
        if _is_of_training(entry.key) or _is_of_training(left):
            dropped.append(entry.key)
        else:
            tensors[left] = entry.tensor
    return SelectedWeights(
        tensors,
        f"{under}.{prefix}" if under else prefix,
        fits=True,
        dropped=dropped,
        averaged=[] if under else sorted(p for p in fitting if p not in plain),
        others=[p.rstrip(".") for p in (prefix, *others)] if others else [],
    )


def _is_of_training(key: str) -> bool:
    first = key.partition(".")[0]
    return bool(_OF_TRAINING.fullmatch(first) or _AVERAGED.search(first))


def _below(entry: CheckpointTensor, under: str) -> CheckpointTensor:
    """An entry relative to a prefix."""
    if entry.parents == under or entry.parents.startswith(f"{under}."):
        return CheckpointTensor(entry.parents[len(under) + 1 :], entry.key, entry.tensor)
    return CheckpointTensor("", entry.name[len(under) + 1 :], entry.tensor)


def _spelt(
    entries: Sequence[CheckpointTensor], wanted: Mapping[str, Tensor]
) -> tuple[list[str], dict[str, dict[str, int]]]:
    """The names in the spelling that fits best, without inserted names; and matches by prefix."""
    spellings = (
        lambda parts: parts,
        lambda parts: [part for part in parts if part not in _BETWEEN],
        # A part of the model that ran on several devices.
        lambda parts: parts[:1] + [p for p in parts[1:] if p not in _BETWEEN | {"module"}],
    )
    best: tuple[list[str], dict[str, dict[str, int]]] | None = None
    most = -1
    for spell in spellings:
        names = [".".join(spell(entry.name.split("."))) for entry in entries]
        by_prefix = _by_prefix(names, wanted)
        count = max(map(len, by_prefix.values()), default=0)
        if best is None or (count > most and len(set(names)) == len(names)):
            best, most = (names, by_prefix), count
    assert best is not None
    return best


def _by_prefix(names: Sequence[str], wanted: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """The keys of the model after each prefix, with their indices."""
    by_prefix: dict[str, dict[str, int]] = {}
    for index, name in enumerate(names):
        start = 0
        while True:
            if name[start:] in wanted:
                by_prefix.setdefault(name[:start], {})[name[start:]] = index
            dot = name.find(".", start)
            if dot < 0:
                break
            start = dot + 1
    return by_prefix


def _has_shapes(
    entries: Sequence[CheckpointTensor], keys: Mapping[str, int], wanted: Mapping[str, Tensor]
) -> bool:
    return all(entries[index].tensor.shape == wanted[key].shape for key, index in keys.items())


def _same(
    entries: Sequence[CheckpointTensor],
    one: Mapping[str, int],
    other: Mapping[str, int],
    keys: Sequence[str],
) -> bool:
    """Whether two sets of weights are equal."""
    pairs = ((entries[one[key]].tensor, entries[other[key]].tensor) for key in keys)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _nearest(
    entries: Sequence[CheckpointTensor],
    names: Sequence[str],
    by_prefix: Mapping[str, Mapping[str, int]],
) -> SelectedWeights:
    """If nothing fits: the set with most of the model's keys, otherwise with most tensors."""
    if not by_prefix:
        count = Counter(entry.parents for entry in entries)
        parent = max(count, key=count.__getitem__, default="")
        tensors = {entry.key: entry.tensor for entry in entries if entry.parents == parent}
        return SelectedWeights(tensors, f"{parent}." if parent else "")
    prefix = max(by_prefix, key=lambda p: (len(by_prefix[p]), -len(p)))
    parents = {entries[index].parents for index in by_prefix[prefix].values()}
    return SelectedWeights(
        {
            name.removeprefix(prefix) if name.startswith(prefix) else entry.key: entry.tensor
            for entry, name in zip(entries, names, strict=True)
            if entry.parents in parents
        },
        prefix,
    )
