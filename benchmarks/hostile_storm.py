"""Hostile requests beside good clients, whose answers must be right."""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from hostile_client import Plan
from hostile_http import Hostile
from hostile_sending import names_of, planned, sent
from measuring import ROOT, machine, markdown, photograph
from overload import Verdicts
from watched import Start, Watched

sys.path.insert(0, str(ROOT / "tests" / "support"))

from soak_requests import Ask, as_json, differences, form, raw

SECONDS = 600.0
IN_FLIGHT = 12
"""Hostile clients at once."""
THINK = 0.1
"""Seconds between an answer and a good client's next request."""
PATIENCE = 120.0
"""Seconds that a good client tries again while it is refused, and waits for an answer."""
REFUSED = (429, 503)

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"include": ["grid", "heatmap"]},
    {"include": ["overlay", "grid", "regions"], "format": "png"},
    {"include": "grid", "explain_top": 3, "fit": "pad"},
    {"include": "grid", "method": "layercam"},
    {"include": "none", "activations": "*", "activation_as": "stats"},
)


def good_requests() -> list[Ask]:
    """Of every kind of body, with small images."""
    files = [("image/jpeg", photograph(seed, *size)) for seed, size in enumerate(_SIZES)]
    made = []
    for number, options in enumerate(OPTIONS):
        chosen = [files[(number + n) % len(files)] for n in range(1 + number % 2)]
        made += [body("/explain", options, chosen) for body in (raw, form, as_json)]
    return [*made, raw("/predict", {"top_k": 3}, files)]


_SIZES = ((320, 240), (240, 320), (640, 480), (96, 96))


@dataclass
class Good:
    """What good clients were answered. wrong: with how often. refused: tried again later."""

    right: int = 0
    refused: int = 0
    seconds: list[float] = field(default_factory=list)
    wrong: Counter[str] = field(default_factory=Counter)


class Storm:
    """Good and hostile clients for one server."""

    def __init__(self, server: Watched, rows: Sequence[Hostile], folder: Path) -> None:
        self._server = server
        names = names_of(server)
        self._plans = [
            (row, planned(row, names, server.port, folder / f"request-{number}"))
            for number, row in enumerate(rows)
        ]
        self._folder = folder
        self._asks = good_requests()
        self._twins = [self._once(ask) for ask in self._asks]
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.good = Good()
        self.answers: Counter[str] = Counter()
        self.peak = 0
        self.late = 0.0

    def _once(self, ask: Ask) -> Any:
        status, body, _ = self._send(ask)
        if status != 200:
            raise RuntimeError(f"{ask.path} alone: {status} {body[:300]!r}")
        return json.loads(body)["results"]

    def _send(self, ask: Ask) -> tuple[int, bytes, float]:
        """Status, body, and the seconds to wait where it was refused."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port(), timeout=PATIENCE)
        try:
            connection.request("POST", ask.path, ask.body, ask.headers)
            response = connection.getresponse()
            return response.status, response.read(), float(response.headers["retry-after"] or 1)
        finally:
            connection.close()

    def _port(self) -> int:
        """Where the server listens; waits while it is started again."""
        while not self._server.runs:
            time.sleep(0.1)
        return self._server.port

    def run(self, requests: int, seconds: float, clients: int) -> None:
        """All hostile requests, evenly in that time; good clients for as long."""
        turns = self._turns(requests, seconds)
        hostile = [
            threading.Thread(target=self._hostile, args=(n, turns)) for n in range(IN_FLIGHT)
        ]
        good = [threading.Thread(target=self._good, args=(n,)) for n in range(clients)]
        watch = threading.Thread(target=self._watch)
        self._server.at_rest()
        for thread in (*hostile, *good, watch):
            thread.start()
        for thread in hostile:
            thread.join()
        self._stop.set()
        for thread in (*good, watch):
            thread.join()

    def _turns(self, requests: int, seconds: float) -> Iterator[tuple[float, Hostile, Plan]]:
        """When each hostile request is due, in a seeded order that has each as often."""
        order: list[tuple[Hostile, Plan]] = []
        shuffle = random.Random(0).shuffle  # noqa: S311 - not for secrets
        while len(order) < requests:
            more = list(self._plans)
            shuffle(more)
            order += more
        began = time.monotonic()
        return iter(
            [
                (began + number * seconds / requests, row, plan)
                for number, (row, plan) in enumerate(order[:requests])
            ]
        )

    def _hostile(self, number: int, turns: Iterator[tuple[float, Hostile, Plan]]) -> None:
        while True:
            with self._lock:
                turn = next(turns, None)
            if turn is None:
                return
            due, row, plan = turn
            time.sleep(max(0.0, due - time.monotonic()))
            plan = replace(plan, port=self._port())
            outcome = sent(plan, self._folder / f"plan-{number}")
            with self._lock:
                for answer, count in outcome.answers.items():
                    self.answers[answer.split(" ")[0] if answer[:1].isdigit() else answer] += count
                    if answer.startswith("500"):
                        self.answers[f"500: {row.item} {row.name}"] += 1

    def _good(self, number: int) -> None:
        turn = number * 5
        while not self._stop.wait(THINK):
            turn += 1
            ask, twin = (of[turn % len(self._asks)] for of in (self._asks, self._twins))
            started = time.monotonic()
            problem = self._problem(ask, twin, started + PATIENCE)
            with self._lock:
                self.good.seconds.append(time.monotonic() - started)
                if problem is None:
                    self.good.right += 1
                else:
                    self.good.wrong[problem] += 1

    def _problem(self, ask: Ask, twin: Any, until: float) -> str | None:
        """What is wrong with the answer to a good request; None: nothing."""
        while True:
            try:
                status, body, pause = self._send(ask)
            except (OSError, http.client.HTTPException) as error:
                return f"no answer: {type(error).__name__}"
            if status == 200:
                return next(differences(json.loads(body)["results"], twin), None)
            if status not in REFUSED or time.monotonic() + pause > until:
                return f"{status} {body[:120]!r}"
            with self._lock:
                self.good.refused += 1
            time.sleep(pause)

    def _watch(self) -> None:
        """Memory and lateness; a server that ended is started again."""
        while not self._stop.wait(0.5):
            if not self._server.is_alive():
                self._server.ensure()
                self._server.at_rest()
                continue
            self.peak = max(self.peak, self._server.peak())
            self.late = max(self.late, self._server.lateness())


def storm(start: Start, rows: Sequence[Hostile], options: argparse.Namespace) -> bool:
    """Run it, print what came of it; whether all of it holds."""
    seconds = options.seconds or SECONDS
    with tempfile.TemporaryDirectory() as folder, Watched(start) as server:
        found = Storm(server, rows, Path(folder))
        rest = psutil.Process(server.pid).memory_info().rss
        found.run(options.requests, seconds, options.clients)
        restarts = server.starts - 1
    good = found.good
    verdicts = Verdicts()
    wrong = sum(good.wrong.values())
    verdicts.add(
        f"good requests of {options.clients} clients are answered right",
        f"{good.right} right, {wrong} not; {good.refused} times refused and sent again",
        good.right > 0 and not wrong,
    )
    verdicts.add("the server lives", f"{restarts} restarts", not restarts)
    said = sum(n for answer, n in found.answers.items() if answer == "500")
    verdicts.add("nothing is answered 500", f"{said} times", not said)
    print(f"{options.requests} hostile requests of {len(rows)} kinds in {seconds:g} s")
    print(markdown(("hostile requests' answers", "times"), [
        [answer, str(count)] for answer, count in found.answers.most_common()
    ]))  # fmt: skip
    for problem, count in good.wrong.most_common(10):
        print(f"wrong, {count} times: {problem}")
    ranked = sorted(good.seconds) or [0.0]
    print(
        f"good requests took {ranked[len(ranked) // 2]:.2f} s at the median, {ranked[-1]:.1f} s at "
        f"most; the event loop was late by {1000 * found.late:.0f} ms at most; memory from "
        f"{rest >> 20} to {found.peak >> 20} MiB\n\n{verdicts.table()}\n\n{machine()}"
    )
    return all(is_so for *_, is_so in verdicts.said)
