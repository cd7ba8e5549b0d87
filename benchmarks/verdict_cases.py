"""The models and images of `verdicts.py`: photographs, collages, and photographs with a tag."""

from __future__ import annotations

import copy
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import localisation_cases
import torch
from measuring import ROOT, photograph
from torch import Tensor, nn
from torch.nn import functional

from service.cam.verdict import WHOLE
from service.images.decode import Fit, Rect, decode, fit_to_model
from service.models.catalog import InputSpec, ModelSpec, parse_model
from service.models.compiled.lane import Compiler
from service.models.loading import load_model
from service.models.pool import Replica
from service.models.probes.condition import Condition

PLANTED = ROOT / "tools" / "planted_cues"
sys.path.append(str(PLANTED))
from cues import CLASSES, Placing, plant  # noqa: E402

PIXELS = 50_000_000
WIDE = {"mobilenet_v2": (192, 288), "builtin": (128, 192)}
"""Heights and widths of the model inputs that are not square; the networks take any size."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A model input, uint8 (3, h, w).

    seen:   the part of it, x, y, w, h as fractions, that shows the image.
    labels: the right classes; None: any.
    plain:  the same without its tag, and `mask`, bool (h, w), where the tag is.
    tiles:  the classes of a collage's quarters.
    """

    pixels: Tensor
    seen: Rect = WHOLE
    labels: frozenset[int] | None = None
    plain: Tensor | None = None
    mask: Tensor | None = None
    tiles: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Data:
    """Where images and weights lie.

    shared:  the folder with `weights/`, `flowers128.tar` and the photographs.
    planted: what `tools/planted_cues/train.py` wrote.
    samples: a folder of photographs whose names are their ImageNet classes, such as 0007.jpg.
    """

    shared: Path
    planted: Path
    samples: Path | None


@dataclass(frozen=True, slots=True)
class Subject:
    """A model with its images; `group` says which rows of the page they count in."""

    name: str
    group: str
    spec: Callable[[Data], ModelSpec]
    cases: Callable[[Data, Replica], Iterator[Case]]

    def is_there(self, data: Data) -> bool:
        weights = self.spec(data).weights
        return (weights is None or weights.exists()) and (
            self.cases is not _samples or data.samples is not None
        )


def loaded(spec: ModelSpec) -> Replica:
    """One replica of a model with its compiled lane."""
    model = load_model(spec, compiler=Compiler(largest=8))
    module = model.replicate()
    return Replica(model, module, Condition.of(module))


def _real(name: str, size: tuple[int, int] | None = None) -> Callable[[Data], ModelSpec]:
    def spec(data: Data) -> ModelSpec:
        file = data.shared / "weights" / f"{name}.fp16.safetensors"
        found = ModelSpec(name, f"torchvision/{name}", file)
        return replace(found, input=InputSpec(size=size, resize=size)) if size else found

    return spec


def _builtin(size: tuple[int, int] | None = None) -> Callable[[Data], ModelSpec]:
    def spec(data: Data) -> ModelSpec:  # noqa: ARG001 - as `_real`
        found = parse_model("builtin")
        return replace(found, input=InputSpec(size=size, resize=size)) if size else found

    return spec


def trained(name: str, builder: str) -> Callable[[Data], ModelSpec]:
    """A network that `tools/planted_cues/train.py` has trained."""

    def spec(data: Data) -> ModelSpec:
        return ModelSpec(name, f"networks:{builder}", data.planted / f"{name}.safetensors")

    return spec


@lru_cache(maxsize=1)
def _found(shared: Path) -> list[localisation_cases.Photo]:
    return localisation_cases.photos(shared)


def _views(data: Data, replica: Replica) -> Iterator[Case]:
    """Every view of the photographs that is classified right, the whole ones and the windows."""
    _, views = localisation_cases.views(_found(data.shared), replica, 0)
    for view in views:
        yield Case(view.pixels, labels=frozenset({view.target}))


def _whole(fit: Fit) -> Callable[[Data, Replica], Iterator[Case]]:
    def cases(data: Data, replica: Replica) -> Iterator[Case]:
        for photo in _found(data.shared):
            shown = fit_to_model(photo.source, replica.model.preprocessing, fit)
            yield Case(shown.pixels, shown.geometry.content, photo.classes)

    return cases


def _samples(data: Data, replica: Replica) -> Iterator[Case]:
    assert data.samples is not None
    for file in sorted(data.samples.glob("*.jpg")):
        source = decode(file.read_bytes(), max_pixels=PIXELS)
        shown = fit_to_model(source, replica.model.preprocessing)
        yield Case(shown.pixels, labels=frozenset({int(file.stem)}))


def flowers(fit: Fit = "crop") -> Callable[[Data, Replica], Iterator[Case]]:
    """The photographs of flowers that are held out from training."""

    def cases(data: Data, replica: Replica) -> Iterator[Case]:
        folders = ("daisy", "dandelion", "roses", "sunflowers", "tulips")
        with tarfile.open(data.shared / "flowers128.tar") as archive:
            members = [each for each in archive.getmembers() if "/val/" in each.name]
            for member in sorted(members, key=lambda each: Path(each.name).name):
                file = archive.extractfile(member)
                if file is None:
                    continue
                label = folders.index(Path(member.name).parent.name)
                source = decode(file.read(), max_pixels=PIXELS)
                shown = fit_to_model(source, replica.model.preprocessing, fit)
                yield Case(shown.pixels, shown.geometry.content, frozenset({label}))

    return cases


def _tagged(placing: Placing) -> Callable[[Data, Replica], Iterator[Case]]:
    def cases(data: Data, replica: Replica) -> Iterator[Case]:
        generator = torch.Generator().manual_seed(0)
        count = len(replica.model.labels)
        for case in flowers()(data, replica):
            label = int(torch.randint(CLASSES, (1,), generator=generator)) % count
            made = plant(case.pixels, label, placing, generator)
            labels = frozenset({label})
            yield Case(made.image, labels=labels, plain=made.plain, mask=made.mask)

    return cases


def _collages(data: Data, replica: Replica) -> Iterator[Case]:
    """Four photographs of four classes in one model input."""
    whole, _ = localisation_cases.views(_found(data.shared), replica, 0)
    for grid in localisation_cases.grids(whole, 150, 0):
        size = replica.model.preprocessing.crop
        small = functional.interpolate(grid.pixels[None].float(), size, mode="area")[0]
        yield Case(
            small.round().to(torch.uint8), labels=frozenset(grid.targets), tiles=grid.targets
        )


def _drawn(data: Data, replica: Replica) -> Iterator[Case]:  # noqa: ARG001 - needs no data
    for number in range(6):
        source = decode(photograph(number), max_pixels=PIXELS)
        yield Case(fit_to_model(source, replica.model.preprocessing).pixels)


SUBJECTS: Sequence[Subject] = (
    *(
        Subject(name, "photographs", _real(name), _views)
        for name in ("mobilenet_v2", "squeezenet1_1")
    ),
    *(
        Subject(f"{name}, one a class", "photographs", _real(name), _samples)
        for name in ("mobilenet_v2", "squeezenet1_1")
    ),
    Subject("builtin", "photographs", _builtin(), flowers()),
    Subject("transformer", "photographs", trained("dinov2", "dinov2"), flowers()),
    *(
        Subject(f"planted: {name}", "planted", trained(name, builder), _tagged(placing))
        for name, builder, placing in (
            ("random", "flowers", "random"),
            ("corner", "flowers", "corner"),
            ("twice", "flowers", "twice"),
            ("squeezenet1_1", "squeezenet1_1", "random"),
            ("mobilenet_v2", "mobilenet_v2", "random"),
            ("sigmoid", "flowers", "random"),
            ("one_logit", "flowers", "random"),
        )
    ),
    Subject("mobilenet_v2, fit=pad", "fits", _real("mobilenet_v2"), _whole("pad")),
    Subject("builtin, fit=pad", "fits", _builtin(), flowers("pad")),
    *(
        Subject(f"{name}, {size[1]}×{size[0]}", "fits", spec, cases)
        for name, size, spec, cases in (
            (
                "mobilenet_v2",
                WIDE["mobilenet_v2"],
                _real("mobilenet_v2", WIDE["mobilenet_v2"]),
                _whole("crop"),
            ),
            ("builtin", WIDE["builtin"], _builtin(WIDE["builtin"]), flowers()),
        )
    ),
    *(
        Subject(f"collages, {name}", "collages", _real(name), _collages)
        for name in ("mobilenet_v2", "squeezenet1_1")
    ),
)

QUICK = Subject("builtin, drawn", "photographs", _builtin(), _drawn)
"""Needs no data."""


def randomised(module: nn.Module, depth: str, seed: int) -> nn.Module:
    """A copy whose weights are permuted within each tensor: of the head, the last half, or all."""
    made = copy.deepcopy(module)
    layers = [each for each in made.modules() if list(each.parameters(recurse=False))]
    first = {"head": len(layers) - 1, "last half": len(layers) // 2, "all": 0}[depth]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers[first:]:
            for values in layer.parameters(recurse=False):
                order = torch.randperm(values.numel(), generator=generator)
                values.copy_(values.flatten()[order].reshape(values.shape))
    return made
