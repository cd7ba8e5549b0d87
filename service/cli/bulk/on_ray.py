"""The same shards, explained by the actors of a Ray cluster.

Every node has this package and reaches SRC and DST by the same paths. A shard is one task: where
its node dies, Ray gives it to another, and what the first one wrote counts only if it was whole.
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

from service.cli.bulk.explaining import Shard
from service.cli.bulk.job import Job, Share, Stopped
from service.cli.bulk.results import Results, Row
from service.cli.flags import ERR
from service.errors import ConfigurationError


@contextmanager
def explain_on_ray(
    job: Job, shards: list[Shard], results: Results, share: Share, stopped: Stopped
) -> Iterator[Iterator[list[Row]]]:
    """The `path` and `error_code` of each shard's rows, once it is there.

    Once `stopped`, it ends with the shard that is finished next; those under way are lost. Raises
    ConfigurationError for what an actor refuses.
    """
    ray.init(address=share.address, log_to_driver=False, configure_logging=False)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.verbose_progress = False
        tasks = ray.data.from_items(
            [{"shard": pickle.dumps(shard)} for shard in shards], override_num_blocks=len(shards)
        )
        finished = tasks.map(
            _Explainer,
            fn_constructor_args=(_of_one_actor(job, share), results),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=share.actors),
            num_cpus=share.cpus,
            num_gpus=share.gpus or None,
        )
        with Progress(console=ERR, disable=not ERR.is_terminal) as bars:
            bar = bars.add_task("explaining", total=sum(len(shard.inputs) for shard in shards))
            yield _each(finished, lambda count: bars.advance(bar, count), stopped)
    finally:
        ray.shutdown()


def _each(finished: Any, advance: Any, stopped: Stopped) -> Iterator[list[Row]]:
    for task in finished.iter_rows():
        if task["refused"]:
            raise ConfigurationError(task["refused"])
        rows: list[Row] = pickle.loads(task["rows"])  # noqa: S301 - written by our own actor
        advance(len(rows))
        yield rows
        if stopped():
            return


def _of_one_actor(job: Job, share: Share) -> Job:
    """An actor takes as many cores as it asked Ray for, whatever its node has."""
    workers = job.settings.workers or max(1, int(share.cpus))
    return replace(job, settings=job.settings.model_copy(update={"workers": workers}))


class _Explainer:
    """An actor: it loads the model once, and explains shard after shard until Ray ends it.

    What it refuses is a result like another: where an actor raises, Ray starts one more, and then
    says that an actor died.
    """

    def __init__(self, job: Job, results: Results) -> None:
        self._life = ExitStack()  # kept: it would end with the last name for it
        self._refused = ""
        try:
            self._explaining = self._life.enter_context(job.explaining(results))
        except (ConfigurationError, OSError) as error:
            self._refused = str(error)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        shard: Shard = pickle.loads(task["shard"])  # noqa: S301 - written by `explain_on_ray`
        nobody = Console(quiet=True)
        rows: list[Row] = []
        try:
            if not self._refused:
                (rows,) = self._explaining.explain([shard], nobody, lambda: False)
        except (ConfigurationError, OSError) as error:
            self._refused = str(error)
        short = [{"path": row["path"], "error_code": row.get("error_code")} for row in rows]
        return {"rows": pickle.dumps(short), "refused": self._refused}
