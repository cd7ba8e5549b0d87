"""A real Label Studio and a real camserve, on this machine, and nobody else."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from label_studio import LabelStudio, label_studio
from playwright.sync_api import Browser, sync_playwright
from running import Server, running

KEY = "the key of the labeling project"
SECRET = "what signs the overlays of the tests"  # noqa: S105


@dataclass(frozen=True)
class Backend:
    """The service as Label Studio reaches it."""

    server: Server
    key: str = KEY
    secret: str = SECRET

    @property
    def url(self) -> str:
        return f"{self.server.url}/integrations/label-studio"

    def explained(self, photo: bytes, query: str = "") -> Any:
        """What `/explain` says of a photograph, with its heatmap and regions."""
        answer = httpx.post(
            f"{self.server.url}/explain?include=heatmap&include=regions{query}",
            content=photo,
            headers={"content-type": "image/jpeg", "x-api-key": self.key},
            trust_env=False,
            timeout=60,
        )
        return answer.raise_for_status().json()["results"][0]["explanations"][0]


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStudio]:
    with label_studio(tmp_path_factory.mktemp("studio")) as found:
        yield found


@pytest.fixture(scope="session")
def backend(studio: LabelStudio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """The built-in model behind a key, told of Label Studio and its personal access token."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"labeling:{hashlib.sha256(KEY.encode()).hexdigest()}\n")
    with running(
        models=("builtin", "tiny:small"),
        workers=2,
        api_keys_file=keys,
        label_studio_url=studio.url,
        label_studio_token=studio.access_token(),
        overlay_secret=SECRET,
    ) as server:
        yield Backend(server)


@pytest.fixture(scope="session")
def photos() -> dict[str, bytes]:
    """Photographs of this repository by their names."""
    folder = Path(__file__).parent.parent.parent / "examples"
    return {"sunflower.jpg": (folder / "sunflower.jpg").read_bytes()}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Debian's browser."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("Chromium is not installed; on Debian: apt-get install chromium")
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()
