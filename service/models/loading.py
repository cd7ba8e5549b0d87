"""From a `ModelSpec` to a model that is ready to be replicated."""

from __future__ import annotations

import importlib
import importlib.resources
import math
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torchvision
from torch import nn

from service.errors import ConfigurationError, nearest
from service.images import Preprocessing
from service.models.builtin.network import flower_net
from service.models.catalog import BUILTIN, ModelSpec
from service.models.loaded import LoadedModel, Output, replicate
from service.models.probe import probe
from service.models.weights import Weights, classes_in, digest, labels_in, load_into, read_weights

DOWNLOAD_TIMEOUT = 10.0
"""Seconds that a connection to fetch torchvision's weights may stall."""


@dataclass(frozen=True, slots=True)
class _Built:
    """What a builder brings; None where the service's defaults hold."""

    module: nn.Module
    version: str
    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    target_layer: str | None = None
    random_weights: bool = False
    output: Output = "softmax"


def load_model(
    spec: ModelSpec, *, device: str = "cpu", allow_random_weights: bool = False
) -> LoadedModel:
    """Build, fill, freeze and try out one model.

    Raises ConfigurationError with a sentence that says what to change.
    """
    built = _build(spec, allow_random_weights)
    module = built.module.eval().requires_grad_(False).to(device)
    preprocessing = built.preprocessing or Preprocessing()
    height, width = preprocessing.crop
    try:
        tried = probe(replicate(module), torch.zeros(1, 3, height, width, device=device))
    except Exception as error:
        raise ConfigurationError(
            f"model {spec.name!r} cannot classify one RGB image of {width}×{height} pixels: {error}"
        ) from error
    labels = built.labels or _default_labels(tried.classes)
    if len(labels) != tried.classes:
        raise ConfigurationError(
            f"model {spec.name!r} has {tried.classes} classes and {len(labels)} labels; "
            "give it the labels of these weights."
        )
    mappable = [layer.path for layer in tried.layers if layer.target]
    if built.target_layer is not None and built.target_layer not in mappable:
        raise ConfigurationError(
            f"model {spec.name!r}: the `target_layer` of its weights file, {built.target_layer!r}, "
            f"is no layer that a map can be drawn from.{nearest(built.target_layer, mappable)}"
        )
    return LoadedModel(
        spec=spec,
        module=module,
        labels=labels,
        preprocessing=preprocessing,
        target_layer=built.target_layer or tried.target_layer,
        layers=tried.layers,
        version=built.version[:12],
        random_weights=built.random_weights,
        output=built.output,
    )


def _build(spec: ModelSpec, allow_random_weights: bool) -> _Built:
    if spec.builder == BUILTIN:
        return _build_builtin(spec)
    library, separator, name = spec.builder.partition("/")
    if separator and library == "torchvision":
        return _build_torchvision(spec, name, allow_random_weights)
    if not separator and ":" in spec.builder:
        return _build_function(spec)
    raise ConfigurationError(
        f"model {spec.name!r}: the builder {spec.builder!r} is none we know; use builtin, "
        "torchvision/NAME or package.module:function."
    )


def _build_builtin(spec: ModelSpec) -> _Built:
    file = importlib.resources.files("service.models.builtin") / "weights.safetensors"
    with importlib.resources.as_file(file) as path:
        weights = read_weights(spec.weights or path)
    labels = labels_in(weights.metadata)
    module = flower_net(len(labels) if labels else 5)
    return _filled(spec, module, weights, None)


def _build_torchvision(spec: ModelSpec, name: str, allow_random_weights: bool) -> _Built:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ConfigurationError(
            f"model {spec.name!r}: torchvision has no classifier {name!r}.{nearest(name, known)}"
        )
    entry = torchvision.models.get_model_weights(name).DEFAULT
    preprocessing, categories = _from_entry(entry)
    if spec.weights is not None:
        weights = read_weights(spec.weights)
        with torch.device("meta"):
            sketch = torchvision.models.get_model(name, weights=None, **_quiet(name))
        classes = classes_in(sketch, weights)
        module = torchvision.models.get_model(
            name, weights=None, num_classes=classes, **_quiet(name)
        )
        return _filled(spec, module, weights, categories if classes == len(categories) else None)
    if allow_random_weights:
        module = _randomised(
            lambda: torchvision.models.get_model(name, weights=None, **_quiet(name))
        )
        return _Built(
            module, digest(module.state_dict()), categories, preprocessing, random_weights=True
        )
    try:
        with _socket_timeout(DOWNLOAD_TIMEOUT):
            module = torchvision.models.get_model(name, weights=entry)
    except (OSError, RuntimeError) as error:  # RuntimeError: what came has another hash
        raise ConfigurationError(
            f"the weights of {spec.builder} are neither in the cache nor can they be fetched "
            f"({error}). Give a file: --model {spec.builder} --weights FILE (safetensors or a "
            "state dict), or try the machinery with CAMSERVE_ALLOW_RANDOM_WEIGHTS=true."
        ) from error
    return _Built(module, digest(module.state_dict()), categories, preprocessing)


def _build_function(spec: ModelSpec) -> _Built:
    module_name, _, function_name = spec.builder.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # an import runs code, which may raise anything
        raise ConfigurationError(
            f"model {spec.name!r}: cannot import {spec.builder!r} ({error}); --app-dir says where "
            "to import from."
        ) from error
    try:
        module = function()
    except Exception as error:
        raise ConfigurationError(
            f"model {spec.name!r}: {spec.builder}() raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigurationError(
            f"model {spec.name!r}: {spec.builder}() returned {type(module).__name__}, not a module."
        )
    if spec.weights is not None:
        return _filled(spec, module, read_weights(spec.weights), None)
    return _Built(module, digest(module.state_dict()))


def _filled(
    spec: ModelSpec,
    module: nn.Module,
    weights: Weights,
    labels: tuple[str, ...] | None,
) -> _Built:
    """Load a weights file; its metadata says how to feed the model, else the defaults hold."""
    load_into(module, weights, f"model {spec.name!r}: the weights file")
    return _Built(
        module,
        weights.sha256,
        labels_in(weights.metadata) or labels,
        _preprocessing_in(weights.metadata, Preprocessing()),
        weights.metadata.get("target_layer"),
        output=_output_in(weights.metadata),
    )


def _output_in(metadata: Mapping[str, str]) -> Output:
    said = metadata.get("output", "softmax")
    for known in get_args(Output):
        if said == known:
            return known  # type: ignore[no-any-return]
    raise ConfigurationError(
        f"the metadata `output` of the weights file is {said!r}; it takes softmax, sigmoid or none."
    )


def _preprocessing_in(metadata: Mapping[str, str], default: Preprocessing) -> Preprocessing:
    """`resize`, `crop`, `mean`, `std`, `interpolation` of a safetensors file, or the default's."""
    try:
        crop = [int(side) for side in metadata["crop"].split(",")] if "crop" in metadata else None
        found = Preprocessing(
            resize=int(metadata.get("resize", default.resize)),
            crop=(crop[0], crop[-1]) if crop else default.crop,
            mean=_floats(metadata["mean"]) if "mean" in metadata else default.mean,
            std=_floats(metadata["std"]) if "std" in metadata else default.std,
            interpolation=metadata.get("interpolation", default.interpolation),  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise ConfigurationError(
            f"the metadata of the weights file cannot be read: {error}"
        ) from error
    is_sound = (
        min(found.resize, *found.crop) > 0
        and (len(found.mean), len(found.std)) == (3, 3)
        and all(map(math.isfinite, (*found.mean, *found.std)))
        and 0 not in found.std
        and found.interpolation in ("bilinear", "bicubic", "nearest")
    )
    if not is_sound:
        raise ConfigurationError(
            "the metadata of the weights file must have `resize` and `crop` over 0, three numbers "
            "in `mean` and three in `std`, none of these 0, and `interpolation` bilinear, bicubic "
            "or nearest."
        )
    return found


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def _from_entry(entry: Any) -> tuple[Preprocessing, tuple[str, ...]]:
    """The evaluation transform and the labels of a torchvision weights entry."""
    transform = entry.transforms()
    return (
        Preprocessing(
            resize=transform.resize_size[0],
            crop=(transform.crop_size[0], transform.crop_size[0]),
            mean=tuple(transform.mean),
            std=tuple(transform.std),
            interpolation=transform.interpolation.value,
        ),
        tuple(entry.meta["categories"]),
    )


def _quiet(name: str) -> dict[str, Any]:
    # Both warn that their initialisation will change; here the weights follow anyway.
    return {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}


def _randomised(build: Callable[[], nn.Module]) -> nn.Module:
    """Seeded random weights, also where the architecture starts at zero, as some heads do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    parameter.normal_(std=0.02)
    return module


def _default_labels(classes: int) -> tuple[str, ...]:
    if classes == 1000:
        weights = torchvision.models.ResNet18_Weights.DEFAULT
        return tuple(weights.meta["categories"])
    return tuple(f"class {index}" for index in range(classes))


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """The download of torch.hub has no timeout: a silent network would hang the start."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
