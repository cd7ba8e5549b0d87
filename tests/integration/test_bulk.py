"""`camserve bulk`: exactly one row for each image, whatever the images are and whoever ends it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pictures
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from disks import playing
from PIL import Image
from typer.testing import CliRunner

from service.cli.bulk.result_folder import open_results
from service.cli.main import app

SUPPORT = Path(__file__).parents[1] / "support"
ROOT = SUPPORT.parents[1]

pytestmark = pytest.mark.timeout(120)

TINY = ("--model", "tiny:small", "--workers", "1", "--device", "cpu")


def bulk(source: Path | str, folder: Path, *more: str) -> Any:
    """The command, in this process."""
    return CliRunner().invoke(app, ["bulk", str(source), str(folder), *TINY, *more])


@contextmanager
def bulk_process(source: Path, folder: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process, to send signals to."""
    command = [sys.executable, "-m", "service", "bulk", str(source), str(folder), *TINY, *more]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of the results, read as a user would."""
    return [row for part in parts(folder) for row in pq.read_table(part).to_pylist()]


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def photos(folder: Path, count: int) -> Path:
    """A folder of so many small pictures."""
    folder.mkdir(parents=True)
    kinds = [pictures.jpeg(32, 24, seed=seed) for seed in range(10)]
    for place in range(count):
        (folder / f"{place:05}.jpg").write_bytes(kinds[place % 10])
    return folder


def until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 250
    while not true():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < end
        threading.Event().wait(0.01)


def test_each_image_has_one_row_and_a_bad_one_has_its_error(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 5)
    (source / "deep").mkdir()
    (source / "deep" / "bad.png").write_bytes(pictures.png()[:200])
    (source / "deep" / "gone.jpg").symlink_to(source / "deep")
    (source / "notes.txt").write_text("no image")
    result = bulk(source, tmp_path / "out", "--shard-size", "2")
    assert result.exit_code == 1
    assert "5 explained, 1 failed, 0 left" in " ".join(result.output.split())
    found = {row["path"]: row for row in rows(tmp_path / "out")}
    assert len(rows(tmp_path / "out")) == len(found) == 6
    assert len(parts(tmp_path / "out")) == 3
    bad = found.pop("deep/bad.png")
    assert (bad["error_code"], bad["label"], bad["answer"]) == ("corrupt_image", None, None)
    assert bad["error_detail"]
    for row in found.values():
        answer = json.loads(row["answer"])
        assert row["error_code"] is None
        assert answer["predictions"][0]["label"] == row["label"]
        assert answer["predictions"][0]["score"] == pytest.approx(row["score"])
        for name in (*row["overlays"], *row["heatmaps"]):
            with Image.open(tmp_path / "out" / name) as drawn:
                assert drawn.size == (32, 24)
    drawn = [path for path in (tmp_path / "out" / "pictures").rglob("*") if path.is_file()]
    assert len(drawn) == 2 * 5


def test_rows_are_what_explain_says_of_the_same_file(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 1)
    more = ["--explain-top", "2", "--regions", "--method", "layercam"]
    assert bulk(source, tmp_path / "out", "--no-images", *more).exit_code == 0
    command = ["explain", str(source / "00000.jpg"), "--out", str(tmp_path / "one"), *TINY, *more]
    assert CliRunner().invoke(app, command).exit_code == 0
    (row,) = rows(tmp_path / "out")
    assert json.loads(row["answer"]) == json.loads((tmp_path / "one" / "00000.json").read_text())
    assert row["overlays"] == row["heatmaps"] == []
    assert not (tmp_path / "out" / "pictures").exists()


@pytest.mark.parametrize("kind", ["text", "parquet", "file-url"])
def test_a_listing_names_paths_absolute_or_beside_it(tmp_path: Path, kind: str) -> None:
    source = photos(tmp_path / "in here", 3)
    names = ["in here/00000.jpg", str(source / "00001.jpg"), f"file://{source}/00002.jpg"]
    names += ["in here/00000.jpg", "in here/missing.jpg", "nowhere://bucket/x.jpg"]
    if kind == "text":
        given: Path | str = tmp_path / "list.txt"
        Path(given).write_text("\n".join([*names, ""]), encoding="utf-8")
    else:
        pq.write_table(pa.table({"image": names, "id": range(6)}), tmp_path / "list.parquet")
        given = tmp_path / "list.parquet"
        given = given if kind == "parquet" else f"file://{given}"
    assert bulk(given, tmp_path / "out", "--column", "image").exit_code == 1
    found = {row["path"]: row["error_code"] for row in rows(tmp_path / "out")}
    assert found == dict.fromkeys(names) | dict.fromkeys(names[4:], "unreadable_file")
    assert len(rows(tmp_path / "out")) == 5


def test_a_folder_is_listed_through_pyarrow_as_a_bucket_is(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 3)
    (source / "notes.txt").write_text("no image")
    assert bulk(f"file://{source}/", tmp_path / "out").exit_code == 0
    assert [row["path"] for row in rows(tmp_path / "out")] == [f"{n:05}.jpg" for n in range(3)]


def test_what_a_folder_holds_beside_images_is_said(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 1)
    for name in ("b.jfif", "c.jpe"):
        shutil.copy(source / "00000.jpg", source / name)
    (source / "._00000.jpg").write_bytes(b"of macOS")
    (source / "notes.txt").write_text("no image")
    result = bulk(source, tmp_path / "out")
    assert result.exit_code == 0
    assert [row["path"] for row in rows(tmp_path / "out")] == ["00000.jpg", "b.jfif", "c.jpe"]
    assert "skipped 1 file without an image suffix: " in result.output
    assert "notes.txt" in result.output


def test_a_file_over_the_limit_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMSERVE_MAX_BODY_BYTES", "100")
    assert bulk(photos(tmp_path / "in", 1), tmp_path / "out").exit_code == 1
    assert [row["error_code"] for row in rows(tmp_path / "out")] == ["body_too_large"]


def test_a_second_run_explains_what_is_new_and_leaves_the_rest(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "in", 3), tmp_path / "out"
    assert bulk(source, out, "--shard-size", "2").exit_code == 0
    before = {part: part.stat().st_mtime_ns for part in parts(out)}
    (source / "new.jpg").write_bytes(pictures.jpeg(seed=9))
    result = bulk(source, out)
    assert result.exit_code == 0, result.output
    assert "3 of 4 images are done" in result.output
    assert {part: part.stat().st_mtime_ns for part in parts(out)[:2]} == before
    assert sorted(row["path"] for row in rows(out)) == [
        *(f"{n:05}.jpg" for n in range(3)),
        "new.jpg",
    ]


def test_a_shard_that_is_removed_is_made_again(tmp_path: Path) -> None:
    """The way to try those again that failed for a passing reason."""
    source, out = photos(tmp_path / "in", 4), tmp_path / "out"
    assert bulk(source, out, "--shard-size", "2").exit_code == 0
    parts(out)[0].unlink()
    assert bulk(source, out, "--shard-size", "2").exit_code == 0
    assert sorted(row["path"] for row in rows(out)) == [f"{n:05}.jpg" for n in range(4)]
    referred = {name for row in rows(out) for name in (*row["overlays"], *row["heatmaps"])}
    there = {str(each.relative_to(out)) for each in (out / "pictures").rglob("*.*")}
    assert there == referred


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "in", 1), tmp_path / "out"
    for left in (".unfinished/abc/part-00000", "pictures/part-00000"):
        (out / left).mkdir(parents=True)
        (out / left / "000099.overlay.jpeg").write_bytes(b"half")
    assert bulk(source, out).exit_code == 0
    assert not list(out.rglob("000099*"))
    assert not (out / ".unfinished").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--target", "3"], 'options.targets was [] and is ["3"]'),
        (["--method", "layercam"], "options.method was gradcam and is layercam"),
        (["--layer", "features.0"], 'options.layer was [] and is ["features.0"]'),
        (["--model", "tiny:other"], "model.builder was tiny:small and is tiny:other"),
        (["--no-images"], "pictures was true and is false"),
        (["--verify", "true"], "options.verify was not given and is true"),
    ],
)
def test_a_folder_is_for_one_job(tmp_path: Path, more: Sequence[str], words: str) -> None:
    source, out = photos(tmp_path / "in", 1), tmp_path / "out"
    assert bulk(source, out).exit_code == 0
    given = [*TINY, *more] if "--model" not in more else ["--workers", "1", *more]
    result = CliRunner().invoke(app, ["bulk", str(source), str(out), *given])
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_rows_have_the_verdict_on_the_first_map_and_none_without_verify(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "in", 3), tmp_path / "out"
    (source / "bad.png").write_bytes(pictures.png()[:200])
    assert bulk(source, out, "--verify", "true", "--no-images").exit_code == 1
    columns = ("verdict", "agreement", "p_place", "p_centred")
    for row in rows(out):
        if row["error_code"] is not None:
            assert all(row[name] is None for name in columns)
            continue
        verify = json.loads(row["answer"])["explanations"][0]["verify"]
        assert row["verdict"] == verify["verdict"]
        for name in columns[1:]:
            assert row[name] == pytest.approx(verify[name], abs=1e-6)
    plain = tmp_path / "plain"
    bulk(source, plain, "--no-images")
    assert all(row[name] is None for row in rows(plain) for name in columns)
    assert [field.name for field in pq.read_schema(parts(plain)[0])] == [
        field.name for field in pq.read_schema(parts(out)[0])
    ]


def test_rows_have_margin_and_entropy_to_label_the_uncertain_first(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "in", 3), tmp_path / "out"
    (source / "bad.png").write_bytes(pictures.png()[:200])
    assert bulk(source, out, "--top-k", "7", "--no-images").exit_code == 1
    for row in rows(out):
        if row["error_code"] is not None:
            assert (row["margin"], row["entropy"]) == (None, None)
            continue
        scores = [each["score"] for each in json.loads(row["answer"])["predictions"]]
        assert sum(scores) == pytest.approx(1, abs=1e-5), "of all classes"
        assert row["margin"] == pytest.approx(scores[0] - scores[1], abs=1e-6)
        expected = -sum(score * math.log(score) for score in scores) / math.log(len(scores))
        assert row["entropy"] == pytest.approx(expected, abs=1e-5)


OPTIONS_OF_0_1_0 = {
    *("model", "top_k", "fit", "activations", "activation_as", "activation_kind", "targets"),
    *("explain_top", "method", "layer", "include", "threshold", "samples", "steps", "seed"),
    *("size", "colormap", "format", "opacity", "mask"),
}


def test_a_folder_that_was_begun_before_there_were_verdicts_is_resumed(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "in", 1), tmp_path / "out"
    assert bulk(source, out).exit_code == 0
    options = json.loads((out / "job.json").read_text())["options"]
    assert {name for name, value in options.items() if value is not None} <= OPTIONS_OF_0_1_0
    assert options["samples"] == 1000
    (part,) = parts(out)
    table = pq.read_table(part)
    older = table.drop_columns(["verdict", "agreement", "p_place", "p_centred", "margin"])
    pq.write_table(older.replace_schema_metadata(table.schema.metadata), part)
    (source / "new.jpg").write_bytes(pictures.jpeg(32, 24))
    assert bulk(source, out).exit_code == 0
    assert sorted(row["path"] for row in rows(out)) == ["00000.jpg", "new.jpg"]
    together = pyarrow.dataset.dataset(out, exclude_invalid_files=True).to_table()
    assert together["error_code"].null_count == 2


def test_a_folder_of_results_is_for_one_source(tmp_path: Path) -> None:
    """Another source with the same names would be done before it began."""
    out = tmp_path / "out"
    assert bulk(photos(tmp_path / "in", 2), out).exit_code == 0
    result = bulk(photos(tmp_path / "others", 2), out)
    assert result.exit_code == 2
    said = result.output.replace("\n", "")
    assert f"source was {tmp_path}/in and is {tmp_path}/others" in said
    assert "Nothing was explained. Use another folder for this job" in said


def test_a_column_is_a_source_of_its_own(tmp_path: Path) -> None:
    photos(tmp_path / "in", 2)
    table = pa.table({"one": ["in/00000.jpg"], "two": ["in/00001.jpg"]})
    pq.write_table(table, tmp_path / "list.parquet")
    assert bulk(tmp_path / "list.parquet", tmp_path / "out", "--column", "one").exit_code == 0
    result = bulk(tmp_path / "list.parquet", tmp_path / "out", "--column", "two")
    assert result.exit_code == 2
    assert "column was one and is two" in " ".join(result.output.split())


def test_the_same_source_may_be_written_in_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = photos(tmp_path / "in", 2), tmp_path / "out"
    assert bulk(source, out).exit_code == 0
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    for same in ("in", "in/", "./link", f"{source}/../in"):
        result = bulk(same, out)
        assert result.exit_code == 0, result.output
        assert "2 of 2 images are done" in result.output


def test_a_folder_of_results_is_for_the_content_of_one_weights_file(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "in", 1), tmp_path / "out"
    for name, seed in (("w.pt", 1), ("other.pt", 2)):
        torch.save(tiny.SmallNet(seed=seed).state_dict(), tmp_path / name)
    shutil.copy(tmp_path / "w.pt", tmp_path / "moved.pt")

    def run(weights: str) -> Any:
        command = ["bulk", str(source), str(out), *TINY, "--weights", str(tmp_path / weights)]
        return CliRunner().invoke(app, command)

    assert run("w.pt").exit_code == 0
    assert run("moved.pt").exit_code == 0, "the same weights, elsewhere"
    shutil.copy(tmp_path / "other.pt", tmp_path / "w.pt")
    result = run("w.pt")
    assert result.exit_code == 2
    assert "model.weights was sha256:" in result.output


def test_a_folder_of_results_is_for_the_labels_and_input_of_one_model(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "in", 1), tmp_path / "out"
    labels, config = tmp_path / "labels.txt", tmp_path / "models.toml"

    def run(more: str = "") -> Any:
        config.write_text(f'[[model]]\nname = "a"\nbuilder = "tiny:small"\n{more}')
        command = ["bulk", str(source), str(out), "--config", str(config), "--device", "cpu"]
        return CliRunner().invoke(app, command)

    names = [f"class {place}" for place in range(7)]
    labels.write_text("\n".join(names))
    said = 'labels = "labels.txt"\n'
    assert run(said).exit_code == 0
    labels.write_text("\n".join(reversed(names)))
    assert "model.labels was sha256:" in run(said).output
    labels.write_text("\n".join(names))
    assert (
        "model.input.mean was not given and is [0.5]"
        in run(f"{said}input = {{ mean = 0.5 }}").output
    )
    assert run(said).exit_code == 0


def test_a_model_whose_code_changed_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The description is the same; what it builds is not."""
    source, out = photos(tmp_path / "in", 1), tmp_path / "out"
    assert bulk(source, out).exit_code == 0
    monkeypatch.setattr("tiny.small", lambda: tiny.SmallNet(seed=99))
    (source / "new.jpg").write_bytes(pictures.jpeg(seed=9))
    result = bulk(source, out)
    assert result.exit_code == 2
    assert "version was " in result.output
    assert len(rows(out)) == 1


def test_a_limit_may_be_raised_for_the_images_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = photos(tmp_path / "in", 1), tmp_path / "out"
    monkeypatch.setenv("CAMSERVE_MAX_BODY_BYTES", "100")
    assert bulk(source, out).exit_code == 1
    monkeypatch.delenv("CAMSERVE_MAX_BODY_BYTES")
    parts(out)[0].unlink()
    assert bulk(source, out).exit_code == 0
    assert [row["error_code"] for row in rows(out)] == [None]


ODD_NAMES = (
    *(b"a\xff.jpg", b"a\\xff.jpg", b"a\\xFF.jpg", b"a\\x5cxff.jpg", b"a\\\xff.jpg"),
    *(b"a\\\\xff.jpg", b"a\xed\xb3\xbf.jpg", b"a\xc3\xbf.jpg", b"a\\.jpg", b"a\\xf.jpg"),
    *("a\u2028b.jpg".encode(), b"a\x0bb.jpg", b"a\nb.jpg", b" a .jpg"),
)
"""Of files: bytes that are not UTF-8, texts that look like an escape of one, separators."""


def test_each_name_is_one_row_and_can_be_read_back(tmp_path: Path) -> None:
    source = photos(tmp_path / "in", 0)
    for name in ODD_NAMES:
        Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_bytes(pictures.jpeg(32, 24))
    assert bulk(source, tmp_path / "out").exit_code == 0
    found = [row["path"] for row in rows(tmp_path / "out")]
    assert len(found) == len(ODD_NAMES)
    assert {as_documented(path) for path in found} == set(ODD_NAMES)
    for plain in ("a\u00ff.jpg", "a\\.jpg", "a\u2028b.jpg", " a .jpg"):
        assert plain in found, "what needs no escape is as it was"


def as_documented(path: str) -> bytes:
    """The bytes of a name, by the lines of the how-to."""
    page = (ROOT / "docs" / "how-to" / "explain-many-images.md").read_text()
    (code,) = re.findall(r"```python no-test\n(import re\n.*?)```", page, re.DOTALL)
    scope: dict[str, Any] = {"path": path}
    exec(code, scope)  # noqa: S102 - our own page
    found: bytes = scope["name"]
    return found


def test_a_source_whose_own_name_is_not_utf_8_is_read(tmp_path: Path) -> None:
    source = photos(Path(os.fsdecode(os.fsencode(tmp_path) + b"/in\xff")), 1)
    for _ in range(2):
        result = bulk(source, tmp_path / "out")
        assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "job.json").read_text())["source"].endswith("in\\xff")


@pytest.mark.parametrize("separator", ["\n", "\r\n"])
def test_only_a_line_feed_ends_a_line_of_a_listing(tmp_path: Path, separator: str) -> None:
    """`splitlines` knows ten more characters that do; names may hold them."""
    others = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    names = [f"a{mark}b.jpg" for mark in f"{others}\r\t "] + [" c.jpg", "d.jpg ", "\u2028e.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(pictures.jpeg(32, 24))
    text = separator.join(["", *names, "", "  ", ""])
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert bulk(tmp_path / "list.txt", tmp_path / "out").exit_code == 0
    assert sorted(row["path"] for row in rows(tmp_path / "out")) == sorted(names)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_listing_that_is_not_utf_8_is_refused_with_its_line(
    tmp_path: Path, encoding: str
) -> None:
    (tmp_path / "list.txt").write_bytes("a.jpg\nb.jpg\n\u00e9.jpg\n".encode(encoding))
    result = bulk(tmp_path / "list.txt", tmp_path / "out")
    assert result.exit_code == 2
    line = 3 if encoding == "latin-1" else 1
    assert f"line {line} of " in result.output
    assert "is not UTF-8" in " ".join(result.output.split())


def test_a_name_that_no_file_can_have_is_a_row_with_its_error(tmp_path: Path) -> None:
    photos(tmp_path / "in", 1)
    names = ["in/00000.jpg", "in/\0.jpg", "n" * 5000]
    pq.write_table(pa.table({"path": names}), tmp_path / "list.parquet")
    assert bulk(tmp_path / "list.parquet", tmp_path / "out").exit_code == 1
    found = {row["path"]: row["error_code"] for row in rows(tmp_path / "out")}
    assert found == dict(zip(names, [None, "unreadable_file", "unreadable_file"], strict=True))


def test_every_image_is_on_the_disk_before_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = photos(tmp_path / "in", 3), tmp_path / "out"
    shards = []
    with playing(tmp_path, monkeypatch) as disk:

        def check(path: Path) -> None:
            if path.suffix == ".parquet":
                shards.append(path)
                for row in pq.read_table(path).to_pylist():
                    images = [*row["overlays"], *row["heatmaps"]]
                    assert len(images) == 2
                    assert all(disk.is_kept(out / image) for image in images)

        disk.when_named.append(check)
        assert bulk(source, out, "--shard-size", "2").exit_code == 0
        assert len(shards) == 2
        assert all(disk.is_kept(shard) for shard in shards)


def test_two_jobs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with open_results(tmp_path / "out", {}):
        result = bulk(photos(tmp_path / "in", 1), tmp_path / "out")
    assert result.exit_code == 2
    assert "another run is writing" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere", "there is no"),
        ("empty", "there is no image in"),
        ("table.parquet", "has no column 'path'; give --column one of"),
        ("bytes.parquet", "holds binary, not paths"),
        ("broken.parquet", "cannot be read"),
        ("gopher://host/x", "cannot be read"),
    ],
)
def test_a_source_that_cannot_be_listed_is_said(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"image": ["a.jpg"]}), tmp_path / "table.parquet")
    pq.write_table(pa.table({"path": [b"\xff\xd8"]}), tmp_path / "bytes.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    result = bulk(source if "://" in source else tmp_path / source, tmp_path / "out")
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_what_is_done_and_leaves_nothing_half_written(
    tmp_path: Path, number: signal.Signals
) -> None:
    source, out = photos(tmp_path / "in", 400), tmp_path / "out"
    with bulk_process(source, out, "--shard-size", "20") as process:
        until(lambda: len(parts(out)) > 1, process)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert process.stderr is not None
        assert " left →" in process.stderr.read()
    there = rows(out)
    assert 40 <= len(there) < 400
    assert not (out / ".unfinished").exists()
    referred = {name for row in there for name in (*row["overlays"], *row["heatmaps"])}
    assert {str(each.relative_to(out)) for each in (out / "pictures").rglob("*.*")} == referred


@pytest.mark.timeout(600)
def test_two_thousand_images_killed_half_way_and_started_again_give_two_thousand_rows(
    tmp_path: Path,
) -> None:
    source, out = photos(tmp_path / "in", 2000), tmp_path / "out"
    more = ("--shard-size", "100", "--no-images")
    with bulk_process(source, out, *more) as process:
        until(lambda: len(parts(out)) >= 10, process)
        process.kill()
        assert process.wait(30) == -signal.SIGKILL
    assert 1000 <= len(rows(out)) < 2000
    with bulk_process(source, out, *more) as process:
        said = process.communicate(timeout=200)[1]
        assert process.returncode == 0, said
    there = [row["path"] for row in rows(out)]
    assert len(there) == len(set(there)) == 2000
