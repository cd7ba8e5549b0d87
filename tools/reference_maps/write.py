r"""Write the maps that the methods' published code gives: tests/reference/published_maps.npz.

    pip install --no-deps --target SITE lxt==2.1 einops==0.8.2
    PYTHONPATH=.:tests/support:SITE .venv/bin/python tools/reference_maps/write.py \
        --rollout CHECKOUT --gae CHECKOUT

The models are two vision transformers of tests/support/small_transformers.py with seeded weights,
the image is seeded, too. None of the published code is kept, only the numbers that it gives:

rollout:      `Baselines.generate_rollout` of Chefer et al., hila-chefer/Transformer-Explainability
              at c3e578f, in the authors' own ViT, which takes the weights of timm's.
gae:          `generate_relevance` of the notebook Transformer_MM_explainability_ViT.ipynb,
              hila-chefer/Transformer-MM-Explainability at 58eaea8, in the same ViT.
libra:        input gradients under LXT 2.1's rules `cp_LRP` for torchvision's ViT, which for this
              network are the rules of LibraGrad: norms, GELU and attention are constant factors.
expected:     Captum 0.9.0's `GradientShap` for the baselines and places that camserve draws.
contrast:     pytorch-grad-cam 1.5.7's Grad-CAM of its `FinerWeightedTarget`, before ReLU and
              scaling.

Prints the largest difference of the logits of the authors' ViT from those of timm's.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import oracles
import torch
from captum.attr import GradientShap
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import FinerWeightedTarget
from torch import Tensor, nn

from service.inference.input_gradients import random_baselines
from service.models.catalog import InputSpec, ModelSpec
from service.models.loaded import LoadedModel
from service.models.loading import load_model

FILE = Path(__file__).parents[2] / "tests" / "reference" / "published_maps.npz"
SIDE = 64
PIXELS = oracles.picture(6, SIDE, SIDE)
TARGETS = (3, 1)
NOTEBOOK = "Transformer_MM_explainability_ViT.ipynb"
IN_NOTEBOOK = {"avg_heads", "apply_self_attention_rules", "generate_relevance"}
SAMPLES, SEED = 21, 4
CONTRASTED = {"5": [5], "5,0": [5, 0]}

Maps = dict[str, Tensor]


def served(name: str) -> LoadedModel:
    """One of the small transformers, as camserve loads it."""
    size = InputSpec(size=(SIDE, SIDE), resize=SIDE)
    spec = ModelSpec(name, f"small_transformers:{name}", input=size)
    return load_model(spec, allow_random_weights=True)


def authors_vit(checkout: Path, model: LoadedModel) -> nn.Module:
    """The ViT of Transformer-Explainability, with the weights of timm's."""
    sys.path.insert(0, str(checkout))
    ours: Any = model.module
    theirs: nn.Module = importlib.import_module("baselines.ViT.ViT_new").VisionTransformer(
        img_size=SIDE,
        num_classes=len(model.labels),
        embed_dim=ours.embed_dim,
        depth=len(ours.blocks),
        num_heads=ours.blocks[0].attn.num_heads,
        qkv_bias=True,
        norm_layer=lambda width: nn.LayerNorm(width, eps=ours.norm.eps),
    )
    theirs.load_state_dict(ours.state_dict())
    return theirs.eval()


def rollout(net: nn.Module, image: Tensor) -> Maps:
    """Attention rollout, from the row of the class token."""
    code = importlib.import_module("baselines.ViT.ViT_explanation_generator")
    return {"rollout": code.Baselines(net).generate_rollout(image)[0]}


def gae(net: nn.Module, image: Tensor, checkout: Path) -> Maps:
    """Generic attention explainability, a map for each target."""
    cells = json.loads((checkout / NOTEBOOK).read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, Any] = {"torch": torch, "np": np}
    for source in sources:
        if "def generate_relevance" in source:
            tree = ast.parse(source)
            tree.body = [each for each in tree.body if getattr(each, "name", "") in IN_NOTEBOOK]
            exec(compile(tree, NOTEBOOK, "exec"), names)  # noqa: S102 - functions of the notebook
    explain: Callable[..., Tensor] = names["generate_relevance"]
    return {f"gae.{target}": explain(net, image, index=target) for target in TARGETS}


def expected_gradients(model: LoadedModel, image: Tensor) -> Maps:
    """GradientShap for the draws of camserve, summed over channels."""
    draws = list(random_baselines(PIXELS, SAMPLES, SEED))
    baselines = model.normalised(torch.stack([drawn for drawn, _ in draws]))
    shares = np.array([share for _, share in draws])
    maps: Maps = {}
    for target in TARGETS:
        with (
            mock.patch.object(np.random, "choice", lambda many, size: np.arange(many)[:size]),
            mock.patch.object(np.random, "uniform", return_value=shares),
        ):
            found = GradientShap(model.replicate()).attribute(
                image, baselines, n_samples=SAMPLES, stdevs=0.0, target=target
            )
        maps[f"expected.{target}"] = found[0].sum(dim=0)
    return maps


def contrast(model: LoadedModel, image: Tensor) -> Maps:
    """Grad-CAM of class 3 against other classes, weighted by their probabilities."""
    net, path = model.replicate(), model.target_layer
    assert path is not None
    maps: Maps = {}
    for name, classes in CONTRASTED.items():
        kept: list[Tensor] = []
        cam = GradCAM(net, [net.get_submodule(path)], oracles.tokens_to_map(4, 4))
        cam.compute_input_gradient = True  # the parameters are frozen
        compute = cam.get_cam_image

        def compute_and_keep(*args: Any, compute: Any = compute, kept: Any = kept) -> Any:
            kept.append(torch.from_numpy(np.array(compute(*args)))[0])
            return compute(*args)

        cam.get_cam_image = compute_and_keep
        with cam:
            cam(image, [FinerWeightedTarget(3, classes, 1.0)])
        maps[f"contrast.{name}"] = kept[0]
    return maps


def libra(net: nn.Module, image: Tensor) -> Maps:
    """Input gradients under CP-LRP's rules. Changes torch's classes: runs last."""
    for name in ("lxt.efficient", "lxt.efficient.models"):  # theirs import language models
        package = types.ModuleType(name)
        folder = Path(importlib.import_module("lxt").__path__[0])
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    rules = importlib.import_module("lxt.efficient.models.vit_torch").cp_LRP
    for target, patch in rules.items():
        assert patch(target), target
    maps: Maps = {}
    for target in TARGETS:
        pixels = image.clone().requires_grad_()
        net(pixels)[0, target].backward()
        assert pixels.grad is not None
        maps[f"libra.{target}"] = pixels.grad[0].sum(dim=0)
    return maps


def main() -> None:
    """Run all of the published code, and write its maps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rollout", type=Path, required=True, help="Transformer-Explainability")
    parser.add_argument("--gae", type=Path, required=True, help="Transformer-MM-Explainability")
    options = parser.parse_args()
    torch.set_num_threads(1)
    of_timm, of_torchvision = served("timm_vit"), served("vit")
    image = oracles.input_of(of_timm, PIXELS)
    theirs = authors_vit(options.rollout, of_timm)
    plain = {"timm_vit": of_timm.replicate()(image), "vit": of_torchvision.replicate()(image)}
    print("logits differ by", float((theirs(image) - plain["timm_vit"]).abs().max().detach()))
    maps = {f"logits.{name}": logits[0] for name, logits in plain.items()}
    with mock.patch.object(Tensor, "cuda", lambda self: self):  # as on a machine without a GPU
        maps |= rollout(theirs, image) | gae(theirs, image, options.gae)
    maps |= expected_gradients(of_torchvision, image) | contrast(of_timm, image)
    maps |= libra(of_torchvision.replicate(), image)
    np.savez_compressed(FILE, **{name: each.detach().numpy() for name, each in maps.items()})
    print(f"{FILE.name}: {', '.join(maps)}; {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
