"""A client of this service, in threads (`Client`) or tasks (`AsyncClient`), without torch.

    from api_schemas.client import Client

    with Client("http://127.0.0.1:8000") as client:
        result = client.explain("cat.jpg", include=["grid", "overlay"])[0]
        print(result.predictions[0].label, result.explanations[0].grid.shape)
        result.explanations[0].overlay.save("why.jpg")

It needs httpx, numpy, Pillow and pydantic. Options are those of `api_schemas.options`, results
those of `api_schemas.client.results`, errors those of `api_schemas.client.errors`. Requests and
retries are written once, in `calls` and `requests`; the two classes only send and wait.
"""

from __future__ import annotations

from api_schemas.client.client import URL, AsyncClient, Client
from api_schemas.client.pixel_arrays import pixels

__all__ = ["URL", "AsyncClient", "Client", "pixels"]
