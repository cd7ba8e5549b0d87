"""From a row of the table to what its client was answered."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from hostile_client import Outcome, Plan
from hostile_http import Hostile, Names
from servers import HERE
from watched import Watched


def names_of(server: Watched) -> Names:
    """The served model and its first layer that can be a target."""
    model = server.models()
    return Names(model["name"], next(each["path"] for each in model["layers"] if each["target"]))


def planned(hostile: Hostile, names: Names, port: int, file: Path) -> Plan:
    """Write its bytes into the file, and say what the client does with them."""
    pieces = hostile.build(names)
    file.write_bytes(b"".join(pieces))
    return Plan(
        port,
        str(file),
        [len(piece) for piece in pieces],
        hostile.connections,
        hostile.pause,
        hostile.answers,
        hostile.reads,
        hostile.hold,
        hostile.patience,
    )


def sent(plan: Plan, file: Path) -> Outcome:
    """Let a client run the plan in a process of its own, and end it where it does not."""
    file.write_text(json.dumps(asdict(plan)), encoding="utf-8")
    command = [sys.executable, str(HERE / "hostile_client.py"), str(file)]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, timeout=plan.patience + plan.hold + 15, check=True
        )
    except subprocess.SubprocessError as error:
        return Outcome({f"the client failed: {type(error).__name__}": 1}, 0, plan.patience)
    return Outcome(**json.loads(done.stdout))
