"""What KServe's and Triton's own clients get of a detector: run in .venv-protocols, prints JSON.

python boxes_client.py URL IMAGE.png IMAGE.png
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from kserve import InferInput, InferRequest, InferResponse, RESTConfig
from kserve.inference_client import InferenceRESTClient
from kserve.protocol.infer_type import RequestedOutput

MODEL = "flower-boxes"
NAMES = ("num_detections", "boxes", "class_ids", "labels", "scores", "explain")


async def by_kserve(url: str, images: list[bytes]) -> dict[str, Any]:
    encoded = [{"b64": base64.b64encode(image).decode()} for image in images]
    first = InferenceRESTClient(RESTConfig(protocol="v1", timeout=20))
    second = InferenceRESTClient(RESTConfig(protocol="v2", timeout=20))
    tensor = InferInput("image", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(images, dtype=object), binary_data=True)
    answers = {
        "predict": await first.infer(url, {"instances": encoded}, model_name=MODEL),
        "explain": await first.explain(url, MODEL, {"instances": encoded[:1]}),
    }
    for back in (True, False):
        request = InferRequest(
            MODEL,
            [tensor],
            parameters={"explain_top": 2},
            request_outputs=[RequestedOutput(name, {"binary_data": back}) for name in NAMES],
        )
        answer = await second.infer(url, request, model_name=MODEL)
        assert isinstance(answer, InferResponse)
        answers["binary" if back else "json"] = {
            each.name: each.as_numpy().tolist() for each in answer.outputs
        }
    return answers


def by_triton(address: str, images: list[bytes]) -> dict[str, Any]:
    client = triton.InferenceServerClient(address, network_timeout=20, connection_timeout=20)
    tensor = triton.InferInput("image", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(images, dtype=object), binary_data=True)
    outputs = [triton.InferRequestedOutput(name, binary_data=True) for name in NAMES]
    answer = client.infer(MODEL, [tensor], outputs=outputs, parameters={"explain_top": 2})
    return {
        "metadata": client.get_model_metadata(MODEL),
        "binary": {name: answer.as_numpy(name).tolist() for name in NAMES},
    }


def main() -> None:
    url, *paths = sys.argv[1:]
    images = [Path(path).read_bytes() for path in paths]
    seen = {
        "kserve": asyncio.run(by_kserve(url, images)),
        "triton": by_triton(url.removeprefix("http://"), images),
    }
    json.dump(seen, sys.stdout, default=bytes.decode)


main()
