"""`camserve bulk`: exactly one row for each image, whatever the images are and whoever ends it."""

from __future__ import annotations

import json
import os
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
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from service.bulk.results import open_results
from service.cli import app

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent

pytestmark = pytest.mark.timeout(120)

TINY = ("--model", "tiny:small", "--workers", "1", "--device", "cpu")


def bulk(source: Path | str, folder: Path, *more: str) -> Any:
    """The command, in this process."""
    return CliRunner().invoke(app, ["bulk", str(source), str(folder), *TINY, *more])


@contextmanager
def bulk_process(source: Path, folder: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process, to send signals to."""
    command = [sys.executable, "-m", "service", "bulk", str(source), str(folder), *TINY, *more]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"}
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
    assert bulk(source, tmp_path / "out", "--no-pictures", *more).exit_code == 0
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
        (["--target", "3"], "another question: options differ"),
        (["--model", "tiny:other"], "another question: model differ"),
        (["--no-pictures"], "another question: pictures differ"),
    ],
)
def test_a_folder_is_for_one_question(tmp_path: Path, more: Sequence[str], words: str) -> None:
    source, out = photos(tmp_path / "in", 1), tmp_path / "out"
    assert bulk(source, out).exit_code == 0
    given = [*TINY, *more] if "--model" not in more else ["--workers", "1", *more]
    result = CliRunner().invoke(app, ["bulk", str(source), str(out), *given])
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_two_jobs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with open_results(tmp_path / "out", {}):
        result = bulk(photos(tmp_path / "in", 1), tmp_path / "out")
    assert result.exit_code == 2
    assert "another job writes" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere", "there is no"),
        ("empty", "no image is in"),
        ("table.parquet", "has no column 'path'; --column names one of"),
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
    more = ("--shard-size", "100", "--no-pictures")
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
