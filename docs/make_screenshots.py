"""Take the screenshots of the page that README and the tutorial show, in Chromium.

    PYTHONPATH=tests/support python docs/make_screenshots.py

Starts a service of its own with the built-in model; writes docs/images/page-*.webp.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from browsing import Watched, explain_sample, serving, wait_for_caption
from PIL import Image
from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parent / "images"


def explained(page: Page) -> None:
    """The sample as the page shows it first."""
    page.locator(".facts").wait_for()


def compared(page: Page) -> None:
    """Sunflower beside dandelion, with their regions."""
    page.locator("#compare").click()
    page.locator("#predictions .why", has_text="dandelion").click()
    wait_for_caption(page, "dandelion, ")
    page.locator("#regions").check()
    page.locator(".marks .box").first.wait_for(state="attached")
    page.evaluate("document.activeElement.blur()")


SHOTS: dict[str, tuple[tuple[int, int], str, Callable[[Page], None]]] = {
    "page-light": ((1280, 900), "light", explained),
    "page-dark": ((1280, 900), "dark", compared),
    "page-phone": ((390, 1200), "light", explained),
}


def main() -> None:
    """Take every screenshot."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with serving("--model", "builtin") as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        for name, ((width, height), scheme, arrange) in SHOTS.items():
            page = browser.new_page(
                viewport={"width": width, "height": height},
                color_scheme="dark" if scheme == "dark" else "light",
                device_scale_factor=1.5 if width > 400 else 2,
                reduced_motion="reduce",
            )
            page.goto(url)
            page.wait_for_selector("#layer option", state="attached")
            explain_sample(Watched(page, url))
            arrange(page)
            page.evaluate("scrollTo(0, 0)")
            target = IMAGES / f"{name}.webp"
            with Image.open(io.BytesIO(page.screenshot())) as shot:
                shot.convert("RGB").save(target, quality=80, method=6)
            print(f"docs/images/{target.name}: {target.stat().st_size // 1024} kB")
        browser.close()


if __name__ == "__main__":
    main()
