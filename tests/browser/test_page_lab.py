"""The verdict under the map; the lab: a region, an edit, its control, the list of experiments."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsing import SAMPLE, Hand, Watched, answer_of, canvas_pixels, explain_sample, until
from PIL import Image

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

WORDS = {"supported": "Supported:", "inconclusive": "Inconclusive:", "refuted": "Refuted:"}


@pytest.fixture
def lab(explained: Watched) -> Watched:
    """The page with the sample explained: the lab is open."""
    return explained


@pytest.fixture
def meadow(tmp_path: Path) -> Path:
    """Another image: green everywhere."""
    path = tmp_path / "meadow.png"
    Image.new("RGB", (300, 200), (40, 120, 30)).save(path)
    return path


def experiments(page: Watched) -> int:
    return page.page.locator(".experiment").count()


def test_a_verdict_is_said_under_the_map_with_its_numbers_behind_a_click(
    explained: Watched, hand: Hand, site: str, http: httpx.Client
) -> None:
    assert explained.page.locator(".verdict").inner_text() == ""
    hand.choose("#verify", "true")
    words = explained.page.locator(".verdict-words")
    words.wait_for()
    (explanation,) = answer_of(http, site, SAMPLE, verify="true", include="none")["explanations"]
    verify = explanation["verify"]
    assert words.inner_text().startswith(WORDS[verify["verdict"]])
    assert words.locator("em").inner_text() == "sunflower"
    said = explained.page.locator("#status").inner_text()
    assert words.inner_text() in said
    numbers = explained.page.locator(".verdict dl")
    assert not numbers.is_visible()
    hand.press(".verdict summary")
    numbers.wait_for()
    values = numbers.locator("dd").all_inner_texts()
    assert values[0] == f"{verify['agreement']:.2f}"
    assert values[5] == f"{100 * verify['p_place']:.1f} %"
    assert values[-2:] == ["40", "pb40/0"]


def test_an_inconclusive_verdict_offers_an_earlier_layer(explained: Watched, hand: Hand) -> None:
    answer_with(explained, {"verdict": "inconclusive", "reason": "fills_disagree"})
    hand.choose("#verify", "true")
    assert "opposite results for sunflower" in verdict(explained)
    hand.press(explained.page.get_by_role("button", name="Try layer2"))
    explained.page.locator(".facts", has_text="at layer2").wait_for()
    assert "layer=layer2" in explained.asked[-1]
    assert "verify=true" in explained.asked[-1]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"verdict": "supported"}, "Supported: hiding what this map marks lowers sunflower more"),
        ({"verdict": "refuted"}, "Refuted: sunflower depends on a place, but half of all other"),
        (
            {"verdict": "inconclusive", "reason": "flat_map"},
            "Inconclusive: the map of sunflower is the same everywhere",
        ),
        (
            {"verdict": "inconclusive", "reason": "flat_score"},
            "Inconclusive: hiding parts of the image hardly changes sunflower.",
        ),
        (
            {"verdict": "inconclusive", "reason": "elsewhere_as_good"},
            "Inconclusive: the same shape at other places explains sunflower as well.",
        ),
        (
            {"verdict": "inconclusive", "reason": "centre_as_good"},
            "Inconclusive: a spot in the center of the image explains sunflower as well.",
        ),
    ],
)
def test_each_verdict_is_a_sentence(
    open_page: Callable[..., Watched], found: dict[str, str], said: str
) -> None:
    page = open_page()
    page.page.wait_for_selector("#layer option", state="attached")
    explain_sample(page)
    answer_with(page, found)
    page.page.locator("#verify").select_option("search")
    assert verdict(page).startswith(said)


def answer_with(page: Watched, found: dict[str, str]) -> None:
    """The server's answers, with this verdict."""

    def change(route: Any) -> None:
        answer = route.fetch().json()
        verify = answer["results"][0]["explanations"][0]["verify"]
        verify.pop("reason", None)
        verify.pop("try_layer", None)
        verify |= found
        if found["verdict"] == "inconclusive":
            verify["try_layer"] = "layer2"
        route.fulfill(json=answer)

    page.page.route("**/explain?*verify*", change)


def verdict(page: Watched) -> str:
    page.page.locator(".verdict-words").wait_for()
    return page.page.locator(".verdict-words").inner_text()


def test_the_code_asks_for_the_verdict_too(explained: Watched) -> None:
    explained.page.locator("#verify").select_option("true")
    verdict(explained)
    explained.page.locator("#show-code").click()
    assert "verify=true" in explained.page.locator("#code-curl").inner_text()


def test_the_flower_or_the_meadow(lab: Watched, hand: Hand) -> None:
    """What the map marks decides, and a corner of the meadow does not."""
    hand.press("#run-experiment")
    card = lab.page.locator(".experiment").first
    card.wait_for()
    assert "what Grad-CAM marks for sunflower, from 50 %" in card.locator("h3").inner_text()
    assert re.match(r"sunflower 89\.4 % → .*: −\d", card.locator(".change").inner_text())
    assert card.locator(".control-words").inner_text().startswith("8 of 8 controls changed it less")
    assert card.get_by_role("img", name="Before: sunflower, 89.4 %").is_visible()
    assert card.get_by_role("img", name="After: ").is_visible()
    assert card.locator(".strip-line .dot").count() == 8
    strip = card.locator(".strip-line")
    own = strip.locator(".own").bounding_box()
    dots = [dot.bounding_box() for dot in strip.locator(".dot").all()]
    assert own is not None
    assert all(dot is not None and own["x"] < dot["x"] for dot in dots)
    draw(lab, hand, (0.75, 0.6), (0.98, 0.98))
    hand.choose("#edit", "blur")
    hand.press("#run-experiment")
    until(lab.page, "document.querySelectorAll('.experiment').length === 2")
    newest = lab.page.locator(".experiment").first
    assert newest.locator("h3").inner_text().startswith("Blur the region: box at 4")
    small = re.search(r"(\d+) of 8", newest.locator(".control-words").inner_text())
    assert small is not None
    assert int(small[1]) < 8


def draw(page: Watched, hand: Hand, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draws a box in shares of the image, or types it."""
    if hand.kind == "keyboard":
        left, top = round(start[0] * 640), round(start[1] * 480)
        size = [round(end[0] * 640) - left, round(end[1] * 480) - top]
        for name, value in zip("xywh", [left, top, *size], strict=True):
            hand.reach(page.page.locator(f"#box-{name}"))
            page.page.keyboard.press("Control+A")
            page.page.keyboard.type(str(value))
    else:
        stage = page.page.locator("#lab-image")
        stage.scroll_into_view_if_needed()
        box = stage.bounding_box()
        assert box is not None
        points = [
            (box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)
        ]
        page.page.mouse.move(*points[0])
        page.page.mouse.down()
        page.page.mouse.move(*points[1], steps=4)
        page.page.mouse.up()
    assert page.page.locator("[name=region][value=box]").is_checked()
    assert page.page.locator("#lab-marks .box").count() == 2


def test_what_is_sent_is_the_region_that_the_page_shows(
    lab: Watched, site: str, http: httpx.Client
) -> None:
    """The page's region of 50 % is that of the server's `regions`; so is the answer."""
    lab.page.locator("#run-experiment").click()
    lab.page.locator(".experiment").wait_for()
    regions = answer_of(http, site, SAMPLE, include="regions")["explanations"][0]["regions"]
    edits = [{"name": "edit", "edit": "hide", "region": {"rle": regions["rle"]}}]
    response = http.post(
        f"{site}/experiments",
        files={"image": SAMPLE.read_bytes(), "edits": (None, json.dumps(edits))},
    )
    (edit,) = response.json()["results"][0]["edits"]
    shown = lab.page.locator(".change").inner_text()
    points = re.search(r": (.*) points", shown)
    assert points is not None
    expected = 100 * edit["changes"][0]["score_change"]
    assert float(points[1].replace("−", "-")) == pytest.approx(expected, abs=1.5)


def test_the_background_comes_from_another_image(lab: Watched, hand: Hand, meadow: Path) -> None:
    options = lab.page.locator("#edit option")
    assert options.nth(4).is_disabled()
    lab.page.set_input_files("#file", meadow)
    until(lab.page, "document.querySelector('#photos [title=\"meadow.png\"]') !== null")
    lab.page.locator("#photos button").first.click()
    lab.page.locator(".caption", has_text="sunflower, ").wait_for()
    hand.choose("#edit", "background")
    assert lab.page.locator("#donor").input_value() != ""
    hand.press("#run-experiment")
    lab.page.locator(".experiment").wait_for()
    assert "(meadow.png)" in lab.page.locator(".experiment h3").inner_text()
    width, height, data = canvas_pixels(lab.page, ".experiment figure:last-child canvas")
    assert (width, height) == (360, 270)
    assert tuple(data[:3]) == (40, 120, 30)


def test_experiments_stay_with_their_image_and_are_saved(
    lab: Watched, hand: Hand, meadow: Path
) -> None:
    hand.press("#run-experiment")
    lab.page.locator(".experiment").wait_for()
    lab.page.set_input_files("#file", meadow)
    lab.page.locator(".stage[aria-label^='meadow.png with']").wait_for()
    assert experiments(lab) == 0
    lab.page.locator("#photos button").first.click()
    lab.page.locator(".experiment").wait_for()
    with lab.page.expect_download() as download:
        hand.press("#save-report")
    saved = download.value.path().read_text(encoding="utf-8")
    assert "8 of 8 controls changed it less" in saved
    (data,) = re.findall(r'<script type="application/json">(.*)</script>', saved, re.DOTALL)
    (kept,) = json.loads(data)["experiments"]
    assert kept["image"] == "sunflower.jpg"
    assert kept["answer"]["results"][0]["edits"][0]["changes"][0]["label"] == "sunflower"
    hand.press(lab.page.locator(".experiment button", has_text="Remove"))
    assert experiments(lab) == 0


def test_an_experiment_that_fails_says_so_in_the_lab(explained: Watched) -> None:
    refusal = {"code": "queue_full", "detail": "The queue is full; try again in a second."}
    explained.page.route("**/experiments?*", lambda route: route.fulfill(status=429, json=refusal))
    explained.page.locator("#run-experiment").click()
    notice = explained.page.locator("#lab-failure .notice")
    notice.wait_for()
    words = notice.locator("p").first.inner_text()
    assert words == "The service is busy. Try again in a moment."
    assert notice.get_by_role("button", name="Try again").is_visible()
    assert explained.page.locator("#run-experiment").get_attribute("aria-busy") is None
    explained.forgive(429)


def test_a_map_that_marks_nothing_is_not_an_experiment(explained: Watched) -> None:
    """Of an all-zero map there is no region."""

    def change(route: Any) -> None:
        answer = route.fetch().json()
        explanation = answer["results"][0]["explanations"][0]
        explanation["heatmap"] = black()
        route.fulfill(json=answer)

    explained.page.route("**/explain?*layercam*", change)
    explained.page.locator("#method").select_option("layercam")
    explained.page.locator(".facts", has_text="LayerCAM").wait_for()
    asked = len(explained.asked)
    explained.page.locator("#run-experiment").click()
    explained.page.locator("#lab-failure", has_text="marks nothing").wait_for()
    assert len(explained.asked) == asked


def black() -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("L", (64, 48)).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"media_type": "image/png", "width": 64, "height": 48, "data": data}
