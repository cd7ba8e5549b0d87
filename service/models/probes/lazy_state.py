"""State that a model keeps between two calls: lazily built constants, and other attributes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.jit import ScriptModule

from service.errors import ConfigurationError
from service.models.probes.condition import (
    ATTRIBUTE,
    MODULE_ATTRIBUTES,
    PARAMETERS_CHANGED,
    Condition,
    parts_of,
    same,
)
from service.models.probes.torch_state import kept_torch_state
from service.models.replicas import replicate


def resolve_lazy_state(master: nn.Module, image: Tensor, *, copied: bool = True) -> tuple[str, ...]:
    """Run a model on several images; copy its lazy constants into the master, and return its state.

    A constant is built by the first call, unchanged by the second, and built equally by another
    replica from another image: position tables, masks. Replicas get it with the master. State is
    written in every call, or depends on the image; it is named as in `Condition.faults`.

    image: normalised (1, C, H, W), whose shape noise images get.
    copied: whether requests run copies of the master; otherwise they run the master itself.

    Raises ConfigurationError if a call changes parameters, which all replicas share.
    """
    if isinstance(master, ScriptModule):  # shared by all replicas, with its state in C++
        return ()
    first = replicate(master) if copied else master
    began = Condition.of(first)
    try:
        with torch.no_grad():
            _call(first, _noise(image, 1))
        built, warm = began.changed(), Condition.of(first)
        with _writes(first) as written, torch.enable_grad():  # as for a gradient
            _call(first, _noise(image, 2))
    except Exception:  # noqa: BLE001 - a failure on noise is no reason to refuse the model
        return ()
    faults = {*warm.faults(), *(f"{ATTRIBUTE}{path}" for path in written)}
    if PARAMETERS_CHANGED in {*faults, *began.faults()}:
        raise ConfigurationError(
            "its forward() writes into its parameters, which all requests share; compute a new "
            "tensor there, or make it a buffer"
        )
    lazy = [path for path in built if f"{ATTRIBUTE}{path}" not in faults]
    constant = _constants(lazy, first, master, image) if copied else set(lazy)
    faults |= {f"{ATTRIBUTE}{path}" for path in lazy if path not in constant}
    return tuple(sorted(faults))


def _constants(lazy: list[str], first: nn.Module, master: nn.Module, image: Tensor) -> set[str]:
    """The paths that another replica builds equally from another image; copied into the master."""
    if not lazy:
        return set()
    second = replicate(master)
    try:
        with torch.no_grad():
            _call(second, _noise(image, 3))
    except Exception:  # noqa: BLE001 - as above
        return set()
    return {path for path in lazy if _transplanted(path, first, second, master)}


def _call(module: nn.Module, image: Tensor) -> None:
    with kept_torch_state(random=False):
        module(image)


def _noise(image: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(image.shape, generator=generator).to(image)


def _transplanted(path: str, first: nn.Module, second: nn.Module, master: nn.Module) -> bool:
    """Copy a value that two replicas have in common into the master; False if they differ."""
    parent, _, name = path.rpartition(".")
    mine, theirs, target = (vars(root.get_submodule(parent)) for root in (first, second, master))
    if name in mine["_buffers"]:
        mine, theirs, target = mine["_buffers"], theirs["_buffers"], target["_buffers"]
    if name not in mine or name not in theirs or not same(mine[name], theirs[name]):
        return False
    target[name] = mine[name]
    return True


@contextmanager
def _writes(module: nn.Module) -> Iterator[set[str]]:
    """The dotted paths of attributes that are assigned inside the `with`, also with equal values.

    Meanwhile each module has a subclass that records assignments.
    """
    written: set[str] = set()
    kinds: list[tuple[nn.Module, type]] = []
    for path, part in parts_of(module):
        kind = type(part)
        reacts = any("__init_subclass__" in vars(base) for base in kind.__mro__[:-1])
        if reacts or isinstance(part, ScriptModule | fx.GraphModule):
            continue

        def note(
            self: nn.Module, name: str, value: Any, *, path: str = path, kind: Any = kind
        ) -> None:
            if name not in MODULE_ATTRIBUTES and name != "__class__":
                written.add(f"{path}.{name}" if path else name)
            kind.__setattr__(self, name, value)

        object.__setattr__(part, "__class__", type(kind.__name__, (kind,), {"__setattr__": note}))
        kinds.append((part, kind))
    try:
        yield written
    finally:
        for part, kind in kinds:
            object.__setattr__(part, "__class__", kind)
