"""Explain the shards by the actors of a Ray cluster.

Every node has this package and reaches SRC and DST by the same paths. A shard is one task: if its
node dies, Ray repeats it on another, and only a complete shard of the first one counts.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import ray
import ray.data
from rich.console import Console
from rich.progress import Progress

from service.cli.bulk.job import BulkJob, RayResources, Stopped
from service.cli.bulk.result_folder import ResultFolder, Row
from service.cli.bulk.shards import Shard
from service.cli.flags import ERR
from service.errors import ConfigurationError


@contextmanager
def explain_on_ray(
    job: BulkJob,
    shards: list[Shard],
    results: ResultFolder,
    cluster: RayResources,
    stopped: Stopped,
) -> Iterator[Iterator[list[Row]]]:
    """Yield `path` and `error_code` of the rows of each finished shard.

    Once `stopped`, it ends with the next finished shard; unfinished ones are lost. Raises
    ConfigurationError for what an actor refuses.
    """
    with connected(cluster), Progress(console=ERR, disable=not ERR.is_terminal) as bars:
        tasks = [{"shard": pickle.dumps(shard)} for shard in shards]
        finished = mapped(_Explainer, (_of_one_actor(job, cluster), results), tasks, cluster)
        bar = bars.add_task("explaining", total=sum(len(shard.inputs) for shard in shards))
        yield _rows_of(finished, lambda count: bars.advance(bar, count), stopped)


@contextmanager
def connected(cluster: RayResources) -> Iterator[None]:
    """Use a cluster until the `with` ends."""
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.verbose_progress = False
        yield
    finally:
        ray.shutdown()


def mapped(
    actor: type, arguments: tuple[Any, ...], tasks: list[dict[str, Any]], cluster: RayResources
) -> Any:
    """The data set of what actors answer for tasks, one block for each.

    actor: made of the arguments on a node; its call takes a task and returns an answer.
    """
    return ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
        actor,
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=cluster.actors),
        num_cpus=cluster.cpus,
        num_gpus=cluster.gpus or None,
    )


def answers(finished: Any) -> Iterator[dict[str, Any]]:
    """Each answer of actors as it comes. Raises ConfigurationError for one with `refused`."""
    for answer in finished.iter_rows():
        if answer["refused"]:
            raise ConfigurationError(answer["refused"])
        yield answer


def _rows_of(finished: Any, advance: Any, stopped: Stopped) -> Iterator[list[Row]]:
    for task in answers(finished):
        rows: list[Row] = pickle.loads(task["rows"])  # noqa: S301 - written by our own actor
        advance(len({row["path"] for row in rows}))  # a detector has several rows an image
        yield rows
        if stopped():
            return


def _of_one_actor(job: BulkJob, cluster: RayResources) -> BulkJob:
    """Return the job with as many workers as an actor has cores."""
    workers = job.settings.workers or max(1, int(cluster.cpus))
    return replace(job, settings=job.settings.model_copy(update={"workers": workers}))


class _Explainer:
    """An actor: loads the model once, and explains shards until Ray ends it.

    It returns an error instead of raising it: Ray would replace an actor that raises, and report
    only that an actor died.
    """

    def __init__(self, job: BulkJob, results: ResultFolder) -> None:
        self._stack = ExitStack()  # an attribute, so that it lives as long as the actor
        self._refused = ""
        try:
            self._explainer = self._stack.enter_context(job.explainer(results))
        except (ConfigurationError, OSError) as error:
            self._refused = str(error)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        shard: Shard = pickle.loads(task["shard"])  # noqa: S301 - written by `explain_on_ray`
        silent = Console(quiet=True)
        rows: list[Row] = []
        try:
            if not self._refused:
                (rows,) = self._explainer.explain([shard], silent, lambda: False)
        except (ConfigurationError, OSError) as error:
            self._refused = str(error)
        short = [{"path": row["path"], "error_code": row.get("error_code")} for row in rows]
        return {"rows": pickle.dumps(short), "refused": self._refused}
