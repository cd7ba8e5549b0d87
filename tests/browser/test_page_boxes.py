"""The page with a detector and a segmenter: a map for each object, and what such models lack."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from urllib.parse import parse_qs, urlsplit

import detectors
import numpy as np
import pytest
from browsing import Watched, serving
from PIL import Image
from playwright.sync_api import Page

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

OpenPage = Callable[..., Watched]
KINDS = ("faster_rcnn", "own", "segmenter")


@pytest.fixture(scope="module")
def site(chromium_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    tables = [
        f'[[model]]\nname = "{kind}"\nbuilder = "detectors:{kind}"\n'
        f"labels = {json.dumps(detectors.LABELS)}\n"
        for kind in KINDS
    ]
    config = tmp_path_factory.mktemp("models") / "models.toml"
    tables.append(
        tables[0].replace('"faster_rcnn"', '"blind"') + "arguments = { box_score_thresh = 1.0 }\n"
    )
    config.write_text("\n".join([*tables, '[[model]]\nname = "small"\nbuilder = "tiny:small"\n']))
    with serving("--config", str(config), "--app-dir", "tests/support") as url:
        yield url


def png(size: tuple[int, int] = (70, 90)) -> bytes:
    pixels = detectors.image(1, size).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return file.getvalue()


def opened(open_page: OpenPage, site: str, kind: str, data: bytes, **options: object) -> Page:
    page = open_page(url=site, path=f"/?model={kind}", **options).page
    page.wait_for_selector("#layer option", state="attached")
    file = {"name": "scene.png", "mimeType": "image/png", "buffer": data}
    page.set_input_files("#file", files=[file])
    page.wait_for_selector("#predictions .why[aria-pressed=true], .facts:text('finds nothing')")
    return page


def places(page: Page) -> list[str]:
    """The rectangles of the detections, the explained one last."""
    read = "(all) => all.map((each) => ['x', 'y'].map((name) => each.getAttribute(name)).join())"
    found = page.locator(".detection:not(.explained)").evaluate_all(read)
    return [*found, *page.locator(".detection.explained").evaluate_all(read)]


@pytest.mark.parametrize("width", [1280, 390])
def test_a_box_is_explained_by_a_click_on_it_or_on_its_row(
    open_page: OpenPage, site: str, width: int
) -> None:
    page = opened(open_page, site, "own", png(), viewport={"width": width, "height": 900})
    rows = page.locator("#predictions .why")
    assert rows.count() == len(places(page)) == 5
    assert rows.first.get_attribute("aria-pressed") == "true"
    first = places(page)[-1]
    with page.expect_request("**/explain?*") as asked:
        rows.nth(2).click()
    page.wait_for_selector("#predictions li:nth-child(3) .why[aria-pressed=true]")
    assert "at" in parse_qs(urlsplit(asked.value.url).query)
    assert places(page)[-1] != first
    page.locator(f".detection[x='{first.split(',')[0]}'][y='{first.split(',')[1]}']").click()
    page.wait_for_selector("#predictions li:first-child .why[aria-pressed=true]")
    assert places(page)[-1] == first
    overflow = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert overflow <= 0


def test_where_no_object_is_found_the_page_says_so(open_page: OpenPage, site: str) -> None:
    page = opened(open_page, site, "blind", png())
    assert page.locator(".facts").inner_text() == "blind finds nothing in this image."
    assert page.locator("#predictions li").count() == 0


def test_what_is_for_classifiers_alone_is_not_offered(open_page: OpenPage, site: str) -> None:
    page = opened(open_page, site, "segmenter", png())
    assert page.locator("#method").input_value() == "hirescam"
    for name in ("#fit", ".inside", "#predictions-hint"):
        assert not page.locator(name).is_visible()
    page.select_option("#model", "small")
    page.wait_for_selector("#predictions .why[aria-pressed=true]")
    assert page.locator("#method").input_value() == "gradcam"
    for name in ("#fit", ".inside", "#predictions-hint"):
        assert page.locator(name).is_visible()


@pytest.mark.parametrize("kind", ["own", "segmenter"])
def test_a_box_and_a_region_have_a_verdict_and_experiments(
    open_page: OpenPage, site: str, kind: str
) -> None:
    page = opened(open_page, site, kind, png())
    assert page.locator("#verify option[value=search]").is_hidden()
    page.select_option("#verify", "true")
    page.wait_for_selector(".verdict-words")
    page.locator("#lab [name=region][value=box]").check()
    page.locator("#run-experiment").click()
    page.wait_for_selector("#experiments .experiment")
    card = page.locator("#experiments .experiment").inner_text()
    assert ("The box" in card) if kind == "own" else ("of the region keep the class" in card)
    assert "Score of the controls" in card


def test_a_link_names_a_method_that_is_not_the_models_default(
    open_page: OpenPage, site: str
) -> None:
    page = opened(open_page, site, "own", png())
    assert "method" not in page.url
    page.select_option("#method", "gradcam")
    page.wait_for_url("**method=gradcam**")
    page.reload()
    page.wait_for_selector("#predictions .why[aria-pressed=true]")
    assert page.locator("#method").input_value() == "gradcam"
    assert "Grad-CAM at" in page.locator(".facts").inner_text()
    page.go_back()
    page.wait_for_function("document.getElementById('method').value === 'hirescam'")
