"""The main paths of the page in Debian's Firefox."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import SAMPLE
from firefox import Firefox, firefox
from PIL import Image

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

CAPTION = "document.querySelector('.caption')?.textContent"
FACTS = "document.querySelector('.facts')?.textContent"
COUNT = "document.querySelectorAll('#photos button').length"
HEAT = """const canvas = document.querySelector(".heat");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const colors = new Set();
    for (let at = 0; at < data.length; at += 4) colors.add(data.slice(at, at + 4).join());
    return [canvas.width, canvas.height, colors.size];"""


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Firefox]:
    with firefox(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture
def page(window: Firefox, site: str) -> Firefox:
    """The page as in a new tab, with the sample explained."""
    window.go(site)
    window.run("sessionStorage.clear()")
    window.go(site)
    window.until("document.querySelector('#layer option') !== null")
    window.click("#welcome [data-do=sample]")
    window.until(f"{CAPTION}.startsWith('sunflower, ')")
    return window


def test_the_sample_is_explained_and_the_question_changed(page: Firefox) -> None:
    width, height, colors = page.run(HEAT)
    assert (width, height) == (640, 480)
    assert colors > 100
    page.select("#method", "layercam")
    page.until(f"{FACTS}.startsWith('LayerCAM at layer3')")
    page.click("#predictions .versus:enabled")
    page.until(f"{CAPTION}.includes('rather than')")
    page.select("#model", "small")
    page.until(f"{FACTS}.startsWith('LayerCAM at features')")
    page.run("history.back()")
    page.until(f"{FACTS}.startsWith('LayerCAM at layer3') && {CAPTION}.includes('rather than')")


def test_images_are_added_removed_brought_back_and_kept(page: Firefox, tmp_path: Path) -> None:
    files = []
    for place in range(11):
        files.append(tmp_path / f"{place}.png")
        Image.new("RGB", (40, 30), (20 * place, 120, 30)).save(files[-1])
    page.keys("#file", "\n".join(map(str, files)))
    page.until(f"{COUNT} === 12 && !{CAPTION}.endsWith('.png')")
    for size in (500, 1024, 1440):
        page.resize(size, 900)
        page.until("document.documentElement.scrollWidth <= innerWidth")
    page.click("[data-do=remove]")
    page.until(f"{COUNT} === 11")
    page.click("#undo button")
    page.until(f"{COUNT} === 12")
    page.until("document.querySelector('#kept').textContent.includes('keeps the images')")
    page.reload()
    page.until(f"{COUNT} === 12 && {CAPTION}?.includes('%')")
    page.click("[data-do=clear]")
    page.until("!document.querySelector('#welcome').hidden")
    page.reload()
    page.until("document.querySelector('#layer option') !== null")
    page.until("!document.querySelector('#welcome').hidden")


def test_a_file_that_is_no_image_and_an_unknown_class_are_said(
    page: Firefox, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(SAMPLE.read_bytes()[:4000])
    notes = tmp_path / "notes.txt"
    notes.write_text("a cat")
    page.keys("#file", f"{broken}\n{notes}")
    page.until("document.querySelectorAll('#strip .files .notice').length === 2")
    page.until(f"{CAPTION}.startsWith('sunflower, ')")
    page.keys("#target", "tullip\ue007")  # Enter
    page.until("document.querySelector('#class-failure').textContent.includes('tulip')")


def test_channels_and_an_experiment_are_shown(page: Firefox) -> None:
    page.click("#inside-show")
    page.until("document.querySelector('#channels-words').textContent.startsWith('layer3: 144')")
    page.click("#run-experiment")
    page.until("document.querySelectorAll('.experiment canvas').length === 2")
