"""Of every method: how many of its maps a verdict on the very image supports.

    PYTHONPATH=. .venv/bin/python benchmarks/method_verdicts.py --write

The built-in model on held-out flowers and mobilenet_v2 on the annotated photographs, images whose
correct class has a score over 0.5. All maps of an image are judged by the same 40 forward passes.
--write puts the table between its markers in docs/reference/verdicts.md, from which the table of
methods takes its column. Finished models are kept in build/method_verdicts.json.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import verdict_tables
from measuring import ROOT, Results
from verdict_cases import SUBJECTS, Case, Data, Subject, loaded
from verdict_maps import Bench, Tally, answer, predicted

from api_schemas.methods import METHODS
from service.inference.method_table import why_not
from service.inference.questions import Question
from service.models.pool import Replica

PAGE = ROOT / "docs" / "reference" / "verdicts.md"
MARKS = "<!-- methods:begin -->", "<!-- methods:end -->"
MODELS = ("builtin", "mobilenet_v2")


def judge_methods(replica: Replica, case: Case, tally: Tally, *, slow: bool) -> None:
    """The verdict on each method's map of the predicted class. slow: also those of many passes."""
    model = replica.model
    assert model.target_layer is not None
    best = predicted(replica, case.pixels).predictions[0]
    plain = Question(case.pixels, top_k=1, targets=(best.class_id,), verify=True, seen=case.seen)
    first = answer(replica, replace(plain, layers=(model.target_layer,)))
    for record in METHODS.values():
        if why_not(model, record.name) or (record.times != "once" and not slow):
            continue
        layers = (model.target_layer,) if record.has_layer else ()
        question = replace(plain, method=record.name, layers=layers, evidence=first.evidence)
        (explanation,) = answer(replica, question).explanations
        assert explanation.verdict is not None
        tally.add(record.name, explanation.verdict)


def measured(subject: Subject, data: Data, images: int, slow: int) -> dict[str, dict[str, int]]:
    """The verdicts of one model by method. slow: images with the methods of many passes."""
    replica = loaded(subject.spec(data))
    bench, count = Bench(replica, replica, 0, 0), 0
    for case in subject.cases(data, replica):
        if count < images and bench.is_of_use(case):
            judge_methods(replica, case, bench.tally, slow=count < slow)
            count += 1
            print(f"{subject.name}: {count} images", file=sys.stderr, flush=True)
    return {row: dict(counts) for row, counts in bench.tally.verdicts.items()}


def table(parts: dict[str, Any]) -> str:
    """A row a method, a column a model."""
    parts = {name: parts[name] for name in MODELS if name in parts}
    lines = [f"| method | {' | '.join(parts)} |", f"|{'---|' * (1 + len(parts))}"]
    for record in METHODS.values():
        rows = [part["found"].get(record.name, {}) for part in parts.values()]
        shares = [verdict_tables.share(row) for row in rows]
        if any(share.n for share in shares):
            lines.append(f"| {record.name} | {' | '.join(map(str, shares))} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> str:
    """Measure what is not kept with the same settings, and return the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=ROOT.parent / "shared" / "data", help="weights and images")
    add("--images", type=int, default=60, help="images of one model at most")
    add("--slow", type=int, default=20, help="of these, with the methods of many passes")
    add("--models", nargs="+", choices=MODELS, default=MODELS)
    add("--results", type=Path, default=ROOT / "build" / "method_verdicts.json")
    add("--again", action="store_true", help="measure what is kept again")
    add("--write", action="store_true", help="write the table into the page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = Data(options.data, options.data, None)
    results = Results(options.results, again=options.again)
    settings = {"images": options.images, "slow": options.slow}
    for subject in SUBJECTS:
        if subject.name in options.models and not results.has(subject.name, settings):
            found = measured(subject, data, options.images, options.slow)
            results.keep(subject.name, settings, found)
    made = table(results.parts)
    if options.write:
        verdict_tables.write(PAGE, made, MARKS)
    return made


if __name__ == "__main__":
    print(main())
