"""Label Studio's own SDK reads pre-labels of boxes and regions; no Label Studio runs."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from label_studio import environment
from starlette.testclient import TestClient

from service.app import create_app
from service.images.run_lengths import rle_decode
from service.settings import Settings

pytestmark = [pytest.mark.labeling, pytest.mark.timeout(600)]

LABELS = "".join(f'<Label value="class {index}"/>' for index in range(1, 4))
CONFIG = f"""<View><Image name="image" value="$image"/>
  <RectangleLabels name="box" toName="image">{LABELS}</RectangleLabels>
  <BrushLabels name="brush" toName="image">{LABELS}</BrushLabels></View>"""
PNG = pictures.png(90, 70)


def test_its_sdk_accepts_boxes_and_decodes_the_masks_of_regions() -> None:
    python = environment() / "bin" / "python"
    uri = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    models = ("boxes=detectors:faster_rcnn", "regions=detectors:segmenter")
    predictions: list[Any] = []
    with TestClient(create_app(Settings(models=models, device="cpu", workers=1))) as client:
        for model in ("boxes", "regions"):
            base = "/integrations/label-studio"
            setup = {"project": model, "schema": CONFIG, "extra_params": {"model": model}}
            client.post(f"{base}/setup", json=setup).raise_for_status()
            body = {"tasks": [{"id": 1, "data": {"image": uri}}], "project": model}
            body |= {"label_config": CONFIG, "params": {}}
            predictions += client.post(f"{base}/predict", json=body).json()["results"]
        headers = {"content-type": "image/png"}
        answer = client.post("/predict?model=regions", content=PNG, headers=headers).json()
    script = Path(__file__).with_name("judge.py")
    sent = json.dumps({"config": CONFIG, "predictions": predictions})
    ran = subprocess.run([python, script], input=sent, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    boxes, regions = json.loads(ran.stdout)
    assert boxes == {"errors": [], "alphas": []}
    assert regions["errors"] == []
    masks = [each["mask"] for each in answer["results"][0]["predictions"] if each["class_id"]]
    assert len(masks) == len(regions["alphas"]) > 0
    for mask, alpha in zip(masks, regions["alphas"], strict=True):
        decoded = np.frombuffer(base64.b64decode(alpha), np.uint8).reshape(70, 90)
        np.testing.assert_array_equal(
            decoded, 255 * rle_decode(tuple(mask["size"]), mask["counts"]).astype(np.uint8)
        )
