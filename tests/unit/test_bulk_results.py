"""The folder of results: one job, one owner, and no row without its images."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from disks import playing

from service.cli.bulk.result_folder import ResultFolder, ShardWriter, open_results
from service.durable import write_synced
from service.errors import ConfigurationError

JOB = {"source": "/images", "model": {"builder": "tiny:small", "weights": None}}


def drawn(work: ShardWriter, shard: str, count: int = 2) -> list[dict[str, Any]]:
    """Rows of a shard whose images are in the writer's place."""
    folder = work.drafts / shard
    folder.mkdir(parents=True)
    rows = []
    for place in range(count):
        write_synced(folder / f"{place:06}.overlay.jpeg", work.writer.encode())
        image = f"{work.images_folder(shard)}/{place:06}.overlay.jpeg"
        rows.append({"path": f"{place}.jpg", "overlays": [image], "heatmaps": []})
    return rows


def rows_of(folder: Path) -> list[dict[str, Any]]:
    parts = sorted(folder.glob("part-*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def images_of(folder: Path) -> tuple[set[str], set[str]]:
    """Those that rows refer to, and those that are there."""
    referred = {image for row in rows_of(folder) for image in row["overlays"]}
    there = {str(each.relative_to(folder)) for each in (folder / "pictures").rglob("*.jpeg")}
    return referred, there


def no_links(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_names: Any, **_options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("others", [0, 1, 2])
def test_of_two_writers_of_a_shard_one_has_its_rows_and_its_images(
    tmp_path: Path, monkeypatch, others: int, links: bool
) -> None:
    """Ray gives a shard to another node where it takes the first one for dead."""
    if not links:
        no_links(monkeypatch, errno.EPERM)
    with open_results(tmp_path / "out", JOB) as results:
        writers = [results.writer() for _ in range(2)]
        first, second = writers
        rows = [drawn(first, "part-00000", 2), drawn(second, "part-00000", others)]
        for work, written in zip(writers, rows, strict=True):
            there = work.finish("part-00000", written)
            assert [row["path"] for row in there] == ["0.jpg", "1.jpg"], "what is there"
        for work in writers:
            work.close()
        referred, there = images_of(tmp_path / "out")
        assert len(referred) == 2
        assert referred == there


def test_a_writer_between_anothers_steps_does_no_harm(tmp_path: Path, monkeypatch) -> None:
    """Where locks do not reach the other node: the second finishes while the first renames."""
    steps = itertools.count()

    def run(second_comes_at: int, folder: Path) -> bool:
        with open_results(folder, JOB) as results:
            first, second = results.writer(), results.writer()
            ours, theirs = drawn(first, "part-00000"), drawn(second, "part-00000")
            state = {"step": 0, "busy": False}

            def stepping(function: Callable[..., Any]) -> Callable[..., Any]:
                def step(*arguments: Any, **options: Any) -> Any:
                    if not state["busy"]:
                        state["step"] += 1
                        if state["step"] == second_comes_at:
                            state["busy"] = True
                            second.finish("part-00000", theirs)
                            state["busy"] = False
                    return function(*arguments, **options)

                return step

            with monkeypatch.context() as patch:
                patch.setattr("fcntl.flock", lambda *_: None)
                for name in ("link", "rename", "fsync", "unlink"):
                    patch.setattr(os, name, stepping(getattr(os, name)))
                first.finish("part-00000", ours)
            first.close()
            second.close()
        referred, there = images_of(folder)
        assert len(rows_of(folder)) == len(referred) == 2
        assert referred == there
        return state["step"] >= second_comes_at

    reached = itertools.takewhile(
        bool, (run(at, tmp_path / f"out{next(steps)}") for at in itertools.count(1))
    )
    assert sum(1 for _ in reached) >= 5


def test_a_run_that_lost_its_folder_adds_nothing(tmp_path: Path) -> None:
    """Actors of a killed run may live on while the next one numbers its shards."""
    with open_results(tmp_path / "out", JOB) as before:
        lost = before.writer()
        rows = drawn(lost, "part-00000")
    with open_results(tmp_path / "out", JOB) as results:
        rows = drawn(lost, "part-00000")  # it goes on drawing
        with pytest.raises(ConfigurationError, match="another run took over"):
            lost.finish("part-00000", rows)
        assert results.done() == {}
        work = results.writer()
        work.finish("part-00000", drawn(work, "part-00000", 1))
    assert [row["path"] for row in rows_of(tmp_path / "out")] == ["0.jpg"]


def test_a_row_whose_image_was_removed_is_not_written(tmp_path: Path) -> None:
    with open_results(tmp_path / "out", JOB) as results:
        work = results.writer()
        rows = drawn(work, "part-00000")
        (work.drafts / "part-00000" / "000001.overlay.jpeg").unlink()
        with pytest.raises(FileNotFoundError):
            work.finish("part-00000", rows)
        assert results.done() == {}


def test_a_row_is_on_the_disk_only_after_its_images_and_their_folders(
    tmp_path: Path, monkeypatch
) -> None:
    """Whenever the power is cut: a shard that is left has all that its rows refer to."""
    out = tmp_path / "out"
    with playing(tmp_path, monkeypatch) as disk:
        checked: list[Path] = []

        def check(path: Path) -> None:
            if path.suffix == ".parquet":
                checked.append(path)
                referred, _ = images_of(out)
                assert referred
                assert all(disk.is_kept(out / image) for image in referred)
                assert path.stat().st_ino in disk.synced, "the rows themselves"
            if path.name == "job.json":
                assert path.stat().st_ino in disk.synced

        disk.when_named.append(check)
        with open_results(out, JOB) as results:
            results.check_model({"version": "a"})
            assert disk.is_kept(out / "model.json")
            for number in range(2):
                work, shard = results.writer(), f"part-{number:05}"
                work.finish(shard, drawn(work, shard))
                assert disk.is_kept(out / f"{shard}.parquet"), "before it is said to be done"
        assert disk.is_kept(out / "job.json")
        assert disk.is_kept(out / ".owner")
    assert [path.name for path in checked] == ["part-00000.parquet", "part-00001.parquet"]


def test_images_that_no_shard_refers_to_are_removed_and_others_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_results(out, JOB) as results:
        work = results.writer()
        work.finish("part-00000", drawn(work, "part-00000"))
        (out / "pictures" / "part-00000-of-a-killed-writer").mkdir()
    with open_results(out, JOB):
        referred, there = images_of(out)
        assert referred == there
        assert len(list((out / "pictures").iterdir())) == 1


def test_a_shard_of_an_earlier_version_keeps_its_images(tmp_path: Path) -> None:
    """It named the folder of images as the shard."""
    out = tmp_path / "out"
    with open_results(out, JOB) as results:
        work = results.writer()
        work.finish("part-00000", drawn(work, "part-00000"))
        table = pq.read_table(out / "part-00000.parquet").replace_schema_metadata(None)
        pq.write_table(table, out / "part-00000.parquet")
        next((out / "pictures").iterdir()).rename(out / "pictures" / "part-00000")
    with open_results(out, JOB):
        assert len(list((out / "pictures" / "part-00000").iterdir())) == 2


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (JOB | {"source": "/others"}, ["source was /images and is /others"]),
        (
            {"source": "/images", "model": {"builder": "tiny:other", "weights": "sha256:ab"}},
            ["model.builder was tiny:small and", "model.weights was not given and is sha256:ab"],
        ),
        (JOB | {"options": {"top_k": 3}}, ["options.top_k was not given and is 3"]),
    ],
)
def test_a_folder_of_another_job_is_refused_with_what_differs(
    tmp_path: Path, job: dict[str, Any], words: Sequence[str]
) -> None:
    with open_results(tmp_path / "out", JOB):
        pass
    with pytest.raises(ConfigurationError) as error, open_results(tmp_path / "out", job):
        pass
    for each in (*words, "Use another folder for this job, or repeat the earlier job"):
        assert each in error.value.detail


def test_what_an_older_version_did_not_record_differs_only_where_it_is_given(
    tmp_path: Path,
) -> None:
    with open_results(tmp_path / "out", JOB):
        pass
    with open_results(tmp_path / "out", JOB | {"fit": None}):
        pass
    with (
        pytest.raises(ConfigurationError, match="fit was not given and is pad"),
        open_results(tmp_path / "out", JOB | {"fit": "pad"}),
    ):
        pass


def test_results_without_their_job_are_refused(tmp_path: Path) -> None:
    with open_results(tmp_path / "out", JOB) as results:
        work = results.writer()
        work.finish("part-00000", drawn(work, "part-00000"))
    (tmp_path / "out" / "job.json").unlink()
    with (
        pytest.raises(ConfigurationError, match=r"results but no job\.json"),
        open_results(tmp_path / "out", JOB),
    ):
        pass


@pytest.mark.parametrize("links", [True, False])
def test_the_model_that_answers_first_is_the_one_of_the_folder(
    tmp_path: Path, monkeypatch, links: bool
) -> None:
    """Each actor of a cluster loads its own; a node may have other weights under the path."""
    if not links:
        no_links(monkeypatch, errno.ENOTSUP)
    with open_results(tmp_path / "out", JOB) as results:
        results.check_model({"version": "aaaa", "target_layer": "layer4"})
        results.check_model({"version": "aaaa", "target_layer": "layer4"})
        with pytest.raises(ConfigurationError, match="version was aaaa and is bbbb"):
            results.check_model({"version": "bbbb", "target_layer": "layer4"})
    assert not list((tmp_path / "out").glob(".*.json")), "no draft is left"


def test_a_link_that_fails_for_another_reason_is_an_error(tmp_path: Path, monkeypatch) -> None:
    with open_results(tmp_path / "out", JOB) as results:
        no_links(monkeypatch, errno.ENOSPC)
        with pytest.raises(OSError, match="No space"):
            results.check_model({"version": "a"})


def test_a_results_folder_is_picklable_for_other_processes(tmp_path: Path) -> None:
    import pickle  # noqa: PLC0415 - for this test alone

    with open_results(tmp_path / "out", JOB) as results:
        copy: ResultFolder = pickle.loads(pickle.dumps(results))  # noqa: S301 - made here
        work = copy.writer()
        work.finish("part-00000", drawn(work, "part-00000"))
    assert len(rows_of(tmp_path / "out")) == 2
