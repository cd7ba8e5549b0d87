"""Load a classifier, detector or segmenter in Hugging Face's format: a folder, or the Hub's cache.

Weights are read from safetensors files alone, in float32, and no code of a repository runs.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import structlog
import torch
from torch import nn

from service.errors import ConfigurationError, first_line, install_hint
from service.images.decode import Preprocessing
from service.models.catalog import ModelSpec, Output, Task
from service.models.processors import UnsupportedProcessor, preprocessing_of

_log = structlog.get_logger(__name__)

PREFIX = "hf/"
"""The beginning of builders of this kind."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?")

_MADE_UP = re.compile(r"LABEL_\d+")
"""Names of classes that nobody named."""

_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)
"""What is fetched of a repository: no pickles, and no code."""

_OUTPUTS: dict[str, Output] = {"multi_label_classification": "sigmoid", "regression": "none"}

_AUTO: Mapping[Task, str] = MappingProxyType(
    {
        "classification": "Image Classification",
        "detection": "Object Detection",
        "segmentation": "Semantic Segmentation",
    }
)
"""The end of the names of transformers' Auto class and of the classes that it loads, in words."""

_SCORES: Mapping[str, Output] = MappingProxyType(
    {
        "detr": "softmax",
        "table-transformer": "softmax",
        "yolos": "softmax",
        "conditional_detr": "sigmoid",
        "d_fine": "sigmoid",
        "dab-detr": "sigmoid",
        "deformable_detr": "sigmoid",
        "deimv2": "sigmoid",
        "lw_detr": "sigmoid",
        "rf_detr": "sigmoid",
        "rt_detr": "sigmoid",
        "rt_detr_v2": "sigmoid",
    }
)
"""The activation of the class logits, as in `post_process_object_detection`, by type of detector.

With softmax the last logit is that of *no object*.
"""

SHOWN = 5
"""Number of keys that an error lists."""


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A model with what its configuration and its image processor say.

    labels:        one per class; None: the configuration has no names.
    preprocessing: None: the transform is set in models.toml.
    source:        where the preprocessing comes from, as shown to users.
    """

    module: nn.Module
    labels: tuple[str, ...] | None
    output: Output
    preprocessing: Preprocessing | None
    source: str
    task: Task


def read_pretrained(spec: ModelSpec, *, random_weights: bool) -> Pretrained:
    """The model of a builder `hf/ORG/NAME` or `hf/FOLDER`.

    random_weights: whether it is built from its configuration alone, seeded; nothing is fetched.

    Raises ConfigurationError.
    """
    _check_keys(spec)
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigurationError(
            f"{spec.at('builder')}: transformers is not installed; {install_hint('hf')}."
        ) from error
    folder = _folder(spec, fetch=not random_weights)
    with _quietly(library):
        config, task = _config(spec, library, folder)
        auto = getattr(library, f"AutoModel{_end(task)}")
        module = (_random if random_weights else _loaded)(spec, auto, folder, config)
        preprocessing, source = _preprocessing(spec, library, folder, module, task)
        if task != "classification" and preprocessing is not None:
            _run_once(module, (64, 64) if preprocessing.whole else preprocessing.crop)
    output = _OUTPUTS.get(config.problem_type or "", "softmax")
    if task == "detection":
        output = _SCORES[config.model_type]
    return Pretrained(module, _labels(config), output, preprocessing, source, task)


def local_folder(builder: str, base: Path = Path()) -> Path | None:
    """The folder of a builder; None if there is none. base: where a relative path starts."""
    if not builder.startswith(PREFIX):
        return None
    name = builder.removeprefix(PREFIX)
    folder = base / Path(name).expanduser()
    return folder if name and folder.is_dir() else None


def _check_keys(spec: ModelSpec) -> None:
    """Refuse keys that have no meaning for these models."""
    for key in ("weights", "arguments"):
        if getattr(spec, key):
            raise ConfigurationError(
                f"{spec.at(key)}: {PREFIX}… takes no `{key}`; its weights and its configuration "
                "are the files of its folder or repository."
            )
    if spec.revision is not None and local_folder(spec.builder):
        raise ConfigurationError(
            f"{spec.at('revision')}: {spec.builder} is a folder, which has no revisions; remove "
            "`revision`."
        )


def _folder(spec: ModelSpec, *, fetch: bool) -> Path:
    """The folder with the model's files: the user's own, or a snapshot in the cache of the Hub."""
    folder = local_folder(spec.builder)
    if folder is not None:
        return folder
    name = spec.builder.removeprefix(PREFIX)
    if not _REPOSITORY.fullmatch(name):
        raise ConfigurationError(
            f"{spec.at('builder')}: there is no folder {name!r}, and it is no name of a model on "
            "the Hugging Face Hub (ORG/NAME). Give a folder with config.json, "
            "preprocessor_config.json and model.safetensors, as save_pretrained() writes it."
        )
    hub = importlib.import_module("huggingface_hub")
    try:
        snapshot = hub.snapshot_download(
            name, revision=spec.revision, allow_patterns=list(_FILES), local_files_only=not fetch
        )
    except Exception as error:  # errors of HTTP, of the file system and of the Hub's client
        raise ConfigurationError(_not_available(spec, name, hub.constants, error, fetch)) from error
    return Path(snapshot)


def _not_available(
    spec: ModelSpec, name: str, constants: Any, error: Exception, fetch: bool
) -> str:
    at = f"revision {spec.revision!r} of {name}" if spec.revision else name
    why = f"it cannot be fetched from the Hugging Face Hub ({first_line(error)})"
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set, so nothing is fetched"
    elif not fetch:
        why = "with CAMSERVE_ALLOW_RANDOM_WEIGHTS nothing is fetched"
    return (
        f"{spec.at('builder')}: there is no folder {name!r}, {at} is not in the cache "
        f"{constants.HF_HUB_CACHE}, and {why}. Copy the cache of another machine and set HF_HOME "
        "or HF_HUB_CACHE, or give a folder that save_pretrained() wrote: --model hf/FOLDER."
    )


@contextmanager
def _quietly(library: Any) -> Iterator[None]:
    """Without transformers' progress bars and warnings: what matters becomes an error."""
    logging = library.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _config(spec: ModelSpec, library: Any, folder: Path) -> tuple[Any, Task]:
    """The configuration of a model, and its task. Raises ConfigurationError."""
    config = _read(spec, folder, library.AutoConfig.from_pretrained)
    task = _task(spec, library, folder, config)
    if getattr(config, "quantization_config", None) or (folder / "adapter_config.json").exists():
        raise ConfigurationError(
            f"{spec.at('builder')}: {folder} holds quantized weights or an adapter; save the "
            "whole model in float32 (an adapter: merge_and_unload() first)."
        )
    # Models return a mapping with `logits`, whatever a configuration asks for beside it.
    config.return_dict, config.output_hidden_states = True, False
    config.output_attentions = False
    config._attn_implementation = None  # a configuration may name code on the Hub
    return config, task


def _task(spec: ModelSpec, library: Any, folder: Path, config: Any) -> Task:
    """The task by the configuration's `architectures`. Raises ConfigurationError for any other.

    A backbone alone, or a configuration that names no class, is taken for a classifier: what its
    head lacks is in the error.
    """
    name, kind = str((config.architectures or [""])[0]), config.model_type
    named: list[Task] = [task for task in _AUTO if name.endswith(_end(task))]
    task: Task = named[0] if named else "classification"
    mapping = f"MODEL_FOR_{_AUTO[task].replace(' ', '_').upper()}_MAPPING_NAMES"
    known = getattr(library.models.auto.modeling_auto, mapping)
    if kind in known and (task != "detection" or kind in _SCORES):
        return task
    what = "no image classifier" if task == "classification" else f"no {task} model"
    raise ConfigurationError(
        f"{spec.at('builder')}: {folder} holds a {name or 'model'} of type {kind!r}, which is "
        f"{what} of transformers that is served. `architectures` in config.json must end with "
        f"{', '.join(map(_end, _AUTO))}; detectors are of the types {', '.join(sorted(_SCORES))}."
    )


def _end(task: Task) -> str:
    return f"For{_AUTO[task].replace(' ', '')}"


def _read(spec: ModelSpec, folder: Path, read: Any, **more: Any) -> Any:
    """Call one of transformers' `from_pretrained` on a folder. Raises ConfigurationError."""
    try:
        return read(folder, local_files_only=True, trust_remote_code=False, **more)
    except Exception as error:  # it raises many types for files it cannot use
        raise ConfigurationError(
            f"{spec.at('builder')}: {folder} cannot be loaded ({_reason(folder, error)}). "
            "Code of a repository never runs, and weights are read from safetensors alone."
        ) from error


def _reason(folder: Path, error: Exception) -> str:
    """Why a folder cannot be loaded."""
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        return (
            f"it has {pickles[0]} and no safetensors file; convert it with "
            "from_pretrained(…).save_pretrained(…)"
        )
    if not (folder / "config.json").exists():
        return "it has no config.json"
    return first_line(error)


def _loaded(spec: ModelSpec, auto: Any, folder: Path, config: Any) -> nn.Module:
    """The module with the weights of a folder. Raises ConfigurationError if any is missing."""
    module, report = _read(
        spec,
        folder,
        auto.from_pretrained,
        config=config,
        use_safetensors=True,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # all of them are in the report
        output_loading_info=True,
    )
    missing = sorted([*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])])
    if missing or report["error_msgs"]:
        raise ConfigurationError(
            f"{spec.at('builder')}: the weights in {folder} do not fill the model; missing: "
            f"{_first(missing or report['error_msgs'])}. It may be a backbone without a head, "
            "which needs fine-tuning before it can be served."
        )
    if report["unexpected_keys"]:
        _log.info(
            "weights_dropped", model=spec.name, keys=_first(sorted(report["unexpected_keys"]))
        )
    assert isinstance(module, nn.Module)
    return module


def _first(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{', '.join(keys[:SHOWN])}{more}"


def _random(spec: ModelSpec, auto: Any, folder: Path, config: Any) -> nn.Module:
    """The module of a configuration with seeded random weights."""
    config.dtype = "float32"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            module = auto.from_config(config)
        except Exception as error:
            raise ConfigurationError(
                f"{spec.at('builder')}: {folder} cannot be built ({first_line(error)})."
            ) from error
    assert isinstance(module, nn.Module)
    return module


def _labels(config: Any) -> tuple[str, ...] | None:
    """The names of the classes; None for the names that transformers makes up."""
    names = dict(config.id2label or {})
    labels = tuple(str(names.get(index, f"LABEL_{index}")) for index in range(len(names)))
    return None if all(map(_MADE_UP.fullmatch, labels)) else labels


def _preprocessing(
    spec: ModelSpec, library: Any, folder: Path, module: nn.Module, task: Task
) -> tuple[Preprocessing | None, str]:
    """The transform of the image processor, and where it comes from.

    If models.toml sets the whole transform, the processor may be missing or unsupported. Raises
    ConfigurationError otherwise.
    """
    try:
        processor = _processor(library, folder)
        preprocessing, swapped = preprocessing_of(processor, task)
        if swapped:
            _swap_colors(module, preprocessing.crop)
    except UnsupportedProcessor as error:
        size = spec.input.size
        if size and spec.input.mean and spec.input.std:
            whole = Preprocessing(resize=size, crop=size, fit="squash")
            return None if task == "classification" else whole, "the service's defaults"
        raise ConfigurationError(
            f"{spec.at('builder')}: {error}. Set the transform in models.toml: "
            "input = { size = …, resize = …, fit = …, mean = …, std = … }."
        ) from error
    return preprocessing, f"the {type(processor).__name__} of {spec.builder}"


def _processor(library: Any, folder: Path) -> Any:
    try:
        return library.AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, backend="torchvision"
        )
    except Exception as error:  # it raises many types for files it cannot use
        raise UnsupportedProcessor(
            f"the image processor in {folder} cannot be read ({first_line(error)})"
        ) from error


def _run_once(module: nn.Module, size: tuple[int, int]) -> None:
    """Have transformers set the hooks that collect feature maps, which it does in the first pass.

    Every copy of the module needs them: the pool removes hooks that a replica did not begin with.
    """
    with suppress(Exception), torch.no_grad():  # the probes say what is wrong
        module.eval()(torch.zeros(1, 3, *size))


def _swap_colors(module: nn.Module, size: tuple[int, int]) -> None:
    """Have a model for BGR images take RGB: its first convolution reads the channels in reverse.

    Raises UnsupportedProcessor if that is not the same model.
    """
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    module.eval()
    with torch.no_grad():
        expected = module(image).logits
        if first is not None and first.in_channels == 3 and first.groups == 1:
            first.weight.copy_(first.weight.flip(1))
        if not torch.allclose(module(image.flip(1)).logits, expected, atol=1e-4):
            raise UnsupportedProcessor(
                "the image processor has BGR channels, and the model does not begin with a "
                "convolution whose channels could be swapped"
            )
