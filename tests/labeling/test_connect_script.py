"""deploy/label-studio/connect.py, which joins the two containers of docker-compose.yml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from label_studio import LEGACY_TOKEN, LabelStudio

pytestmark = [pytest.mark.labeling, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).parent.parent.parent / "deploy" / "label-studio" / "connect.py"


def test_the_script_makes_a_project_whose_photos_camserve_labels(
    studio: LabelStudio, backend, photos
) -> None:
    environment = os.environ | {
        "CAMSERVE_KEY": backend.key,
        "CAMSERVE_LABEL_STUDIO_TOKEN": LEGACY_TOKEN,
        "CAMSERVE_LABEL_STUDIO_URL": studio.url,
        "CONNECT_CAMSERVE": backend.server.url,
        "LABEL_STUDIO_HOST": studio.url,
        "NO_PROXY": "*",
    }
    # As compose hands it to the container's interpreter: through standard input.
    with SCRIPT.open() as script:
        done = subprocess.run(
            [sys.executable, "-"],
            stdin=script,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    project = int(done.stdout.strip().rpartition("/")[2])
    studio.upload(project, photos)
    studio.retrieve(project)
    (stored,) = studio.predictions(project)
    kinds = {each["type"]: each for each in stored["result"]}
    assert kinds["choices"]["value"]["choices"] == ["sunflower"]
    assert {"brushlabels", "rectanglelabels"} <= set(kinds)
