"""Explain shards: rows in the order of their images, with overlays and heatmaps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
from rich.console import Console

from api_schemas.options import ExplainOptions
from service.cam.verdict import Verdict
from service.cli.bulk.inputs import Input
from service.cli.bulk.result_folder import Row, ShardWriter
from service.cli.explain_files import Explained, Outcome, explain_images, into_folder
from service.durable import write_synced
from service.errors import ConfigurationError
from service.models.loaded import LoadedModel
from service.pipeline.service import Service


@dataclass(frozen=True, slots=True)
class Shard:
    """Images whose rows are written together."""

    name: str
    inputs: tuple[Input, ...]


def split_into_shards(inputs: Sequence[Input], size: int, first: int) -> list[Shard]:
    """Return shards of `size` images, the last one smaller, numbered from `first`."""
    return [
        Shard(f"part-{first + start // size:05}", tuple(inputs[start : start + size]))
        for start in range(0, len(inputs), size)
    ]


@dataclass(frozen=True, slots=True)
class ShardExplainer:
    """Explains shards in a service whose scheduler runs.

    write_images: whether overlays and heatmaps are written.
    """

    service: Service
    options: ExplainOptions
    writer: ShardWriter
    write_images: bool

    def explain(
        self, shards: Sequence[Shard], console: Console, stopped: Callable[[], object]
    ) -> Iterator[list[Row]]:
        """Yield the rows of each finished shard.

        Once `stopped`, the rows so far become a shorter shard, and no further one is started.
        Raises ConfigurationError if the results cannot be written or another run owns the folder.
        """
        named = {
            Path(shard.name, f"{index:06}"): image
            for shard in shards
            for index, image in enumerate(shard.inputs)
        }
        limits = self.service.limits
        sinks = (
            [into_folder(self.writer.drafts, limits.render_side, write_synced, json=False)]
            if self.write_images
            else []
        )
        cut_short: tuple[Shard, list[Row]] | None = None
        with explain_images(
            self.service,
            [(name, name) for name in named],
            self.options,
            sinks,
            console,
            lambda name: named[name].read(limits.body_bytes),
        ) as outcomes:
            for shard in shards:
                rows = []
                for image, outcome in zip(shard.inputs, outcomes, strict=False):
                    rows.append(self._row(image, outcome, self.writer.images_folder(shard.name)))
                    if stopped():
                        break
                if len(rows) < len(shard.inputs):
                    cut_short = shard, rows
                    break
                yield self.writer.finish(shard.name, rows)
        if cut_short is not None:  # after the `with`: no thread draws any more
            shard, rows = cut_short
            yield self.writer.finish(shard.name, rows)

    def _row(self, image: Input, outcome: Outcome, folder: str) -> Row:
        model = self.service.pool.model(None)
        row: Row = {"path": image.name, "model": model.name, "version": model.version}
        if isinstance(outcome, Explained):
            return row | self._answer(model, outcome, folder)
        if outcome.code == "unwritable_file":
            raise ConfigurationError(f"the images cannot be written: {outcome.detail}.")
        return row | {"error_code": outcome.code, "error_detail": outcome.detail}

    def _answer(self, model: LoadedModel, outcome: Explained, folder: str) -> Row:
        best = outcome.answer.predictions[0]
        tags = [
            f"{folder}/{outcome.name.name}" + (f".{explanation.class_id}" if index else "")
            for index, explanation in enumerate(outcome.answer.explanations)
        ]
        return {
            "class_id": best.class_id,
            "label": model.labels[best.class_id],
            "score": best.score,
            "margin": outcome.answer.margin,
            "entropy": outcome.answer.entropy,
            "overlays": [
                f"{tag}.overlay.{self.options.format}" for tag in tags * self.write_images
            ],
            "heatmaps": [f"{tag}.heatmap.png" for tag in tags * self.write_images],
            **_verdict(outcome.answer.explanations[0].verdict),
            "answer": orjson.dumps(outcome.result.model_dump(exclude_unset=True)).decode(),
        }


def _verdict(found: Verdict | None) -> Row:
    """Return the columns of a verdict; none without one."""
    if found is None:
        return {}
    return {
        "verdict": found.verdict,
        "agreement": found.agreement,
        "p_place": found.p_place,
        "p_centred": found.p_centred,
    }
