"""The default target layers of transformers, with their grids: docs/reference/transformers.md.

    python benchmarks/transformer_layers.py [--only NAME …] [--lanes]
    python benchmarks/transformer_layers.py --boxes

Names of timm have their own architecture and random weights; classes of Hugging Face a small
configuration with random weights, saved to a folder and loaded as `hf/FOLDER`. --lanes compiles
each model, too. What is finished stands in build/transformer_layers.jsonl; a second run measures
what is missing there. --boxes writes the part on detectors and segmenters alone, whose finished
rows stand in build/transformer_boxes.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers

from api_schemas.methods import METHODS
from service.images.decode import Source, fit_to_model
from service.inference.method_table import why_not
from service.inference.questions import Question
from service.models.catalog import ModelSpec
from service.models.compiled.lane import Compiler
from service.models.loaded import LoadedModel
from service.models.loading import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from detectors import answer
from small_detectors import PROCESSORS, image, save

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "build" / "transformer_layers.jsonl"
BOXES_ROWS = ROOT / "build" / "transformer_boxes.jsonl"
PAGE = ROOT / "docs" / "reference" / "transformers.md"

NAMES = """
beit_base_patch16_224 cait_xxs24_224 coat_tiny coatnet_0_rw_224 convformer_s18 convit_tiny
convmixer_768_32 convnext_atto convnextv2_atto crossvit_tiny_240 davit_tiny
deit3_small_patch16_224 deit_tiny_distilled_patch16_224 deit_tiny_patch16_224 edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientvit_b0 eva02_tiny_patch14_224 fastvit_t8
flexivit_small focalnet_tiny_srf gcvit_xxtiny ghostnet_050 gmixer_24_224 gmlp_s16_224 hgnetv2_b0
hiera_tiny_224 inception_next_tiny levit_128s maxvit_rmlp_pico_rw_256 mixer_s32_224
mobilenetv3_small_050 mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny
nextvit_small pit_ti_224 pit_ti_distilled_224 poolformer_s12 poolformerv2_s12 pvt_v2_b0
regnetx_002 repvit_m1 resmlp_12_224 resnet10t samvit_base_patch16_224 sequencer2d_s swiftformer_xs
swin_s3_tiny_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 tiny_vit_5m_224
tnt_s_patch16_224 twins_pcpvt_small twins_svt_small vit_base_patch16_siglip_224
vit_base_patch16_siglip_gap_224 vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2
vit_small_patch16_224 vit_small_patch16_dinov3 vit_tiny_patch16_224 vit_base_patch16_clip_224
vit_base_patch16_gap_224 vit_medium_patch16_reg4_gap_256 vit_relpos_small_patch16_224
vit_small_r26_s32_224 vitamin_small_224 visformer_tiny xcit_nano_12_p16_224
"""
TIMM = NAMES.split()

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}
STAGES = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}
WINDOWS = {
    "embed_dim": 16,
    "depths": [1, 1, 1],
    "num_heads": [2, 2, 2],
    "window_size": 4,
    "image_size": 64,
}
VISION = {"vision_config": SMALL}

HUGGING_FACE: dict[str, dict[str, Any]] = {
    "Beit": SMALL,
    "Bit": {"hidden_sizes": [128, 128, 256, 256], "depths": [1, 1, 1, 1], "embedding_size": 32},
    "CLIP": VISION,
    "ConvNext": STAGES,
    "ConvNextV2": STAGES,
    "Cvt": {"depth": [1, 2, 3]},
    "Data2VecVision": SMALL,
    "DeiT": SMALL,
    "DeiT WithTeacher": SMALL,
    "Dinov2": SMALL,
    "Dinov2WithRegisters": SMALL | {"num_register_tokens": 4},
    "EfficientNet": {"image_size": 64, "width_coefficient": 0.5, "hidden_dim": 640},
    "FocalNet": {"embed_dim": 16, "depths": [1, 1, 1, 1], "image_size": 64},
    "HGNetV2": {},
    "Hiera": {
        "embed_dim": 16,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 2, 2],
        "image_size": [224, 224],
    },
    "IJepa": SMALL,
    "Levit": {
        "image_size": 64,
        "hidden_sizes": [32, 48, 64],
        "num_attention_heads": [2, 3, 4],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
    },
    "MetaClip2": VISION,
    "MobileNetV1": {"image_size": 64, "depth_multiplier": 0.25},
    "MobileNetV2": {"image_size": 64, "depth_multiplier": 0.35},
    "MobileViT": {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": 2},
    "MobileViTV2": {"image_size": 64, "width_multiplier": 0.25},
    "PPLCNet": {},
    "PoolFormer": STAGES,
    "Pvt": {"image_size": 64, "hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1]},
    "PvtV2": {"image_size": 64, "hidden_sizes": [16, 24, 40, 48], "depths": [1, 1, 1, 1]},
    "RegNet": STAGES,
    "ResNet": STAGES,
    "Segformer": {"hidden_sizes": [16, 24, 40, 48], "depths": [1, 1, 1, 1]},
    "Siglip": VISION,
    "SwiftFormer": {"depths": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 48]},
    "Swin": WINDOWS,
    "Swinv2": WINDOWS,
    "ViT": SMALL,
    "ViTMSN": SMALL,
}


def of_timm(name: str, _folder: Path) -> ModelSpec:
    """A model of timm."""
    return ModelSpec(name, f"timm/{name}")


def of_hugging_face(name: str, folder: Path) -> ModelSpec:
    """A model of Hugging Face, saved to a folder."""
    settings = HUGGING_FACE[name]
    family, _, end = name.partition(" ")
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForImageClassification{end}")(config)
    model.save_pretrained(folder)
    side = 224 if family == "Hiera" else 64
    size = {"height": side, "width": side}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    return ModelSpec(family, f"hf/{folder}")


def row_of(library: str, name: str, compiler: Compiler | None) -> dict[str, Any]:
    """What the load of a model shows, or why it fails."""
    began = time.monotonic()
    make = of_timm if library == "timm" else of_hugging_face
    row: dict[str, Any] = {"library": library, "name": name}
    try:
        with tempfile.TemporaryDirectory() as folder:
            spec = make(name, Path(folder))
            model = load_model(spec, allow_random_weights=library == "timm", compiler=compiler)
        row |= described(model)
        row["refused"] = [name for name in METHODS if why_not(model, name) is not None]
        if compiler:
            row["lane"] = model.not_compiled or "yes"
    except Exception as error:  # noqa: BLE001 - a row of the table says which
        row["error"] = f"{type(error).__name__}: {error}"[:200]
    return row | {"seconds": round(time.monotonic() - began, 1)}


def described(model: LoadedModel) -> dict[str, Any]:
    """The default layer of a model, its grid, and what the probe of positions found."""
    path = model.target_layer
    places = next(finding for finding in model.findings if finding.name == "places")
    row: dict[str, Any] = {
        "layer": path,
        "places": places.follows,
        "input": model.preprocessing.crop,
    }
    if path is None:
        return row | {"reason": model.no_gradients}
    layer = model.layer(path)
    assert layer.layout is not None
    row |= {"type": layer.type, "grid": layer.layout.grid, "kind": layer.layout.kind}
    if layer.layout.kind == "tokens" and layer.shape is not None:
        rows, columns = layer.layout.grid
        extra = layer.shape[0] - rows * columns
        before = layer.layout.prefix if layer.layout.token_order is None else None
        row |= {"extra": extra, "before": before}
    return row


def rows() -> Iterator[dict[str, Any]]:
    """The newest row of each model."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for line in ROWS.read_text().splitlines() if ROWS.exists() else []:
        row = json.loads(line)
        newest[row["library"], row["name"]] = row
    yield from (newest[key] for key in sorted(newest, key=lambda key: (key[0], key[1].lower())))


NOT_MEASURED = "not measured"

HEAD = """# Default layers of transformers

Written by `benchmarks/transformer_layers.py` from what camserve measures when it loads a model:
{ours} models of timm with their own architecture, and {theirs} classes of Hugging Face with small
configurations, saved with `save_pretrained` and loaded as `hf/FOLDER`. All weights are random, so
that positions which are *unclear* here may be clear with trained weights.

*Grid*: rows×columns of the default layer's map, for the given input. *Other tokens*: those
without a position in the image, before and after the cells. *Positions*: what the
[probe](../explanation/measured-at-load.md) of cell positions found at this layer. A layer whose
cells have no known order, such as those inside the windows of Hugging Face's Hiera, is never a
default: a map drawn from it would be scrambled. *Methods*: which of the {methods} run on the model.
*Lane*: whether it is compiled, or why not; of the {lanes} models that were tried, {compiled} are.

| library | model | input | default layer | grid | other tokens | positions | methods | lane |
|---|---|---|---|---|---|---|---|---|
"""


def page(table: list[dict[str, Any]]) -> str:
    """The page with one line per model."""
    ours = sum(row["library"] == "timm" for row in table)
    lanes = [row["lane"] for row in table if "lane" in row]
    head = HEAD.format(
        ours=ours,
        theirs=len(table) - ours,
        methods=len(METHODS),
        lanes=len(lanes),
        compiled=lanes.count("yes"),
    )
    return head + "".join(f"{line_of(row)}\n" for row in table)


def line_of(row: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in row:
        marks = str.maketrans("|`", "/'")
        reason = row["error"].translate(marks).partition(": ")[2]
        cells = ["", reason, "", "", "not loaded", "", ""]
    else:
        layer = f"`{row['layer']}`" if row["layer"] else f"none: {row['reason'] or 'no such layer'}"
        grid = "×".join(map(str, row.get("grid", ())))
        cells = ["×".join(map(str, row["input"])), layer, grid, tokens_of(row), positions_of(row)]
        cells += [methods_of(row), row.get("lane", NOT_MEASURED)]
    return f"| {row['library']} | {row['name']} | " + " | ".join(cells) + " |"


def methods_of(row: dict[str, Any]) -> str:
    """The methods that run."""
    if "refused" not in row:
        return NOT_MEASURED
    refused = ", ".join(f"`{name}`" for name in row["refused"])
    return f"all but {refused}" if refused else "all"


def tokens_of(row: dict[str, Any]) -> str:
    """The number of tokens before and after the cells."""
    if row.get("kind") != "tokens":
        return ""
    before = row["before"]
    return f"{before} + {row['extra'] - before}" if before is not None else str(row["extra"])


def positions_of(row: dict[str, Any]) -> str:
    """The verdict on the positions of the cells in a word."""
    follows = row["places"] or ""
    if "places_unclear" in follows:
        return "unclear (flag)"
    return "corrected" if "measured layout" in follows else "confirmed" if row["layer"] else ""


def main() -> None:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="these names, measured again")
    parser.add_argument("--lanes", action="store_true", help="compile each model, too")
    parser.add_argument("--boxes", action="store_true", help="detectors and segmenters alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ROWS.parent.mkdir(exist_ok=True)
    if options.boxes:
        write_boxes(options.only)
        return
    done = {
        (row["library"], row["name"])
        for row in rows()
        if "error" in row or "lane" in row or ("refused" in row and not options.lanes)
    }
    names = [("Hugging Face", name) for name in HUGGING_FACE]
    names += [("timm", name) for name in TIMM if timm.is_model(name)]
    for library, name in names:
        if name in options.only or (not options.only and (library, name) not in done):
            row = row_of(library, name, Compiler() if options.lanes else None)
            print(row, flush=True)
            with ROWS.open("a") as file:
                file.write(f"{json.dumps(row)}\n")
    PAGE.write_text(page(list(rows())) + boxes_part())


BEGIN, END = "<!-- boxes:begin -->", "<!-- boxes:end -->"

BOXES = """
## Detectors and segmenters

Small configurations of Hugging Face with random weights, as above, on an image of 90×70 pixels.
*Resized to*: the image that the model gets. *Maps*: the methods with a map that is not zero at the
default layer, for one at least of the three best detections or largest regions; those of `gradcam`,
`gradcampp` and `xgradcam` carry the flag `not_per_box`. `rise` and `occlusion` run on all of them,
other methods on none. `benchmarks/transformer_layers.py --boxes` writes this part.

<!-- boxes:begin -->

| class | scores | image processor | resized to | default layer | grid | maps |
|---|---|---|---|---|---|---|
"""


def boxes_part() -> str:
    """The part of the page on detectors and segmenters, as it stands there."""
    _, mark, rest = PAGE.read_text().partition(BOXES.partition(BEGIN)[0])
    return f"{mark}{rest}"


def boxes_row(name: str, folder: Path) -> str:
    """The line of a detector or a segmenter."""
    save(transformers, name, folder)
    model = load_model(ModelSpec(name, f"hf/{folder}"))
    pixels = image(1, (70, 90))
    source = Source(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()), "PNG", "")
    given = fit_to_model(source, model.preprocessing)
    found = []
    for method in ("hirescam", "layercam", "gradcam", "gradcampp", "xgradcam"):
        question = Question(
            given.pixels,
            method=method,
            layers=model.default_layers,
            min_score=0.0,
            explain_top=3,
            source=source.size,
            seen=given.geometry.content,
            shown=given.geometry.seen,
        )
        maps = [each.grid for each in answer(model, question)[0].explanations]
        found += [f"`{method}`"] if any(each.any() for each in maps) else []
    height, width = given.pixels.shape[1:]
    grid = "×".join(map(str, maps[0].shape))
    layer = f"`{model.default_layers[0]}`"
    if len(model.default_layers) > 1:
        layer += f" and {len(model.default_layers) - 1} more, fused"
    cells = (
        name,
        model.output,
        PROCESSORS[name][0],
        f"{height}×{width}",
        layer,
        grid,
        ", ".join(found),
    )
    return f"| {' | '.join(cells)} |\n"


def write_boxes(only: Sequence[str]) -> None:
    """Measure the detectors and segmenters that are missing, and write their part of the page."""
    for name in only or PROCESSORS.keys() - boxes_rows():
        with tempfile.TemporaryDirectory() as folder:
            line = boxes_row(name, Path(folder))
        print(line, end="", flush=True)
        with BOXES_ROWS.open("a") as file:
            file.write(f"{json.dumps([name, line])}\n")
    found = boxes_rows()
    lines = "".join(found[name] for name in PROCESSORS if name in found)
    text = PAGE.read_text()
    PAGE.write_text(f"{text.removesuffix(boxes_part())}{BOXES}{lines}\n{END}\n")


def boxes_rows() -> dict[str, str]:
    """The newest line of each detector and segmenter."""
    lines = BOXES_ROWS.read_text().splitlines() if BOXES_ROWS.exists() else []
    return dict(map(json.loads, lines))


if __name__ == "__main__":
    main()
