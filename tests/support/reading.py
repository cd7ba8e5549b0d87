"""The documentation read as a person would: its blocks, run one after the other."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from typer.testing import CliRunner

from service.cli.main import app

ROOT = Path(__file__).parents[2]

FENCE = re.compile(r"^```(\w+)?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SERVES = re.compile(r"^(make run|(\.venv/bin/)?camserve serve)\b")
ADDRESS = re.compile(r"(127\.0\.0\.1|localhost):8000")
NUMBER = re.compile(r"-?\d+(\.\d+)?")

# A reader has none of what is set for tests: with PYTHONSAFEPATH a script's own folder is not
# searched, MAKEFLAGS would hand on ARGS=… to the reader's own `make run`, and the sensitivity to
# the weights, which tests leave out to save time, adds flags to what a reader sees.
SET_FOR_TESTS = {
    *("PYTHONSAFEPATH", "MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", "ARGS"),
    "CAMSERVE_SENSITIVITY",
}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, the words behind that, its text, and what it prints."""

    kind: str
    about: str
    text: str
    output: str | None = None

    @property
    def commands(self) -> list[str]:
        """What is typed: the lines of `sh`, those behind `$` of `console`; comments are none."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.kind == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page; a `text` block right behind another is what that prints."""
    text = page.read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    read = []
    for place, each in enumerate(found):
        after = found[place + 1] if place + 1 < len(found) else None
        output = None
        if (
            after is not None
            and after[1] == "text"
            and not text[each.end() : after.start()].strip()
        ):
            output = after[3]
        read.append(Block(each[1] or "", each[2].strip(), each[3], output))
    return read


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@dataclass
class Reader:
    """A terminal or two and a Python, in a folder with what a checkout has.

    folder: where commands are run. url: of the service that was started last.
    """

    folder: Path
    names: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    url: str = ""
    _port: int = field(default_factory=free_port)
    _served: subprocess.Popen[str] | None = None
    _draining: threading.Thread = field(default_factory=threading.Thread)

    def __post_init__(self) -> None:
        binaries = self.folder / ".venv" / "bin"
        binaries.mkdir(parents=True)
        for name, module in (("python", ""), ("camserve", "-m camserve ")):
            (binaries / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module}"$@"\n')
            (binaries / name).chmod(0o755)
        if self.root == ROOT:
            (self.folder / "examples").symlink_to(ROOT / "examples")
        inherited = {k: v for k, v in os.environ.items() if k not in SET_FOR_TESTS}
        self.environment = inherited | {
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.root),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "NO_PROXY": "127.0.0.1,localhost",
            "CAMSERVE_WORKERS": "1",
            **self.environment,
        }

    @property
    def root(self) -> Path:
        """The checkout whose code runs: the folder itself, if it is one."""
        return self.folder if (self.folder / "Makefile").exists() else ROOT

    def do(self, block: Block) -> str:
        """A block as its language and its words say; returns what it prints."""
        if "file=" in block.about:
            self.write(block)
        elif block.kind == "python":
            return self.python(block.text)
        elif block.kind in ("sh", "console"):
            first, *rest = block.commands
            if not SERVES.match(first):
                return "".join(map(self.command, block.commands))
            self.serve(first)
            return "".join(map(self.command, rest))
        return ""

    def command(self, line: str) -> str:
        """One line; where it is a plain call of Python or `camserve`, in this process."""
        if re.fullmatch(r"python \w+\.py", line):
            said = io.StringIO()
            with (
                contextlib.redirect_stdout(said),
                contextlib.chdir(self.folder),
                torch.random.fork_rng(devices=[]),
            ):
                runpy.run_path(line.split()[1], run_name="__main__")
            return said.getvalue()
        plain = re.match(r"(\.venv/bin/)?camserve ", line) and not re.search(r"\s[|<>]\s", line)
        return self.camserve(line) if plain else self.shell(line)

    def shell(self, text: str) -> str:
        """Run commands, and return what they print. Fails with what they say where one fails."""
        ran = subprocess.run(
            ["/bin/bash", "-euo", "pipefail", "-c", self._here(text)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
        assert ran.returncode == 0, f"{text}\n{ran.stdout}\n{ran.stderr}"
        return ran.stdout

    def camserve(self, line: str) -> str:
        """Run the command in this process, which has torch already."""
        arguments = shlex.split(line.partition("camserve ")[2], comments=True)
        with contextlib.chdir(self.folder):
            ran = CliRunner().invoke(app, arguments, env=self.environment)
        assert ran.exit_code == 0, f"{line}\n{ran.output}"
        return ran.stdout

    def python(self, text: str) -> str:
        """Go on in the same Python, and return what it prints."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(self._here(text), "<page>", "exec"), self.names)  # noqa: S102 - the page's own words
        return said.getvalue()

    def write(self, block: Block) -> None:
        """Save a block that is a file, as its fence says."""
        name = re.search(r"file=(\S+)", block.about)
        assert name is not None
        (self.folder / name[1]).write_text(block.text, encoding="utf-8")

    def serve(self, command: str) -> None:
        """Start a service at the reader's own port, in the place of the last, and await it.

        `make run` runs its recipe, with what `make install` would do taken as done.
        """
        self.stop()
        command = re.sub(r"\s+#.*$", "", command)
        if command.startswith("make run"):
            made = f"make --no-print-directory -C {self.root} -o .venv/.installed"
            command = f"{made} {command[5:]} PORT={self._port}"
        else:
            command = f"exec {command.removeprefix('.venv/bin/')} --port {self._port}"
        self._served = subprocess.Popen(  # ended by `stop`
            ["/bin/bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert self._served.stderr is not None
        said = []
        for line in self._served.stderr:
            said.append(line)
            if "serves on" in line:
                self.url = line.split()[-1]
                break
        else:
            self._served.wait(60)
            self._served.stderr.close()
            self._served = None
            raise AssertionError(f"{command}\n{''.join(said)}")
        self._draining = threading.Thread(target=self._served.stderr.read)
        self._draining.start()
        assert httpx.get(f"{self.url}/health/ready", trust_env=False).is_success

    def stop(self) -> None:
        """End the service, as Ctrl-C does."""
        if self._served is not None:
            os.killpg(self._served.pid, signal.SIGINT)
            self._served.wait(60)
            self._draining.join(60)
            assert self._served.stderr is not None
            self._served.stderr.close()
            self._served = None

    def _here(self, text: str) -> str:
        return ADDRESS.sub(self.url.removeprefix("http://"), text) if self.url else text


@contextlib.contextmanager
def reader(folder: Path, **environment: str) -> Iterator[Reader]:
    """A reader in an empty folder; the service that it started is ended with it."""
    reading = Reader(folder, environment=environment)
    try:
        yield reading
    finally:
        reading.stop()


def differences(said: str, printed: str) -> list[str]:
    """Lines that differ from the page's in more than spaces and the last digits of numbers."""
    ours, theirs = _lines(said), _lines(printed)
    if len(ours) != len(theirs):
        return [f"{len(theirs)} lines on the page, {len(ours)} here", *ours]
    return [
        f"{there!r} on the page, {here!r} here"
        for here, there in zip(ours, theirs, strict=True)
        if not _alike(here, there)
    ]


def _lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def _alike(here: str, there: str) -> bool:
    if NUMBER.sub("#", here) != NUMBER.sub("#", there):
        return False
    pairs = zip(NUMBER.finditer(here), NUMBER.finditer(there), strict=True)
    return all(math.isclose(float(a[0]), float(b[0]), rel_tol=0.05, abs_tol=4) for a, b in pairs)
