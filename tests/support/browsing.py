"""A person at the page: the watched window, the hand that works it, the server behind it."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, Request, Route

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "service" / "routes" / "page" / "sunflower.jpg"

START_SECONDS = 90


@contextmanager
def serving(*flags: str) -> Iterator[str]:
    """The address of a new `camserve serve` with these flags, ready to answer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "service", "serve", "--port", str(port), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log) as server:
        url = f"http://127.0.0.1:{port}"
        try:
            _await_ready(server, url)
            yield url
        finally:
            server.terminate()
            server.wait(40)


def _await_ready(server: subprocess.Popen[bytes], url: str) -> None:
    until = time.monotonic() + START_SECONDS
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < until:
            assert server.poll() is None, "the server ended before it was ready"
            try:
                if client.get(f"{url}/health/ready").is_success:
                    return
            except httpx.TransportError:
                pass
            threading.Event().wait(0.05)
    pytest.fail("the server was not ready in time")


@dataclass
class Watched:
    """A page of which every message, fault and request is remembered.

    strangers: requests to another origin; they are cut off. asked: paths of requests for answers.
    """

    page: Page
    url: str
    messages: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", self._note)
        self.page.context.route("**/*", self._let_through)

    def _is_ours(self, request: Request) -> bool:
        return request.url.startswith((f"{self.url}/", "data:", "blob:"))

    def _note(self, request: Request) -> None:
        if not self._is_ours(request):
            self.strangers.append(request.url)
        elif request.method == "POST":
            self.asked.append(request.url.removeprefix(self.url))

    def _let_through(self, route: Route) -> None:
        if self._is_ours(route.request):
            route.continue_()
        else:
            route.abort()

    def forgive(self, status: int) -> None:
        """An answer of this status was expected; the browser writes it down by itself."""
        said = [message for message in self.messages if f"status of {status}" in message]
        assert said, f"no answer had the status {status}"
        self.messages = [message for message in self.messages if message not in said]


def explain_sample(watched: Watched) -> None:
    watched.page.locator("#welcome [data-do=sample]").click()
    wait_for_caption(watched.page, "sunflower, ")


def wait_for_caption(page: Page, text: str) -> None:
    """Until the live map is of this class, and of the last question."""
    page.locator(".pane:last-child .caption", has_text=text).wait_for()
    page.locator(".pane:last-child .progress").wait_for(state="hidden")


def until(page: Page, expression: str) -> None:
    """Until JavaScript is true; Playwright's own waiting is against the policy of the page."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"{expression} did not come true"
        threading.Event().wait(0.02)


@dataclass(frozen=True)
class Hand:
    """How a person works the page: `mouse`, or `keyboard` alone, by Tab as far as it takes."""

    kind: str
    page: Page

    def press(self, target: str | Locator) -> None:
        """A button, a box to tick."""
        element = self._find(target)
        if self.kind == "mouse":
            element.click()
        else:
            self.reach(element)
            self.page.keyboard.press("Space")

    def choose(self, target: str, value: str) -> None:
        """A value of a list."""
        element = self._find(target)
        if self.kind == "mouse":
            element.select_option(value)
            return
        self.reach(element)
        values: list[str] = element.evaluate("list => [...list.options].map(each => each.value)")
        place = element.evaluate("list => list.selectedIndex")
        for _ in range(abs(values.index(value) - place)):
            self.page.keyboard.press("ArrowDown" if values.index(value) > place else "ArrowUp")

    def slide(self, target: str, value: int) -> None:
        """A slider of 0 to 100, by the mouse to about there."""
        element = self._find(target)
        if self.kind == "mouse":
            element.scroll_into_view_if_needed()
            box = element.bounding_box()
            assert box is not None
            self.page.mouse.click(
                box["x"] + box["width"] * value / 100, box["y"] + box["height"] / 2
            )
            return
        self.reach(element)
        self.page.keyboard.press("Home")
        for _ in range(value):
            self.page.keyboard.press("ArrowRight")

    def write(self, target: str, text: str) -> None:
        """A text into a field, and done with it."""
        element = self._find(target)
        if self.kind == "mouse":
            element.click()
        else:
            self.reach(element)
        self.page.keyboard.press("Control+A")
        self.page.keyboard.type(text)
        self.page.keyboard.press("Enter")

    def reach(self, element: Locator) -> None:
        """Tab on to an element; the order is the page's own, so all of it can be reached so."""
        for _ in range(120):
            if element.evaluate("element => element === document.activeElement"):
                return
            self.page.keyboard.press("Tab")
        pytest.fail(f"the Tab key does not lead to {element}")

    def _find(self, target: str | Locator) -> Locator:
        return self.page.locator(target) if isinstance(target, str) else target


def canvas_pixels(page: Page, selector: str) -> tuple[int, int, bytes]:
    """Width, height and RGBA bytes of a canvas."""
    found = page.locator(selector).evaluate(
        """canvas => {
            const { width, height } = canvas;
            const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
            let text = "";
            for (let i = 0; i < data.length; i += 4096)
                text += String.fromCharCode(...data.subarray(i, i + 4096));
            return [width, height, btoa(text)];
        }"""
    )
    width, height, data = found
    return width, height, base64.b64decode(data)


def answer_of(http: httpx.Client, site: str, photo: Path, **options: Any) -> dict[str, Any]:
    """What the server says of an image, for comparison with the page."""
    body = photo.read_bytes()
    response = http.post(
        f"{site}/explain", params=options, content=body, headers={"content-type": "image/jpeg"}
    )
    assert response.is_success, response.text
    result: dict[str, Any] = response.json()["results"][0]
    return result


def experiment_answer(request: str, label: str) -> dict[str, Any]:
    """An answer of `/experiments` about one image, of which every label is this one."""
    prediction = {"class_id": 0, "label": label, "score": 0.5, "logit": 0.0}
    change = prediction | {"score_change": -0.25, "logit_change": -1.0}
    control = {"n": 8, "mean": -0.5, "low": -1.5, "high": 0.25, "smaller": 6}
    control["logit_changes"] = [-1.5, 0.25, -0.5, -0.5, -0.5, -0.5, -0.4, -0.35]
    edit = {
        "name": "edit",
        "edit": "hide",
        "predictions": [prediction],
        "changes": [change | {"control": control}],
        "control": control,
    }
    return {
        "id": request,
        "results": [{"predictions": [prediction], "edits": [edit], "forwards": 10.0}],
    }
