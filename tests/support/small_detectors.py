"""Small detectors and segmenters of transformers with seeded random weights, saved to folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LABELS = {0: "cat", 1: "dog", 2: "owl", 3: "bee"}
NAMES = {"id2label": LABELS, "label2id": {label: index for index, label in LABELS.items()}}

RESNET = {
    "embedding_size": 16,
    "hidden_sizes": [16, 24, 32, 48],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 12,
    "dropout": 0.0,
}
HYBRID = {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [24, 32, 48],
    "decoder_in_channels": [32, 32, 32],
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 2,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "num_queries": 12,
    "hidden_expansion": 0.5,
    "anchor_image_size": None,
}
TOKENS = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 16,
}
SINGLE = {
    "d_model": 32,
    "decoder_ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "decoder_n_points": 2,
    "group_detr": 1,
    "num_queries": 12,
    "c2f_num_blocks": 1,
    "dropout": 0.0,
}
WINDOWS = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "num_windows": 4,
    "out_indices": [2, 3],
}


def _resnet(transformers: Any, *stages: str) -> Any:
    return transformers.ResNetConfig(**RESNET, out_features=list(stages))


def _hybrid(transformers: Any) -> Any:
    stages = ["stage2", "stage3", "stage4"]
    return transformers.RTDetrResNetConfig(**RESNET, out_features=stages)


def settings(transformers: Any, name: str) -> Mapping[str, Any]:
    """What makes the configuration of a class small, by the class's name without its task."""
    last = {"backbone_config": _resnet(transformers, "stage4")}
    three = {"backbone_config": _resnet(transformers, "stage2", "stage3", "stage4")}
    swin = {
        "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2] * 4, "window_size": 4,
        "image_size": 64,
    }  # fmt: skip
    of_stage = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}
    stages = ["stage1", "stage2", "stage3", "stage4"]
    patches = TOKENS | {"image_size": 64, "num_hidden_layers": 4}
    known: dict[str, Mapping[str, Any]] = {
        "Detr": DECODER | last,
        "TableTransformer": DECODER | last,
        "ConditionalDetr": DECODER | last,
        "DabDetr": DECODER | last | {"hidden_size": 32},
        "DeformableDetr": DECODER | three | {"num_feature_levels": 3},
        "RTDetr": HYBRID | {"backbone_config": _hybrid(transformers)},
        "RTDetrV2": HYBRID | {"backbone_config": _hybrid(transformers)},
        "DFine": HYBRID | {"backbone_config": _hybrid(transformers)},
        "Deimv2": HYBRID | {"backbone_config": _hybrid(transformers)},
        "LwDetr": SINGLE
        | {
            "backbone_config": transformers.LwDetrViTConfig(
                **WINDOWS, patch_size=16, image_size=64, window_block_indices=[0]
            ),
            "projector_scale_factors": [1.0],
        },
        "RfDetr": SINGLE
        | {
            "backbone_config": transformers.RfDetrDinov2Config(
                **WINDOWS | {"num_windows": 1}, patch_size=14, image_size=56
            ),
        },
        "Yolos": TOKENS | {"image_size": [64, 96], "num_detection_tokens": 12},
        "Segformer": of_stage
        | {
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 32,
            "sr_ratios": [4, 2, 1, 1],
        },
        "UperNet": {
            "backbone_config": transformers.SwinConfig(**swin, out_features=stages),
            "hidden_size": 32,
            "auxiliary_in_channels": 64,
            "auxiliary_channels": 16,
        },
        "MobileViT": {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 16, 16, 24, 32, 40, 48],
            "num_attention_heads": 2,
            "aspp_out_channels": 32,
        },
        "MobileViTV2": {"image_size": 64, "width_multiplier": 0.5, "aspp_out_channels": 32},
        "MobileNetV2": {"image_size": 64, "depth_multiplier": 0.5},
        "Beit": patches | {"out_indices": [1, 2, 3, 4], "pool_scales": [1, 2]},
        "Data2VecVision": patches | {"out_indices": [1, 2, 3, 4], "pool_scales": [1, 2]},
        "DPT": patches
        | {
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 24, 32, 48],
            "fusion_hidden_size": 32,
        },
    }
    return known[name] | NAMES


def build(transformers: Any, name: str, **more: Any) -> nn.Module:
    """A model of a class by its name without its task, such as `Detr`."""
    task = "SemanticSegmentation" if name in SEGMENTERS else "ObjectDetection"
    config = getattr(transformers, f"{name}Config")(**(settings(transformers, name) | more))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: nn.Module = getattr(transformers, f"{name}For{task}")(config).eval()
        for path, parameter in module.named_parameters():
            if parameter.ndim > 1 and "norm" not in path:
                nn.init.xavier_normal_(parameter)
            if "class" in path and parameter.ndim > 1:
                with torch.no_grad():
                    parameter.mul_(3)
    return module


PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "Detr": ("DetrImageProcessor", {"size": {"shortest_edge": 64, "longest_edge": 107}}),
    "TableTransformer": (
        "DetrImageProcessor",
        {"size": {"shortest_edge": 128, "longest_edge": 160}},
    ),
    "ConditionalDetr": (
        "ConditionalDetrImageProcessor",
        {"size": {"shortest_edge": 64, "longest_edge": 107}},
    ),
    "DabDetr": (
        "ConditionalDetrImageProcessor",
        {"size": {"shortest_edge": 64, "longest_edge": 107}},
    ),
    "DeformableDetr": (
        "DeformableDetrImageProcessor",
        {"size": {"shortest_edge": 64, "longest_edge": 107}},
    ),
    "RTDetr": ("RTDetrImageProcessor", {"size": {"height": 128, "width": 128}}),
    "RTDetrV2": ("RTDetrImageProcessor", {"size": {"height": 128, "width": 128}}),
    "DFine": ("RTDetrImageProcessor", {"size": {"height": 128, "width": 128}}),
    "Deimv2": ("RTDetrImageProcessor", {"size": {"height": 128, "width": 128}}),
    "LwDetr": ("DeformableDetrImageProcessor", {"size": {"height": 64, "width": 64}}),
    "Yolos": ("YolosImageProcessor", {"size": {"shortest_edge": 64, "longest_edge": 107}}),
    "Segformer": ("SegformerImageProcessor", {"size": {"height": 96, "width": 96}}),
    "UperNet": ("SegformerImageProcessor", {"size": {"height": 64, "width": 64}}),
    "MobileViT": (
        "MobileViTImageProcessor",
        {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}},
    ),
    "MobileViTV2": (
        "MobileViTImageProcessor",
        {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}},
    ),
    "MobileNetV2": (
        "MobileNetV2ImageProcessor",
        {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}},
    ),
    "Beit": (
        "BeitImageProcessor",
        {"size": {"height": 64, "width": 64}, "do_center_crop": False},
    ),
    "Data2VecVision": (
        "BeitImageProcessor",
        {"size": {"height": 64, "width": 64}, "do_center_crop": False},
    ),
    "DPT": ("DPTImageProcessor", {"size": {"height": 64, "width": 64}}),
}

SEGMENTERS = (
    "Segformer", "UperNet", "MobileViT", "MobileViTV2", "MobileNetV2", "Beit", "Data2VecVision",
    "DPT",
)  # fmt: skip
DETECTORS = tuple(name for name in PROCESSORS if name not in SEGMENTERS)


def processor(transformers: Any, name: str) -> Any:
    kind, values = PROCESSORS[name]
    return getattr(transformers, kind)(**values)


def save(transformers: Any, name: str, folder: Path) -> Path:
    """The model and its image processor in a folder, as `save_pretrained` writes them."""
    build(transformers, name).save_pretrained(folder)
    processor(transformers, name).save_pretrained(folder)
    return folder


def image(seed: int, size: tuple[int, int]) -> Tensor:
    """A smooth image (3, h, w), uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 6, generator=generator)
    smooth = nn.functional.interpolate(coarse, size, mode="bilinear")
    return (255 * smooth[0]).to(torch.uint8)
