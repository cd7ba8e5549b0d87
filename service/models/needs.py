"""What methods need and a model lacks: ReLUs, a head of one linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from service.cam.formulas import precise
from service.cam.guided import GuidedReLU
from service.cam.hooks import record
from service.models.head import linear_head
from service.models.loaded import LoadedModel
from service.models.probes.behaviour import preserved
from service.models.probes.torch_state import kept_torch_state


def missing_needs(model: LoadedModel, image: Tensor) -> Mapping[str, str]:
    """Why methods with a need cannot run on a model, by need: a clause that begins with "it".

    image: normalised (1, C, h, w). Costs one forward pass. `head` is that of the default target
    layer. A model whose pass fails lacks nothing: its requests say what is wrong.
    """
    if model.no_layers or model.no_gradients:
        return {}
    missing: dict[str, str] = {}
    with suppress(Exception):  # a model may raise anything
        module = model.replicate()
        with kept_torch_state(random=False), preserved(module), torch.no_grad():
            missing = _missing(model, module, image)
    return missing


def _missing(model: LoadedModel, module: nn.Module, image: Tensor) -> dict[str, str]:
    paths = [] if model.target_layer is None else [model.target_layer]
    with record(module, outputs=paths) as seen, GuidedReLU() as guided:
        logits = model.logits(module(image.clone()))[0].float().cpu()
    missing = {} if guided.count else {"relu": "it has no ReLU to guide"}
    for path in paths:
        layout = model.layer(path).layout
        assert layout is not None
        activation = precise(layout.as_map(layout.by_image(seen.outputs[path][-1])))
        if linear_head(model, activation, logits) is None:
            missing["head"] = f"it has more than pooling and one linear layer behind {path}"
    return missing
