"""The report of `camserve explain --report`, opened from the disk in Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import SAMPLE
from PIL import Image
from playwright.sync_api import Browser, Page
from typer.testing import CliRunner

from service.cli.main import app

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On a sunflower, on what is a dandelion to the built-in model, and on a broken file."""
    folder = tmp_path_factory.mktemp("photos")
    shutil.copy(SAMPLE, folder / "b.jpg")
    Image.new("RGB", (320, 240), (128, 128, 128)).save(folder / "a.png")
    (folder / "c.jpg").write_bytes(b"no picture")
    file = folder / "why.html"
    ran = CliRunner().invoke(app, ["explain", str(folder), "--report", str(file), "--workers", "1"])
    assert ran.exit_code == 1, ran.output
    return file


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, chromium: Browser, report: Path) -> Iterator[Page]:
    """The report in a window; it may ask for nothing, and say nothing in the console."""
    window = chromium.new_page(color_scheme=request.param, viewport={"width": 1000, "height": 800})
    asked: list[str] = []
    said: list[str] = []
    window.on("request", lambda request: asked.append(request.url))
    window.on("console", lambda message: said.append(message.text))
    window.on("pageerror", lambda error: said.append(str(error)))
    window.goto(report.as_uri())
    yield window
    window.close()
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert said == []


def names(page: Page) -> list[str]:
    """The images that are shown, in their order."""
    return [Path(each).name for each in page.locator("article:visible .name").all_inner_texts()]


def test_a_reader_orders_picks_dims_and_enlarges(page: Page) -> None:
    assert names(page) == ["a.png", "b.jpg"]
    assert "c.jpg" in page.locator(".failed").inner_text()
    page.locator("#order").select_option("high")
    assert names(page) == ["b.jpg", "a.png"]
    page.locator(".classes button", has_text="sunflower").click()
    assert names(page) == ["b.jpg"]
    page.locator(".classes button", has_text="sunflower").click()
    assert len(names(page)) == 2
    page.locator("#opacity").fill("0.2")
    assert opacity(page) == "0.2"
    page.locator("article button").first.press("Enter")
    assert page.locator("dialog svg").is_visible()
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="hidden")


def opacity(page: Page) -> Any:
    return page.locator("article .heat").first.evaluate("each => getComputedStyle(each).opacity")


def test_axe_finds_nothing_in_the_report(page: Page, axe: str) -> None:
    page.evaluate(axe)
    found = page.evaluate("axe.run()")
    assert [(each["id"], each["impact"]) for each in found["violations"]] == []
