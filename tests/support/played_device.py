"""A device played on the CPU: its tensors are apart from the CPU's, and every crossing is seen.

What takes place on it takes place on the CPU, with the same numbers. But as with a GPU, an
operation on tensors of both places fails, and to look at a value means to bring it over. It tells
nothing of speed, of streams or of a GPU's own kernels.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "played"

aten = torch.ops.aten


class _There(Tensor):
    """A tensor of the played device; `here` has its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Self:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=f"{NAME}:0",
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _run(function, args, kwargs or {})


class Crossings(TorchDispatchMode):
    """What went over, by direction: the shapes, in order. To look at one value is to fetch `()`."""

    def __init__(self) -> None:
        super().__init__()
        self.to_device: list[tuple[int, ...]] = []
        self.to_cpu: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return _run(function, args, kwargs or {}, self)


def _run(function: Any, args: Any, kwargs: dict[str, Any], seen: Crossings | None = None) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [each for each in tensors if isinstance(each, _There)]
    here = [each for each in tensors if not isinstance(each, _There)]
    moves = function in {aten._to_copy.default, aten.copy_.default}
    # torch itself takes numbers from the CPU, and indices.
    if there and any(each.ndim for each in here) and not moves and "index" not in function.name():
        shapes = [tuple(each.shape) for each in tensors]
        raise RuntimeError(f"{function} on tensors of two devices: {shapes}")
    device = kwargs.get("device")
    goes = None if device is None else torch.device(device).type
    if seen is not None and tensors:
        shape = tuple(tensors[-1 if function is aten.copy_.default else 0].shape)
        if function is aten._local_scalar_dense.default and there:
            seen.to_cpu.append(())
        if moves and there and (goes == "cpu" or (here and tensors[0] is here[0])):
            seen.to_cpu.append(shape)
        if moves and here and (goes == NAME or (there and tensors[0] is there[0])):
            seen.to_device.append(shape)
    if goes is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain = tree_map(lambda leaf: leaf.here if isinstance(leaf, _There) else leaf, (args, kwargs))
    result = function(*plain[0], **plain[1])
    if function is aten.copy_.default:
        return args[0]
    if goes == NAME or (there and goes != "cpu"):
        return tree_map_only(Tensor, _There, result)
    return result


# When this is imported, which is before any test runs: autograd counts the devices of a process at
# its first backward pass.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is an experiment of torch's
    _setup_privateuseone_for_python_backend(NAME)


@contextmanager
def played_device() -> Iterator[Crossings]:
    """Inside the `with` there is a device called `played`, in threads that start in it too."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    run = threading.Thread.run

    def run_there(thread: threading.Thread) -> None:
        with Crossings() as elsewhere:
            elsewhere.to_device, elsewhere.to_cpu = crossings.to_device, crossings.to_cpu
            run(thread)

    try:
        with Crossings() as crossings, pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading.Thread, "run", run_there)
            yield crossings
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
