"""Scan and audit by the actors of a Ray cluster.

Every node has this package and reaches FOLDER and OUT by the same paths. Actors write the files
that a run without Ray writes, and everything else is read from these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from service.cli.audit.auditor import AuditWork, Kind
from service.cli.bulk.job import RayResources
from service.cli.bulk.on_ray import answers, connected, mapped
from service.cli.bulk.result_folder import ResultFolder
from service.errors import CamserveError


@contextmanager
def actors(
    work: AuditWork, results: ResultFolder, cluster: RayResources
) -> Iterator[Callable[[Kind, Sequence[int]], Iterator[int]]]:
    """Yields what does the tasks of numbers on the cluster, and says of each when it is done.

    It raises ConfigurationError for what an actor refuses.
    """

    def do(kind: Kind, numbers: Sequence[int]) -> Iterator[int]:
        tasks = [{"kind": kind, "number": number} for number in numbers]
        for answer in answers(mapped(TaskActor, (work, results), tasks, cluster)):
            yield int(answer["number"])

    with connected(cluster):
        yield do


class TaskActor:
    """Loads the model once, and does tasks until Ray ends it.

    It returns an error instead of raising it, as the actors of `camserve bulk` do.
    """

    def __init__(self, work: AuditWork, results: ResultFolder) -> None:
        self._refused = ""
        try:
            self._auditor = work.auditor(results)
        except (CamserveError, OSError) as error:
            self._refused = str(error)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """Do a task; returns its `number`, and in `refused` why it was not done."""
        try:
            if not self._refused:
                self._auditor.run(task["kind"], int(task["number"]))
        except (CamserveError, OSError) as error:
            self._refused = str(error)
        return {"number": task["number"], "refused": self._refused}
