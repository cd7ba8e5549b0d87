"""A Label Studio project: the controls of its label_config, and its extra parameters.

    (image,) = images_in(label_config)      # Image tags with controls for evidence
    image.source(task_data)                 # the value of its variable, such as "$image"
    image.controls[0].label_of("tulip")     # the label to emit there, or None

A label matches the class of the same name, in any case, and those in its `predicted_values`
(comma-separated), the attribute that Label Studio's own backends read.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
import pydantic

from api_schemas.methods import METHODS
from api_schemas.options import ExplainOptions
from service.errors import InvalidImageData, InvalidOption
from service.models.loaded import LoadedModel
from service.routes.problems import describe

CONTROLS = ("Choices", "BrushLabels", "RectangleLabels", "PolygonLabels", "KeyPointLabels")
GENERIC = ("cam", "heatmap", "evidence", "peak")
"""Labels of regions that match the evidence of any class."""

PARAMETERS = (
    *("model", "method", "layer", "threshold", "fit", "samples", "steps", "seed", "verify"),
    "min_score",
)
"""Options of /explain that a project's extra parameters may set, besides `labels`."""

MAX_TAGS, MAX_ATTRIBUTES, MAX_NAMES = 10_000, 50_000, 50_000
"""Of a label_config: tags, attributes, and names between commas. Counted before it is parsed."""

MAX_NAMESPACES = 10
"""Occurrences of `xmlns` at most; some editors add a few."""

MAX_DEPTH = 64
"""Nested tags of a label_config at most."""

MAX_IMAGES, MAX_PAIRS = 16, 256
"""Image tags that evidence belongs to, and how often a control tag and such an image belong
together: each pair is a part of the answer for every task."""

MAX_VALUE = 2048
"""Characters of the value of an Image tag: a variable, or an address with a variable in it."""

_VARIABLE = re.compile(r"\$([A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)*)")


@dataclass(frozen=True, slots=True)
class Label:
    """A label or choice: the name in results, and the names of classes that it matches."""

    name: str
    means: frozenset[str]


@dataclass(frozen=True, slots=True)
class Control:
    """A control tag that evidence can be written to.

    kind:     choices, brushlabels, rectanglelabels, polygonlabels or keypointlabels.
    to_name:  the Image it belongs to. several: whether more than one choice may be made.
    at_least: the least score that is worth a choice, by the tag's `model_score_threshold`.
    meaning:  for each name of a class, in lower case, the number of the first label that means it.
    """

    name: str
    kind: str
    to_name: str
    labels: tuple[Label, ...]
    meaning: Mapping[str, int]
    several: bool = False
    at_least: float | None = None

    def label_of(self, *names: str) -> str | None:
        """The first label that means one of these names, of class or mapping."""
        numbers = [self.meaning[key] for name in names if (key := name.casefold()) in self.meaning]
        return self.labels[min(numbers)].name if numbers else None

    def region_label(self, *names: str) -> str | None:
        """The class's own label; else a generic one; else the only one; else None."""
        label = self.label_of(*names) or self.label_of(*GENERIC)
        if label is None and len(self.labels) == 1:
            return self.labels[0].name
        return label


@dataclass(frozen=True, slots=True)
class TaskImage:
    """An Image tag with the controls that belong to it."""

    name: str
    value: str
    controls: tuple[Control, ...]

    def source(self, data: Mapping[str, Any]) -> str:
        """The address of the image in a task's data. Raises InvalidImageData."""
        variable = _VARIABLE.search(self.value)
        if variable is None:
            return self.value
        value: Any = data
        for key in variable[1].split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if not isinstance(value, str) or not value:
            raise InvalidImageData(f"The task has no image under {variable[0]}.")
        return f"{self.value[: variable.start()]}{value}{self.value[variable.end() :]}"


@dataclass(frozen=True, slots=True)
class Parameters:
    """A project's extra parameters: options, and labels for some classes."""

    options: ExplainOptions
    labels: Mapping[str, str]

    def names_of(self, label: str) -> tuple[str, ...]:
        """The names of a class that are looked up in the project."""
        mapped = self.labels.get(label)
        return (label,) if mapped is None else (mapped,)


def images_in(label_config: str) -> tuple[TaskImage, ...]:
    """Every Image tag that a known control with a label belongs to. Raises InvalidOption."""
    read = _parsed(label_config)
    images = {name: value for name, value in read.images.items() if value is not None}
    by_image: dict[str, list[Control]] = {}
    pairs = 0
    for tag in filter(lambda tag: tag.labels, read.controls):
        controls = tag.controls(images)
        pairs += len(controls)
        if pairs > MAX_PAIRS:
            raise InvalidOption(
                f"The label_config has more than {MAX_PAIRS} pairs of an Image and a control tag "
                "that belongs to it; use fewer control tags."
            )
        for control in controls:
            by_image.setdefault(control.to_name, []).append(control)
    if len(by_image) > MAX_IMAGES:
        raise InvalidOption(
            f"The label_config has more than {MAX_IMAGES} Image tags with controls; use fewer."
        )
    return tuple(
        TaskImage(name, _checked(name, value), tuple(by_image[name]))
        for name, value in images.items()
        if name in by_image
    )


def parameters_in(extra: object) -> Parameters:
    """Read a project's extra parameters: a JSON object, or its text. Raises InvalidOption."""
    if isinstance(extra, (str, bytes)) and extra.strip():
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
            f"The extra parameters have {', '.join(map(repr, unknown))}; accepted are labels, "
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
    """The version of predictions; Label Studio requests tasks again only for another version."""
    has_layer = METHODS[options.method].has_layer
    layers = model.target_layers(options.layer) if has_layer else ()
    parts = [model.name, model.version, options.method, "+".join(layers) or "input"]
    if options.threshold != ExplainOptions().threshold:
        parts.append(f"threshold{options.threshold:g}")
    if options.fit is not None:
        parts.append(options.fit)
    if options.verify != "false":
        parts.append("verified" if options.verify == "true" else "searched")
    return "-".join(parts)


def _mapping(labels: object) -> Mapping[str, str]:
    if labels is None:
        return {}
    if not isinstance(labels, dict) or not all(isinstance(to, str) for to in labels.values()):
        raise InvalidOption('`labels` maps classes to labels, such as {"tabby": "cat"}.')
    return labels


def _checked(name: str, value: str) -> str:
    """The value of an Image tag. Raises InvalidOption."""
    if len(value) > MAX_VALUE or len(_VARIABLE.findall(value)) > 1:
        raise InvalidOption(
            f"The value of the Image tag {name!r} is one variable, such as $image, or an address "
            f"of at most {MAX_VALUE} characters with one variable in it."
        )
    return value


def _parsed(label_config: str) -> _Reader:
    tags = label_config.count("<") - label_config.count("</")
    attributes, names = label_config.count("="), label_config.count(",")
    if tags > MAX_TAGS or attributes > MAX_ATTRIBUTES or names > MAX_NAMES:
        raise InvalidOption(
            f"The label_config has more than {MAX_TAGS} tags, {MAX_ATTRIBUTES} attributes or "
            f"{MAX_NAMES} names between commas; use fewer labels."
        )
    if "<!DOCTYPE" in label_config or "<!ENTITY" in label_config:
        raise InvalidOption("The label_config has a document type; remove it.")
    if label_config.count("xmlns") > MAX_NAMESPACES:
        raise InvalidOption("The label_config has namespaces; remove them.")
    reader = _Reader()
    parser = ET.XMLParser(target=reader)  # noqa: S314 - entities, which make XML bombs, are refused above
    try:
        parser.feed(label_config)
        parser.close()
    except (ET.ParseError, ValueError) as error:
        raise InvalidOption(f"The label_config is not XML: {error}.") from error
    return reader


@dataclass(slots=True)
class _ControlTag:
    """A control tag while it is parsed: its attributes, and its labels so far."""

    tag: str
    attributes: Mapping[str, str]
    labels: list[Label] = field(default_factory=list)

    def controls(self, images: Mapping[str, str]) -> list[Control]:
        """The control, once for each of these images that it is for. Raises InvalidOption."""
        meaning: dict[str, int] = {}
        for number, label in enumerate(self.labels):
            for name in label.means:
                meaning.setdefault(name, number)
        labels, get = tuple(self.labels), self.attributes.get
        to_names = dict.fromkeys(name.strip() for name in get("toName", "").split(","))
        at_least = _number(get("model_score_threshold"))
        return [
            Control(
                self.attributes["name"],
                self.tag.lower(),
                to_name,
                labels,
                meaning,
                several=get("choice") == "multiple",
                at_least=at_least,
            )
            for to_name in to_names
            if to_name in images
        ]


class _Reader:
    """Collects Image and control tags while a label_config is parsed; no tree is built.

    A label belongs to the innermost control tag around it.
    """

    def __init__(self) -> None:
        self.images: dict[str, str | None] = {}
        self.controls: list[_ControlTag] = []
        self._around: list[_ControlTag | None] = [None]

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """For the parser. Raises InvalidOption."""
        control = self._around[-1]
        if tag in CONTROLS:
            control = _ControlTag(tag, attributes) if attributes.get("name") else None
            if control is not None:
                self.controls.append(control)
        elif control is not None and tag == ("Choice" if control.tag == "Choices" else "Label"):
            label = _label(attributes)
            if label is not None:
                control.labels.append(label)
        elif tag == "Image":
            self._add_image(attributes)
        self._around.append(control)
        if len(self._around) > MAX_DEPTH + 1:
            raise InvalidOption(f"The label_config is nested more than {MAX_DEPTH} tags deep.")

    def end(self, _tag: str) -> None:
        """For the parser."""
        self._around.pop()

    def close(self) -> None:
        """For the parser."""

    def _add_image(self, attributes: Mapping[str, str]) -> None:
        name = attributes.get("name", "")
        if name in self.images:
            raise InvalidOption(f"The label_config has two Image tags with the name {name!r}.")
        self.images[name] = attributes.get("value")


def _label(attributes: Mapping[str, str]) -> Label | None:
    value = attributes.get("value", "")
    name = attributes.get("alias") or value
    if not name or value.startswith("$"):  # filled in by the task
        return None
    listed = [part.strip() for part in attributes.get("predicted_values", "").split(",")]
    return Label(name, frozenset(text.casefold() for text in (value, name, *listed) if text))


_DIGITS = 50
"""Characters of a number that are read."""


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text[:_DIGITS])
    except ValueError as error:
        raise InvalidOption(f"`model_score_threshold` is a number, not {text!r}.") from error
