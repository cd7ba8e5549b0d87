"""From `--model` to a served model: every mistake is a sentence, and no file runs code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from cheap_weights import cheaply
from structlog.testing import capture_logs
from tiny import SmallNet
from torch import nn

from service.errors import ConfigurationError
from service.models.catalog import ModelSpec, parse_model, parse_models
from service.models.loading import load_model

LABELS = [f"kind {index}" for index in range(7)]


def refused(function: Callable[..., Any], *args: Any, **more: Any) -> str:
    """The sentence with which a call is refused."""
    with pytest.raises(ConfigurationError) as error:
        function(*args, **more)
    return error.value.detail


def load(argument: str, **more: Any) -> Any:
    return load_model(parse_model(argument), **more)


def refused_file(path: Path) -> str:
    """The sentence with which a weights file is refused."""
    return refused(load, f"tiny:small@{path}")


def save_state(path: Path, model: nn.Module | None = None) -> Path:
    torch.save((model or SmallNet()).state_dict(), path)
    return path


def save_safetensors(path: Path, metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(SmallNet(seed=3).state_dict(), path, metadata)
    return path


# ---- the form of --model


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("builtin", ModelSpec("builtin", "builtin")),
        ("torchvision/resnet50", ModelSpec("resnet50", "torchvision/resnet50")),
        ("package.module:make", ModelSpec("make", "package.module:make")),
        ("cats=torchvision/resnet50", ModelSpec("cats", "torchvision/resnet50")),
        (
            "cats=torchvision/resnet18@weights/cats.safetensors",
            ModelSpec("cats", "torchvision/resnet18", Path("weights/cats.safetensors")),
        ),
        (
            "torchvision/resnet18@runs/lr=0.1/best.pt",
            ModelSpec("resnet18", "torchvision/resnet18", Path("runs/lr=0.1/best.pt")),
        ),
        ("a=b:c@user@host/w=1.pt", ModelSpec("a", "b:c", Path("user@host/w=1.pt"))),
        ("builtin@mine.safetensors", ModelSpec("builtin", "builtin", Path("mine.safetensors"))),
        ("v1.2_a-b=builtin", ModelSpec("v1.2_a-b", "builtin")),
    ],
)
def test_a_model_is_name_builder_and_weights(argument: str, expected: ModelSpec) -> None:
    assert parse_model(argument) == expected


@pytest.mark.parametrize(
    "argument",
    ["", "=", "cats=", "@weights.pt", "a b=builtin", "../x=builtin", "-a=builtin", "é=builtin"],
)
def test_a_model_of_another_form_is_refused_with_an_example(argument: str) -> None:
    detail = refused(parse_model, argument)
    assert repr(argument) in detail
    assert "[NAME=]BUILDER[@WEIGHTS]" in detail
    assert "torchvision/resnet50" in detail


def test_weights_that_are_named_and_empty_are_refused() -> None:
    """As from `--model torchvision/resnet50@$FILE` where FILE is not set: no silent default."""
    assert "[@WEIGHTS]" in refused(parse_model, "torchvision/resnet50@")


def test_without_a_model_the_built_in_one_is_served() -> None:
    assert parse_models(()) == (ModelSpec("builtin", "builtin"),)
    assert parse_models((), Path("w.pt")) == (ModelSpec("builtin", "builtin", Path("w.pt")),)


def test_several_models_keep_their_order() -> None:
    specs = parse_models(("b=builtin", "a=builtin"))
    assert [spec.name for spec in specs] == ["b", "a"]


def test_two_models_of_one_name_are_refused() -> None:
    detail = refused(parse_models, ("torchvision/resnet18", "resnet18=builtin"))
    assert "'resnet18'" in detail
    assert "NAME=BUILDER" in detail


@pytest.mark.parametrize("arguments", [("builtin", "a=builtin"), ("builtin@other.pt",)])
def test_the_weights_flag_is_for_one_model_without_weights(arguments: tuple[str, ...]) -> None:
    assert "--model BUILDER@WEIGHTS" in refused(parse_models, arguments, Path("w.pt"))


# ---- builders


@pytest.fixture
def builders(tmp_path: Path, monkeypatch) -> Callable[[str], None]:
    """Write the module `my_builders` and make it importable."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(text: str) -> None:
        (tmp_path / "my_builders.py").write_text(f"import torch\nfrom torch import nn\n{text}\n")
        monkeypatch.delitem(sys.modules, "my_builders", raising=False)

    return write


def test_a_function_builds_a_model_that_is_frozen_and_in_eval_mode() -> None:
    model = load("tiny:small")
    assert (model.name, model.labels[0], len(model.labels)) == ("small", "class 0", 7)
    assert model.target_layer == "features"
    assert not any(module.training for module in model.module.modules())
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert not any(module._forward_hooks for module in model.module.modules())
    assert model.version == load("other=tiny:small").version != load("tiny:other").version
    assert not model.random_weights


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("no.such.module:make", ["'no.such.module:make'", "--app-dir"]),
        ("tiny:smal", ["'tiny:smal'", "smal"]),
        ("tiny:RED", ["it is int, not a function"]),
        ("resnet50", ["'resnet50'", "torchvision/NAME", "package.module:function"]),
        ("unheard/of", ["'unheard/of'"]),
        ("torchvision/resnet51", ["Did you mean 'torchvision/resnet50'", "'resnet51'"]),
        ("torchvision/raft_large", ["'raft_large'"]),
    ],
)
def test_a_builder_that_is_not_there_is_told(argument: str, words: list[str]) -> None:
    detail = refused(load, argument)
    for word in words:
        assert word in detail


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise RuntimeError('planted')", ["cannot import", "planted"]),
        ("def make(:", ["cannot import"]),
        ("def make(): raise RuntimeError('planted')", ["my_builders:make()", "planted"]),
        ("def make(size): return nn.Linear(size, 2)", ["TypeError", "size"]),
        ("def make(): return 42", ["returned int, not a module"]),
        ("def make(): return nn.Linear", ["returned type, not a module"]),
        ("def make(): return nn.Linear(3, 2)", ["224×224", "cannot classify"]),
        ("def make(): return nn.Flatten(2)", ["(batch, classes)", "(1, 3, 50176)"]),
    ],
)
def test_a_function_that_builds_no_classifier_is_told(builders, text: str, words) -> None:
    builders(text)
    detail = refused(load, "my_builders:make")
    for word in ("'make'", *words):
        assert word in detail


# ---- weights files


def test_a_state_dict_fills_a_model(tmp_path: Path) -> None:
    trained = SmallNet(seed=3)
    file = save_state(tmp_path / "w.pt", trained)
    model = load(f"tiny:small@{file}")
    assert torch.equal(model.module.head.weight, trained.head.weight)
    assert model.version == hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    assert model.labels == tuple(f"class {index}" for index in range(7))


def test_a_state_dict_may_be_wrapped(tmp_path: Path) -> None:
    """As training loops save it, beside the epoch and the optimiser's state."""
    file = tmp_path / "w.pth"
    trained = SmallNet(seed=3)
    torch.save({"epoch": 3, "state_dict": trained.state_dict(), "best": 0.5}, file)
    assert torch.equal(load(f"tiny:small@{file}").module.head.bias, trained.head.bias)


def test_batch_counters_may_be_missing(tmp_path: Path) -> None:
    """Inference never reads them, and files from other formats lack them."""
    state = SmallNet(seed=3).state_dict()
    del state["features.1.num_batches_tracked"]
    torch.save(state, tmp_path / "w.pt")
    assert load(f"tiny:small@{tmp_path / 'w.pt'}").name == "small"


def test_safetensors_metadata_say_how_to_feed_the_model(tmp_path: Path) -> None:
    metadata = {
        "labels": json.dumps(LABELS),
        "resize": "40",
        "crop": "32,48",
        "mean": "0.1,0.2,0.3",
        "std": "0.4,0.5,0.6",
        "interpolation": "bicubic",
        "target_layer": "features.3",
    }
    file = save_safetensors(tmp_path / "w.safetensors", metadata)
    model = load(f"tiny:small@{file}")
    assert model.labels == tuple(LABELS)
    assert model.target_layer == "features.3"
    preprocessing = model.preprocessing
    assert (preprocessing.resize, preprocessing.crop) == (40, (32, 48))
    assert preprocessing.mean == (0.1, 0.2, 0.3)
    assert preprocessing.std == (0.4, 0.5, 0.6)
    assert preprocessing.interpolation == "bicubic"


def test_without_metadata_the_defaults_hold(tmp_path: Path) -> None:
    model = load(f"tiny:small@{save_safetensors(tmp_path / 'w.safetensors')}")
    assert (model.preprocessing.resize, model.preprocessing.crop) == (256, (224, 224))


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"labels": "a,b,c"}, ["`labels`", "JSON list"]),
        ({"labels": "[1, 2]"}, ["`labels`"]),
        ({"labels": '["one", "two"]'}, ["7 classes", "2 labels"]),
        ({"crop": "large"}, ["metadata", "large"]),
        ({"crop": "0"}, ["`crop`"]),
        ({"resize": "-1"}, ["`resize`"]),
        ({"mean": "0.5"}, ["three for RGB"]),
        ({"std": "0.5,0.5,0"}, ["`std`"]),
        ({"std": "0.5,0.5,nan"}, ["`std`"]),
        ({"interpolation": "lanczos"}, ["`interpolation`", "bicubic"]),
        ({"target_layer": "features.33"}, ["'features.33'", "Did you mean 'features.3'"]),
        ({"target_layer": "head"}, ["'head'"]),
        ({"output": "argmax"}, ["'argmax'", "sigmoid"]),
    ],
)
def test_metadata_that_make_no_sense_are_refused_at_the_start(
    tmp_path: Path, metadata: dict[str, str], words: list[str]
) -> None:
    """Not at the first request."""
    file = save_safetensors(tmp_path / "w.safetensors", metadata)
    detail = refused(load, f"tiny:small@{file}")
    for word in words:
        assert word in detail


def test_keys_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = SmallNet(classes=4).state_dict()
    state["module.head.weight"] = state.pop("head.weight")
    torch.save(state, tmp_path / "w.pt")
    detail = refused_file(tmp_path / "w.pt")
    assert detail.startswith("model 'small': the weights file does not fit the model. missing: ")
    for words in (
        "missing: head.weight",
        "unexpected: module.head.weight. ",
        "wrong shape: head.bias: (4,) in the file, (7,) here. ",
        "another architecture?",
    ):
        assert words in detail


def test_a_long_list_of_keys_is_cut(tmp_path: Path) -> None:
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "w.pt")
    detail = refused(load, f"tiny:small@{tmp_path / 'w.pt'}")
    assert "more" in detail
    assert len(detail) < 800


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    trap = tmp_path / "it ran"

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (trap,))

    for name in ("w.pt", "w.pth", "w.bin", "w.pkl"):
        torch.save({"head.weight": Trap()}, tmp_path / name)
        assert "without running code" in refused_file(tmp_path / name)
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
        assert "without running code" in refused_file(tmp_path / name)
    assert not trap.exists()


def test_a_whole_pickled_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(SmallNet(), tmp_path / "w.pt")
    detail = refused_file(tmp_path / "w.pt")
    assert "torch.save(model.state_dict(), …)" in detail


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("w.safetensors", b"\xff" * 8 + b"{}", ["is not a safetensors file"]),
        ("w.safetensors", b"", ["is not a safetensors file"]),
        ("w.safetensors", b"\x02\0\0\0\0\0\0\0[]", ["is not a safetensors file"]),
        ("w.pt", b"", ["not a state dict"]),
        ("w.pt", b"<!doctype html>", ["not a state dict"]),
    ],
)
def test_a_file_that_holds_something_else_is_told(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    detail = refused_file(tmp_path / name)
    assert str(tmp_path / name) in detail
    for word in words:
        assert word in detail


@pytest.mark.parametrize("found", [[1, 2], {"weights": 3}, torch.zeros(3)])
def test_what_is_no_state_dict_is_told(tmp_path: Path, found: Any) -> None:
    torch.save(found, tmp_path / "w.pt")
    assert "not a state dict of tensors" in refused_file(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors"])
def test_a_missing_file_is_told(tmp_path: Path, name: str) -> None:
    detail = refused_file(tmp_path / name)
    assert str(tmp_path / name) in detail
    assert "No such file" in detail


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert "directory" in refused_file(tmp_path)


def test_half_precision_weights_fill_a_float32_model(tmp_path: Path) -> None:
    state = {key: value.half() for key, value in SmallNet(seed=3).state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    head = load(f"tiny:small@{tmp_path / 'w.pt'}").module.head
    assert head.weight.dtype == torch.float32
    assert torch.equal(head.weight.half(), state["head.weight"])


# ---- torchvision


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch) -> None:
    """An empty cache, and nothing that answers."""

    def unreachable(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError("planted: no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)


@pytest.mark.timeout(20)
def test_without_a_network_the_start_says_how_to_give_a_file(no_network) -> None:
    detail = refused(load, "torchvision/squeezenet1_1")
    assert "planted: no route" in detail
    assert "--model torchvision/squeezenet1_1 --weights FILE" in detail
    assert "CAMSERVE_ALLOW_RANDOM_WEIGHTS=true" in detail


@pytest.mark.timeout(20)
def test_a_download_that_is_something_else_is_told(tmp_path: Path, monkeypatch) -> None:
    """As behind a network's log-in page."""
    page = tmp_path / "page"
    page.write_bytes(b"<!doctype html>please log in")
    opened = urllib.request.urlopen
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.hub.urlopen", lambda *_, **__: opened(page.as_uri()))
    detail = refused(load, "torchvision/squeezenet1_1")
    assert "invalid hash" in detail
    assert "--weights FILE" in detail


@pytest.mark.timeout(20)
def test_random_weights_fetch_nothing_are_seeded_and_flagged(no_network) -> None:
    before = torch.random.get_rng_state()
    one, two = (load("torchvision/squeezenet1_1", allow_random_weights=True) for _ in range(2))
    assert one.random_weights
    assert one.version == two.version
    assert len(one.labels) == 1000
    assert one.labels[281] == "tabby"
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.timeout(20)
def test_a_file_says_how_many_classes_there_are(tmp_path: Path, no_network) -> None:
    trained = torchvision.models.squeezenet1_1(num_classes=3)
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    model = load(f"flowers=torchvision/squeezenet1_1@{tmp_path / 'w.pt'}")
    assert model.labels == ("class 0", "class 1", "class 2")
    assert not model.random_weights
    assert torch.equal(model.module.classifier[1].weight, trained.classifier[1].weight)


@pytest.mark.timeout(20)
def test_a_users_own_thousand_classes_have_no_names_of_imagenet(tmp_path: Path, no_network) -> None:
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "w.pt")
    model = load(f"torchvision/squeezenet1_1@{tmp_path / 'w.pt'}")
    assert model.labels == tuple(f"class {index}" for index in range(1000))


@pytest.mark.timeout(20)
def test_a_file_that_torchvision_published_has_its_labels_and_its_transform(
    tmp_path: Path, monkeypatch, no_network
) -> None:
    """Known by its sha256, the first digits of which are in the name of every such file."""
    file = save_state(tmp_path / "w.pt", torchvision.models.squeezenet1_1())
    digits = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    entry = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    published = dataclasses.replace(entry.value, url=f"https://a.test/squeezenet-{digits}.pth")
    monkeypatch.setattr(entry, "_value_", published)
    model = load(f"torchvision/squeezenet1_1@{file}")
    assert model.labels[281] == "tabby"
    assert model.preprocessing.resize == entry.transforms().resize_size[0]


@pytest.mark.timeout(20)
def test_other_classes_than_the_entrys_have_no_labels_of_it(no_network) -> None:
    spec = ModelSpec("a", "torchvision/squeezenet1_1", arguments={"num_classes": 4})
    model = load_model(spec, allow_random_weights=True)
    assert model.labels == ("class 0", "class 1", "class 2", "class 3")


def test_a_function_of_a_thousand_classes_has_no_names_of_imagenet(builders) -> None:
    builders("from tiny import SmallNet\ndef make(): return SmallNet(classes=1000)")
    assert load("my_builders:make").labels[281] == "class 281"


@pytest.mark.parametrize(
    ("name", "part"), [("inception_v3", "AuxLogits.fc"), ("googlenet", "aux1.fc2")]
)
@pytest.mark.timeout(60)
def test_a_fine_tuned_head_beside_a_training_head_of_a_thousand_counts_the_classes(
    tmp_path: Path, no_network, name: str, part: str
) -> None:
    """As tutorials do it: `model.fc` is replaced, and the head for training alone is left."""
    trained: Any = cheaply(
        lambda: torchvision.models.get_model(name, weights=None, init_weights=False)
    )
    assert trained.get_submodule(part).out_features == 1000
    trained.fc = torch.nn.Linear(trained.fc.in_features, 3)
    with capture_logs() as logs:
        model = load(f"torchvision/{name}@{save_state(tmp_path / 'w.pt', trained)}")
    assert model.labels == ("class 0", "class 1", "class 2")
    assert torch.equal(model.module.fc.bias, trained.fc.bias)
    assert any(each.get("dropped", "").startswith(part.partition(".")[0]) for each in logs)
    trained.aux_logits, without = False, {"AuxLogits", "aux1", "aux2"}
    state = {k: v for k, v in trained.state_dict().items() if k.partition(".")[0] not in without}
    torch.save(state, tmp_path / "w.pt")
    assert len(load(f"torchvision/{name}@{tmp_path / 'w.pt'}").labels) == 3


@pytest.mark.timeout(20)
def test_a_file_of_another_architecture_is_told(tmp_path: Path, no_network) -> None:
    save_state(tmp_path / "w.pt")
    detail = refused(load, f"torchvision/squeezenet1_1@{tmp_path / 'w.pt'}")
    assert "another architecture" in detail


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "classes", "task"),
    [
        ("fasterrcnn_mobilenet_v3_large_320_fpn", 5, "detection"),
        ("ssdlite320_mobilenet_v3_large", 4, "detection"),
        ("lraspp_mobilenet_v3_large", 3, "segmentation"),
    ],
)
def test_the_classes_of_a_detectors_or_segmenters_file_are_counted(
    tmp_path: Path, name: str, classes: int, task: str
) -> None:
    """Also where a size of its head is a multiple: four coordinates, or six anchors, for each."""
    empty = {"weights": None, "weights_backbone": None}
    net = torchvision.models.get_model(name, num_classes=classes, **empty).eval()
    torch.save(net.state_dict(), tmp_path / "tuned.pth")
    model = load_model(ModelSpec(name, f"torchvision/{name}", tmp_path / "tuned.pth"))
    assert (model.task, len(model.labels)) == (task, classes)
    loaded = model.module.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in net.state_dict().items())
