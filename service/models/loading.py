"""From a `ModelSpec` to a model that is ready to be replicated.

What the spec says goes before what the weights file says, and that before what the builder says.
"""

from __future__ import annotations

from dataclasses import replace

import structlog
import torch
import torchvision
from torch import Tensor, nn

from service.errors import ConfigurationError, nearest
from service.images import Preprocessing
from service.models.builders import Built, build
from service.models.catalog import TARGET_LAYERS, ModelSpec
from service.models.condition import parts_of
from service.models.eager import why_no_gradients, why_no_layers
from service.models.folding import fold
from service.models.lane import Compiler
from service.models.loaded import LoadedModel
from service.models.probe import Probe, probe
from service.models.replicas import replicate
from service.models.settling import settle
from service.models.torch_state import kept_torch_state

_log = structlog.get_logger(__name__)

GREY = ((0.449,), (0.226,))
"""Mean and standard deviation of ImageNet in grey, where a model of one channel says none."""


def load_model(
    spec: ModelSpec,
    *,
    device: str = "cpu",
    allow_random_weights: bool = False,
    compiler: Compiler | None = None,
) -> LoadedModel:
    """Build, fill, freeze, try out and tune one model.

    compiler: makes the compiled lane; without it there is none.

    Raises ConfigurationError with a sentence that says what to change.
    """
    if device.startswith("cuda"):
        # float32 in a request's answer means float32: torch's convolutions would round to TF32.
        torch.backends.cudnn.allow_tf32 = False
    built = build(spec, allow_random_weights)
    module = _outside_inference_mode(built.module).eval().requires_grad_(False).to(device)
    if spec.dtype is not None:
        module = module.to(getattr(torch, spec.dtype))
    preprocessing = _preprocessing(spec, built.preprocessing or Preprocessing())
    model = LoadedModel(
        spec=spec,
        module=module,
        labels=(),
        preprocessing=preprocessing,
        target_layer=None,
        layers=(),
        version=built.version[:12],
        random_weights=built.random_weights,
        output=spec.output or built.output,
        select=spec.select,
    )
    height, width = preprocessing.crop
    image = torch.zeros(1, preprocessing.channels, height, width, device=device, dtype=model.dtype)
    tried = _tried(model, image)
    target = _target_layer(spec, built, tried)
    no_layers = why_no_layers(module)
    return _tuned(
        replace(
            model,
            labels=_labels(spec, built, tried.classes),
            target_layer=target,
            layers=tried.layers,
            no_layers=no_layers,
            no_gradients=why_no_gradients(replicate(module), image, target, spec.select),
        ),
        torch.rand(image.shape, generator=torch.Generator().manual_seed(0)).to(image),
        compiler,
    )


def _outside_inference_mode(module: nn.Module) -> nn.Module:
    """Copy tensors that were made in inference mode: no gradient passes them."""
    copies: dict[int, Tensor] = {}
    for _, each in parts_of(module):
        for kind in ("_parameters", "_buffers"):
            table = vars(each).get(kind, {})
            for name, tensor in list(table.items()):
                if tensor is None or not tensor.is_inference():
                    continue
                if id(tensor) not in copies:
                    copy = tensor.clone()
                    copies[id(tensor)] = nn.Parameter(copy) if kind == "_parameters" else copy
                table[name] = copies[id(tensor)]
    return module


def _tuned(model: LoadedModel, image: Tensor, compiler: Compiler | None) -> LoadedModel:
    """The model in its fastest forms that give the same numbers. image: normalised (1, C, h, w)."""
    if model.no_layers or model.no_gradients:  # scripted or quantised: as it was made
        stateful = _settled(model, model.module, image)
        reason = model.no_layers or model.no_gradients
        return replace(model, not_compiled=reason, stateful=stateful)
    with kept_torch_state(random=False), torch.no_grad():
        expected = model.logits(model.replicate()(image))
    model.module.to(memory_format=torch.channels_last)
    channels_last = _gives(expected, model, model.replicate(), image)
    if not channels_last:  # a `view` of what has its channels last
        model.module.to(memory_format=torch.contiguous_format)
    folded = fold(model.replicate())
    if folded is not None and not _gives(expected, model, replicate(folded.module), image):
        folded = None
    # Behind everything that converts modules: some drop what they computed then.
    modules = [model.module] if folded is None else [model.module, folded.module]
    found = {fault for module in modules for fault in _settled(model, module, image)}
    model = replace(
        model, channels_last=channels_last, folded=folded, stateful=tuple(sorted(found))
    )
    if compiler is None:
        return replace(model, not_compiled="Compiling is switched off.")
    return compiler.compiled(model)


def _gives(logits: Tensor, model: LoadedModel, module: nn.Module, image: Tensor) -> bool:
    """Whether a form of the model gives the same logits, to rounding."""
    try:
        with kept_torch_state(random=False), torch.no_grad():
            found = model.logits(module(image))
    except RuntimeError:
        return False
    largest = float(logits.abs().max())
    return bool(torch.allclose(logits, found, rtol=0, atol=1e-3 * largest))


def _tried(model: LoadedModel, image: Tensor) -> Probe:
    """Run the model once on a black picture."""
    spec, (channels, height, width) = model.spec, tuple(image.shape[1:])
    try:
        with kept_torch_state(random=False):
            return probe(model.replicate(), image, spec.select)
    except Exception as error:
        what = "RGB image" if channels == 3 else f"image of {channels} channels"
        precision = f" in {spec.dtype} on {image.device.type}" if spec.dtype else ""
        hint = ""
        if "required positional argument" in str(error):
            hint = "; a model is served where its forward() needs one tensor of images alone"
        raise ConfigurationError(
            f"{spec.at('builder')} cannot classify one {what} of {width}×{height} pixels"
            f"{precision}: {error}{hint}"
        ) from error


def _settled(model: LoadedModel, module: nn.Module, image: Tensor) -> tuple[str, ...]:
    """What a form of the model changes at every call. Raises ConfigurationError for parameters."""
    try:
        found = settle(module, image)
    except ConfigurationError as error:
        raise ConfigurationError(f"{model.spec.at('builder')}: {error}.") from error
    if found:
        _log.info("model_keeps_state", model=model.name, state=found)
    return found


def _labels(spec: ModelSpec, built: Built, classes: int) -> tuple[str, ...]:
    labels = spec.labels or built.labels or _default_labels(classes)
    if len(labels) != classes:
        raise ConfigurationError(
            f"{spec.at('labels')} has {classes} classes and {len(labels)} labels; "
            "give it the labels of these weights, one a class."
        )
    return labels


def _default_labels(classes: int) -> tuple[str, ...]:
    if classes == 1000:
        weights = torchvision.models.ResNet18_Weights.DEFAULT
        return tuple(weights.meta["categories"])
    return tuple(f"class {index}" for index in range(classes))


def _target_layer(spec: ModelSpec, built: Built, tried: Probe) -> str | None:
    """The layer that was said, else that of the family's table, else what the probe's rule finds.

    Raises ConfigurationError where no map can be drawn from the layer that was said.
    """
    mappable = [layer.path for layer in tried.layers if layer.target]
    said = spec.target_layer or built.target_layer
    if said is None:
        of_family = _of_family(spec.builder, built.module)
        return of_family if of_family in mappable else tried.target_layer
    if said not in mappable:
        whose = "`target_layer`" if spec.target_layer else "the `target_layer` of its weights file"
        raise ConfigurationError(
            f"{spec.at('target_layer')}: {whose}, {said!r}, is no layer that a map can be drawn "
            f"from.{nearest(said, mappable)}"
        )
    return said


def _of_family(builder: str, module: nn.Module) -> str | None:
    """The path in TARGET_LAYERS, with its numbers counted from the start."""
    library, _, name = builder.partition("/")
    rule = next((path for family, path in TARGET_LAYERS.items() if name.startswith(family)), None)
    if rule is None or library not in ("torchvision", "timm"):
        return None
    parts: list[str] = []
    for part in rule.split("."):
        children = [name for name, _ in module.get_submodule(".".join(parts)).named_children()]
        if part.startswith("-") and len(children) < -int(part):
            return None
        parts.append(children[int(part)] if part.startswith("-") else part)
        if parts[-1] not in children:
            return None
    return ".".join(parts)


def _preprocessing(spec: ModelSpec, base: Preprocessing) -> Preprocessing:
    """The base with everything that the spec says about the input.

    Raises ConfigurationError where channels, mean and std do not go together.
    """
    said = spec.input
    size, resize = said.size or base.crop, said.resize or base.resize
    if said.resize is None and size != base.crop:
        resize = max(size)  # the base's would leave a margin that was meant for another size
    mean, std = said.mean, said.std
    given = [len(values) for values in (mean or (), std or ()) if len(values) > 1]
    channels = said.channels or max(given, default=base.channels)
    if channels == 1 and base.channels != 1:
        mean, std = mean or GREY[0], std or GREY[1]
    fitted = {
        key: _per_channel(spec, key, values, channels)
        for key, values in (("mean", mean or base.mean), ("std", std or base.std))
    }
    return Preprocessing(
        resize=resize,
        crop=size,
        mean=fitted["mean"],
        std=fitted["std"],
        interpolation=said.interpolation or base.interpolation,
    )


def _per_channel(
    spec: ModelSpec, key: str, values: tuple[float, ...], channels: int
) -> tuple[float, ...]:
    if len(values) == 1:
        return values * channels
    if len(values) != channels:
        given = getattr(spec.input, key) is not None
        raise ConfigurationError(
            f"{spec.at(f'input.{key}')} has {channels} channels and "
            f"{'' if given else 'by default '}{len(values)} numbers in `{key}`; "
            "give one a channel, or one for all."
        )
    return values
