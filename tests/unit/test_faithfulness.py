"""Layers ranked by what their maps are worth, on a model whose right layer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import SmallNet, loaded
from torch import Tensor, nn

from service.evaluation.faithfulness import STEPS, candidates, rank
from service.models.catalog import parse_model
from service.models.compiled.lane import Compiler
from service.models.loading import load_model

pytestmark = pytest.mark.timeout(20)


class SeesOneCorner(nn.Module):
    """Class 1 is light in the upper left quarter.

    `early` still has the light where it was; `turned` is the same map upside down, so that its maps
    point at the wrong corner; the head undoes that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Conv2d(3, 1, 4, stride=4, bias=False)
        self.turned = Flip()
        with torch.no_grad():
            self.early.weight.fill_(1 / 48)
        corner = torch.zeros(1, 1, 8, 8)
        corner[:, :, :4, :4] = 1
        self.register_buffer("corner", corner)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.turned(self.early(x)).flip(2, 3)
        light = 20 * (seen * self.corner).mean(dim=(1, 2, 3)) - 1
        return torch.stack([-light, light], dim=1)


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(2, 3)


def picture() -> Tensor:
    pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
    pixels[:, :16, :16] = 255
    pixels[:, 16:, 16:] = 60
    return pixels


def test_the_layer_whose_maps_point_at_the_evidence_comes_first() -> None:
    model = loaded(SeesOneCorner())
    best, worst = rank(model, [picture()], ["turned", "early"])
    assert (best.layer, worst.layer) == ("early", "turned")
    assert best.faithfulness > 0.3 > worst.faithfulness
    assert best.insertion > best.deletion
    assert best.milliseconds > 0
    assert best.per_millisecond == best.faithfulness / best.milliseconds


def test_a_picture_that_shows_nothing_measures_nothing() -> None:
    """On an empty picture insertion and deletion are the same."""
    empty = torch.zeros(3, 32, 32, dtype=torch.uint8)
    (measured,) = rank(loaded(SeesOneCorner()), [empty], ["early"])
    assert measured.faithfulness == 0


def test_candidates_have_maps_and_are_denser_towards_the_end() -> None:
    model = loaded(nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(40)], Head()))
    chosen = candidates(model, most=8)
    assert len(chosen) <= 8
    assert model.target_layer in chosen
    places = [int(path) for path in chosen]
    assert places == sorted(places)
    assert places[-1] - places[-2] < places[1] - places[0]
    small = loaded(SmallNet())
    assert set(candidates(small)) == {layer.path for layer in small.layers if layer.target}


class Head(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)).repeat(1, 2)


def test_what_needs_no_gradient_runs_in_the_compiled_lane_with_the_same_figures() -> None:
    model = load_model(parse_model("builtin"))
    compiled = Compiler().compiled(model)
    assert compiled.compiled is not None
    assert model.target_layer is not None
    sizes: list[int] = []

    def front(pixels: Tensor, *, wide: bool = False) -> tuple[Tensor, ...]:
        sizes.append(len(pixels))
        assert compiled.compiled is not None
        return compiled.compiled.front(pixels, wide=wide)

    counted = replace(compiled, compiled=replace(compiled.compiled, front=front))
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *model.preprocessing.crop), generator=generator)
    images, layers = [image.to(torch.uint8)], [model.target_layer]
    (found,), (expected,) = rank(counted, images, layers), rank(model, images, layers)
    assert sum(sizes) == 2 * (STEPS + 1), "every step of both curves"
    assert found.insertion == pytest.approx(expected.insertion, abs=1e-3)
    assert found.deletion == pytest.approx(expected.deletion, abs=1e-3)
