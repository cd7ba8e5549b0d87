"""Restore the state of torch, of thread and process, after the code of a model has run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_DEVICES = ("cpu", "cuda")


@contextmanager
def kept_torch_state(*, random: bool = True) -> Iterator[None]:
    """Restore the state of torch after the code or the builder of a model has run.

    Of the thread: grad mode, inference mode, autocast, number of threads, default device. Of the
    process: default dtype, the CPU's random generator, deterministic algorithms, anomaly mode,
    float32 matmul precision, the switches of cuDNN and of oneDNN.

    The state of the process is restored to its value before the first of several overlapping
    blocks: otherwise one block would save a temporary value of another.

    random: False does not restore random generators, for code that compares two runs.
    """
    threads, device = torch.get_num_threads(), torch.get_default_device()
    autocast = _autocast()
    grad = torch.is_grad_enabled()
    _process.enter()
    try:
        # Its end restores all of autograd's thread state.
        with torch.inference_mode(torch.is_inference_mode_enabled()), torch.set_grad_enabled(grad):
            yield
    finally:
        torch.set_grad_enabled(grad)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        if _autocast() != autocast:
            _set_autocast(autocast)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        _process.leave(random=random)


_Autocast = tuple[bool, tuple[tuple[bool, torch.dtype], ...]]


def _autocast() -> _Autocast:
    kinds = ((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES)
    return torch.is_autocast_cache_enabled(), tuple(kinds)


def _set_autocast(state: _Autocast) -> None:
    cache, kinds = state
    for device, (enabled, dtype) in zip(_DEVICES, kinds, strict=True):
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(cache)
    torch.clear_autocast_cache()


def _set_deterministic(state: tuple[bool, bool]) -> None:
    mode, warn_only = state
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)


def _set_cudnn(state: tuple[bool, bool, bool]) -> None:
    cudnn = torch.backends.cudnn
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic = state


def _set_onednn(enabled: bool) -> None:
    setattr(torch.backends.mkldnn, "enabled", enabled)  # noqa: B010 - it is typed as a property


_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        _set_deterministic,
    ),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (
        lambda: (
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
        ),
        _set_cudnn,
    ),
    (lambda: torch.backends.mkldnn.enabled, _set_onednn),
)
"""Reads and sets each switch. Not TF32 of cuDNN, which is set once when a model is loaded."""


class _Process:
    """The state of the process before the first of the current blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._values: list[Any] = []
        self._random: torch.Tensor | None = None

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._values = [read() for read, _ in _SWITCHES]
                self._random = torch.get_rng_state()
            self._inside += 1

    def leave(self, *, random: bool) -> None:
        with self._lock:
            self._inside -= 1
            for (read, write), value in zip(_SWITCHES, self._values, strict=True):
                if read() != value:
                    write(value)
            assert self._random is not None
            if random and not torch.equal(torch.get_rng_state(), self._random):
                torch.set_rng_state(self._random)


_process = _Process()
