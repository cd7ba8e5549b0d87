"""The condition of a module tree: detect changes by a request, and undo them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

PARAMETERS_CHANGED = "parameters changed in place"
ATTRIBUTE = "attribute changed: "

DEPTH = 3
"""Depth to which an attribute is compared: a list in a dict in an object."""

WIDEST = 256
"""Maximum number of items that are compared; the length of a container is always compared."""

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_SMALL_ARRAY = 1 << 16

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_FIXED = (*_PLAIN, torch.Size, torch.device, torch.dtype)
_OPAQUE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, torch.Generator)

Hooks = tuple[tuple[int, ...], ...]
Modules = Sequence[tuple[str, nn.Module]]


class Condition:
    """The state of a module tree that a request must not change.

        condition = Condition.of(module)
        module(image)
        condition.faults()        # the differences, as text
        condition.restore()       # undo what can be undone in place

    Of each module: its class and `forward`, hooks, training mode and attributes (identity, and the
    contents of lists, dicts, sets, arrays and objects, `DEPTH` levels deep). Of each parameter and
    buffer: its identity, its memory address and its version counter, which in-place writes
    increment; of a parameter also `requires_grad`, `.grad` and its gradient hooks.

    An attribute or a buffer that is rebound to an equal value counts as unchanged: models recompute
    constants, and `weight_norm` its weight.

    Not detected: writes through `.data`, numpy or a raw pointer, and state outside the tree:
    globals, closures, C++.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = parts_of(module)
        self._values = _AttributeValues({id(part) for _, part in modules})
        self._parts = [_ModuleCondition(path, part, self._values) for path, part in modules]
        self._forwards = {type(part): type(part).__dict__.get("forward") for _, part in modules}
        self._parameters = list(_tensors(modules, "_parameters"))
        self._buffers = list(_tensors(modules, "_buffers"))
        self._marks = self._tensor_marks()

    @classmethod
    def of(cls, module: nn.Module) -> Condition:
        """The current condition of a module."""
        return cls(module)

    @property
    def hooks(self) -> int:
        """The number of hooks that the modules and parameters own."""
        return sum(len(part.hooks) for part in self._parts) + sum(
            map(len, self._marks["hooks left or removed"])
        )

    def faults(self) -> list[str]:
        """The differences, as text for the log; empty if the module is clean.

        Raises the exceptions of a module that cannot be read.
        """
        words: set[str] = set()
        attributes: list[str] = []
        for part in self._parts:
            part.compare(words, attributes)
        if any(kind.__dict__.get("forward") is not was for kind, was in self._forwards.items()):
            words.add("forward replaced")
        marks = self._tensor_marks()
        words |= {fault for fault, before in self._marks.items() if marks[fault] != before}
        return sorted(words) + [f"{ATTRIBUTE}{path}" for path in attributes]

    def changed(self) -> list[str]:
        """The dotted paths of the attributes and buffers that differ."""
        attributes: list[str] = []
        for part in self._parts:
            part.compare(set(), attributes)
        return attributes

    def restore(self) -> None:
        """Rebind the original attributes and buffers, and restore the contents of containers.

        Writes into a tensor remain, and `faults` lists them.
        """
        for kind, forward in self._forwards.items():
            if forward is not None and kind.__dict__.get("forward") is not forward:
                kind.forward = forward
        for part in self._parts:
            part.restore()
        self._values.restore()

    def freeze(self) -> None:
        """Drop and disable the parameters' gradients: scripted modules are shared by replicas."""
        for parameter in self._parameters:
            parameter.grad = None
            parameter.requires_grad_(False)

    def _tensor_marks(self) -> dict[str, list[Any]]:
        parameters, buffers = self._parameters, self._buffers
        return {
            PARAMETERS_CHANGED: _versions(parameters),
            "parameters in other memory": list(map(_address, parameters)),
            "buffers changed in place": _versions(buffers),
            "buffers in other memory": list(map(_address, buffers)),
            "requires_grad changed": [parameter.requires_grad for parameter in parameters],
            "gradients left": [parameter.grad is not None for parameter in parameters],
            "hooks left or removed": [
                tuple(parameter._backward_hooks or ()) for parameter in parameters
            ],
        }


class _ModuleCondition:
    """One module of the tree, and its original state."""

    def __init__(self, path: str, module: nn.Module, values: _AttributeValues) -> None:
        self._path = path
        self._module = module
        self._class = type(module)
        self._hook_tables = [getattr(module, table) for table in _HOOK_TABLES]
        self.hooks = tuple(chain.from_iterable(self._hook_tables))
        self._training = getattr(module, "training", None)  # a frozen module has none
        # A scripted module has its tensors, modules and attributes in C++.
        self._is_scripted = isinstance(module, ScriptModule)
        self._names, self._ids = list(vars(module)), _ids(vars(module))
        self._attributes = {} if self._is_scripted else dict(vars(module))
        tables = () if self._is_scripted else ("_parameters", "_modules", "_buffers")
        self._tables = [(table, vars(module)[table]) for table in tables]
        self._held = [(dict(held), _ids(held)) for _, held in self._tables]
        self._watched = [
            (name, value, values.watch(value))
            for name, value in self._attributes.items()
            if name not in MODULE_ATTRIBUTES and not _is_fixed(value)
        ]

    def compare(self, words: set[str], attributes: list[str]) -> None:
        """Add the differences: text for the log, paths of attributes and buffers."""
        now = vars(self._module)
        if tuple(chain.from_iterable(self._hook_tables)) != self.hooks:
            words.add("hooks left or removed")
        if getattr(self._module, "training", None) != self._training:
            words.add("training mode changed")
        if type(self._module) is not self._class:
            words.add("class changed")
        if self._is_scripted:
            return
        if _ids(now) != self._ids or list(now) != self._names:
            self._compare_names(now, words, attributes)
        for name, value, is_unchanged in self._watched:
            if now.get(name) is value and not is_unchanged():
                attributes.append(self._dotted(name))
        self._compare_tables(words, attributes)

    def _compare_tables(self, words: set[str], attributes: list[str]) -> None:
        for (table, values), (held, ids) in zip(self._tables, self._held, strict=True):
            if tuple(map(id, values.values())) == ids:
                continue
            if table == "_buffers":
                attributes += map(self._dotted, _rebound(held, values))
            else:
                words.add(f"{table[1:]} replaced")

    def _compare_names(self, now: dict[str, Any], words: set[str], attributes: list[str]) -> None:
        for name in _rebound(self._attributes, now):
            if name not in MODULE_ATTRIBUTES:
                attributes.append(self._dotted(name))
            elif name in _HOOK_TABLES:
                words.add("hooks left or removed")
            elif name in {"_parameters", "_modules", "_buffers"}:
                words.add(f"{name[1:]} replaced")

    def restore(self) -> None:
        if self._is_scripted:
            if self._training is not None and self._module.training != self._training:
                self._module.training = self._training
            return
        now = vars(self._module)
        for name in [name for name in now if name not in self._attributes]:
            del now[name]
        for name, value in self._attributes.items():
            if name not in MODULE_ATTRIBUTES:
                now[name] = value
        for (table, values), (held, ids) in zip(self._tables, self._held, strict=True):
            if table == "_buffers" and _ids(values) != ids:
                values.clear()
                values.update(held)

    def _dotted(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name


MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Entries of torch in the `__dict__` of every module, which are compared separately."""


class _AttributeValues:
    """The contents of attributes: marks to compare them, and copies to restore them.

    tree: ids of the modules, which are compared separately.
    """

    def __init__(self, tree: set[int]) -> None:
        self._tree = tree
        self._kept: list[Any] = []  # so that no new object gets the id of a freed one
        self._contents: list[tuple[Any, Any]] = []

    def watch(self, value: Any) -> Callable[[], bool]:
        """A function that returns whether a value has the same contents."""
        if isinstance(value, list) and all(map(_is_fixed, value)):
            self._keep(value, value)
            before = tuple(map(id, value))
            return lambda: tuple(map(id, value)) == before
        try:
            marks = self._marks(value, DEPTH, keep=True)
        except Exception:  # noqa: BLE001 - an unreadable value is compared by identity
            return lambda: True
        return lambda: bool(marks == self._marks(value, DEPTH))

    def restore(self) -> None:
        """Restore the contents of containers."""
        for container, items in self._contents:
            container.clear()
            if isinstance(container, dict | set):
                container.update(items)
            else:
                container.extend(items)

    def _keep(self, value: Any, held: Any) -> None:
        self._kept.append(value)
        self._contents.append((held, held.copy()))

    def _marks(self, value: Any, depth: int, *, keep: bool = False) -> Any:
        """Nested tuples of plain values, ids and versions. keep: keep references to all objects."""
        if isinstance(value, _FIXED):
            return (type(value), repr(value) if isinstance(value, float | complex) else value)
        if isinstance(value, tuple):
            items = (self._marks(item, depth, keep=keep) for item in value[:WIDEST])
            return (type(value), len(value), *items)
        if keep:
            self._kept.append(value)
        if isinstance(value, Tensor):
            return (id(value), _version(value), _address(value))
        if isinstance(value, np.ndarray):
            is_small = value.nbytes <= _SMALL_ARRAY and not value.dtype.hasobject
            return (id(value), value.tobytes() if is_small else value.shape)
        if isinstance(value, _OPAQUE) or not depth or id(value) in self._tree:
            return id(value)
        return self._marks_of_items(value, depth - 1, keep=keep)

    def _marks_of_items(self, value: Any, depth: int, *, keep: bool) -> Any:
        held: Any = value
        if not isinstance(value, list | deque | set | bytearray | dict):
            held = getattr(value, "__dict__", None)
            if not isinstance(held, dict) or _is_shared(type(value)):
                return id(value)
        items: Iterable[Any] = islice(held, WIDEST)
        if isinstance(held, dict):
            items = chain.from_iterable(islice(held.items(), WIDEST))
        marks = [self._marks(item, depth, keep=keep) for item in items]
        if keep:
            self._keep(value, held)
        return (id(value), len(held), *marks)


def parts_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module of a tree once, with its path; runs no code of the modules."""
    parts: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", module)]
    while waiting:
        path, part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        parts.append((path, part))
        for name, child in reversed(list(_table(part, "_modules").items())):
            if child is not None:
                waiting.append((f"{path}.{name}" if path else name, child))
    return parts


def hooks_of(module: nn.Module) -> Hooks:
    """The ids of all hooks: one tuple per module, then one per parameter."""
    modules = parts_of(module)
    return (
        *(
            tuple(hook for table in _HOOK_TABLES for hook in list(getattr(part, table)))
            for _, part in modules
        ),
        *(tuple(parameter._backward_hooks or ()) for parameter in _tensors(modules, "_parameters")),
    )


def same(one: Any, other: Any, depth: int = DEPTH) -> bool:
    """Whether two values are equal data: numbers, strings, tensors, arrays, containers of these."""
    if one is other or type(one) is not type(other) or not depth:
        return one is other
    if isinstance(one, Tensor | np.ndarray):
        return _equal(one, other)
    if isinstance(one, _FIXED):
        return bool(one == other) or bool(one != one)  # noqa: PLR0124 - NaN
    if isinstance(one, dict):
        alike = list(one) == list(other)
        return alike and same(list(one.values()), list(other.values()), depth)
    if isinstance(one, list | tuple | deque):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(same(a, b, depth - 1) for a, b in pairs)
    return False


def _equal(one: Any, other: Any) -> bool:
    """Whether two tensors or two arrays are equal."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    try:
        if isinstance(one, np.ndarray):
            return np.array_equal(one, other)
        return one.device == other.device and torch.equal(one, other)
    except (RuntimeError, NotImplementedError):  # a layout that cannot be compared
        return False


def _rebound(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """The names that are bound to another, unequal value."""
    for name in sorted(before.keys() | now.keys()):
        both = name in before and name in now
        if not both or (now[name] is not before[name] and not same(before[name], now[name])):
            yield name


def _is_fixed(value: Any) -> bool:
    """Whether nothing inside a value can change."""
    return isinstance(value, _FIXED) or (isinstance(value, tuple) and all(map(_is_fixed, value)))


def _is_shared(kind: Any) -> bool:
    """Whether copies of a module may share objects of a class, because it customizes copying."""
    methods = ("__reduce__", "__reduce_ex__")
    as_object = all(getattr(kind, name) is getattr(object, name) for name in methods)
    return not as_object or hasattr(kind, "__deepcopy__")


def _ids(values: dict[str, Any]) -> tuple[int, ...]:
    return tuple(map(id, values.values()))


def _tensors(modules: Modules, table: str) -> Iterator[Tensor]:
    """Each tensor in these tables once."""
    seen: set[int] = set()
    for _, part in modules:
        for tensor in list(_table(part, table).values()):  # other threads may change it
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _table(module: nn.Module, table: str) -> Any:
    entries = vars(module).get(table)
    return getattr(module, table) if entries is None else entries  # of a traced module


def _versions(tensors: Iterable[Tensor]) -> list[int | None]:
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:
        return list(map(_version, tensors))


def _version(tensor: Tensor) -> int | None:
    """The version counter of a tensor; None for one created in inference mode."""
    return None if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int | None:
    """The memory address of a tensor; None if it has none, such as a sparse tensor."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return None
