"""Write down what the real Label Studio sends, for `tests/integration/test_label_studio.py`.

PYTHONPATH=.:tests/support .venv/bin/python tests/labeling/record.py

To be run by hand, after `make labeling`, when Label Studio's version changes.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pictures
import uvicorn
from label_studio import label_studio
from pydantic import SecretStr
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.app import create_app
from service.settings import Settings

RECORDED = Path(__file__).parent.parent / "integration" / "recorded_label_studio.json"
HEADERS = ("content-type", "accept")

CONFIG = """<View>
  <Image name="image" value="$image"/>
  <Choices name="kind" toName="image"><Choice value="class 0"/><Choice value="class 1"/></Choices>
  <BrushLabels name="cam" toName="image"><Label value="cam"/></BrushLabels>
  <RectangleLabels name="box" toName="image"><Label value="evidence"/></RectangleLabels>
  <KeyPointLabels name="peak" toName="image"><Label value="peak" smart="true"/></KeyPointLabels>
</View>"""
SHORT = 64
"""Numbers of a brush that are kept of what Label Studio sends back."""


class Recorder:
    """Keeps each request that Label Studio makes, with short brushes and without tokens."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.kept: list[dict[str, Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = bytearray()

        async def receive_and_keep() -> Message:
            message = await receive()
            sent.extend(message.get("body", b""))
            return message

        await self.app(scope, receive_and_keep, send)
        if scope["type"] != "http":
            return
        while not sent and scope["method"] == "POST":  # the webhook reads nothing
            message = await receive()
            sent.extend(message.get("body", b""))
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.kept.append(
            {
                "method": scope["method"],
                "path": scope["path"],
                "headers": {name: headers[name] for name in HEADERS if name in headers},
                "body": _short(json.loads(sent)) if sent else None,
            }
        )


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: "0" * 40 if name in {"access_token", "token"} else _short(each)
            for name, each in value.items()
        }
    if isinstance(value, list):
        return [_short(each) for each in value[:SHORT]]
    return value


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    with label_studio(folder) as studio:
        settings = Settings(
            models=("tiny:small",),
            device="cpu",
            workers=1,
            label_studio_url=studio.url,
            label_studio_token=SecretStr(studio.access_token()),
        )
        recorder = Recorder(create_app(settings))
        server = uvicorn.Server(uvicorn.Config(recorder, port=18474, log_config=None))
        thread = threading.Thread(target=server.run)
        thread.start()
        _work(studio, "http://127.0.0.1:18474/integrations/label-studio")
        until = time.monotonic() + 30  # webhooks come from a thread of their own
        while time.monotonic() < until and "ANNOTATION_CREATED" not in map(_kind, recorder.kept):
            time.sleep(0.1)
        server.should_exit = True
        thread.join()
    distinct = {(each["method"], each["path"], _kind(each)): each for each in recorder.kept}
    RECORDED.write_text(json.dumps(list(distinct.values()), indent=1) + "\n")


def _kind(request: dict[str, Any]) -> str:
    body = request["body"] or {}
    return str(body.get("action") or bool((body.get("params") or {}).get("context")))


def _work(studio: Any, url: str) -> None:
    project = studio.project(CONFIG)
    tasks = studio.upload(project, {"a.png": pictures.png(), "b.png": pictures.png(seed=1)})
    backend = studio.attach(project, url, extra_params={"method": "gradcam", "threshold": 0.5})
    studio.retrieve(project)
    mark = {
        "id": "HkO-",
        "from_name": "peak",
        "to_name": "image",
        "type": "keypointlabels",
        "original_width": 80,
        "original_height": 60,
        "is_positive": True,
        "value": {"x": 28.1, "y": 41.6, "width": 0.5, "keypointlabels": ["peak"]},
    }
    studio.click(backend["id"], tasks[0]["id"], mark)
    studio.ask("GET", f"ml/{backend['id']}/versions")
    studio.ask("POST", f"ml/{backend['id']}/train")
    choice = {"choices": ["class 0"]}
    result = {"from_name": "kind", "to_name": "image", "type": "choices", "value": choice}
    studio.ask("POST", f"tasks/{tasks[0]['id']}/annotations", json={"result": [result]})


if __name__ == "__main__":
    main()
