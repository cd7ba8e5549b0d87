"""FastAPI and eager torch, prediction alone: what a service without evidence costs.

A forward pass shares nothing, so as many run at once as there are cores, each in one thread.
"""

from __future__ import annotations

import threading
from typing import Annotated, Any

import torch
from fastapi import FastAPI, File

from peers import common

app = FastAPI()
model = common.load()
free = threading.Semaphore(common.cores())
torch.set_num_threads(1)


@app.get("/health")
def health() -> dict[str, str]:
    """Whether it is up."""
    return {"status": "ok"}


@app.post("/predict")
def predict(image: Annotated[bytes, File()]) -> dict[str, Any]:
    """The prediction."""
    values, _ = common.opened(image)
    with free, torch.inference_mode():
        logits = model(values)[0]
    return common.predicted(logits)
