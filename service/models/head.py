"""The linear head of a model, if it has one that CAM can use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from service.errors import InvalidOption
from service.models.loaded import LoadedModel


def head_weights(model: LoadedModel, layer: str, activation: Tensor, logits: Tensor) -> Tensor:
    """The weights of `linear_head`. Raises InvalidOption for a model without such a head."""
    weights = linear_head(model, activation, logits)
    if weights is not None:
        return weights
    raise InvalidOption(
        f"`cam` needs global average pooling and one linear layer behind the target layer, and "
        f"model {model.name!r} has something else behind {layer!r}; use `gradcam`, which is the "
        "same map if CAM is defined, and works for this model too."
    )


def linear_head(model: LoadedModel, activation: Tensor, logits: Tensor) -> Tensor | None:
    """The weights (classes, channels) of a head that is linear in the layer's mean activation.

    activation: the layer's output (1, C, h, w); logits: (classes,), those of the same image. CAM is
    defined only if logits = W · mean(A) + b, which is verified with these values. None if no linear
    layer of the model satisfies it.
    """
    mean = activation.mean(dim=(2, 3))[0]
    for module in model.module.modules():
        if not isinstance(module, nn.Linear) or module.in_features != mean.shape[0]:
            continue
        outputs = logits.shape[0] // 2 if model.binary else logits.shape[0]
        if module.out_features != outputs:
            continue
        bias = 0 if module.bias is None else module.bias.float()
        linear = (mean.float() @ module.weight.float().T + bias).cpu()
        weight = module.weight.detach().float()
        if model.binary:
            linear, weight = torch.cat([-linear, linear]), torch.cat([-weight, weight])
        # Half precision rounds each logit to two or three digits.
        near = 1e-3 if module.weight.dtype == torch.float32 else 2e-2
        if torch.allclose(linear, logits, rtol=near, atol=near * float(logits.abs().max())):
            return weight
    return None
