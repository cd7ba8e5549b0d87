"""`GET /`, `/page/…` and `/docs`: a few files, read once, with their types and entity tags.

The files name each other by relative paths alone, so a proxy's prefix changes nothing in them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import get_args

from fastapi import APIRouter, HTTPException, Request, Response

from api_schemas.methods import BACKWARD, METHODS, STRIDE, WINDOW
from api_schemas.options import Colormap
from service.cam.heatmap import COLORMAPS

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".jpg": "image/jpeg",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file of the page: its bytes, their media type, and an entity tag of them."""

    body: bytes
    media_type: str
    etag: str


def page_router() -> APIRouter:
    """The routes of the page; every file is read here, so no request waits for the disk."""
    files = read_files()
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return _answer(request, files["index.html"])

    @router.api_route("/docs", methods=["GET", "HEAD"])
    async def routes(request: Request) -> Response:
        return _answer(request, files["docs.html"])

    @router.api_route("/favicon.ico", methods=["GET", "HEAD"])
    async def icon(request: Request) -> Response:
        return _answer(request, files["favicon.ico"])

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def file(request: Request, name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return _answer(request, files[name])

    return router


def read_files() -> Mapping[str, PageFile]:
    """Every file of the page by its name; `tables.js` is generated from the server's tables."""
    folder = resources.files("service.routes.page")
    bodies = {file.name: file.read_bytes() for file in folder.iterdir() if _suffix(file.name)}
    bodies["tables.js"] = tables_module()
    return {
        name: PageFile(body, TYPES[_suffix(name)], f'"{hashlib.sha256(body).hexdigest()[:20]}"')
        for name, body in bodies.items()
    }


def tables_module() -> bytes:
    """A JavaScript module: the methods, the constants of their costs, and the colormaps.

    PALETTES has the 256 × RGB of each colormap in base64.
    """
    palettes = {
        name: base64.b64encode(COLORMAPS[name].tobytes()).decode("ascii")
        for name in get_args(Colormap)
    }
    tables = {
        "METHODS": [record._asdict() for record in METHODS.values()],
        "BACKWARD": BACKWARD,
        "WINDOW": WINDOW,
        "STRIDE": STRIDE,
        "PALETTES": palettes,
    }
    lines = [f"export const {name} = {json.dumps(table)};\n" for name, table in tables.items()]
    return "".join(lines).encode()


def _suffix(name: str) -> str:
    """The suffix of a file that is served, or ""."""
    return next((suffix for suffix in TYPES if name.endswith(suffix)), "")


def _answer(request: Request, file: PageFile) -> Response:
    """The file, or 304 if the client has it; browsers revalidate it each time."""
    headers = {"ETag": file.etag, "Cache-Control": "no-cache"}
    known = request.headers.get("if-none-match", "")
    if known == "*" or file.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)
