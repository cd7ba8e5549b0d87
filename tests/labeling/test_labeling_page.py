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
from playwright.sync_api import Browser, Page, Response, Route, expect

from service.overlay_tokens import Grant, sign

pytestmark = [pytest.mark.labeling, pytest.mark.timeout(600)]

WAIT_MS = 90_000
BRUSH = (255, 51, 0)

CONFIG = """<View>
  <View style="display: grid; grid-template-columns: 1fr 1fr; gap: 8px">
    <Image name="image" value="$image"/>
    <Image name="heat" value="{overlay}?key={key}&amp;src=$image"/>
  </View>
  <Choices name="flower" toName="image" showInline="true">
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
  </KeyPointLabels>
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


@pytest.fixture(scope="module")
def opened(chromium: Browser, studio: LabelStudio, task: dict[str, Any]) -> Iterator[Opened]:
    """Somebody is logged in and has opened the task; nothing outside of this machine is asked."""

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
    found = Opened(page)
    page.goto(f"{studio.url}/projects/{task['project']}/data?labeling=1")
    expect(page.locator("canvas").first).to_be_visible(timeout=WAIT_MS)
    yield found
    context.close()


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
    area = page.locator("canvas").first.bounding_box()
    assert area is not None
    left, top, width, height = (round(area[name]) for name in ("x", "y", "width", "height"))
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
    expect(opened.page.locator("canvas")).not_to_have_count(1)
