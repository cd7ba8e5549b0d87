"""A Label Studio project: what its label_config has room for, and what its extra parameters say.

    (image,) = images_in(label_config)      # Image tags with controls that evidence can be put into
    image.source(task_data)                 # what its value, such as "$image", stands for
    image.controls[0].label_of("tulip")     # the label to emit there, or None

A label means the class of the same name, in any case, and those that its `predicted_values` lists
(commas between them), which is the attribute that Label Studio's own backends read.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import pydantic

from api_schemas.options import ExplainOptions
from service.errors import InvalidImageData, InvalidOption
from service.models.loaded import LoadedModel
from service.questions import LAYER_METHODS
from service.routes.problems import describe

CONTROLS = ("Choices", "BrushLabels", "RectangleLabels", "PolygonLabels", "KeyPointLabels")
GENERIC = ("cam", "heatmap", "evidence", "peak")
"""Labels of regions that hold the evidence of any class."""

PARAMETERS = ("model", "method", "layer", "threshold", "fit", "samples", "steps", "seed")
"""Options of /explain that a project's extra parameters may set; beside them `labels`."""

_VARIABLE = re.compile(r"\$([A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)*)")


@dataclass(frozen=True, slots=True)
class Label:
    """A label or choice: what is emitted, and the names of classes that it stands for."""

    name: str
    means: frozenset[str]


@dataclass(frozen=True, slots=True)
class Control:
    """A control tag that evidence can be put into.

    kind:     choices, brushlabels, rectanglelabels, polygonlabels or keypointlabels.
    to_name:  the Image it belongs to. several: whether more than one choice may be made.
    at_least: the least score that is worth a choice, by the tag's `model_score_threshold`.
    """

    name: str
    kind: str
    to_name: str
    labels: tuple[Label, ...]
    several: bool = False
    at_least: float | None = None

    def label_of(self, *names: str) -> str | None:
        """The label that means one of these names, of class or mapping."""
        wanted = {name.casefold() for name in names}
        return next((each.name for each in self.labels if each.means & wanted), None)

    def region_label(self, *names: str) -> str | None:
        """The class's own label; else a generic one; else the only one; else None."""
        own = self.label_of(*names) or self.label_of(*GENERIC)
        if own is None and len(self.labels) == 1:
            return self.labels[0].name
        return own


@dataclass(frozen=True, slots=True)
class TaskImage:
    """An Image tag with the controls that belong to it."""

    name: str
    value: str
    controls: tuple[Control, ...]

    def source(self, data: Mapping[str, Any]) -> str:
        """Where a task says that the picture is. Raises InvalidImageData."""

        def found(match: re.Match[str]) -> str:
            value: Any = data
            for key in match[1].split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
            if not isinstance(value, str) or not value:
                raise InvalidImageData(f"The task has no picture under {match[0]}.")
            return value

        return _VARIABLE.sub(found, self.value)


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a project's extra parameters say: options, and the label of some classes."""

    options: ExplainOptions
    labels: Mapping[str, str]

    def names_of(self, label: str) -> tuple[str, ...]:
        """Under which names a class's label is looked for in the project."""
        mapped = self.labels.get(label)
        return (label,) if mapped is None else (mapped,)


def images_in(label_config: str) -> tuple[TaskImage, ...]:
    """Every Image tag that a known control with a label belongs to. Raises InvalidOption."""
    root = _parsed(label_config)
    controls = [found for tag in root.iter() for found in _controls(tag)]
    images = []
    for tag in root.iter("Image"):
        name = tag.get("name", "")
        own = tuple(control for control in controls if control.to_name == name)
        if own and "value" in tag.attrib:
            images.append(TaskImage(name, tag.attrib["value"], own))
    return tuple(images)


def parameters_in(extra: object) -> Parameters:
    """Read a project's extra parameters: a JSON object, or its text. Raises InvalidOption."""
    if isinstance(extra, str) and extra.strip():
        try:
            extra = orjson.loads(extra)
        except orjson.JSONDecodeError as error:
            raise InvalidOption(f"The extra parameters are not JSON: {error}.") from error
    extra = extra or {}
    if not isinstance(extra, dict):
        raise InvalidOption('The extra parameters are an object, such as {"method": "layercam"}.')
    given = {key: value for key, value in extra.items() if key != "labels"}
    unknown = sorted(set(given) - set(PARAMETERS))
    if unknown:
        raise InvalidOption(
            f"The extra parameters have {', '.join(map(repr, unknown))}; they take labels, "
            f"{', '.join(PARAMETERS)}."
        )
    if isinstance(given.get("layer"), str):
        given["layer"] = [given["layer"]]
    try:
        options = ExplainOptions(**given, include=["none"])
    except pydantic.ValidationError as error:
        raise InvalidOption(describe(error.errors(include_url=False))) from error
    return Parameters(options, _mapping(extra.get("labels")))


def model_version(model: LoadedModel, options: ExplainOptions) -> str:
    """What Label Studio knows predictions by; it asks again only for another one."""
    layers = model.target_layers(options.layer) if options.method in LAYER_METHODS else ()
    parts = [model.name, model.version, options.method, "+".join(layers) or "input"]
    if options.threshold != ExplainOptions().threshold:
        parts.append(f"threshold{options.threshold:g}")
    if options.fit != ExplainOptions().fit:
        parts.append(options.fit)
    return "-".join(parts)


def _mapping(labels: object) -> Mapping[str, str]:
    if labels is None:
        return {}
    if not isinstance(labels, dict) or not all(isinstance(to, str) for to in labels.values()):
        raise InvalidOption('`labels` maps classes to labels, such as {"tabby": "cat"}.')
    return labels


def _parsed(label_config: str) -> ET.Element:
    if "<!DOCTYPE" in label_config or "<!ENTITY" in label_config:
        raise InvalidOption("The label_config has a document type; a labeling config has none.")
    try:
        return ET.fromstring(label_config)  # noqa: S314 - without entities there are no bombs
    except (ET.ParseError, ValueError) as error:
        raise InvalidOption(f"The label_config is not XML: {error}.") from error


def _controls(tag: ET.Element) -> Iterator[Control]:
    """The control that a tag is, once for each Image it is for."""
    labels = _labels(tag) if tag.tag in CONTROLS and tag.get("name") else ()
    if not labels:
        return
    for to_name in tag.get("toName", "").split(","):
        yield Control(
            tag.attrib["name"],
            tag.tag.lower(),
            to_name.strip(),
            labels,
            several=tag.get("choice") == "multiple",
            at_least=_number(tag.get("model_score_threshold")),
        )


def _labels(tag: ET.Element) -> tuple[Label, ...]:
    inner: Sequence[ET.Element] = list(tag.iter("Choice" if tag.tag == "Choices" else "Label"))
    found = []
    for each in inner:
        value = each.get("value", "")
        name = each.get("alias") or value
        if name and not value.startswith("$"):  # that one is filled in by the task
            listed = [part.strip() for part in each.get("predicted_values", "").split(",")]
            means = frozenset(text.casefold() for text in (value, name, *listed) if text)
            found.append(Label(name, means))
    return tuple(found)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError as error:
        raise InvalidOption(f"`model_score_threshold` is a number, not {text!r}.") from error
