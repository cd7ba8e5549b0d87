"""The image, built and run: deploy/smoke.sh does it, here and by hand."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NO_ENGINE = 77


@pytest.mark.container
@pytest.mark.timeout(2400)
def test_the_image_is_built_runs_contained_answers_and_stops_well(
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = subprocess.run(
        [ROOT / "deploy" / "smoke.sh"], capture_output=True, text=True, check=False
    )
    with capsys.disabled():  # how long each step took
        print(f"\n{done.stdout}", end="")  # noqa: T201
    if done.returncode == NO_ENGINE:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all of it holds\n")
