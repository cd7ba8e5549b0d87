"""LitServe and TorchCAM: `python -m peers.litserve_torchcam PORT`.

A process a core, each with its own model, extractor and single torch thread, so nothing is shared.
"""

import sys
from typing import Any

import cv2
import litserve
import torch
from fastapi import Request
from torchcam.methods import GradCAM

from peers import common


class Explain(litserve.LitAPI):
    """One worker."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe's signature
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self.model = common.load()
        self.extractor = GradCAM(self.model, target_layer=common.LAYER)

    def decode_request(self, request: Request) -> Any:
        return common.opened(request["image"].file.read())

    def predict(self, opened: Any) -> Any:
        values, photo = opened
        logits = self.model(values)
        maps = self.extractor(int(logits.argmax()), logits)[0]
        return logits.detach()[0], maps[0].numpy(), photo

    def encode_response(self, output: Any) -> dict[str, Any]:
        logits, cam, photo = output
        return common.answer(logits, cam, photo, grid=True)


if __name__ == "__main__":
    api = Explain(api_path="/explain")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=common.cores())
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning"
    )
