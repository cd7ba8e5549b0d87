"""What KServe's own client gets: run in .venv-protocols, prints JSON.

python kserve_client.py URL PICTURE.png PIXELS.npy
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from kserve import InferInput, InferRequest, InferResponse, RESTConfig
from kserve.inference_client import InferenceRESTClient
from kserve.protocol.infer_type import RequestedOutput

MODEL = "small"


async def v1(url: str, picture: bytes, pixels: np.ndarray) -> dict[str, Any]:
    client = InferenceRESTClient(RESTConfig(protocol="v1", timeout=20))
    encoded = base64.b64encode(picture).decode()
    instances = {"instances": [{"b64": encoded}, {"image": {"b64": encoded}}, pixels.tolist()]}
    asked = {"instances": [{"data": encoded, "target": 3}], "parameters": {"include": ["grid"]}}
    try:
        await client.infer(url, {"instances": [{"b64": "AAAA"}]}, model_name=MODEL)
        raise AssertionError("an error was expected")
    except httpx.HTTPStatusError as error:
        refused = [error.response.status_code, str(error)]
    return {
        "ready": await client.is_model_ready(url, MODEL),
        "predict": await client.infer(url, instances, model_name=MODEL),
        "explain": await client.explain(url, MODEL, asked),
        "refused": refused,
    }


async def v2(url: str, picture: bytes, pixels: np.ndarray) -> dict[str, Any]:
    client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=20))
    encoded = base64.b64encode(picture).decode()
    answers = {}
    for name, array, in_binary in (
        ("files_in_binary", np.array([picture, picture], dtype=object), True),
        ("base64_in_json", np.array([encoded], dtype=object), False),
        ("base64_in_binary", np.array([encoded], dtype=object), True),
        ("pixels_in_json", pixels[None], False),
        ("pixels_in_binary", pixels[None], True),
    ):
        datatype = "UINT8" if array.dtype == np.uint8 else "BYTES"
        tensor = InferInput("image", list(array.shape), datatype)
        tensor.set_data_from_numpy(array, binary_data=in_binary)
        for back in (True, False):
            names = ("class_ids", "labels", "scores", "grid")
            outputs = [RequestedOutput(each, {"binary_data": back}) for each in names]
            request = InferRequest(
                MODEL, [tensor], parameters={"top_k": 2}, request_outputs=outputs
            )
            answer = await client.infer(url, request, model_name=MODEL)
            assert isinstance(answer, InferResponse)
            answers[f"{name}_{'binary' if back else 'json'}_back"] = {
                each.name: each.as_numpy().tolist() for each in answer.outputs
            }
    return {
        "live": await client.is_server_live(url),
        "ready": await client.is_server_ready(url),
        "model_ready": await client.is_model_ready(url, MODEL),
        "absent": await client.is_model_ready(url, "absent"),
        "infer": answers,
    }


async def both(url: str, picture: bytes, pixels: np.ndarray) -> dict[str, Any]:
    return {"v1": await v1(url, picture, pixels), "v2": await v2(url, picture, pixels)}


seen = asyncio.run(both(sys.argv[1], Path(sys.argv[2]).read_bytes(), np.load(sys.argv[3])))
json.dump(seen, sys.stdout, default=bytes.decode)
