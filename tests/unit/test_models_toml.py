"""`models.toml`: what it says becomes specs, and every mistake is named with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import SmallNet

from service.errors import ConfigurationError
from service.models.catalog import InputSpec
from service.models.loading import load_model
from service.models.models_toml import read_config

pytestmark = pytest.mark.timeout(20)

TINY = '[[model]]\nname = "a"\nbuilder = "own_models:net"\n'


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        (tmp_path / "models.toml").write_text(text)
        return tmp_path / "models.toml"

    return write


def refused(path: Path) -> str:
    with pytest.raises(ConfigurationError) as error:
        read_config(path)
    return error.value.detail


def test_everything_that_can_be_said_is_read(tmp_path: Path, write) -> None:
    torch.save(SmallNet().state_dict(), tmp_path / "w.pt")
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    (spec,) = read_config(
        write(
            '[[model]]\nname = "cats"\nbuilder = "own_models:net"\n'
            f'arguments = {{ classes = 2 }}\nweights = "w.pt"\nsha256 = "{"0" * 64}"\n'
            'labels = "labels.txt"\ntarget_layer = "features"\ndevice = "cpu"\n'
            'dtype = "bfloat16"\n'
            "[model.input]\nsize = [32, 48]\nresize = 50\ninterpolation = 'bicubic'\n"
            "mean = [0.1, 0.2, 0.3]\nstd = 1\nchannels = 3\n"
            '[model.output]\nactivation = "sigmoid"\nselect = "logits"\n'
        )
    )
    assert spec.name == "cats"
    assert spec.builder == "own_models:net"
    assert spec.arguments == {"classes": 2}
    assert spec.weights == tmp_path / "w.pt"
    assert spec.sha256 == "0" * 64
    assert spec.labels == ("cat", "dog")
    assert spec.input == InputSpec((32, 48), 50, "bicubic", (0.1, 0.2, 0.3), (1.0,), 3)
    assert (spec.output, spec.select) == ("sigmoid", "logits")
    assert (spec.target_layer, spec.device, spec.dtype) == ("features", "cpu", "bfloat16")
    assert spec.source == f"{tmp_path / 'models.toml'}: model[0]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["model: is missing", "[[model]]"]),
        ("[[models]]\n", ["models: unknown key", "Did you mean 'model'"]),
        ('[[model]]\nname = "a"\n', ["model[0].builder: is missing"]),
        (TINY + 'wieghts = "w.pt"', ["model[0].wieghts", "Did you mean 'weights'"]),
        (TINY + "input.maen = 1", ["model[0].input.maen", "Did you mean 'mean'"]),
        (TINY + "input.mean = 'grey'", ["model[0].input.mean: takes", "'grey'"]),
        (TINY + "input.mean = [1, true]", ["model[0].input.mean: takes"]),
        (TINY + "input.std = [1, 0, 1]", ["model[0].input.std: takes numbers above 0"]),
        (TINY + "input.size = 0", ["model[0].input.size: takes", "[height, width]"]),
        (TINY + "input.size = [1, 2, 3]", ["model[0].input.size: takes"]),
        (TINY + "input.channels = 1.5", ["model[0].input.channels: takes a whole number"]),
        (TINY + "input.interpolation = 'bicubik'", ["input.interpolation", "'bicubic'"]),
        (TINY + "output.activation = 'sigmoyd'", ["output.activation", "'sigmoid'"]),
        (TINY + "output.select = 1.5", ["model[0].output.select: takes an index"]),
        (TINY + "dtype = 'half'", ["model[0].dtype: takes float32, float16, bfloat16"]),
        (TINY + "labels = 7", ["model[0].labels: takes a list of strings"]),
        (TINY + "labels = 'no.txt'", ["model[0].labels: there is no file", "no.txt"]),
        (
            TINY + "weights = 'no.pt'",
            ["model[0].weights: there is no file", "folder of models.toml"],
        ),
        (TINY + "sha256 = 'abc'", ["model[0].sha256: takes the 64"]),
        (TINY + f"sha256 = '{'0' * 64}'", ["model[0].sha256: needs a weights file"]),
        (TINY + "arguments = 3", ["model[0].arguments:"]),
        (TINY.replace('"a"', '"a b"'), ["model[0].name: takes letters"]),
        (TINY + TINY, ["two models are called 'a'", "model[0] and", "model[1]"]),
        (TINY + "x = [1,\n\n\ny = 2\n", ["line 7"]),
        ('[[model]]\nname = "a\n', ["line 2, column 10: "]),
        ("[[model]]\nname = [1,\n", ["line 2"]),
    ],
)
def test_every_mistake_names_the_file_and_its_place(write, text: str, words: list[str]) -> None:
    path = write(text)
    detail = refused(path)
    for word in (str(path), *words):
        assert word in detail


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_bytes(b"[[model]]\n\nname = '\xff'\n")
    assert refused(path) == f"{path}, line 3: the file is not UTF-8."


def test_the_second_model_has_its_own_place(write) -> None:
    path = write(TINY + TINY.replace('"a"', '"b"') + "input.mean = 'no'\ntypo = 1")
    lines = refused(path).splitlines()
    assert lines[0].startswith(f"{path}: model[1].input.mean: ")
    assert lines[1].startswith(f"{path}: model[1].typo: ")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("l.txt", "a\nb c\n\n", ("a", "b c")),
        ("l.txt", "\ufeffa\r\nä\r\n", ("a", "ä")),
        ("l.txt", "a\u2028b\nc\x0bd\x85e\n", ("a\u2028b", "c\x0bd\x85e")),
        ("l.json", '["a", "b"]', ("a", "b")),
        ("class_to_idx.json", '{"dog": 1, "cat": 0}', ("cat", "dog")),
        ("class_to_idx.json", '{"7": 0, "3": 1}', ("7", "3")),
        ("l.json", '{"dog": "1", "cat": "0"}', ("cat", "dog")),
        ("l.json", '{"1": "dog", "0": "cat"}', ("cat", "dog")),
        ("l.json", '{"0": "7", "1": "3"}', ("7", "3")),
        (
            "imagenet_class_index.json",
            '{"0": ["n1", "tench"], "1": ["n2", "ray"]}',
            ("tench", "ray"),
        ),
        (
            "config.json",
            '{"model_type": "x", "id2label": {"0": "cat", "1": "dog"}}',
            ("cat", "dog"),
        ),
        ("info.json", '{"epoch": 3, "class_to_idx": {"dog": 1, "cat": 0}}', ("cat", "dog")),
        ("info.json", '{"classes": ["cat", "dog"]}', ("cat", "dog")),
        ("l.txt", '{"0": "cat", "1": "dog"}', ("cat", "dog")),
        ("l.csv", "id,name\n1,dog\n0,cat\n", ("cat", "dog")),
        ("l.csv", "\ufeffName;Class_ID\r\ndog;1\r\ncat;0\r\n", ("cat", "dog")),
        (
            "l.csv",
            'wnid,index,label,count\nn2,1,"ray, grey",3\nn1,0,tench,9\n',
            ("tench", "ray, grey"),
        ),
        ("l.csv", "0,cat\n1,dog\n", ("cat", "dog")),
        ("l.csv", "dog,1\ncat,0\n", ("cat", "dog")),
        ("l.csv", "index,synset\n0,cat\n1,dog\n", ("cat", "dog")),
        ("l.tsv", "idx\tlabel\n1\t7\n0\t3\n", ("3", "7")),
    ],
)
def test_labels_are_read_as_data_sets_leave_them(
    tmp_path: Path, write, name, text, expected
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    (spec,) = read_config(write(TINY + f"labels = '{name}'"))
    assert spec.labels == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("l.txt", b"a\n\nb\n", "nothing on line 2"),
        ("l.txt", b"", "is empty"),
        ("l.txt", b"\xff\xfe", "UTF-8"),
        ("l.json", b"[1, 2]", "JSON list"),
        ("l.json", b"{", "not JSON"),
        ("l.json", b"{}", "{label: id} or {id: label}"),
        ("l.json", b'{"cat": true}', "{label: id} or {id: label}"),
        ("l.json", b'{"cat": "a", "dog": "b"}', "{label: id} or {id: label}"),
        ("l.json", b'{"cat": 1, "dog": 2}', "2 labels and none for the id 0; ids are 0 to 1"),
        ("l.json", b'{"cat": 0, "dog": 0}', "two labels for the id 0"),
        ("l.json", b'{"cat": -1, "dog": 0}', "none for the id 1"),
        ("l.json", b'{"0": "a", "00": "b"}', "two labels for the id 0"),
        ("l.csv", b"", "is empty; it needs one row"),
        ("l.csv", b"cat\ndog\n", "it needs one of ids (id, index"),
        ("l.csv", b"id,a,b\n0,x,y\n", "one of them must be called label or name"),
        ("l.csv", b"id,name\n0,x\n1\n", "too few columns in its row 2"),
        ("l.csv", b"id,name\nn01,x\n", "has 'n01' in its column of ids"),
        ("l.csv", b"id,name\n1,x\n2,y\n", "none for the id 0"),
    ],
)
def test_a_label_file_that_holds_something_else_is_told(
    tmp_path: Path, write, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    detail = refused(write(TINY + f"labels = '{name}'"))
    assert f"model[0].labels: {tmp_path / name} " in detail or "cannot read" in detail
    assert words in detail


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("labels = ['a', 'b']", "model[0].labels: model 'a' has 7 classes and 2 labels"),
        ("input.mean = [1, 2]", "model[0].input.std: model 'a' has 2 channels"),
        ("input = { mean = [1, 2], std = [1, 2, 3] }", "input.mean: model 'a' has 3 channels"),
        ("input.channels = 5", "input.mean: model 'a' has 5 channels"),
        ("input.channels = 1", "cannot classify one image of 1 channels"),
        ("target_layer = 'feature'", "Did you mean 'features'"),
        ("output.select = 1", "forward() returns one tensor (1, 7)"),
        ("arguments = { klasses = 3 }", "own_models:net() raised TypeError"),
    ],
)
def test_what_only_loading_shows_is_told_with_its_place(write, said: str, words: str) -> None:
    (spec,) = read_config(write(TINY + said))
    with pytest.raises(ConfigurationError) as error:
        load_model(spec)
    assert "models.toml: model[0]." in error.value.detail
    assert words in error.value.detail


def test_the_file_goes_before_the_metadata_and_these_before_the_builder(
    tmp_path: Path, write
) -> None:
    said = {"labels": json.dumps(list("abcdefg")), "resize": "40", "crop": "32", "output": "none"}
    save_file(SmallNet().state_dict(), tmp_path / "w.safetensors", said)
    text = TINY + "weights = 'w.safetensors'\n"
    model = load_model(read_config(write(text))[0])
    assert (model.preprocessing.resize, model.preprocessing.crop) == (40, (32, 32))
    assert (model.labels, model.output) == (tuple("abcdefg"), "none")
    text += "labels = ['1', '2', '3', '4', '5', '6', '7']\ninput.resize = 36\n"
    model = load_model(read_config(write(text + "output.activation = 'sigmoid'"))[0])
    assert (model.preprocessing.resize, model.preprocessing.crop) == (36, (32, 32))
    assert (model.labels, model.output) == (tuple("1234567"), "sigmoid")


def test_a_size_without_resize_takes_the_whole_middle(write) -> None:
    """The resize that belongs to another size would leave a margin, or a black frame."""
    model = load_model(read_config(write(TINY + "input.size = [32, 48]"))[0])
    assert (model.preprocessing.resize, model.preprocessing.crop) == ((32, 48), (32, 48))


def test_pinned_weights_that_changed_are_not_opened(tmp_path: Path, write) -> None:
    torch.save(SmallNet().state_dict(), tmp_path / "w.pt")
    (spec,) = read_config(write(TINY + f"weights = 'w.pt'\nsha256 = '{'0' * 64}'"))
    with pytest.raises(ConfigurationError, match="not opened") as error:
        load_model(spec)
    assert "model[0].weights" in error.value.detail


def test_a_name_of_torchvision_weights_is_no_path(write) -> None:
    text = '[[model]]\nname = "a"\nbuilder = "torchvision/resnet18"\nweights = "IMAGENET1K_V9"\n'
    (spec,) = read_config(write(text))
    with pytest.raises(ConfigurationError, match="only IMAGENET1K_V1"):
        load_model(spec)
