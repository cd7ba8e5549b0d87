"""Run by Label Studio's own interpreter: what its SDK says of predictions.

JSON with `config` and `predictions` comes in; for each prediction its errors, and the alpha of each
brush as base64 of height times width bytes, go out.
"""

import base64
import json
import sys

import numpy as np
from label_studio_sdk.converter.brush import decode_rle
from label_studio_sdk.label_interface import LabelInterface

asked = json.load(sys.stdin)
interface = LabelInterface(asked["config"])
said = []
for prediction in asked["predictions"]:
    fields = {name: prediction[name] for name in ("result", "score", "model_version")}
    alphas = []
    for result in prediction["result"]:
        if result["type"] == "brushlabels":
            size = (result["original_height"], result["original_width"], 4)
            pixels = decode_rle(result["value"]["rle"]).reshape(size)
            assert (pixels == pixels[:, :, 3:]).all()
            alphas.append(base64.b64encode(np.ascontiguousarray(pixels[:, :, 3])).decode())
    errors = interface.validate_prediction(fields, return_errors=True)
    said.append({"errors": list(errors), "alphas": alphas})
json.dump(said, sys.stdout)
