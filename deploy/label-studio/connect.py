"""Make a project in Label Studio that asks camserve, and print its address.

    docker compose exec -T camserve python - < deploy/label-studio/connect.py

It runs inside camserve's container, where the service's packages, address and token are. The
labels are those of its first model. CAMSERVE_KEY is the API key that Label Studio sends, where
camserve asks for one; CONNECT_CAMSERVE is where Label Studio finds camserve.
"""

from __future__ import annotations

import os
from html import escape

import httpx

CAMSERVE = os.environ.get("CONNECT_CAMSERVE", "http://camserve:8000")
LABEL_STUDIO = os.environ["CAMSERVE_LABEL_STUDIO_URL"]
TOKEN = os.environ.get("CAMSERVE_LABEL_STUDIO_TOKEN", "")
KEY = os.environ.get("CAMSERVE_KEY", "")


def label_config(labels: list[str]) -> str:
    """A choice of class for each picture, with the evidence for it painted and boxed."""
    choices = "".join(f'<Choice value="{escape(label)}"/>' for label in labels)
    return (
        '<View><Image name="image" value="$image"/>'
        f'<Choices name="class" toName="image">{choices}</Choices>'
        '<BrushLabels name="map" toName="image"><Label value="evidence"/></BrushLabels>'
        '<RectangleLabels name="box" toName="image"><Label value="evidence"/></RectangleLabels>'
        "</View>"
    )


def first_model() -> dict[str, object]:
    """What camserve says of its first model."""
    headers = {"X-API-Key": KEY} if KEY else {}
    with httpx.Client(base_url=CAMSERVE, headers=headers, timeout=30) as camserve:
        name = camserve.get("/models").raise_for_status().json()["models"][0]["name"]
        return dict(camserve.get(f"/models/{name}").raise_for_status().json())


def main() -> None:
    """Project, then backend; Label Studio tries the backend before it takes it."""
    if not TOKEN:
        raise SystemExit("Set CAMSERVE_LABEL_STUDIO_TOKEN before `docker compose up`, for both.")
    model = first_model()
    labels = model["labels"]
    if not isinstance(labels, list):
        raise SystemExit(f"The model {model['name']} has no labels to choose from.")
    authorised = {"Authorization": f"Token {TOKEN}"}
    with httpx.Client(base_url=LABEL_STUDIO, headers=authorised, timeout=60) as studio:
        project = {"title": f"{model['name']}, with evidence", "label_config": label_config(labels)}
        made = studio.post("/api/projects", json=project).raise_for_status().json()
        backend = {
            "project": made["id"],
            "title": "camserve",
            "url": f"{CAMSERVE}/integrations/label-studio",
            "is_interactive": True,
            "auth_method": "BASIC_AUTH",
            "basic_auth_user": "label-studio",
            "basic_auth_pass": KEY or "none",
        }
        answer = studio.post("/api/ml", json=backend)
        if answer.is_error:
            raise SystemExit(f"Label Studio does not take the backend: {answer.text}")
        where = os.environ.get("LABEL_STUDIO_HOST", "http://127.0.0.1:8080")
        print(f"{where}/projects/{made['id']}")


if __name__ == "__main__":
    main()
