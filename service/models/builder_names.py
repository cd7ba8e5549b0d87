"""What a builder that is none may have meant, as a sentence for the error."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import PurePath

from service.errors import nearest

_WEIGHTS = frozenset({".bin", ".ckpt", ".pkl", ".pickle", ".pt", ".pth", ".safetensors"})
_OTHER_FORMATS = frozenset(
    {".engine", ".h5", ".hdf5", ".keras", ".mar", ".mlmodel", ".onnx", ".pb", ".tflite", ".xml"}
)


def meant(builder: str, known: Callable[[], Collection[str]]) -> str:
    """Return a sentence with a leading space on what to write instead, or "".

    known: returns the names of torchvision's classifiers.
    """
    path, _, function = builder.partition(":")
    suffix = PurePath(builder).suffix.lower()
    if "://" in builder:
        return " Nothing is fetched from a URL: download the file, and write BUILDER@FILE."
    if "," in builder:
        return " Several models are several flags: --model A --model B."
    if suffix in _WEIGHTS:
        return (
            f" A weights file goes behind '@': torchvision/NAME@{_file_in(builder)}; in "
            "models.toml it is `weights`."
        )
    if suffix in _OTHER_FORMATS:
        return (
            f" camserve serves PyTorch models, not {suffix} files: give the builder of the model "
            "and its weights, BUILDER@FILE, as a state dict or safetensors."
        )
    if path.endswith(".py") or builder.endswith(":") or (function and "/" in path):
        module = path.removesuffix(".py").removeprefix("./").strip("/").replace("/", ".")
        return f" Did you mean '{module}:{function or 'FUNCTION'}'?"
    return _of_library(builder, known())


def _file_in(builder: str) -> str:
    """The file in `torchvision/resnet18:cats.pt` or `torchvision/resnet18=cats.pt`."""
    return builder.replace("=", ":").rpartition(":")[2]


def _of_library(builder: str, known: Collection[str]) -> str:
    """The nearest classifier of torchvision: its name alone, with dots, in other letters."""
    name = builder.replace(":", "/").replace(".", "/").rpartition("/")[2]
    name = name.lower().replace("-", "_")
    same = [each for each in known if each.replace("_", "") == name.replace("_", "")]
    close = nearest(name, ("builtin", *(same or known)))
    if not close and "." in builder and "/" not in builder and ":" not in builder:
        return f" Did you mean '{':'.join(builder.rsplit('.', 1))}'?"
    return re.sub(r"'(?!builtin')(\w+)'", r"'torchvision/\1'", close)
