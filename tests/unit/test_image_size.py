"""The image size that a vision transformer's weights file was trained on, told by its tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import vision_transformer

from service.cli.check import check_models
from service.errors import ConfigurationError
from service.models.catalog import InputSpec, ModelSpec
from service.models.loaded import LoadedModel
from service.models.loading import load_model

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def small_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision's builders make transformers of one narrow layer, with their own patches."""
    build = vision_transformer._vision_transformer

    def small(*, patch_size: int, **more: Any) -> nn.Module:
        more |= {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
        return build(patch_size=patch_size, **more)

    monkeypatch.setattr(vision_transformer, "_vision_transformer", small)


@pytest.fixture
def timm() -> Any:
    return pytest.importorskip("timm", reason="timm is not installed")


def trained(path: Path, module: nn.Module, **state: torch.Tensor) -> Path:
    torch.save(module.state_dict() | state, path)
    return path


def load(builder: str, file: Path, **more: Any) -> LoadedModel:
    return load_model(ModelSpec("a", builder, file, **more))


def refused(call: Callable[..., Any], *args: Any, **more: Any) -> str:
    with pytest.raises(ConfigurationError) as error:
        call(*args, **more)
    return error.value.detail


@pytest.mark.parametrize(
    ("name", "size"), [("vit_b_16", 48), ("vit_b_32", 96), ("vit_b_16", 384), ("vit_h_14", 56)]
)
def test_a_torchvision_transformer_is_built_for_the_image_size_of_its_file(
    tmp_path: Path, name: str, size: int
) -> None:
    module = torchvision.models.get_model(name, image_size=size, num_classes=3).eval()
    model = load(f"torchvision/{name}", trained(tmp_path / "w.pt", module))
    assert model.preprocessing.crop == (size, size)
    assert model.preprocessing.resize == size
    assert model.labels == ("class 0", "class 1", "class 2")
    image = torch.rand(1, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(model.replicate()(image), module(image), atol=1e-5)


def test_the_transform_of_a_file_for_the_usual_size_keeps_its_margin(tmp_path: Path) -> None:
    module = torchvision.models.vit_b_16(num_classes=3)
    model = load("torchvision/vit_b_16", trained(tmp_path / "w.pt", module))
    assert model.transform.startswith("resize 256, center crop 224×224")
    assert "position embedding" not in model.transform


def test_the_size_of_the_builder_holds_where_the_published_weights_have_another(
    tmp_path: Path,
) -> None:
    """Torchvision's `vit_h_14` is built for 224 pixels, and its published weights are for 518."""
    model = load("torchvision/vit_h_14", trained(tmp_path / "w.pt", torchvision.models.vit_h_14()))
    assert model.preprocessing.crop == (224, 224)


def test_a_file_for_the_size_of_the_published_weights_has_their_transform(tmp_path: Path) -> None:
    module = torchvision.models.vit_h_14(image_size=518)
    model = load("torchvision/vit_h_14", trained(tmp_path / "w.pt", module))
    assert model.transform.startswith("resize 518, center crop 518×518, bicubic")
    assert "position embedding" not in model.transform


def test_check_says_where_the_image_size_comes_from(tmp_path: Path) -> None:
    module = torchvision.models.vit_b_16(image_size=48, num_classes=3)
    spec = ModelSpec("a", "torchvision/vit_b_16", trained(tmp_path / "w.pt", module))
    (checked,) = check_models([spec], load_model)
    assert checked.problem is None
    assert checked.model is not None
    assert checked.model.transform.startswith("resize 48, center crop 48×48, bilinear")
    assert checked.model.transform.endswith(
        "(resize and crop from the position embedding, else torchvision's "
        "ViT_B_16_Weights.IMAGENET1K_V1)"
    )


def test_a_file_inside_a_checkpoint_tells_its_image_size(tmp_path: Path) -> None:
    state = torchvision.models.vit_b_16(image_size=64, num_classes=3).state_dict()
    file = tmp_path / "w.pt"
    torch.save({"epoch": 3, "model": {f"module.{key}": state[key] for key in state}}, file)
    assert load("torchvision/vit_b_16", file).preprocessing.crop == (64, 64)


def test_an_image_size_that_is_said_takes_precedence(tmp_path: Path) -> None:
    module = torchvision.models.vit_b_16(image_size=64, num_classes=3)
    file = trained(tmp_path / "w.pt", module)
    detail = refused(load, "torchvision/vit_b_16", file, arguments={"image_size": 48})
    assert "encoder.pos_embedding: (1, 17, 16) in the file, (1, 10, 16) here" in detail
    detail = refused(load, "torchvision/vit_b_16", file, input=InputSpec(size=(48, 48)))
    assert "Expected 64 but got 48" in detail


@pytest.mark.parametrize("tokens", [1, 3, 198, 578])
def test_tokens_that_are_no_square_grid_are_refused_with_both_shapes(
    tmp_path: Path, tokens: int
) -> None:
    module = torchvision.models.vit_b_16(num_classes=3)
    positions = {"encoder.pos_embedding": torch.zeros(1, tokens, 16)}
    detail = refused(load, "torchvision/vit_b_16", trained(tmp_path / "w.pt", module, **positions))
    assert f"(1, {tokens}, 16) in the file and (1, 197, 16) in the model" in detail
    assert f"{tokens - 1} patches are no square grid" in detail


def test_a_position_embedding_of_another_form_is_refused_as_a_wrong_shape(tmp_path: Path) -> None:
    module = torchvision.models.vit_b_16(num_classes=3)
    positions = {"encoder.pos_embedding": torch.zeros(577, 16)}
    detail = refused(load, "torchvision/vit_b_16", trained(tmp_path / "w.pt", module, **positions))
    assert "encoder.pos_embedding: (577, 16) in the file, (1, 197, 16) here" in detail


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_vit", 96),  # with one class token
        ("test_vit2", 64),  # with registers
        ("deit_tiny_distilled_patch16_224", 48),  # two tokens beside the patches
        ("vit_tiny_r_s16_p8_224", 64),  # behind a stem of convolutions: 32 pixels a patch
    ],
)
def test_a_timm_transformer_is_built_for_the_image_size_of_its_file(
    tmp_path: Path, timm: Any, name: str, size: int
) -> None:
    module = timm.create_model(name, img_size=size, num_classes=3).eval()
    model = load(f"timm/{name}", trained(tmp_path / "w.pt", module))
    assert model.preprocessing.crop == (size, size)
    assert "resize and crop from the position embedding, else timm's" in model.transform
    image = torch.rand(1, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(model.replicate()(image), module(image), atol=1e-4)


def test_a_timm_transformer_of_the_usual_size_keeps_its_transform(
    tmp_path: Path, timm: Any
) -> None:
    model = load("timm/test_vit", trained(tmp_path / "w.pt", timm.create_model("test_vit")))
    assert model.preprocessing.crop == (160, 160)
    assert "position embedding" not in model.transform


def test_an_image_size_of_timm_that_is_said_takes_precedence(tmp_path: Path, timm: Any) -> None:
    file = trained(tmp_path / "w.pt", timm.create_model("test_vit", img_size=96))
    detail = refused(load, "timm/test_vit", file, arguments={"img_size": 64})
    assert "pos_embed: (1, 37, 64) in the file, (1, 17, 64) here" in detail


def test_tokens_of_timm_that_are_no_square_grid_are_refused(tmp_path: Path, timm: Any) -> None:
    module = timm.create_model("test_vit")
    file = trained(tmp_path / "w.pt", module, pos_embed=torch.zeros(1, 100, 64))
    detail = refused(load, "timm/test_vit", file)
    assert "pos_embed has the shape (1, 100, 64) in the file and (1, 101, 64)" in detail
    assert "99 patches are no square grid" in detail
