"""Clients that ask what people ask: photographs of several sizes, methods, layers, and mistakes.

`make load` runs it. By itself, in a browser: locust -f deploy/load/locustfile.py --host URL

LOAD_STEPS:   how many clients, step after step, as in 1,4,16,64,128. The last are meant to be more
              than the service takes: it must refuse them, and answer the others.
LOAD_SECONDS: of each step. LOAD_P99: milliseconds, for the answers of all steps but the last two.
LOAD_RESULTS: file for what each step saw, as JSON.
"""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path
from typing import Any, ClassVar

import gevent
from locust import FastHttpUser, LoadTestShape, constant, events, task
from PIL import Image

STEPS = [int(each) for each in os.environ.get("LOAD_STEPS", "1,4,16,64,128").split(",")]
SECONDS = float(os.environ.get("LOAD_SECONDS", "15"))
P99 = float(os.environ.get("LOAD_P99", "10000"))
RESULTS = os.environ.get("LOAD_RESULTS")
SAMPLE = next(
    folder / "examples" / "sunflower.jpg"
    for folder in Path(__file__).resolve().parents
    if (folder / "examples").is_dir()
)

REFUSED = (429, 503)
"""Not now: with `Retry-After`, and nothing is wrong with that."""


def photo(width: int, height: int) -> bytes:
    """The sample as a camera of that size would have taken it."""
    file = io.BytesIO()
    with Image.open(SAMPLE) as sample:
        sample.convert("RGB").resize((width, height)).save(file, "JPEG", quality=88)
    return file.getvalue()


SMALL, SCREEN, CAMERA = photo(640, 480), photo(1920, 1280), photo(4000, 3000)
JPEG = {"content-type": "image/jpeg"}


def form(*images: bytes) -> tuple[bytes, dict[str, str]]:
    """A form with a part for each image: its body and its headers."""
    edge = "edge-of-a-part"
    head = f'--{edge}\r\ncontent-disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
    parts = [head.encode() + image + b"\r\n" for image in images]
    body = b"".join(parts) + f"--{edge}--\r\n".encode()
    return body, {"content-type": f"multipart/form-data; boundary={edge}"}


class Steps(LoadTestShape):
    """So many clients for so long, then more."""

    use_common_options = False

    def tick(self) -> tuple[int, float] | None:
        """How many clients there are now, and how many may be started a second."""
        place = int(self.get_run_time() / SECONDS)
        return (STEPS[place], 1000) if place < len(STEPS) else None


class Answers:
    """What each step saw. An answer belongs to the step in which it was asked for."""

    def __init__(self) -> None:
        self.began = 0.0
        self.steps: list[list[tuple[str, int, float]]] = [[] for _ in STEPS]

    def add(self, asked: float, name: str, status: int, seconds: float) -> None:
        place = int((asked - self.began) / SECONDS)
        if 0 <= place < len(STEPS):
            self.steps[place].append((name, status, seconds))


ANSWERS = Answers()


class Person(FastHttpUser):
    """Asks, looks, asks again; when refused, waits as long as it was told."""

    wait_time = constant(0)
    connection_timeout: ClassVar[float] = 10.0
    network_timeout: ClassVar[float] = 70.0

    def ask(
        self, path: str, body: bytes, headers: dict[str, str], name: str, status: int = 200
    ) -> None:
        """Ask, and hold the answer against the status that it must have."""
        asked = time.time()
        with self.client.post(
            path, data=body, headers=headers, name=name, catch_response=True
        ) as answer:
            seen = answer.status_code
            ANSWERS.add(asked, name, seen, time.time() - asked)
            wait = (answer.headers or {}).get("Retry-After")
            if seen == status or (seen in REFUSED and wait is not None):
                answer.success()
            else:
                answer.failure(f"{seen} instead of {status}: {(answer.text or '')[:200]}")
        if seen in REFUSED:
            gevent.sleep(float(wait or 1))

    @task(50)
    def explain(self) -> None:
        self.ask("/explain", SMALL, JPEG, "explain")

    @task(12)
    def explain_on_a_screen(self) -> None:
        self.ask("/explain?include=overlay&include=regions", SCREEN, JPEG, "explain, overlay")

    @task(6)
    def explain_from_a_camera(self) -> None:
        self.ask("/explain?include=overlay", CAMERA, JPEG, "explain, 12 MP")

    @task(10)
    def predict(self) -> None:
        self.ask("/predict?top_k=3", *form(SMALL, SMALL), name="predict, 2 images")

    @task(8)
    def compare(self) -> None:
        path = "/explain?method=layercam&explain_top=3&include=grid"
        self.ask(path, SMALL, JPEG, "explain, 3 classes")

    @task(4)
    def look_inside(self) -> None:
        path = "/explain?activations=type:Conv2d&include=none"
        self.ask(path, SMALL, JPEG, "explain, activations")

    @task(2)
    def ask_a_slow_method(self) -> None:
        path = "/explain?method=integrated_gradients&steps=16"
        self.ask(path, SMALL, JPEG, "explain, 16 steps")

    @task(8)
    def err(self) -> None:
        self.ask("/explain", b"not a picture", JPEG, "no picture", 415)
        self.ask("/explain", SMALL[:5000], JPEG, "half a picture", 400)
        self.ask("/explain?layr=x", SMALL, JPEG, "unknown option", 422)
        self.ask("/explain?targets=unicorn", SMALL, JPEG, "unknown class", 404)


@events.test_start.add_listener
def begin(**_: Any) -> None:
    """Note when the first step begins."""
    ANSWERS.began = time.time()


@events.quitting.add_listener
def judge(environment: Any, **_: Any) -> None:
    """Exit code 1 where an answer was wrong, or was late before the service had too much to do."""
    if RESULTS:
        told = {"began": ANSWERS.began, "clients": STEPS, "steps": ANSWERS.steps}
        Path(RESULTS).write_text(json.dumps(told), encoding="utf-8")
    wrong = environment.stats.total.num_failures
    usual = [each for step in ANSWERS.steps[:-2] for each in step]
    late = sorted(seconds for _, status, seconds in usual if status not in REFUSED)
    p99 = late[int(0.99 * (len(late) - 1))] * 1000 if late else 0.0
    answered = sum(status == 200 for step in ANSWERS.steps for _, status, _ in step)
    environment.process_exit_code = int(bool(wrong) or p99 > P99 or not answered)
    print(f"{answered} answered, {wrong} wrong; p99 {p99:.0f} ms, at most {P99:.0f}")
