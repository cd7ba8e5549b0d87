"""Small networks of the transformer families, of torchvision's and timm's own code."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer

SIDE = 64


def torchvision_vit() -> nn.Module:
    return VisionTransformer(SIDE, 16, 3, 2, 32, 64, num_classes=9)


def torchvision_swin() -> nn.Module:
    return SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=9)


def of_timm(name: str, **more: object) -> Callable[[], nn.Module]:
    small = {"img_size": SIDE, "embed_dim": 32, "num_classes": 9} | more
    known = {key: value for key, value in small.items() if value is not None}
    return lambda: timm.create_model(name, **known)


PLAIN = {"depth": 3, "num_heads": 2}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "timm_cait": of_timm("cait_xxs24_224", **PLAIN),
    "timm_xcit": of_timm("xcit_nano_12_p16_224", **PLAIN, patch_size=16),
    "timm_pvt": of_timm("pvt_v2_b0", img_size=None, embed_dim=None),
    "timm_crossvit": of_timm("crossvit_tiny_240", img_size=None, embed_dim=None),
}
"""Further ones, for attention alone."""

MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": torchvision_vit,
    "swin": torchvision_swin,
    "timm_vit": of_timm("vit_small_patch16_224", **PLAIN),
    "timm_vit_gap": of_timm("vit_base_patch16_rope_reg1_gap_256", **PLAIN, patch_size=16),
    "timm_deit": of_timm("deit_small_patch16_224", **PLAIN),
    "timm_deit_distilled": of_timm("deit_small_distilled_patch16_224", **PLAIN),
    "timm_deit3": of_timm("deit3_small_patch16_224", **PLAIN),
    "timm_dinov2": of_timm("vit_small_patch14_dinov2", **PLAIN, patch_size=16),
    "timm_dinov2_registers": of_timm("vit_small_patch14_reg4_dinov2", **PLAIN, patch_size=16),
    "timm_beit": of_timm("beit_base_patch16_224", **PLAIN),
    "timm_eva02": of_timm("eva02_tiny_patch14_224", **PLAIN, patch_size=16),
    "timm_siglip": of_timm("vit_base_patch16_siglip_224", **PLAIN),
    "timm_siglip_gap": of_timm("vit_base_patch16_siglip_gap_224", **PLAIN),
    "timm_swin": of_timm(
        "swin_tiny_patch4_window7_224", depths=(2, 2), num_heads=(2, 4), window_size=4
    ),
    "timm_swinv2": of_timm(
        "swinv2_tiny_window8_256", depths=(2, 2), num_heads=(2, 4), window_size=4
    ),
    **OTHERS,
}
"""Each makes a network with fresh weights, for inputs of SIDE."""


def __getattr__(name: str) -> Callable[[], nn.Module]:
    """Builders by name, each with weights under which attention and classes differ."""
    if name not in MODELS:
        raise AttributeError(name)

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = MODELS[name]().eval()
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.2)
                elif not parameter.any():  # Swin v2 starts with blocks that do nothing
                    nn.init.constant_(parameter, 0.5)
        return module

    return build
