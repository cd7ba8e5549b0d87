"""A run of `camserve bulk`: settings, options and what it takes of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from api_schemas.options import ExplainOptions
from service.app import build_service, model_specs
from service.cli.bulk.identity import of_model, of_spec
from service.cli.bulk.inputs import absolute_source
from service.cli.bulk.result_folder import Identity, ResultFolder
from service.cli.bulk.shards import ShardExplainer
from service.errors import ConfigurationError, install_hint
from service.pipeline.resolve import samples_of
from service.settings import Settings

_ANSWER_SETTINGS = ("precision", "allow_random_weights", "max_render_side")
"""Settings that change answers. A second run may change others, such as a limit."""

Stopped = Callable[[], int]
"""Returns the number of the signal that stops the run, or 0."""


_SINCE_0_1_0 = frozenset(
    {"at", "contrast", "contrast_weight", "correction", "of", "uncertainty", "verify"}
)
"""Options that folders of 0.1.0 do not have, or have as null, whose runs resume: defaults are left
out."""


@dataclass(frozen=True, slots=True)
class BulkJob:
    """Settings and options for every image, and whether overlays and heatmaps are written."""

    settings: Settings
    options: ExplainOptions
    write_images: bool

    def identity(self, source: str, column: str) -> Identity:
        """Return what determines the results, without loading a model.

        Raises ConfigurationError for the models' settings, OSError for their files.
        """
        options = {
            name: value
            for name, value in self.options.model_dump(mode="json").items()
            if name not in _SINCE_0_1_0 or value != ExplainOptions.model_fields[name].get_default()
        }
        options["samples"] = samples_of(self.options, self.options.method)
        return {
            "source": absolute_source(source),
            "column": column if source.endswith(".parquet") else None,
            "model": of_spec(model_specs(self.settings)[0]),
            "settings": {name: getattr(self.settings, name) for name in _ANSWER_SETTINGS},
            "options": options,
            "pictures": self.write_images,  # the name that folders of 0.1.0 have
        }

    @contextmanager
    def explainer(self, results: ResultFolder) -> Iterator[ShardExplainer]:
        """Run a service in this process that writes to the results, until the `with` ends.

        Raises ConfigurationError if the model is not the one of the earlier shards.
        """
        service = build_service(self.settings, only=model_specs(self.settings)[0].name)
        model = service.pool.model(None)
        results.check_model(of_model(model))
        writer = results.writer()
        service.scheduler.start()
        try:
            yield ShardExplainer(service, self.options, writer, self.write_images)
        finally:
            service.scheduler.close()
            writer.close()


@dataclass(frozen=True, slots=True)
class RayResources:
    """What a run takes of a Ray cluster: at most `actors`, with cores and GPUs per actor."""

    address: str
    actors: int
    cpus: float
    gpus: float


def no_ray(error: ModuleNotFoundError) -> ConfigurationError:
    """The error of `--ray` where Ray is not installed."""
    return ConfigurationError(
        f"--ray needs {error.name}, which is not installed: {install_hint('ray')}."
    )
