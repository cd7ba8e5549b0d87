"""`make bench`: the core and HTTP in one run, the page with its plot, and what is met and missed.

    make bench                               # half an hour on two cores
    make bench ARGS=--quick                  # three minutes, two models, a few servers; no page
    make bench ARGS="--parts http --again"

Each part is a process of its own. What is finished is in --out at once: after an interruption the
same command goes on from there. After a complete run, or with `--again`, it begins anew.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import report
from core import OUT
from measuring import Results
from over_http import ALONE, BUSY, VIT

HERE = Path(__file__).resolve().parent
SCRIPTS = {
    "core": ("core.py",),
    "http": ("over_http.py",),
    "vit": (
        "over_http.py",
        *("--model", f"torchvision/{VIT}", "--mark", f"{VIT} "),
        *("--layer", "encoder.layers.encoder_layer_11.ln_1"),
        *("--servers", "camserve", "eager", "openvino", "--loads", ALONE, BUSY),
    ),
    "memory": ("memory.py",),
}
QUICK = {
    "core": (
        *("--models", "torchvision/resnet50", "torchvision/mobilenet_v3_large"),
        *("--batches", "1", "--seconds", "10", "--rounds", "3"),
    ),
    "http": (
        *("--servers", "camserve", "torchcam", "litserve", "openvino"),
        *("--loads", "640x480/1", "640x480/16", "--rounds", "1", "--seconds", "2"),
    ),
    "vit": ("--loads", "640x480/16", "--rounds", "1", "--seconds", "4"),
    "memory": ("--requests", "1000"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts, and report whatever is finished, even where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a short form that writes no page")
    parser.add_argument("--parts", nargs="+", choices=SCRIPTS, default=tuple(SCRIPTS))
    parser.add_argument("--again", action="store_true", help="measure also what --out has")
    parser.add_argument("--out", type=Path, help="where results are kept")
    options = parser.parse_args(arguments)
    out = options.out or (OUT.with_name("bench-quick.json") if options.quick else OUT)
    if options.again or Results(out).found("complete"):
        out.unlink(missing_ok=True)
    failed, started = [], time.monotonic()
    for part in options.parts:
        short = QUICK[part] if options.quick else ()
        script, *own = SCRIPTS[part]
        command = [sys.executable, str(HERE / script), *own, "--out", str(out), *short]
        try:
            done = subprocess.run(command, check=False)  # noqa: S603 - our own scripts
        except KeyboardInterrupt:
            failed.append(part)
            break
        if done.returncode:
            failed.append(part)
    results = Results(out)
    print(f"\n{report.section(results)}\n")
    print(f"{(time.monotonic() - started) / 60:.0f} minutes; results in {out}")
    if not failed:
        results.keep("complete", {}, found=True)
    if not options.quick and not failed:
        report.write(results)
        print(f"written to {report.PAGE}")
    if failed:
        sys.exit(f"not finished: {', '.join(failed)}")


if __name__ == "__main__":
    main()
