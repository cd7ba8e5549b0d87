"""ViT and Swin: the default layer, tokens and channels-last maps, inputs that are not square."""

from __future__ import annotations

import oracles
import pytest
import torch
from pytorch_grad_cam import GradCAM
from torch import Tensor, nn

from service.cam.layouts import Layout, layout_of
from service.inference.questions import Question

pytestmark = [pytest.mark.reference, pytest.mark.timeout(60)]


def test_vit_is_explained_at_the_norm_before_its_last_attention() -> None:
    """Behind that attention only the class token goes on; 14 × 14 patches, as the peer says too."""
    model = oracles.architecture("vit_b_16")
    layer = "encoder.layers.encoder_layer_11.ln_1"
    assert model.target_layer == layer
    pixels = oracles.picture(8)
    target = oracles.best(model, pixels)
    (peer,) = oracles.by_grad_cam(
        GradCAM,
        model.replicate(),
        [layer],
        oracles.input_of(model, pixels),
        target,
        to_map=oracles.tokens_to_map(14, 14),
    )
    (ours,) = oracles.explained(model, Question(pixels, layers=model.target_layers(())))
    assert ours.grid.shape == (14, 14)
    assert ours.class_id == target
    assert oracles.distance(ours, peer.relu()) < 1e-4


@pytest.mark.parametrize("layer", [None, "features.7.1.norm1"])
def test_swin_is_explained_on_its_last_map(layer: str | None) -> None:
    """7 × 7 by default, and where the channels come last the peer's with its reshape transform."""
    model = oracles.architecture("swin_t")
    pixels = oracles.picture(8)
    layers = model.target_layers([layer] if layer else [])
    target = oracles.best(model, pixels)
    (ours,) = oracles.explained(model, Question(pixels, layers=layers))
    assert ours.grid.shape == (7, 7)
    (peer,) = oracles.by_grad_cam(
        GradCAM,
        model.replicate(),
        [layer or "norm"],  # behind it channels are only moved to the front
        oracles.input_of(model, pixels),
        target,
        to_map=oracles.channels_first,
    )
    assert oracles.distance(ours, peer.relu()) < 1e-4


@pytest.mark.parametrize(("layer", "grid"), [(None, (7, 10)), ("features.3.1.norm2", (28, 40))])
def test_swin_with_an_oblong_input_equals_a_full_backward_pass(
    layer: str | None, grid: tuple[int, int]
) -> None:
    model = oracles.architecture("swin_t", 224, 320)
    pixels = oracles.picture(9, 224, 320)
    target = oracles.best(model, pixels)
    layers = model.target_layers([layer] if layer else [])
    (ours,) = oracles.explained(model, Question(pixels, layers=layers))
    activation, gradient = oracles.full_backward(
        model,
        layer or "norm",
        pixels,
        lambda logits: logits[target],
        oracles.channels_first,
    )
    assert ours.grid.shape == grid
    expected = (gradient.mean(dim=(1, 2), keepdim=True) * activation).sum(dim=0).relu()
    assert oracles.distance(ours, expected) < (5e-2 if layer else 1e-4)


SQUARE, OBLONG, TALL = (224, 224), (224, 320), (320, 224)


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((512, 7, 7), SQUARE, Layout("chw", (7, 7))),
        ((7, 7, 768), SQUARE, Layout("hwc", (7, 7))),
        ((7, 10, 768), OBLONG, Layout("hwc", (7, 10))),
        ((768, 7, 10), OBLONG, Layout("chw", (7, 10))),
        ((768, 10, 7), TALL, Layout("chw", (10, 7))),
        ((10, 7, 768), TALL, Layout("hwc", (10, 7))),
        # Inception's and AlexNet's convolutions have no padding: a side may lose a cell.
        ((192, 35, 34), (299, 299), Layout("chw", (35, 34))),
        # All three sides alike: channels first, as nearly all layers are.
        ((96, 96, 96), (384, 384), Layout("chw", (96, 96))),
        # Strides that differ by direction still give a map.
        ((64, 7, 28), SQUARE, Layout("chw", (7, 28))),
        ((196, 768), SQUARE, Layout("tokens", (14, 14), prefix=0)),
        ((197, 768), SQUARE, Layout("tokens", (14, 14), prefix=1)),
        ((198, 768), SQUARE, Layout("tokens", (14, 14), prefix=2)),
        ((200, 768), SQUARE, Layout("tokens", (14, 14), prefix=4)),
        ((201, 768), SQUARE, Layout("tokens", (14, 14), prefix=5)),
        ((281, 768), OBLONG, Layout("tokens", (14, 20), prefix=1)),
        ((281, 768), TALL, Layout("tokens", (20, 14), prefix=1)),
        ((512, 1, 1), SQUARE, None),
        ((1000,), SQUARE, None),
        ((3, 768), SQUARE, None),
        ((211, 768), SQUARE, None),
        ((2, 3, 4, 5), SQUARE, None),
        (None, SQUARE, None),
    ],
)
def test_layout_of(
    shape: tuple[int, ...] | None, size: tuple[int, int], expected: Layout | None
) -> None:
    assert layout_of(shape, size) == expected


def test_a_layout_puts_each_place_where_it_was() -> None:
    """Cell (y, x) of the map is token prefix + y · width + x, and pixel (y, x) of channels last."""
    maps = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    last = maps.permute(0, 2, 3, 1)
    tokens = torch.cat([torch.full((2, 1, 3), -1), last.flatten(1, 2)], dim=1)
    assert torch.equal(Layout("chw", (4, 5)).as_map(maps), maps)
    assert torch.equal(Layout("hwc", (4, 5)).as_map(last), maps)
    assert torch.equal(Layout("tokens", (4, 5), prefix=1).as_map(tokens), maps)


class Windows(nn.Module):
    """Cuts the image into four windows, as Swin does: a batch of windows is no batch of images."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Conv2d(3, 4, 8, stride=8)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        windows = torch.cat([half for side in x.chunk(2, 2) for half in side.chunk(2, 3)])
        found = self.each(windows).mean(dim=(2, 3)).reshape(4, len(x), 4)
        return self.head(found.mean(dim=0))


def test_a_layer_that_sees_windows_gives_no_map() -> None:
    model = oracles.served(Windows(), 32, 32)
    assert model.layer("each").shape == (4, 2, 2)
    assert not model.layer("each").target
