"""The files of the page: their types, tags and addresses, and what they may not hold."""

from __future__ import annotations

import base64
import inspect
import itertools
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from starlette.testclient import TestClient

from api_schemas.methods import BACKWARD, METHODS, STRIDE, WINDOW
from api_schemas.options import Colormap
from service.cam.heatmap import COLORMAPS
from service.inference import batch, detection, explanations, segmentation
from service.routes.page.router import read_files

WEB = Path(__file__).parent.parent.parent / "service" / "routes" / "page"

PATHS = {
    "/": "text/html; charset=utf-8",
    "/docs": "text/html; charset=utf-8",
    "/favicon.ico": "image/x-icon",
    "/page/app.js": "text/javascript; charset=utf-8",
    "/page/tables.js": "text/javascript; charset=utf-8",
    "/page/page.css": "text/css; charset=utf-8",
    "/page/favicon.svg": "image/svg+xml",
    "/page/sunflower.jpg": "image/jpeg",
}


@pytest.mark.parametrize(("path", "media_type"), PATHS.items())
def test_a_file_of_the_page_is_sent_once_until_it_changes(
    client: TestClient, path: str, media_type: str
) -> None:
    first = client.get(path)
    assert first.status_code == 200
    assert first.headers["content-type"] == media_type
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for known in (tag, f'"other", W/{tag}', "*"):
        again = client.get(path, headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    assert client.get(path, headers={"if-none-match": '"other"'}).status_code == 200
    assert client.head(path).headers["content-length"] == str(len(first.content))


@pytest.mark.parametrize("name", ["page.py", "__init__.py", "nothing.js", "..%2Fapp.py"])
def test_nothing_but_the_files_of_the_page_is_sent(client: TestClient, name: str) -> None:
    refused = client.get(f"/page/{name}")
    assert (refused.status_code, refused.json()["code"]) == (404, "not_found")


def test_every_file_that_is_named_exists() -> None:
    files = read_files()
    text = {
        name: file.body.decode() for name, file in files.items() if name.endswith((".html", ".js"))
    }
    named = {
        *re.findall(r'"page/([^"]+)"', " ".join(text.values())),
        *re.findall(r'from "\./([^"]+)"', " ".join(text.values())),
    }
    assert {"app.js", "heat.js", "tables.js", "sunflower.jpg", "page.css"} <= named
    assert named <= files.keys()


def test_no_file_holds_an_absolute_address_an_inline_script_or_an_inline_style() -> None:
    """What a strict Content-Security-Policy forbids, and what breaks behind a proxy's prefix."""
    for name, file in read_files().items():
        if not name.endswith((".html", ".js", ".css")):
            continue
        text = file.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|\burl\(", text), name
        assert not re.search(r"""(?:src|href|fetch\()\s*=?\s*["']/""", text), name
        if name.endswith(".html"):
            assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text), name
            assert not re.search(r"<script(?![^>]*\ssrc=)", text), name


def tables_of_the_page() -> dict[str, Any]:
    module = read_files()["tables.js"].body.decode()
    found = re.findall(r"^export const (\w+) = (.+);$", module, re.MULTILINE)
    return {name: json.loads(value) for name, value in found}


def test_the_palettes_are_those_that_the_server_draws_with() -> None:
    tables = tables_of_the_page()["PALETTES"]
    assert list(tables) == list(get_args(Colormap))
    for name, table in tables.items():
        assert base64.b64decode(table) == COLORMAPS[name].tobytes()


def test_the_methods_are_those_of_the_table() -> None:
    tables = tables_of_the_page()
    assert [each["name"] for each in tables["METHODS"]] == list(METHODS)
    assert (tables["BACKWARD"], tables["WINDOW"], tables["STRIDE"]) == (BACKWARD, WINDOW, STRIDE)
    assert "gradcampp" not in read_files()["methods.js"].body.decode()


def test_the_sample_is_the_one_of_the_examples() -> None:
    example = WEB.parents[2] / "examples" / "sunflower.jpg"
    assert (WEB / "sunflower.jpg").read_bytes() == example.read_bytes()


def test_every_flag_of_a_map_has_words_for_visitors() -> None:
    sources = map(inspect.getsource, (batch, detection, segmentation, explanations))
    tables = (re.findall(r"flags = \{\n(.*?)\n    \}", text, re.DOTALL) for text in sources)
    table = "\n".join(itertools.chain(*tables))
    flags = {*re.findall(r'^ {8}"(\w+)": ', table, re.MULTILINE)}
    assert {"all_zero", "weights_hardly_matter", "edge_clipped", "layer_not_used"} < flags
    words = (
        (WEB / "stage.js").read_text(encoding="utf-8").split("const FLAGS = {")[1].split("};")[0]
    )
    assert [flag for flag in flags if f"\n  {flag}: " not in words] == []
