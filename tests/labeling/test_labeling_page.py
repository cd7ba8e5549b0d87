"""What somebody sees who opens a task: Label Studio's page in Chromium, with our evidence in it.

CAMSERVE_TEST_SCREENSHOTS=FOLDER keeps the pictures.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from label_studio import PASSWORD, USER, LabelStudio
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Response, Route, expect

from service.security.overlay_tokens import Grant, sign

pytestmark = [pytest.mark.labeling, pytest.mark.timeout(600)]

WAIT_MS = 90_000
BRUSH = (255, 51, 0)

LABELS = """<Choices name="flower" toName="image" showInline="true">
    <Choice value="daisy"/><Choice value="dandelion"/><Choice value="rose"/>
    <Choice value="sunflower"/><Choice value="tulip"/>
  </Choices>
  <BrushLabels name="cam" toName="image"><Label value="cam" background="#ff3300"/></BrushLabels>
  <RectangleLabels name="box" toName="image">
    <Label value="evidence" background="#0099ff"/>
  </RectangleLabels>
  <KeyPointLabels name="point" toName="image">
    <Label value="peak" smart="true" background="#00cc44"/>
    <Label value="rose" smart="true" background="#cc00cc"/>
  </KeyPointLabels>"""

CONFIG = f"""<View>
  <View style="display: grid; grid-template-columns: 1fr 1fr; gap: 8px">
    <Image name="image" value="$image"/>
    <Image name="heat" value="{{overlay}}?key={{key}}&amp;src=$image"/>
  </View>
  {LABELS}
</View>"""

AS_LARGE_AS_THE_PHOTO = f"""<View>
  <Image name="image" value="$image" maxWidth="640px"/>
  {LABELS}
</View>"""


@pytest.fixture(scope="module")
def task(studio: LabelStudio, backend, photos) -> dict[str, Any]:
    """A photograph in a project of its own, predicted."""
    project = studio.project(CONFIG.format(overlay="http://127.0.0.1/", key="none"))
    grant = Grant((f"/data/upload/{project}/",), studio.url)
    config = CONFIG.format(overlay=f"{backend.url}/overlay.png", key=sign(grant, backend.secret))
    studio.ask("PATCH", f"projects/{project}", json={"label_config": config})
    tasks = studio.upload(project, photos)
    studio.attach(project, backend.url, backend.key)
    studio.retrieve(project)
    assert len(studio.predictions(project)) == 1
    return {"project": project, "id": tasks[0]["id"]}


class Opened:
    """The labeling page of a task; `overlays` are the answers to its asking for overlays."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.overlays: list[Response] = []
        page.on("response", self._note)

    def _note(self, response: Response) -> None:
        if "overlay.png" in response.url:
            self.overlays.append(response)

    def shown(self, name: str) -> NDArray[np.int64]:
        """The page as it looks, (h, w, 3), RGB; kept as a file where somebody wants to see it."""
        data = self.page.screenshot()
        folder = os.environ.get("CAMSERVE_TEST_SCREENSHOTS")
        if folder:
            (Path(folder) / f"{name}.png").write_bytes(data)
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.int64)


def area_of(page: Page, place: int = 0) -> tuple[int, int, int, int]:
    """Left, top, width and height of a photograph on the page, the first or another."""
    area = page.locator("canvas").nth(place).bounding_box()
    assert area is not None
    left, top, width, height = (round(area[name]) for name in ("x", "y", "width", "height"))
    return left, top, width, height


@pytest.fixture(scope="module")
def someone(chromium: Browser, studio: LabelStudio) -> Iterator[BrowserContext]:
    """A browser in which somebody is logged in; nothing outside of this machine is asked."""

    def stay_here(route: Route) -> None:
        here = route.request.url.startswith(("http://127.0.0.1:", "data:", "blob:"))
        route.continue_() if here else route.abort()

    context = chromium.new_context(viewport={"width": 1500, "height": 950})
    context.set_default_timeout(WAIT_MS)
    context.route("**/*", stay_here)
    page = context.new_page()
    page.goto(f"{studio.url}/user/login/")
    page.fill("input[name=email]", USER)
    page.fill("input[name=password]", PASSWORD)
    page.click("button[type=submit]")
    page.wait_for_url(f"{studio.url}/")
    page.close()
    yield context
    context.close()


def labeling_page(someone: BrowserContext, studio: LabelStudio, project: int) -> Opened:
    """The first task of a project, opened."""
    page = someone.new_page()
    found = Opened(page)
    page.goto(f"{studio.url}/projects/{project}/data?labeling=1")
    expect(page.locator("canvas").first).to_be_visible(timeout=WAIT_MS)
    return found


@pytest.fixture(scope="module")
def opened(someone: BrowserContext, studio: LabelStudio, task: dict[str, Any]) -> Opened:
    """Somebody has opened the predicted task."""
    return labeling_page(someone, studio, task["project"])


def test_class_box_brush_and_peak_are_filled_in(opened: Opened) -> None:
    """Each of the regions carries the score of the class."""
    page = opened.page
    expect(page.get_by_role("checkbox", name="sunflower")).to_be_checked()
    expect(page.get_by_role("checkbox", name="rose")).not_to_be_checked()
    listed = page.locator(".lsf-tree")
    for label in ("cam", "evidence", "peak"):
        expect(listed.get_by_text(label, exact=True)).to_be_visible()
    expect(listed.get_by_text("0.89")).to_have_count(3)


def test_the_brush_is_painted_where_the_map_is(
    opened: Opened, backend: Any, photos: dict[str, bytes]
) -> None:
    """As opaque as the map is strong, graded; not at all outside of what the model saw."""
    page = opened.page
    expect(page.locator(".lsf-tree").get_by_text("cam", exact=True)).to_be_visible()
    left, top, width, height = area_of(page)
    shown = opened.shown("label-studio")[top : top + height, left : left + width]
    photo = Image.open(io.BytesIO(photos["sunflower.jpg"])).convert("RGB")
    plain = np.asarray(photo.resize((width, height))).astype(np.int64)
    data = backend.explained(photos["sunflower.jpg"])["heatmap"]["data"]
    levels = Image.open(io.BytesIO(base64.b64decode(data)))
    strength = np.asarray(Image.fromarray(np.asarray(levels)).resize((width, height))) / 255
    free = np.arange(width) < 0.8 * width  # the rest is under the page's tools
    steps = [
        opacity(shown, plain, free & (strength > low) & (strength <= low + 0.2))
        for low in (0.0, 0.2, 0.4, 0.6, 0.8)
    ]
    assert steps == sorted(steps)
    assert steps[-1] > 0.2
    unseen = (np.arange(width) > 4) & (np.arange(width) < 0.1 * width) & (strength == 0)
    assert abs(opacity(shown, plain, unseen)) < 0.02


def opacity(shown: NDArray[np.int64], plain: NDArray[np.int64], where: NDArray[np.bool_]) -> float:
    """How much of these pixels is the brush's colour, 0..1: by least squares."""
    away = np.array(BRUSH) - plain[where]
    return float(((shown[where] - plain[where]) * away).sum() / (away**2).sum())


def test_the_live_overlay_is_beside_it(opened: Opened, studio: LabelStudio) -> None:
    """Fetched by the page itself, with its own key."""
    assert opened.overlays
    for answer in opened.overlays:
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == studio.url
    overlay = Image.open(io.BytesIO(opened.overlays[-1].body())).convert("RGB")
    left, top, width, height = area_of(opened.page, place=-1)
    expected = np.asarray(overlay.resize((width, height))).astype(np.int64)
    shown = opened.shown("label-studio-overlay")[top : top + height, left : left + width]
    free = np.s_[:, : round(0.9 * width)]  # the rest is under the page's tools
    assert np.abs(shown - expected)[free].mean() < 4


def test_the_box_is_drawn_around_the_evidence(opened: Opened, backend: Any, photos) -> None:
    left, top, width, height = area_of(opened.page)
    shown = opened.shown("label-studio-box")[top : top + height, left : left + width]
    (x, y, w, h) = backend.explained(photos["sunflower.jpg"])["regions"]["boxes"][0]
    right, bottom = round((x + w) * width / 640), round((y + h) * height / 480)
    middle = round((x + w / 2) * width / 640), round((y + h / 2) * height / 480)
    blue = shown[..., 2] - shown[..., 0]
    for across in (
        blue[middle[1], right - 8 : right + 9],
        blue[bottom - 8 : bottom + 9, middle[0]],
    ):
        assert across[5:12].max() > max(across[:4].max(), across[-4:].max()) + 50


def test_a_click_with_the_smart_point_suggests_the_evidence_of_its_class(
    someone: BrowserContext, studio: LabelStudio, backend: Any, photos: dict[str, bytes]
) -> None:
    """By mouse alone; suggestions are drawn, and become regions where they are accepted."""
    project = studio.project(AS_LARGE_AS_THE_PHOTO)
    studio.upload(project, photos)
    studio.attach(project, backend.url, backend.key)
    studio.retrieve(project)
    opened = labeling_page(someone, studio, project)
    page = opened.page
    listed = page.locator(".lsf-tree")
    expect(listed.get_by_text("cam", exact=True)).to_be_visible()
    page.get_by_text("Auto-Annotation", exact=True).click()
    page.locator(".lsf-tool_smart").first.hover()
    page.locator(".lsf-tool_smart").get_by_label("key-point-tool").click()
    page.locator(".lsf-label", has_text="rose").click()
    left, top, width, height = area_of(page)
    assert (width, height) == (640, 480)
    before = opened.shown("label-studio-before-the-click")
    with page.expect_response("**/interactive-annotating*") as answered:
        page.mouse.click(left + 0.7 * 640, top + 0.9 * 480)
    expect(page.get_by_text("3 suggestions")).to_be_visible()
    after = opened.shown("label-studio-suggestions")

    asked = answered.value.request.post_data_json["context"]["result"][-1]["value"]
    assert asked["keypointlabels"] == ["rose"]
    assert [asked["x"], asked["y"]] == pytest.approx([70, 90], abs=1)
    rose = backend.explained(photos["sunflower.jpg"], "&targets=rose")
    given = {each["type"]: each["value"] for each in answered.value.json()["data"]["result"]}
    assert set(given) == {"brushlabels", "rectanglelabels", "keypointlabels"}
    (x, y) = rose["regions"]["peak"]
    peak = given["keypointlabels"]
    assert [peak["x"] * 6.4, peak["y"] * 4.8] == pytest.approx([x, y])
    levels = np.asarray(Image.open(io.BytesIO(base64.b64decode(rose["heatmap"]["data"]))))
    place = np.s_[top : top + 480, left : left + 640]
    assert opacity(after[place], before[place], levels > 100) > 0.1
    assert opacity(after[place], before[place], levels == 0) < 0.01

    page.get_by_test_id("bottombar-accept-suggestions-button").click()
    for label in ("cam", "evidence"):
        expect(listed.get_by_text(label, exact=True)).to_have_count(2)
    opened.shown("label-studio-accepted")
    expect(listed.get_by_text("rose", exact=True)).to_be_visible()
    expect(page.get_by_role("checkbox", name="sunflower")).to_be_checked()
