"""The configuration of a model, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from service.errors import ConfigurationError, nearest
from service.models.builder_names import meant

BUILTIN = "builtin"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ENTRY = re.compile(r"[A-Z][A-Z0-9_]*")
"""The form of torchvision's names of weights, such as IMAGENET1K_V1."""

Output = Literal["softmax", "sigmoid", "none"]
Task = Literal["classification", "detection", "segmentation"]
Dtype = Literal["float32", "float16", "bfloat16"]
Floating = Literal["float32", "bf16"]
"""Precision of a front; `bf16` is torch.bfloat16, with 8 significant bits."""
Interpolation = Literal["bilinear", "bicubic", "nearest"]
Fit = Literal["crop", "squash", "pad"]
Select = int | str | None
"""Which element of a tuple (by index), dict or dataclass (by key) holds the logits."""

TARGET_LAYERS: Mapping[str, str] = {
    # Their last convolution is followed by pooling, or is the classifier.
    "alexnet": "features.-2",
    "squeezenet": "features.-1",
    "vgg": "features.-2",
}
"""Target layers of families for which `default_target` is ambiguous, by the beginning of the
builder's name. A negative number counts the children from the last."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The configured input of a model; None: as in the weights file, then as in the builder.

    size:     (height, width) of the model input. resize: the shorter side before the crop, or the
              (height, width) to cover.
    fit:      how the model was trained to see whole images.
    mean, std: one number per channel, or one for all channels, for values in 0..1.
    channels: 3: RGB; 1: greyscale; any other number: the pages of a TIFF.
    """

    size: tuple[int, int] | None = None
    resize: int | tuple[int, int] | None = None
    interpolation: Interpolation | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: int | None = None
    fit: Fit | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The configuration of one model. None: as in the weights file, then as in the builder.

    name:      the name in requests.
    builder:   `builtin`, `torchvision/<name>`, `timm/<name>`, `hf/<repository or folder>`, or
               `package.module:function` that returns a module and is called with `arguments`.
    revision:  commit, tag or branch of a repository of the Hugging Face Hub; None: its newest.
    weights:   a safetensors file, a state dict, or the name of a torchvision weights entry; None:
               those of the builder (torchvision: its default weights, from its cache or the
               network).
    sha256:    the expected digest of the weights file.
    weights_key: prefix of the weights in that file, if several fit.
    labels:    one per class.
    output:    the activation that turns logits into scores. select: where the logits are in the
               output of the model.
    task:      what the model predicts; None: as its output shows.
    precision: of its front; None: that of the service.
    int8:      a folder that `camserve calibrate` wrote for this model: its front is read from it.
    source:    where the model is configured, such as `models.toml: model[1]`; for errors.
    app_dir:   the folder that `package.module:function` is imported from; None: only
               from `sys.path`.
    """

    name: str
    builder: str
    weights: Path | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    revision: str | None = None
    sha256: str | None = None
    weights_key: str | None = None
    labels: tuple[str, ...] | None = None
    input: InputSpec = InputSpec()
    output: Output | None = None
    select: Select = None
    target_layer: str | None = None
    task: Task | None = None
    device: str | None = None
    dtype: Dtype | None = None
    precision: Floating | None = None
    int8: Path | None = None
    source: str | None = None
    app_dir: Path | None = None

    def at(self, key: str) -> str:
        """The beginning of an error about one of the keys."""
        model = f"model {self.name!r}"
        return f"{self.source}.{key}: {model}" if self.source else model


def parse_model(argument: str) -> ModelSpec:
    """Read `[NAME=]BUILDER[@WEIGHTS]`, the form of `--model`.

    NAME defaults to the part of BUILDER after its last `/` or `:`.

    Raises ConfigurationError if the form or the name is invalid.
    """
    name, separator, rest = argument.partition("=")
    if not separator or "@" in name or "/" in name:  # paths may contain a "=", too
        name, rest = "", argument
    builder, at, weights = rest.partition("@")
    name = name or re.split(r"[/:]", builder.rstrip("/"))[-1]
    if not builder or not NAME.fullmatch(name) or (at and not weights):
        raise ConfigurationError(
            f"--model {argument!r} is not [NAME=]BUILDER[@WEIGHTS], for instance "
            "torchvision/resnet50 or cats=torchvision/resnet18@cats.safetensors; a name "
            f"consists of letters, digits, '.', '_' and '-'.{meant(argument, tuple)}"
        )
    return ModelSpec(name, builder, Path(weights) if weights else None)


def parse_models(
    arguments: Sequence[str], weights: Path | None = None, configured: Sequence[ModelSpec] = ()
) -> tuple[ModelSpec, ...]:
    """Read every `--model`; without any, and without a file, the built-in model.

    weights: the file of `--weights`, allowed if exactly one model is named.
    configured: the models of models.toml. An argument that is the name of one of them selects it:
    of the file, only selected models are served. Without such an argument all of them are.

    Raises ConfigurationError for a duplicate name, for `weights` with several models, and for an
    argument that is neither the name of a model nor a builder.
    """
    by_name = {spec.name: spec for spec in configured}
    given = arguments or (() if configured else (BUILTIN,))
    read = [by_name.get(argument) or _parsed(argument, by_name) for argument in given]
    named = _with_weights(read or configured, weights)
    selects = not given or any(argument in by_name for argument in given)
    specs = named if selects else [*configured, *named]
    check_names(specs)
    return tuple(specs)


def _parsed(argument: str, names: Collection[str]) -> ModelSpec:
    """Read one `--model` that is not one of the configured names."""
    if names and argument != BUILTIN and not set("/:=@.") & set(argument):
        raise ConfigurationError(
            f"--model {argument!r} is neither a model of the configuration ({', '.join(names)}) "
            f"nor [NAME=]BUILDER[@WEIGHTS].{nearest(argument, names)}"
        )
    return parse_model(argument)


def _with_weights(specs: Sequence[ModelSpec], weights: Path | None) -> Sequence[ModelSpec]:
    if weights is None:
        return specs
    if len(specs) != 1 or specs[0].weights is not None:
        raise ConfigurationError(
            f"--weights {weights} needs exactly one --model without weights, and there are "
            f"{', '.join(spec.name for spec in specs)}; with several models write "
            "--model BUILDER@WEIGHTS for each."
        )
    return [replace(specs[0], weights=weights)]


def with_int8(specs: Sequence[ModelSpec], arguments: Sequence[str]) -> tuple[ModelSpec, ...]:
    """The models with the int8 fronts of `NAME=FOLDER` arguments. Raises ConfigurationError."""
    folders: dict[str, Path] = {}
    for argument in arguments:
        name, separator, folder = argument.partition("=")
        if not separator or not folder or name not in {spec.name for spec in specs}:
            known = ", ".join(spec.name for spec in specs)
            raise ConfigurationError(
                f"--int8 {argument!r} is not NAME=FOLDER with the name of a served model ({known})."
            )
        folders[name] = Path(folder)
    return tuple(
        replace(spec, int8=folders[spec.name]) if spec.name in folders else spec for spec in specs
    )


def check_names(specs: Iterable[ModelSpec]) -> None:
    """Raise ConfigurationError if two models have the same name; the error says where."""
    seen: dict[str, ModelSpec] = {}
    for spec in specs:
        other = seen.setdefault(spec.name, spec)
        if other is not spec:
            where = " and ".join(named.source or "--model" for named in (other, spec))
            raise ConfigurationError(
                f"two models are called {spec.name!r} ({where}); rename one: "
                "--model NAME=BUILDER, or `name` in the file."
            )
