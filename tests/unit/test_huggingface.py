"""Builders `hf/FOLDER` and `hf/ORG/NAME`: what is served, and what is refused with which words."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_detectors import save
from typer.testing import CliRunner

from service.cli.main import app
from service.errors import ConfigurationError
from service.images.decode import Preprocessing
from service.models.builders import build
from service.models.catalog import InputSpec, ModelSpec, parse_model
from service.models.loading import load_model
from service.models.models_toml import read_config

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.timeout(60)

LABELS = {0: "cat", 1: "dog", 2: "owl"}


def small_vit(**more: Any) -> Any:
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            **{
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "image_size": 32,
                "patch_size": 8,
                "id2label": LABELS,
                "label2id": {label: index for index, label in LABELS.items()},
            }
            | more
        )
    ).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT with its image processor, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("saved") / "pets"
    small_vit().save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "pets"))


def change(folder: Path, file: str = "config.json", **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def spec_of(folder: Path, **more: Any) -> ModelSpec:
    return ModelSpec("pets", f"hf/{folder}", **more)


def refused(spec: ModelSpec, *, allow_random_weights: bool = False) -> str:
    with pytest.raises(ConfigurationError) as error:
        build(spec, allow_random_weights)
    return error.value.detail


def logits_of(folder: Path, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return build(spec_of(folder), False).module.eval()(image).logits


def test_a_folder_is_served_as_transformers_loads_it(saved: Path) -> None:
    model = load_model(parse_model(f"hf/{saved}/"))
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = small_vit()(image).logits
        torch.testing.assert_close(model.logits(model.replicate()(image)), expected)
    assert model.name == "pets"
    assert model.labels == ("cat", "dog", "owl")
    assert (model.output, model.select) == ("softmax", "logits")
    assert model.target_layer == "vit.layers.1.layernorm_before"
    assert model.preprocessing == Preprocessing(
        (32, 32), (32, 32), (0.5,) * 3, (0.5,) * 3, fit="squash", rounding="down"
    )
    assert "ViTImageProcessor" in model.transform


def test_several_labels_at_once_have_independent_scores(folder: Path) -> None:
    change(folder, problem_type="multi_label_classification")
    assert load_model(spec_of(folder)).output == "sigmoid"


def test_a_regression_has_no_probability(folder: Path) -> None:
    small_vit(id2label={0: "age"}, problem_type="regression").save_pretrained(folder)
    assert load_model(spec_of(folder)).output == "none"


def test_made_up_labels_are_not_shown(folder: Path) -> None:
    change(folder, id2label={str(index): f"LABEL_{index}" for index in range(3)})
    assert load_model(spec_of(folder)).labels == ("class 0", "class 1", "class 2")


def test_weights_in_float16_are_served_in_float32(folder: Path) -> None:
    small_vit().half().save_pretrained(folder)
    module = build(spec_of(folder), False).module
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_old_names_of_weights_are_renamed(folder: Path) -> None:
    image, names = torch.rand(1, 3, 32, 32), small_vit().state_dict().keys()
    assert (
        load_file(folder / "model.safetensors").keys() != names
    )  # `save_pretrained` keeps the old
    old = logits_of(folder, image)
    save_file(small_vit().state_dict(), folder / "model.safetensors", {"format": "pt"})
    assert load_file(folder / "model.safetensors").keys() == names
    torch.testing.assert_close(old, logits_of(folder, image))


def test_a_backbone_without_a_head_is_refused(folder: Path) -> None:
    small_vit().vit.save_pretrained(folder)
    assert "missing: classifier.bias, classifier.weight" in refused(spec_of(folder))


def test_a_head_of_another_size_is_refused(folder: Path, saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    tensors["classifier.weight"] = torch.zeros(7, 16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "classifier.weight" in refused(spec_of(folder))


def test_pickled_weights_are_refused(folder: Path) -> None:
    torch.save(small_vit().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    detail = refused(spec_of(folder))
    assert "pytorch_model.bin and no safetensors file" in detail
    assert "save_pretrained" in detail


def test_a_file_that_is_no_safetensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not weights")
    assert "cannot be loaded" in refused(spec_of(folder))


AUTO_MAP = {"AutoModelForImageClassification": "evil.Net", "AutoConfig": "evil.Config"}


@pytest.fixture
def evil(folder: Path) -> Callable[[], bool]:
    """Whether the code of the repository ran."""
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    return (folder / "ran").exists


def test_code_of_a_repository_does_not_run_for_a_known_type(folder: Path, evil) -> None:
    change(folder, auto_map=AUTO_MAP)
    change(folder, "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Processor"})
    assert type(build(spec_of(folder), False).module).__name__ == "ViTForImageClassification"
    assert not evil()


@pytest.mark.parametrize("allow_random_weights", [False, True])
def test_a_type_that_needs_code_is_refused(folder: Path, evil, allow_random_weights) -> None:
    change(folder, model_type="evil", auto_map=AUTO_MAP)
    detail = refused(spec_of(folder), allow_random_weights=allow_random_weights)
    assert "Code of a repository never runs" in detail
    assert not evil()


def test_kernels_that_a_configuration_names_are_not_fetched(folder: Path) -> None:
    change(folder, attn_implementation="kernels-community/flash-attn")
    module = build(spec_of(folder), False).module
    assert module.config._attn_implementation in ("sdpa", "eager")


def test_a_model_that_classifies_no_images_is_refused(folder: Path) -> None:
    change(folder, model_type="bert")
    assert "'bert', which is no image classifier" in refused(spec_of(folder))


@pytest.mark.parametrize(
    ("architecture", "kind", "words"),
    [
        ("DetrForSegmentation", "detr", "a DetrForSegmentation of type 'detr', which is no image"),
        ("OwlViTForObjectDetection", "owlvit", "which is no detection model"),
        ("PPDocLayoutV2ForObjectDetection", "pp_doclayout_v2", "detectors are of the types"),
        ("ViTForSemanticSegmentation", "vit", "which is no segmentation model"),
        (3, "detr", "a 3 of type 'detr', which is no image classifier"),
    ],
)
def test_the_architecture_decides_the_task(folder: Path, architecture, kind, words) -> None:
    change(folder, architectures=[architecture], model_type=kind)
    detail = refused(spec_of(folder))
    assert words in detail or "cannot be loaded" in detail  # a configuration of another version
    if architecture != "PPDocLayoutV2ForObjectDetection":
        assert words in detail
        assert "ForObjectDetection, ForSemanticSegmentation" in detail


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(transformers, "Yolos", tmp_path_factory.mktemp("yolos") / "pets")


def test_a_detector_is_loaded_with_its_labels_scores_and_resizing(detector: Path) -> None:
    model = load_model(parse_model(f"hf/{detector}"))
    assert (model.task, model.output, model.queries) == ("detection", "softmax", True)
    assert model.labels == ("cat", "dog", "owl", "bee")
    assert (model.preprocessing.whole, model.preprocessing.longest_edge) == (True, 107)
    assert "shorter side 64 and longer side at most 107" in model.transform
    assert "YolosImageProcessor" in model.transform
    model.check_rows()


def test_the_classes_of_a_detector_are_without_no_object(detector: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(detector, tmp_path / "pets"))
    with pytest.raises(ConfigurationError, match="4 classes and 5 labels"):
        load_model(spec_of(copied, labels=("none", "cat", "dog", "owl", "bee")))


def test_a_detector_without_a_processor_stretches_images(detector: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(detector, tmp_path / "pets"))
    (copied / "preprocessor_config.json").unlink()
    assert "image processor" in refused(spec_of(copied))
    wanted = InputSpec(size=(64, 96), mean=(0.1,), std=(0.2,))
    model = load_model(spec_of(copied, input=wanted))
    assert (model.preprocessing.fit, model.preprocessing.crop) == ("squash", (64, 96))
    with pytest.raises(ConfigurationError, match='set fit = "squash"'):
        load_model(spec_of(copied, input=replace(wanted, fit="pad")))


def test_a_processor_that_crops_is_no_detector_s(detector: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(detector, tmp_path / "pets"))
    transformers.BitImageProcessor().save_pretrained(copied)
    assert "BitImageProcessor crops images" in refused(spec_of(copied))


def test_a_layer_of_a_detector_is_configured(detector: Path) -> None:
    patches = "vit.embeddings.patch_embeddings.projection"
    assert load_model(spec_of(detector, target_layer=patches)).default_layers == (patches,)
    with pytest.raises(ConfigurationError, match="is not a layer that a map can be drawn"):
        load_model(spec_of(detector, target_layer="class_labels_classifier"))


@pytest.mark.parametrize("key", ["quantization_config", "adapter"])
def test_quantized_weights_and_adapters_are_refused(folder: Path, key: str) -> None:
    if key == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    else:
        change(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert "float32" in refused(spec_of(folder))


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": 3}'])
def test_a_broken_configuration_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert refused(spec_of(folder)).startswith("model 'pets': ")


def test_what_a_configuration_asks_for_beside_logits_changes_nothing(folder: Path) -> None:
    change(folder, return_dict=False, output_hidden_states=True)
    assert load_model(spec_of(folder)).labels == ("cat", "dog", "owl")


def test_a_processor_for_another_size_is_named_at_load(folder: Path) -> None:
    change(folder, "preprocessor_config.json", size={"height": 48, "width": 48})
    with pytest.raises(ConfigurationError, match="cannot classify one RGB image of 48×48 pixels"):
        load_model(spec_of(folder))


def test_an_unsupported_processor_is_refused_by_name(folder: Path) -> None:
    change(folder, "preprocessor_config.json", resample=1)
    detail = refused(spec_of(folder))
    assert "ViTImageProcessor resizes with Pillow's filter 1" in detail
    assert "input = {" in detail


@pytest.mark.parametrize("broken", ["missing", "unsupported"])
def test_a_transform_in_models_toml_needs_no_processor(folder: Path, broken: str) -> None:
    if broken == "missing":
        (folder / "preprocessor_config.json").unlink()
        assert "image processor" in refused(spec_of(folder))
    else:
        change(folder, "preprocessor_config.json", resample=1)
    wanted = InputSpec(size=(32, 32), mean=(0.1,), std=(0.2,))
    model = load_model(spec_of(folder, input=wanted))
    assert model.preprocessing.crop == (32, 32)
    assert model.preprocessing.mean == (0.1,) * 3


def test_a_part_of_the_transform_may_be_set(folder: Path) -> None:
    model = load_model(spec_of(folder, input=InputSpec(mean=(0.1,))))
    assert model.preprocessing.mean == (0.1,) * 3
    assert model.preprocessing.std == (0.5,) * 3
    assert model.preprocessing.rounding == "down"


@pytest.mark.parametrize(("key", "value"), [("weights", Path("w.pt")), ("arguments", {"a": 1})])
def test_keys_without_a_meaning_are_refused(saved: Path, key: str, value: object) -> None:
    assert f"takes no `{key}`" in refused(spec_of(saved, **{key: value}))


def test_random_weights_come_from_the_configuration_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    built = build(spec_of(folder), True)
    assert built.random_weights
    assert built.version == build(spec_of(folder), True).version


def test_a_folder_in_models_toml_is_beside_the_file(folder: Path) -> None:
    path = folder.parent / "models.toml"
    path.write_text('[[model]]\nname = "a"\nbuilder = "hf/pets"\n')
    (spec,) = read_config(path)
    assert spec.builder == f"hf/{folder}"


def test_a_revision_is_of_a_repository(folder: Path) -> None:
    path = folder.parent / "models.toml"
    path.write_text('[[model]]\nname = "a"\nbuilder = "hf/org/name"\nrevision = "v1"\n')
    assert read_config(path)[0].revision == "v1"
    assert "which has no revisions" in refused(spec_of(folder, revision="v1"))
    path.write_text('[[model]]\nname = "a"\nbuilder = "timm/resnet18"\nrevision = "v1"\n')
    with pytest.raises(ConfigurationError, match=r"revision: only hf/ORG/NAME has revisions"):
        read_config(path)


@pytest.mark.parametrize("name", ["./pets", "/pets", "~/pets", "a/b/c", "", "pets!"])
def test_a_folder_that_is_missing_is_named(name: str) -> None:
    assert "there is no folder" in refused(ModelSpec("m", f"hf/{name}"))


def cached(folder: Path, home: Path, commit: str = "c" * 40) -> None:
    """Put a folder into the Hub's cache as the branch `main` of org/pets."""
    repository = home / "hub" / "models--org--pets"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)


CHILD = (
    "from service.errors import ConfigurationError\n"
    "from service.models.builders import build\n"
    "from service.models.catalog import ModelSpec\n"
    "for revision in (None, 'v2'):\n"
    "    try:\n"
    "        print(build(ModelSpec('m', 'hf/org/pets', revision=revision), False).labels)\n"
    "    except ConfigurationError as error:\n"
    "        print(error.detail)\n"
)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be fetched from the Hugging Face Hub"),
    ],
)
def test_the_cache_of_the_hub_is_used_offline(saved: Path, tmp_path, environment, words) -> None:
    cached(saved, tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=os.environ | {"HF_HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    main, absent = child.stdout.splitlines()
    assert main == "('cat', 'dog', 'owl')"
    assert words in absent
    assert "revision 'v2' of org/pets is not in the cache" in absent
    assert str(tmp_path / "hub") in absent


@pytest.mark.timeout(180)
def test_the_commands_take_a_folder(saved: Path, tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), (9, 99, 200)).save(tmp_path / "a.png")
    builder, image, out = f"hf/{saved}", str(tmp_path / "a.png"), tmp_path / "why"
    for command in (
        ["check", "--model", builder],
        ["layers", builder],
        ["explain", image, "--model", builder, "--out", str(out)],
    ):
        ran = CliRunner().invoke(app, command)
        assert ran.exit_code == 0, ran.output
    assert any(out.iterdir())


def test_hiera_has_a_map_whose_cells_are_where_they_seem(folder: Path) -> None:
    """Its tokens are scrambled inside mask units until the last stage, which `places` detects."""
    torch.manual_seed(0)
    small = transformers.HieraConfig(
        embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 2], image_size=[224, 224]
    )
    transformers.HieraForImageClassification(small).save_pretrained(folder)
    change(folder, "preprocessor_config.json", size={"height": 224, "width": 224})
    model = load_model(spec_of(folder))
    assert "hiera.encoder.stages.2.layers.1.layernorm_before" in model.scattered
    assert model.target_layer is not None
    layout = model.layer(model.target_layer).layout
    assert layout is not None
    module, seen = model.replicate(), []
    module.get_submodule(model.target_layer).register_forward_hook(
        lambda _module, _args, output: seen.append(layout.as_map(output))
    )
    image, side = torch.randn(1, 3, 224, 224), 224 // layout.grid[0]
    for row, column in ((0, 0), (1, 4), (3, 2), (6, 6)):
        changed = image.clone()
        changed[..., row * side : (row + 1) * side, column * side : (column + 1) * side] *= -1
        with torch.no_grad():
            module(image), module(changed)
        change_of = (seen[-1] - seen[-2]).abs().sum(dim=1)[0]
        assert divmod(int(change_of.argmax()), layout.grid[1]) == (row, column)
