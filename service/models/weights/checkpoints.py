"""The state dict in what a training script saved.

    found = checkpoint_tensors(checkpoint)             # every tensor below a name, at any depth
    chosen = select_weights(found, model.state_dict())  # those of the model, under its own keys

The rule: all keys of the model are there after one prefix, which may be names of dicts around the
state dict, names of modules around the model, or both. What `torch.compile` and wrappers for
several devices put between two names is taken out. Nothing else of the same dict is left over but
what training is known to leave: buffers of losses and metrics, counters of averages, and a moving
average (EMA) of the same weights.
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
"""Dicts inside one another that are looked into."""

_BETWEEN = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Names that wrappers put between those of the model."""

_OF_TRAINING = re.compile(
    r"(\w+_)?(criterions?|loss(es)?|loss_?(fn|func|function)s?|metrics?|acc|accuracy|auroc|f1)(_\w+)?"
    r"|(\w+_)?(class|pos)_weights?|n_averaged|num_updates|decay"
)
"""Names of modules and buffers that are known to be no part of a model."""

_AVERAGED = re.compile(
    r"(?:^|[._])(ema|swa|avg|averaged?|shadow|ema_?model|model_?ema)(?:[._]|$)", re.IGNORECASE
)
"""In prefixes of moving averages, such as `state_dict_ema`, `model_ema.module`, `swa_model`."""


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor. place: names of the dicts around it, joined by dots; key: its own name there."""

    place: str
    key: str
    tensor: Tensor

    @property
    def name(self) -> str:
        return f"{self.place}.{self.key}" if self.place else self.key


@dataclass(frozen=True, slots=True)
class SelectedWeights:
    """What of a checkpoint a model gets.

    tensors: under the model's own keys; where it does not fit, what is left over keeps its names.
    prefix:  what was taken off, with its last dot. fits: whether all keys of the model are there.
    dropped: names of what is known to be no part of a model. averaged: prefixes of moving averages
    that fit as well, and are not used. others: prefixes that fit as well, and have other values.
    """

    tensors: Mapping[str, Tensor]
    prefix: str = ""
    fits: bool = False
    dropped: Sequence[str] = ()
    averaged: Sequence[str] = ()
    others: Sequence[str] = ()


def checkpoint_tensors(found: Any, place: str = "", depth: int = 0) -> Iterator[CheckpointTensor]:
    """Every tensor of dicts inside one another whose keys are texts; lists count as dicts."""
    if isinstance(found, (list, tuple)):
        found = {str(index): each for index, each in enumerate(found) if isinstance(each, Mapping)}
    if not isinstance(found, Mapping) or depth > DEPTH:
        return
    for key, value in found.items():
        if not isinstance(key, str):  # an optimiser's state, by the number of the parameter
            continue
        if isinstance(value, Tensor):
            yield CheckpointTensor(place, key, value)
        else:
            yield from checkpoint_tensors(value, f"{place}.{key}" if place else key, depth + 1)


def select_weights(
    entries: Sequence[CheckpointTensor], wanted: Mapping[str, Tensor], under: str | None = None
) -> SelectedWeights:
    """What of a checkpoint fits a model best.

    wanted: the model's state dict. under: the names in front of what may be chosen.
    """
    if under is not None:
        entries = [_below(each, under) for each in entries if each.name.startswith(f"{under}.")]
    names, by_prefix = _spelt(entries, wanted)
    required = [key for key in wanted if not key.endswith("num_batches_tracked")] or list(wanted)
    fitting = [p for p, keys in by_prefix.items() if all(key in keys for key in required)]
    fitting = [p for p in fitting if _has_shapes(entries, by_prefix[p], wanted)] or fitting
    if not fitting:
        return _nearest(entries, names, by_prefix)
    plain = [p for p in fitting if not _AVERAGED.search(p.rstrip("."))] or fitting
    prefix, *rest = sorted(plain, key=lambda p: (p.count("."), p))
    keys = by_prefix[prefix]
    # What fits as it is is what a plain `load_state_dict` takes, whatever copies are beside it.
    others = [p for p in rest if prefix and not _same(entries, keys, by_prefix[p], required)]
    of_fitting = {index for p in fitting for index in by_prefix[p].values()}
    places = {entries[index].place for index in keys.values()}
    tensors = {key: entries[index].tensor for key, index in keys.items()}
    dropped = []
    for index, (entry, name) in enumerate(zip(entries, names, strict=True)):
        if entry.place not in places or index in of_fitting:
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
    """An entry as if what is under some names were the whole checkpoint."""
    if entry.place == under or entry.place.startswith(f"{under}."):
        return CheckpointTensor(entry.place[len(under) + 1 :], entry.key, entry.tensor)
    return CheckpointTensor("", entry.name[len(under) + 1 :], entry.tensor)


def _spelt(
    entries: Sequence[CheckpointTensor], wanted: Mapping[str, Tensor]
) -> tuple[list[str], dict[str, dict[str, int]]]:
    """The names as they fit best, with what is between them taken out; and what fits by prefix."""
    spellings = (
        lambda parts: parts,
        lambda parts: [part for part in parts if part not in _BETWEEN],
        # Of a part of the model that ran on several devices.
        lambda parts: parts[:1] + [p for p in parts[1:] if p not in _BETWEEN | {"module"}],
    )
    best: tuple[list[str], dict[str, dict[str, int]]] | None = None
    most = -1
    for spell in spellings:
        names = [".".join(spell(entry.name.split("."))) for entry in entries]
        found = _by_prefix(names, wanted)
        count = max(map(len, found.values()), default=0)
        if best is None or (count > most and len(set(names)) == len(names)):
            best, most = (names, found), count
    assert best is not None
    return best


def _by_prefix(names: Sequence[str], wanted: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """By each prefix the keys of the model that are there after it, with their places."""
    found: dict[str, dict[str, int]] = {}
    for index, name in enumerate(names):
        start = 0
        while True:
            if name[start:] in wanted:
                found.setdefault(name[:start], {})[name[start:]] = index
            dot = name.find(".", start)
            if dot < 0:
                break
            start = dot + 1
    return found


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
    """Whether two sets of weights are one, saved twice."""
    pairs = ((entries[one[key]].tensor, entries[other[key]].tensor) for key in keys)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _nearest(
    entries: Sequence[CheckpointTensor],
    names: Sequence[str],
    by_prefix: Mapping[str, Mapping[str, int]],
) -> SelectedWeights:
    """Where nothing fits: what has most of the model's keys, or else the most tensors."""
    if not by_prefix:
        count = Counter(entry.place for entry in entries)
        place = max(count, key=lambda each: count[each], default="")
        tensors = {each.key: each.tensor for each in entries if each.place == place}
        return SelectedWeights(tensors, f"{place}." if place else "")
    prefix = max(by_prefix, key=lambda p: (len(by_prefix[p]), -len(p)))
    places = {entries[index].place for index in by_prefix[prefix].values()}
    return SelectedWeights(
        {
            name.removeprefix(prefix) if name.startswith(prefix) else entry.key: entry.tensor
            for entry, name in zip(entries, names, strict=True)
            if entry.place in places
        },
        prefix,
    )
