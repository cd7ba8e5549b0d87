"""What can be served: the description of a model before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from service.errors import ConfigurationError

BUILTIN = "builtin"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model to serve.

    name:    what requests call it.
    builder: `builtin`, `torchvision/<name>`, or `package.module:function` that returns a module.
    weights: a safetensors file or a state dict; None takes what the builder brings (torchvision:
             its default weights, from its cache or the network).
    """

    name: str
    builder: str
    weights: Path | None = None


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
    if not builder or not _NAME.fullmatch(name) or (at and not weights):
        raise ConfigurationError(
            f"--model {argument!r} is not [NAME=]BUILDER[@WEIGHTS], for instance "
            "torchvision/resnet50 or cats=torchvision/resnet18@cats.safetensors; a name is made "
            "of letters, digits, '.', '_' and '-'."
        )
    return ModelSpec(name, builder, Path(weights) if weights else None)


def parse_models(arguments: Sequence[str], weights: Path | None = None) -> tuple[ModelSpec, ...]:
    """Read every `--model`; none at all means the built-in model.

    weights: the file of `--weights`, allowed where exactly one model is named.

    Raises ConfigurationError for a name given twice or `weights` beside several models.
    """
    specs = [parse_model(argument) for argument in arguments or (BUILTIN,)]
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(
                f"two models are called {name!r}; give one another name: --model NAME=BUILDER."
            )
    if weights is not None:
        if len(specs) != 1 or specs[0].weights is not None:
            raise ConfigurationError(
                "--weights needs exactly one --model without '@'; with several models write "
                "--model BUILDER@WEIGHTS for each."
            )
        specs = [ModelSpec(specs[0].name, specs[0].builder, weights)]
    return tuple(specs)
