"""The client's form of answers, decoded: maps as arrays, images as PIL images, masks as booleans.

Each class is the decoded form of the wire's class of that name in `api_schemas.answers`, with the
same fields.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from api_schemas import answers
from api_schemas.client.errors import ClientError, service_error
from api_schemas.client.notebook import explanation_html, result_html

Floats = NDArray[np.float16] | NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Prediction:
    """The decoded form of the wire's `Prediction`; a DataFrame of a list has named columns.

    detection, box: of a detector, its position and x, y, w, h. mask: of a detection or a region, as
    run lengths, see `decode_mask`. area: of a region, in source pixels.
    """

    class_id: int
    label: str
    score: float
    logit: float
    detection: int | None = None
    box: answers.Rect | None = None
    mask: answers.MaskRLE | None = field(default=None, repr=False)
    area: float | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """The decoded form of the wire's `Change`: the value with the part hidden minus without."""

    class_id: int
    label: str
    score: float
    logit: float
    score_change: float
    logit_change: float


@dataclass(frozen=True, slots=True, eq=False)
class Regions:
    """The decoded form of the wire's `Regions`, in upright source pixels."""

    threshold: float
    peak: tuple[float, float] | None
    boxes: list[answers.Rect]
    polygons: list[list[tuple[float, float]]]
    rle: answers.MaskRLE

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Booleans (height, width) of the source."""
        return decode_mask(self.rle)


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """The decoded form of the wire's `Explanation`: one map with its metadata.

    grid:    float32, 0..1 (signed methods -1..1), in the layer's or the model input's shape.
    heatmap: mode P, the pixel value is 255·|map| (`bwr`: 127.5 + 127.5·map), the palette the
             colormap.
    overlay: the image under the colored map.
    contrasts: the classes that the target is compared with, if several or with a weight.
    These and `regions` are None if `include` does not name them.
    verify:  the verdict on the map with its numbers; None without the option `verify`.
    logit_difference: the logit of the class minus that of `contrast`; None without one.
    detection, box, of: of a detector, the explained detection, its box and what of it; region: of a
    segmenter, the region that the target is the mean of.
    """

    class_id: int
    label: str
    score: float
    contrast: int | None
    method: str
    layer: str | list[str] | None
    range: tuple[float, float]
    flags: list[str]
    cost: answers.Cost
    grid: NDArray[np.float32] | None = field(repr=False)
    heatmap: PIL.Image.Image | None = field(repr=False)
    overlay: PIL.Image.Image | None = field(repr=False)
    regions: Regions | None = field(repr=False)
    verify: answers.Verification | None = field(default=None, repr=False)
    contrasts: tuple[answers.Contrast, ...] = ()
    logit_difference: float | None = None
    detection: int | None = None
    box: answers.Rect | None = None
    of: answers.Of | None = None
    region: answers.MaskRLE | None = field(default=None, repr=False)

    def _repr_html_(self) -> str:
        """The map in a notebook, with its caption."""
        return explanation_html(self)


@dataclass(frozen=True, slots=True, eq=False)
class Activation:
    """The decoded form of the wire's `Activation`: a layer's output or input for one image.

    array: float16 (gradients float32) of `shape`. image: the channels side by side. channels: mean
    and maximum of each.
    """

    layer: str
    kind: str
    call: int
    part: str | None
    shape: list[int]
    dtype: str
    stats: answers.Stats | None
    channels_left_out: int
    image: PIL.Image.Image | None = field(repr=False)
    array: Floats | None = field(repr=False)
    channels: answers.ChannelStats | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Masked:
    """The decoded form of the wire's `Masked`: the result for the image with a part hidden."""

    predictions: list[Prediction]
    changes: list[Change]
    explanations: list[Explanation]


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """The decoded form of the wire's `Result`: for one image; if it failed, only `error` is set.

    seen: x, y, w, h of the part that the model saw, in upright source pixels.
    uncertainty: margin and entropy, 0..1; None without the option `uncertainty`.
    """

    image: answers.ImageInfo | None = None
    seen: answers.Rect | None = None
    predictions: list[Prediction] = field(default_factory=list)
    explanations: list[Explanation] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)
    masked: Masked | None = None
    precision: str | None = None
    uncertainty: answers.Uncertainty | None = None
    error: ClientError | None = None

    def _repr_html_(self) -> str:
        """The result in a notebook: the maps as images, and the predictions."""
        return result_html(self)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The decoded form of the wire's `Answer`: one result per image, in the given order.

    `answer[0]` is the first result. json: the body as received.
    """

    id: str
    model: answers.ModelVersion
    results: list[Result]
    timing_ms: answers.Timing
    json: bytes = field(repr=False)

    def __getitem__(self, index: int) -> Result:
        return self.results[index]

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def _repr_html_(self) -> str:
        """The answer in a notebook: its results, one below the other."""
        return "".join(map(result_html, self.results))


def read_answer(body: bytes) -> Answer:
    """Decode an answer of `/explain` or `/predict`. Raises ValueError for anything else."""
    wire = answers.Answer.model_validate_json(body)
    results = [read_result(result, wire.id) for result in wire.results]
    return Answer(wire.id, wire.model, results, wire.timing_ms, body)


def decode_image(image: answers.Encoded) -> PIL.Image.Image:
    """Return an image of an answer; its pixels are decoded when they are first used."""
    return PIL.Image.open(io.BytesIO(base64.b64decode(image.data)))


def decode_mask(rle: answers.MaskRLE) -> NDArray[np.bool_]:
    """Decode COCO's compressed run lengths to booleans (height, width).

    Runs go down the columns and alternate, starting outside. Each is written in digits of five
    bits, least significant first, offset by 48: the sixth bit means that more follow, the highest
    bit of the last digit is the sign; from the third on, a run is the difference to the second last
    one (maskApi.c of pycocotools). Raises ValueError if the runs do not fill the mask.
    """
    runs: list[int] = []
    value = bits = 0
    for character in rle.counts.encode("ascii"):
        digit = character - 48
        value |= (digit & 0x1F) << bits
        bits += 5
        if digit & 0x20:
            continue
        if digit & 0x10:
            value -= 1 << bits
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = bits = 0
    height, width = rle.size
    if sum(runs) != height * width or min(runs, default=0) < 0 or bits:
        raise ValueError(f"the runs do not fill a mask of {height} by {width} pixels")
    is_inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(is_inside, runs).reshape(width, height).T


def _numbers(data: str, dtype: str, shape: list[int]) -> Any:
    """Decode little-endian row-major values to a read-only array."""
    kind = np.dtype(dtype).newbyteorder("<")
    return np.frombuffer(base64.b64decode(data), kind).reshape(shape)


def read_result(wire: answers.Result, request_id: str | None = None) -> Result:
    """Decode one result of an answer."""
    if wire.error is not None:
        failure = wire.error
        error = service_error(failure.status, failure.code, failure.detail, request_id)
        return Result(error=error)
    return Result(
        image=wire.image,
        seen=wire.seen,
        predictions=_predictions(wire.predictions or []),
        explanations=[_explanation(item) for item in wire.explanations or []],
        activations=[_activation(item) for item in wire.activations or []],
        masked=None if wire.masked is None else _masked(wire.masked),
        precision=wire.precision,
        uncertainty=wire.uncertainty,
    )


def _predictions(wire: Sequence[answers.Prediction]) -> list[Prediction]:
    return [Prediction(**dict(prediction)) for prediction in wire]


def _masked(wire: answers.Masked) -> Masked:
    explanations = [_explanation(item) for item in wire.explanations]
    changes = [Change(**dict(change)) for change in wire.changes]
    return Masked(_predictions(wire.predictions), changes, explanations)


def _explanation(wire: answers.Explanation) -> Explanation:
    grid, regions = wire.grid, wire.regions
    return Explanation(
        class_id=wire.class_id,
        label=wire.label,
        score=wire.score,
        contrast=wire.contrast,
        contrasts=tuple(wire.contrasts or ()),
        method=wire.method,
        layer=wire.layer,
        range=wire.range,
        flags=wire.flags,
        cost=wire.cost,
        grid=None if grid is None else _numbers(grid.data, grid.dtype, grid.shape),
        heatmap=None if wire.heatmap is None else decode_image(wire.heatmap),
        overlay=None if wire.overlay is None else decode_image(wire.overlay),
        regions=None
        if regions is None
        else Regions(regions.threshold, regions.peak, regions.boxes, regions.polygons, regions.rle),
        verify=wire.verify,
        logit_difference=wire.logit_difference,
        detection=wire.detection,
        box=wire.box,
        of=wire.of,
        region=wire.region,
    )


def _activation(wire: answers.Activation) -> Activation:
    image, array = wire.image, wire.array
    return Activation(
        layer=wire.layer,
        kind=wire.kind,
        call=wire.call,
        part=wire.part,
        shape=wire.shape,
        dtype=wire.dtype,
        stats=wire.stats,
        channels_left_out=0 if image is None else image.channels_left_out,
        image=None if image is None else decode_image(image),
        array=None if array is None else _numbers(array.data, array.dtype, wire.shape),
        channels=wire.channels,
    )
