"""Methods that follow the attention of a plain transformer.

Generators like those in `perturbation`: they yield where they need a replica.
"""

from __future__ import annotations

import torch
from torch import Tensor

from service.cam.attention import AttentionMode, Differentiable, Rollout, relevance
from service.inference.forward_pass import ImagePass
from service.inference.perturbation import Steps, normalised_image
from service.models.loaded import LoadedModel
from service.models.probes.attention import TokenAttention


def attention_rollout(image_pass: ImagePass) -> Steps:
    """Attention rollout: what the tokens that the head reads draw from each patch; for any class.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020.
    """
    replica = yield
    attention = _attention(image_pass.model)
    rollout = Rollout(attention.calls)
    with torch.no_grad(), AttentionMode(rollout):
        replica.module(normalised_image(image_pass))
    return [_at_patches(attention, rollout.joint)] * len(image_pass.targets)


def gae(image_pass: ImagePass) -> Steps:
    """Generic attention explainability: attention times its gradient, through all layers.

    Chefer, Gur and Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and
    Encoder-Decoder Transformers", ICCV 2021.
    """
    replica = yield
    attention = _attention(image_pass.model)
    notes = Differentiable(attention.calls)
    with AttentionMode(notes):
        output = replica.module(normalised_image(image_pass))
    logits = image_pass.model.logits(output)
    maps = []
    for position in range(len(image_pass.targets)):
        value = image_pass.target_value(logits, position).sum()
        gradients = torch.autograd.grad(value, notes.attentions, retain_graph=True)
        maps.append(_at_patches(attention, relevance(notes.attentions, gradients)))
    return maps


def _attention(model: LoadedModel) -> TokenAttention:
    """The attention of a model that `check_method` allows these methods for."""
    assert isinstance(model.attention, TokenAttention)
    return model.attention


def _at_patches(attention: TokenAttention, tokens: Tensor) -> Tensor:
    """The map (h, w) on the CPU of what the head reads, from (L, S) by token."""
    read = tokens.cpu()[list(attention.rows)].mean(dim=0)
    return attention.layout.as_map(read[None, :, None])[0, 0]
