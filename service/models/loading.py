"""Load the model of a `ModelSpec`, measured and ready to be replicated.

The spec takes precedence over the weights file, which takes precedence over the builder.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from service.cam.hooks import record
from service.errors import ConfigurationError, nearest
from service.images.decode import Preprocessing
from service.models.builders import Built, build
from service.models.capabilities import (
    differentiable_layer,
    in_eval_mode,
    why_no_gradients,
    why_no_layers,
)
from service.models.catalog import TARGET_LAYERS, InputSpec, ModelSpec, Output, Task
from service.models.compiled.folding import Folded, fold
from service.models.compiled.lane import Compiler
from service.models.huggingface import PREFIX
from service.models.loaded import LoadedModel
from service.models.needs import missing_needs
from service.models.probes.attention import NoTokenAttention, TokenAttention, token_attention
from service.models.probes.behaviour import (
    Behaviour,
    Finding,
    Trial,
    behaviour,
    preserved,
    seeded,
    trial_images,
)
from service.models.probes.cell_positions import (
    CellPositions,
    Rect,
    covered,
    measure_cell_positions,
)
from service.models.probes.condition import Condition, parts_of
from service.models.probes.layers import (
    Layer,
    LayerTrace,
    default_target,
    query_layout,
    query_levels,
    trace_layers,
    with_parts,
)
from service.models.probes.lazy_state import resolve_lazy_state
from service.models.probes.sensitivity import (
    IMAGES,
    Sensitivity,
    Subject,
    measure_sensitivity,
    natural_noise,
    private_copy,
)
from service.models.probes.task_behaviour import task_behaviour
from service.models.probes.torch_state import kept_torch_state
from service.models.replicas import replicate
from service.models.tasks import (
    box_head,
    class_count,
    has_queries,
    per_image,
    taken_as_list,
    task_of,
    whole_image,
)

_log = structlog.get_logger(__name__)

TRIED_LEVELS = 12
"""Layers that are tried as the default of a segmenter of Hugging Face, from the last one on."""

GREY = ((0.449,), (0.226,))
"""ImageNet's mean and standard deviation in greyscale: the default of one-channel models."""


def load_model(
    spec: ModelSpec,
    *,
    device: str = "cpu",
    allow_random_weights: bool = False,
    compiler: Compiler | None = None,
    sensitivity: bool = False,
) -> LoadedModel:
    """Build, freeze, measure and optimize one model.

    compiler:    builds the compiled lane; None: the model has none.
    sensitivity: whether to measure how much the maps of each method depend on the weights.

    Raises ConfigurationError with a sentence that says what to change.
    """
    if device.startswith("cuda"):
        # The response promises float32: by default torch's convolutions round to TF32.
        torch.backends.cudnn.allow_tf32 = False
    built = build(spec, allow_random_weights)
    spec = spec if spec.select is not None else replace(spec, select=built.select)
    module = _in_eval_mode(spec, _outside_inference_mode(built.module)).to(device)
    if spec.dtype is not None:
        module = module.to(getattr(torch, spec.dtype))
    task, takes_list = _task(spec, built, module)
    base = built.preprocessing
    if task != "classification" and not _is_huggingface(spec):
        base = whole_image(module, task, base)
    preprocessing = _preprocessing(spec, base or Preprocessing(), module)
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
        task=task,
        takes_list=takes_list,
    )
    if task != "classification":
        return _compiled(_with_task(model, built), compiler)
    images = model.normalised(trial_images((preprocessing.channels, *preprocessing.crop)))
    began = Condition.of(module)
    model = replace(_measured(model, built, images), no_layers=why_no_layers(module))
    model = replace(model, missing=missing_needs(model, images[:1]))
    if sensitivity:
        model = replace(model, sensitivity=_sensitivity(model))
    model = _tuned(model, images[:1], compiler)
    if not model.behaviour.isolated:
        began.restore()  # requests run this very module, and so did the probes
    return model


def _task(spec: ModelSpec, built: Built, module: nn.Module) -> tuple[Task, bool]:
    """The task, and whether images go in as a list: as configured, else by one forward pass.

    Only a user's module needs the pass; one that fails in it is a classifier, whose probes say why.
    """
    known = spec.task or built.task
    if _is_huggingface(spec) or (known is None and ":" not in spec.builder):
        return known or "classification", False
    base = _preprocessing(spec, built.preprocessing or Preprocessing(), module)
    side = base.crop if built.task != "detection" else (64, 64)
    images = torch.rand(1, base.channels, *side, generator=torch.Generator().manual_seed(0))
    with suppress(Exception):
        trial = replicate(module)
        parameter = next(trial.parameters(), images)
        with seeded(0), kept_torch_state(random=False), preserved(trial):
            raw, takes_list = taken_as_list(trial, images.to(parameter))
        return known or task_of(raw) or "classification", takes_list
    return known or "classification", False


def _is_huggingface(spec: ModelSpec) -> bool:
    return spec.builder.startswith(PREFIX)


def _with_task(model: LoadedModel, built: Built) -> LoadedModel:
    """A detector or a segmenter with its layers, labels, default layers and findings.

    Raises ConfigurationError.
    """
    spec, preprocessing, module = model.spec, model.preprocessing, model.module
    if module_reason := why_no_layers(module):
        raise ConfigurationError(f"{spec.at('builder')} cannot be served: {module_reason}.")
    shape = (preprocessing.channels, *preprocessing.crop)
    images = model.normalised(trial_images(shape))[:2]
    try:
        behaves, served = task_behaviour(
            module, images, lambda part, batch: per_image(model.outputs(part, batch))
        )
        given = list(images[:1]) if model.takes_list else images[:1]
        with kept_torch_state(random=False), preserved(served), torch.no_grad():
            raw = model.outputs(served, images[:1])
            _check_structure(model, raw)
            classes = class_count(module, raw, model.task, model.output)
            trace = trace_layers(served, given, classes=classes or 0)
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"{spec.at('builder')} cannot be run on an image of {shape[2]}×{shape[1]} pixels: "
            f"{type(error).__name__}: {error}"
        ) from error
    positions = _mappable(model, trace, served, images[:1], batchable=behaves.batchable)
    layers = positions.layers
    head = box_head(module) if model.task == "detection" else None
    defaults = _configured_layer(spec, built, layers)
    if not defaults and _is_huggingface(spec):
        defaults = _used_levels(served, layers, trace, images[:1])
    elif not defaults:
        defaults = _default_layers(module, layers, trace)
    model = replace(
        model,
        labels=_task_labels(model, built, classes),
        layers=layers,
        target_layer=defaults[-1] if defaults else None,
        default_layers=defaults,
        head=None if head is None else replace(head, levels=_levels(layers)),
        queries=has_queries(raw),
        behaviour=behaves,
        findings=_with_places(behaves.findings, positions, defaults),
        unclear=positions.of("unclear"),
        scattered=positions.of("scattered"),
    )
    return replace(model, stateful=_settled(model, module, images[:1]))


def _check_structure(model: LoadedModel, raw: Any) -> None:
    """Raise ConfigurationError where an output is not of the task, or cannot be placed."""
    spec, preprocessing = model.spec, model.preprocessing
    if task_of(raw) != model.task:
        raise ConfigurationError(
            f"{spec.at('task')}: the task is {model.task}, and the model returns what one of "
            f"{task_of(raw) or 'no known task'} does."
        )
    if model.task == "detection" and not preprocessing.whole and preprocessing.fit != "squash":
        raise ConfigurationError(
            f"{spec.at('input.fit')}: the boxes of a detector are fractions of the whole image; "
            'set fit = "squash".'
        )


def _mappable(
    model: LoadedModel, trace: LayerTrace, served: nn.Module, image: Tensor, *, batchable: bool
) -> CellPositions:
    """The layers, with the layouts of those that a map can be drawn from.

    Tokens count in a segmenter whose images all have one size, where their positions are measured,
    and in YOLOS, whose tokens are the image's and then its queries. Those of other detectors may
    all be queries.
    """
    queries = 0
    if _is_huggingface(model.spec):
        queries = int(getattr(model.module.config, "num_detection_tokens", 0))
        if model.task == "segmentation" and not model.preprocessing.whole:
            with preserved(served):
                found = measure_cell_positions(served, trace.layers, image, batchable=batchable)
            return replace(found, layers=with_parts(found.layers, attrgetter("layout")))
    of_tokens = partial(query_layout, size=model.preprocessing.crop, queries=queries)
    return CellPositions(with_parts(trace.layers, of_tokens if queries else None))


def _with_places(
    findings: Sequence[Finding], positions: CellPositions, defaults: Sequence[str]
) -> tuple[Finding, ...]:
    """The findings, with that of the positions if they were measured."""
    if not positions.verdicts:
        return tuple(findings)
    others = (finding for finding in findings if finding.name != "places")
    return (*others, positions.finding(defaults[-1] if defaults else None))


def _levels(layers: Sequence[Layer]) -> tuple[str, ...]:
    """The feature maps of a backbone, in order."""
    parts = [layer.path for layer in layers if layer.path.startswith("backbone[")]
    return tuple(parts) or ("backbone",)


def _configured_layer(spec: ModelSpec, built: Built, layers: Sequence[Layer]) -> tuple[str, ...]:
    """The configured layer; empty if there is none.

    Raises ConfigurationError for one without a feature map.
    """
    mappable = [layer.path for layer in layers if layer.target]
    configured = spec.target_layer or built.target_layer
    if configured is None:
        return ()
    if configured not in mappable:
        raise ConfigurationError(
            f"{spec.at('target_layer')}: {configured!r} is not a layer that a map can be drawn "
            f"from.{nearest(configured, mappable)}"
        )
    return (configured,)


def _default_layers(
    module: nn.Module, layers: Sequence[Layer], trace: LayerTrace
) -> tuple[str, ...]:
    """The layers of an explanation: the output of the backbone, or the last map."""
    mappable = [layer.path for layer in layers if layer.target]
    levels = [path for path in _levels(layers) if path in mappable]
    if box_head(module) is not None:
        return tuple(levels)
    if levels:
        named = [path for path in levels if path.endswith(("[out]", "[high]"))]
        return tuple((named or levels)[-1:])
    chosen = default_target(trace, [layer for layer in layers if "[" not in layer.path])
    return () if chosen is None else (chosen,)


def _used_levels(
    module: nn.Module, layers: Sequence[Layer], trace: LayerTrace, image: Tensor
) -> tuple[str, ...]:
    """`query_levels`, without layers behind the last one that the logits depend on."""
    order = trace.order
    for _ in range(TRIED_LEVELS):
        chosen = query_levels(module, layers, replace(trace, order=order))
        if not chosen or _is_used(module, chosen[0], image):
            return chosen
        order = order[: order.index(chosen[0])]
    return ()


def _is_used(module: nn.Module, path: str, image: Tensor) -> bool:
    """Whether the logits of a model of Hugging Face have a gradient at a layer."""
    with (
        kept_torch_state(random=False),
        preserved(module),
        record(module, targets=[path.partition("[")[0]]) as seen,
    ):
        value = module(image).logits.square().sum()
    point = seen.targets.get(path, [None])[-1]
    if point is None or not value.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(value, point, allow_unused=True)
    return gradient is not None and bool(gradient.any())


def _task_labels(model: LoadedModel, built: Built, classes: int | None) -> tuple[str, ...]:
    """One label per class; where those of a detector leave out the background, it is the first."""
    spec, labels = model.spec, model.spec.labels or built.labels
    if classes is None:
        if labels is None:
            raise ConfigurationError(
                f"{spec.at('labels')}: the output does not show how many classes the model has; "
                "set `labels`, one per class id, the background included."
            )
        return labels
    is_detector = model.task == "detection" and not _is_huggingface(spec)
    if labels is not None and is_detector and len(labels) == classes - 1:
        labels = ("__background__", *labels)
    return _labels(replace(spec, labels=labels), built, classes)


def _outside_inference_mode(module: nn.Module) -> nn.Module:
    """Replace tensors that were created in inference mode: they do not support autograd."""
    copies: dict[int, Tensor] = {}
    for _, part in parts_of(module):
        for kind in ("_parameters", "_buffers"):
            table = vars(part).get(kind, {})
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
    """The model in its fastest forms with the same logits. image: normalised (1, C, h, w)."""
    if model.no_layers or model.no_gradients:  # scripted or quantised: unchanged
        stateful = _settled(model, model.module, image)
        reason = model.no_layers or model.no_gradients
        return replace(model, not_compiled=reason, stateful=stateful)
    behaves = model.behaviour
    if not (behaves.isolated and behaves.batchable and behaves.deterministic):
        # A faster form could not be compared with it.
        failed = next(finding.result for finding in model.findings if not finding.passed)
        stateful = _settled(model, model.module, image)
        return replace(model, not_compiled=failed, stateful=stateful)
    with kept_torch_state(random=False), torch.no_grad():
        expected = model.logits(model.replicate()(image))
    model.module.to(memory_format=torch.channels_last)
    channels_last = _gives(expected, model, model.replicate(), image)
    if not channels_last:  # a `view` in the model fails on channels_last
        model.module.to(memory_format=torch.contiguous_format)
    # After every conversion of modules, because some drop lazy state when they are converted.
    stateful = _settled(model, model.module, image)
    folded, more = _folded_form(model, expected, image)
    model = replace(
        model,
        channels_last=channels_last,
        folded=folded,
        stateful=tuple(sorted({*stateful, *more})),
    )
    return _compiled(model, compiler)


def _compiled(model: LoadedModel, compiler: Compiler | None) -> LoadedModel:
    if compiler is None:
        return replace(model, not_compiled="Compiling is switched off.")
    if model.folded is not None:
        model.folded.drop()  # few requests need it beside a compiled lane; the first one builds it
    return compiler.compiled(model)


def _folded_form(
    model: LoadedModel, logits: Tensor, image: Tensor
) -> tuple[Folded | None, tuple[str, ...]]:
    """The folded form and the state that it changes in every call; None if its logits differ."""
    folded = fold(model.module)
    if folded is None or not _gives(logits, model, replicate(folded.module), image):
        return None, ()
    began = Condition.of(folded.module)
    stateful = _settled(model, folded.module, image)
    # Lazy state that the model itself does not have would be lost when it is built again.
    return (None, ()) if began.changed() else (folded, stateful)


def _gives(logits: Tensor, model: LoadedModel, module: nn.Module, image: Tensor) -> bool:
    """Whether a form of the model gives the same logits, within rounding."""
    try:
        with kept_torch_state(random=False), torch.no_grad():
            actual = model.logits(module(image))
    except RuntimeError:
        return False
    largest = float(logits.abs().max())
    return bool(torch.allclose(logits, actual, rtol=0, atol=1e-3 * largest))


def _measured(model: LoadedModel, built: Built, images: Tensor) -> LoadedModel:
    """The model with its layers, labels, target layer and the findings of all probes.

    images: normalised (3, C, h, w). Raises ConfigurationError.
    """
    spec = model.spec
    trial, tried = _tried(model, images)
    alone = trial.alone
    behaves = behaviour(trial)
    if trial.alone is not alone:  # the layers of the copy may not be those that run
        with preserved(trial.served):
            tried = trace_layers(trial.served, images[:1], spec.select)
    with preserved(trial.served):
        positions = measure_cell_positions(
            trial.served, tried.layers, images[:1], batchable=behaves.batchable
        )
    output, binary = _output(spec, built, tried.classes, behaves)
    if spec.output == "none":
        behaves = replace(behaves, output_activation=None)
    tried = replace(tried, layers=positions.layers)
    target, no_gradients = _target_layer(spec, built, tried, trial, positions)
    covers = _covers(trial, target)
    return replace(
        model,
        labels=_labels(spec, built, 2 if binary else tried.classes),
        target_layer=target,
        layers=positions.layers,
        preprocessing=replace(model.preprocessing, covers=covers),
        output=output,
        binary=binary,
        behaviour=behaves,
        findings=(*behaves.findings, positions.finding(target), *_input_finding(covers)),
        unclear=positions.of("unclear"),
        scattered=positions.of("scattered"),
        no_gradients=no_gradients,
        attention=_attention(trial, positions.layers, target),
    )


def _attention(trial: Trial, layers: Sequence[Layer], target: str | None) -> TokenAttention | str:
    """The attention between a model's tokens, or why it has no map."""
    try:
        with preserved(trial.served):
            return token_attention(
                trial.served,
                trial.images[:1],
                layers,
                target,
                trial.select,
                used=trial.attention,
            )
    except NoTokenAttention as error:
        return str(error)


def _tried(model: LoadedModel, images: Tensor) -> tuple[Trial, LayerTrace]:
    """Run the model on single images, and trace its layers."""
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


def _sensitivity(model: LoadedModel) -> tuple[Sensitivity, ...]:
    """How much maps depend on the weights; empty for a model without gradients or true copies.

    Also empty for random weights: that others are as good says nothing about a method.
    """
    behaves, preprocessing = model.behaviour, model.preprocessing
    usable = behaves.isolated and behaves.deterministic and not model.random_weights
    if model.no_layers or model.no_gradients or not usable:
        return ()
    noise = natural_noise((preprocessing.channels, *preprocessing.crop), IMAGES)
    return measure_sensitivity(
        Subject(
            private_copy(model.module),
            model.normalised(image[None]),
            model.layers,
            model.target_layer,
            model.logits,
            preprocessing.covers,
            seed,
        )
        for seed, image in enumerate(noise)
    )


def _settled(model: LoadedModel, module: nn.Module, image: Tensor) -> tuple[str, ...]:
    """The state that a form of the model changes in every call. Raises ConfigurationError."""
    try:
        stateful = resolve_lazy_state(module, image, copied=model.behaviour.isolated)
    except ConfigurationError as error:
        raise ConfigurationError(f"{model.spec.at('builder')}: {error}.") from error
    if stateful:
        _log.info("model_keeps_state", model=model.name, state=stateful)
    return stateful


def _output(spec: ModelSpec, built: Built, classes: int, behaves: Behaviour) -> tuple[Output, bool]:
    """The output activation, and whether one logit stands for two labels.

    Raises ConfigurationError for a softmax of one logit, which is always 1.
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
    """The part of its input that the model sees; None: all of it, or it cannot be measured."""
    if target is None:
        return None
    # Not measurable without gradients.
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
    spec: ModelSpec, built: Built, tried: LayerTrace, trial: Trial, positions: CellPositions
) -> tuple[str | None, str | None]:
    """The target layer, and the reason if it gets no gradient.

    The configured layer; otherwise that of TARGET_LAYERS; otherwise that of `default_target`. If no
    map can be drawn from it, the last layer from which one can.

    Raises ConfigurationError if no map can be drawn from the configured layer.
    """
    mappable = [layer.path for layer in tried.layers if layer.target]
    configured = spec.target_layer or built.target_layer
    if configured is None:
        of_family = _of_family(spec.builder, built.module)
        chosen = of_family if of_family in mappable else default_target(tried, tried.layers)
        likely = chosen if chosen in mappable else None
        target = differentiable_layer(trial, tried, likely)
        if target is not None:
            return target, None
        reason = _why_no_gradients(trial, likely)
        # An unused layer is no reason to refuse gradients if other layers get one.
        if reason and likely and _why_no_gradients(trial, None) is None:
            return None, None
        return likely, reason
    if configured not in mappable:
        whose = "`target_layer`" if spec.target_layer else "the `target_layer` of its weights file"
        why = ""
        if positions.verdicts.get(configured) == "scattered":
            why = " (the positions of its cells are not in rows and columns)"
        raise ConfigurationError(
            f"{spec.at('target_layer')}: {whose}, {configured!r}, is not a layer that a map can "
            f"be drawn from{why}.{nearest(configured, mappable)}"
        )
    if differentiable_layer(trial, tried, configured) == configured:
        return configured, None
    return configured, _why_no_gradients(trial, configured)


def _why_no_gradients(trial: Trial, layer: str | None) -> str | None:
    with preserved(trial.served):
        return why_no_gradients(trial.served, trial.images[:1], layer, trial.select)


def _of_family(builder: str, module: nn.Module) -> str | None:
    """The path in TARGET_LAYERS, with negative numbers resolved."""
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
    """The base with every value that the spec sets for the input.

    Raises ConfigurationError if channels, mean and std contradict each other.
    """
    configured = spec.input
    size, resize = configured.size or base.crop, configured.resize or base.resize
    if configured.resize is None and size != base.crop:
        # The margin of the base belongs to another size. For another shape, the image is resized
        # so that it just covers the input.
        resize = size if size[0] != size[1] else max(size)
    mean, std = configured.mean, configured.std
    given = [len(values) for values in (mean or (), std or ()) if len(values) > 1]
    channels = configured.channels or max(given, default=0) or _channels(module, base)
    if channels == 1 and base.channels != 1:
        mean, std = mean or GREY[0], std or GREY[1]
    fitted = {
        key: _per_channel(spec, key, values, channels)
        for key, values in (("mean", mean or base.mean), ("std", std or base.std))
    }
    return replace(
        base,
        resize=resize,
        crop=size,
        mean=fitted["mean"],
        std=fitted["std"],
        interpolation=configured.interpolation or base.interpolation,
        fit=configured.fit or base.fit,
    )


def _sources(spec: ModelSpec, built: Built) -> str:
    """Where the parts of the transform come from."""
    keys = [key for key in InputSpec.__slots__ if getattr(spec.input, key) is not None]
    return f"{', '.join(keys)} from models.toml, else {built.source}" if keys else built.source


def _channels(module: nn.Module, base: Preprocessing) -> int:
    """1 if the first convolution takes one channel and RGB fails; otherwise that of the base."""
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
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
        is_configured = getattr(spec.input, key) is not None
        raise ConfigurationError(
            f"{spec.at(f'input.{key}')} has {channels} channels and "
            f"{'' if is_configured else 'by default '}{len(values)} numbers in `{key}`; "
            "set one per channel, or one for all."
        )
    return values
