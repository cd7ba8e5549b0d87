"""What can be served: the description of a model before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from service.errors import ConfigurationError

BUILTIN = "builtin"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ENTRY = re.compile(r"[A-Z][A-Z0-9_]*")
"""What torchvision calls its weights, such as IMAGENET1K_V1."""

Output = Literal["softmax", "sigmoid", "none"]
Dtype = Literal["float32", "float16", "bfloat16"]
Floating = Literal["float32", "bf16"]
"""What a front can be computed in; `bf16`, torch.bfloat16, keeps 8 bits of each number's digits."""
Interpolation = Literal["bilinear", "bicubic", "nearest"]
Fit = Literal["crop", "squash", "pad"]
Select = int | str | None
"""Which element of a tuple (by place) or of a dict or dataclass (by key) holds the logits."""

TARGET_LAYERS: Mapping[str, str] = {
    # Behind their last convolution come poolings, or a convolution that is the classifier.
    "alexnet": "features.-2",
    "squeezenet": "features.-1",
    "vgg": "features.-2",
}
"""Where the rule of `probe` would be ambiguous: the layer by family (the builder's name up to where
sizes begin). A negative number counts the children from the last."""


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What is said about a model's input; None leaves it to the weights file, then the builder.

    size:     (height, width) of the model input. resize: the shorter side before the crop, or the
              (height, width) to cover.
    fit:      how the model was trained to see whole images.
    mean, std: one number a channel, or a single one for all of them, of values in 0..1.
    channels: 3 is RGB, 1 grey; any other number is that of a TIFF's pages.
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
    """One model to serve. What is None is left to the weights file, then to the builder.

    name:      what requests call it.
    builder:   `builtin`, `torchvision/<name>`, `timm/<name>`, or `package.module:function` that
               returns a module; it is called with `arguments`.
    weights:   a safetensors file, a state dict, or the name of a torchvision weights entry; None
               takes what the builder brings (torchvision: its default weights, from its cache or
               the network).
    sha256:    what the weights file must have.
    weights_key: names in front of the weights in that file, where several fit.
    labels:    one a class.
    output:    how scores come from logits. select: where the logits are in what the model returns.
    precision: of its front; None: that of the service.
    int8:      a folder that `camserve calibrate` made of this model: its front is served from it.
    source:    where this was said, such as `models.toml: model[1]`; for errors.
    """

    name: str
    builder: str
    weights: Path | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    sha256: str | None = None
    weights_key: str | None = None
    labels: tuple[str, ...] | None = None
    input: InputSpec = InputSpec()
    output: Output | None = None
    select: Select = None
    target_layer: str | None = None
    device: str | None = None
    dtype: Dtype | None = None
    precision: Floating | None = None
    int8: Path | None = None
    source: str | None = None

    def at(self, key: str) -> str:
        """How an error about one of the keys begins."""
        model = f"model {self.name!r}"
        return f"{self.source}.{key}: {model}" if self.source else model


def parse_model(argument: str) -> ModelSpec:
    """Read `[NAME=]BUILDER[@WEIGHTS]`, the form of `--model`.

    NAME defaults to the part of BUILDER after its last `/` or `:`.

    Raises ConfigurationError where the form or the name is wrong.
    """
    name, separator, rest = argument.partition("=")
    if not separator or "@" in name:  # the path of the weights may hold a "=" too
        name, rest = "", argument
    builder, at, weights = rest.partition("@")
    name = name or re.split(r"[/:]", builder)[-1]
    if not builder or not NAME.fullmatch(name) or (at and not weights):
        raise ConfigurationError(
            f"--model {argument!r} is not [NAME=]BUILDER[@WEIGHTS], for instance "
            "torchvision/resnet50 or cats=torchvision/resnet18@cats.safetensors; a name "
            "consists of letters, digits, '.', '_' and '-'."
        )
    return ModelSpec(name, builder, Path(weights) if weights else None)


def parse_models(arguments: Sequence[str], weights: Path | None = None) -> tuple[ModelSpec, ...]:
    """Read every `--model`; none at all means the built-in model.

    weights: the file of `--weights`, allowed where exactly one model is named.

    Raises ConfigurationError for a name given twice or `weights` beside several models.
    """
    specs = [parse_model(argument) for argument in arguments or (BUILTIN,)]
    check_names(specs)
    if weights is not None:
        if len(specs) != 1 or specs[0].weights is not None:
            raise ConfigurationError(
                "--weights needs exactly one --model without '@'; with several models write "
                "--model BUILDER@WEIGHTS for each."
            )
        specs = [replace(specs[0], weights=weights)]
    return tuple(specs)


def with_int8(specs: Sequence[ModelSpec], said: Sequence[str]) -> tuple[ModelSpec, ...]:
    """The models with the int8 fronts that `NAME=FOLDER` name. Raises ConfigurationError."""
    folders: dict[str, Path] = {}
    for each in said:
        name, separator, folder = each.partition("=")
        if not separator or not folder or name not in {spec.name for spec in specs}:
            known = ", ".join(spec.name for spec in specs)
            raise ConfigurationError(
                f"--int8 {each!r} is not NAME=FOLDER with the name of a served model ({known})."
            )
        folders[name] = Path(folder)
    return tuple(
        replace(spec, int8=folders[spec.name]) if spec.name in folders else spec for spec in specs
    )


def check_names(specs: Iterable[ModelSpec]) -> None:
    """Raise ConfigurationError where two models have one name, with where each was named."""
    seen: dict[str, ModelSpec] = {}
    for spec in specs:
        other = seen.setdefault(spec.name, spec)
        if other is not spec:
            where = " and ".join(each.source or "--model" for each in (other, spec))
            raise ConfigurationError(
                f"two models are called {spec.name!r} ({where}); rename one: "
                "--model NAME=BUILDER, or `name` in the file."
            )
