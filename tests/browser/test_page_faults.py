"""What the page says when something is wrong, and what it bears."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import SAMPLE, Watched, explain_sample, wait_for_caption
from PIL import Image

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]


def alert(page: Watched) -> str:
    notice = page.page.locator("[role=alert] .notice")
    notice.wait_for()
    return notice.locator("p").first.inner_text()


def test_a_broken_file_is_refused_in_words_and_the_page_begins_again(
    page: Watched, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(SAMPLE.read_bytes()[:5000])
    page.page.set_input_files("#file", broken)
    assert alert(page) == (
        "broken.jpg: The image is truncated or corrupt; send the complete file again."
    )
    assert page.page.locator("#welcome").is_visible()
    page.forgive(400)
    page.page.get_by_role("button", name="Dismiss").click()
    explain_sample(page)
    assert page.page.locator("[role=alert] .notice").count() == 0


def test_a_broken_file_among_others_leaves_them_alone(page: Watched, tmp_path: Path) -> None:
    text = tmp_path / "notes.jpg"
    text.write_text("no picture")
    page.page.set_input_files("#file", [SAMPLE, text])
    wait_for_caption(page.page, "sunflower, ")
    assert alert(page).startswith("notes.jpg: The bytes are not a supported image format")
    assert page.page.locator("#photos").is_hidden()
    page.forgive(415)


def test_a_photograph_of_12_megapixels_is_explained(page: Watched, tmp_path: Path) -> None:
    photo = tmp_path / "large.jpg"
    with Image.open(SAMPLE) as sample:
        sample.resize((4000, 3000)).save(photo, quality=92)
    page.page.set_input_files("#file", photo)
    wait_for_caption(page.page, "sunflower, ")
    sizes = [
        page.page.locator(f".pane {name}").evaluate("canvas => [canvas.width, canvas.height]")
        for name in (".photo", ".heat")
    ]
    assert sizes == [[2048, 1536], [2048, 1536]]


def test_an_upright_portrait_lies_under_its_map(page: Watched, tmp_path: Path) -> None:
    photo = tmp_path / "portrait.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    with Image.open(SAMPLE) as sample:
        sample.save(photo, exif=exif)
    page.page.set_input_files("#file", photo)
    page.page.locator("#predictions li").first.wait_for()
    for name in (".photo", ".heat"):
        size = page.page.locator(f".pane {name}").evaluate(
            "canvas => [canvas.width, canvas.height]"
        )
        assert size == [480, 640]


def test_what_the_browser_cannot_read_is_shown_by_the_server(page: Watched, tmp_path: Path) -> None:
    photo = tmp_path / "scan.tiff"
    with Image.open(SAMPLE) as sample:
        sample.save(photo)
    page.page.set_input_files("#file", photo)
    wait_for_caption(page.page, "sunflower, ")
    pixel = page.page.locator(".pane .photo").evaluate(
        "canvas => [...canvas.getContext('2d').getImageData(270, 250, 1, 1).data]"
    )
    with Image.open(SAMPLE) as sample:
        expected = sample.getpixel((270, 250))
    assert np.abs(np.subtract(pixel[:3], expected)).max() < 40


def test_an_unknown_class_is_answered_with_the_nearest_and_the_map_stays(
    explained: Watched,
) -> None:
    explained.page.locator("#target").fill("tullip")
    explained.page.keyboard.press("Enter")
    assert "tulip" in alert(explained)
    assert explained.page.locator(".caption").inner_text().startswith("sunflower, ")
    assert explained.page.locator("#target").input_value() == ""
    explained.forgive(404)


def test_a_method_that_the_model_refuses_says_why(explained: Watched) -> None:
    """The page does not offer it; a model may have been replaced since the page was opened."""
    option = explained.page.locator("#method option[value=attention_rollout]")
    option.evaluate("option => { option.disabled = false; }")
    explained.page.locator("#method").select_option("attention_rollout")
    assert "no attention between tokens" in alert(explained)
    assert explained.page.locator("#method").input_value() == "gradcam"
    explained.forgive(422)


def test_a_server_that_is_gone_is_said_and_asked_again(
    open_page: Callable[..., Watched], serve: Callable[..., Any]
) -> None:
    with serve("--model", "tiny:small", "--app-dir", "tests/support") as url:
        page = open_page(url)
        page.page.wait_for_selector("#layer option", state="attached")
        page.page.locator("#welcome [data-do=sample]").click()
        page.page.locator("#predictions li").first.wait_for()
    page.page.locator("#method").select_option("layercam")
    assert alert(page) == "The server cannot be reached. Is it still running?"
    assert page.page.get_by_role("button", name="Try again").is_visible()
    page.messages = [each for each in page.messages if "ERR_CONNECTION_REFUSED" not in each]


def test_a_key_is_asked_for_and_kept_in_the_tab(
    open_page: Callable[..., Watched], serve: Callable[..., Any], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"anna:{hashlib.sha256(b'open sesame').hexdigest()}\n")
    with serve("--api-keys-file", str(keys)) as url:
        page = open_page(url)
        field = page.page.get_by_label("API key")
        field.wait_for()
        page.page.keyboard.type("open sesame")
        page.page.keyboard.press("Enter")
        field.wait_for(state="hidden")
        explain_sample(page)
        assert page.page.evaluate("Object.values(localStorage)") == []
        page.page.locator("#show-code").click()
        code = page.page.locator("#code").inner_text()
        assert "$CAMSERVE_KEY" in code
        assert "open sesame" not in code
        page.forgive(401)


def test_the_page_works_behind_a_prefix_with_or_without_its_slash(
    open_page: Callable[..., Watched], serve: Callable[..., Any]
) -> None:
    with serve("--root-path", "/vision/cam", "--model", "builtin") as url:
        for path in ("/vision/cam/", "/vision/cam", "/"):
            page = open_page(url, path)
            page.page.wait_for_selector("#layer option", state="attached")
            explain_sample(page)
        page = open_page(url, "/vision/cam/docs")
        page.page.locator("#operations-classify-explain").wait_for()


def test_the_routes_are_listed_without_a_word_in_the_console(
    open_page: Callable[..., Watched], site: str
) -> None:
    page = open_page(site, "/docs")
    page.page.locator("#operations-classify-explain").click()
    page.page.locator(".opblock-body .btn", has_text="Try it out").wait_for()
