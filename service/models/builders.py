"""Build the module of a `ModelSpec` with its weights, for each kind of builder."""

from __future__ import annotations

import importlib
import importlib.resources
import inspect
import math
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, get_args

import torch
import torchvision
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torchvision.transforms import _presets as presets

from service.errors import ConfigurationError, install_hint, nearest
from service.images.decode import Preprocessing
from service.models.builder_names import meant
from service.models.builtin.network import FlowerNet
from service.models.capabilities import unwrap_compiled
from service.models.catalog import (
    BUILTIN,
    ENTRY,
    Fit,
    Interpolation,
    ModelSpec,
    Output,
    Select,
    Task,
)
from service.models.functions import imported_function, signature_mismatch
from service.models.huggingface import read_pretrained
from service.models.weights.metadata import PREPROCESSING_KEYS, output_in, preprocessing_in
from service.models.weights.shapes import SKETCHED, classes_in, has_positions, image_size_in
from service.models.weights.weights_file import (
    Weights,
    digest,
    labels_in,
    load_into,
    read_weights,
    shapes_fit,
)

DOWNLOAD_TIMEOUT = 10.0
"""Timeout of a connection that fetches weights, in seconds."""


@dataclass(frozen=True, slots=True)
class Built:
    """A module and what its builder and weights say about it; None: the service's defaults apply.

    source: where the preprocessing comes from, as shown to users.
    """

    module: nn.Module
    version: str
    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    target_layer: str | None = None
    random_weights: bool = False
    output: Output = "softmax"
    select: Select = None
    source: str = "the service's defaults"
    task: Task | None = None


def build(spec: ModelSpec, allow_random_weights: bool) -> Built:
    """Build the module and load its weights. Raises ConfigurationError."""
    if spec.builder == BUILTIN:
        return _build_builtin(spec)
    library, separator, name = spec.builder.partition("/")
    if separator and library == "torchvision":
        return _build_torchvision(spec, name, allow_random_weights)
    if separator and library == "timm":
        return _build_timm(spec, name, allow_random_weights)
    if separator and library == "hf":
        return _build_huggingface(spec, allow_random_weights)
    if not separator and _FUNCTION.fullmatch(spec.builder):
        return _build_function(spec)
    raise ConfigurationError(
        f"{spec.at('builder')}: unknown builder {spec.builder!r}; use builtin, torchvision/NAME, "
        "timm/NAME, hf/ORG/NAME, hf/FOLDER or package.module:function."
        f"{meant(spec.builder, _torchvision_names)}"
    )


_FUNCTION = re.compile(r"(?!.*\.py:)[\w.-]+:\w+")
"""The form of `package.module:function`, without those of files such as `nets.py:build`."""


def _torchvision_names() -> list[str]:
    parts = (torchvision.models, torchvision.models.detection, torchvision.models.segmentation)
    return [name for part in parts for name in torchvision.models.list_models(module=part)]


def _build_builtin(spec: ModelSpec) -> Built:
    if spec.arguments:
        raise ConfigurationError(f"{spec.at('arguments')}: the built-in model takes no arguments.")
    file = importlib.resources.files("service.models.builtin") / "weights.safetensors"
    with importlib.resources.as_file(file) as path:
        weights = _weights(spec) if spec.weights else read_weights(path)
    labels = labels_in(weights.metadata)
    module = FlowerNet(len(labels) if labels else 5)
    return _filled(spec, module, weights)


def _build_torchvision(spec: ModelSpec, name: str, allow_random_weights: bool) -> Built:
    if name not in _torchvision_names():
        raise ConfigurationError(
            f"{spec.at('builder')}: torchvision has no model {name!r} that classifies, detects or "
            f"segments.{meant(name, _torchvision_names)}"
        )
    entry = _entry(spec, name)
    preprocessing, categories = _from_entry(entry)
    task = _task_of(entry)
    labels = None if "num_classes" in spec.arguments else categories

    def make(**more: Any) -> Any:
        arguments = _quiet(name, task) | dict(spec.arguments) | more
        return _called(spec, torchvision.models.get_model, name, **arguments)

    if spec.weights and not _names_entry(spec):
        return _torchvision_file(spec, name, make)
    if allow_random_weights:
        # A vision transformer is built for one image size: that of its input.
        side = (spec.input.size or (preprocessing or Preprocessing()).crop)[0]
        size = {"image_size": side} if name.startswith("vit_") else {}
        module = _randomised(lambda: make(weights=None, **(size | dict(spec.arguments))))
    else:
        with _fetching(spec):
            module = torchvision.models.get_model(name, weights=entry, **spec.arguments)
    return Built(
        module,
        digest(module.state_dict()),
        labels,
        preprocessing,
        random_weights=allow_random_weights,
        source=_of_entry(entry),
        task=task,
    )


def _torchvision_file(spec: ModelSpec, name: str, make: Callable[..., nn.Module]) -> Built:
    """Build a torchvision architecture with the weights of a file.

    Only a file that torchvision published has its labels: a user's own file with as many classes
    has other ones. The transform is that of the published weights, otherwise that of the
    architecture's default weights. Heads that exist only for training are omitted: those of a
    fine-tuned model often keep the classes of its pretrained weights.
    """
    weights = _weights(spec)
    defaults: dict[str, Any] = {"weights": None}
    if any("aux_classifier." in entry.name for entry in weights.entries):
        defaults |= {"aux_loss": True}
    if name in _WITH_AUX:  # as torchvision sets it for its pretrained weights
        defaults |= {"aux_logits": False, "transform_input": True}
    defaults = {key: value for key, value in defaults.items() if key not in spec.arguments}
    defaults |= _image_size(spec, weights, lambda: make(**defaults), "image_size")
    module = make(**defaults, **_classes(spec, weights, lambda **more: make(**defaults, **more)))
    entries = torchvision.models.get_model_weights(name)
    published = next(
        (candidate for candidate in entries if _is_of_url(weights, candidate.url)), None
    )
    entry = published or entries.DEFAULT
    preprocessing, labels = _from_entry(entry)
    source = _of_entry(entry)
    if isinstance(module, torchvision.models.VisionTransformer) and preprocessing is not None:
        preprocessing, source = _at_size(module.image_size, preprocessing, source)
    return _filled(
        spec,
        module,
        weights,
        labels if published else None,
        default=preprocessing,
        source=source,
        unused=_OF_AUX if "aux_logits" in defaults else None,
        task=_task_of(entry),
    )


def _task_of(entry: Any) -> Task:
    """The task of a torchvision weights entry, by its transform."""
    kind = entry.transforms.func if isinstance(entry.transforms, partial) else entry.transforms
    return _TASKS.get(kind, "classification")


_TASKS: Mapping[Any, Task] = {
    presets.ObjectDetection: "detection",
    presets.SemanticSegmentation: "segmentation",
}


def _of_entry(entry: Any) -> str:
    return f"torchvision's {entry}"


_WITH_AUX = ("googlenet", "inception_v3")

_OF_AUX = re.compile(r"(aux1|aux2|AuxLogits)\.")


def _is_of_url(weights: Weights, url: str) -> bool:
    """Whether a file is that of a URL, which contains the first digits of its sha256."""
    digits = re.search(r"-([0-9a-f]{8,})\.pth$", url)
    return digits is not None and weights.sha256.startswith(digits[1])


def _names_entry(spec: ModelSpec) -> bool:
    """Whether `weights` is the name of a weights entry of torchvision, such as IMAGENET1K_V1."""
    path = spec.weights
    return path is not None and bool(ENTRY.fullmatch(str(path))) and not path.exists()


def _entry(spec: ModelSpec, name: str) -> Any:
    entries = torchvision.models.get_model_weights(name)
    if not _names_entry(spec):
        return entries.DEFAULT
    entry_name = str(spec.weights)
    if entry_name not in entries.__members__:
        known = ", ".join(entries.__members__)
        raise ConfigurationError(
            f"{spec.at('weights')}: there is no file {entry_name}, and torchvision has no such "
            f"weights for {name}, only {known}."
        )
    return entries[entry_name]


def _build_timm(spec: ModelSpec, name: str, allow_random_weights: bool) -> Built:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ConfigurationError(
            f"{spec.at('builder')}: timm is not installed; {install_hint('timm')}."
        ) from error
    if not timm.is_model(name):
        known = [*timm.list_models(), *timm.list_pretrained()]
        raise ConfigurationError(
            f"{spec.at('builder')}: timm has no model {name!r}.{nearest(name, known)}"
        )

    def make(**more: Any) -> Any:
        return _called(spec, timm.create_model, name, **dict(spec.arguments) | more)

    if spec.weights is not None:
        weights = _weights(spec)
        size = _image_size(spec, weights, make, "img_size")
        module = make(**size, **_classes(spec, weights, lambda **more: make(**size, **more)))
        default, source = _timm_preprocessing(timm, module), f"timm's configuration of {name}"
        if size:
            default, source = _at_size(size["img_size"], default, source)
        return _filled(spec, module, weights, default=default, source=source)
    if allow_random_weights:
        module = _randomised(make)
    else:
        with _fetching(spec):
            module = timm.create_model(name, pretrained=True, **spec.arguments)
    return Built(
        module,
        digest(module.state_dict()),
        _of_imagenet(spec, timm, module),
        _timm_preprocessing(timm, module),
        random_weights=allow_random_weights,
        source=f"timm's configuration of {name}",
    )


def _of_imagenet(spec: ModelSpec, timm: Any, module: nn.Module) -> tuple[str, ...] | None:
    """The labels of ImageNet, if timm's weights have its 1,000 classes."""
    if "num_classes" in spec.arguments:
        return None
    if timm.data.infer_imagenet_subset(module) != "imagenet-1k":
        return None
    return tuple(torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"])


def _timm_preprocessing(timm: Any, module: nn.Module) -> Preprocessing:
    """The transform of timm's data configuration."""
    return preprocessing_of_timm(timm.data.resolve_model_data_config(module))


def preprocessing_of_timm(config: Mapping[str, Any]) -> Preprocessing:
    """The transform that `timm.data.create_transform` builds from a configuration.

    `crop_pct` is the crop's share of the resized sides; `crop_mode` is `center`, `squash` or
    `border`. Raises ConfigurationError for an unsupported interpolation.
    """
    _, height, width = config["input_size"]
    large = math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"])
    fit: Fit = _TIMM_FITS.get(config["crop_mode"], "crop")
    name = config["interpolation"]
    if name not in get_args(Interpolation):
        raise ConfigurationError(
            f"timm's configuration has the interpolation {name!r}, and this service supports "
            f"{', '.join(get_args(Interpolation))}; set `input.interpolation` in models.toml."
        )
    return Preprocessing(
        resize=large[0] if fit == "crop" and large[0] == large[1] else large,
        crop=(height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=name,
        fit=fit,
    )


_TIMM_FITS: Mapping[str, Fit] = {"center": "crop", "squash": "squash", "border": "pad"}


def _build_huggingface(spec: ModelSpec, allow_random_weights: bool) -> Built:
    read = read_pretrained(spec, random_weights=allow_random_weights)
    return Built(
        read.module,
        digest(read.module.state_dict()),
        read.labels,
        read.preprocessing,
        random_weights=allow_random_weights,
        output=read.output,
        select="logits",
        source=read.source,
        task=None if read.task == "classification" else read.task,
    )


def _build_function(spec: ModelSpec) -> Built:
    function = imported_function(spec)
    weights = None if spec.weights is None else _weights(spec)
    base = preprocessing_in({} if weights is None else weights.metadata, Preprocessing())

    def make(**more: Any) -> nn.Module:
        module = _called(spec, function, **dict(spec.arguments) | more)
        if not isinstance(module, nn.Module):
            raise ConfigurationError(
                f"{spec.at('builder')}: {spec.builder}() returned {type(module).__name__}, not a "
                "module."
            )
        return _completed(spec, unwrap_compiled(module, spec.name), base)

    if weights is None:
        module = make()
        return Built(module, digest(module.state_dict()))
    return _filled(spec, _with_classes(spec, function, weights, make), weights)


_CLASSES = ("num_classes", "n_classes", "nb_classes", "classes", "num_labels")
"""Common names of the parameter for the number of classes."""


def _with_classes(
    spec: ModelSpec, function: Callable[..., Any], weights: Weights, make: Callable[..., nn.Module]
) -> nn.Module:
    """The module with the number of classes of its weights, if the function has a parameter."""
    taken = _parameters(function)
    name = next((candidate for candidate in _CLASSES if candidate in taken), None)
    if name is None or name in spec.arguments:
        return make()
    if taken[name].default is not inspect.Parameter.empty:
        module = make()
        if shapes_fit(module, weights, _source(spec)):
            return module
    try:
        classes = _classes(spec, weights, make, name)
    except ConfigurationError:  # reported when the weights are loaded
        classes = {}
    return make(**classes)


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a built-in
        return {}


def _completed(spec: ModelSpec, module: nn.Module, base: Preprocessing) -> nn.Module:
    """Initialize the lazy layers of a module with one forward pass.

    base: the preprocessing in the weights file. Raises ConfigurationError if the pass fails.
    """
    lazy = (UninitializedParameter, UninitializedBuffer)
    if not any(isinstance(tensor, lazy) for tensor in chain(module.parameters(), module.buffers())):
        return module
    input_spec = spec.input
    lengths = [
        len(values) for values in (input_spec.mean or (), input_spec.std or ()) if len(values) > 1
    ]
    shape = (
        input_spec.channels or max(lengths, default=base.channels),
        *(input_spec.size or base.crop),
    )
    try:
        with torch.no_grad():
            module.eval()(torch.zeros(1, *shape))
    except Exception as error:  # the user's model may raise anything
        raise ConfigurationError(
            f"{spec.at('builder')} has lazy layers, which an image initializes, and one of "
            f"{'×'.join(map(str, shape))} fails ({error}); set `input.size` and `input.channels`."
        ) from error
    return module


def _called(spec: ModelSpec, function: Callable[..., Any], /, *names: str, **arguments: Any) -> Any:
    """Call a builder; any exception becomes a ConfigurationError."""
    try:
        return function(*names, **arguments)
    except Exception as error:
        raise ConfigurationError(
            f"{spec.at('builder')}: {spec.builder}() raised {type(error).__name__}: {error}"
            f"{'' if names else signature_mismatch(function, arguments)}"
        ) from error


def _weights(spec: ModelSpec) -> Weights:
    assert spec.weights is not None
    where = spec.source and spec.at("weights")
    return read_weights(spec.weights, spec.sha256, where, spec.weights_key)


def _source(spec: ModelSpec) -> str:
    """The beginning of an error about the contents of the weights file."""
    return f"{spec.at('weights')}: the weights file"


def _classes(
    spec: ModelSpec, weights: Weights, make: Callable[..., nn.Module], name: str = "num_classes"
) -> dict[str, int]:
    """The argument for the number of classes in the weights file; empty if the user sets it.

    make: builds the module; takes the number of classes as the argument `name`.
    """
    if name in spec.arguments:
        return {}
    with torch.device("meta"):
        sketches = make(**{name: SKETCHED[0]}), make(**{name: SKETCHED[1]})
    count = classes_in(sketches, weights, _source(spec))
    return {} if count is None else {name: count}


def _image_size(
    spec: ModelSpec, weights: Weights, make: Callable[[], nn.Module], name: str
) -> dict[str, int]:
    """The argument for the image size of the weights file; empty where it is given or the default.

    name: the argument that takes the side of a square image in pixels.
    """
    if name in spec.arguments or not has_positions(weights):
        return {}
    with torch.device("meta"):
        sketch = make()
    size = image_size_in(sketch, weights, _source(spec))
    return {} if size is None else {name: size}


def _at_size(side: int, preprocessing: Preprocessing, source: str) -> tuple[Preprocessing, str]:
    """A transform that ends in square images of one size, without a margin; and its source."""
    if preprocessing.crop == (side, side):
        return preprocessing, source
    return (
        replace(preprocessing, resize=side, crop=(side, side)),
        f"resize and crop from the position embedding, else {source}",
    )


def _filled(
    spec: ModelSpec,
    module: nn.Module,
    weights: Weights,
    labels: tuple[str, ...] | None = None,
    *,
    default: Preprocessing | None = None,
    source: str = "the service's defaults",
    unused: re.Pattern[str] | None = None,
    task: Task | None = None,
) -> Built:
    """Load a weights file; its metadata takes precedence over the given defaults.

    unused: matches keys of parts that the module was built without.
    """
    load_into(module, weights, _source(spec), unused.match if unused else None)
    keys = [key for key in PREPROCESSING_KEYS if key in weights.metadata]
    return Built(
        module,
        weights.version,
        labels_in(weights.metadata) or labels,
        preprocessing_in(weights.metadata, default or Preprocessing()),
        weights.metadata.get("target_layer"),
        output=output_in(weights.metadata),
        source=source if not keys else f"{', '.join(keys)} from the weights file, else {source}",
        task=task,
    )


def _from_entry(entry: Any) -> tuple[Preprocessing | None, tuple[str, ...]]:
    """The evaluation transform and the labels of a torchvision weights entry.

    A detector resizes and normalizes images itself; its transform is None.
    """
    transform = entry.transforms()
    if isinstance(transform, presets.ObjectDetection):
        return None, tuple(entry.meta["categories"])
    if isinstance(transform, presets.SemanticSegmentation):
        (side,) = transform.resize_size
        preprocessing = Preprocessing(
            resize=side,
            crop=(side, side),
            mean=tuple(transform.mean),
            std=tuple(transform.std),
            interpolation=transform.interpolation.value,
        )
        return preprocessing, tuple(entry.meta["categories"])
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


def _quiet(name: str, task: Task) -> dict[str, Any]:
    if task != "classification":  # its backbone's weights are in its own file, or fetched with them
        return {"weights_backbone": None}
    # Both warn that their initialisation will change; the weights are replaced anyway.
    return {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}


def _randomised(make: Callable[[], nn.Module]) -> nn.Module:
    """Build a module with seeded random weights, also where the initial weights are all zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make()
        with torch.no_grad():
            for path, parameter in module.named_parameters():
                is_weight = parameter.ndim > 1 or path.endswith("weight")  # of a norm
                if is_weight and not parameter.any():
                    parameter.normal_(std=0.02)
    return module


@contextmanager
def _fetching(spec: ModelSpec) -> Iterator[None]:
    """Fetch weights with a timeout; any exception becomes a ConfigurationError."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch.hub has no timeout
    try:
        yield
    except Exception as error:  # each hub has exceptions of its own
        raise ConfigurationError(
            f"{spec.at('weights')}: the weights of {spec.builder} are neither in the cache nor can "
            f"they be fetched ({error}). Give a file: --model {spec.builder} --weights FILE "
            "(safetensors or a state dict), or test the service with random weights: "
            "CAMSERVE_ALLOW_RANDOM_WEIGHTS=true."
        ) from error
    finally:
        socket.setdefaulttimeout(before)
