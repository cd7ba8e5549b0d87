"""FastAPI and TorchCAM.

The extractor's hooks sit on the model, so one request at a time runs through it; the others are
decoded meanwhile. torch takes all cores for the one that runs.
"""

from __future__ import annotations

import threading
from typing import Annotated, Any

import torch
from fastapi import FastAPI, File
from torchcam.methods import GradCAM

from peers import common

app = FastAPI()
model = common.load()
extractor = GradCAM(model, target_layer=common.LAYER)
lock = threading.Lock()
torch.set_num_threads(common.cores())


@app.get("/health")
def health() -> dict[str, str]:
    """Whether it is up."""
    return {"status": "ok"}


@app.post("/explain")
def explain(image: Annotated[bytes, File()], grid: bool = False) -> dict[str, Any]:
    """The prediction, and its overlay."""
    values, photo = common.opened(image)
    with lock:
        logits = model(values)
        maps = extractor(int(logits.argmax()), logits)[0]
    return common.answer(logits.detach()[0], maps[0].numpy(), photo, grid)
