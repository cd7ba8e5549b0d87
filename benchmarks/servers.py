"""Servers as processes of their own, on loopback: the service, and those in `peers/`.

All are given the same cores, the same weights file, and the same images.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from measuring import ROOT

HERE = Path(__file__).resolve().parent
START = 180.0
"""Seconds a server may take to be ready."""


@dataclass(frozen=True, slots=True)
class Model:
    """What all serve: torchvision's NAME, or `module:function`; its weights file; its layer."""

    builder: str
    weights: Path | None
    layer: str

    @property
    def environment(self) -> dict[str, str]:
        """As `peers/common.py` reads it."""
        return {
            "BENCH_MODEL": self.builder.removeprefix("torchvision/"),
            "BENCH_WEIGHTS": str(self.weights or ""),
            "BENCH_LAYER": self.layer,
        }


@dataclass(frozen=True, slots=True)
class Kind:
    """How a server is started; `{port}` in its arguments is replaced.

    ready: the path that answers 200 when it is. prefix: a command that runs the rest.
    folder: the checkout that `-m service` is taken from.
    """

    arguments: tuple[str, ...]
    ready: str = "/health"
    environment: Mapping[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    folder: Path = ROOT


def camserve(model: Model, *more: str) -> Kind:
    """`camserve serve` with its default settings."""
    weights = f"@{model.weights}" if model.weights else ""
    arguments = ("serve", "--port", "{port}", "--model", f"bench={model.builder}{weights}", *more)
    return Kind(("-m", "service", *arguments), "/health/ready")


def fastapi(module: str, model: Model, **environment: str) -> Kind:
    """A peer's app in uvicorn."""
    arguments = ("-m", "uvicorn", f"peers.{module}:app", "--port", "{port}")
    quiet = ("--log-level", "warning", "--no-access-log")
    return Kind((*arguments, *quiet), environment=model.environment | environment)


def litserve(module: str, model: Model) -> Kind:
    """A peer that starts its own server."""
    return Kind(("-m", f"peers.{module}", "{port}"), environment=model.environment)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a server's processes have used since they started: CPU seconds, peak resident MiB."""

    cpu: float
    peak: float


class Server:
    """A running server; `paused` ones take no CPU while others are measured."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.port = port
        self.pid = process.pid

    def usage(self) -> Usage:
        """Of the process and all its children."""
        return usage(self.pid)

    def pause(self) -> None:
        """Stop all its threads where they are."""
        for process in self._processes():
            process.suspend()

    def resume(self) -> None:
        """Let them go on."""
        for process in self._processes():
            process.resume()

    def _processes(self) -> list[psutil.Process]:
        return _family(self.pid)


def usage(pid: int) -> Usage:
    """Of a process and all its children. Pages that they share are counted in each."""
    cpu, peak = 0.0, 0.0
    for process in _family(pid):
        with suppress(psutil.Error, OSError):
            times = process.cpu_times()
            cpu += times.user + times.system
            peak += _peak(process)
    return Usage(cpu, peak)


def _family(pid: int) -> list[psutil.Process]:
    main = psutil.Process(pid)
    return [main, *main.children(recursive=True)]


def _peak(process: psutil.Process) -> float:
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        return float(process.memory_info().rss) / (1 << 20)
    lines = status.read_text(encoding="utf-8").splitlines()
    peak = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), "0")
    return int(peak) / 1024


@contextmanager
def serving(
    kind: Kind, cores: Sequence[int] = (), log_file: Path | None = None
) -> Iterator[Server]:
    """Start a server, wait until it is ready, and end it with all its children.

    cores: those it may run on; none: those of this process. log_file: what it writes is kept there.
    Raises RuntimeError with what it wrote where it does not become ready.
    """
    port = _free_port()
    arguments = (each.replace("{port}", str(port)) for each in kind.arguments)
    command = [*kind.prefix, sys.executable, *arguments]
    search = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **kind.environment, "PYTHONPATH": search}
    with (
        log_file.open("w+") if log_file else tempfile.TemporaryFile("w+") as log,
        _on_cores(cores),
        subprocess.Popen(  # noqa: S603 - our own command
            command,
            cwd=kind.folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        ) as process,
    ):
        try:
            try:
                _await_ready(process, f"http://127.0.0.1:{port}{kind.ready}")
            except RuntimeError as error:
                said = os.pread(log.fileno(), 1 << 16, 0).decode(errors="replace")
                raise RuntimeError(f"{error}:\n{said[-4000:]}") from None
            yield Server(port, process)
        finally:
            _end(process)


def end_when_told() -> None:
    """Make SIGTERM end this process as an exception would, so that its servers end with it."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


@contextmanager
def _on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Children started inside inherit these cores."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.Error):
        main = psutil.Process(process.pid)
        family = [*main.children(recursive=True), main]
        for each in family:
            with suppress(psutil.Error):
                each.resume()
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=15)
        for each in alive:
            with suppress(psutil.Error):
                each.kill()


def _await_ready(process: subprocess.Popen[bytes], url: str) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError("the server did not start")
        with (
            suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(url, timeout=5) as answer,  # noqa: S310 - loopback
        ):
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the server was not ready within {START:g} seconds")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
