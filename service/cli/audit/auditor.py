"""The work of `camserve audit` on one model: chunks of images to scan, classes to audit.

Each is kept in a file of OUT as soon as it is done: scan-00000.npz, class-00000.json. A run that
resumes, and the actors of a Ray cluster, do what has no file yet; the results are read from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import orjson
import torch
from torch import Tensor

from service.app import model_loader, model_specs
from service.cli.audit import audit_page
from service.cli.audit.labelled_images import ImageFiles, Masks, class_ids, detail_of
from service.cli.bulk.identity import of_model
from service.cli.bulk.result_folder import ResultFolder
from service.durable import whole, write_whole
from service.errors import CamserveError, ConfigurationError
from service.evaluation.audit.class_audit import Casts, audit_class, cast_images
from service.evaluation.audit.passes import Passes
from service.evaluation.audit.sample import Scanned
from service.images.budget import DecodeBudget
from service.images.image_files import text_of
from service.models.loaded import LoadedModel
from service.settings import Settings

CHUNK = 256
"""Images between two files of the scan: the most that a kill loses."""

Kind = Literal["scan", "class"]
"""Of a task: its number is that of a chunk, or a class id."""


@dataclass(frozen=True, slots=True)
class AuditWork:
    """What is audited, and where the results go; the same in every process that takes part.

    given: the label of each image, None where there is none.
    """

    settings: Settings
    seed: int
    folder: Path
    paths: Sequence[Path]
    given: Sequence[str | None]
    masks: Masks | None
    out: Path

    @property
    def names(self) -> list[str]:
        """Of each image, below the folder."""
        return [text_of(path.relative_to(self.folder)) for path in self.paths]

    @property
    def chunks(self) -> range:
        """The numbers of the chunks."""
        return range(-(-len(self.paths) // CHUNK))

    def chunk(self, number: int) -> range:
        """The indices of the images of a chunk."""
        return range(number * CHUNK, min((number + 1) * CHUNK, len(self.paths)))

    def file(self, kind: Kind, number: int) -> Path:
        """The file of a task, which is there once the task is done."""
        return self.out / f"{kind}-{number:05}{'.npz' if kind == 'scan' else '.json'}"

    def auditor(self, results: ResultFolder) -> Auditor:
        """Load the model. Raises ConfigurationError if it is not that of the results."""
        model = model_loader(self.settings)(model_specs(self.settings)[0])
        results.check_model(of_model(model))
        return Auditor(self, model)


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """The images that could be read, and the error (code, detail) of each that could not."""

    scanned: Scanned
    given: Sequence[str | None]
    failed: dict[str, tuple[str, str]]


class Auditor:
    """Does the tasks of an audit with a model in this process.

    Raises InvalidOption for a model that is no classifier.
    """

    def __init__(self, work: AuditWork, model: LoadedModel) -> None:
        model.check_classifies("camserve audit")
        self.model = model
        self._work = work
        self._passes = Passes.of(model)
        budget = DecodeBudget(work.settings.max_decode_bytes)
        self._files = ImageFiles(model, work.paths, work.settings.max_pixels, budget)

    def run(self, kind: Kind, number: int) -> int:
        """Do one task, and return its number. Classes need all chunks."""
        if kind == "scan":
            self._scan(number)
        else:
            self._audit(number)
        return number

    def _scan(self, number: int) -> None:
        """Predict the images of a chunk."""
        problems: dict[str, tuple[str, str]] = {}

        def readable() -> Iterator[Tensor]:
            for index in self._work.chunk(number):
                try:
                    yield self._files.opened(index)[0]
                except CamserveError as error:
                    problems[str(index)] = error.code, error.detail
                except OSError as error:
                    problems[str(index)] = "unreadable_file", detail_of(error)

        logits = self._passes.logits(readable())
        with whole(self._work.file("scan", number)) as draft, draft.open("wb") as opened:
            text = np.frombuffer(orjson.dumps(problems), dtype=np.uint8)
            np.savez(opened, logits=logits.numpy(), problems=text)

    @cached_property
    def images(self) -> Images:
        """All images, from the files of the scan. Raises ConfigurationError."""
        work, names = self._work, self._work.names
        kept, failed, found = list[int](), dict[str, tuple[str, str]](), list[Tensor]()
        for number in work.chunks:
            logits, problems = _stored(work.file("scan", number))
            kept += [index for index in work.chunk(number) if str(index) not in problems]
            failed |= {names[int(index)]: (code, text) for index, (code, text) in problems.items()}
            found.append(logits)
        if not kept:
            first = next(iter(failed.items()))
            raise ConfigurationError(f"no image could be read; {first[0]}: {first[1][1]}")
        given = [work.given[index] for index in kept]
        scanned = Scanned(
            self._files.some(kept),
            torch.cat(found),
            class_ids(self.model, given),
            self._objects(kept),
            [names[index] for index in kept],
        )
        return Images(scanned, given, failed)

    def _objects(self, kept: Sequence[int]) -> list[Tensor | None]:
        masks, files = self._work.masks, self._files
        if masks is None:
            return [None] * len(kept)
        return [
            masks.mask(self._work.folder, files.paths[index], files.opened(index)[1])
            for index in kept
        ]

    @cached_property
    def _casts(self) -> Casts:
        return cast_images(self._passes, self.images.scanned, self._work.seed)

    def _audit(self, class_id: int) -> None:
        """Audit a class: its JSON, and its part of the page."""
        casts = self._casts
        one = audit_class(self._passes, self.images.scanned, casts, class_id, self._work.seed)
        state: dict[str, Any] = {
            "class": one.as_json(),
            "card": audit_page.card(one),
            "nothing": [self.model.labels[casts.nothing[0]], casts.nothing[1]],
        }
        write_whole(self._work.file("class", class_id), orjson.dumps(state))


def _stored(file: Path) -> tuple[Tensor, dict[str, tuple[str, str]]]:
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as found:
            return torch.from_numpy(found["logits"]), orjson.loads(found["problems"].tobytes())
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        raise ConfigurationError(
            f"{file} cannot be read ({error}). Remove it; its images are then scanned again."
        ) from error
