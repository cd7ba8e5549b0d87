"""Random models of one's own, made of the troubles that people's models have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import misbehaving
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

SIDE = 24
STORE: dict[str, Tensor] = {}


@dataclass(frozen=True)
class Plan:
    """What a random model is made of; each field names one trouble, or none."""

    seed: int = 0
    stem: str = "map"
    stored: str = "no"
    batch: str = "no"
    noise: str = "no"
    input: str = "whole"
    output: str = "logits"
    shared: bool = False
    patched: bool = False
    function: bool = False
    complex: bool = False
    labels: tuple[str, ...] | None = field(default=None)


PLANS = st.builds(
    Plan,
    seed=st.integers(0, 9),
    stem=st.sampled_from(["map", "map", "rows", "start", "end", "middle", "column", "sequence"]),
    stored=st.sampled_from(["no", "no", "self", "method", "closure", "global"]),
    batch=st.sampled_from(["no", "no", "no", "statistics", "hidden", "mean", "flat"]),
    noise=st.sampled_from(["no", "no", "no", "no", "dropout", "count"]),
    input=st.sampled_from(["whole", "whole", "middle", "corner"]),
    output=st.sampled_from(
        ["logits", "logits", "softmax", "log_softmax", "sigmoid", "one", "one_sigmoid"]
    ),
    shared=st.booleans(),
    patched=st.sampled_from([False, False, False, True]),
    function=st.booleans(),
    complex=st.booleans(),
    labels=st.sampled_from([None, ("no", "yes")]),
)


class Fourier(nn.Module):
    """Gives complex numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft2(x)


class RandomNet(nn.Module):
    """One model by a plan."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        width, classes = 16, 1 if plan.output.startswith("one") else 3
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.LayerNorm(width)
        self.features = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.mix = self.features if plan.shared else nn.Sequential(nn.Conv2d(width, width, 1))
        self.fourier = Fourier()
        self.statistics = nn.BatchNorm2d(width, track_running_stats=False)
        self.hidden = [nn.BatchNorm2d(width)]
        self.extra = nn.Parameter(0.1 * torch.randn(1, 2, width))
        self.token_norm, self.token_mix = nn.LayerNorm(width), nn.Linear(width, width)
        self.head = nn.Linear(width, classes)
        self.flat = nn.Linear(width, classes)
        self.calls = 0
        self.kept: dict[str, Tensor] = {}
        if plan.stored == "closure":
            kept: dict[str, Tensor] = {}
            self.features.register_forward_hook(
                lambda _m, _a, output: kept.__setitem__("features", output)
            )
            self.kept = kept
        elif plan.stored == "method":
            self.features.register_forward_hook(self.keep)
        elif plan.stored == "global":
            self.features.register_forward_hook(
                lambda _m, _a, output: STORE.__setitem__("features", output)
            )

    def keep(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.kept["features"] = output

    def forward(self, x: Tensor) -> Tensor:
        plan, side = self.plan, x.shape[-1]
        if plan.input == "middle":
            x = x[..., side // 4 : -(side // 4), side // 4 : -(side // 4)]
        elif plan.input == "corner":
            x = x[..., : side // 2, : side // 2]
        maps = self.patch(x)
        if plan.noise == "dropout":
            maps = functional.dropout(maps, 0.3)
        maps = self.mapped(maps) if plan.stem in ("map", "rows") else self.tokens(maps)
        if plan.batch == "statistics":
            maps = self.statistics(maps)
        elif plan.batch == "hidden":
            maps = self.hidden[0](maps)
        if plan.function:
            maps = misbehaving._Doubles.apply(maps)
        pooled = maps.mean(dim=(2, 3))
        if plan.batch == "mean":
            pooled = pooled + pooled.mean(dim=0, keepdim=True)
        logits = self.flat(pooled.reshape(1, -1)) if plan.batch == "flat" else self.head(pooled)
        if plan.complex:
            logits = logits + self.fourier(maps).abs().mean()
        if plan.noise == "count":
            self.calls += 1
            logits = logits * (1 + self.calls)
        return {
            "softmax": lambda: logits.softmax(dim=1),
            "log_softmax": lambda: logits.log_softmax(dim=1),
            "sigmoid": logits.sigmoid,
            "one_sigmoid": logits.sigmoid,
        }.get(plan.output, lambda: logits)()

    def mapped(self, maps: Tensor) -> Tensor:
        if self.plan.stem == "rows":
            maps = self.norm(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        found = self.features(maps)
        if self.plan.stored in ("method", "closure"):
            found = self.kept["features"]
        elif self.plan.stored == "global":
            found = STORE["features"]
        elif self.plan.stored == "self":
            self.last = found
            found = self.last
        return self.mix(found)

    def tokens(self, maps: Tensor) -> Tensor:
        stem, grid = self.plan.stem, maps.shape[2:]
        maps = maps.transpose(2, 3) if stem == "column" else maps
        tokens = maps.flatten(2).transpose(1, 2)
        at = {"end": tokens.shape[1], "middle": tokens.shape[1] // 2}.get(stem, 0)
        extra = self.extra.expand(len(tokens), -1, -1)
        tokens = torch.cat([tokens[:, :at], extra, tokens[:, at:]], dim=1)
        if stem == "sequence":
            tokens = tokens.transpose(0, 1)
        tokens = tokens + self.token_mix(self.token_norm(tokens))
        if stem == "sequence":
            tokens = tokens.transpose(0, 1)
        tokens = torch.cat([tokens[:, :at], tokens[:, at + 2 :]], dim=1)
        return tokens.transpose(1, 2).unflatten(2, grid)


def build(**fields: Any) -> nn.Module:
    plan = Plan(**{key: fields[key] for key in fields if key != "labels"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        net = RandomNet(plan)
    if plan.patched:
        whole = net.forward
        net.forward = lambda x: +whole(x)  # type: ignore[method-assign]
    return net
