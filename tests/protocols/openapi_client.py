"""Runs in the environment of openapi-python-client: explains an image with the client it wrote.

PYTHONPATH=FOLDER_OF_THE_CLIENT python openapi_client.py URL IMAGE KEY
"""

from __future__ import annotations

import io
import json
import sys
from base64 import b64encode
from pathlib import Path

from camserve_client import AuthenticatedClient, Client
from camserve_client.api.classify import explain
from camserve_client.api.models import kernels, layers, models
from camserve_client.models.explain_files_body import ExplainFilesBody
from camserve_client.models.explain_request import ExplainRequest
from camserve_client.models.image_source import ImageSource
from camserve_client.models.include import Include
from camserve_client.models.method import Method
from camserve_client.types import File


def main(url: str, image: str, key: str) -> None:
    data = Path(image).read_bytes()
    form = ExplainFilesBody(image=[File(payload=io.BytesIO(data), file_name="a.png")])
    source = ImageSource(data=b64encode(data).decode())
    request = ExplainRequest(images=[source], method=Method.HIRESCAM, top_k=2)
    wrong = Client(base_url=url)
    client = AuthenticatedClient(base_url=url, token=key, raise_on_unexpected_status=True)
    with client, wrong:
        by_form = explain.sync(
            client=client, body=form, method=Method.LAYERCAM, include=[Include.GRID], top_k=3
        )
        by_json = explain.sync(client=client, body=request)
        raw = explain.sync(client=client, body=File(payload=io.BytesIO(data)))
        served = models.sync(client=client)
        paths = [each.path for each in layers.sync("small", client=client).layers]
        drawn = kernels.sync("small", "features.0", client=client)
        refused = explain.sync(client=wrong, body=form)
    seen = {
        "form": by_form.to_dict(),
        "json": by_json.to_dict(),
        "raw": raw.to_dict(),
        "models": [each.name for each in served.models],
        "layers": paths,
        "kernels": drawn.payload.read(8).hex(),
        "refused": refused.to_dict(),
    }
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
