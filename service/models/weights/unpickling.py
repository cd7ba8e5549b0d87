"""Read files of `torch.save` without running code in them.

Checkpoints contain more than tensors: the arguments of the training script, best scores, paths.
Objects of harmless types are replaced by placeholders without their contents, so that the tensors
can be read. Any other type is refused, as torch does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch


class _Placeholder:
    """A placeholder for an object that is not needed, without its contents."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> Self:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


class _AsDict:
    """A dict instead of a subclass."""

    def __new__(cls, *_: Any) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


class _AsList:
    """A list instead of another sequence."""

    def __new__(cls, *_: Any) -> list[Any]:  # type: ignore[misc]
        return []


_NAMES = {
    "argparse": "Namespace",
    "optparse": "Values",
    "types": "SimpleNamespace",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "numpy.core.multiarray": "scalar _reconstruct",
    "numpy._core.multiarray": "scalar _reconstruct",
    "numpy": "dtype ndarray bool bool_ str_ bytes_ int8 int16 int32 int64 uint8 uint16 uint32 "
    "uint64 float16 float32 float64",
    "numpy.dtypes": "BoolDType StrDType BytesDType Float16DType Float32DType Float64DType "
    "Int8DType Int16DType Int32DType Int64DType UInt8DType UInt16DType UInt32DType UInt64DType",
    "datetime": "datetime date time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID",
    "torch.torch_version": "TorchVersion",
    # Factories of `defaultdict`, and types as values.
    "builtins": "bool int float str bytes tuple list dict frozenset range slice object",
}
"""Types that only contain values, by module."""

_DICTS = (
    "collections.defaultdict",
    # Hyper-parameters of Lightning.
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)

_PLACEHOLDERS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *(
        (_Placeholder, f"{module}.{name}")
        for module, names in _NAMES.items()
        for name in names.split()
    ),
    *((_AsDict, name) for name in _DICTS),
    (_AsList, "collections.deque"),
]

_ONE_AT_A_TIME = threading.Lock()
"""torch has one list of allowed types for all threads, and clears it at the end of each `with`."""


def read_inert(path: Path) -> Any:
    """The object in a file of `torch.save`: tensors, containers, numbers and texts as they are.

    Raises the exceptions of `torch.load`, also for a type that is not known to be harmless.
    """
    with _ONE_AT_A_TIME, torch.serialization.safe_globals(_PLACEHOLDERS):
        return torch.load(path, map_location="cpu", weights_only=True)
