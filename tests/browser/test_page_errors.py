"""Errors in the words of a visitor: where they arose, all of them, nothing for programs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from browsing import SAMPLE, Watched, explain_sample, until, wait_for_caption
from playwright.sync_api import Page, Route

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240)]

OpenPage = Callable[..., Watched]

FOR_PROGRAMS = re.compile(
    r"curl|(^|\s)--?[a-zA-Z]\b|CAMSERVE_|=\w|Retry-After|[Cc]ontent.[Tt]ype|JSON|base64|\bGET\b|`"
)


@pytest.fixture
def desk(open_page: OpenPage) -> Watched:
    watched = open_page()
    watched.page.wait_for_selector("#layer option", state="attached")
    return watched


def notices(page: Page, box: str) -> list[str]:
    """The sentences that are visible in a box."""
    return page.locator(f"{box} .notice p:first-child:visible").all_inner_texts()


def forgive_all(watched: Watched) -> None:
    """The browser writes refused requests into its console by itself."""
    watched.messages = [each for each in watched.messages if "Failed to load" not in each]


def transferred(page: Page, event: str, kinds: dict[str, str]) -> None:
    """A drop or a paste of texts by their types."""
    page.evaluate(
        """([event, kinds]) => {
            const transfer = new DataTransfer();
            for (const [type, text] of Object.entries(kinds)) transfer.setData(type, text);
            const init = { bubbles: true, cancelable: true };
            document.body.dispatchEvent(event === "paste"
                ? new ClipboardEvent(event, { ...init, clipboardData: transfer })
                : new DragEvent(event, { ...init, dataTransfer: transfer }));
        }""",
        [event, kinds],
    )


LINK = {"text/uri-list": "https://example.org/cat.jpg", "text/plain": "https://example.org/cat.jpg"}


@pytest.mark.parametrize(
    ("event", "kinds", "words"),
    [
        ("drop", LINK, "This is a link, and this page opens no links. Save the image, then drop"),
        ("paste", {"text/plain": LINK["text/plain"]}, "This is a link, and this page opens no"),
        ("paste", {"text/plain": "a cat on a mat"}, "This is text, not an image. Paste an image"),
        ("drop", {"text/plain": "a cat"}, "This is text, not an image. Drop an image file."),
        ("paste", {}, "There is no image in this. Paste an image file."),
        ("paste", {"text/html": "<b>cat</b>"}, "There is no image in this."),
    ],
)
def test_what_is_no_file_is_named(
    desk: Watched, event: str, kinds: dict[str, str], words: str
) -> None:
    transferred(desk.page, event, kinds)
    (sentence,) = notices(desk.page, "#welcome .files")
    assert sentence.startswith(words)
    assert desk.asked == []
    explain_sample(desk)
    transferred(desk.page, event, kinds)
    (sentence,) = notices(desk.page, "#strip .files")
    assert sentence.startswith(words)
    assert desk.page.locator(".caption").inner_text().startswith("sunflower, ")


def test_text_is_pasted_and_dropped_into_fields_as_ever(desk: Watched) -> None:
    explain_sample(desk)
    desk.page.evaluate("navigator.clipboard.writeText('tulip')")
    desk.page.locator("#target").focus()
    desk.page.keyboard.press("Control+V")
    desk.page.keyboard.press("Enter")
    wait_for_caption(desk.page, "tulip, ")
    assert notices(desk.page, "[role=alert]") == []
    is_free = """element => element.dispatchEvent(new DragEvent("dragover",
        { bubbles: true, cancelable: true, dataTransfer: new DataTransfer() }))"""
    assert desk.page.locator("#contrast").evaluate(is_free)
    assert not desk.page.locator("#photos").evaluate(is_free)


def test_three_files_that_are_no_images_are_named_one_by_one(desk: Watched, tmp_path: Path) -> None:
    """With the image among them explained, and without a request for what cannot be an image."""
    made = {
        "notes.txt": b"a cat",
        "film.mp4": b"\0\0\0\x18ftypmp42",
        "paper.pdf": b"%PDF-1.7",
        "nothing.png": b"",
    }
    files = [SAMPLE]
    for name, content in made.items():
        files.append(tmp_path / name)
        files[-1].write_bytes(content)
    desk.page.set_input_files("#file", files)
    wait_for_caption(desk.page, "sunflower, ")
    assert notices(desk.page, "#strip .files") == [
        "notes.txt is text, not an image. Choose an image, such as a JPEG or PNG file.",
        "film.mp4 is a video, not an image. Choose an image, such as a JPEG or PNG file.",
        "paper.pdf is a PDF document, not an image. Choose an image, such as a JPEG or PNG file.",
        "nothing.png is empty. Choose another file.",
    ]
    assert len(desk.asked) == 1
    desk.page.locator("#strip .files").get_by_role("button", name="Dismiss").first.click()
    assert len(notices(desk.page, "#strip .files")) == 3


def test_what_was_said_of_files_stays_when_the_last_image_is_refused(
    desk: Watched, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("a cat")
    (tmp_path / "broken.jpg").write_bytes(SAMPLE.read_bytes()[:4000])
    desk.page.set_input_files("#file", sorted(tmp_path.iterdir()))
    until(desk.page, "document.querySelectorAll('#welcome .notice').length === 2")
    assert [sentence.split()[0] for sentence in notices(desk.page, "#welcome")] == [
        "notes.txt",
        "broken.jpg:",
    ]
    forgive_all(desk)


@pytest.mark.parametrize("good", [0, 1])
def test_three_broken_images_are_named_one_by_one(desk: Watched, tmp_path: Path, good: int) -> None:
    """Those that the service cannot read, too; the others stay, or the page begins again."""
    files = [SAMPLE][:good]
    for name in ("one.jpg", "two.jpg", "three.jpg"):
        files.insert(0, tmp_path / name)
        files[0].write_bytes(SAMPLE.read_bytes()[:4000])
    desk.page.set_input_files("#file", files)
    until(desk.page, "document.querySelectorAll('.files .notice').length === 3")
    assert sorted(notices(desk.page, ".files")) == [
        f"{name}.jpg: The image is truncated or corrupt; send the complete file again."
        for name in ("one", "three", "two")
    ]
    if good:
        wait_for_caption(desk.page, "sunflower, ")
    assert len(notices(desk.page, ".files")) == 3
    assert notices(desk.page, "#strip" if good else "#welcome") == notices(desk.page, ".files")
    forgive_all(desk)


def test_a_folder_is_named_and_the_images_beside_it_are_used(desk: Watched) -> None:
    """The drop of a folder, as browsers describe it."""
    desk.page.evaluate(
        """async () => {
            const content = await (await fetch("page/sunflower.jpg")).blob();
            const photo = new File([content], "a.jpg", { type: "image/jpeg" });
            const folder = new File([], "holiday");
            const item = (name, isDirectory) =>
                ({ webkitGetAsEntry: () => ({ name, isDirectory }) });
            const event = new DragEvent("drop", { bubbles: true, cancelable: true });
            Object.defineProperty(event, "dataTransfer", { value: {
                files: [folder, photo], types: ["Files"], getData: () => "",
                items: [item("holiday", true), item("a.jpg", false)],
            } });
            document.body.dispatchEvent(event);
        }"""
    )
    wait_for_caption(desk.page, "sunflower, ")
    assert notices(desk.page, ".files") == ["holiday is a folder. Drop the images in it."]


def test_a_file_that_was_deleted_after_it_was_chosen_is_named(
    open_page: OpenPage, site: str, tmp_path: Path
) -> None:
    """It is not the server that cannot be reached."""
    photo = tmp_path / "gone.jpg"
    photo.write_bytes(SAMPLE.read_bytes())
    desk = open_page(path="/docs")
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    desk.page.route("**/models/builtin", hold)
    desk.page.goto(site)
    until(desk.page, "document.querySelector('#model').value === 'builtin'")
    desk.page.set_input_files("#file", photo)
    photo.unlink()
    held.pop().continue_()
    until(desk.page, "document.querySelectorAll('.files .notice').length === 1")
    (sentence,) = notices(desk.page, "#welcome .files")
    assert sentence == (
        "gone.jpg: The file cannot be read any more: it was changed, moved or deleted. "
        "Choose it again."
    )
    desk.messages = [each for each in desk.messages if "ERR_" not in each]


@pytest.mark.parametrize(
    ("control", "act", "box"),
    [
        ("#target", "tullip", "#class-failure"),
        ("#contrast", "dasy", "#class-failure"),
        ("#method", "attention_rollout", "#method-failure"),
    ],
)
def test_a_choice_that_is_refused_says_so_beside_its_control(
    desk: Watched, control: str, act: str, box: str
) -> None:
    explain_sample(desk)
    if control == "#method":
        option = desk.page.locator(f"{control} option[value={act}]")
        option.evaluate("each => { each.disabled = false; }")
        desk.page.locator(control).select_option(act)
    else:
        desk.page.locator(control).fill(act)
        desk.page.keyboard.press("Enter")
    desk.page.locator(f"{box} .notice").wait_for()
    (sentence,) = notices(desk.page, box)
    assert not FOR_PROGRAMS.search(sentence), sentence
    gap = desk.page.evaluate(
        """([control, box]) => {
            const frame = (each) => document.querySelector(each).getBoundingClientRect();
            return frame(box).top - frame(control).bottom;
        }""",
        [control, box],
    )
    assert 0 <= gap < 90
    assert notices(desk.page, ".failure") == []
    forgive_all(desk)


REFUSALS = [
    (
        429,
        "queue_full",
        (
            "64 images are waiting or running, which is the maximum of this service; try again "
            "after the seconds in Retry-After."
        ),
        "The service is busy. Try again in 7 s.",
    ),
    (
        429,
        "key_limit",
        (
            "The key 'anna' may make 60 requests per minute; try again after the seconds in "
            "Retry-After."
        ),
        "The key 'anna' may make 60 requests per minute.",
    ),
    (
        503,
        "shutting_down",
        "The service is shutting down; ask another instance.",
        "The service is restarting. Try again in 7 s.",
    ),
    (
        504,
        "deadline_exceeded",
        "The response was not ready within 60 seconds; retry, or request less.",
        "The response was not ready within 60 seconds. Try again, or choose a faster method.",
    ),
    (
        500,
        "inference_failed",
        (
            "The model failed on this image. Try the image again; if it fails again, the server's "
            "log has the cause under this request id."
        ),
        (
            "The model failed on this image. Try the image again. "
            "The service's log has the cause under 4f2a."
        ),
    ),
    (
        500,
        "render_failed",
        "The answer was computed and could not be drawn; use include=none for the numbers alone.",
        (
            "The answer was computed and could not be drawn. "
            "The service's log has the cause under 4f2a."
        ),
    ),
    (
        422,
        "invalid_option",
        "use -F image=@cat.jpg",
        "The service cannot do this with this image and model.",
    ),
    (
        422,
        "invalid_option",
        "Model 'm' cannot be explained by `gradcam`: it has no layers. Take rise or occlusion.",
        "Model 'm' cannot be explained by Grad-CAM: it has no layers. Take RISE or Occlusion.",
    ),
]


@pytest.mark.parametrize(("status", "code", "detail", "words"), REFUSALS)
def test_a_failure_of_the_service_stands_under_its_image_in_words(
    desk: Watched, status: int, code: str, detail: str, words: str
) -> None:
    body = {"code": code, "detail": detail, "request_id": "4f2a"}
    headers = {"retry-after": "7"} if status in (429, 503) else {}

    def refuse(route: Route) -> None:
        route.fulfill(status=status, json=body, headers=headers)

    desk.page.route("**/explain?*", refuse)
    desk.page.locator("#welcome [data-do=sample]").click()
    desk.page.locator(".pane .failure .notice").wait_for()
    assert notices(desk.page, ".pane .failure") == [words]
    assert desk.page.get_by_role("button", name="Try again").count() == (status in (429, 503, 504))
    forgive_all(desk)


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_without_a_service_behind_it_is_said(desk: Watched, status: int) -> None:
    page = "<html><h1>Bad Gateway: curl -v upstream:8000</h1></html>"
    desk.page.route(
        "**/explain?*",
        lambda route: route.fulfill(status=status, body=page, content_type="text/html"),
    )
    desk.page.locator("#welcome [data-do=sample]").click()
    desk.page.locator(".pane .failure .notice").wait_for()
    assert notices(desk.page, ".pane .failure") == [
        "The service cannot be used at the moment. Try again later."
    ]
    desk.page.unroute("**/explain?*")
    desk.page.get_by_role("button", name="Try again").click()
    wait_for_caption(desk.page, "sunflower, ")
    forgive_all(desk)
