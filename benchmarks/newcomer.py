"""Take the time of README's way from nothing to the first heatmap, on a machine that has nothing.

    PYTHONPATH=tests/support .venv/bin/python benchmarks/newcomer.py [--keep FOLDER]

Runs the steps as they stand in README: clones the last commit of this checkout into an empty
folder, installs (through pip, with the caches that it finds), serves on a free port, asks. Prints
the seconds of each step. Needs the network, or an index that stands in for it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from reading import ADDRESS, ROOT, blocks


def steps() -> tuple[str, str, str]:
    """How README gets, makes and asks."""
    page = blocks(ROOT / "README.md")
    get, make = next(each.commands for each in page if "git clone" in each.text)
    return get, make, next(each.text for each in page if each.text.startswith("curl"))


def served(process: subprocess.Popen[str]) -> str:
    """The address that `make run` says, when it serves."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if found := re.search(r"serves on .*?(https?://\S+)", line):
            return found[1]
    raise SystemExit("".join(said))


def main() -> None:
    """Run the steps; the service is ended, and the folder removed, whatever happens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="an empty folder to do it in, which stays")
    keep = parser.parse_args().keep
    get, make, look = steps()
    environment = os.environ | {"REPOSITORY": str(ROOT)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        clock = [time.monotonic()]
        subprocess.run(["/bin/sh", "-euc", get], cwd=folder, env=environment, check=True)  # noqa: S603 - README's words
        clock.append(time.monotonic())
        command = ["/bin/sh", "-c", f"exec {make} PORT=0 2>&1"]
        with subprocess.Popen(  # noqa: S603 - README's words
            command,
            cwd=folder / "camserve",
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                url = served(process)
                clock.append(time.monotonic())
                asked = ADDRESS.sub(url.removeprefix("http://"), look)
                subprocess.run(  # noqa: S603 - README's words
                    ["/bin/sh", "-euc", asked], cwd=folder / "camserve", check=True
                )
                clock.append(time.monotonic())
            finally:
                os.killpg(process.pid, signal.SIGINT)
        names = ("clone", "make run, until it serves", "the first heatmap", "all of it")
        spans = [after - before for before, after in itertools.pairwise(clock)]
        for name, seconds in zip(names, (*spans, sum(spans)), strict=True):
            print(f"{seconds:8.1f} s  {name}")


if __name__ == "__main__":
    main()
