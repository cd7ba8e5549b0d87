"""Models that keep something from one call for the next, and models that change torch itself."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tiny import SmallNet
from torch import Tensor, nn


class Keeping(SmallNet):
    """Answers as `SmallNet` does, moved by what it kept of the call before; see `KEEPS`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.last: Any = None
        self.seen: list[Tensor] = []
        self.recent: deque[Tensor] = deque(maxlen=3)
        self.table: dict[str, Any] = {}
        self.deep: dict[str, Any] = {"a": [None]}
        self.names: set[int] = set()
        self.thing = Thing()
        self.hidden = [nn.Linear(2, 2)]
        self.array = np.zeros(3)
        self.memory = torch.zeros(1)
        self.register_buffer("held", torch.zeros(1))
        self.register_buffer("absent", None)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        moved = KEEPS[self.kind](self, x.mean().detach())
        return super().forward(x) + moved


class Thing:
    """An object of a user's own."""

    value: Any = 0.0


def _attribute(model: Keeping, mean: Tensor) -> Any:
    kept, model.last = model.last, mean
    return 0.0 if kept is None else kept


def _added_attribute(model: Keeping, mean: Tensor) -> Any:
    kept = getattr(model.head, "kept", 0.0)
    model.head.kept = mean
    return kept


def _list(model: Keeping, mean: Tensor) -> Any:
    kept = sum(model.seen, torch.zeros(()))
    model.seen.append(mean)
    return kept


def _ring(model: Keeping, mean: Tensor) -> Any:
    kept = sum(model.recent, torch.zeros(()))
    model.recent.append(mean)
    return kept


def _table(model: Keeping, mean: Tensor) -> Any:
    kept = model.table.get("last", 0.0)
    model.table["last"] = mean
    return kept


def _deep(model: Keeping, mean: Tensor) -> Any:
    kept = model.deep["a"][0]
    model.deep["a"][0] = mean
    return 0.0 if kept is None else kept


def _set(model: Keeping, mean: Tensor) -> Any:
    model.names.add(len(model.names) + int(1000 * mean))
    return float(len(model.names) - 1)


def _object(model: Keeping, mean: Tensor) -> Any:
    kept, model.thing.value = model.thing.value, mean
    return kept


def _hidden_module(model: Keeping, mean: Tensor) -> Any:
    kept = getattr(model.hidden[0], "kept", 0.0)
    model.hidden[0].kept = mean
    return kept


def _array(model: Keeping, mean: Tensor) -> Any:
    kept = float(model.array[0])
    model.array[0] = float(mean)
    return kept


def _tensor_in_place(model: Keeping, mean: Tensor) -> Any:
    kept = model.memory.clone()
    model.memory.copy_(mean)
    return kept


def _buffer_in_place(model: Keeping, mean: Tensor) -> Any:
    kept = model.held.clone()
    model.held.copy_(mean)
    return kept


def _buffer_of_inference_mode(model: Keeping, mean: Tensor) -> Any:
    kept = model.held.clone()
    with torch.inference_mode():
        model.held = mean.clone()[None]
    return kept


def _buffer_bound_again(model: Keeping, mean: Tensor) -> Any:
    kept, model.held = model.held, mean[None]
    return kept


def _absent_buffer(model: Keeping, mean: Tensor) -> Any:
    kept = model.absent
    model.absent = mean[None]
    return 0.0 if kept is None else kept


def _buffer_data(model: Keeping, mean: Tensor) -> Any:
    kept = model.held.clone()
    model.held.data = mean.clone()[None]
    return kept


def _parameter_bound_again(model: Keeping, mean: Tensor) -> Any:
    model.head.bias = nn.Parameter(model.head.bias.detach() + mean, requires_grad=False)
    return 0.0


def _module_replaced(model: Keeping, mean: Tensor) -> Any:
    extra = nn.Linear(16, 7, bias=False)
    nn.init.constant_(extra.weight, float(mean))
    model.head = extra.requires_grad_(requires_grad=False)
    return 0.0


def _forward(model: Keeping, mean: Tensor) -> Any:
    plain = SmallNet.forward
    model.forward = lambda x: plain(model, x) + mean
    return 0.0


def _counter(model: Keeping, _mean: Tensor) -> Any:
    model.calls += 1
    return float(model.calls - 1)


KEEPS: dict[str, Callable[[Keeping, Tensor], Any]] = {
    each.__name__.removeprefix("_"): each
    for each in (
        *(_attribute, _added_attribute, _list, _ring, _table, _deep, _set, _object),
        *(_hidden_module, _array, _tensor_in_place, _buffer_in_place, _buffer_bound_again),
        *(_buffer_of_inference_mode, _absent_buffer, _buffer_data, _parameter_bound_again),
        *(_module_replaced, _forward, _counter),
    )
}
"""Ways to keep something on the module, by name."""


def __getattr__(name: str) -> Callable[[], nn.Module]:
    """`--model keeping:NAME` is a `Keeping` of that kind, or a model that leaves torch changed."""
    if name in KEEPS:
        return lambda: Keeping(name)
    if name in LEAVES:
        return lambda: Leaving(name)
    raise AttributeError(name)


# ---- torch's own state


class Leaving(SmallNet):
    """Answers as `SmallNet` does, and leaves torch in another state."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        LEAVES[self.kind]()
        return logits


def _inference_mode() -> None:
    OPEN.append(torch.inference_mode())
    OPEN[-1].__enter__()


def _autocast() -> None:
    OPEN.append(torch.autocast("cpu", torch.bfloat16))
    OPEN[-1].__enter__()


OPEN: list[Any] = []
"""What was entered and never left."""

LEAVES: dict[str, Callable[[], Any]] = {
    "no_grad": lambda: torch.set_grad_enabled(False),
    "inference_mode": _inference_mode,
    "autocast": _autocast,
    "default_dtype": lambda: torch.set_default_dtype(torch.float64),
    "default_device": lambda: torch.set_default_device("meta"),
    "seed": lambda: torch.manual_seed(1),
    "draw": lambda: torch.rand(3),
    "deterministic": lambda: torch.use_deterministic_algorithms(mode=True),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "precision": lambda: torch.set_float32_matmul_precision("medium"),
    "onednn": lambda: setattr(torch.backends.mkldnn, "enabled", False),
}
"""Ways to leave torch changed, by name."""


# ---- models whose copying can be made to fail or to wait


class Copied(SmallNet):
    """Copied as any module, through `Copied.before`, which may raise or wait."""

    before: Callable[[], None] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Copied:
        if Copied.before is not None:
            Copied.before()
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        clone.__dict__ = copy.deepcopy(self.__dict__, memo)
        return clone


def copied() -> nn.Module:
    """For `--model keeping:copied`."""
    return Copied()


def built_in_inference_mode() -> nn.Module:
    """For `--model keeping:built_in_inference_mode`."""
    with torch.inference_mode():
        return SmallNet()


class Unreadable:
    """What cannot be looked into."""

    @property
    def __dict__(self) -> Any:
        raise RuntimeError("planted: unreadable")
