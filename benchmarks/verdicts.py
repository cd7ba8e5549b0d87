"""How often is a verdict wrong? Maps that know nothing, planted cues that decide, photographs.

    PYTHONPATH=. .venv/bin/python tools/planted_cues/train.py --out build/planted_cues
    .venv/bin/python benchmarks/verdicts.py --write

Runs each model of `verdict_cases.py` over its images and judges, by the evidence of the service's
own 40 forward passes, maps of several methods and maps that know nothing of the image. Then it
measures the cost, interleaved with plain compiled forward passes. --write puts the tables between
the markers of docs/reference/verdicts.md. Finished parts are kept in build/verdicts.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import verdict_cost
import verdict_tables
from measuring import ROOT, Results
from verdict_cases import QUICK, SUBJECTS, Data, Subject, loaded
from verdict_maps import Bench

PAGE = ROOT / "docs" / "reference" / "verdicts.md"


def measured(
    subject: Subject, data: Data, options: argparse.Namespace
) -> dict[str, dict[str, int]]:
    """The verdicts on the maps of one model's images, by row."""
    replica = loaded(subject.spec(data))
    bench = Bench(replica, loaded(QUICK.spec(data)), options.pixel, options.randomised)
    started = time.process_time()
    for case in subject.cases(data, replica):
        if bench.count >= options.images:
            break
        if subject is QUICK or bench.is_of_use(case):
            bench.look(case)
    used = time.process_time() - started
    print(f"{subject.name}: {bench.count} images, {used:.0f} s of CPU", file=sys.stderr, flush=True)
    return {row: dict(counts) for row, counts in bench.tally.verdicts.items()}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=ROOT.parent / "shared" / "data", help="weights and images")
    add("--planted", type=Path, default=ROOT / "build" / "planted_cues", help="what was trained")
    add("--samples", type=Path, help="a folder of photographs named by their class, as 0007.jpg")
    add("--only", nargs="+", help="these subjects, or `cost`")
    add("--images", type=int, default=60, help="images of one subject at most")
    add("--pixel", type=int, default=30, help="of these, with integrated gradients")
    add("--randomised", type=int, default=30, help="of these, with maps of randomised weights")
    add("--seconds", type=float, default=60, help="of each measurement of the cost")
    add("--quick", action="store_true", help="the built-in model on four images, in seconds")
    add("--results", type=Path, default=ROOT / "build" / "verdicts.json")
    add("--again", action="store_true", help="measure what is kept again")
    add("--write", action="store_true", help="write the tables into the page")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.pixel, options.randomised, options.seconds = 4, 2, 2, 0
        options.only = options.only or [QUICK.name]
    return options


def main(arguments: list[str] | None = None) -> str:
    """Measure what is not kept with the same settings, and return the tables."""
    options = parse(arguments)
    torch.set_num_threads(1)
    data = Data(options.data, options.planted, options.samples)
    results = Results(options.results, again=options.again)
    settings = {"images": options.images, "pixel": options.pixel, "randomised": options.randomised}
    for subject in (QUICK,) if options.quick else SUBJECTS:
        if options.only and subject.name not in options.only:
            continue
        if not subject.is_there(data):
            print(f"{subject.name}: left out, its data is absent", file=sys.stderr)
        elif not results.has(subject.name, settings | {"group": subject.group}):
            found = measured(subject, data, options)
            results.keep(subject.name, settings | {"group": subject.group}, found)
    if not options.only or "cost" in options.only:
        costs = verdict_cost.measured(options.seconds, quick=options.quick)
        results.keep("cost", {}, costs)
    tables = verdict_tables.tables(results.parts)
    if options.write:
        verdict_tables.write(PAGE, tables)
    return tables


if __name__ == "__main__":
    print(main())
