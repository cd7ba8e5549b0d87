"""docker-compose.yml as Compose itself reads it, with every profile."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
from deployment import ROOT, compose

pytestmark = [pytest.mark.container, pytest.mark.timeout(60)]

OURS = ROOT / "docker-compose.yml"
PROFILES = sorted(
    {name for each in compose()["services"].values() for name in each.get("profiles", [])}
)


def read(*arguments: str) -> dict:
    docker = shutil.which("docker")
    if docker is None:
        pytest.skip("docker is not installed")
    command = [docker, "compose", "-f", OURS, *arguments, "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if "is not a docker command" in done.stderr or "unknown shorthand flag" in done.stderr:
        pytest.skip("this docker has no compose")
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "a variable without a default"
    return json.loads(done.stdout)


def test_without_a_profile_there_is_the_service_alone() -> None:
    assert set(read()["services"]) == {"camserve"}


@pytest.mark.parametrize("profile", PROFILES)
def test_each_profile_adds_to_it(profile: str) -> None:
    assert {"camserve"} < set(read("--profile", profile)["services"])


def test_with_keys_it_listens_elsewhere_and_reads_them_from_files() -> None:
    service = read("-f", str(ROOT / "deploy" / "compose" / "keys.yml"))["services"]["camserve"]
    (port,) = service["ports"]
    assert port["host_ip"] == "0.0.0.0"  # noqa: S104 - what the file is for
    mounted = {each["target"] for each in service["secrets"]}
    assert mounted == {
        service["environment"][f"CAMSERVE_{kind}_KEYS_FILE"] for kind in ("API", "ADMIN")
    }
