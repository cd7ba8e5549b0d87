"""State dicts as training scripts leave them, and precisions that a model does not run in."""

from __future__ import annotations

import argparse
import collections
import copy
import datetime as dt
import threading
import types
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from structlog.testing import capture_logs
from tiny import SmallNet
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from service.errors import ConfigurationError
from service.models.catalog import InputSpec, ModelSpec
from service.models.loading import load_model
from service.models.models_toml import read_config
from service.models.weights.checkpoints import checkpoint_tensors, select_weights
from service.models.weights.weights_file import load_into, read_weights

pytestmark = pytest.mark.timeout(20)

State = Mapping[str, Tensor]
TRAINED = SmallNet(seed=3)
AVERAGED = SmallNet(seed=5)


def saved(path: Path, content: Any, key: str | None = None) -> SmallNet:
    """A fresh net filled with what was saved."""
    torch.save(content, path)
    net = SmallNet()
    load_into(net, read_weights(path, key=key), "the file")
    return net


def is_as(net: nn.Module, other: nn.Module) -> bool:
    pairs = zip(net.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs)


def state(net: nn.Module = TRAINED, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in net.state_dict().items()}


def taken(content: Any, path: Path, key: str | None = None) -> tuple[SmallNet, dict[str, Any]]:
    """The net, and what the log said of the file in its one line."""
    with capture_logs() as logs:
        net = saved(path, content, key)
    said = [each for each in logs if each["event"] == "weights_taken"]
    assert len(said) <= 1
    return net, said[0] if said else {}


# ---- where the weights are


@pytest.mark.parametrize(
    "wrappers",
    [
        *((), ("state_dict",), ("model_state_dict",), ("model",), ("net",), ("weights",)),
        *(("ema",), ("checkpoint", "model"), ("a", "b", "c")),
    ],
)
@pytest.mark.parametrize(
    "prefix",
    [
        *("", "module.", "model.", "_orig_mod.", "module._orig_mod.", "net.", "network."),
        *("backbone.", "student.", "model.encoder.", "self.whatever.they.call.it."),
    ],
)
def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path, wrappers, prefix: str) -> None:
    content: Any = state(prefix=prefix)
    for wrapper in reversed(wrappers):
        content = {"epoch": 3, wrapper: content}
    net, said = taken(content, tmp_path / "w.pt")
    assert is_as(net, TRAINED)
    under = ".".join((*wrappers, prefix.rstrip("."))).strip(".")
    assert said.get("under", "") in (
        under,
        under.replace("._orig_mod", "").replace("_orig_mod", ""),
    )


@pytest.mark.parametrize(
    "between", ["_orig_mod", "module", "_fsdp_wrapped_module", "module._orig_mod"]
)
@pytest.mark.parametrize("prefix", ["", "net."])
def test_what_wrappers_put_inside_the_names_is_taken_out(tmp_path: Path, between, prefix) -> None:
    """Only a part of the model was compiled, or ran on several devices."""
    content = {
        f"{prefix}{key}".replace("features.", f"features.{between}."): value
        for key, value in state().items()
    }
    assert is_as(saved(tmp_path / "w.pt", {"state_dict": content}), TRAINED)


def averaged(decay: float | None) -> dict[str, Any]:
    how = {} if decay is None else {"multi_avg_fn": get_ema_multi_avg_fn(decay)}
    return AveragedModel(TRAINED, **how).state_dict()


@pytest.mark.parametrize(
    ("name", "content", "dropped"),
    [
        ("swa", averaged(None), "n_averaged"),
        ("ema", {"state_dict": averaged(0.99)}, "n_averaged"),
        (
            "loss",
            {"state_dict": state(prefix="model.") | {"criterion.pos_weight": torch.ones(3)}},
            "criterion.pos_weight",
        ),
        (
            "weighted",
            {"state_dict": state(prefix="net.") | {"class_weights": torch.ones(7)}},
            "class_weights",
        ),
        ("metrics", state(prefix="net.") | {"train_acc.total": torch.ones(1)}, "train_acc.total"),
        ("bare", state() | {"loss_fn.weight": torch.ones(7)}, "loss_fn.weight"),
        ("inner", state(prefix="net.") | {"net.loss.weight": torch.ones(7)}, "net.loss.weight"),
    ],
)
def test_what_is_known_to_be_of_the_training_is_dropped_and_said(
    tmp_path: Path, name: str, content: Any, dropped: str
) -> None:
    net, said = taken(content, tmp_path / "w.pt")
    assert is_as(net, TRAINED)
    assert said["dropped"] == dropped


@pytest.mark.parametrize("beside", ["head2.weight", "projector.0.weight", "mean", "temperature"])
def test_what_may_be_a_part_of_what_was_trained_is_named_and_refused(
    tmp_path: Path, beside: str
) -> None:
    """A new head behind the model that fits, or a normalisation in front of it."""
    content = {"state_dict": state(prefix="model.") | {beside: torch.zeros(7)}}
    with pytest.raises(ConfigurationError) as error:
        saved(tmp_path / "w.pt", content)
    assert f"unexpected: {beside}. " in error.value.detail
    assert "missing" not in error.value.detail
    assert 'ignore the rest with weights_key = "state_dict.model"' in error.value.detail
    assert is_as(saved(tmp_path / "w.pt", content, "state_dict.model"), TRAINED), "it was chosen"


def test_an_optimisers_state_is_no_candidate(tmp_path: Path) -> None:
    net = copy.deepcopy(TRAINED)
    optimiser = torch.optim.AdamW(net.parameters())
    net(torch.rand(1, 3, 32, 32)).sum().backward()
    before = state(net)
    before = {key: value.clone() for key, value in before.items()}
    optimiser.step()
    content = {"optimizer": optimiser.state_dict(), "model": before, "scheduler": {"last": 3}}
    loaded = saved(tmp_path / "w.pt", content)
    assert torch.equal(loaded.head.weight, before["head.weight"])


def test_counters_and_texts_beside_the_tensors_do_no_harm(tmp_path: Path) -> None:
    assert is_as(saved(tmp_path / "w.pt", state() | {"epoch": 3, "arch": "x"}), TRAINED)


def test_a_dict_a_module_is_put_together(tmp_path: Path) -> None:
    content = {
        "features": {
            key.removeprefix("features."): value
            for key, value in state().items()
            if key.startswith("features.")
        },
        "head": TRAINED.head.state_dict(),
    }
    assert is_as(saved(tmp_path / "w.pt", content), TRAINED)


def test_prefixes_of_a_safetensors_file_are_taken_off(tmp_path: Path) -> None:
    save_file(state(prefix="backbone."), tmp_path / "w.safetensors")
    net = SmallNet()
    load_into(net, read_weights(tmp_path / "w.safetensors"), "the file")
    assert is_as(net, TRAINED)


# ---- several that fit

EMA_FORMS = [
    {"state_dict": state(), "state_dict_ema": state(AVERAGED)},
    {"model": state(), "model_ema": state(AVERAGED, "module.") | {"n_averaged": torch.ones(())}},
    {"state_dict": state(prefix="net.") | state(AVERAGED, "ema_model.module.")},
    {"ema": {"shadow": state(AVERAGED)}, "model": state()},
    {"swa_model": state(AVERAGED), "net": state()},
]


@pytest.mark.parametrize("content", EMA_FORMS)
def test_of_weights_and_their_average_the_weights_are_used_and_the_average_said(
    tmp_path: Path, content: Any
) -> None:
    net, said = taken(content, tmp_path / "w.pt")
    assert is_as(net, TRAINED)
    name = said["averages_not_used"]
    net, said = taken(content, tmp_path / "w.pt", name)
    assert is_as(net, AVERAGED), "what the log names can be given as weights_key"
    assert "averages_not_used" not in said


def test_several_weights_that_fit_are_named_with_the_way_to_choose(tmp_path: Path) -> None:
    content = {"student": state(prefix="module."), "teacher": state(AVERAGED, "module.")}
    with pytest.raises(ConfigurationError) as error:
        saved(tmp_path / "w.pt", content)
    assert "'student.module', 'teacher.module'" in error.value.detail
    assert 'weights_key = "student.module"' in error.value.detail
    for key in ("teacher", "teacher.module"):
        assert is_as(saved(tmp_path / "w.pt", content, key), AVERAGED)


def test_the_same_weights_saved_twice_are_one(tmp_path: Path) -> None:
    net, _ = taken({"state_dict": state(), "model": state(copy.deepcopy(TRAINED))}, tmp_path / "w")
    assert is_as(net, TRAINED)


def test_what_fits_as_it_is_goes_before_copies_beside_it(tmp_path: Path) -> None:
    assert is_as(saved(tmp_path / "w.pt", state() | state(AVERAGED, "teacher.")), TRAINED)


def test_of_several_the_one_of_the_models_shapes_is_used(tmp_path: Path) -> None:
    content = {"coarse": state(SmallNet(classes=3)), "fine": state()}
    assert is_as(saved(tmp_path / "w.pt", content), TRAINED)


def test_a_key_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="begin with model, model_ema"):
        saved(tmp_path / "w.pt", {"model": state(), "model_ema": state()}, "ema")


def test_the_key_is_said_in_the_file_and_makes_another_version(tmp_path: Path) -> None:
    torch.save({"model": state(), "ema": state(AVERAGED)}, tmp_path / "w.pt")
    text = '[[model]]\nname = "a"\nbuilder = "own_models:net"\nweights = "w.pt"\n'
    models = []
    for more in ("", 'weights_key = "ema"\n', 'weights_key = "model"\n'):
        (tmp_path / "models.toml").write_text(text + more)
        models.append(load_model(read_config(tmp_path / "models.toml")[0]))
    assert [is_as(each.module, AVERAGED) for each in models] == [False, True, False]
    assert len({each.version for each in models}) == 3


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ('weights_key = "ema"', "needs a weights file, and `weights` names none"),
        ('weights = "w.pt"\nweights_key = 3', "takes names joined by dots"),
        ('weights = "w.pt"\nweights_key = "."', "takes names joined by dots"),
    ],
)
def test_a_key_that_chooses_nothing_is_refused(tmp_path: Path, said: str, words: str) -> None:
    torch.save(state(), tmp_path / "w.pt")
    text = f'[[model]]\nname = "a"\nbuilder = "own_models:net"\n{said}\n'
    (tmp_path / "models.toml").write_text(text)
    with pytest.raises(ConfigurationError, match="weights_key: ") as error:
        read_config(tmp_path / "models.toml")
    assert words in error.value.detail


# ---- what else is in the file


def of_numpy() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.random.default_rng(0).normal(size=(2, 3))


INERT = [
    *(argparse.Namespace(lr=0.1, path=Path("x")), types.SimpleNamespace(a=1)),
    *(np.float64(91.2), np.float32(1), np.int64(3), np.bool_(True), np.str_("a"), np.bytes_(b"a")),
    *(of_numpy(), np.array(["a", "b"]), np.dtype("float32"), np.float32, [np.float64(1)]),
    *(
        collections.defaultdict(list, a=[1]),
        collections.defaultdict(int),
        collections.Counter("aa"),
    ),
    *(collections.OrderedDict(a=1), collections.deque([1, 2], maxlen=3)),
    *(Path("x"), PurePosixPath("a/b"), {Path("x"): 3}),
    *(dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.timedelta(1)),
    *(
        frozenset({1}),
        {1, 2},
        range(3),
        slice(1, 2),
        bytearray(b"a"),
        1 + 2j,
        list,
        torch.__version__,
    ),
    {"deep": [{"args": argparse.Namespace(a=argparse.Namespace(b=np.float64(1)))}]},
]


@pytest.mark.parametrize(
    "value", INERT, ids=[f"{n}-{type(each).__name__}" for n, each in enumerate(INERT)]
)
def test_values_of_types_that_do_nothing_are_read_over(tmp_path: Path, value: Any) -> None:
    content = {"hyper": value, "state_dict": state(), "more": [value]}
    assert is_as(saved(tmp_path / "w.pt", content), TRAINED)
    allowed = torch.serialization.get_safe_globals()
    assert not any(isinstance(each, tuple) for each in allowed), "for this file alone"


class Careless(argparse.Namespace):
    """Of a training script's own."""


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(Careless(), "Careless"), (print, "print"), (eval, "eval"), (getattr, "getattr")],
)
def test_a_type_that_could_do_anything_is_refused_by_its_name(
    tmp_path: Path, value: Any, wanted: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"tries to run .*{wanted}, which was refused"):
        saved(tmp_path / "w.pt", {"hyper": value, "state_dict": state()})


def test_no_object_of_a_type_in_the_file_is_ever_made(tmp_path: Path, monkeypatch) -> None:
    """Stand-ins are made in their place: not even `Namespace` is called."""
    torch.save({"args": argparse.Namespace(a=1), "state_dict": state()}, tmp_path / "w.pt")

    def refuse(*_: Any) -> None:
        raise AssertionError("made")

    monkeypatch.setattr(argparse.Namespace, "__setattr__", refuse)
    monkeypatch.setattr(argparse.Namespace, "__init__", refuse)
    net = SmallNet()
    load_into(net, read_weights(tmp_path / "w.pt"), "the file")
    assert is_as(net, TRAINED)


def test_two_threads_read_checkpoints_at_once(tmp_path: Path) -> None:
    """Torch forgets what it allows at the end of the first."""
    torch.save({"args": argparse.Namespace(), "state_dict": state()}, tmp_path / "w.pt")
    start = threading.Barrier(4)

    def read(_: int) -> int:
        start.wait(10)
        return sum(len(read_weights(tmp_path / "w.pt").entries) for _ in range(5))

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(read, range(4))) == {5 * len(state())}


# ---- how much work it is


def test_the_work_to_find_the_weights_grows_with_the_file(monkeypatch) -> None:
    """Counted in looks into the model's keys: as many as there are names between dots."""

    class Wanted(dict[str, Tensor]):
        looks = 0

        def __contains__(self, key: object) -> bool:
            Wanted.looks += 1
            return super().__contains__(key)

    def looks(count: int) -> int:
        Wanted.looks = 0
        names = [f"blocks.{i}.weight" for i in range(count)]
        content = {f"a.b.{name}": torch.ones(1) for name in names}
        select_weights(
            list(checkpoint_tensors(content)), Wanted(dict.fromkeys(names, torch.ones(1)))
        )
        return Wanted.looks

    assert looks(400) <= 4.2 * looks(100)


def test_a_refused_pickle_says_what_it_wanted_to_run(tmp_path: Path) -> None:
    torch.save({"state_dict": SmallNet().state_dict(), "net": SmallNet()}, tmp_path / "w.pt")
    with pytest.raises(ConfigurationError, match=r"tries to run tiny\.SmallNet"):
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
