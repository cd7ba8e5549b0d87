"""Never one image's answer beside another, however late answers come and whichever fail."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from browsing import SAMPLE, Watched, experiment_answer, explain_sample, until
from PIL import Image, ImageOps
from playwright.sync_api import Error, Page, Route

from api_schemas.methods import METHODS as METHOD_RECORDS

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

MODELS = ["builtin", "small"]
METHODS = ["gradcam", "layercam", "input_gradient", "integrated_gradients", "rise"]
FEW = "/?samples=24&steps=4"
"""So that the slow methods, of which the predictions come first, take little time."""

SEEN = {"pane", "verdict", "failure", "experiments", "channels", "travelled", "undone", "saved"}

ON_SCREEN = """() => {
    const text = (selector) => document.querySelector(selector).textContent;
    const all = (selector, read) => [...document.querySelectorAll(selector)].map(read);
    return {
        image: document.querySelector("#photos [aria-pressed=true]").title.split(":")[0],
        model: document.querySelector("#model").value,
        pane: document.querySelector(".pane").dataset.request,
        predictions: document.querySelector("#predictions").dataset.request,
        export: document.querySelector("#export").dataset.request,
        lab: document.querySelector("#lab").dataset.request,
        caption: text(".caption"),
        verdict: text(".verdict"),
        failure: text(".failure"),
        heat: document.querySelector(".heat").width,
        described: document.querySelector(".pane .stage").getAttribute("aria-label"),
        labels: all("#predictions .label", (each) => each.textContent),
        experiments: all(".experiment", (each) => each.dataset.request),
        thumbnails: all("#photos button", (each) => [each.title, each.textContent]),
        method: document.querySelector("#method").value,
        address: new URLSearchParams(location.search).get("method") ?? "gradcam",
        facts: text(".facts"),
        waits: !document.querySelector(".progress").hidden,
        channels: document.querySelector("#channels").dataset.request,
        channelsAreShown: !document.querySelector("#channels").hidden,
        savable: !document.querySelector("#save-json").disabled,
        labIsOpen: !document.querySelector("#lab").hidden,
    };
}"""


@dataclass
class Held:
    """Answers that wait for the test to let them go; each names its image, model and method.

    names: the name of an image file by the hash of its bytes.
    """

    names: dict[str, str]
    waiting: list[Route] = field(default_factory=list)
    answers: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)
    count: int = 0

    def watch(self, page: Page) -> None:
        for path in ("models/*", "models/*/layers", "explain?*", "predict?*", "experiments?*"):
            page.route(f"**/{path}", self.hold)

    def hold(self, route: Route) -> None:
        self.waiting.append(route)

    def let_go(self, route: Route) -> None:
        """The server's answer, in which every label says what it belongs to."""
        with contextlib.suppress(Error):  # the page may have cancelled the request
            if route.request.method == "GET":
                route.continue_()
            else:
                route.fulfill(json=self._answer(route))

    def fail(self, route: Route, status: int) -> None:
        about = self.about(route)
        with contextlib.suppress(Error):
            if status == 0:
                route.abort()
            else:
                detail = {"code": "failed", "detail": f"failed for {'|'.join(about[1:3])}"}
                route.fulfill(status=status, json=detail)

    def about(self, route: Route) -> tuple[str, str, str, str]:
        """Route, image, model and method of a request."""
        parts = urlsplit(route.request.url)
        asked = parse_qs(parts.query)
        body = route.request.post_data_buffer or b""
        name = self.names.get(hashlib.sha256(body).hexdigest())
        if name is None:  # a form
            name = next((each for each in self.names.values() if each.encode() in body), "")
        method = asked.get("method", ["gradcam"])[0]
        return parts.path.strip("/"), name, asked.get("model", MODELS[:1])[0], method

    def _answer(self, route: Route) -> dict[str, Any]:
        path, image, model, method = self.about(route)
        self.count += 1
        if path == "experiments":
            return experiment_answer(f"{image}|{model}|{self.count}", f"{image}/{model}")
        key = (path, image, model, method, urlsplit(route.request.url).query)
        if key not in self.answers:
            self.answers[key] = route.fetch().json()
        answer = json.loads(json.dumps(self.answers[key]))
        answer["id"] = f"{image}|{model}|{self.count}"
        for prediction in answer["results"][0]["predictions"]:
            prediction["label"] = f"{image}/{model}/{prediction['class_id']}"
        for explanation in answer["results"][0].get("explanations", ()):
            explanation["label"] = f"{image}/{model}/{method}"
        return dict(answer)


def check(page: Page) -> dict[str, Any]:
    """Everything on screen belongs to the chosen image and model, or is empty."""
    shown: dict[str, Any] = page.evaluate(ON_SCREEN)
    own = f"{shown['image']}|{shown['model']}|"
    words = f"{shown['image']}/{shown['model']}/"
    assert shown["pane"] == shown["export"] == shown["lab"]
    assert shown["savable"] == shown["labIsOpen"] == bool(shown["pane"])
    assert shown["described"].startswith(shown["image"])
    if shown["pane"]:
        assert shown["pane"].startswith(own)
        assert shown["predictions"] == shown["pane"]
        assert shown["caption"].startswith(words)
        assert shown["heat"] > 0
        assert words in shown["verdict"] or not shown["verdict"]
        explained = re.split(", | rather than ", shown["caption"].removeprefix(words))[0]
        assert shown["facts"].startswith(METHOD_RECORDS[explained].title)
        assert shown["waits"] or explained == shown["method"]
    else:
        assert shown["caption"] == shown["image"]
        assert shown["verdict"] == ""
        assert shown["heat"] == 0
    assert shown["method"] == shown["address"]
    assert bool(shown["channels"]) == shown["channelsAreShown"]
    assert shown["channels"] == "" or shown["channels"].startswith(own)
    assert shown["predictions"] == "" or shown["predictions"].startswith(own)
    assert bool(shown["labels"]) == bool(shown["predictions"])
    assert all(label.startswith(words) for label in shown["labels"])
    assert all(each.startswith(f"{shown['image']}|") for each in shown["experiments"])
    for title, label in shown["thumbnails"]:
        name = title.split(":")[0]
        assert f"failed for {name}|{shown['model']}" in title or "failed for" not in title
        assert label in (name, "⚠ failed") or label.startswith(f"{name}/{shown['model']}/")
    said = f"failed for {shown['image']}|{shown['model']}"
    assert said in shown["failure"] or "failed for" not in shown["failure"]
    return shown


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Four images that differ."""
    with Image.open(SAMPLE) as sample:
        small = sample.resize((160, 120))
    made = {
        "plain": small,
        "mirror": ImageOps.mirror(small),
        "flip": ImageOps.flip(small),
        "negative": ImageOps.invert(small),
    }
    for name, image in made.items():
        image.save(tmp_path / f"{name}.png")
    return [tmp_path / f"{name}.png" for name in made]


@pytest.fixture
def held(open_page: Callable[..., Watched], images: list[Path]) -> tuple[Watched, Held]:
    """The page with four images, whose answers are held back."""
    watched = open_page(path=FEW)
    watched.page.wait_for_selector("#layer option", state="attached")
    names = {hashlib.sha256(image.read_bytes()).hexdigest(): image.name for image in images}
    held = Held(names)
    held.watch(watched.page)
    watched.page.set_input_files("#file", images)
    watched.page.locator("#photos button").nth(3).wait_for()
    return watched, held


@dataclass
class Visitor:
    """Does anything in any order, while answers come late, in another order, or not at all."""

    page: Page
    answers: Held
    chance: random.Random
    done: set[str] = field(default_factory=set)

    def steps(self) -> list[Callable[[], None]]:
        changes = [
            self.choose_image,
            self.choose_model,
            self.choose_method,
            self.choose_layer,
            self.choose_class,
            self.verify,
            self.experiment,
            self.look_inside,
            self.travel,
            self.remove,
            self.undo,
            self.save,
        ]
        return [*changes, self.choose_image, self.fail, self.fail, *[self.answer] * 16]

    def choose_image(self) -> None:
        photos = self.page.locator("#photos button")
        photos.nth(self.chance.randrange(photos.count())).click()

    def choose_layer(self) -> None:
        if self.page.locator("#layer").is_enabled():
            self._select("#layer", ["layer2", "layer3", "features"])

    def choose_class(self) -> None:
        buttons = self.page.locator("#predictions button:enabled")
        if (count := min(4, buttons.count())) and not self._is_inert():
            buttons.nth(self.chance.randrange(count)).click()

    def look_inside(self) -> None:
        if not self._is_inert():
            self.page.locator("#inside-show").click()

    def travel(self) -> None:
        """Back or forward, as far as this page goes."""
        way = self.chance.choice(["Back", "Back", "Forward"])
        if self.page.evaluate(f"navigation.canGo{way}"):
            self.page.evaluate(f"history.{way.lower()}()")
            self.done.add("travelled")

    def remove(self) -> None:
        if self.page.locator("#photos button").count() > 2:
            self.page.locator("[data-do=remove]").click()

    def undo(self) -> None:
        if self.page.locator("#undo").is_visible():
            self.page.get_by_role("button", name="Undo").click()
            self.done.add("undone")

    def save(self) -> None:
        """The export is of the map on screen."""
        if self.page.locator("#save-json").is_enabled():
            assert saved_id(self.page) == check(self.page)["pane"]
            self.done.add("saved")

    def choose_model(self) -> None:
        self.page.locator("#model").select_option(self.chance.choice(MODELS))

    def choose_method(self) -> None:
        self._select("#method", METHODS)

    def verify(self) -> None:
        self._select("#verify", ["", "true", "search"])

    def _select(self, control: str, values: list[str]) -> None:
        """One of the values that the control has; none while there is no model."""
        options = f"[...document.querySelector('{control}').options].map(each => each.value)"
        known = [value for value in values if value in self.page.evaluate(options)]
        if known and not self._is_inert():
            self.page.locator(control).select_option(self.chance.choice(known))

    def _is_inert(self) -> bool:
        return bool(self.page.evaluate("document.querySelector('#question').inert"))

    def experiment(self) -> None:
        if self.page.locator("#lab").is_visible():
            self.page.locator("#run-experiment").click()

    def answer(self) -> None:
        if self.answers.waiting:
            self.answers.let_go(self._one())

    def fail(self) -> None:
        if self.answers.waiting:
            self.answers.fail(self._one(), self.chance.choice([0, 429, 500, 503, 504]))

    def _one(self) -> Route:
        """Any request, or the newest, so that some are still of use."""
        newest = len(self.answers.waiting) - 1
        place = self.chance.choice([newest, self.chance.randint(0, newest)])
        return self.answers.waiting.pop(place)


@pytest.mark.parametrize("seed", range(3))
def test_all_that_is_on_screen_is_of_one_request_whatever_is_late_or_fails(
    held: tuple[Watched, Held], seed: int
) -> None:
    watched, answers = held
    visitor = Visitor(watched.page, answers, random.Random(seed))
    seen: set[str] = set()
    watched.page.locator("#verify").select_option("true")
    for step in range(1500):
        visitor.chance.choice(visitor.steps())()
        shown = check(watched.page)
        seen.update(visitor.done, (name for name in SEEN if shown.get(name)))
        if step >= 150 and seen == SEEN:
            break
    assert seen == SEEN
    settle(watched, answers)


def settle(watched: Watched, answers: Held) -> None:
    """In the end every answer comes, and the map is of what is chosen."""
    page = watched.page
    for name in MODELS:  # a model whose details failed is asked for again
        page.locator("#model").select_option(name)
        for _ in range(200):
            check(page)
            if page.evaluate("document.querySelector('.pane').dataset.request"):
                break
            while answers.waiting:
                answers.let_go(answers.waiting.pop())
            page.evaluate("new Promise(requestAnimationFrame)")
    shown = check(page)
    assert shown["pane"].startswith(f"{shown['image']}|{MODELS[-1]}|")
    assert saved_id(page) == shown["pane"]
    watched.messages = [each for each in watched.messages if "Failed to load" not in each]


def saved_id(page: Page) -> str:
    """The request whose answer is saved as JSON."""
    with page.expect_download() as download:
        page.locator("#save-json").click()
    return str(json.loads(download.value.path().read_text())["id"])


def test_a_failure_is_shown_at_its_image_and_nowhere_else(held: tuple[Watched, Held]) -> None:
    watched, answers = held
    page = watched.page
    answers.fail(wait_for(page, answers, "explain"), 503)
    page.locator(".failure .notice", has_text="failed for plain.png|builtin").wait_for()
    thumbnail = page.locator("#photos button").first
    assert thumbnail.inner_text() == "⚠ failed"
    assert "failed for plain.png|builtin" in str(thumbnail.get_attribute("title"))
    page.locator("#photos button").nth(1).click()
    assert page.locator(".failure").inner_text() == ""
    assert check(page)["caption"] == "mirror.png"
    thumbnail.click()
    while page.locator(".caption").inner_text() == "plain.png":
        while answers.waiting:
            answers.let_go(answers.waiting.pop())
        page.evaluate("new Promise(requestAnimationFrame)")
    assert check(page)["failure"] == ""
    watched.messages = [each for each in watched.messages if "Failed to load" not in each]


def test_predictions_come_before_a_slow_map(held: tuple[Watched, Held]) -> None:
    watched, answers = held
    page = watched.page
    page.locator("#method").select_option("rise")
    predict = wait_for(page, answers, "predict?model=builtin")
    assert check(page)["labels"] == []
    answers.let_go(predict)
    page.locator("#predictions .why").first.wait_for()
    assert check(page)["pane"] == ""
    explain = wait_for(page, answers, "method=rise")
    assert page.locator(".progress").is_visible()
    answers.fail(explain, 504)
    page.locator(".failure .notice").wait_for()
    assert check(page)["labels"] != []
    watched.messages = [each for each in watched.messages if "Failed to load" not in each]


def test_progress_is_measured_and_no_estimate_is_kept_that_was_wrong(
    open_page: Callable[..., Watched],
) -> None:
    """One pass took 16 ms: 1,001 are estimated at 16 s; 101 passes at 1.6 s, and that passes."""
    watched = open_page()
    page = watched.page

    def answer(route: Route) -> None:
        if "rise" in route.request.url:
            return  # it never comes
        body = route.fetch().json()
        body["timing_ms"]["inference"] = 16.0
        route.fulfill(json=body)

    page.route("**/explain?*", answer)
    explain_sample(watched)
    page.locator("#method").select_option("rise")
    words = page.locator(".progress-words")
    words.get_by_text(re.compile(r"1,001 forward passes · \d\.\d of about 16 s$")).wait_for()
    until(page, f"{SHARE} > 0.02")
    share, text = page.evaluate(f"[{SHARE}, document.querySelector('.progress-words').textContent]")
    elapsed = float(text.rsplit("· ", 1)[1].split(" ")[0])
    assert share == pytest.approx(elapsed / 16.016, abs=0.051 / 16)
    assert page.locator(".progress-bar.fills").count() == 1
    page.locator("#samples").fill("100")
    page.keyboard.press("Enter")
    words.get_by_text(re.compile(r"101 forward passes · \d\.\d of about 1\.6 s$")).wait_for()
    words.get_by_text(re.compile(r"\d\.\d s, estimated 1\.6 s$")).wait_for()
    assert page.locator(".progress-bar.fills").count() == 0
    page.locator(".cancel").click()


SHARE = "+document.querySelector('.progress-bar').style.getPropertyValue('--done')"


def wait_for(page: Page, answers: Held, part: str) -> Route:
    """The request for the shown image, whose address has this part."""
    for _ in range(500):
        for route in reversed(answers.waiting):
            if part in route.request.url and answers.about(route)[1] == "plain.png":
                answers.waiting.remove(route)
                return route
        page.evaluate("new Promise(requestAnimationFrame)")
    pytest.fail(f"the page did not ask for {part}")
