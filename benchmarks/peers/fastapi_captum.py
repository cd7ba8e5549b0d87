"""FastAPI and Captum.

Captum hooks the shared model while it works, so one request at a time runs through it; and it wants
to be told the class, so the model predicts first. torch takes all cores for the one that runs.
"""

from __future__ import annotations

import threading
from typing import Annotated, Any

import numpy as np
import torch
from captum.attr import LayerGradCam
from fastapi import FastAPI, File

from peers import common

app = FastAPI()
model = common.load()
method = LayerGradCam(model, model.get_submodule(common.LAYER))
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
        with torch.inference_mode():
            logits = model(values)
        found = method.attribute(values, target=int(logits.argmax()), relu_attributions=True)
    cam = np.asarray(found.detach()[0, 0].numpy(), np.float32)
    return common.answer(logits[0], common.scaled(cam), photo, grid)
