"""What an actor of `camserve bulk --ray` refuses comes back to whoever gave it the work."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pictures
import pyarrow.parquet as pq
import pytest

pytest.importorskip("ray", reason="an extra")

from api_schemas.options import ExplainOptions
from service.cli.bulk.inputs import list_inputs
from service.cli.bulk.job import BulkJob
from service.cli.bulk.on_ray import _Explainer, _rows_of
from service.cli.bulk.result_folder import ResultFolder, open_results
from service.cli.bulk.shards import Shard
from service.errors import ConfigurationError
from service.settings import Settings

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def results(tmp_path: Path) -> Iterator[ResultFolder]:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(pictures.jpeg(32, 24))
    with open_results(tmp_path / "out", {"source": "in"}) as opened:
        yield opened


def explain(results: ResultFolder, model: str, number: int) -> list[dict[str, Any]]:
    """The rows of a shard by an actor of this process, as the driver reads them."""
    settings = Settings(models=(model,), device="cpu", workers=1, compile=False)
    actor = _Explainer(BulkJob(settings, ExplainOptions(), write_images=True), results)
    inputs = list_inputs(str(results.folder.parent / "in"), "path")
    task = {"shard": pickle.dumps(Shard(f"part-{number:05}", tuple(inputs)))}
    finished = Finished([actor(task)])
    try:
        (rows,) = _rows_of(finished, lambda _count: None, lambda: 0)
        return rows
    finally:
        actor._stack.close()


class Finished:
    """What Ray gives back."""

    def __init__(self, tasks: list[dict[str, Any]]) -> None:
        self._tasks = tasks

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        return iter(self._tasks)


def test_an_actor_with_another_model_ends_the_job(results: ResultFolder) -> None:
    assert explain(results, "a=tiny:small", 0) == [{"path": "a.jpg", "error_code": None}]
    with pytest.raises(ConfigurationError, match="version was "):
        explain(results, "a=tiny:other", 1)
    assert len(results.done()) == 1


def test_an_actor_of_a_run_that_lost_its_folder_ends_the_job(results: ResultFolder) -> None:
    (results.folder / ".owner").write_text("another run")
    with pytest.raises(ConfigurationError, match="another run took over"):
        explain(results, "a=tiny:small", 0)
    assert not list(results.folder.glob("*.parquet"))


def test_a_shard_that_another_node_finished_is_there_once(results: ResultFolder) -> None:
    for _ in range(2):
        assert explain(results, "a=tiny:small", 0) == [{"path": "a.jpg", "error_code": None}]
    (row,) = pq.read_table(results.folder / "part-00000.parquet").to_pylist()
    assert all((results.folder / image).exists() for image in row["overlays"])
    assert len(list((results.folder / "pictures").iterdir())) == 1
