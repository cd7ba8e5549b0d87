"""The page in Debian's Chromium, against the command `camserve serve` in a process of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsing import Hand, Watched, explain_sample, serving
from playwright.sync_api import Browser, sync_playwright

AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"

WAIT_MS = 20_000

RunSite = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="session")
def serve() -> RunSite:
    """A server with flags of its own; see `serving`."""
    return serving


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """Debian's browser."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("Chromium is not installed; on Debian: apt-get install chromium")
    return path


@pytest.fixture(scope="session")
def site(chromium_path: str) -> Iterator[str]:
    """A server of the built-in model and of the tests' `small`."""
    with serving(
        "--model", "builtin", "--model", "tiny:small", "--app-dir", "tests/support"
    ) as url:
        yield url


@pytest.fixture(scope="session")
def http() -> Iterator[httpx.Client]:
    """What the page shows is compared with what the server answers to this client."""
    with httpx.Client(timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def chromium(chromium_path: str) -> Iterator[Browser]:
    """The browser, with a camera that shows a test picture.

    Playwright keeps an event loop in this thread while it is open: other modules want their own.
    """
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # it cannot be set up by root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, which finds faults that shut people out."""
    if not AXE.exists():
        pytest.skip("axe-core is not installed; `make browser` installs it, with npm")
    return AXE.read_text(encoding="utf-8")


OpenPage = Callable[..., Watched]


@pytest.fixture
def open_page(chromium: Browser, site: str) -> Iterator[OpenPage]:
    """Opens the page in a window of its own; nothing may be in the console when the test ends."""
    opened: list[Watched] = []

    def open_it(url: str = site, path: str = "/", **options: Any) -> Watched:
        options = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"} | options
        context = chromium.new_context(**options)
        context.set_default_timeout(WAIT_MS)
        granted = ["clipboard-read", "clipboard-write", "camera"]
        context.grant_permissions(granted, origin=url)
        watched = Watched(context.new_page(), url)
        watched.watch()
        watched.page.goto(url + path)
        opened.append(watched)
        return watched

    yield open_it
    for watched in opened:
        watched.page.context.close()
        assert watched.messages == []
        assert watched.strangers == []


WINDOWS = {
    "desk, light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "phone, dark": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"},
}


@pytest.fixture(params=WINDOWS.values(), ids=WINDOWS.keys())
def page(request: pytest.FixtureRequest, open_page: OpenPage) -> Watched:
    """The page before there is a photograph, at a desk in light and on a phone in dark."""
    watched = open_page(**request.param)
    watched.page.wait_for_selector("#layer option", state="attached")
    return watched


@pytest.fixture
def explained(page: Watched) -> Watched:
    """The page with the sample explained."""
    explain_sample(page)
    return page


@pytest.fixture(params=["mouse", "keyboard"])
def hand(request: pytest.FixtureRequest, page: Watched) -> Hand:
    return Hand(request.param, page.page)
