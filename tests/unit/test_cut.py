"""A model cut at a layer: front and tail together are the model, whatever goes beside the layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from service.models.compiled.cut import Uncuttable, split

SIDE = 32


def seeded(build: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval().requires_grad_(requires_grad=False)


class Block(nn.Module):
    """A transformer's block as everybody writes it, with a bias by position."""

    def __init__(self, width: int = 8, tokens: int = 17) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.table = nn.Parameter(torch.randn(2 * tokens))
        self.register_buffer("index", torch.arange(tokens * tokens) % (2 * tokens))
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        bias = self.table[self.index].view(self.tokens, self.tokens)
        q, k, v = self.qkv(self.norm1(x)).reshape(count, length, 3, width).unbind(2)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Behind the last norm go its residual, the number of images, and a table of biases."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, stride=8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor, mask: Tensor | None = None, *, scale: float = 2.0) -> Tensor:
        count = image.shape[0]
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.token.expand(count, -1, -1), x], dim=1))
        x = x if mask is None else x * mask
        return self.head(x[:, 0]).view(count, 5) * scale


class SeesTheImage(nn.Module):
    """What lies behind `inner` also sees the image, and the parts of an earlier tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        one, two = self.stem(image).chunk(2, dim=1)
        mixed = torch.cat([self.inner(one).relu(), two, image], dim=1)
        return mixed.mean(dim=(2, 3)) / image.size(0)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)

    def forward(self, image: Tensor) -> Tensor:
        self.inner(image)
        return self.other(image).mean(dim=(2, 3))


CASES = [
    (Transformer, "blocks.1.norm1", 2),
    (Transformer, "blocks.0.norm2", 2),
    (Transformer, "blocks.1", 1),
    (Transformer, "patches", 1),
    (SeesTheImage, "inner", 2),
    (SeesTheImage, "stem", 1),
]


@pytest.mark.parametrize(("build", "layer", "beside"), CASES)
@pytest.mark.parametrize("count", [1, 3])
def test_front_and_tail_are_the_model(build, layer: str, beside: int, count: int) -> None:
    model = seeded(build)
    images = torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    front, tail = split(model, layer)
    crossing = front(images)
    assert len(crossing) == 1 + beside, "the image for its size; tables are computed again"
    torch.testing.assert_close(tail(*crossing), model(images))


@pytest.mark.parametrize(("build", "layer", "beside"), CASES)
def test_the_gradient_at_the_first_is_that_at_the_layer(build, layer: str, beside: int) -> None:
    """The way around the layer has no part in it, as a hook at the layer's output sees it."""
    model = seeded(build)
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    front, tail = split(model, layer)
    activation, *others = front(images)
    activation = activation.detach().requires_grad_()
    (ours,) = torch.autograd.grad(tail(activation, *others)[:, 1].sum(), activation)

    def leaf(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1].clone()

    seen: list[Tensor] = []
    model.get_submodule(layer).register_forward_hook(leaf)
    (expected,) = torch.autograd.grad(model(images)[:, 1].sum(), seen[0])
    torch.testing.assert_close(activation, seen[0])
    torch.testing.assert_close(ours, expected)


def test_a_layer_that_the_output_does_not_need_is_no_place_to_cut_at() -> None:
    with pytest.raises(Uncuttable, match="does not depend"):
        split(seeded(Unused), "inner")
