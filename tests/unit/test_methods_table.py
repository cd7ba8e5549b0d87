"""The table of methods: it says what is so, and all that is known of one method comes from it."""

from __future__ import annotations

import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import get_args

import oracles
import pytest
import torch
from tiny import SmallNet, loaded

from api_schemas.methods import METHODS, MethodRecord
from api_schemas.options import ExplainOptions, Method
from service.cam.formulas import LAYER_METHODS
from service.cam.layouts import Layout
from service.errors import InvalidOption
from service.inference import method_table
from service.inference.forward_pass import ImagePass
from service.inference.method_table import MULTI_PASS_METHODS, check_method, cost
from service.inference.perturbation import Steps
from service.inference.questions import Question
from service.models.loaded import LoadedModel
from service.models.probes.attention import TokenAttention
from service.pipeline.answer_size import AnswerSizes
from service.pipeline.resolve import resolve_options
from service.pipeline.service import Limits
from service.routes.page.router import tables_module

ROOT = Path(__file__).parent.parent.parent
PIXELS = oracles.picture(3, 32, 32)
LIMITS = Limits(32, 1 << 25, 1 << 26, 2048, 1 << 26, 2000, 60)
OF_CONVOLUTIONS = [name for name, record in METHODS.items() if "attention" not in record.needs]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(SmallNet())


def question(model: LoadedModel, options: ExplainOptions) -> Question:
    return resolve_options(model, options, LIMITS, 1).question(PIXELS)


def test_the_option_takes_the_methods_of_the_table() -> None:
    assert sorted(get_args(Method)) == sorted(METHODS)
    assert all(name == record.name for name, record in METHODS.items())


def test_every_method_has_the_functions_that_its_record_wants() -> None:
    of_the_pass = {name for name, record in METHODS.items() if record.walks or not record.runs}
    assert LAYER_METHODS.keys() == of_the_pass
    assert MULTI_PASS_METHODS.keys() == {name for name, record in METHODS.items() if record.runs}


def test_the_readme_names_every_method() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| methods \| `([^`]+)`", readme, re.MULTILINE)
    assert row.split() == list(get_args(Method))


@pytest.mark.parametrize("name", OF_CONVOLUTIONS)
def test_a_map_has_the_shape_and_the_sign_that_the_table_says(
    model: LoadedModel, name: str
) -> None:
    record = METHODS[name]
    options = ExplainOptions(method=record.name, samples=20, steps=4)
    asked = replace(question(model, options), explain_top=7)
    (answer,) = oracles.answers(model, asked)
    grids = [each.grid for each in answer.explanations]
    assert {grid.shape for grid in grids} == {AnswerSizes(model, options, asked, 2048).cells}
    assert {grid.shape for grid in grids} == {(32, 32) if record.grid == "input" else (8, 8)}
    assert (min(grid.min() for grid in grids) < 0) == record.signed
    assert [bool(each.layers) for each in answer.explanations] == [record.has_layer] * 7


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_refused_where_the_model_lacks_what_it_needs(
    model: LoadedModel, name: str
) -> None:
    needs = set(METHODS[name].needs)
    tokens = TokenAttention((0,), 1, (0,), 10, Layout("tokens", (3, 3), 1), class_token=True)
    model = replace(model, attention=tokens)
    for lack, others in (
        ("no_layers", {"layer", "attention"}),
        ("no_gradients", {"layer", "gradients"}),
    ):
        lacking = replace(model, **{lack: "it is scripted"})
        if needs & others:
            with pytest.raises(InvalidOption, match=r"scripted\. It .* by occlusion and rise\.$"):
                check_method(lacking, name)
        else:
            check_method(lacking, name)


@pytest.fixture
def seventeenth(monkeypatch: pytest.MonkeyPatch) -> MethodRecord:
    """One record and one function more."""
    record = MethodRecord(
        "brightness",  # type: ignore[arg-type]
        "Brightness",
        "By hiding parts",
        "How bright each pixel is.",
        "always",
        "Nobody, 2026",
        runs="forward",
        times="samples",
        grid="input",
    )

    def brightness(part: ImagePass) -> Steps:
        for _ in range(part.question.samples):
            yield
        return [part.question.pixels.float().mean(dim=0)] * len(part.targets)

    monkeypatch.setitem(METHODS, record.name, record)  # type: ignore[arg-type]
    monkeypatch.setitem(method_table.MULTI_PASS_METHODS, record.name, brightness)  # type: ignore[arg-type]
    return record


def test_a_seventeenth_method_is_one_record_and_one_function(
    model: LoadedModel, seventeenth: MethodRecord
) -> None:
    name = seventeenth.name
    options = ExplainOptions().model_copy(update={"method": name, "samples": 3})
    asked = question(model, options)
    assert cost(model, asked) == 4
    (explanation,) = oracles.explained(model, asked)
    expected = PIXELS.float().mean(dim=0)
    torch.testing.assert_close(torch.tensor(explanation.grid), expected / expected.max())
    assert (explanation.method, explanation.layers, explanation.cost) == (name, (), 4)
    assert AnswerSizes(model, options, asked, 2048).cells == (32, 32)
    with pytest.raises(InvalidOption, match="`brightness` has no layer"):
        question(model, options.model_copy(update={"layer": ["features"]}))

    bare = replace(model, no_layers="it is scripted")
    check_method(bare, name)
    with pytest.raises(InvalidOption, match=r"by occlusion, rise and brightness\.$"):
        check_method(bare, "gradcam")

    page = runpy.run_path(str(ROOT / "docs" / "generate.py"))["methods_page"]()
    row = "| `brightness` | How bright each pixel is. | 0..1 | 1 + samples (1,000) | no | – |"
    assert row in page
    assert '"title": "Brightness", "group": "By hiding parts"' in tables_module().decode()
