"""What Triton's own HTTP client gets: run in .venv-protocols, prints JSON.

python triton_client.py HOST:PORT PICTURE.png NORMALIZED.npy ADMIN_KEY
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

MODEL = "small"


def tensor(array: np.ndarray, datatype: str, *, in_binary: bool) -> triton.InferInput:
    made = triton.InferInput("input__0", list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=in_binary)
    return made


def told(result: triton.InferResult) -> dict[str, Any]:
    names = [output["name"] for output in result.get_response()["outputs"]]
    return {name: result.as_numpy(name).tolist() for name in names}


def as_text(value: bytes) -> Any:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


def main() -> None:
    picture, normalized = Path(sys.argv[2]).read_bytes(), np.load(sys.argv[3])
    admin = {"Authorization": f"Bearer {sys.argv[4]}"}
    client = triton.InferenceServerClient(sys.argv[1], network_timeout=20, connection_timeout=20)
    encoded = base64.b64encode(picture).decode()
    files = np.array([picture], dtype=object)
    texts = np.array([encoded], dtype=object)
    answers = {
        "files": told(client.infer(MODEL, [tensor(files, "BYTES", in_binary=True)])),
        "base64": told(client.infer(MODEL, [tensor(texts, "BYTES", in_binary=False)])),
    }
    for in_binary in (True, False):
        for back in (True, False):
            names = ("scores", "targets", "grid", "heatmap")
            outputs = [triton.InferRequestedOutput(name, binary_data=back) for name in names]
            outputs.append(triton.InferRequestedOutput("logits", binary_data=back, class_count=2))
            answers[f"tensor_{in_binary}_{back}"] = told(
                client.infer(
                    MODEL,
                    [tensor(normalized, "FP32", in_binary=in_binary)],
                    outputs=outputs,
                    request_id="a request",
                    parameters={"values": "normalized", "target": "class 2"},
                )
            )
    try:
        client.infer("absent", [tensor(files, "BYTES", in_binary=True)])
        raise AssertionError("an error was expected")
    except InferenceServerException as error:
        refused = [error.status(), error.message()]
    seen = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(MODEL),
        "absent_ready": client.is_model_ready("absent"),
        "server": client.get_server_metadata(),
        "model": client.get_model_metadata(MODEL),
        "index": client.get_model_repository_index(headers=admin),
        "infer": answers,
        "refused": refused,
    }
    json.dump(seen, sys.stdout, default=as_text)


main()
