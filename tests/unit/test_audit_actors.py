"""Actors of `camserve audit --ray`: their files are those of a run here; refusals come back."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import audited
import pytest
from typer.testing import CliRunner

pytest.importorskip("ray", reason="an extra")

from service.cli.audit import audit_on_ray
from service.cli.bulk.job import RayResources
from service.cli.main import app

pytestmark = pytest.mark.timeout(120)


class Played:
    """What Ray does, in this process: one actor for each phase."""

    def __init__(self) -> None:
        self.tasks: list[dict[str, Any]] = []
        self.clusters: list[RayResources] = []

    @contextmanager
    def connected(self, cluster: RayResources) -> Iterator[None]:
        self.clusters.append(cluster)
        yield

    def mapped(
        self,
        actor: Callable[..., Any],
        arguments: Sequence[Any],
        tasks: list[dict[str, Any]],
        _cluster: RayResources,
    ) -> Any:
        self.tasks += tasks
        made = actor(*arguments)
        self._answers = [made(task) for task in tasks]
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        return iter(self._answers)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    found = Played()
    monkeypatch.setattr(audit_on_ray, "connected", found.connected)
    monkeypatch.setattr(audit_on_ray, "mapped", found.mapped)
    return found


def run(folder: Path, out: str, *more: str) -> Any:
    config = audited.configured(folder)
    flags = ("--config", str(config), "--out", str(folder / out), "--allow-random-weights")
    return CliRunner().invoke(app, ["audit", str(folder / "images"), *flags, "--no-compile", *more])


def test_actors_write_the_results_of_a_run_here(tmp_path: Path, played: Played) -> None:
    audited.write_images(tmp_path / "images", 25)
    assert run(tmp_path, "here").exit_code == 0
    done = run(tmp_path, "there", "--ray", "head:6379", "--ray-actors", "3", "--ray-cpus", "2")
    assert done.exit_code == 0, done.output
    assert played.clusters == [RayResources("head:6379", 3, 2, 0)]
    assert [(task["kind"], task["number"]) for task in played.tasks] == [
        ("scan", 0),
        *(("class", number) for number in range(4)),
    ]
    here, there = (
        json.loads((tmp_path / out / "audit.json").read_text()) for out in ("here", "there")
    )
    assert here == there


@pytest.mark.parametrize("content", [b"", b"PK\3\4 and no more"])
def test_a_broken_file_of_the_scan_ends_the_run(
    tmp_path: Path, played: Played, content: bytes
) -> None:
    audited.write_images(tmp_path / "images", 25)
    assert run(tmp_path, "out").exit_code == 0
    (tmp_path / "out" / "class-00000.json").unlink()
    (tmp_path / "out" / "scan-00000.npz").write_bytes(content)
    done = run(tmp_path, "out", "--ray", "head:6379")
    assert done.exit_code == 2
    assert "its images are then scanned again" in " ".join(done.output.split())
    assert played.tasks == []


def test_what_ends_a_task_comes_back_from_its_actor(
    tmp_path: Path, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    audited.write_images(tmp_path / "images", 25)
    mapped = played.mapped

    def in_the_way(*arguments: Any) -> Any:
        if arguments[2][0]["kind"] == "class":
            (tmp_path / "out" / "class-00001.json").mkdir()
        return mapped(*arguments)

    monkeypatch.setattr(audit_on_ray, "mapped", in_the_way)
    done = run(tmp_path, "out", "--ray", "head:6379")
    assert done.exit_code == 2
    assert "class-00001.json" in done.output.replace("\n", "")


def test_an_actor_with_another_model_ends_the_run(
    tmp_path: Path, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    audited.write_images(tmp_path / "images", 25)
    mapped = played.mapped

    def with_other_weights(*arguments: Any) -> Any:
        monkeypatch.setattr(audited, "corner", audited.direct)
        return mapped(*arguments)

    monkeypatch.setattr(audit_on_ray, "mapped", with_other_weights)
    done = run(tmp_path, "out", "--ray", "head:6379")
    assert done.exit_code == 2
    assert "holds the results of another job" in " ".join(done.output.split())


def test_without_ray_the_flag_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audited.write_images(tmp_path / "images", 1)
    monkeypatch.delitem(sys.modules, "service.cli.audit.audit_on_ray", raising=False)
    monkeypatch.delitem(sys.modules, "service.cli.bulk.on_ray", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    done = run(tmp_path, "out", "--ray", "auto")
    assert done.exit_code == 2
    assert "--ray needs ray, which is not installed" in " ".join(done.output.split())
