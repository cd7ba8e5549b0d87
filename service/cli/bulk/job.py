"""What a run of `camserve bulk` asks of every image, and of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from api_schemas.options import ExplainOptions
from service.app import build_service, model_specs
from service.cli.bulk.explaining import Explaining
from service.cli.bulk.identity import of_model, of_spec
from service.cli.bulk.inputs import place_of
from service.cli.bulk.results import Identity, Results
from service.settings import Settings

_DECIDING = ("precision", "allow_random_weights", "max_render_side")
"""Settings that change answers. Those of speed do not, and a higher limit may be what a second run
is for: it changes errors alone."""

Stopped = Callable[[], int]
"""The number of the signal that asked to stop, or 0."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked of every image; pictures: whether overlays and heatmaps are written."""

    settings: Settings
    options: ExplainOptions
    pictures: bool

    def identity(self, source: str, column: str) -> Identity:
        """What decides about the results before a model is loaded.

        Raises ConfigurationError for the models' settings, OSError for their files.
        """
        return {
            "source": place_of(source),
            "column": column if source.endswith(".parquet") else None,
            "model": of_spec(model_specs(self.settings)[0]),
            "settings": {name: getattr(self.settings, name) for name in _DECIDING},
            "options": self.options.model_dump(mode="json"),
            "pictures": self.pictures,
        }

    @contextmanager
    def explaining(self, results: Results) -> Iterator[Explaining]:
        """A service of this process, its threads running, that writes to the results.

        Raises ConfigurationError where the model is another than the one that answered so far.
        """
        service = build_service(self.settings, only=model_specs(self.settings)[0].name)
        results.check_model(of_model(service.pool.model(None)))
        work = results.work()
        service.scheduler.start()
        try:
            yield Explaining(service, self.options, work, self.pictures)
        finally:
            service.scheduler.close()
            work.close()


@dataclass(frozen=True, slots=True)
class Share:
    """Of a Ray cluster: its address, how many actors at most, cores and GPUs of each."""

    address: str
    actors: int
    cpus: float
    gpus: float
