"""An auto-annotation function for CVAT: what a model finds in a frame, and its evidence.

The default of a classifier is the top class as a tag and its evidence as a mask, of a detector its
boxes, of a segmenter its regions.

    cvat-cli task auto-annotate 42 --function-module api_schemas.adapters.cvat
        --allow-unmatched-labels -p url=str:http://127.0.0.1:8000 -p shapes=str:tag,polygon

It serves `cvat-cli function create-native` and `function run-agent` as well. It needs
cvat-sdk[masks] and what `api_schemas.client` needs; the parameters are those of `create`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import PIL.Image

from api_schemas.adapters.objects import Found, found_in, outlines_of
from api_schemas.client import URL, Client
from api_schemas.client.errors import DeadlineExceeded, ImageRefused, UnreadableImage
from api_schemas.client.results import Explanation, Regions

EVIDENCE = ("mask", "polygon", "rectangle", "points")
"""Kinds of shapes that are drawn from a map."""

KINDS = ("tag", "box", "region", *EVIDENCE)
"""tag: the class of the explained prediction. box: the box of a detection, a rectangle. region: the
mask of a detection or of a segmenter's class. These have the label of the class."""

DEFAULTS: Mapping[str, str] = MappingProxyType({"detection": "box", "segmentation": "region"})
"""The kinds of a task where no others are requested; of a classifier tag and mask."""

_TYPES = MappingProxyType({"box": "rectangle", "region": "mask"})
"""CVAT's name of a kind where it has another one."""

VERDICT, VERDICT_ID = "verdict", 1
"""Name of the attribute of shapes with `verify`, and its id in the function."""

_FRAME_ERRORS = (DeadlineExceeded, ImageRefused, UnreadableImage)

_log = logging.getLogger(__name__)


def create(  # noqa: PLR0913, PLR0917 - CVAT passes each parameter by name
    url: str = URL,
    api_key: str = "",
    shapes: str = "",
    evidence_label: str = "evidence",
    model: str = "",
    method: str = "",
    layer: str = "",
    threshold: float = 0.5,
    explain_top: int = 1,
    verify: str = "",
) -> Function:
    """Return the function that CVAT calls; empty parameters mean the service's defaults.

    shapes:         comma-separated, some of KINDS; empty: those of the model's task.
    evidence_label: label of all shapes of the evidence; empty: a shape has the label of its class.
    threshold:      level at which the map is cut, 0 to 1.
    explain_top:    number of top classes, boxes or regions with evidence in a frame.
    verify:         true or search: each shape has the verdict on its map as the text attribute
                    VERDICT, which the label of the shapes needs in CVAT, too.

    Raises ValueError for an invalid parameter, ClientError if the service does not answer.
    """
    client = Client(url, api_key=api_key or None)
    served = client.model(model or None)
    kinds = _kinds(shapes or DEFAULTS.get(served.task or "", "tag,mask"))
    if verify not in ("", "false") and not set(kinds) & set(EVIDENCE):
        raise ValueError("`verify` is for the evidence; add mask to `shapes`, or leave it out")
    chosen = {"model": model, "method": method, "layer": layer, "verify": verify}
    options = {name: value for name, value in chosen.items() if value}
    labels = served.labels or []
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
    """Return id and type of each label by name, as CVAT requires.

    The id is that of the class, of the first if several share a name. The type is that of its only
    kind, or `any`. Raises ValueError if the label of the evidence is also a class.
    """
    if evidence_label in labels:
        raise ValueError(
            f"`evidence_label` is {evidence_label!r}, which is a class; use another name"
        )
    tags = [kind for kind in kinds if kind not in EVIDENCE]
    others = [kind for kind in kinds if kind in EVIDENCE]
    of_class = tags if evidence_label else kinds
    declared: dict[str, tuple[int, str]] = {}
    if of_class:
        for index, label in enumerate(labels):
            declared.setdefault(label, (index, _type(of_class)))
    if evidence_label and others:
        declared[evidence_label] = (len(labels), _type(others))
    return declared


def _type(kinds: Sequence[str]) -> str:
    types = {_TYPES.get(kind, kind) for kind in kinds}
    return types.pop() if len(types) == 1 else "any"


def outlines(regions: Regions, kind: str) -> list[list[float]]:
    """Return the numbers of each shape of a kind, in pixels of the upright frame: x, y, x, y, ….

    A mask is one shape, in CVAT's run lengths; polygons and rectangles are one per region, largest
    first; points are only the peak. Empty if the map is zero everywhere.
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
    """The object that CVAT uses: `spec` lists the labels, `detect` annotates one frame."""

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
                cvat.label_spec(name, index, type=kind, **self._declared(name))
                for name, (index, kind) in labels.items()
            ]
        )

    def _declared(self, label: str) -> dict[str, Any]:
        """The attributes of a label: the verdict on the labels of shapes."""
        if self._options.get("verify", "false") == "false":
            return {}
        if self._evidence_label not in ("", label):
            return {}
        return {"attributes": [self._cvat.text_attribute_spec(VERDICT, VERDICT_ID)]}

    def detect(self, context: Any, image: PIL.Image.Image) -> list[Any]:
        """Return the annotations of a frame; for a frame that fails, none and a warning.

        CVAT's confidence threshold is the minimum score of a class. Raises ClientError for an error
        that every frame would get, so that a task is annotated completely or not at all.
        """
        try:
            result = self._client.explain(image, **self._options)[0]
        except _FRAME_ERRORS as error:
            _log.warning("no annotations for %s: %s", context.frame_name, error.detail)
            return []
        minimum, to_polygons = context.conf_threshold or 0.0, context.conv_mask_to_poly
        found = [
            shape
            for each in found_in(result)
            if each.prediction.score >= minimum
            for shape in self._found(each, to_polygons=to_polygons)
        ]
        return found + [
            annotation
            for explanation in result.explanations
            if explanation.score >= minimum
            for annotation in self._annotations(explanation, to_polygons=to_polygons)
        ]

    def _found(self, found: Found, *, to_polygons: bool) -> Iterator[Any]:
        """The box and the mask of a detection, the mask of a region or its outlines."""
        label, score = self._labels[found.prediction.label][0], found.prediction.score
        if "box" in self._kinds:
            x, y, w, h = found.box
            yield self._cvat.rectangle(label, [x, y, x + w, y + h], score=score)
        if "region" not in self._kinds or found.mask is None:
            return
        if to_polygons:
            for outline in outlines_of(found.mask):
                corners = [float(number) for corner in outline for number in corner]
                yield self._cvat.polygon(label, corners, score=score)
        elif found.mask.any():
            from cvat_sdk.masks import encode_mask  # noqa: PLC0415 - as above

            yield self._cvat.mask(label, encode_mask(found.mask), score=score)

    def _annotations(self, explanation: Explanation, *, to_polygons: bool) -> Iterator[Any]:
        assert explanation.regions is not None
        drawn = [kind for kind in self._kinds if kind not in _TYPES]
        kinds = ["polygon" if kind == "mask" and to_polygons else kind for kind in drawn]
        for kind in dict.fromkeys(kinds):
            if kind == "tag":
                yield self._cvat.tag(self._labels[explanation.label][0])
                continue
            label = self._labels[self._evidence_label or explanation.label][0]
            for numbers in outlines(explanation.regions, kind):
                yield self._cvat.shape(
                    label,
                    type=kind,
                    points=numbers,
                    score=explanation.score,
                    **_attributes(explanation),
                )


def _attributes(explanation: Explanation) -> dict[str, Any]:
    """The attributes of a shape: the verdict on its map, if there is one."""
    if explanation.verify is None:
        return {}
    from cvat_sdk.models import AttributeValRequest  # noqa: PLC0415 - as above

    verdict = AttributeValRequest(spec_id=VERDICT_ID, value=explanation.verify.verdict)
    return {"attributes": [verdict]}
