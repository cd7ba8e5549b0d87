"""FastAPI and pytorch-grad-cam.

One object holds the last activations and gradients, so one request at a time runs through it; the
others are decoded meanwhile. torch takes all cores for the one that runs.
"""

from __future__ import annotations

import threading
from typing import Annotated, Any

import torch
from fastapi import FastAPI, File
from pytorch_grad_cam import GradCAM

from peers import common

app = FastAPI()
model = common.load()
cam = GradCAM(model=model, target_layers=[model.get_submodule(common.LAYER)])
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
        maps = cam(input_tensor=values, targets=None)
        logits = cam.outputs.detach()[0]
    return common.answer(logits, common.scaled(maps[0]), photo, grid)
