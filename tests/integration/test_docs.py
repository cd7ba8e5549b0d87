"""The page of all routes, from this server alone, also behind a proxy's prefix."""

from __future__ import annotations

import re
from urllib.parse import urljoin

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings


@pytest.mark.parametrize("prefix", ["", "/vision/cam"])
@pytest.mark.parametrize("stripped", [True, False])
def test_docs_ask_no_other_host_and_work_behind_a_prefix(prefix: str, stripped: bool) -> None:
    """Whether the proxy takes the prefix away or hands it on."""
    app = create_app(Settings(models=("tiny:small",), workers=1, root_path=prefix))
    sent = "" if stripped else prefix
    with TestClient(app) as client:
        page = client.get(f"{sent}/docs").text
        script = client.get(f"{sent}/page/docs.js").text
        links = re.findall(r"(?:src|href)=\"([^\"]+)\"", page) + re.findall(r'url: "(.+)"', script)
        assert len(links) >= 5
        for link in links:
            path = urljoin(f"{prefix}/docs", link)
            assert path.startswith(f"{prefix}/"), link
            assert client.get(sent + path.removeprefix(prefix)).status_code == 200
        document = client.get(f"{sent}/openapi.json").json()
        assert "/explain" in document["paths"]
        assert client.post(f"{sent}/explain").json()["code"] == "empty_body"
