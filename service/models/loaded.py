"""A model that is ready to be served, with its layers and classes by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from service.cam.tiles import kernel_weight
from service.errors import InvalidOption, UnknownClass, UnknownLayer, nearest
from service.images.decode import Preprocessing
from service.models.catalog import BUILTIN, ModelSpec, Output, Select, Task
from service.models.compiled.folding import Folded
from service.models.compiled.front import CompiledLane
from service.models.patterns import PathMatcher, is_pattern
from service.models.probes.attention import TokenAttention
from service.models.probes.behaviour import Behaviour, Finding
from service.models.probes.layers import Layer
from service.models.probes.logits import as_logits, logits_in
from service.models.probes.sensitivity import Sensitivity
from service.models.replicas import replicate
from service.models.tasks import BoxHead

_TYPE = "type:"
"""Prefix of a pattern for the class of a layer."""


FEW, SHORT = 12, 200
"""The most labels, and characters of labels, that `LoadedModel.knows` lists."""

FINER = 2
"""Earlier layers that are worth trying where the map of a later one is too coarse."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with everything that is needed to serve it.

    module:       the master: in eval mode, parameters frozen, never run and never hooked; replicas
                  are copied from it.
    labels:       one per class, in order of class id.
    target_layer: the layer of explanations if the request names none; None if no layer of the
                  model returns a suitable feature map.
    version:      the first 12 digits of the weights' sha256.
    output:       the activation that turns logits into scores. select: where the logits are in the
                  output of the module.
    no_layers, no_gradients: why methods that need them are refused; None if they work.
    folded:       a faster form of the module, if there is one.
    channels_last: whether module and input keep their channels last in memory.
    compiled:     the lane for the common request; None: see `not_compiled`.
    stateful:     the state that the module changes in every call, as in `Condition.faults`.
    behaviour:    the measured behaviour. findings: those of all probes.
    unclear:      layers whose cells have no measurable position. scattered: layers whose cells
                  have positions in no known order.
    sensitivity:  how much the maps of each method depend on the weights, at the default target
                  layer; methods that were not measured are missing.
    transform:    its preprocessing in one line, with the source of each part.
    missing:      why methods with a need (`relu`, `head`) cannot run, by need.
    attention:    the attention between its tokens, or why that has no map.
    insensitive:  the methods of `sensitivity` whose maps hardly depend on the weights.
    task:         what the model predicts. takes_list: whether the module takes a list of images.
    head:         where a detector makes its boxes; None: unknown, its scores are differentiated.
    queries:      whether a detector returns class logits and a box for each of its queries.
    default_layers: of a detector, the levels of the feature pyramid: a box is explained at its own.
    binary:       whether the module returns one logit, that of the second of two labels; the logit
                  of the first is its negative.
    """

    spec: ModelSpec
    module: nn.Module
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    target_layer: str | None
    layers: tuple[Layer, ...]
    version: str
    random_weights: bool = False
    output: Output = "softmax"
    select: Select = None
    no_layers: str | None = None
    no_gradients: str | None = None
    folded: Folded | None = None
    channels_last: bool = False
    compiled: CompiledLane | None = None
    not_compiled: str | None = None
    stateful: tuple[str, ...] = ()
    behaviour: Behaviour = field(default_factory=Behaviour)
    findings: tuple[Finding, ...] = ()
    unclear: frozenset[str] = frozenset()
    scattered: frozenset[str] = frozenset()
    binary: bool = False
    transform: str = ""
    sensitivity: tuple[Sensitivity, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict, hash=False)
    task: Task = "classification"
    takes_list: bool = False
    head: BoxHead | None = None
    queries: bool = False
    default_layers: tuple[str, ...] = ()
    attention: TokenAttention | str = "it has no attention between tokens"
    insensitive: frozenset[str] = field(init=False, repr=False, compare=False)
    _by_path: Mapping[str, Layer] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_path", {layer.path: layer for layer in self.layers})
        insensitive = (one.method for one in self.sensitivity if one.weights_hardly_matter)
        object.__setattr__(self, "insensitive", frozenset(insensitive))

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def knows(self) -> str:
        """The classes in a few words: `1,000 classes`, or `5 flowers: daisy, …` if they are few."""
        is_builtin = self.spec.builder == BUILTIN and not self.spec.weights
        count = f"{len(self.labels):,} {'flowers' if is_builtin else 'classes'}"
        labels = ", ".join(self.labels[:FEW])
        is_short = len(self.labels) <= FEW and len(labels) <= SHORT
        return f"{count}: {labels}" if is_short and self.labels[0] != "class 0" else count

    @property
    def is_compiled(self) -> bool:
        """Whether it has a compiled lane: of a detector or a segmenter, a form with such parts."""
        return self.compiled is not None or bool(self.folded and self.folded.compiled)

    @property
    def slower(self) -> str | None:
        """Why the compiled lane is missing, or has not the configured precision."""
        if not self.is_compiled:
            return self.not_compiled
        return self.compiled.instead if self.compiled else None

    @property
    def gives_masks(self) -> bool:
        """Whether a detector gives a mask for each box."""
        heads = getattr(self.module, "roi_heads", None)
        return getattr(heads, "mask_predictor", None) is not None

    @property
    def knows_rows(self) -> bool:
        """Whether the logits behind a box of a detector are known."""
        return self.head is not None or self.queries

    def check_rows(self) -> None:
        """Raise InvalidOption where the logits behind a box are not known."""
        if not self.knows_rows:
            raise InvalidOption(
                f"Model {self.name!r} does not show the logits behind a box, which `contrast` "
                "needs; leave it out."
            )

    def check_classifies(self, what: str) -> None:
        """Raise InvalidOption where `what` is for classifiers, and this model is none."""
        if self.task != "classification":
            raise InvalidOption(
                f"{what} is for models that classify, and the task of model {self.name!r} is "
                f"{self.task}; use POST /predict or POST /explain."
            )

    def replicate(self, *, folded: bool = False) -> nn.Module:
        """A copy of the master with shared parameters, and hooks and buffers of its own.

        The master itself if its copies behave differently (`Behaviour.isolated`).
        """
        if not self.behaviour.isolated:
            return self.module
        return replicate(self.folded.module if folded and self.folded else self.module)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the input: that of the first floating-point parameter."""
        return next(
            (p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32
        )

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def batch(self, images: Sequence[Tensor]) -> Tensor:
        """uint8 images (C, h, w) as one batch on the CPU, in pinned memory for a GPU."""
        if self.device.type != "cuda":
            return torch.stack(list(images))
        pinned = torch.empty(
            (len(images), *images[0].shape), dtype=images[0].dtype, pin_memory=True
        )
        return torch.stack(list(images), out=pinned)

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 (B, C, h, w) to the model's dtype on its device, as torchvision's presets do."""
        mean, std = (
            _on_each_channel(values, self.device)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        # As bytes: a quarter of the transfer that floats would need.
        batch = pixels.to(self.device, non_blocking=True).to(torch.float32).div_(255)
        batch = batch.sub_(mean).div_(std).to(self.dtype)
        return batch.to(memory_format=torch.channels_last) if self.channels_last else batch

    def outputs(self, module: nn.Module, pixels: Tensor) -> Any:
        """The output of a form of the module for normalised images (B, C, h, w)."""
        return module(list(pixels)) if self.takes_list else module(pixels)

    def logits(self, output: Any) -> Tensor:
        """The logits (batch, classes), float32, of an output of the module.

        For probabilities p, log p − log(1 − p); for one logit z and two labels, −z and z.
        """
        logits = logits_in(output, self.select)
        if self.behaviour.output_activation is not None:
            logits = as_logits(logits, self.behaviour.output_activation)
        return torch.cat([-logits, logits], dim=-1) if self.binary else logits

    def scores(self, logits: Tensor) -> Tensor:
        """Scores of logits (..., classes) by the model's output activation; `none`: the logits."""
        if self.output == "softmax":
            return logits.softmax(dim=-1)
        return logits.sigmoid() if self.output == "sigmoid" else logits

    @property
    def with_kernels(self) -> Mapping[str, Tensor]:
        """The kernels (out, in, …) of each layer that has some, by path."""
        parts = self.module.named_modules(remove_duplicate=False)
        weights = {path: kernel_weight(part) for path, part in parts if path}
        return {path: weight for path, weight in weights.items() if weight is not None}

    def layer(self, path: str) -> Layer:
        """The layer at a dotted path. Raises UnknownLayer with the nearest paths."""
        layer = self._by_path.get(path)
        if layer is not None:
            return layer
        raise UnknownLayer(
            f"Model {self.name!r} has no layer {path!r}.{nearest(path, self._by_path)} "
            f"GET /models/{self.name}/layers lists them all."
        )

    def weights_hardly_matter(self, method: str, layers: Sequence[str]) -> bool:
        """Whether the maps of a method hardly depend on the weights, as far as was measured.

        layers: of the explanation; the measurement is of the default target layer alone.
        """
        return method in self.insensitive and tuple(layers) in ((), (self.target_layer,))

    def target_layers(self, paths: Sequence[str]) -> tuple[str, ...]:
        """The layers of an explanation: the named ones, or the default.

        Raises UnknownLayer, and InvalidOption if a layer returns no feature map.
        """
        if not paths and self.default_layers:
            return self.default_layers
        if not paths:
            if self.target_layer is None:
                raise InvalidOption(
                    f"Model {self.name!r} has no layer that a map can be drawn from by default; "
                    "set `layer`, or configure `target_layer` for the model."
                )
            paths = (self.target_layer,)
        for path in paths:
            layer = self.layer(path)
            if path in self.scattered:
                raise InvalidOption(
                    f"No map can be drawn from layer {path!r}: the positions of its cells are "
                    f"not in rows and columns; see GET /models/{self.name}/layers for usable ones."
                )
            if layer.layout is None:
                gives = (
                    f"returns {layer.shape}"
                    if layer.shape
                    else "is not called or returns no tensor"
                )
                raise InvalidOption(
                    f"Layer {path!r} {gives}, not a feature map (channels, height, width) that a "
                    f"map can be drawn from; GET /models/{self.name}/layers shows usable ones."
                )
        return tuple(dict.fromkeys(paths))

    def finer_layers(self, paths: Sequence[str]) -> tuple[str, ...]:
        """The last layer before these of each finer grid, from the back; FINER of them at most."""
        found: dict[int, str] = {}
        if not paths:
            return ()
        first = min((self.layer(path) for path in paths), key=lambda layer: layer.share)
        cells = 0 if first.layout is None else math.prod(first.layout.grid)
        for layer in self.layers:
            if layer.layout is None or layer.share >= first.share or layer.path in self.scattered:
                continue
            if math.prod(layer.layout.grid) > cells and layer.calls == 1:
                found[math.prod(layer.layout.grid)] = layer.path
        return tuple(found[grid] for grid in sorted(found)[:FINER])

    def captured_layers(self, patterns: Sequence[str]) -> tuple[str, ...]:
        """The layers that match dotted paths and globs, in definition order.

        `*` and `?` stop at a dot, `**` crosses it, `type:Conv2d` matches the class.
        Raises UnknownLayer for a pattern without a match, InvalidOption for a layer that returns
        no tensor.
        """
        if not patterns:
            return ()
        chosen: set[str] = set()
        for name in patterns:
            if is_pattern(name) or name.startswith(_TYPE):
                continue
            if not self.layer(name).given:
                raise InvalidOption(
                    f"Layer {name!r} returns no tensor in a forward pass, so there is nothing to "
                    "record."
                )
            chosen.add(name)
        for pattern, paths in self._matching(patterns).items():
            if not paths:
                raise UnknownLayer(
                    f"No layer of model {self.name!r} matches {pattern!r}; "
                    f"GET /models/{self.name}/layers lists them all."
                )
            chosen |= paths
        return tuple(layer.path for layer in self.layers if layer.path in chosen)

    def _matching(self, patterns: Sequence[str]) -> Mapping[str, set[str]]:
        """The paths of the recordable layers that each glob and each type matches."""
        types = {name: set[str]() for name in patterns if name.startswith(_TYPE)}
        globs = {name: set[str]() for name in patterns if is_pattern(name) and name not in types}
        matcher = PathMatcher(list(globs))
        for layer in self.layers:
            if not layer.given:
                continue
            if (same := types.get(f"{_TYPE}{layer.type}")) is not None:
                same.add(layer.path)
            for paths, matches in zip(globs.values(), matcher.matches(layer.path), strict=True):
                if matches:
                    paths.add(layer.path)
        matches_by_pattern = types | globs
        return {name: matches_by_pattern[name] for name in patterns if name in matches_by_pattern}

    def activation_bytes(self, paths: Sequence[str], *, inputs: bool) -> int:
        """Bytes of the captures of these layers for one image, as float32, for all calls."""
        layers = (self.layer(path) for path in paths)
        shapes = chain.from_iterable(
            (layer.taken if inputs else layer.given).values() for layer in layers
        )
        return 4 * sum(map(math.prod, shapes))

    def class_id(self, target: str) -> int:
        """The class of an id (all digits, or `id:3`) or of an exact label (or `label:3`).

        Raises UnknownClass with the nearest labels, InvalidOption if a label names several classes,
        or if digits could be an id and a label.
        """
        kind, _, name = target.partition(":")
        ids = [index for index, label in enumerate(self.labels) if label == target]
        if target.isascii() and target.isdecimal():
            return self._class_of_digits(target, ids)
        if not ids and kind == "id" and name.isascii() and name.isdecimal():
            return self._class_of_digits(name, [])
        if not ids and kind == "label":
            target = name
            ids = [index for index, label in enumerate(self.labels) if label == target]
        if len(ids) > 1:
            raise InvalidOption(
                f"The label {target!r} names several classes: {', '.join(map(str, ids))}; "
                "give the id of one."
            )
        if not ids:
            raise UnknownClass(
                f"Model {self.name!r} has no class labelled {target!r}."
                f"{nearest(target, self.labels)} GET /models/{self.name} lists them all."
            )
        return ids[0]

    def _class_of_digits(self, digits: str, labelled: Sequence[int]) -> int:
        """The class of an id. labelled: the classes whose label has these digits."""
        others = [index for index in labelled if index != int(digits)]
        classes = f"class {', '.join(map(str, others))}"
        if int(digits) >= len(self.labels):
            hint = f" {digits!r} is the label of {classes}: label:{digits} means it."
            raise UnknownClass(
                f"Model {self.name!r} has no class {digits}; its ids are 0 to "
                f"{len(self.labels) - 1}.{hint if others else ''}"
            )
        if others:
            raise InvalidOption(
                f"{digits!r} is the id of the class labelled {self.labels[int(digits)]!r} and the "
                f"label of {classes}; write id:{digits} or label:{digits}."
            )
        return int(digits)


@lru_cache
def _on_each_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One number per channel, (C, 1, 1), cached: each transfer to a GPU would delay a batch."""
    return torch.tensor(values)[:, None, None].to(device)
