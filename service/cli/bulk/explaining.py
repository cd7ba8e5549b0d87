"""Shards explained: their rows in order, their pictures beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
from rich.console import Console

from api_schemas.options import ExplainOptions
from service.cli.bulk.inputs import Input
from service.cli.bulk.results import Row, Work
from service.cli.explain_files import Explained, Outcome, explain_images, into_folder
from service.durable import write_synced
from service.errors import ConfigurationError
from service.models.loaded import LoadedModel
from service.pipeline.service import Service


@dataclass(frozen=True, slots=True)
class Shard:
    """Images whose rows become there together."""

    name: str
    inputs: tuple[Input, ...]


def cut(inputs: Sequence[Input], size: int, first: int) -> list[Shard]:
    """Shards of `size` images, the last one of the rest, numbered from `first`."""
    return [
        Shard(f"part-{first + place // size:05}", tuple(inputs[place : place + size]))
        for place in range(0, len(inputs), size)
    ]


@dataclass(frozen=True, slots=True)
class Explaining:
    """What is asked of every image, and where the rows go; the service's threads run.

    pictures: whether overlays and heatmaps are written.
    """

    service: Service
    options: ExplainOptions
    work: Work
    pictures: bool

    def explain(
        self, shards: Sequence[Shard], console: Console, stopped: Callable[[], object]
    ) -> Iterator[list[Row]]:
        """The rows of each shard, once it is there.

        Once `stopped`, the rows so far become a shorter shard, and no more are begun.
        Raises ConfigurationError where the results cannot be written or the folder belongs to
        another run by now.
        """
        named = {
            Path(shard.name, f"{place:06}"): each
            for shard in shards
            for place, each in enumerate(shard.inputs)
        }
        limits = self.service.limits
        keepers = (
            [into_folder(self.work.place, limits.render_side, write_synced, numbers=False)]
            if self.pictures
            else []
        )
        corrupt: tuple[Shard, list[Row]] | None = None
        with explain_images(
            self.service,
            [(name, name) for name in named],
            self.options,
            keepers,
            console,
            lambda name: named[name].read(limits.body_bytes),
        ) as outcomes:
            for shard in shards:
                rows = []
                for each, outcome in zip(shard.inputs, outcomes, strict=False):
                    rows.append(self._row(each, outcome, self.work.pictures(shard.name)))
                    if stopped():
                        break
                if len(rows) < len(shard.inputs):
                    corrupt = shard, rows
                    break
                yield self.work.finish(shard.name, rows)
        if corrupt is not None:  # now that no thread draws any more
            shard, rows = corrupt
            yield self.work.finish(shard.name, rows)

    def _row(self, image: Input, outcome: Outcome, folder: str) -> Row:
        model = self.service.pool.model(None)
        row: Row = {"path": image.name, "model": model.name, "version": model.version}
        if isinstance(outcome, Explained):
            return row | self._answer(model, outcome, folder)
        if outcome.code == "unwritable_file":
            raise ConfigurationError(f"the pictures cannot be written: {outcome.detail}.")
        return row | {"error_code": outcome.code, "error_detail": outcome.detail}

    def _answer(self, model: LoadedModel, outcome: Explained, folder: str) -> Row:
        best = outcome.answer.predictions[0]
        tags = [
            f"{folder}/{outcome.name.name}" + (f".{explanation.class_id}" if place else "")
            for place, explanation in enumerate(outcome.answer.explanations)
        ]
        return {
            "class_id": best.class_id,
            "label": model.labels[best.class_id],
            "score": best.score,
            "overlays": [f"{tag}.overlay.{self.options.format}" for tag in tags * self.pictures],
            "heatmaps": [f"{tag}.heatmap.png" for tag in tags * self.pictures],
            "answer": orjson.dumps(outcome.result.model_dump(exclude_unset=True)).decode(),
        }
