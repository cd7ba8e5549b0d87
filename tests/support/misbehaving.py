"""Models that answer wrongly when they are copied, batched, interleaved or believed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from nets import seeded
from tiny import SmallNet
from torch import Tensor, nn
from torch.nn import functional

SIDE = 32


class ReadsClosure(SmallNet):
    """A hook keeps the features in a dict of its closure, which a deep copy does not have."""

    def __init__(self) -> None:
        super().__init__(3)
        kept: dict[str, Tensor] = {}

        def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
            kept["features"] = output

        self.features.register_forward_hook(keep)
        self.kept = kept
        kept["features"] = torch.zeros(1, 16, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.features(x)
        return self.head(self.kept["features"].mean(dim=(2, 3)))


_GLOBAL: dict[str, Tensor] = {}


class ReadsGlobal(SmallNet):
    """A hook keeps the features in a dict that all copies share."""

    def __init__(self) -> None:
        super().__init__(3)
        self.features.register_forward_hook(_keep_globally)

    def forward(self, x: Tensor) -> Tensor:
        self.features(x)
        return self.head(_GLOBAL["features"].mean(dim=(2, 3)))


def _keep_globally(_module: nn.Module, _args: Any, output: Tensor) -> None:
    _GLOBAL["features"] = output


class KeepsOnClass(SmallNet):
    """The mean of the image is an attribute of the class, written and read around a layer."""

    mean = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        KeepsOnClass.mean = x.mean(dim=(2, 3)).sum(dim=1, keepdim=True)
        return super().forward(x) * (2 + KeepsOnClass.mean)


class Locked(SmallNet):
    """Has a lock, which cannot be copied."""

    def __init__(self) -> None:
        super().__init__(3)
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return super().forward(x)


def forward_of_master() -> nn.Module:
    """The forward that a copy calls still runs the layers of the module it was copied from."""
    net = SmallNet(3)
    whole = net.forward
    net.forward = lambda x: whole(x) * 2  # type: ignore[method-assign]
    return net


class BatchStatistics(SmallNet):
    """Normalises over the images of the batch."""

    def __init__(self) -> None:
        super().__init__(3)
        self.norm = nn.BatchNorm2d(16, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.features(x)).amax(dim=(2, 3)))


class HiddenNorm(SmallNet):
    """A batch normalisation in a plain list, which `eval()` does not reach."""

    def __init__(self) -> None:
        super().__init__(3)
        self.hidden = [nn.BatchNorm2d(16)]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden[0](self.features(x)).amax(dim=(2, 3)))


class ViewOfOne(SmallNet):
    """Flattens as if there were one image."""

    def __init__(self) -> None:
        super().__init__(3)
        self.flat = seeded(lambda: nn.Linear(16 * 64, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.features(x).reshape(1, -1))


class MixesBatch(SmallNet):
    """Moves the images of a batch into one mean."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).transpose(0, 1).reshape(1, 16, -1).mean(dim=2))


class MeanOfBatch(SmallNet):
    """Subtracts the mean over the images."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + logits.mean(dim=0, keepdim=True)


class Drops(SmallNet):
    """A functional dropout that `eval()` does not reach."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.dropout(self.features(x).mean(dim=(2, 3)), 0.5))


class Counts(SmallNet):
    """Its logits grow from call to call."""

    def __init__(self) -> None:
        super().__init__(3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + self.calls)


class Activated(SmallNet):
    """The activation is part of the model."""

    def __init__(self, activation: Callable[[Tensor], Tensor], classes: int = 3) -> None:
        super().__init__(classes)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(4 * super().forward(x))


def softmax() -> nn.Module:
    return Activated(nn.Softmax(dim=1))


def log_softmax() -> nn.Module:
    return Activated(nn.LogSoftmax(dim=1))


def sigmoid() -> nn.Module:
    return Activated(nn.Sigmoid())


def one_logit() -> nn.Module:
    return SmallNet(1)


def one_probability() -> nn.Module:
    return Activated(nn.Sigmoid(), classes=1)


class _Doubles(torch.autograd.Function):
    """Has no vmap rule."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        assert gradient.sum().item() is not None  # what a vmapped tensor does not allow
        return 2 * gradient


class OwnFunction(SmallNet):
    """A custom `autograd.Function` behind the features."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(_Doubles.apply(self.features(x)).mean(dim=(2, 3)))


class Crops(SmallNet):
    """Looks at the middle half of its input."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        inner = x[:, :, height // 4 : height - height // 4, width // 4 : width - width // 4]
        return super().forward(inner)


class CutsCorner(SmallNet):
    """Looks at the upper left quarter of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, : x.shape[2] // 2, : x.shape[3] // 2])


class Rolled(SmallNet):
    """Its map begins in the middle of the image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.roll(x, (13, 13), dims=(2, 3)))


class Transposed(SmallNet):
    """Its map has the columns of the image as rows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(2, 3))


class Block(nn.Module):
    """A transformer's block, the norms before what they feed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Tokens(nn.Module):
    """A small vision transformer of 64 patches, with `extra` tokens behind the first `start` ones.

    by_column: whether patches are counted down each column.
    """

    def __init__(self, extra: int, start: int, *, by_column: bool = False) -> None:
        super().__init__()
        width = 32
        self.start, self.by_column = start, by_column
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.extra = nn.Parameter(0.02 * torch.randn(1, extra, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.patch(x)
        maps = maps.transpose(2, 3) if self.by_column else maps
        tokens = maps.flatten(2).transpose(1, 2) + self.position
        extra = self.extra.expand(len(tokens), -1, -1)
        tokens = torch.cat([tokens[:, : self.start], extra, tokens[:, self.start :]], dim=1)
        tokens = self.norm(self.blocks(tokens))
        kept = [tokens[:, : self.start], tokens[:, self.start + extra.shape[1] :]]
        return self.head(torch.cat(kept, dim=1).mean(dim=1))


class SequenceFirst(nn.Module):
    """`nn.TransformerEncoder` as it comes, with the batch in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 3)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).permute(2, 0, 1)
        tokens = torch.cat([self.token.expand(-1, tokens.shape[1], -1), tokens])
        return self.head(self.encoder(tokens)[0])


class Scrambled(nn.Module):
    """Patches in an order that no layout knows."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 32, 4, 4), nn.LayerNorm(32)
        self.mix, self.head = nn.Linear(32, 32), nn.Linear(32, 3)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)[:, self.order]
        return self.head(self.mix(self.norm(tokens)).mean(dim=1))


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1, keepdim=True).expand_as(x)


class MixedScrambled(Scrambled):
    """Behind its patches in no known order a layer whose cells all see the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = _Mean()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.patch(x).flatten(2).transpose(1, 2)[:, self.order])
        return self.head(self.mix(self.mean(tokens)).mean(dim=1))


class MixedAtEnd(Tokens):
    """Extra tokens at the end, and a layer whose cells all see the whole image."""

    def __init__(self) -> None:
        super().__init__(4, 64)
        self.mean = _Mean()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        tokens = torch.cat([tokens, self.extra.expand(len(tokens), -1, -1)], dim=1)
        return self.head(self.mean(self.norm(self.blocks(tokens))).mean(dim=1))


def mixed_scrambled() -> nn.Module:
    return seeded(MixedScrambled)


def mixed_at_end() -> nn.Module:
    return seeded(MixedAtEnd)


def tokens_at_start() -> nn.Module:
    return seeded(lambda: Tokens(4, 0))


def tokens_at_end() -> nn.Module:
    return seeded(lambda: Tokens(4, 64))


def tokens_inside() -> nn.Module:
    return seeded(lambda: Tokens(3, 32))


def tokens_by_column() -> nn.Module:
    return seeded(lambda: Tokens(1, 0, by_column=True))


def sequence_first() -> nn.Module:
    return seeded(SequenceFirst)


def scrambled() -> nn.Module:
    return seeded(Scrambled)


class BuildsTable(SmallNet):
    """Its first call replaces a buffer by one of another shape, and keeps an attribute."""

    def __init__(self) -> None:
        super().__init__(3)
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)
        self.columns = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[1] != x.shape[3]:
            self.columns = x.shape[3]
            self.table = torch.linspace(1, 2, self.columns)[None]
        return super().forward(x * self.table)


class ClassAttentionBlock(nn.Module):
    """XCiT's end: a norm of the class token alone behind the last norm of all tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        mixed = self.attention(normed[:, :1], normed, normed, need_weights=False)[0]
        return torch.cat([self.norm2(x[:, :1] + mixed), x[:, 1:]], dim=1)


class ClassTokens(Tokens):
    """Class attention twice behind a block of patches."""

    def __init__(self) -> None:
        super().__init__(1, 0)
        self.blocks = nn.Sequential(Block(32), ClassAttentionBlock(32), ClassAttentionBlock(32))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        tokens = torch.cat([self.extra.expand(len(tokens), -1, -1), tokens], dim=1)
        return self.head(self.norm(self.blocks(tokens))[:, 0])


class UnusedAtEnd(SmallNet):
    """The layer that finishes last takes no part in the answer."""

    def __init__(self) -> None:
        super().__init__(3)
        self.unused = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.features(x)
        logits = self.head(maps.mean(dim=(2, 3)))
        self.unused(maps)
        return logits


class _Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x)


class Spectral(SmallNet):
    """A layer with complex numbers behind the features."""

    def __init__(self) -> None:
        super().__init__(3)
        self.fourier = _Fourier()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fourier(self.features(x)).abs().mean(dim=(2, 3)))


class _Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = x.flatten(2)[:, :, None, :61]
        return rows


class OddlyShaped(SmallNet):
    """A layer whose output no grid of the input's shape fits."""

    def __init__(self) -> None:
        super().__init__(3)
        self.rows = _Rows()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rows(self.features(x)).mean(dim=(2, 3)))


class _Summaries(nn.Module):
    """Sixteen tokens, of which two at each end are quadrants and the others of the whole image."""

    def forward(self, x: Tensor) -> Tensor:
        quadrants = nn.functional.adaptive_avg_pool2d(x, 2).flatten(2).transpose(1, 2)
        whole = x.mean(dim=(2, 3))[:, None].expand(-1, 12, -1)
        return torch.cat([quadrants[:, :2], whole, quadrants[:, 2:]], dim=1)


class Summarises(SmallNet):
    """Few of its tokens have a place."""

    def __init__(self) -> None:
        super().__init__(3)
        self.summaries = _Summaries()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.summaries(self.features(x)).mean(dim=1))


class Flat(nn.Module):
    """No layer of it has cells."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(3 * SIDE * SIDE, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x.flatten(1)).relu())


class _Unfolded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = x.mean(dim=(2, 3))[:, :, None, None].expand(-1, -1, 4, 64)
        return rows


class Unfolds(SmallNet):
    """A layer whose cells all see the whole image, in a shape that no grid of the input has."""

    def __init__(self) -> None:
        super().__init__(3)
        self.unfolded = _Unfolded()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.unfolded(self.features(x)).mean(dim=(2, 3)))
