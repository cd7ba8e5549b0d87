"""`overlay.png`: the image of a task with its evidence over it, live in the labeling page.

    <Image name="heat" value="http://service/integrations/label-studio/overlay.png?key=…&amp;src=$image"/>

Label Studio replaces `$image` with the address of the task's image, unencoded, and the browser
fetches the result with CORS and without credentials. So `src` is the rest of the query, and the key
is a token that defines which images may be seen, and from pages of which origin.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from fastapi import APIRouter, Request, Response

from api_schemas.options import ExplainOptions
from service.errors import ImageUrlRefused, MalformedRequest, Unauthorized
from service.integrations.label_studio.host import label_studio_of
from service.integrations.label_studio.task_images import fetch_image
from service.pipeline.answer_size import quote_image
from service.pipeline.process import render
from service.pipeline.response import overlay, style_of
from service.routes import lifecycle
from service.routes.docs import problems
from service.routes.state import service_of
from service.scheduling.admission import Permit
from service.security import overlay_tokens
from service.security.overlay_tokens import Grant

router = APIRouter(prefix="/integrations/label-studio", tags=["Label Studio"])

CACHE_SECONDS = 300
"""How long a browser may cache an overlay."""

MAX_QUERY = 10_000
"""Bytes of a query: a key, and an address of which every character may be encoded."""

_QUERY = re.compile(r"key=([A-Za-z0-9_.-]*)&src=(.*)", re.DOTALL)
_ENCODED = re.compile(r"(?:%2F|https?%3A)", re.IGNORECASE)

_IMAGE_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The image with its evidence over it.",
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def _parameter(name: str, text: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "query",
        "required": True,
        "description": text,
        "schema": {"type": "string"},
    }


@router.get(
    "/overlay.png",
    response_class=Response,
    responses=_IMAGE_RESPONSE | problems(400, 401, 415, 422, 424, 429, 500, 503, 504),
    openapi_extra={
        "parameters": [
            _parameter("key", "Made by `camserve overlay-token`."),
            _parameter("src", "The address of the image: the rest of the query, encoded or not."),
        ]
    },
)
async def overlay_png(request: Request) -> Response:
    """The evidence for the top-1 class of a task's image, drawn over it."""
    secret = label_studio_of(request).secret
    grant, source = read_query(request.scope["query_string"], secret)

    async def work(permit: Permit) -> Response:
        data = await _drawn(request, grant, source, permit)
        headers = {
            "Access-Control-Allow-Origin": grant.origin,
            "Cache-Control": f"private, max-age={CACHE_SECONDS}",
            "Vary": "Origin",
        }
        return Response(data, media_type="image/png", headers=headers)

    return await lifecycle.in_time_without_body(request, work)


def read_query(query: bytes, secret: str | None) -> tuple[Grant, str]:
    """The grant of the key in an overlay's query, and the image's address behind it.

    Raises MalformedRequest, Unauthorized, ImageUrlRefused.
    """
    match = _QUERY.fullmatch(query.decode("latin-1")) if len(query) <= MAX_QUERY else None
    if match is None:
        raise MalformedRequest(
            "Request overlay.png?key=KEY&src=$image, in this order, with a query of at most "
            f"{MAX_QUERY} bytes."
        )
    if secret is None:
        raise Unauthorized("Overlays are disabled; set CAMSERVE_OVERLAY_SECRET.")
    grant = overlay_tokens.read(match[1], secret)
    source = unquote(match[2]) if _ENCODED.match(match[2]) else match[2]
    if source.startswith(f"{grant.origin}/"):  # Label Studio adds its own address to some
        source = source.removeprefix(grant.origin)
    if not grant.covers(source):
        raise ImageUrlRefused(
            "The overlay's key is not valid for this image; make one for its address."
        )
    return grant, source


async def _drawn(request: Request, grant: Grant, source: str, permit: Permit) -> bytes:
    service = service_of(request)
    given = {"method": grant.method} if grant.method else {}
    options = ExplainOptions.model_validate(
        {"model": grant.model, "include": ["overlay"], "format": "png", **given}
    )
    async with lifecycle.model_in_use(request, options.model) as model:
        work = await lifecycle.prepare(request, model, options, 1, permit)
        work = replace(work, price=work.sizes.overlay)
        data = await fetch_image(request, source, None, lambda size: permit.grow(0, size))
        quote = quote_image(data, service.limits.pixels, work.price)
        work.bill.add(quote.price)
        answered = await lifecycle.infer(work, data, quote)
        (explanation, *_) = answered.inference.explanations
        image = await render(work, overlay, answered.upload, explanation, style_of(options))
        work.bill.settle(len(image.data))
        return image.data
