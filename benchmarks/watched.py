"""A server whose event loop and memory are watched, and which is started again where it ends.

with bounded(3 << 30) as bound, Watched(in_process(bound, ["--model", "builtin"])) as server:
    rest = server.at_rest()
    ...
    server.lateness(), server.peak() - rest
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from contained import Bound
from servers import HERE, Kind, serving
from ticking_server import Ticks

STILL, LOOK = 0.06, 0.25
"""A server that uses less than this share of a core, for so many seconds, is at rest."""
START = 600.0
"""Seconds that a container may take until it is ready."""
HARDENED = ("--read-only", "--tmpfs", "/tmp", "--tmpfs", "/cache:mode=1777", "--cap-drop", "ALL")  # noqa: S108


@dataclass(frozen=True, slots=True)
class Running:
    """A server that runs: where it listens, and its process."""

    port: int
    pid: int


Start = Callable[[Path], AbstractContextManager[Running]]
"""Starts a server that ticks into the file with this path."""


def in_process(bound: Bound, arguments: Sequence[str], log: Path | None = None) -> Start:
    """`camserve serve` as a process of this machine."""

    @contextmanager
    def start(state: Path) -> Any:
        script = str(HERE / "ticking_server.py")
        serve = (script, str(state), "serve", "--port", "{port}", *arguments)
        kind = Kind(serve, "/health/ready", prefix=bound.prefix)
        with serving(kind, log_file=log) as server:
            yield Running(server.port, server.pid)

    return start


def in_container(image: str, memory: int, arguments: Sequence[str]) -> Start:
    """The same in a container with limits, as it is deployed."""

    @contextmanager
    def start(state: Path) -> Any:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        name = f"camserve-hostile-{port}"
        limits = ("--cpus", "2", "--memory", str(memory), "--memory-swap", str(memory))
        command = ["docker", "run", "--detach", "--name", name, *HARDENED, *limits]
        command += ["--pids-limit", "512", "--publish", f"127.0.0.1:{port}:8000"]
        command += ["--volume", f"{HERE}:/bench:ro", "--volume", f"{state.parent}:/watch"]
        command += ["--entrypoint", "python", image, "/bench/ticking_server.py"]
        command += [f"/watch/{state.name}", "serve", *arguments]
        _docker(*command[1:])
        try:
            _await_ready(port)
            yield Running(port, int(_docker("inspect", "--format", "{{.State.Pid}}", name)))
        finally:
            with suppress(subprocess.CalledProcessError):
                _docker("rm", "--force", name)

    return start


def _docker(*arguments: str) -> str:
    command = ["docker", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603


def _await_ready(port: int) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until:
        with suppress(OSError, http.client.HTTPException):
            if fetch(port, "GET", "/health/ready")[0] == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the container was not ready within {START:g} seconds")


def fetch(
    port: int,
    method: str,
    path: str,
    body: bytes | None = None,
    patience: float = 20.0,
    **headers: str,
) -> tuple[int, bytes]:
    """Status and body of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=patience)
    try:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, fields)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


class Watched:
    """A server, started again where it ended. starts: how often it was started."""

    def __init__(self, start: Start) -> None:
        self.starts = 0
        self._start = start
        self._stack = ExitStack()
        self._running: Running | None = None
        self._folder = tempfile.TemporaryDirectory()
        Path(self._folder.name).chmod(0o777)
        self._ticks: Ticks | None = None

    def __enter__(self) -> Self:
        self.ensure()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        self._folder.cleanup()

    @property
    def port(self) -> int:
        return self._now.port

    @property
    def runs(self) -> bool:
        """Whether it has been started, and not stopped since."""
        return self._running is not None

    @property
    def pid(self) -> int:
        return self._now.pid

    @property
    def ticks(self) -> Ticks:
        assert self._ticks is not None
        return self._ticks

    @property
    def _now(self) -> Running:
        assert self._running is not None
        return self._running

    def ensure(self) -> bool:
        """Start it where it does not run; whether that was so."""
        if self._running is not None and self.is_alive():
            return False
        self.stop()
        state = Path(self._folder.name) / f"ticks-{self.starts}"
        self._ticks = self._stack.enter_context(_closing(Ticks.create(state)))
        self._running = self._stack.enter_context(self._start(state))
        self.starts += 1
        return True

    def stop(self) -> None:
        self._stack.close()
        self._running = self._ticks = None

    def kill(self) -> None:
        """End it at once: it may not be able to end by itself."""
        with suppress(psutil.Error):
            psutil.Process(self.pid).kill()
        self.stop()

    def is_alive(self) -> bool:
        try:
            return bool(psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.Error:
            return False

    def at_rest(self) -> int:
        """Begin to count; bytes that are resident once freed memory was returned."""
        self.ticks.restart()
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")  # VmHWM is the present now
        return int(psutil.Process(self.pid).memory_info().rss)

    def peak(self) -> int:
        """Bytes that were resident at most since `at_rest`; 0 where the process has ended."""
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8").splitlines()
            return next(int(each.split()[1]) for each in lines if each.startswith("VmHWM:")) << 10
        return 0

    def lateness(self) -> float:
        """Seconds that a task of the event loop was late at most since `at_rest`.

        Without what its thread waited for a core: `gross_lateness` has that too.
        """
        return self.ticks.worst()

    def gross_lateness(self) -> float:
        return self.ticks.gross()

    def settles(self, patience: float) -> bool:
        """Wait until it does nothing; False: it still does, or it has ended."""
        until = time.monotonic() + patience
        while time.monotonic() < until and self.is_alive():
            before = self._cpu()
            time.sleep(LOOK)
            if self._cpu() - before < STILL * LOOK and self.ticks.overdue() < 10 * STILL:
                return True
        return False

    def _cpu(self) -> float:
        with suppress(psutil.Error):
            times = psutil.Process(self.pid).cpu_times()
            return float(times.user + times.system)
        return 0.0

    def models(self) -> dict[str, Any]:
        """What `/models` says of the first model, and its layers."""
        first = json.loads(fetch(self.port, "GET", "/models")[1])["models"][0]
        layers = json.loads(fetch(self.port, "GET", f"/models/{first['name']}/layers")[1])
        return {"name": first["name"], "layers": layers["layers"]}


@contextmanager
def _closing(ticks: Ticks) -> Any:
    try:
        yield ticks
    finally:
        ticks.close()
