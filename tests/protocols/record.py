"""Write down what the real clients send, for `tests/integration/test_recorded_clients.py`.

PYTHONPATH=.:tests/support .venv/bin/python tests/protocols/record.py

To be run by hand, after `make protocols`, when a client's version changes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.app import create_app
from service.settings import Settings

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RECORDED = HERE.parent / "integration" / "recorded_clients.json"
HEADERS = ("content-type", "inference-header-content-length", "authorization", "token")
ADMIN = "let me in"


class Recorder:
    """Keeps each request, and the status of its answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.client = ""
        self.kept: list[dict[str, Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent, status = bytearray(), 0
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}

        async def receive_and_keep() -> Message:
            message = await receive()
            sent.extend(message.get("body", b""))
            return message

        async def send_and_keep(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        await self.app(scope, receive_and_keep, send_and_keep)
        self.kept.append(
            {
                "client": self.client,
                "method": scope["method"],
                "path": scope["path"],
                "headers": {name: headers[name] for name in HEADERS if name in headers},
                "body": base64.b64encode(sent).decode(),
                "status": status,
            }
        )


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    pixels = pictures.noise(16, 12)
    (folder / "picture.png").write_bytes(pictures.file(pixels))
    np.save(folder / "pixels.npy", pixels)
    np.save(folder / "normalized.npy", np.zeros((1, 3, 12, 16), np.float32))
    keys = folder / "admins"
    keys.write_text(f"ops:{hashlib.sha256(ADMIN.encode()).hexdigest()}\n")
    settings = Settings(models=("tiny:small",), device="cpu", workers=1, admin_keys_file=keys)
    recorder = Recorder(create_app(settings))
    server = uvicorn.Server(uvicorn.Config(recorder, port=18473, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    picture, normalized = folder / "picture.png", folder / "normalized.npy"
    host = "127.0.0.1:18473"
    protocols = os.environ.get("CAMSERVE_TEST_PROTOCOLS", ROOT / ".venv-protocols")
    labeling = os.environ.get("CAMSERVE_TEST_X_ANYLABELING", ROOT / ".venv-x-anylabeling")
    for client, environment, arguments in (
        ("kserve", protocols, (f"http://{host}", picture, folder / "pixels.npy")),
        ("triton", protocols, (host, picture, normalized, ADMIN)),
        (
            "x_anylabeling",
            labeling,
            (f"http://{host}/integrations/x-anylabeling", picture, folder),
        ),
    ):
        recorder.client = client
        python, script = Path(environment) / "bin/python", HERE / f"{client}_client.py"
        subprocess.run([python, script, *arguments], check=True, stdout=subprocess.DEVNULL)
    server.should_exit = True
    thread.join()
    RECORDED.write_text(json.dumps(recorder.kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
