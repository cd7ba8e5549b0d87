"""An auto-annotation function of CVAT: the best class of a frame as a tag, its evidence as a mask.

    cvat-cli task auto-annotate 42 --function-module api_schemas.adapters.cvat
        --allow-unmatched-labels -p url=str:http://127.0.0.1:8000 -p shapes=str:tag,polygon

It serves `cvat-cli function create-native` and `function run-agent` as well. It needs
cvat-sdk[masks] beside what `api_schemas.client` needs; the parameters are those of `create`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import PIL.Image

from api_schemas.client import URL, Client
from api_schemas.client.errors import DeadlineExceeded, ImageRefused, UnreadableImage
from api_schemas.client.results import Explanation, Regions

KINDS = ("tag", "mask", "polygon", "rectangle", "points")

_OF_ONE_FRAME = (DeadlineExceeded, ImageRefused, UnreadableImage)

_log = logging.getLogger(__name__)


def create(  # noqa: PLR0913, PLR0917 - CVAT hands over each parameter by its name
    url: str = URL,
    api_key: str = "",
    shapes: str = "tag,mask",
    evidence_label: str = "evidence",
    model: str = "",
    method: str = "",
    layer: str = "",
    threshold: float = 0.5,
    explain_top: int = 1,
) -> Function:
    """The function that CVAT calls; what is empty is left to the service.

    shapes:         what is returned: some of tag, mask, polygon, rectangle, points, with commas.
    evidence_label: of all shapes but tags; empty: a shape has the label of its class.
    threshold:      where the map is cut, 0 to 1.
    explain_top:    how many of the best classes are returned for a frame.

    Raises ValueError for parameters that are none, ClientError where the service does not answer.
    """
    kinds = _kinds(shapes)
    asked = {"model": model, "method": method, "layer": layer}
    options = {name: value for name, value in asked.items() if value}
    client = Client(url, api_key=api_key or None)
    labels = client.model(model or None).labels or []
    return Function(
        client,
        kinds,
        spec_labels(labels, kinds, evidence_label),
        evidence_label,
        {"include": "regions", "threshold": threshold, "explain_top": explain_top, **options},
    )


def _kinds(shapes: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(kind.strip() for kind in shapes.split(",")))
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"`shapes` is some of {', '.join(KINDS)}, not {kind!r}")
    return kinds


def spec_labels(
    labels: Sequence[str], kinds: Sequence[str], evidence_label: str
) -> dict[str, tuple[int, str]]:
    """Id and type of every label by its name, as CVAT wants them declared.

    The id is that of the class, the first one where several have a name; a label of one kind has
    its type, one of several `any`. Raises ValueError where the evidence's label is also a class's.
    """
    if evidence_label in labels:
        raise ValueError(f"{evidence_label!r} is a class; `evidence_label` is another name")
    tags = [kind for kind in kinds if kind == "tag"]
    others = [kind for kind in kinds if kind != "tag"]
    of_class = tags if evidence_label else kinds
    declared: dict[str, tuple[int, str]] = {}
    if of_class:
        for index, label in enumerate(labels):
            declared.setdefault(label, (index, _type(of_class)))
    if evidence_label and others:
        declared[evidence_label] = (len(labels), _type(others))
    return declared


def _type(kinds: Sequence[str]) -> str:
    return kinds[0] if len(kinds) == 1 else "any"


def outlines(regions: Regions, kind: str) -> list[list[float]]:
    """The numbers of each shape of a kind, in pixels of the upright frame: x and y in turn.

    A mask is one shape, in CVAT's run lengths; polygons and rectangles are one a region, the
    largest first; points are the peak alone. Nothing where the map is zero throughout.
    """
    if kind == "mask":
        from cvat_sdk.masks import encode_mask  # noqa: PLC0415 - only in CVAT's environment

        mask = regions.mask
        return [encode_mask(mask)] if mask.any() else []
    if kind == "polygon":
        return [[number for point in polygon for number in point] for polygon in regions.polygons]
    if kind == "rectangle":
        return [[x, y, x + w, y + h] for x, y, w, h in regions.boxes]
    return [] if regions.peak is None else [list(regions.peak)]


class Function:
    """What CVAT calls: `spec` says which labels there are, `detect` answers for one frame."""

    def __init__(
        self,
        client: Client,
        kinds: Sequence[str],
        labels: Mapping[str, tuple[int, str]],
        evidence_label: str,
        options: Mapping[str, Any],
    ) -> None:
        import cvat_sdk.auto_annotation as cvat  # noqa: PLC0415 - as above

        self._cvat = cvat
        self._client = client
        self._kinds = kinds
        self._labels = labels
        self._evidence_label = evidence_label
        self._options = options
        self.spec = cvat.DetectionFunctionSpec(
            labels=[
                cvat.label_spec(name, index, type=kind) for name, (index, kind) in labels.items()
            ]
        )

    def detect(self, context: Any, image: PIL.Image.Image) -> list[Any]:
        """The annotations of a frame; none, and a warning, for a frame that cannot be answered.

        CVAT's confidence threshold bounds the score of the class. Raises ClientError for what would
        be said of every frame, so that a task is annotated whole or not at all.
        """
        try:
            result = self._client.explain(image, **self._options)[0]
        except _OF_ONE_FRAME as error:
            _log.warning("%s is left without annotations: %s", context.frame_name, error.detail)
            return []
        least = context.conf_threshold or 0.0
        return [
            annotation
            for explanation in result.explanations
            if explanation.score >= least
            for annotation in self._annotations(explanation, to_polygons=context.conv_mask_to_poly)
        ]

    def _annotations(self, explanation: Explanation, *, to_polygons: bool) -> Iterator[Any]:
        assert explanation.regions is not None
        kinds = ["polygon" if kind == "mask" and to_polygons else kind for kind in self._kinds]
        for kind in dict.fromkeys(kinds):
            if kind == "tag":
                yield self._cvat.tag(self._labels[explanation.label][0])
                continue
            label = self._labels[self._evidence_label or explanation.label][0]
            for numbers in outlines(explanation.regions, kind):
                yield self._cvat.shape(label, type=kind, points=numbers, score=explanation.score)
