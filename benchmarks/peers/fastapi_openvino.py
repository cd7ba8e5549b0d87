"""FastAPI and OpenVINO, prediction alone: the fastest that a service without evidence is here.

OpenVINO's own hint for throughput makes as many streams as suit the cores, and each request that
runs has one; there are as many requests as OpenVINO finds best.
"""

from __future__ import annotations

import queue
from typing import Annotated, Any

import numpy as np
import openvino
import torch
from fastapi import FastAPI, File

from peers import common

app = FastAPI()
torch.set_num_threads(1)
compiled = openvino.Core().compile_model(
    openvino.convert_model(
        common.load(), example_input=torch.zeros(1, 3, 224, 224), input=[(1, 3, 224, 224)]
    ),
    "CPU",
    {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_NUM_THREADS": common.cores(),
        "INFERENCE_PRECISION_HINT": "f32",
    },
)
free: queue.SimpleQueue[openvino.InferRequest] = queue.SimpleQueue()
for _ in range(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")):
    free.put(compiled.create_infer_request())


@app.get("/health")
def health() -> dict[str, str]:
    """Whether it is up."""
    return {"status": "ok"}


@app.post("/predict")
def predict(image: Annotated[bytes, File()]) -> dict[str, Any]:
    """The prediction."""
    values, _ = common.opened(image)
    request = free.get()
    try:
        request.infer([values.numpy()])
        logits = np.array(request.get_output_tensor(0).data[0])
    finally:
        free.put(request)
    return common.predicted(torch.from_numpy(logits))
