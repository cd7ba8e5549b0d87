"""Comparing two to four maps: captions, signs, channels by rank, kernels, the report."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from browsing import SAMPLE, Hand, Watched, answer_of, canvas_pixels, explain_sample, until
from PIL import Image
from playwright.sync_api import Browser, Locator, Page

from api_schemas.methods import METHODS
from service.cam.heatmap import COLORMAPS
from service.images.decode import decode, fit_to_model
from service.models.catalog import ModelSpec
from service.models.loaded import LoadedModel
from service.models.loading import load_model

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

LIMITS = "It calls any other image one of them, too."


@pytest.fixture(scope="module")
def builtin() -> LoadedModel:
    return load_model(ModelSpec("builtin", "builtin"))


@pytest.fixture
def desk(open_page: Callable[..., Watched]) -> Watched:
    """The page at a desk, with the sample explained."""
    watched = open_page()
    watched.page.wait_for_selector("#layer option", state="attached")
    explain_sample(watched)
    return watched


def text(pane: Locator, name: str) -> str:
    return pane.locator(f".{name}").inner_text()


def live(page: Page, facts: str, of: str = "builtin") -> None:
    """Until the live map is of a method and a model."""
    page.locator(".pane:last-child .facts", has_text=facts).wait_for()
    page.locator(".pane:last-child .of", has_text=of).wait_for()


def test_four_maps_are_compared_each_with_its_model_method_layer_and_class(
    explained: Watched, hand: Hand
) -> None:
    page = explained.page
    hand.press("#compare")
    hand.press(page.locator("#predictions .why", has_text="tulip"))
    page.locator(".pane:last-child .caption", has_text="tulip, ").wait_for()
    hand.press("#compare")
    hand.choose("#method", "layercam")
    live(page, "LayerCAM at layer3")
    hand.choose("#layer", "layer2")
    live(page, "LayerCAM at layer2")
    hand.press("#compare")
    hand.choose("#model", "small")
    live(page, "LayerCAM at features", of="small")
    panes = page.locator(".pane").all()
    assert [text(pane, "of") for pane in panes] == ["sunflower.jpg · builtin"] * 3 + [
        "sunflower.jpg · small"
    ]
    assert [text(pane, "facts").split(" (")[0] for pane in panes] == [
        "Grad-CAM at layer3",
        "Grad-CAM at layer3",
        "LayerCAM at layer2",
        "LayerCAM at features",
    ]
    captions = [text(pane, "caption").split(",")[0] for pane in panes]
    assert captions[:3] == ["sunflower", "tulip", "tulip"]
    assert captions[3].startswith("class ")
    assert len({pane.get_attribute("data-request") for pane in panes}) == 4
    boxes = [box for pane in panes if (box := pane.locator(".stage").bounding_box())]
    assert boxes[0]["y"] == boxes[1]["y"] < boxes[2]["y"] == boxes[3]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert page.locator("#compare").is_disabled()
    assert "at most 4" in (page.locator("#compare").get_attribute("title") or "")
    hand.press(panes[1].locator(".close"))
    assert [text(pane, "caption").split(",")[0] for pane in page.locator(".pane").all()] == [
        "sunflower",
        "tulip",
        captions[3],
    ]
    for close in reversed(page.locator(".close:visible").all()):
        hand.press(close)
    assert page.locator(".pane").count() == 1
    assert text(page.locator(".pane"), "of").endswith("small")


def test_a_comparison_is_saved_as_one_image_with_its_captions(desk: Watched) -> None:
    page = desk.page
    page.locator("#compare").click()
    page.locator("#method").select_option("layercam")
    live(page, "LayerCAM")
    with page.expect_download() as download:
        page.locator("#save-overlay").click()
    with Image.open(download.value.path()) as picture:
        saved = np.asarray(picture.convert("RGB")).astype(int)
    assert saved.shape[1] == 2 * 640 + 3 * 16
    assert saved.shape[0] > 480 + 2 * 16
    left, right = saved[16:496, 16:656], saved[16:496, 672:1312]
    assert np.abs(left - right).mean() > 1
    below = saved[500:, 16:656]
    assert (below.min(axis=2) > 230).mean() > 0.8
    assert below.min() < 100  # the text


def test_a_contrast_shows_the_difference_of_logits(
    desk: Watched, site: str, http: httpx.Client
) -> None:
    answer = answer_of(http, site, SAMPLE, contrast="rose", include="none")
    logits = {each["label"]: each["logit"] for each in answer["predictions"]}
    desk.page.locator("#contrast").fill("rose")
    desk.page.keyboard.press("Enter")
    expected = f"logit difference +{logits['sunflower'] - logits['rose']:.2f}"
    desk.page.locator(".pane .caption", has_text=expected).wait_for()
    assert "%" not in text(desk.page.locator(".pane"), "caption")
    desk.page.locator("#target").fill("tulip")
    desk.page.keyboard.press("Enter")
    less = f"tulip rather than rose, logit difference +{logits['tulip'] - logits['rose']:.2f}"
    desk.page.locator(".pane .caption", has_text=less).wait_for()


def test_a_contrast_with_the_nearest_classes_names_them(
    desk: Watched, site: str, http: httpx.Client
) -> None:
    answer = answer_of(http, site, SAMPLE, contrast="nearest:2", include="none")
    (found,) = answer["explanations"]
    desk.page.locator("#contrast").fill("nearest:2")
    desk.page.keyboard.press("Enter")
    labels = ", ".join(each["label"] for each in found["contrasts"])
    expected = f"sunflower rather than {labels}, logit difference +{found['logit_difference']:.2f}"
    desk.page.locator(".pane .caption", has_text=expected).wait_for()


def test_a_map_without_a_sign_goes_from_none_to_most(desk: Watched) -> None:
    bar = desk.page.get_by_role("img", name="Evidence, from none to most")
    assert bar.is_visible()
    assert desk.page.locator(".colors").inner_text().split() == ["none", "most"]
    _, _, data = canvas_pixels(desk.page, ".pane .scale")
    colours = np.frombuffer(data, np.uint8).reshape(256, 4)[:, :3]
    assert (colours == COLORMAPS["turbo"]).all()


def test_an_input_gradient_keeps_its_sign(desk: Watched, site: str, http: httpx.Client) -> None:
    page = desk.page
    page.locator("#method").select_option("input_gradient")
    live(page, "Input gradient")
    assert page.locator(".colors").inner_text().split() == ["against", "for"]
    width, height, data = canvas_pixels(page, ".pane .heat")
    drawn = np.frombuffer(data, np.uint8).reshape(height, width, 4)
    levels = levels_of(http, site)
    seen = drawn[..., 3] == 255
    assert seen[:, 160:480].all()
    assert not seen[:, :40].any()
    assert (drawn[seen][:, :3] == COLORMAPS["bwr"][levels[seen]]).all()
    assert (levels[seen] < 100).any()
    assert (levels[seen] > 156).any()
    page.locator("#show-code").click()
    assert "colormap=bwr" in page.locator("#code-picture").inner_text()


def levels_of(http: httpx.Client, site: str) -> Any:
    """The signed levels of the sample's input gradient, from the server's own picture."""
    options = {"method": "input_gradient", "colormap": "bwr"}
    (explanation,) = answer_of(http, site, SAMPLE, **options)["explanations"]
    data = base64.b64decode(explanation["heatmap"]["data"])
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_threshold_hides_what_is_weak_of_both_signs(desk: Watched) -> None:
    page = desk.page
    page.locator("#method").select_option("input_gradient")
    live(page, "Input gradient")
    page.locator("#threshold").fill("40")
    until(page, "document.querySelector('#threshold-value').textContent === '40 %'")
    page.wait_for_timeout(100)
    width, height, data = canvas_pixels(page, ".pane .heat")
    drawn = np.frombuffer(data, np.uint8).reshape(height, width, 4)
    kept = drawn[drawn[..., 3] == 255].astype(int)
    assert (kept[:, 1] <= 255 * 0.62).all()  # green is what is missing to full strength
    assert (kept[:, 0] > kept[:, 2]).any()
    assert (kept[:, 0] < kept[:, 2]).any()


def test_what_the_model_knows_stands_under_its_name(explained: Watched, hand: Hand) -> None:
    page = explained.page
    assert page.locator("#knows").inner_text() == (
        "5 flowers: daisy, dandelion, rose, sunflower, tulip"
    )
    box, name = page.locator("#knows").bounding_box(), page.locator("#model").bounding_box()
    assert box is not None
    assert name is not None
    assert box["y"] >= name["y"] + name["height"]
    hand.choose("#model", "small")
    live(page, "Grad-CAM at features", of="small")
    assert page.locator("#knows").inner_text() == "7 classes"


def test_the_built_in_model_warns_of_its_limits_until_that_is_dismissed(desk: Watched) -> None:
    page = desk.page
    hand = Hand("keyboard", page)
    assert LIMITS in page.locator("#limits").inner_text()
    hand.choose("#model", "small")
    live(page, "Grad-CAM at features", of="small")
    assert page.locator("#limits").inner_text() == ""
    hand.choose("#model", "builtin")
    live(page, "Grad-CAM at layer3")
    hand.press(page.locator("#limits button"))
    assert page.locator("#limits").inner_text() == ""
    hand.press(page.locator("#predictions .why", has_text="tulip"))
    page.locator(".caption", has_text="tulip, ").wait_for()
    assert page.locator("#limits").inner_text() == ""


def test_a_method_that_cannot_run_is_not_offered_and_says_why(
    explained: Watched, hand: Hand
) -> None:
    page = explained.page
    reason = "it has no attention between tokens"
    for name in ("attention_rollout", "gae"):
        option = page.locator(f"#method option[value={name}]")
        assert option.is_disabled()
        assert option.get_attribute("title") == reason
    enabled = page.locator("#method option:enabled").count()
    assert enabled == page.locator("#method option").count() - 2
    hand.press("#missing-count")
    titles = [METHODS[name].title for name in ("attention_rollout", "gae")]
    listed = page.locator("#missing-reasons").inner_text().split("\n")
    assert listed == [titles[0], reason, titles[1], reason]


def test_a_method_that_the_next_model_lacks_gives_way(desk: Watched) -> None:
    """The page never sends a question that it does not offer."""
    page = desk.page
    page.locator("#method").select_option("guided_backprop")
    live(page, "Guided backprop")
    page.route(re.compile(r"/models/small$"), without_relu)
    page.locator("#model").select_option("small")
    live(page, "Grad-CAM at features", of="small")
    assert page.locator("#method").input_value() == "gradcam"
    assert page.locator("#method option[value=guided_backprop]").is_disabled()


def without_relu(route: Any) -> None:
    answer = route.fetch().json()
    for entry in answer["methods"]:
        if entry["name"].startswith("guided"):
            entry["reason"] = "it has no ReLU to guide"
    route.fulfill(json=answer)


def test_channels_are_ranked_by_activation_and_by_weight_for_the_class(
    desk: Watched, builtin: LoadedModel
) -> None:
    page = desk.page
    hand = Hand("keyboard", page)
    hand.choose("#inside-layer", "layer2")
    hand.press("#inside-show")
    page.locator("#channels-words", has_text="layer2: ").wait_for()
    means, weights = by_plain_torch(builtin)
    hand.choose("#order", "activation")
    page.locator("#top-words", has_text="Highest mean activation").wait_for()
    assert top(page) == means.argsort(descending=True)[:8].tolist()
    hand.choose("#order", "weight")
    page.locator("#top-words", has_text="Highest weight for sunflower").wait_for()
    best = weights.argsort(descending=True)
    assert top(page) == best[:8].tolist()
    hand.press(page.locator("#top-list button").first)
    assert page.locator("#channel-title").inner_text() == f"Channel {best[0]} of layer2"
    shown = page.locator("#channel-values").inner_text()
    value = re.search(r"weight for sunflower \+([0-9.e−-]+)$", shown)
    assert value is not None
    assert float(value[1].replace("−", "-")) == pytest.approx(float(weights[best[0]]), rel=0.02)
    assert page.locator("#channel-back").is_disabled()
    hand.press("#channel-next")
    assert page.locator("#channel-title").inner_text() == f"Channel {best[1]} of layer2"


def top(page: Page) -> list[int]:
    return [int(each.split(":")[0]) for each in page.locator("#top-list button").all_inner_texts()]


def by_plain_torch(model: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean activation and mean gradient of each channel of layer2, for the sunflower."""
    source = decode(SAMPLE.read_bytes(), max_pixels=1_000_000)
    pixels = fit_to_model(source, model.preprocessing, "crop").pixels
    kept: list[torch.Tensor] = []
    module = model.replicate()
    layer = module.get_submodule("layer2")
    hook = layer.register_forward_hook(lambda _m, _i, output: kept.append(output))
    image = model.normalised(pixels[None]).requires_grad_()
    logits = module(image)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[0, model.class_id("sunflower")], kept[0])
    return kept[0].detach().mean(dim=(0, 2, 3)), gradient.mean(dim=(0, 2, 3))


def test_the_sheet_follows_the_order(desk: Watched, builtin: LoadedModel) -> None:
    """The first tile is the channel of the highest mean, as it was at its own number."""
    page = desk.page
    page.locator("#inside-layer").select_option("layer2")
    page.locator("#inside-show").click()
    page.locator("#channels-words", has_text="layer2: ").wait_for()
    means, _ = by_plain_torch(builtin)
    best = int(means.argmax())
    before = sheet(page)
    page.locator("#order").select_option("activation")
    page.locator("#top-channels").wait_for()
    side = (before.shape[0] - 2) // 8
    row, column = divmod(best, 8)
    tile = before[row * side :, column * side :][:side, :side]
    assert (sheet(page)[:side, :side] == tile).all()


def sheet(page: Page) -> Any:
    """The sheet's pixels; Chromium complains of canvases that are read twice with getImageData."""
    url = page.locator("#sheet canvas").evaluate("canvas => canvas.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_kernels_are_those_of_the_server(desk: Watched, site: str, http: httpx.Client) -> None:
    page = desk.page
    hand = Hand("keyboard", page)
    layers = http.get(f"{site}/models/builtin/layers").json()["layers"]
    first = next(each["path"] for each in layers if each["kernels"])
    outer = next(each["path"] for each in layers if first.startswith(f"{each['path']}."))
    hand.choose("#inside-layer", outer if outer and outer != first else first)
    hand.press("#kernels-show")
    page.locator("#kernels-words", has_text=f"Kernels of {first}").wait_for()
    picture = Image.open(io.BytesIO(http.get(f"{site}/models/builtin/kernels/{first}").content))
    expected = np.asarray(picture.convert("RGB"))
    width, height, data = canvas_pixels(page, "#kernels-canvas")
    drawn = np.frombuffer(data, np.uint8).reshape(height, width, 4)[..., :3]
    assert (drawn == expected).all()


def test_kernels_are_fetched_with_the_key(
    open_page: Callable[..., Watched], serve: Callable[..., Any], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"anna:{hashlib.sha256(b'secret').hexdigest()}\n")
    with serve("--api-keys-file", str(keys)) as url:
        watched = open_page(url)
        watched.page.locator("#key-field").fill("secret")
        watched.page.keyboard.press("Enter")
        watched.page.wait_for_selector("#layer option", state="attached")
        explain_sample(watched)
        watched.page.locator("#kernels-show").click()
        watched.page.locator("#kernels").wait_for()
        watched.forgive(401)


def test_a_layer_without_kernels_says_so(desk: Watched) -> None:
    page = desk.page
    values = page.locator("#inside-layer option").evaluate_all("all => all.map(e => e.value)")
    relu = next(
        value
        for value in values
        if "ReLU" in page.locator(f"#inside-layer option[value='{value}']").inner_text()
    )
    page.locator("#inside-layer").select_option(relu)
    assert page.locator("#kernels-show").is_disabled()
    assert "no kernels" in (page.locator("#kernels-show").get_attribute("title") or "")


def test_the_report_has_everything_of_the_session(
    desk: Watched, chromium: Browser, tmp_path: Path
) -> None:
    page = desk.page
    page.locator("#predictions .versus:enabled").first.click()
    page.locator(".caption", has_text="rather than").wait_for()
    page.locator("#model").select_option("small")
    live(page, "Grad-CAM at features", of="small")
    page.locator("#run-experiment").click()
    page.locator(".experiment").wait_for()
    with page.expect_download() as download:
        page.locator("#save-report").click()
    assert download.value.suggested_filename == "camserve-report.html"
    saved = download.value.path().read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=["'](?!data:)|https?://(?!127|www\.w3)|@import""", saved)
    (data,) = re.findall(r'<script type="application/json">(.*)</script>', saved, re.DOTALL)
    kept = json.loads(data)
    assert [each["model"] for each in kept["maps"]] == ["builtin", "builtin", "small"]
    assert [each["question"]["contrast"] is None for each in kept["maps"]] == [True, False, True]
    assert len(kept["experiments"]) == 1
    report = chromium.new_page(java_script_enabled=False)
    (tmp_path / "report.html").write_text(saved, encoding="utf-8")
    report.goto((tmp_path / "report.html").as_uri())
    assert "1 image, 3 maps, 1 experiment" in report.locator("h1 + p").inner_text()
    headings = report.locator("article h3").all_inner_texts()
    assert headings[0].startswith("sunflower, ")
    assert "rather than" in headings[1]
    assert report.locator("li.experiment").count() == 1
    sizes = report.locator("article > img").evaluate_all("all => all.map(e => e.naturalWidth)")
    assert sizes == [640, 640, 640]
    report.close()


def test_the_wording_is_that_of_the_docs(desk: Watched) -> None:
    page = desk.page
    assert page.get_by_role("link", name="API docs").is_visible()
    assert page.get_by_role("heading", name="Method").count() == 1
    assert page.get_by_role("heading", name="Export").count() == 1
    fits = page.locator("#fit option").all_inner_texts()
    assert fits == [
        "center crop, as in training",
        "whole image, padded",
        "whole image, stretched",
    ]


def test_a_copied_link_opens_the_same_view(
    desk: Watched, open_page: Callable[..., Watched]
) -> None:
    page = desk.page
    page.locator("#method").select_option("layercam")
    live(page, "LayerCAM")
    page.locator("#predictions .why", has_text="tulip").click()
    page.locator(".caption", has_text="tulip, ").wait_for()
    page.locator("#copy-link").click()
    page.locator("#status", has_text="Copied.").wait_for(state="attached")
    link = page.evaluate("navigator.clipboard.readText()")
    assert "sunflower" not in link
    again = open_page(path=link.removeprefix(desk.url)).page
    again.wait_for_selector("#layer option", state="attached")
    again.locator("#welcome [data-do=sample]").click()
    again.locator(".caption", has_text="tulip, ").wait_for()
    live(again, "LayerCAM at layer3")


def test_removed_images_leave_the_report_and_the_comparison(desk: Watched) -> None:
    page = desk.page
    page.locator("#compare").click()
    assert page.locator(".pane").count() == 2
    page.locator("[data-do=clear]").click()
    assert page.locator(".pane").count() == 1
    assert page.evaluate("document.querySelector('#save-report').disabled")
    page.locator("#undo button").first.click()
    page.locator(".caption", has_text="sunflower, ").wait_for()
    with page.expect_download() as download:
        page.locator("#save-report").click()
    assert download.value.path().read_text(encoding="utf-8").count("<article") == 1
