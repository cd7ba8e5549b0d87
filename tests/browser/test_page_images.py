"""The images of a session: any number at any width, removed and brought back, kept for a reload."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from pathlib import Path

import pytest
from browsing import SAMPLE, Watched, explain_sample, until, wait_for_caption
from PIL import Image

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

OpenPage = Callable[..., Watched]

WIDTHS = [320, 390, 600, 801, 1024, 1081, 1440]

OVERFLOW = "document.documentElement.scrollWidth - innerWidth"

CLIPPED = """() => [...document.querySelectorAll("#work *:not(option, svg, svg *, .sr-only)")]
    .filter((each) => each.checkVisibility() && !each.closest("#photos *, #sheet *, .sr-only"))
    .filter((each) => {
        const { left, right } = each.getBoundingClientRect();
        return left < -1 || right > innerWidth + 1;
    })
    .map((each) => each.outerHTML.slice(0, 120))"""
"""What reaches beyond the window, apart from what scrolls by itself."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A hundred small images, each of another color; one of them very wide and one very high."""
    folder = tmp_path_factory.mktemp("images")
    sizes = {3: (400, 4), 4: (4, 400)}
    for place in range(100):
        red, green, blue = (int(255 * each) for each in colorsys.hsv_to_rgb(place / 100, 1, 1))
        image = Image.new("RGB", sizes.get(place, (40, 30)), (red, green, blue))
        image.save(folder / f"a name of an image that is long {place:03}.png")
    return sorted(folder.iterdir())


@pytest.fixture
def page(open_page: OpenPage) -> Watched:
    watched = open_page()
    watched.page.wait_for_selector("#layer option", state="attached")
    return watched


def add(watched: Watched, files: list[Path]) -> None:
    watched.page.set_input_files("#file", files)
    watched.page.locator(".caption", has_text="%").wait_for()


def names(watched: Watched) -> list[str]:
    """Files of the thumbnails, shortened to what tells them apart."""
    titles: list[str] = watched.page.locator("#photos button").evaluate_all(
        "all => all.map(each => each.title)"
    )
    return [title.removesuffix(".png")[-3:] for title in titles]


def shown(watched: Watched) -> str:
    label = watched.page.locator(".pane .stage").get_attribute("aria-label") or ""
    return label.partition(".png")[0][-3:]


@pytest.mark.parametrize("count", [1, 2, 5, 12, 100])
def test_any_number_of_images_fits_every_width(
    page: Watched, images: list[Path], count: int
) -> None:
    add(page, images[:count])
    page.page.locator("#photos-count", has_text=str(count)).wait_for()
    for width in WIDTHS:
        page.page.set_viewport_size({"width": width, "height": 800})
        until(page.page, f"innerWidth === {width}")
        assert page.page.evaluate(OVERFLOW) <= 0, width
        assert page.page.evaluate(CLIPPED) == [], width
    for place in {0, 3, 4, count - 1} if count > 4 else {0}:
        if count > 1:
            page.page.locator("#photos button").nth(place).click()
        until(page.page, "document.querySelector('.caption').textContent.includes('%')")
        for width in (390, 1024):
            page.page.set_viewport_size({"width": width, "height": 800})
            assert page.page.evaluate(OVERFLOW) <= 0, (place, width)


def test_the_strip_scrolls_to_the_chosen_image_and_the_page_stays(
    page: Watched, images: list[Path]
) -> None:
    add(page, images)
    for width in (390, 1440):
        page.page.set_viewport_size({"width": width, "height": 800})
        page.page.locator("#photos button").first.evaluate("each => each.click()")
        page.page.evaluate("scrollTo(0, 0)")
        page.page.locator("#photos button").last.evaluate("each => each.click()")
        inside = page.page.locator("#photos button").last.evaluate(
            """each => {
                const frame = (element) => element.getBoundingClientRect();
                const [one, list] = [frame(each), frame(each.closest("ul"))];
                return one.left >= list.left && one.right <= list.right
                    && one.top >= list.top && one.bottom <= list.bottom;
            }"""
        )
        assert inside
        assert page.page.evaluate("scrollY") == 0


def test_more_than_a_hundred_images_are_not_added_and_it_says_so(
    page: Watched, images: list[Path], tmp_path: Path
) -> None:
    more = tmp_path / "more.png"
    Image.new("RGB", (8, 8)).save(more)
    add(page, [*images, more, more])
    assert page.page.locator("#photos button").count() == 100
    notice = page.page.locator("#strip .files .notice p").first
    assert notice.inner_text() == (
        "2 images are not added: this page holds 100. Remove some first."
    )


def test_one_image_is_removed_and_brought_back(page: Watched, images: list[Path]) -> None:
    add(page, images[:4])
    page.page.locator("#photos button").nth(1).click()
    until(page.page, "document.querySelector('.stage').ariaLabel.includes('001.png with')")
    page.page.get_by_role("button", name="Remove this").click()
    assert names(page) == ["000", "002", "003"]
    assert shown(page) == "002"
    page.page.get_by_role("button", name="Undo").click()
    assert names(page) == ["000", "001", "002", "003"]
    assert shown(page) == "001"
    page.page.locator("#photos button").nth(3).focus()
    page.page.keyboard.press("Delete")
    assert names(page) == ["000", "001", "002"]
    assert shown(page) == "001"
    focused = "document.activeElement.title"
    assert "001" in page.page.evaluate(focused)
    page.page.locator("#undo").get_by_role("button", name="Dismiss").click()
    assert page.page.locator("#undo").is_hidden()


def test_all_images_are_cleared_and_brought_back(page: Watched, images: list[Path]) -> None:
    """With their experiments, and nothing is left in the browser."""
    add(page, images[:3])
    page.page.locator("[name=region][value=box]").check()
    page.page.locator("#run-experiment").click()
    page.page.locator(".experiment").wait_for()
    page.page.get_by_role("button", name="Clear all").click()
    assert page.page.locator("#welcome").is_visible()
    assert page.page.locator("#work").is_hidden()
    until(page.page, "document.activeElement.textContent === 'Undo'")
    assert stored(page) == 0
    page.page.keyboard.press("Enter")
    wait_for_caption(page.page, "%")
    assert names(page) == ["000", "001", "002"]
    assert page.page.locator(".experiment").count() == 1
    assert stored(page) == 3


STORED = """async () => {
    const opened = indexedDB.open("camserve");
    await new Promise((resolve) => (opened.onsuccess = resolve));
    const count = opened.result.transaction("images").objectStore("images").count();
    await new Promise((resolve) => (count.onsuccess = resolve));
    opened.result.close();
    return count.result;
}"""


def stored(watched: Watched) -> int:
    """Images in the browser's storage, of all tabs of this browser."""
    return int(watched.page.evaluate(STORED))


def test_a_reload_keeps_the_images_and_the_one_that_is_shown(
    page: Watched, images: list[Path]
) -> None:
    add(page, images[:3])
    page.page.locator("#photos button").nth(1).click()
    until(page.page, "document.querySelector('.stage').ariaLabel.includes('001.png with')")
    until(page.page, "document.querySelector('#kept').textContent.includes('keeps the images')")
    page.page.reload()
    until(page.page, "document.querySelector('.stage')?.ariaLabel?.includes('001.png with')")
    assert names(page) == ["000", "001", "002"]
    page.page.get_by_role("button", name="Clear all").click()
    page.page.reload()
    page.page.wait_for_selector("#layer option", state="attached")
    assert page.page.locator("#welcome").is_visible()
    assert stored(page) == 0


def test_another_tab_starts_without_the_images_of_this_one(
    page: Watched, images: list[Path]
) -> None:
    add(page, images[:2])
    until(page.page, "document.querySelector('#kept').textContent !== ''")
    other = page.page.context.new_page()
    other.goto(page.url)
    other.wait_for_selector("#layer option", state="attached")
    assert other.locator("#welcome").is_visible()
    assert stored(page) == 2


def test_images_of_a_closed_tab_are_deleted_after_a_day(page: Watched, images: list[Path]) -> None:
    add(page, images[:2])
    until(page.page, "document.querySelector('#kept').textContent !== ''")
    other = page.page.context.new_page()
    other.clock.install()
    other.clock.fast_forward("23:00:00")
    other.goto(page.url)
    other.wait_for_selector("#layer option", state="attached")
    assert stored(page) == 2
    other.clock.fast_forward("02:00:00")
    other.reload()
    other.wait_for_selector("#layer option", state="attached")
    until(other, f"({STORED})().then((count) => count === 0)")


def test_without_storage_the_page_works_and_says_that_a_reload_loses_the_images(
    open_page: OpenPage, site: str
) -> None:
    watched = open_page(path="/docs")
    watched.page.add_init_script(
        "Object.defineProperty(window, 'indexedDB', { get() { throw new Error('forbidden'); } })"
    )
    watched.page.goto(site)
    watched.page.wait_for_selector("#layer option", state="attached")
    explain_sample(watched)
    until(watched.page, "document.querySelector('#kept').textContent.includes('gone after')")


def test_only_images_that_were_shown_lately_take_much_memory(page: Watched, tmp_path: Path) -> None:
    """The one on screen is always in full detail, also where its answer was kept."""
    for place in range(10):
        Image.new("RGB", (1000, 20), (25 * place, 0, 0)).save(tmp_path / f"{place:03}.png")
    page.page.evaluate(
        """() => {
            const open = new Set();
            const create = window.createImageBitmap;
            window.createImageBitmap = async (...args) => {
                const bitmap = await create(...args);
                open.add(bitmap);
                return bitmap;
            };
            const close = ImageBitmap.prototype.close;
            ImageBitmap.prototype.close = function () { open.delete(this); close.call(this); };
            window.wide = () => [...open].filter(({ width, height }) => width / height > 40);
        }"""
    )
    add(page, sorted(tmp_path.iterdir()))
    for place in [*range(10), 0, 9]:
        page.page.locator("#photos button").nth(place).click()
        until(page.page, "document.querySelector('.stage').ariaLabel.includes('.png with')")
        assert page.page.locator(".photo").evaluate("canvas => canvas.width") == 1000
    until(page.page, "window.wide().length === 10")
    widths = page.page.evaluate("window.wide().map(({ width }) => width).sort()")
    assert widths == [1000] * 8 + [512] * 2


@pytest.mark.parametrize("width", [320, 390, 800])
def test_on_a_phone_the_answer_comes_before_the_drawing_controls(
    open_page: OpenPage, width: int
) -> None:
    """On the screen, and for whoever goes by the Tab key."""
    watched = open_page(viewport={"width": width, "height": 800})
    watched.page.wait_for_selector("#layer option", state="attached")
    add(watched, [SAMPLE])
    order = [".pane", "#predictions", "#opacity", "#strip", "#method", "#export"]
    tops = [watched.page.locator(each).bounding_box() for each in order]
    assert [box["y"] for box in tops if box] == sorted(box["y"] for box in tops if box)
    follows = """(selectors) => selectors.slice(1).every((each, place) =>
        document.querySelector(selectors[place]).compareDocumentPosition(
            document.querySelector(each)) & Node.DOCUMENT_POSITION_FOLLOWING)"""
    assert watched.page.evaluate(follows, order)
    watched.page.set_viewport_size({"width": 1200, "height": 800})
    until(watched.page, "document.querySelector('#view').closest('.look')")
