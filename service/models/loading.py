"""From a `ModelSpec` to a model that is ready to be replicated.

What the spec says goes before what the weights file says, and that before what the builder says.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import structlog
import torch
from torch import Tensor, nn

from service.errors import ConfigurationError, nearest
from service.images.decode import Preprocessing
from service.models.builders import Built, build
from service.models.capabilities import (
    differentiable_layer,
    in_eval_mode,
    why_no_gradients,
    why_no_layers,
)
from service.models.catalog import TARGET_LAYERS, InputSpec, ModelSpec, Output
from service.models.compiled.folding import fold
from service.models.compiled.lane import Compiler
from service.models.loaded import LoadedModel
from service.models.probes.behaviour import (
    Behaviour,
    Finding,
    Trial,
    behaviour,
    preserved,
    trial_images,
)
from service.models.probes.cell_positions import (
    CellPositions,
    Rect,
    covered,
    measure_cell_positions,
)
from service.models.probes.condition import parts_of
from service.models.probes.layers import LayerTrace, default_target, trace_layers
from service.models.probes.settling import settle
from service.models.probes.torch_state import kept_torch_state
from service.models.replicas import replicate

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
    module = _in_eval_mode(spec, _outside_inference_mode(built.module)).to(device)
    if spec.dtype is not None:
        module = module.to(getattr(torch, spec.dtype))
    preprocessing = _preprocessing(spec, built.preprocessing or Preprocessing(), module)
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
        transform=f"{preprocessing} ({_sources(spec, built)})",
    )
    images = model.normalised(trial_images((preprocessing.channels, *preprocessing.crop)))
    model = _measured(model, built, images)
    return _tuned(replace(model, no_layers=why_no_layers(module)), images[:1], compiler)


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


def _in_eval_mode(spec: ModelSpec, module: nn.Module) -> nn.Module:
    try:
        return in_eval_mode(module)
    except ValueError as error:
        raise ConfigurationError(f"{spec.at('builder')} cannot be served: {error}.") from error


def _tuned(model: LoadedModel, image: Tensor, compiler: Compiler | None) -> LoadedModel:
    """The model in its fastest forms that give the same numbers. image: normalised (1, C, h, w)."""
    if model.no_layers or model.no_gradients:  # scripted or quantised: as it was made
        stateful = _settled(model, model.module, image)
        reason = model.no_layers or model.no_gradients
        return replace(model, not_compiled=reason, stateful=stateful)
    behaves = model.behaviour
    if not (behaves.isolated and behaves.batchable and behaves.deterministic):
        # A faster form could not be compared with it, and would not answer as it does.
        failed = next(found.result for found in model.findings if not found.passed)
        stateful = _settled(model, model.module, image)
        return replace(model, not_compiled=failed, stateful=stateful)
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


def _measured(model: LoadedModel, built: Built, images: Tensor) -> LoadedModel:
    """The model with its layers, labels and target layer, and with what the probes found.

    images: normalised (3, C, h, w). Raises ConfigurationError.
    """
    spec = model.spec
    trial, tried = _tried(model, images)
    alone = trial.alone
    behaves = behaviour(trial)
    if trial.alone is not alone:  # the copy's layers may be others than those that run
        with preserved(trial.served):
            tried = trace_layers(trial.served, images[:1], spec.select)
    with preserved(trial.served):
        places = measure_cell_positions(
            trial.served, tried.layers, images[:1], batchable=behaves.batchable
        )
    output, binary = _output(spec, built, tried.classes, behaves)
    if spec.output == "none":
        behaves = replace(behaves, output_activation=None)
    tried = replace(tried, layers=places.layers)
    target, no_gradients = _target_layer(spec, built, tried, trial, places)
    covers = _covers(trial, target)
    return replace(
        model,
        labels=_labels(spec, built, 2 if binary else tried.classes),
        target_layer=target,
        layers=places.layers,
        preprocessing=replace(model.preprocessing, covers=covers),
        output=output,
        binary=binary,
        behaviour=behaves,
        findings=(*behaves.findings, places.finding(target), *_input_finding(covers)),
        unclear=places.of("unclear"),
        scattered=places.of("scattered"),
        no_gradients=no_gradients,
    )


def _tried(model: LoadedModel, images: Tensor) -> tuple[Trial, LayerTrace]:
    """Run the model on images alone, and look at its layers."""
    spec, (channels, height, width) = model.spec, tuple(images.shape[1:])
    try:
        trial = Trial(model.module, images, spec.select)
        with kept_torch_state(random=False), preserved(trial.served):
            return trial, trace_layers(trial.served, images[:1], spec.select)
    except Exception as error:
        what = "RGB image" if channels == 3 else f"image of {channels} channels"
        precision = f" in {spec.dtype} on {images.device.type}" if spec.dtype else ""
        hint = ""
        if "required positional argument" in str(error):
            hint = "; forward() must accept a single tensor of images"
        raise ConfigurationError(
            f"{spec.at('builder')} cannot classify one {what} of {width}×{height} pixels"
            f"{precision}: {error}{hint}"
        ) from error


def _settled(model: LoadedModel, module: nn.Module, image: Tensor) -> tuple[str, ...]:
    """What a form of the model changes at every call. Raises ConfigurationError for parameters."""
    try:
        found = settle(module, image, copied=model.behaviour.isolated)
    except ConfigurationError as error:
        raise ConfigurationError(f"{model.spec.at('builder')}: {error}.") from error
    if found:
        _log.info("model_keeps_state", model=model.name, state=found)
    return found


def _output(spec: ModelSpec, built: Built, classes: int, behaves: Behaviour) -> tuple[Output, bool]:
    """How scores come from logits, and whether one logit stands for two labels.

    Raises ConfigurationError for a softmax of one logit, which is 1 whatever the image.
    """
    output = spec.output or built.output
    if behaves.output_activation is not None and output != "none":
        output = "sigmoid"
    if classes > 1:
        return output, False
    two = len(spec.labels or built.labels or ()) == 2
    if output == "softmax" and two and spec.output is None:
        output = "sigmoid"
    if output == "softmax":
        raise ConfigurationError(
            f"{spec.at('output')}: the model has one logit, and a softmax of one logit is 1 "
            'for every image; set output = { activation = "sigmoid" } and two labels, [negative, '
            'positive], or output = { activation = "none" } for a number that is not a '
            "probability."
        )
    return output, two and output == "sigmoid"


def _covers(trial: Trial, target: str | None) -> Rect | None:
    """The part of its input that the model looks at; None: all of it, or it cannot be measured."""
    if target is None:
        return None
    # Of a model without gradients nothing of this kind is known.
    with suppress(Exception), preserved(trial.served):
        return covered(trial.served, target, trial.images[:1])
    return None


def _input_finding(covers: Rect | None) -> tuple[Finding, ...]:
    if covers is None:
        return ()
    left, top, width, height = (f"{100 * share:.0f} %" for share in covers)
    return (
        Finding(
            "input",
            False,
            f"The model sees only a part of its input: {width} of the width from {left}, "
            f"{height} of the height from {top}.",
            "Maps and `seen` are placed over that part.",
        ),
    )


def _labels(spec: ModelSpec, built: Built, classes: int) -> tuple[str, ...]:
    labels = spec.labels or built.labels or tuple(f"class {index}" for index in range(classes))
    if len(labels) != classes:
        raise ConfigurationError(
            f"{spec.at('labels')} has {classes} classes and {len(labels)} labels; "
            "set the labels of these weights, one per class."
        )
    return labels


def _target_layer(
    spec: ModelSpec, built: Built, tried: LayerTrace, trial: Trial, places: CellPositions
) -> tuple[str | None, str | None]:
    """The layer that was said, else that of the family's table, else what the rule finds.

    Where no map can be drawn from what the rule finds, the last layer from which one can. Beside
    it, why no gradient comes to it.

    Raises ConfigurationError where no map can be drawn from the layer that was said.
    """
    mappable = [layer.path for layer in tried.layers if layer.target]
    said = spec.target_layer or built.target_layer
    if said is None:
        of_family = _of_family(spec.builder, built.module)
        found = of_family if of_family in mappable else default_target(tried, tried.layers)
        likely = found if found in mappable else None
        target = differentiable_layer(trial, tried, likely)
        if target is not None:
            return target, None
        reason = _why_no_gradients(trial, likely)
        # A layer that plays no part is no reason to refuse gradients where others have them.
        if reason and likely and _why_no_gradients(trial, None) is None:
            return None, None
        return likely, reason
    if said not in mappable:
        whose = "`target_layer`" if spec.target_layer else "the `target_layer` of its weights file"
        why = ""
        if places.verdicts.get(said) == "scattered":
            why = " (its cells do not look at the input in rows and columns)"
        raise ConfigurationError(
            f"{spec.at('target_layer')}: {whose}, {said!r}, is not a layer that a map can be drawn "
            f"from{why}.{nearest(said, mappable)}"
        )
    return said, _why_no_gradients(trial, said)


def _why_no_gradients(trial: Trial, layer: str | None) -> str | None:
    with preserved(trial.served):
        return why_no_gradients(trial.served, trial.images[:1], layer, trial.select)


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


def _preprocessing(spec: ModelSpec, base: Preprocessing, module: nn.Module) -> Preprocessing:
    """The base with everything that the spec says about the input.

    Raises ConfigurationError where channels, mean and std do not go together.
    """
    said = spec.input
    size, resize = said.size or base.crop, said.resize or base.resize
    if said.resize is None and size != base.crop:
        # The base's would leave a margin that was meant for another size. An image covers an input
        # of another shape as tightly as it can.
        resize = size if size[0] != size[1] else max(size)
    mean, std = said.mean, said.std
    given = [len(values) for values in (mean or (), std or ()) if len(values) > 1]
    channels = said.channels or max(given, default=0) or _channels(module, base)
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
        fit=said.fit or base.fit,
    )


def _sources(spec: ModelSpec, built: Built) -> str:
    """Where the transform was said."""
    said = [key for key in InputSpec.__slots__ if getattr(spec.input, key) is not None]
    return f"{', '.join(said)} from models.toml, else {built.source}" if said else built.source


def _channels(module: nn.Module, base: Preprocessing) -> int:
    """1 where the first convolution takes one channel and RGB fails; else as the base has it."""
    first = next((each for each in module.modules() if isinstance(each, nn.Conv2d)), None)
    if first is None or first.in_channels != 1:
        return base.channels
    image = torch.zeros(1, base.channels, *base.crop).to(first.weight)
    try:
        with torch.no_grad(), kept_torch_state(), preserved(module):
            module(image)
    except Exception:  # noqa: BLE001 - a model may raise anything about three channels
        return 1
    return base.channels


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
            "set one per channel, or one for all."
        )
    return values
