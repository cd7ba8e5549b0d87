"""Explain shards: rows in the order of their images, with overlays and heatmaps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
from rich.console import Console

from api_schemas.answers import Prediction
from api_schemas.options import ExplainOptions
from service.cam.verdict import Verdict
from service.cli.bulk.inputs import Input
from service.cli.bulk.result_folder import Row, ShardWriter
from service.cli.explain_files import Explained, Outcome, explain_images, into_folder
from service.durable import write_synced
from service.errors import ConfigurationError
from service.inference.questions import Explanation
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
                rows: list[Row] = []
                images = 0
                for image, outcome in zip(shard.inputs, outcomes, strict=False):
                    rows += self._rows(image, outcome, self.writer.images_folder(shard.name))
                    images += 1
                    if stopped():
                        break
                if images < len(shard.inputs):
                    cut_short = shard, rows
                    break
                yield self.writer.finish(shard.name, rows)
        if cut_short is not None:  # after the `with`: no thread draws any more
            shard, rows = cut_short
            yield self.writer.finish(shard.name, rows)

    def _rows(self, image: Input, outcome: Outcome, folder: str) -> list[Row]:
        """The rows of an image: one, or one for each detection or region."""
        model = self.service.pool.model(None)
        row: Row = {"path": image.name, "model": model.name, "version": model.version}
        if isinstance(outcome, Explained):
            answers = self._answers(model, outcome, folder)
            answers[0]["answer"] = orjson.dumps(
                outcome.result.model_dump(exclude_unset=True)
            ).decode()
            return [row | each for each in answers]
        if outcome.code == "unwritable_file":
            raise ConfigurationError(f"the images cannot be written: {outcome.detail}.")
        return [row | {"error_code": outcome.code, "error_detail": outcome.detail}]

    def _answers(self, model: LoadedModel, outcome: Explained, folder: str) -> list[Row]:
        """What is found, each with its explanations; a classifier's classes are one row."""
        drawn = self._drawn(outcome, folder)
        found = outcome.result.predictions or []
        if model.task == "classification":
            certainty = {"margin": outcome.answer.margin, "entropy": outcome.answer.entropy}
            return [_listed(found[0]) | certainty | _evidence(drawn)]
        rows = []
        for each in found:
            own = [
                (explanation, files)
                for explanation, files in drawn
                if (explanation.detection, explanation.class_id) == (each.detection, each.class_id)
            ]
            rows.append(_listed(each) | _evidence(own))
        return rows or [_evidence([])]

    def _drawn(self, outcome: Explained, folder: str) -> _Drawn:
        """Each explanation with the paths of its overlay and heatmap below DST, if written."""
        drawn: _Drawn = []
        for index, explanation in enumerate(outcome.answer.explanations):
            of = explanation.class_id if explanation.detection is None else explanation.detection
            tag = f"{folder}/{outcome.name.name}" + (f".{of}" if index else "")
            files = (f"{tag}.overlay.{self.options.format}", f"{tag}.heatmap.png")
            drawn.append((explanation, files if self.write_images else None))
        return drawn


_Drawn = list[tuple[Explanation, tuple[str, str] | None]]


def _listed(found: Prediction) -> Row:
    """The columns of one prediction."""
    place = {"detection": found.detection, "box": found.box, "area": found.area}
    named = {"class_id": found.class_id, "label": found.label, "score": found.score}
    return named | {name: value for name, value in place.items() if value is not None}


def _evidence(drawn: _Drawn) -> Row:
    """The columns of the files of explanations, and of the first one's verdict."""
    files = [each for _, each in drawn if each is not None]
    return {
        "overlays": [overlay for overlay, _ in files],
        "heatmaps": [heatmap for _, heatmap in files],
        **_verdict(drawn[0][0].verdict if drawn else None),
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
