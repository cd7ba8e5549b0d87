"""Two hundred random models of one's own: served right, refused, or flagged, never silently wrong.

Each is made of a few troubles that people's models have. What the service answers to images that
come at once is compared, image by image, with plain torch on another module of the same builder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_models import PLANS, SIDE, Plan
from torch import Tensor

from service.errors import ConfigurationError
from service.inference.questions import Question
from service.metrics import Metrics
from service.models.catalog import InputSpec, ModelSpec
from service.models.loaded import LoadedModel
from service.models.loading import load_model
from service.models.pool import ModelPool
from service.scheduling.scheduler import Scheduler, TimedResult


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for number in range(4):
        image = torch.randint(40, 90, (3, SIDE, SIDE), generator=generator)
        image[number % 3, 4 * number : 4 * number + 8, 12 - 3 * number : 20 - 3 * number] = 220
        found.append(image.to(torch.uint8))
    return found


def answered(model: LoadedModel, sent: Sequence[Tensor]) -> list[TimedResult]:
    """What the service answers to images that come at once, on two workers in batches of four."""
    pool = ModelPool([model], replicas=2)
    scheduler = Scheduler(pool, Metrics(), workers=2, helpers=0, max_batch=4, threads_per_worker=1)
    layers = (model.target_layer,) if model.target_layer and not model.no_gradients else ()
    method = "gradcam" if layers else None
    futures: list[Future[TimedResult]] = [
        scheduler.submit(
            model, Question(image, top_k=9, method=method, layers=layers, explain_top=2), None
        )
        for image in sent * 2
    ]
    scheduler.start()
    try:
        return [future.result(60) for future in futures]
    finally:
        scheduler.close(10)


def uncounted(model: LoadedModel) -> LoadedModel:
    """The model as before its first call, where it counts them."""
    inner = next((m for m in model.module.modules() if hasattr(m, "calls")), model.module)
    inner.calls = 0
    return model


def in_double_precision(model: LoadedModel) -> LoadedModel:
    """The model with weights of 64 bits, those of modules that it hides in a list included."""
    for module in list(model.module.double().modules()):
        for hidden in getattr(module, "hidden", ()):
            hidden.double()
    return model


def own_maps(model: LoadedModel, image: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
    """Grad-CAM of every class by one hook and `autograd.grad` on that module."""
    if model.target_layer is None or model.no_gradients:
        return {}
    kept: list[Tensor] = []
    layer = model.layer(model.target_layer)
    assert layer.layout is not None

    def keep(_module: object, _args: object, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1].clone()

    handle = model.module.get_submodule(layer.path).register_forward_hook(keep, prepend=True)
    try:
        logits = model.logits(model.module(model.normalised(image[None]).to(dtype)))[0]
    finally:
        handle.remove()
    found = {}
    for class_id, logit in enumerate(logits):
        (slope,) = torch.autograd.grad(logit, kept[-1], retain_graph=True)
        maps, slopes = (
            layer.layout.as_map(layer.layout.by_image(each.detach())) for each in (kept[-1], slope)
        )
        found[class_id] = (maps * slopes.mean(dim=(2, 3), keepdim=True)).sum(dim=1)[0].relu()
    return found


def own_logits(model: LoadedModel, image: Tensor) -> Tensor:
    """What plain torch makes of an image with the module that the builder returned."""
    with torch.no_grad():
        return model.logits(model.module(model.normalised(image[None])))[0]


@pytest.mark.timeout(600)
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(PLANS)
def test_a_random_model_is_served_right_or_refused_or_flagged(plan: Plan) -> None:
    spec = ModelSpec(
        "random",
        "random_models:build",
        arguments=vars(plan),
        input=InputSpec(size=(SIDE, SIDE), mean=(0.5,), std=(0.25,)),
        labels=plan.labels if plan.output.startswith("one") else None,
    )
    try:
        model = load_model(spec)
    except ConfigurationError:
        # A softmax of one logit, and nothing else, is refused.
        assert (plan.output, plan.labels) == ("one", None)
        return
    sent = images()
    private = load_model(spec)
    alone = [own_logits(uncounted(private), image) for image in sent]
    maps = exact = []
    if model.behaviour.deterministic:
        maps = [own_maps(uncounted(private), image, torch.float32) for image in sent]
        in_double_precision(private)
        exact = [own_maps(uncounted(private), image, torch.float64) for image in sent]
    found = answered(model, sent)
    if not model.behaviour.deterministic:
        assert plan.noise != "no"
        assert all(
            "not_deterministic" in each.flags
            for timed in found
            for each in timed.result.explanations
        )
        return
    for expected, cams, exact_cams, timed in zip(
        alone * 2, maps * 2, exact * 2, found, strict=True
    ):
        answer = timed.result
        assert {each.class_id for each in answer.predictions} == set(range(len(expected)))
        for each in answer.predictions:
            logit = float(expected[each.class_id])
            assert each.logit == pytest.approx(logit, abs=2e-3 + unknown(logit, plan))
        for each in answer.explanations:
            cam = cams[each.class_id]
            difference = np.abs(each.grid * each.high - cam.numpy()).max()
            # Behind a batch norm that uses the statistics of one image the gradient is zero: its
            # map in 32 bits is rounding, of which only the size can be compared.
            rounding = float((cam - exact_cams[each.class_id]).abs().max())
            assert difference <= 2e-3 * float(cam.max()) + 10 * rounding
            assert ("activation_in_model" in each.flags) == (
                plan.output in ("softmax", "log_softmax", "sigmoid", "one_sigmoid")
            )


def unknown(logit: float, plan: Plan) -> float:
    """How far a logit may be off that is read from a rounded probability: four of its steps."""
    if not plan.output.endswith(("softmax", "sigmoid")):
        return 0.0
    return 4 * float(np.finfo(np.float32).eps) * (1 + math.exp(logit))


USUAL = {"stored": "no", "batch": "no", "noise": "no", "input": "whole", "output": "logits"}
USUAL |= {"shared": False, "patched": False, "function": False, "complex": False, "labels": None}

FOUND = {
    "a mean over the batch, which differs little between images of one contrast": USUAL
    | {"seed": 5, "stem": "column", "noise": "count", "output": "sigmoid"}
    | {"shared": True, "function": True, "complex": True},
    "a count in a module that is served itself, which the probes ran before": USUAL
    | {"seed": 0, "stem": "map", "stored": "closure", "noise": "count"},
    "a count in a model whose probabilities are all near one": USUAL
    | {"seed": 1, "stem": "start", "noise": "count", "output": "one_sigmoid"}
    | {"function": True, "complex": True},
    "a batch norm of one image, behind which the gradient itself is rounding": USUAL
    | {"seed": 1, "stem": "rows", "stored": "global", "batch": "hidden", "output": "sigmoid"}
    | {"shared": True, "function": True},
    "a batch norm of one image, behind which Grad-CAM is rounding": USUAL
    | {"seed": 0, "stem": "rows", "stored": "closure", "batch": "hidden", "input": "corner"}
    | {"output": "sigmoid", "shared": True, "function": True, "complex": True},
}


@pytest.mark.parametrize("kind", FOUND)
def test_a_model_that_was_once_served_wrong_is_served_right(kind: str) -> None:
    plan = Plan(**FOUND[kind])
    test_a_random_model_is_served_right_or_refused_or_flagged.hypothesis.inner_test(plan)
