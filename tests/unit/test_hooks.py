"""Recording: what the hook tutorials compute, and that nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from tiny import SmallNet
from torch import Tensor, nn

from service.cam.hooks import gradients, record


class Step(nn.Module):
    """Adds a constant: a layer to record at."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, x: Tensor) -> Tensor:
        return x + self.constant


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_gradient_of_an_inner_tensor_is_the_one_on_paper() -> None:
    """Y = x + 1, z = mean(y·y): the gradient at y is y / 2."""
    model = nn.Sequential(Step(1.0))
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    with record(model, targets=["0"]) as seen:
        z = (model(x) ** 2).mean().reshape(1, 1)
        (leaf,) = seen.targets["0"]
        (gradient,) = gradients(z, [leaf], torch.ones(1, 1, 1))
    assert torch.equal(gradient[0], torch.tensor([[1.0, 1.5], [2.0, 2.5]]))


def test_feature_maps_are_the_ones_on_paper() -> None:
    """Ones convolved with all-one and all-two kernels give 9 and 18."""
    conv = nn.Conv2d(1, 2, 3, bias=False)
    conv.weight.data = torch.stack([torch.ones(1, 3, 3), 2 * torch.ones(1, 3, 3)])
    model = nn.Sequential(conv, nn.MaxPool2d(2))
    with record(model, outputs=["0", "1"]) as seen, torch.no_grad():
        model(torch.ones(1, 1, 4, 4))
    assert seen.outputs["0"][0].tolist() == [[[[9.0] * 2] * 2, [[18.0] * 2] * 2]]
    assert seen.outputs["1"][0].flatten().tolist() == [9.0, 18.0]


def test_gradients_behind_a_relu_are_the_ones_on_paper() -> None:
    """A gradient passes a ReLU where its input was positive, and is not rectified itself."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
    rows = [[1.0, 2, 3], [-4, -5, -6], [7, 8, 9], [-10, -11, -12]]
    model[0].weight.data, model[0].bias.data = torch.tensor(rows), torch.tensor([1.0, 2, 3, 4])
    model[2].weight.data, model[2].bias.data = torch.tensor([[1.0, 2, -3, 4]]), torch.ones(1)
    model.requires_grad_(requires_grad=False)
    with record(model, targets=["0", "1"]) as seen:
        output = model(torch.ones(1, 3))
        before, after = gradients(
            output, [seen.targets["0"][0], seen.targets["1"][0]], torch.ones(1, 1, 1)
        )
    assert seen.targets["0"][0].tolist() == [[7.0, -13.0, 27.0, -29.0]]
    assert after.flatten().tolist() == [1.0, 2.0, -3.0, 4.0]
    assert before.flatten().tolist() == [1.0, 0.0, -3.0, 0.0]


def test_an_in_place_relu_cannot_change_what_was_recorded() -> None:
    model = SmallNet().eval()
    with record(model, targets=["features.3"], outputs=["features.0"]) as seen:
        model(torch.randn(2, 3, 32, 32))
    assert bool((seen.targets["features.3"][0] < 0).any())
    assert bool((seen.outputs["features.0"][0] < 0).any())


def test_gradients_at_two_layers_equal_full_backward() -> None:
    """A later target stays connected to an earlier one."""
    model, x = SmallNet().eval().requires_grad_(requires_grad=False), torch.randn(2, 3, 32, 32)
    paths = ["features.0", "features.3"]
    with record(model, targets=paths) as seen:
        logits = model(x)
        weights = torch.zeros(1, 2, 7)
        weights[0, 0, 3] = weights[0, 1, 5] = 1
        found = gradients(logits, [seen.targets[path][0] for path in paths], weights)
    first = model.features[0](x).requires_grad_()
    second = model.features[3](model.features[2](model.features[1](first.clone())))
    output = model.head(torch.relu(second).mean(dim=(2, 3)))
    expected = torch.autograd.grad(output[0, 3] + output[1, 5], [first, second])
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine[0], theirs, atol=1e-7)


def test_several_sums_of_one_graph_equal_one_walk_each() -> None:
    model, x = SmallNet().eval().requires_grad_(requires_grad=False), torch.randn(2, 3, 32, 32)
    classes = (0, 4, 6)
    weights = torch.zeros(3, 2, 7)
    for k, class_id in enumerate(classes):
        weights[k, :, class_id] = 1
    with record(model, targets=["features"]) as seen:
        (several,) = gradients(model(x), seen.targets["features"], weights)
    for k, class_id in enumerate(classes):
        with record(model, targets=["features"]) as seen:
            logits = model(x)
        (alone,) = torch.autograd.grad(logits[:, class_id].sum(), seen.targets["features"])
        assert torch.allclose(several[k], alone, atol=1e-7)


def test_a_layer_the_output_does_not_depend_on_has_zero_gradient() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.aside = Step(1.0), Step(2.0)

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            return self.used(x)

    model = Aside()
    with record(model, targets=["used", "aside"]) as seen:
        output = model(torch.ones(1, 2))
        _, aside = gradients(
            output, [seen.targets["used"][0], seen.targets["aside"][0]], torch.ones(1, 1, 2)
        )
    assert not aside.any()


def test_a_module_called_twice_gives_both_calls_in_order() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = Step(1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.step(self.step(x))

    model = Twice()
    with record(model, targets=["step"], outputs=["step"]) as seen:
        model(torch.zeros(1, 1))
    assert [call.item() for call in seen.outputs["step"]] == [1.0, 2.0]
    assert [call.item() for call in seen.targets["step"]] == [1.0, 2.0]


def test_hooks_are_there_inside_and_gone_after() -> None:
    model = SmallNet()
    with record(model, targets=["features"], outputs=["features.0", "head"]):
        assert hooks_on(model) == 3
    assert hooks_on(model) == 0


def test_hooks_are_gone_after_an_exception() -> None:
    model = SmallNet()
    with pytest.raises(RuntimeError), record(model, targets=["features"]):
        model(torch.randn(1, 4, 32, 32))
    assert hooks_on(model) == 0


def test_hooks_are_gone_after_a_wrong_path() -> None:
    """The hooks that were set before the wrong path was met are removed."""
    model = SmallNet()
    with pytest.raises(AttributeError), record(model, targets=["features", "nowhere"]):
        pass
    assert hooks_on(model) == 0


def test_no_gradient_is_left_on_any_parameter() -> None:
    model = SmallNet().eval()
    with record(model, targets=["features"]) as seen:
        logits = model(torch.randn(1, 3, 32, 32))
        gradients(logits, seen.targets["features"], torch.ones(1, 1, 7))
    assert all(parameter.grad is None for parameter in model.parameters())
