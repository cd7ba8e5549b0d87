"""Wrong inputs at the command line and in models.toml.

The error names what was received, what is accepted and the next step.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pictures
import pytest
from typer.testing import CliRunner

from service.cli.main import app

pytestmark = pytest.mark.timeout(120)

NETS = """
from tiny import SmallNet

instance = SmallNet()


def build():
    return SmallNet()


def sized(classes, seed=0):
    return SmallNet(classes, seed)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's folder: two modules, a package called `service`, an image, a weights file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("wrong_nets.py").write_text(NETS)
    Path("wrong_broken.py").write_text("import no_such_library\n")
    Path("service").mkdir()
    Path("service/nets.py").write_text(NETS)
    Path("photo.png").write_bytes(pictures.png())
    Path("cats.pt").write_bytes(b"no weights")
    Path("photos").mkdir()
    yield
    for name in ("wrong_nets", "wrong_broken"):
        sys.modules.pop(name, None)


def run(*arguments: str) -> str:
    """The error of a command that does nothing: exit code 2, one line break taken for a space."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(re.sub("[│╭╮╰╯─]", " ", result.output).split())


def model(builder: str) -> tuple[str, ...]:
    return ("models", "--model", builder)


@pytest.mark.parametrize(
    ("arguments", "received", "accepted", "next_step"),
    [
        # Builders
        (model("resnet18"), "'resnet18'", "torchvision/NAME", "mean 'torchvision/resnet18'?"),
        (model("ResNet-18"), "'ResNet-18'", "torchvision/NAME", "mean 'torchvision/resnet18'?"),
        (model("torchvision.resnet18"), "'torchvision.resnet18'", "torchvision/NAME", "resnet18'?"),
        (model("buitlin"), "'buitlin'", "use builtin", "Did you mean 'builtin'?"),
        (model("cats.pt"), "'cats.pt'", "timm/NAME", "behind '@': torchvision/NAME@cats.pt"),
        (
            model("torchvision/resnet18:cats.pt"),
            "'resnet18:cats.pt'",
            "a weights file goes behind '@'",
            "torchvision/NAME@cats.pt",
        ),
        (
            model("torchvision/resnet18=cats.pt"),
            "'torchvision/resnet18=cats.pt'",
            "[NAME=]BUILDER[@WEIGHTS]",
            "torchvision/NAME@cats.pt",
        ),
        (model("torchvision/resnet18@cat.pt"), "cat.pt", "weights file", "mean 'cats.pt'?"),
        (model("net.onnx"), "'net.onnx'", "PyTorch models, not .onnx", "state dict or safetensors"),
        (model("https://a.example/w.pt"), "'https://a", "BUILDER@FILE", "download the file"),
        (model("builtin,wrong_nets:build"), "'builtin,wrong", "use builtin", "--model A --model B"),
        (
            model("wrong_nets:biuld"),
            "no function 'biuld'",
            "module wrong_nets",
            "Did you mean 'wrong_nets:build'?",
        ),
        (
            model("wrong_nest:build"),
            "no module 'wrong_nest'",
            "--app-dir",
            "Did you mean 'wrong_nets:build'?",
        ),
        (
            model("wrong_nets.py"),
            "'wrong_nets.py'",
            "package.module:function",
            "mean 'wrong_nets:FUNCTION'?",
        ),
        (
            model("./lab/nets.py:build"),
            "'./lab/nets.py:build'",
            "package.module:function",
            "mean 'lab.nets:build'?",
        ),
        (
            model("wrong_nets:instance"),
            "SmallNet",
            "a function that returns a module",
            "def build(): return instance",
        ),
        (model("wrong_nets:sized"), "'classes'", "(classes, seed=0)", "`arguments` of the model"),
        (
            model("wrong_broken:build"),
            "'no_such_library'",
            "cannot import 'wrong_broken:build'",
            "Install what it imports",
        ),
        (
            model("service.nets:build"),
            "no module 'service.nets'",
            "'service' is taken by",
            "write nets:build with --app-dir",
        ),
        # Flags and settings
        (("serve", "--port", "99999"), "99999", "less than or equal to 65535", "CAMSERVE_PORT"),
        (("serve", "--prot", "80"), "--prot", "Possible options", "--port"),
        (("serve", "--host", "192.0.2.1"), "--host 192.0.2.1", "of this machine", "127.0.0.1"),
        (("serve", "--log-format", "xml"), "'xml'", "'text' or 'json'", "CAMSERVE_LOG_FORMAT"),
        (("serve", "--config", "modles.toml"), "modles.toml", "--config", "[[model]]"),
        (("serve", "--config", "photos"), "photos", "--config", "[[model]]"),
        (("layers", "builtin", "--measure", "nowhere"), "nowhere", "no folder", "--measure"),
        (("layers", "builtin", "--measure", "photos"), "photos", "image", "no image"),
        (("calibrate", "a", "b", "c"), "a b c", "[MODEL] FOLDER", "takes"),
        (
            ("overlay-token", "--overlay-secret", "x", "--prefix", "/", "--method", "gradcm"),
            "gradcm",
            "method",
            "'gradcam'",
        ),
        (("explian", "photo.png"), "explian", "No such command", "'explain'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_argument_is_named_with_what_is_accepted_and_the_next_step(
    arguments: tuple[str, ...], received: str, accepted: str, next_step: str
) -> None:
    error = run(*arguments)
    for part in (received, accepted, next_step):
        assert part.lower() in error.lower(), error


HEAD = '[[model]]\nname = "a"\nbuilder = "builtin"\n'


@pytest.mark.parametrize(
    ("text", "received", "accepted", "next_step"),
    [
        ('[model]\nname = "a"\n', "holds no model", "for each model", "write [[model]]"),
        ('[[models]]\nname = "a"\n', "models: unknown key", "'model'", "[[model]]"),
        ('name = "a"\nbuilder = "builtin"\n', "name: unknown key", "model", "[[model]]"),
        ("", "model: is missing", "[[model]]", "Begin with"),
        ("model = []\n", "holds no model", "[[model]]", "write"),
        (HEAD.replace("builder", "bulider"), "bulider: unknown key", "'builder'", "Did you mean"),
        (HEAD + "weights = 'cat.pt'\n", "cat.pt", "folder of models.toml", "mean 'cats.pt'?"),
        (HEAD + "builder = 'x'\n", "line 4", "overwrite", "value"),
        (HEAD.replace("builtin", "resnet18"), "'resnet18'", "torchvision/NAME", "/resnet18'?"),
        (HEAD + "input.size = 'big'\n", "'big'", "number of pixels", "model[0].input.size"),
        (HEAD + "output.activation = 'soft'\n", "'soft'", "softmax, sigmoid", "'softmax'?"),
        (HEAD + HEAD, "two models are called 'a'", "`name` in the file", "rename one"),
        (HEAD + "[model.inputs]\nsize = 3\n", "inputs: unknown key", "'input'", "Did you mean"),
    ],
)
def test_a_mistake_in_models_toml_is_named_with_its_place_and_what_to_write(
    text: str, received: str, accepted: str, next_step: str
) -> None:
    Path("models.toml").write_text(text)
    error = run("models", "--config", "models.toml")
    assert "models.toml" in error
    for part in (received, accepted, next_step):
        assert part in error, error


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("models", "--model", "frist"), ("'frist'", "first, second", "Did you mean 'first'?")),
        (("layers",), ("takes one model", "first, second", "--model first")),
        (("models", "--weights", "cats.pt"), ("cats.pt", "first, second", "BUILDER@WEIGHTS")),
    ],
)
def test_a_model_of_the_file_is_suggested(
    arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    second = HEAD.replace('"a"', '"second"')
    Path("models.toml").write_text(HEAD.replace('"a"', '"first"') + second)
    error = run(*arguments, "--config", "models.toml")
    for part in parts:
        assert part in error, error
