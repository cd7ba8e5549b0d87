"""The real Label Studio: started from its own environment, and worked through its API."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
START_SECONDS = 900
"""Its first start makes its database, which takes more than a minute of a whole core."""

USER, PASSWORD = "ci@example.com", "label-studio"
LEGACY_TOKEN = "0123456789abcdef0123456789abcdef01234567"  # noqa: S105


def environment() -> Path:
    """The folder of its virtual environment; skips the test where there is none."""
    folder = Path(os.environ.get("CAMSERVE_TEST_LABEL_STUDIO", ROOT / ".venv-label-studio"))
    if not (folder / "bin" / "label-studio").exists():
        pytest.skip("Label Studio is not installed: `make labeling` does it")
    return folder


class LabelStudio:
    """A running one. `url` is where; `files` the folder it may serve files from."""

    def __init__(self, url: str, files: Path, python: Path) -> None:
        self.url = url
        self.files = files
        self.python = python
        self.api = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Token {LEGACY_TOKEN}"},
            timeout=120,
            trust_env=False,
        )

    def ask(self, method: str, path: str, **kwargs: Any) -> Any:
        """What its API answers; fails where that is an error."""
        answer = self.api.request(method, f"/api/{path}", **kwargs)
        assert answer.is_success, f"{path}: {answer.status_code} {answer.text[:500]}"
        return answer.json() if answer.content else None

    def access_token(self) -> str:
        """A new personal access token; a user has one at a time."""
        for old in self.ask("GET", "token/"):
            self.api.post("/api/token/blacklist/", json={"refresh": old["token"]})
        return str(self.ask("POST", "token/")["token"])

    def project(self, config: str, title: str = "flowers") -> int:
        return int(
            self.ask("POST", "projects", json={"title": title, "label_config": config})["id"]
        )

    def upload(self, project: int, photos: Mapping[str, bytes]) -> list[dict[str, Any]]:
        """Import files as tasks, and say what the tasks are."""
        for name, data in photos.items():
            files = {"file": (name, data, "image/jpeg")}
            self.ask("POST", f"projects/{project}/import", files=files)
        return self.tasks(project)

    def add(self, project: int, data: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Import tasks by their data."""
        self.ask("POST", f"projects/{project}/import", json=list(data))
        return self.tasks(project)

    def tasks(self, project: int) -> list[dict[str, Any]]:
        query = {"project": project, "page_size": 1000, "resolve_uri": "false"}
        found = self.ask("GET", "tasks", params=query)["tasks"]
        return sorted(found, key=lambda task: task["id"])

    def attach(
        self, project: int, url: str, key: str | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Attach a machine learning backend, and say what became of it."""
        body = {"url": url, "project": project, "title": "camserve", "is_interactive": True}
        if key is not None:
            body |= {
                "auth_method": "BASIC_AUTH",
                "basic_auth_user": "label-studio",
                "basic_auth_pass": key,
            }
        answer = self.api.post("/api/ml", json=body | fields)
        return dict(answer.json()) | {"status": answer.status_code}

    def retrieve(self, project: int, tasks: Sequence[int] | None = None) -> str:
        """Retrieve predictions of all tasks or some, as the data manager's button does."""
        query = {"id": "retrieve_tasks_predictions", "project": project}
        chosen: dict[str, Any] = {"all": True, "excluded": []}
        if tasks is not None:
            chosen = {"all": False, "included": list(tasks)}
        said = self.ask("POST", "dm/actions", params=query, json={"selectedItems": chosen})
        return str(said["detail"])

    def predictions(self, project: int) -> list[dict[str, Any]]:
        """What is stored, in the order of the tasks."""
        found = self.ask("GET", "predictions", params={"project": project})
        return sorted(found, key=lambda each: each["task"])

    def click(self, backend: int, task: int, result: Mapping[str, Any]) -> dict[str, Any]:
        """Ask as the page does where somebody clicks with a smart control."""
        body = {"task": task, "context": {"result": [dict(result)]}}
        return dict(self.ask("POST", f"ml/{backend}/interactive-annotating", json=body))

    def judge(self, config: str, predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What its own SDK says: `errors` of the interface, `alphas` that the converter decodes."""
        script = ROOT / "tests" / "labeling" / "judge.py"
        said = subprocess.run(
            [self.python, script],
            input=json.dumps({"config": config, "predictions": list(predictions)}),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert said.returncode == 0, said.stderr
        return list(json.loads(said.stdout))


@contextmanager
def label_studio(folder: Path) -> Iterator[LabelStudio]:
    """Label Studio with a new database in `folder`, ready to answer, and nobody else asked.

    The database of its first start is kept in its environment, and the next ones begin with that.
    """
    own = environment()
    made = own / "first-start.sqlite3"
    data, files = folder / "data", folder / "files"
    data.mkdir()
    files.mkdir()
    if made.exists():
        shutil.copy(made, data / "label_studio.sqlite3")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [own / "bin" / "label-studio", "start", "--no-browser"]
    command += ["--internal-host", "127.0.0.1", "--port", str(port)]
    log = folder / "log"
    with (
        log.open("w") as said,
        subprocess.Popen(
            command, cwd=folder, env=_variables(url, data, files), stdout=said, stderr=said
        ) as process,
    ):
        try:
            found = LabelStudio(url, files, own / "bin" / "python")
            _await_start(process, found.api, log)
            if not made.exists():
                shutil.copy(data / "label_studio.sqlite3", made)
            yield found
            found.api.close()
        finally:
            process.terminate()
            process.wait(30)


def _variables(url: str, data: Path, files: Path) -> dict[str, str]:
    return os.environ | {
        "LABEL_STUDIO_BASE_DATA_DIR": str(data),
        "LABEL_STUDIO_HOST": url,
        "LABEL_STUDIO_USERNAME": USER,
        "LABEL_STUDIO_PASSWORD": PASSWORD,
        "LABEL_STUDIO_USER_TOKEN": LEGACY_TOKEN,
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(files),
        "ML_BLOCK_LOCAL_IP": "false",
        "SSRF_PROTECTION_ENABLED": "false",
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
        "FEATURE_FLAGS_OFFLINE": "true",
    }


def _await_start(process: subprocess.Popen[bytes], api: httpx.Client, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            pytest.fail(f"Label Studio ended before it answered: {log.read_text()[-2000:]}")
        try:
            if api.get("/api/projects").is_success:
                return
        except httpx.TransportError:
            pass
        threading.Event().wait(0.2)
    pytest.fail(
        f"Label Studio did not answer in {START_SECONDS} seconds: {log.read_text()[-2000:]}"
    )
