"""The state of the page in its address: read, written, gone back and forward through, shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from browsing import SAMPLE, Watched, explain_sample, until, wait_for_caption

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

OpenPage = Callable[..., Watched]


@pytest.fixture
def desk(open_page: OpenPage) -> Watched:
    watched = open_page()
    watched.page.wait_for_selector("#layer option", state="attached")
    explain_sample(watched)
    return watched


def address(watched: Watched) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(watched.page.url).query))


def settled(watched: Watched, facts: str) -> None:
    """Until the map of this method and layer is shown, and nothing is pending."""
    watched.page.locator(".pane:last-child .facts", has_text=facts).wait_for()
    watched.page.locator(".pane:last-child .progress").wait_for(state="hidden")


def controls(watched: Watched) -> dict[str, Any]:
    """What the controls say, and what is shown."""
    found: dict[str, Any] = watched.page.evaluate(
        """() => ({
            ...Object.fromEntries(["model", "method", "layer", "fit", "verify", "contrast",
                "opacity", "threshold", "colormap"]
                .map((id) => [id, document.getElementById(id).value])),
            regions: document.querySelector("#regions").checked,
            caption: document.querySelector(".caption").textContent,
            heat: getComputedStyle(document.querySelector(".heat")).opacity,
            boxes: document.querySelectorAll(".marks .box").length,
        })"""
    )
    return found


def test_every_choice_is_in_the_address_and_the_image_is_not(desk: Watched) -> None:
    page = desk.page
    assert address(desk) == {"model": "builtin"}
    page.locator("#method").select_option("layercam")
    settled(desk, "LayerCAM")
    page.locator("#layer").select_option("layer2")
    settled(desk, "at layer2")
    page.locator("#predictions .versus:enabled").nth(1).click()
    wait_for_caption(page, "rather than")
    page.locator("#fit").select_option("pad")
    page.locator("#opacity").fill("80")
    page.locator("#colormap").select_option("viridis")
    page.locator("#regions").check()
    settled(desk, "at layer2")
    written = address(desk)
    assert written.keys() == {
        *("model", "method", "layer", "target", "contrast", "fit"),
        *("opacity", "threshold", "colormap", "regions"),
    }
    assert written["method"] == "layercam"
    assert written["layer"] == "layer2"
    assert (written["opacity"], written["threshold"], written["regions"]) == ("0.8", "0.5", "true")
    assert "sunflower" not in page.url


def test_an_address_gives_another_visitor_the_same_view(desk: Watched, open_page: OpenPage) -> None:
    page = desk.page
    page.locator("#model").select_option("small")
    settled(desk, "at features")
    page.locator("#method").select_option("rise")
    page.locator("#samples").fill("16")
    page.keyboard.press("Enter")
    settled(desk, "RISE · 17 forward passes")
    page.locator("#predictions .why").nth(2).click()
    until(page, "document.querySelectorAll('#predictions [aria-pressed=true]').length === 1")
    settled(desk, "RISE · 17 forward passes")
    page.locator("#threshold").fill("30")
    page.locator("#regions").check()
    until(page, "location.search.includes('regions=true')")
    other = open_page(path=urlsplit(page.url)._replace(scheme="", netloc="").geturl())
    other.page.wait_for_selector("#layer option", state="attached")
    other.page.set_input_files("#file", SAMPLE)
    settled(other, "RISE · 17 forward passes")
    until(other.page, "document.querySelectorAll('.marks .box').length > 0")
    assert controls(other) == controls(desk)
    assert address(other) == address(desk)


def test_back_and_forward_go_through_what_was_shown(desk: Watched) -> None:
    page = desk.page
    views = [controls(desk)]
    for control, value, facts in (
        ("#method", "layercam", "LayerCAM at layer3"),
        ("#layer", "layer2", "LayerCAM at layer2"),
        ("#model", "small", "LayerCAM at features"),
        ("#colormap", "gray", "LayerCAM at features"),
    ):
        page.locator(control).select_option(value)
        settled(desk, facts)
        views.append(controls(desk))
    for way, order in (("back", views[-2::-1]), ("forward", views[1:])):
        for view in order:
            page.evaluate(f"history.{way}()")
            until(page, f"document.querySelector('#colormap').value === '{view['colormap']}'")
            until(page, f"document.querySelector('.caption').textContent === {view['caption']!r}")
            until(page, f"document.querySelector('#method').value === '{view['method']}'")
            until(page, f"document.querySelector('#layer').value === '{view['layer']}'")
            page.locator(".progress").wait_for(state="hidden")
            assert controls(desk) == view


def test_back_returns_to_the_image_that_was_shown(desk: Watched, tmp_path: Any) -> None:
    other = tmp_path / "other.jpg"
    other.write_bytes(SAMPLE.read_bytes())
    desk.page.set_input_files("#file", other)
    until(desk.page, "document.querySelector('.stage').ariaLabel.startsWith('other.jpg with')")
    desk.page.evaluate("history.back()")
    until(desk.page, "document.querySelector('.stage').ariaLabel.startsWith('sunflower.jpg with')")
    desk.page.evaluate("history.forward()")
    until(desk.page, "document.querySelector('.stage').ariaLabel.startsWith('other.jpg with')")


def test_a_choice_that_is_refused_leaves_the_address_of_what_is_shown(desk: Watched) -> None:
    before = address(desk)
    desk.page.locator("#target").fill("tullip")
    desk.page.keyboard.press("Enter")
    desk.page.locator("#class-failure .notice").wait_for()
    assert address(desk) == before
    desk.forgive(404)


def test_a_reload_shows_the_same_map_of_the_same_image(desk: Watched) -> None:
    desk.page.locator("#method").select_option("layercam")
    settled(desk, "LayerCAM")
    desk.page.locator("#predictions .why").nth(1).click()
    until(desk.page, "new URLSearchParams(location.search).has('target')")
    settled(desk, "LayerCAM")
    until(desk.page, "document.querySelector('#kept').textContent !== ''")
    view = controls(desk)
    desk.page.reload()
    until(desk.page, f"document.querySelector('.caption')?.textContent === {view['caption']!r}")
    settled(desk, "LayerCAM")
    assert controls(desk) == view


WRONG = {
    "model=nobody": "model nobody",
    "method=magic": "method magic",
    "layer=nowhere": "layer nowhere",
    "target=99": "class 99",
    "target=tullip": "class tullip",
    "contrast=99": "contrast 99",
    "contrast=nearest:5": "contrast nearest:5",
    "opacity=7": "opacity 7",
    "colormap=mauve": "colormap mauve",
    "samples=1e9": "samples 1e9",
    "fit=tight": "fit tight",
    "method=magic&layer=nowhere": "method magic, layer nowhere",
    "target=%3Cimg%20src%3Dx%3E": "class <img src=x>",
}


@pytest.mark.parametrize(("query", "words"), WRONG.items())
def test_what_an_address_names_in_vain_is_said_and_the_defaults_are_shown(
    open_page: OpenPage, query: str, words: str
) -> None:
    watched = open_page(path=f"/?{query}")
    watched.page.wait_for_selector("#layer option", state="attached")
    (sentence,) = watched.page.locator("#alert .notice p:first-child").all_inner_texts()
    assert sentence == (
        f"This link names what is not available here: {words}. The defaults are shown instead."
    )
    watched.page.locator("#welcome [data-do=sample]").click()
    wait_for_caption(watched.page, "sunflower, ")
    assert address(watched) == {"model": "builtin"}


def test_an_address_takes_a_class_by_its_label(open_page: OpenPage) -> None:
    watched = open_page(path="/?target=Tulip&contrast=0")
    watched.page.wait_for_selector("#layer option", state="attached")
    watched.page.locator("#welcome [data-do=sample]").click()
    wait_for_caption(watched.page, "tulip rather than daisy, ")
    assert address(watched) == {"model": "builtin", "target": "4", "contrast": "0"}


def test_an_address_takes_the_nearest_classes_as_a_contrast(open_page: OpenPage) -> None:
    watched = open_page(path="/?contrast=nearest%3A2")
    watched.page.wait_for_selector("#layer option", state="attached")
    watched.page.locator("#welcome [data-do=sample]").click()
    wait_for_caption(watched.page, "sunflower rather than ")
    assert address(watched) == {"model": "builtin", "contrast": "nearest:2"}
