"""State dicts as training scripts leave them, and precisions that a model does not run in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from tiny import SmallNet
from torch import Tensor, nn

from service.errors import ConfigurationError
from service.models.catalog import InputSpec, ModelSpec
from service.models.loading import load_model
from service.models.weights import load_into, read_weights

pytestmark = pytest.mark.timeout(20)


def saved(path: Path, content: Any) -> SmallNet:
    """A fresh net filled with what was saved."""
    torch.save(content, path)
    net = SmallNet()
    load_into(net, read_weights(path), "the file")
    return net


@pytest.mark.parametrize("wrappers", [(), ("state_dict",), ("model_state_dict",), ("model",)])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path, wrappers, prefix: str) -> None:
    trained = SmallNet(seed=3)
    content: Any = {f"{prefix}{key}": value for key, value in trained.state_dict().items()}
    for wrapper in wrappers:
        content = {"epoch": 3, wrapper: content}
    with capture_logs() as logs:
        net = saved(tmp_path / "w.pt", content)
    assert torch.equal(net.head.weight, trained.head.weight)
    events = {entry["event"] for entry in logs}
    assert ("weights_unwrapped" in events) == bool(wrappers)
    assert ("weights_prefixes_removed" in events) == bool(prefix)


def test_what_a_training_module_has_beside_the_model_is_named(tmp_path: Path) -> None:
    content = {f"model.{key}": value for key, value in SmallNet().state_dict().items()}
    content["loss.weight"] = torch.zeros(7)
    with pytest.raises(ConfigurationError) as error:
        saved(tmp_path / "w.pt", {"state_dict": content})
    assert "unexpected: loss.weight. " in error.value.detail
    assert "missing" not in error.value.detail


def test_a_refused_pickle_says_what_it_wanted_to_run(tmp_path: Path) -> None:
    torch.save({"state_dict": SmallNet().state_dict(), "net": SmallNet()}, tmp_path / "w.pt")
    with pytest.raises(ConfigurationError, match=r"wants to run tiny\.SmallNet"):
        read_weights(tmp_path / "w.pt")


class NoHalf(SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:
            raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'")
        return super().forward(x)


def test_a_precision_that_the_device_lacks_is_told_at_the_start(monkeypatch) -> None:
    monkeypatch.setattr("own_models.net", NoHalf)
    spec = ModelSpec("a", "own_models:net", input=InputSpec(size=(32, 32)), dtype="float16")
    with pytest.raises(ConfigurationError, match=r"in float16 on cpu: .*not implemented"):
        load_model(spec)


def test_a_model_without_any_gradient_still_loads(monkeypatch) -> None:
    class Cut(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    monkeypatch.setattr("own_models.net", Cut)
    model = load_model(ModelSpec("a", "own_models:net", input=InputSpec(size=(32, 32))))
    assert model.no_gradients is not None
    assert isinstance(model.module, nn.Module)
