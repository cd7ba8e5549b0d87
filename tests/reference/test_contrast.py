"""A contrast with several classes: Finer-CAM, by its published code and by full backward passes."""

from __future__ import annotations

from dataclasses import replace

import oracles
import pytest
import torch
from pydantic import ValidationError
from pytorch_grad_cam import FinerCAM, GradCAM, HiResCAM, LayerCAM
from pytorch_grad_cam.utils.model_targets import FinerWeightedTarget
from tiny import SmallNet, loaded
from torch import Tensor, nn

from api_schemas.options import ExplainOptions
from service.cam.verdict import judge
from service.errors import InvalidOption, UnknownClass
from service.inference import verdicts
from service.inference.contrast import Contrast
from service.inference.questions import Question
from service.models.loaded import LoadedModel
from service.pipeline.resolve import resolve_options
from service.pipeline.service import Limits

pytestmark = [pytest.mark.reference, pytest.mark.timeout(60)]

PIXELS = oracles.picture(22, 64, 64)
LAYER = "features.3"
LIMITS = Limits(32, 1 << 25, 1 << 26, 2048, 1 << 26, 2000, 60)


def small() -> LoadedModel:
    """A small net whose classes differ."""
    net = SmallNet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        nn.init.normal_(net.head.weight, std=2)
    return loaded(net, side=64)


def explained(model: LoadedModel, **options) -> Tensor:
    question = Question(PIXELS, layers=(LAYER,), **options)
    return oracles.raw(oracles.explained(model, question)[0])


PEERS = {"gradcam": GradCAM, "hirescam": HiResCAM, "layercam": LayerCAM}


@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize("method", PEERS)
def test_the_nearest_classes_give_the_finer_cam_of_its_published_code(method, count: int) -> None:
    """pytorch-grad-cam's, before its ReLU and scaling; its weights have gradients of their own."""
    model, kept = small(), list[Tensor]()
    target = oracles.best(model, PIXELS)
    with oracles.without_in_place(model.module) as net:
        image = oracles.input_of(model, PIXELS)
        cam = FinerCAM(net, [net.get_submodule(LAYER)], base_method=PEERS[method])
        cam.compute_input_gradient = True  # the parameters are frozen
        compute = cam.base_cam.get_cam_image

        def compute_and_keep(*args: object) -> object:
            kept.append(torch.from_numpy(compute(*args)[0]))
            return compute(*args)

        cam.base_cam.get_cam_image = compute_and_keep
        with cam:
            cam(image, comparison_categories=list(range(1, count + 1)))
    ours = explained(model, targets=(target,), contrast=Contrast(nearest=count), method=method)
    assert oracles.distance(ours, kept[0].double().relu()) < 1e-4


@pytest.mark.parametrize("weights", [(), (0.6, 0.1)])
@pytest.mark.parametrize("layer", [LAYER, "features.0"])
def test_the_map_is_that_of_the_published_value_by_a_full_backward_pass(weights, layer) -> None:
    model = small()

    def value(logits: Tensor) -> Tensor:
        if weights:
            return logits[2] - 0.6 * logits[5] - 0.1 * logits[0]
        shares = logits.softmax(dim=0)[[5, 0]]
        return (shares * (logits[2] - logits[[5, 0]])).sum() / shares.sum()

    activation, gradient = oracles.full_backward(model, layer, PIXELS, value)
    expected = (gradient.mean(dim=(1, 2), keepdim=True) * activation).sum(dim=0).relu()
    question = Question(
        PIXELS, layers=(layer,), targets=(2,), contrast=Contrast((5, 0), weights=weights)
    )
    (ours,) = oracles.explained(model, question)
    assert oracles.distance(ours, expected) < 1e-4


def test_the_slope_is_the_gradient_of_the_lead_of_the_published_target() -> None:

    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
        peer = FinerWeightedTarget(4, [1, 7, 0], 1)(logits)
        (slope,) = torch.autograd.grad(peer, logits)
        contrast = Contrast((1, 7, 0))
        torch.testing.assert_close(
            contrast.lead(logits.detach(), 4), peer.detach(), rtol=1e-6, atol=0
        )
        torch.testing.assert_close(contrast.slope(logits, 4), slope, rtol=1e-6, atol=1e-8)


def test_the_nearest_are_by_logit_and_never_the_target() -> None:
    logits = torch.tensor([3.0, 1.0, 2.9, -5.0, 3.2])
    assert set(Contrast(nearest=2).at(logits, 0).classes) == {2, 4}
    assert Contrast(nearest=1).at(logits, 3).classes == (1,)
    assert len(Contrast(nearest=16).at(logits, 0).classes) == 4


@pytest.mark.parametrize("method", ["scorecam", "ablationcam", "occlusion", "rise", "cam",
                                    "input_gradient", "integrated_gradients"])  # fmt: skip
def test_one_class_among_equals_is_the_mean_of_all_methods(method: str) -> None:
    """Two classes with the same logit weigh a half each: the map is that of either alone."""
    model = small()
    with torch.no_grad():
        model.module.head.weight[0] = model.module.head.weight[5]
        model.module.head.bias[0] = model.module.head.bias[5]
    layers = ("features",) if method == "cam" else (LAYER,)
    options = {"targets": (2,), "method": method, "samples": 20, "steps": 4, "layers": layers}
    if method in {"occlusion", "rise", "input_gradient", "integrated_gradients"}:
        options["layers"] = ()
    maps = [
        oracles.raw(oracles.explained(model, Question(PIXELS, contrast=each, **options))[0])
        for each in (Contrast((5,)), Contrast((5, 0)))
    ]
    assert oracles.distance(maps[1], maps[0]) < 1e-4


def test_a_verdict_is_on_the_value_that_is_explained() -> None:
    model = small()
    question = Question(
        PIXELS, layers=(LAYER,), targets=(2,), contrast=Contrast((5, 0)), verify=True
    )
    (answer,) = oracles.answers(model, question)
    (found,) = answer.explanations
    weights = found.contrast
    assert sum(weights.values()) == pytest.approx(1)
    falls = answer.evidence.falls
    lead = falls[:, 2] - sum(share * falls[:, each] for each, share in weights.items())

    columns = falls - falls[:, 2:3] + lead[:, None]
    alone = judge(replace(answer.evidence, falls=columns), torch.tensor(found.grid), 2)
    assert verdicts.judge is judge
    assert found.verdict.agreement == pytest.approx(alone.agreement, abs=1e-6)


def resolved(**options) -> Contrast | None:
    question = resolve_options(small(), ExplainOptions.model_validate(options), LIMITS, 1).question
    return question(PIXELS).contrast


def test_what_a_request_may_name() -> None:
    assert resolved() is None
    assert resolved(contrast="class 3") == Contrast((3,))
    assert resolved(contrast=0) == Contrast((0,))
    assert resolved(contrast=[3, "label:class 5"]) == Contrast((3, 5))
    assert resolved(contrast=[3, 5], contrast_weight=[0.5, 0]) == Contrast((3, 5), 0, (0.5, 0))
    assert resolved(contrast=3, contrast_weight=0.6) == Contrast((3,), 0, (0.6,))
    assert resolved(contrast="nearest:3") == Contrast(nearest=3)


@pytest.mark.parametrize(
    "contrast",
    ["nearest:0", "nearest:7", "nearest:x", "nearest:", "nearest:99999999", "nearest:²"],
)
def test_a_number_of_nearest_classes_that_the_model_has_not_is_refused(contrast: str) -> None:
    with pytest.raises(InvalidOption, match=r"nearest:1 to nearest:6"):
        resolved(contrast=contrast)


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(InvalidOption, match="stands alone"):
        resolved(contrast=["nearest:2", "class 3"])
    with pytest.raises(InvalidOption, match="stands alone"):
        resolved(contrast="nearest:2", contrast_weight=1)
    with pytest.raises(InvalidOption, match="names a class twice"):
        resolved(contrast=["3", "class 3"])
    with pytest.raises(InvalidOption, match="both a target"):
        resolved(contrast=[1, 3], targets=[3])
    with pytest.raises(UnknownClass):
        resolved(contrast=[1, "cat"])
    with pytest.raises(ValidationError, match="2 numbers and `contrast` 1"):
        resolved(contrast=[1], contrast_weight=[1, 2])
    with pytest.raises(ValidationError):
        resolved(contrast=[1], contrast_weight=[-1])


def test_a_label_of_that_form_is_a_class() -> None:

    model = replace(small(), labels=("nearest:2", *small().labels[1:]))
    options = ExplainOptions.model_validate({"contrast": "nearest:2"})
    question = resolve_options(model, options, LIMITS, 1).question(PIXELS)
    assert question.contrast == Contrast((0,))
