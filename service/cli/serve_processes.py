"""`camserve serve --processes N`: server processes on shared sockets, under uvicorn's supervisor.

Without torch: this process only starts the others, replaces those that end or do not answer, and
passes signals on.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import MutableSequence, Sequence
from contextlib import suppress
from multiprocessing.context import SpawnProcess
from multiprocessing.sharedctypes import RawArray
from typing import Any

import structlog
import typer
import uvicorn
from prometheus_client import multiprocess
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from service import logs
from service.cli.announcing import announce
from service.cli.flags import errors_as_events, errors_as_sentences
from service.settings import Settings

_log = structlog.get_logger(__name__)

HEALTH_SECONDS = 60
"""How long a process may take to answer a ping. It needs Python's lock for that, also on a machine
with too much work."""

LOADING_SECONDS = 600.0
"""How long a process may load its models in a rolling reload; the old one serves meanwhile."""

NOT_SERVING = -1
"""As `service.routes.server.shared_sockets` has it, which imports the framework."""

STEADY_SECONDS = 10.0
"""A process that was ready for so long is replaced at once when it ends."""

END_SECONDS = 15.0
"""Beyond the time to drain, after which a process that does not end is killed."""

BACKOFF_SECONDS = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Before a process is replaced that ended after a shorter time, by how often that happened."""

METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""The folder in which the processes count together, of prometheus_client."""


def run_processes(settings: Settings, sockets: Sequence[socket.socket]) -> None:
    """Serve on open sockets in several processes until a signal.

    Raises typer.Exit(2) if the first process cannot load a model; it has printed why.
    """
    logs.configure(settings.log_format)
    with tempfile.TemporaryDirectory(prefix="camserve-metrics-") as folder:
        os.environ[METRICS_VARIABLE] = folder
        try:
            supervisor = Supervisor(settings, list(sockets))
            supervisor.run()
        finally:
            del os.environ[METRICS_VARIABLE]
    if supervisor.has_failed:
        raise typer.Exit(2)
    if supervisor.is_interrupted:
        raise KeyboardInterrupt


class ServerProcess(Process):
    """One server process. uvicorn's asks it for its health; it says whether models are loaded."""

    process: SpawnProcess

    def __init__(
        self,
        config: uvicorn.Config,
        sockets: list[socket.socket],
        settings: Settings,
        counts: MutableSequence[int],
        place: int,
    ) -> None:
        self._settings = settings
        self._counts = counts
        self.place = place
        self.was_ready = False
        self._ready_at = 0.0
        self._is_ready = False
        super().__init__(config, sockets)

    def target(self, sockets: list[socket.socket] | None = None) -> None:
        """What the process does. Exits with STARTUP_FAILURE if no model can be loaded."""
        from service.cli.serve_http import run_server, share_of  # noqa: PLC0415 - torch is for the children
        from service.routes.server.shared_sockets import SharingServer  # noqa: PLC0415

        self.parent_conn.close()  # the parent's end, so that this one is told if the parent dies
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent
        threading.Thread(target=self.always_pong, daemon=True).start()
        settings = share_of(self._settings, self.config.workers)

        def server_of(app: Any) -> SharingServer:
            grace, delay = settings.drain_timeout, settings.drain_delay
            return SharingServer(app, self._counts, self.place, grace=grace, delay=delay)

        is_json = settings.log_format == "json"
        try:
            with errors_as_events() if is_json else errors_as_sentences():
                run_server(settings, sockets or [], server_of, self._be_ready)
        except typer.Exit as error:
            raise SystemExit(STARTUP_FAILURE) from error

    def _be_ready(self) -> None:
        self._is_ready = True

    def pong(self) -> None:
        try:
            self.child_conn.recv()
            self.child_conn.send(self._is_ready)
        except (EOFError, OSError):  # the parent was killed: nobody would end this process
            os.kill(os.getpid(), signal.SIGTERM)
            raise SystemExit from None  # of this thread

    def is_ready(self, timeout: float = 5) -> bool:
        if not self.was_ready and super().is_ready(timeout):
            self.was_ready, self._ready_at = True, time.monotonic()
            _log.info("process_ready", process=self.pid)
        return self.was_ready

    def is_well(self) -> bool:
        """Whether it runs, and answers a ping if it is ready; while it loads it need not."""
        return self.process.is_alive() and (not self.was_ready or self.ping(HEALTH_SECONDS))

    def was_steady(self) -> bool:
        """Whether it was ready for long enough that its end is not the fault of its start."""
        return self.was_ready and time.monotonic() - self._ready_at > STEADY_SECONDS

    def retire(self) -> None:
        """Have it end after the last of its connections; other processes accept new ones."""
        assert self.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)

    def stop(self) -> None:
        """Have it drain; a second time, end at once."""
        if self.process.is_alive() and self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)


class Supervisor(Multiprocess):
    """uvicorn's supervisor, with a first process that others follow, backoff, and retirement.

    The first process compiles what the others then read from the cache.

    has_failed: whether no process could ever load a model. is_interrupted: whether it was Ctrl-C.
    """

    processes: list[ServerProcess]  # type: ignore[assignment]

    def __init__(self, settings: Settings, sockets: list[socket.socket]) -> None:
        count = settings.process_count
        config = uvicorn.Config(
            "service",
            workers=count,
            log_config=None,
            timeout_worker_healthcheck=HEALTH_SECONDS,
        )
        self.has_failed = False
        self.is_interrupted = False
        self._settings = settings
        self._counts: Any = RawArray("i", [NOT_SERVING] * (8 * count + 8))
        self._retired: list[ServerProcess] = []
        self._restarts = 0
        self._not_before = 0.0
        self._reloads = False
        self._is_announced = False
        super().__init__(config, sockets)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self.signal_queue.append(number)

    def run(self) -> None:
        """Start, watch and replace processes until SIGTERM or Ctrl-C, then drain them."""
        while not self.should_exit.is_set():
            self.handle_signals()
            self._grow()
            self.keep_subprocess_alive()
            self._bury()
            if self._reloads and self._all_ready():
                self._reloads = False
                self.restart_all()
            time.sleep(0.2)
        self.terminate_all()
        self.join_all()

    def _started(self) -> ServerProcess:
        taken = {each.place for each in (*self.processes, *self._retired)}
        place = next(number for number in range(len(self._counts)) if number not in taken)
        self._counts[place] = NOT_SERVING
        process = ServerProcess(self.config, self.sockets, self._settings, self._counts, place)
        process.start()
        return process

    def _all_ready(self) -> bool:
        are_ready = [each.was_ready for each in self.processes]
        return len(are_ready) == self.processes_num and all(are_ready)

    def _grow(self) -> None:
        """Start the next process once those before it are ready."""
        are_ready = [each.is_ready(1) for each in self.processes]
        if any(are_ready) and not self._is_announced:
            self._is_announced = True
            announce(self._settings, self.sockets[0].getsockname()[1])
        if all(are_ready) and len(self.processes) < self.processes_num:
            self.processes.append(self._started())

    def keep_subprocess_alive(self) -> None:
        """Replace processes that ended or do not answer, after a pause if that happens often."""
        for index, process in enumerate(self.processes):
            if process.is_well():
                continue
            if process.process.is_alive():
                _log.error("process_hangs", process=process.pid)
                process.kill()
                process.join()
            if process.exitcode == STARTUP_FAILURE and not self._is_announced:
                self.has_failed = True
                self.should_exit.set()
                return
            if self._may_restart(process):
                self._forget(process)
                self.processes[index] = self._started()

    def _may_restart(self, process: ServerProcess) -> bool:
        """Whether the pause of a process that ended is over; the first call begins it."""
        now = time.monotonic()
        if not self._not_before:
            self._restarts = 0 if process.was_steady() else self._restarts + 1
            pause = BACKOFF_SECONDS[min(self._restarts, len(BACKOFF_SECONDS) - 1)]
            _log.error("process_died", process=process.pid, status=process.exitcode, pause=pause)
            self._not_before = now + pause
        if now < self._not_before:
            return False
        self._not_before = 0.0
        return True

    def restart_all(self) -> None:
        """Replace each process: start another one, and retire the old one once that is ready."""
        for index, old in enumerate(self.processes):
            new = self._started()
            if not self._is_ready_in_time(new):
                new.kill()
                new.join()
                self._forget(new)
                if not self.should_exit.is_set():
                    _log.error("reload_failed", process=new.pid, kept=old.pid)
                return
            self.processes[index] = new
            self._retired.append(old)
            old.retire()
        _log.info("reloaded", processes=len(self.processes))

    def _is_ready_in_time(self, process: ServerProcess) -> bool:
        until = time.monotonic() + LOADING_SECONDS
        while time.monotonic() < until and process.process.is_alive():
            self.handle_signals()
            if self.should_exit.is_set():
                return False
            if process.is_ready(1):
                return True
            self._bury()
            time.sleep(0.1)
        return False

    def _bury(self) -> None:
        """Forget retired processes that have ended."""
        for process in [each for each in self._retired if not each.process.is_alive()]:
            self._retired.remove(process)
            self._forget(process)

    def _forget(self, process: ServerProcess) -> None:
        self._counts[process.place] = NOT_SERVING
        multiprocess.mark_process_dead(process.pid)  # type: ignore[no-untyped-call] # its counts stay, its gauges go

    def handle_hup(self) -> None:
        self._reloads = True

    def handle_int(self) -> None:
        self.is_interrupted = True
        self._end()

    def handle_term(self) -> None:
        self._end()

    def _end(self) -> None:
        if self.should_exit.is_set():  # the second signal: at once
            self.terminate_all()
        self.should_exit.set()

    def terminate_all(self) -> None:
        for process in (*self.processes, *self._retired):
            process.stop()

    def join_all(self) -> None:
        """Wait for the end of all, and kill those that take longer than draining may."""
        patience = self._settings.drain_timeout + self._settings.drain_delay + END_SECONDS
        until = time.monotonic() + patience
        while alive := [e for e in (*self.processes, *self._retired) if e.process.is_alive()]:
            self.handle_signals()
            if time.monotonic() > until:
                for process in alive:
                    process.kill()
                return
            time.sleep(0.05)
