"""`camserve explain`: what it takes, what it writes, and what it says."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import webbrowser
from html import escape
from pathlib import Path
from typing import Any

import pictures
import pytest
from disks import playing
from PIL import Image, ImageDraw
from typer.testing import CliRunner, Result

from api_schemas.answers import Verification, verdict_sentence
from service.cli.main import app
from service.cli.report.contact_sheet import MARGIN, VERDICT, draw_verdict
from service.cli.report.page import FLAGS

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.timeout(120)

TINY = ("--model", "tiny:small", "--workers", "1")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, worked in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def explain(*arguments: str, code: int = 0, stdin: bytes | None = None) -> Result:
    result = CliRunner().invoke(app, ["explain", *arguments, *TINY], input=stdin)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def lines(result: Result) -> list[dict[str, Any]]:
    """Standard output, every line of it a JSON object."""
    return [json.loads(line) for line in result.stdout.splitlines()]


def words(text: str) -> str:
    return " ".join(text.split())


def photos(*names: str) -> None:
    for seed, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(pictures.png(seed=seed))


def test_json_is_a_line_for_each_image_in_order_and_nothing_else_is_on_standard_output() -> None:
    photos("a.png", "c.png")
    Path("b.png").write_bytes(b"no picture")
    result = explain("c.png", "b.png", "a.png", "--json", code=1)
    third, second, first = lines(result)
    assert [each["file"] for each in (third, second, first)] == ["c.png", "b.png", "a.png"]
    assert first["model"]["name"] == "small"
    assert first["explanations"][0]["grid"]["shape"] == [56, 56]
    assert set(second) == {"file", "model", "error"}
    assert second["error"]["code"] == "unsupported_image"
    assert "2 explained, 1 failed" in result.stderr
    assert not Path("explained").exists()


def test_a_line_of_json_is_what_the_service_answers(client: Any) -> None:
    photos("a.png")
    (line,) = lines(explain("a.png", "--json", "--target", "3", "--regions", "--fit", "pad"))
    asked = {"targets": "3", "include": ["grid", "regions"], "fit": "pad"}
    headers = {"content-type": "image/png"}
    body = Path("a.png").read_bytes()
    answer = client.post("/explain", content=body, headers=headers, params=asked).json()
    expected = {"file": "a.png", "model": answer["model"], **answer["results"][0]}
    assert rounded(line) == rounded(expected)


def rounded(value: Any) -> Any:
    """Floats to six digits; a grid's bytes left out, which hold the last digit too."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items() if key != "data"}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return f"{value:.4g}" if isinstance(value, float) else value


def test_a_format_that_the_settings_leave_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMSERVE_IMAGE_FORMATS", "JPEG")
    photos("a.png")
    (line,) = lines(explain("a.png", "--json", code=1))
    assert line["error"]["code"] == "unsupported_image"


def test_standard_input_is_an_image_called_stdin() -> None:
    (line,) = lines(explain("-", "--json", "--out", "out", stdin=pictures.png()))
    assert line["file"] == "-"
    assert {each.name for each in Path("out").iterdir()} == {
        "stdin.overlay.jpeg",
        "stdin.heatmap.png",
        "stdin.json",
    }


def test_a_quoted_pattern_is_matched_below_the_folder_that_it_begins_with() -> None:
    photos("p/x/a.png", "p/y/z/b.png", "p/c.png")
    Path("p/notes.txt").write_text("no image")
    explain("p/**/*", "--out", "all")
    assert {str(each) for each in Path("all").rglob("*.json")} == {
        "all/x/a.json",
        "all/y/z/b.json",
        "all/c.json",
    }
    assert [each["file"] for each in lines(explain("p/?/*.png", "--json"))] == ["p/x/a.png"]


def test_a_file_is_explained_once_and_two_of_one_name_in_two_places() -> None:
    photos("x/a.png", "y/a.png")
    explain("x/a.png", "y/a.png", "x", "y/*.png", "--out", "out")
    written = sorted(Path("out").rglob("*.json"))
    assert len(written) == 2
    assert all(str(each).endswith(("x/a.png.json", "y/a.png.json")) for each in written)


def test_no_two_images_have_one_name_for_their_results() -> None:
    """The second class of `a` is `a.6`; so would be the first one of `a.6`."""
    names = ["a.png", "a.6.png", "a.6.png.png", "b.01.png", "b.02.png", "c.png", "c.jpg"]
    photos(*names)
    explain(*names, "--target", "5", "--target", "6", "--out", "out")
    written = [each.name for each in Path("out").rglob("*") if each.is_file()]
    assert len(written) == 5 * len(names)
    assert {"a.json", "a.6.png.json", "b.01.json", "c.png.json"} <= set(written)
    for name in ("a", "a.6.png", "c.jpg"):
        assert {f"{name}.overlay.jpeg", f"{name}.6.overlay.jpeg"} <= set(written)


def test_a_name_that_is_not_utf_8_is_explained_and_shown_by_its_bytes() -> None:
    names = [os.fsdecode(b"a\xff.png"), r"a\xff.png"]
    photos(*names)
    Path(os.fsdecode(b"bad\xfe.png")).write_bytes(b"no picture")
    out = ("--out", "out", "--sheet", "all.png", "--report", "why.html")
    result = explain(".", "--json", *out, code=1)
    shown = [r"a\x5cxff.png", r"a\xff.png", r"bad\xfe.png"]
    assert sorted(each["file"] for each in lines(result)) == shown
    assert r"failed: bad\xfe.png" in words(result.stderr)
    page = Path("why.html").read_text()
    assert all(each in page for each in shown)
    assert len(list(Path("out").glob("*.overlay.jpeg"))) == 2


def test_every_result_is_on_the_disk_when_it_has_its_name(monkeypatch) -> None:
    photos("a.png")
    named = []
    with playing(Path.cwd(), monkeypatch) as disk:
        disk.when_named.append(lambda path: named.append(path.stat().st_ino in disk.synced))
        explain("a.png", "--out", "out", "--sheet", "all.png", "--report", "why.html")
        for path in [*Path.cwd().glob("out/*"), Path.cwd() / "all.png", Path.cwd() / "why.html"]:
            assert disk.names[path.parent.stat().st_ino][path.name] == path.stat().st_ino, path
    assert named == [True] * 5


@pytest.mark.parametrize(("flag", "name"), [("--sheet", "all.png"), ("--report", "why.html")])
def test_what_cannot_be_written_whole_leaves_what_was_there(monkeypatch, flag, name) -> None:
    photos("a.png")
    Path(name).write_bytes(b"before")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = explain("a.png", flag, name, code=2)
    assert f"{name} cannot be written: No space left on device." in words(result.stderr)
    assert Path(name).read_bytes() == b"before"
    assert sorted(each.name for each in Path.cwd().iterdir()) == sorted(["a.png", name])


def test_a_folder_says_what_it_left_out_and_reads_every_suffix_of_an_image() -> None:
    photos("p/a.PNG", "p/b.jpe", "p/c.jfif", "p/d.pjpeg", "p/deep/e.jpg", "p/x.heic", "p/no-suffix")
    for name in ("._a.PNG", ".DS_Store", ".git/object", "Thumbs.db", "._x.heic", "deep/notes.txt"):
        Path("p", name).parent.mkdir(exist_ok=True)
        Path("p", name).write_bytes(b"no image")
    result = explain("p", "--json")
    names = ["p/a.PNG", "p/b.jpe", "p/c.jfif", "p/d.pjpeg", "p/deep/e.jpg"]
    assert [each["file"] for each in lines(result)] == names
    assert (
        "skipped 3 files without an image suffix: p/deep/notes.txt, p/no-suffix, p/x.heic. "
        "Name a file explicitly to read it."
    ) in words(result.stderr)
    assert [each["file"] for each in lines(explain("p/x.heic", "--json"))] == ["p/x.heic"]


def test_of_many_files_that_were_left_out_a_few_are_named() -> None:
    photos("p/a.png", *(f"p/{n:02}.raw" for n in range(20)))
    said = words(explain("p", "--json").stderr)
    assert "skipped 20 files without an image suffix: p/00.raw" in said
    assert "p/04.raw and 15 more. " in said
    assert "05.raw" not in said


def test_a_folder_of_images_alone_says_nothing() -> None:
    photos("p/a.png")
    assert "skipped" not in explain("p", "--json").stderr


def test_a_folder_without_images_is_refused_with_what_it_has() -> None:
    Path("p").mkdir()
    Path("p/a.heic").write_bytes(b"")
    said = words(explain("p", code=2).stderr)
    assert "there is no image in the folder p; skipped 1 file without an image suffix: p/a" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["explain", "a.png", "--model", "torchvision/nope"],
            "torchvision has no model 'nope'",
        ),
        (
            ["bulk", ".", "out", "--model", "torchvision/nope"],
            "torchvision has no model 'nope'",
        ),
        (["export", "coco", ".", "--model", "no:such"], "cannot import 'no:such'"),
        (["models", "--model", "torchvision/nope"], "torchvision has no model 'nope'"),
        (["explain", "a.png", "--layer", "nope", *TINY], "has no layer 'nope'"),
        (["calibrate", "tiny:small", "."], "bad.png: The bytes are not"),
    ],
)
def test_one_error_is_one_sentence(arguments: list[str], sentence: str) -> None:
    """Not once by the log and once by the command; and it names the file."""
    photos("a.png")
    Path("bad.png").write_bytes(b"no picture")
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "service", *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: ")
    assert sentence in line


def test_hiding_a_part_is_told_beside_the_score() -> None:
    photos("a.png")
    mask = json.dumps({"boxes": [[0, 0, 40, 40]], "hide": "rest"})
    result = explain("a.png", "--mask", mask, "--out", "out")
    (change,) = json.loads(Path("out/a.json").read_text())["masked"]["changes"]
    assert f"{change['label']} {change['score']:.1%}" in words(result.stdout)


def test_verdicts_are_told_beside_the_score_and_are_those_of_the_service(client: Any) -> None:
    photos("a.png", "b.png")
    explain("b.png", "--out", "plain")
    assert "verify" not in json.loads(Path("plain/b.json").read_text())["explanations"][0]
    one = explain("a.png", "--verify", "true", "--out", "out")
    (found,) = json.loads(Path("out/a.json").read_text())["explanations"]
    headers = {"content-type": "image/png"}
    body = Path("a.png").read_bytes()
    query = {"verify": "true", "include": "none"}
    answer = client.post("/explain", content=body, headers=headers, params=query).json()
    expected = answer["results"][0]["explanations"][0]["verify"]
    assert found["verify"]["verdict"] == expected["verdict"]
    assert found["verify"]["agreement"] == pytest.approx(expected["agreement"], abs=1e-3)
    told = f"{expected['verdict']} (agreement {found['verify']['agreement']:z.2f})"
    assert told in words(one.stdout)
    two = explain("a.png", "--verify", "true", "--target", "1", "--target", "2", "--out", "two")
    for each in json.loads(Path("two/a.json").read_text())["explanations"]:
        assert f"{each['label']} {each['verify']['verdict']} (agreement" in words(two.stdout)


def test_a_word_that_is_no_verification_is_named() -> None:
    photos("a.png")
    refused = explain("a.png", "--verify", "maybe", code=2)
    for word in ("verify", "true", "search"):
        assert word in words(refused.stderr)


def test_a_contact_sheet_has_a_mark_and_a_word_for_each_verdict() -> None:
    photos("a.png")
    explain("a.png", "--sheet", "plain.png")
    explain("a.png", "--sheet", "verified.png", "--verify", "true")
    with Image.open("plain.png") as plain, Image.open("verified.png") as verified:
        assert verified.width == plain.width
        assert verified.height == plain.height + VERDICT
        below = plain.height - MARGIN
        line = verified.crop((MARGIN, below, MARGIN + 200, below + VERDICT)).convert("L")
    assert line.getextrema()[0] < 128


def test_marks_of_verdicts_differ_without_their_colors() -> None:
    shapes = set()
    for verdict in ("supported", "inconclusive", "refuted"):
        drawn = Image.new("RGB", (40, 30), "white")
        draw_verdict(ImageDraw.Draw(drawn), (4, 4), 14, verdict)
        shapes.add(
            drawn.crop((0, 0, 20, 30)).convert("L").point(lambda v: 255 * (v > 200)).tobytes()
        )
    assert len(shapes) == 3


def test_a_contact_sheet_has_a_tile_for_each_image_and_for_each_failure() -> None:
    photos("a.png", "b.png", "c.png")
    plain = explain("a.png", "b.png", "--sheet", "two.png")
    assert "two.png" in plain.stderr
    Path("bad.png").write_bytes(b"no picture")
    explain(".", "--sheet", "five.jpg", code=1)
    with Image.open("two.png") as two, Image.open("five.jpg") as five:
        assert (two.format, five.format) == ("PNG", "JPEG")
        assert five.height > two.height
        assert coloured(two) > 0.02
    assert not Path("explained").exists()


def coloured(picture: Image.Image) -> float:
    """The share of pixels that are colourful, as maps are and paper is not."""
    saturation = picture.convert("HSV").getchannel("S")
    return sum(saturation.histogram()[128:]) / (picture.width * picture.height)


def test_a_report_is_one_file_that_asks_nothing_of_anybody() -> None:
    photos("a.png", "<b>&.png")
    Path("bad.png").write_bytes(b"no picture")
    explain(".", "--report", "why.html", "--explain-top", "2", code=1)
    page = Path("why.html").read_text()
    assert page.count("<article ") == 2
    assert page.count("<figure>") == 4
    assert "&lt;b&gt;&amp;.png" in page
    assert "<b>&.png" not in page
    assert "bad.png</b> The bytes are not a supported image format" in page
    assert "default-src &#x27;none&#x27;" in page
    asked = re.findall(r"(?:src|href|url\()=?[\"']?([^\"')>\s]+)", page)
    assert asked
    assert all(each.startswith(("data:image/", "#")) for each in asked), asked
    assert not re.search(r"\sstyle=|\son[a-z]+=", page), "the policy would refuse it"
    photo = re.search(r"data:image/jpeg;base64,([^\"]+)", page)
    assert photo is not None
    with Image.open(io.BytesIO(base64.b64decode(photo[1]))) as shown, Image.open("a.png") as source:
        assert shown.size == source.size


def test_a_report_has_the_flags_of_each_explanation_below_its_own_map() -> None:
    photos("a.png")
    classes = ("--explain-top", "3")
    explain("a.png", "--report", "why.html", "--out", "out", *classes)
    figures = re.findall(r"<figure>.*?</figure>", Path("why.html").read_text(), re.DOTALL)
    found = json.loads(Path("out/a.json").read_text())["explanations"]
    assert len(figures) == len(found) == 3
    assert len({tuple(each["flags"]) for each in found}) > 1
    for figure, each in zip(figures, found, strict=True):
        notes = re.findall(r'<p class="note">(.*?)</p>', figure)
        assert notes == [escape(FLAGS.get(flag, flag.replace("_", " "))) for flag in each["flags"]]
        assert f"<figcaption>{each['label']} " in figure


def test_a_report_tells_each_verdict_in_a_sentence_with_its_numbers_in_a_fold() -> None:
    photos("a.png")
    explain("a.png", "--report", "plain.html")
    assert "<details" not in Path("plain.html").read_text()
    flags = ("--verify", "search", "--explain-top", "2", "--out", "out")
    explain("a.png", "--report", "why.html", *flags)
    page = Path("why.html").read_text()
    folds = re.findall(r'<details class="verdict (\w+)"><summary>(.*?)</summary>(.*?)</dl>', page)
    found = json.loads(Path("out/a.json").read_text())["explanations"]
    assert len(folds) == len(found) == 2
    for (name, told, numbers), each in zip(folds, found, strict=True):
        verify = Verification(**each["verify"])
        assert name == verify.verdict
        assert told == f"<b>{name.capitalize()}.</b> {verdict_sentence(verify)}"
        assert f"<dt>agreement</dt><dd>{verify.agreement:z.2f}</dd>" in numbers
        assert f"<dt>p by place</dt><dd>{verify.p_place:z.3f}</dd>" in numbers
        for tried in verify.tried or []:
            assert f"<dt>at {tried.layer}</dt><dd>{tried.verdict}, " in numbers
    assert not re.search(r"\sstyle=|\son[a-z]+=", page), "the policy would refuse it"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where a browser of our own writes the URLs that it is started with."""
    log, browser = tmp_path / "browser.log", tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" >> "{log}"\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    monkeypatch.setattr(webbrowser, "_tryorder", None)
    monkeypatch.setattr(webbrowser, "_browsers", {})
    return log


@pytest.mark.parametrize(
    ("flags", "place"),
    [
        ((), "explained/a.overlay.jpeg"),
        (("--format", "png", "--out", "o"), "o/a.overlay.png"),
        (("--sheet", "s.png"), "s.png"),
        (("--sheet", "s.png", "--report", "r.html"), "r.html"),
    ],
)
def test_open_shows_the_best_that_was_written(
    flags: tuple[str, ...], place: str, opened: Path
) -> None:
    """Through BROWSER, as Python and Debian read it."""
    photos("a.png")
    explain("a.png", "--open", *flags)
    assert Path(place).is_file()
    assert opened.read_text().split() == [Path(place).absolute().as_uri()]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["foto.png"], "there is no file foto.png. Did you mean 'photo.png'"),
        (["*.jpg"], "no image matches *.jpg"),
        (["photo.png", "--methd", "rise"], "--method"),
        (["photo.png", "--method", "gradcm"], "Did you mean 'gradcam'"),
        (["photo.png", "--layer", "featurs"], "Did you mean 'features"),
        (["photo.png", "--target", "clas 3"], "class 3"),
        (["photo.png", "--colormap", "turb"], "Did you mean 'turbo'"),
        (["photo.png", "--opacity", "2"], "opacity: input should be less than or equal to 1"),
        (["photo.png", "--mask", "{"], "`mask` is not JSON"),
        (["photo.png", "--sheet", "s.gif"], "--sheet s.gif: the name must end in .jpg"),
        (["photo.png", "--report", "no/r.html"], "--report no/r.html: there is no folder no"),
        (["photo.png", "--json", "--open"], "--open with --json needs --out"),
        ([], "Missing argument 'IMAGE…'"),
    ],
)
def test_a_slip_is_answered_with_what_was_probably_meant(
    arguments: list[str], sentence: str
) -> None:
    """Exit code 2, and nothing is written."""
    photos("photo.png")
    result = explain(*arguments, code=2)
    assert sentence in words(re.sub(r"[│╭╮╰╯─]", " ", result.output))
    assert [each.name for each in Path.cwd().iterdir()] == ["photo.png"]


def test_a_mistyped_command_or_model_is_answered_with_the_nearest() -> None:
    for arguments, meant in (
        (["explian", "a.png"], "explain"),
        (["layers", "torchvision/resnet5"], "'torchvision/resnet50'"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert meant in words(result.output)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_runs_on_a_terminal_only(terminal: bool) -> None:
    photos("a.png", "b.png")
    command = [sys.executable, "-m", "service", "explain", "a.png", "b.png", *TINY]
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))
    environment = os.environ | {"PYTHONPATH": path, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    if not terminal:
        piped = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert piped.stderr.split() == ["2", "explained,", "0", "failed", "→", "explained"]
        return
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=theirs
    ) as process:
        os.close(theirs)
        said = read_all(ours)
        assert process.wait() == 0
    os.close(ours)
    assert b"explaining" in said
    assert b"100%" in said


def read_all(terminal: int) -> bytes:
    """What is written to a terminal until its last writer is gone."""
    said = b""
    while select.select([terminal], [], [], 100)[0]:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux says so that the other end is closed
            return said
        if not part:
            return said
        said += part
    pytest.fail("the command does not end")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("camserve expl", {"explain"}),
        ("camserve explain --meth", {"--method"}),
        ("camserve explain --method grad", {"gradcam", "gradcampp"}),
        ("camserve explain --fit ", {"crop", "squash", "pad"}),
    ],
)
def test_a_shell_completes_commands_flags_and_values(typed: str, offered: set[str]) -> None:
    """As bash asks; nothing heavy is imported for it."""
    environment = {
        "_CAMSERVE_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split(" ")) - 1),
    }
    result = CliRunner().invoke(app, [], env=environment, prog_name="camserve")
    assert set(result.stdout.split()) == offered


def test_help_and_completion_do_not_wait_for_torch() -> None:
    code = "import service.cli, sys; print(sorted({'torch', 'cv2', 'fastapi'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"
