"""Each feature of the page, by mouse and by keyboard, at a desk in light and on a phone in dark."""

from __future__ import annotations

import ast
import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from browsing import SAMPLE, Hand, Watched, answer_of, canvas_pixels, until, wait_for_caption
from numpy.typing import NDArray
from PIL import Image
from tiny import SmallNet, loaded

from api_schemas.methods import METHODS
from service.cam.heatmap import COLORMAPS
from service.images.run_lengths import rle_decode
from service.inference.method_table import cost
from service.inference.questions import Question

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]


def drawn(page: Watched) -> NDArray[np.uint8]:
    """The colours that lie over the photograph: uint8 (h, w, 4)."""
    width, height, data = canvas_pixels(page.page, ".pane:last-child .heat")
    return np.frombuffer(data, np.uint8).reshape(height, width, 4)


def decoded(encoded: dict[str, Any]) -> NDArray[np.uint8]:
    """A picture of an answer: uint8 (h, w) of an indexed one, (h, w, 3) of another."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded["data"]))))


def outlined(page: Watched) -> list[list[int]]:
    """The boxes over the photograph, in its pixels."""
    rects = page.page.locator(".pane:last-child .marks .box:not(.under)")
    found: list[list[int]] = rects.evaluate_all(
        "all => all.map(each => ['x', 'y', 'width', 'height'].map(n => +each.getAttribute(n)))"
    )
    return found


def facts(page: Watched) -> str:
    return page.page.locator(".pane:last-child .facts").inner_text()


def test_the_sample_is_explained_at_one_press(
    page: Watched, hand: Hand, site: str, http: httpx.Client
) -> None:
    hand.press("#welcome [data-do=sample]")
    wait_for_caption(page.page, "sunflower, ")
    answer = answer_of(http, site, SAMPLE)
    rows = page.page.locator("#predictions .why").all_inner_texts()
    shown = [row.split("\n") for row in rows]
    assert [label for label, _ in shown] == [each["label"] for each in answer["predictions"]]
    for (_, score), prediction in zip(shown, answer["predictions"], strict=True):
        assert float(score.removesuffix(" %")) == pytest.approx(100 * prediction["score"], abs=0.06)
    assert facts(page).startswith("Grad-CAM at layer3 (144 × 10 × 10) · 1 forward pass · ")
    widths = page.page.locator("#predictions .bar").evaluate_all(
        "all => all.map(each => Number(each.style.getPropertyValue('--score')))"
    )
    assert widths == pytest.approx([each["score"] for each in answer["predictions"]], abs=1e-6)


def test_photographs_are_picked_and_looked_at_one_after_the_other(
    page: Watched, hand: Hand, tmp_path: Path
) -> None:
    second = tmp_path / "meadow.png"
    Image.new("RGB", (300, 200), (40, 120, 30)).save(second)
    with page.page.expect_file_chooser() as chooser:
        hand.press("#welcome [data-do=pick]")
    chooser.value.set_files([SAMPLE, second])
    wait_for_caption(page.page, "sunflower, ")
    thumbnails = page.page.locator("#photos button")
    assert thumbnails.count() == 2
    until(
        page.page,
        "document.querySelector('#photos [title=\"meadow.png\"] span').textContent != 'meadow.png'",
    )
    named = page.page.locator("#photos [title='meadow.png'] span").inner_text()
    hand.press(thumbnails.nth(1))
    wait_for_caption(page.page, f"{named}, ")
    assert thumbnails.nth(1).get_attribute("aria-pressed") == "true"
    assert page.page.locator(".pane .stage").get_attribute("aria-label").startswith("meadow.png")  # type: ignore[union-attr]


def test_a_photograph_is_dropped(page: Watched) -> None:
    data = base64.b64encode(SAMPLE.read_bytes()).decode()
    transfer = page.page.evaluate_handle(
        """data => {
            const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "dropped.jpg", { type: "image/jpeg" }));
            return transfer;
        }""",
        data,
    )
    page.page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    assert page.page.locator("#drop").is_visible()
    page.page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    assert not page.page.locator("#drop").is_visible()
    wait_for_caption(page.page, "sunflower, ")


def test_a_photograph_is_pasted_with_the_keyboard(page: Watched) -> None:
    page.page.evaluate(
        """async () => {
            const photo = await (await fetch("page/sunflower.jpg")).blob();
            const bitmap = await createImageBitmap(photo);
            const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
            canvas.getContext("2d").drawImage(bitmap, 0, 0);
            const png = await canvas.convertToBlob();
            await navigator.clipboard.write([new ClipboardItem({ "image/png": png })]);
        }"""
    )
    page.page.keyboard.press("Control+V")
    wait_for_caption(page.page, "sunflower, ")


def test_a_photograph_is_taken_with_the_camera(page: Watched, hand: Hand) -> None:
    hand.press("#welcome [data-do=camera]")
    page.page.locator("#shutter:enabled").wait_for()
    assert page.page.locator("#camera-words").inner_text() == "The camera is on."
    hand.press("#shutter")
    page.page.locator("#camera").wait_for(state="hidden")
    page.page.locator("#predictions li").first.wait_for()
    label = page.page.locator(".pane .stage").get_attribute("aria-label")
    assert label is not None
    assert label.startswith("camera.jpg with the heatmap for ")
    assert page.page.evaluate("document.querySelector('video').srcObject") is None


def test_colours_opacity_and_threshold_are_those_of_the_server_and_ask_nothing(
    explained: Watched, hand: Hand, site: str, http: httpx.Client
) -> None:
    asked = len(explained.asked)
    hand.choose("#colormap", "viridis")
    hand.slide("#threshold", 40)
    hand.slide("#opacity", 70)
    threshold = explained.page.locator("#threshold").input_value()
    opacity = explained.page.locator("#opacity").input_value()
    assert abs(int(threshold) - 40) <= 4
    assert abs(int(opacity) - 70) <= 4
    until(explained.page, f"document.querySelector('.heat').style.opacity == {int(opacity) / 100}")
    pixels = drawn(explained)
    answer = answer_of(
        http, site, SAMPLE, include=["heatmap", "regions"], threshold=int(threshold) / 100
    )
    (explanation,) = answer["explanations"]
    levels = decoded(explanation["heatmap"])
    visible = pixels[..., 3] == 255
    rle = explanation["regions"]["rle"]
    reached = rle_decode(tuple(rle["size"]), rle["counts"])
    assert np.mean(visible != reached) < 0.002  # levels are rounded to 8 bits
    expected = COLORMAPS["viridis"][levels]
    assert np.array_equal(pixels[visible][:, :3], expected[visible])
    assert len(explained.asked) == asked


def test_without_a_threshold_all_that_was_seen_is_coloured_and_nothing_else(
    explained: Watched, site: str, http: httpx.Client
) -> None:
    pixels = drawn(explained)
    x, _, w, _ = answer_of(http, site, SAMPLE)["seen"]
    middles = np.arange(pixels.shape[1]) + 0.5
    assert np.array_equal(pixels[0, :, 3] > 0, (middles >= x) & (middles <= x + w))


def test_regions_are_outlined_as_the_server_finds_them(
    explained: Watched, hand: Hand, site: str, http: httpx.Client
) -> None:
    hand.press("#regions")
    explained.page.locator(".marks .peak").wait_for(state="attached")
    assert explained.page.locator("#threshold-value").inner_text() == "50 %"
    (explanation,) = answer_of(http, site, SAMPLE, include="regions")["explanations"]
    expected = explanation["regions"]
    for found, box in zip(outlined(explained), expected["boxes"], strict=True):
        assert np.abs(np.subtract(found, box)).max() <= 2
    peak = explained.page.locator(".marks .peak")
    assert [float(peak.get_attribute(name) or 0) for name in ("cx", "cy")] == expected["peak"]
    one = outlined(explained)
    hand.slide("#threshold", 80)
    until(
        explained.page,
        f"Number(document.querySelector('.marks .box').getAttribute('width')) < {one[0][2]}",
    )


def test_another_class_is_asked_for_by_its_row(explained: Watched, hand: Hand) -> None:
    hand.press(explained.page.locator("#predictions .why", has_text="tulip"))
    wait_for_caption(explained.page, "tulip, ")
    pressed = explained.page.locator("#predictions .why[aria-pressed=true]")
    assert pressed.inner_text().startswith("tulip")
    words = explained.page.locator(".flags").inner_text()
    assert words == "This is not the predicted class."


def test_another_class_is_asked_for_by_name(explained: Watched, hand: Hand) -> None:
    hand.write("#target", "Daisy")
    wait_for_caption(explained.page, "daisy, ")


def test_a_class_is_set_against_another(explained: Watched, hand: Hand) -> None:
    row = explained.page.locator("#predictions li", has_text="dandelion")
    hand.press(row.locator(".versus"))
    wait_for_caption(explained.page, "sunflower rather than dandelion, logit difference +2.61")
    assert "contrast=1" in explained.asked[-1]
    hand.write("#contrast", "rose")
    wait_for_caption(explained.page, "sunflower rather than rose, ")


def test_another_layer_is_chosen_from_a_list_with_shapes(explained: Watched, hand: Hand) -> None:
    names = explained.page.locator("#layer option").all_inner_texts()
    assert "layer2 · 64 × 20 × 20" in names
    assert "layer3 · 144 × 10 × 10 · default" in names
    hand.choose("#layer", "layer2")
    explained.page.locator(".facts", has_text="at layer2 (64 × 20 × 20)").wait_for()


def test_every_method_is_offered_and_another_is_chosen(explained: Watched, hand: Hand) -> None:
    offered = explained.page.locator("#method option").evaluate_all("all => all.map(e => e.value)")
    assert offered == list(METHODS)
    hand.choose("#method", "hirescam")
    explained.page.locator(".facts", has_text="HiResCAM at layer3").wait_for()


def test_the_page_reckons_what_the_server_announces(page: Watched) -> None:
    model = loaded(SmallNet())
    few = {"samples": 24, "steps": 3}
    script = """async ([name, few]) => {
        const { forwards } = await import(new URL("page/methods.js", location.href));
        return forwards({ method: name, ...few }, { width: 32, height: 32 }, [16, 8, 8]);
    }"""
    for name, record in METHODS.items():
        layers = model.target_layers(()) if record.has_layer else ()
        pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
        announced = cost(model, Question(pixels, method=name, layers=layers, **few))
        reckoned = page.page.evaluate(script, [name, few])
        assert announced <= reckoned + 0.05, name
        assert record.runs == "tail" or announced >= reckoned, name


def test_a_method_without_a_layer_takes_the_list_of_layers_away(explained: Watched) -> None:
    explained.page.locator("#method").select_option("input_gradient")
    explained.page.locator(".facts", has_text="Input gradient · 3.5 forward passes").wait_for()
    assert explained.page.locator("#layer").is_disabled()


def test_another_model_is_chosen(explained: Watched, hand: Hand) -> None:
    hand.choose("#model", "small")
    explained.page.locator(".facts", has_text="at features").wait_for()
    assert "model=small" in explained.asked[-1]
    assert explained.page.locator("#predictions li").count() == 5
    assert explained.page.locator("#labels option").count() == 7


def test_all_of_the_photograph_is_shown_to_the_model(explained: Watched, hand: Hand) -> None:
    assert explained.page.locator(".marks .seen").count() == 1
    hand.choose("#fit", "pad")
    explained.page.locator(".marks .seen").wait_for(state="detached")
    assert (drawn(explained)[..., 3] == 255).all()


def test_a_layer_shows_its_channels_and_opens_one(
    explained: Watched, hand: Hand, site: str, http: httpx.Client
) -> None:
    hand.choose("#inside-layer", "layer2")
    hand.press("#inside-show")
    explained.page.locator("#channels-words", has_text="layer2: 64 × 20 × 20;").wait_for()
    if hand.kind == "mouse":
        sheet = explained.page.locator("#sheet canvas")
        box = sheet.bounding_box()
        assert box is not None
        # 64 tiles are 8 rows of 8: the third of the second row is channel 10
        sheet.click(position={"x": box["width"] * 2.5 / 8, "y": box["height"] * 1.5 / 8})
    else:
        hand.write("#channel", "10")
    assert explained.page.locator("#channel-title").inner_text() == "Channel 10 of layer2"
    width, height, data = canvas_pixels(explained.page, "#channel-canvas")
    tile = np.frombuffer(data, np.uint8).reshape(height, width, 4)[..., 0]
    expected = channel(http, site, "layer2", 10)
    assert (width % 20, height % 20) == (0, 0)
    cells = tile[:: height // 20, :: width // 20].astype(int)
    assert np.abs(cells - expected).max() <= 1  # the array is sent in half precision
    hand.press("#channel-next")
    assert explained.page.locator("#channel-title").inner_text() == "Channel 11 of layer2"
    explained.page.keyboard.press("Escape")
    assert not explained.page.locator("#channel-view").is_visible()


def channel(http: httpx.Client, site: str, layer: str, index: int) -> NDArray[np.uint8]:
    """A channel of the array that the server sends: its least value 0, its greatest 255."""
    answer = answer_of(http, site, SAMPLE, include="none", activations=layer, activation_as="array")
    (found,) = answer["activations"]
    data = base64.b64decode(found["array"]["data"])
    values = np.frombuffer(data, "<f2").reshape(found["shape"])[index].astype(float)
    scaled: NDArray[np.uint8] = np.rint(
        (values - values.min()) / np.ptp(values) * 255 + 1e-9
    ).astype(np.uint8)
    return scaled


def test_the_picture_is_saved_as_the_server_would_draw_it(
    explained: Watched, hand: Hand, site: str, http: httpx.Client
) -> None:
    with explained.page.expect_download() as download:
        hand.press("#save-overlay")
    assert download.value.suggested_filename == "sunflower-sunflower-gradcam.jpg"
    with Image.open(download.value.path()) as picture:
        saved = np.asarray(picture).astype(int)
    answer = answer_of(http, site, SAMPLE, include="overlay", format="png")
    expected = decoded(answer["explanations"][0]["overlay"]).astype(int)
    assert saved.shape == expected.shape
    assert np.abs(saved - expected).mean() < 3  # a JPEG against a PNG
    asked = len(explained.asked)
    assert asked == 1


def test_the_answer_is_saved_as_json(
    explained: Watched, hand: Hand, site: str, http: httpx.Client
) -> None:
    with explained.page.expect_download() as download:
        hand.press("#save-json")
    assert download.value.suggested_filename == "sunflower-sunflower-gradcam.json"
    saved = json.loads(download.value.path().read_text())
    expected = answer_of(http, site, SAMPLE)
    assert saved["results"][0]["image"] == expected["image"]
    assert [each["label"] for each in saved["results"][0]["predictions"]] == [
        each["label"] for each in expected["predictions"]
    ]


def test_the_copied_code_gives_the_same_result(page: Watched, hand: Hand, tmp_path: Path) -> None:
    """From a file whose name has everything in it that a shell and curl would trip over."""
    photo = tmp_path / """it's "a" photo; 1,2 $HOME.jpg"""
    photo.write_bytes(SAMPLE.read_bytes())
    page.page.set_input_files("#file", photo)
    wait_for_caption(page.page, "sunflower, ")
    page.page.locator("#method").select_option("layercam")
    page.page.locator("#layer").select_option("layer2")
    page.page.locator(".facts", has_text="LayerCAM at layer2").wait_for()
    with page.page.expect_download() as download:
        page.page.locator("#save-json").click()
    (explanation,) = json.loads(download.value.path().read_text())["results"][0]["explanations"]
    hand.press("#show-code")

    hand.press("[data-copy=code-curl]")
    printed = run(["sh", "-c", clipboard(page)], tmp_path)
    (again,) = json.loads(printed)["results"][0]["explanations"]
    assert (again["method"], again["layer"]) == ("layercam", "layer2")
    assert again["regions"] == explanation["regions"]

    hand.press("[data-copy=code-picture]")
    run(["sh", "-c", clipboard(page)], tmp_path)
    with Image.open(tmp_path / "why.jpg") as picture:
        assert picture.size == (640, 480)

    hand.press("[data-copy=code-python]")
    printed = run([sys.executable, "-c", clipboard(page)], tmp_path)
    assert printed.splitlines()[0].endswith("sunflower")
    boxes = ast.literal_eval(printed.splitlines()[-1])
    assert [list(box) for box in boxes] == explanation["regions"]["boxes"]
    with Image.open(tmp_path / "heatmap.png") as picture:
        assert picture.size == (640, 480)
    hand.press("#code [data-close]")
    assert not page.page.locator("#code").is_visible()


def clipboard(page: Watched) -> str:
    page.page.locator("#status", has_text="Copied.").wait_for(state="attached")
    text = page.page.evaluate("navigator.clipboard.readText()")
    assert isinstance(text, str)
    return text


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_slow_method_says_what_it_costs_and_can_be_cancelled(
    explained: Watched, hand: Hand
) -> None:
    before = facts(explained)
    explained.page.locator("#method").select_option("rise")
    words = explained.page.locator(".progress-words")
    words.get_by_text("RISE · up to 1,001 forward passes · ").wait_for()
    until(
        explained.page,
        "/· [0-9]+[.][1-9] of about [0-9.]+ s$/.test("
        "document.querySelector('.progress-words').textContent)",
    )
    hand.press(".cancel")
    explained.page.locator("#status", has_text="Cancelled.").wait_for(state="attached")
    assert not explained.page.locator(".progress").is_visible()
    assert facts(explained) == before
    assert explained.page.locator("#method").input_value() == "gradcam"


def test_the_number_of_masks_is_set(explained: Watched, hand: Hand) -> None:
    explained.page.locator("#method").select_option("rise")
    hand.write("#samples", "24")
    explained.page.locator(".facts", has_text="RISE · 25 forward passes").wait_for()
    assert "samples=24" in explained.asked[-1]


def test_the_page_turns_dark_and_light(explained: Watched, hand: Hand) -> None:
    def ground() -> str:
        return str(
            explained.page.evaluate("getComputedStyle(document.body.parentElement).backgroundColor")
        )

    toggle = explained.page.locator("#theme")
    before, pressed = ground(), toggle.get_attribute("aria-pressed")
    hand.press("#theme")
    assert ground() != before
    assert toggle.get_attribute("aria-pressed") != pressed
    explained.page.reload()
    explained.page.wait_for_selector("#layer option", state="attached")
    assert ground() != before
