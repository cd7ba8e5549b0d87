"""Our manifests against the schemas that Kubernetes and KServe publish."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from deployment import DEPLOY, KUSTOMIZATIONS, ROOT
from kustomizing import kustomized

pytestmark = [pytest.mark.container, pytest.mark.timeout(120)]

VERSIONS = ("1.30", "1.37")
"""Of Kubernetes: the oldest that our manifests are for, and a new one."""

WITHOUT_SCHEMA = ("ServiceMonitor",)
"""Kinds of other programs' making, whose schemas Kubernetes does not publish."""

WALK = '''
import sys
import kserve.models
import yaml

def walk(value, kind, where):
    """Whether a value has the shape of a model class; what is wrong is said and ends this."""
    if kind.startswith("list["):
        assert isinstance(value, list), where
        for number, each in enumerate(value):
            walk(each, kind[5:-1], f"{where}[{number}]")
    elif kind.startswith("dict("):
        assert isinstance(value, dict), where
    elif model := getattr(kserve.models, kind, None) or getattr(kubernetes.client, kind, None):
        names = {json: name for name, json in model.attribute_map.items()}
        for key, each in value.items():
            assert key in names, f"{where}: {kind} has no {key}"
            walk(each, model.openapi_types[names[key]], f"{where}.{key}")
    else:
        wanted = {"str": str, "int": int, "bool": bool, "float": (int, float)}.get(kind, object)
        assert isinstance(value, wanted), f"{where}: {value!r} is no {kind}"

import kubernetes.client
walk(yaml.safe_load(sys.stdin), "V1beta1InferenceService", "InferenceService")
'''


def interpreter(folder: str, made_by: str) -> Path:
    found = Path(os.environ.get(f"CAMSERVE_TEST_{folder.upper()}", ROOT / f".venv-{folder}"))
    if not (found / "bin" / "python").exists():
        pytest.skip(f".venv-{folder} is not there: `make {made_by}` makes it")
    return found / "bin" / "python"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda folder: folder.name)
def test_manifests_are_what_kubernetes_takes(tmp_path: Path, folder: Path, version: str) -> None:
    python = interpreter("deploy", "container")
    files = []
    for number, manifest in enumerate(kustomized(folder)):
        if manifest["kind"] not in WITHOUT_SCHEMA:
            files.append(tmp_path / f"{number}-{manifest['kind']}.yaml")
            files[-1].write_text(yaml.safe_dump(manifest))
    command = [python.parent / "kubernetes-validate", "--strict", "-k", version, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count(" passed for resource ") == len(files), said


def test_the_inference_service_is_what_kserve_takes() -> None:
    python = interpreter("protocols", "protocols")
    described = yaml.safe_load((DEPLOY / "kserve" / "inferenceservice.yaml").read_text())
    command = [python, "-c", WALK]

    def errors(manifest: object) -> str:
        said = subprocess.run(
            command, input=yaml.safe_dump(manifest), capture_output=True, text=True, check=False
        )
        return said.stderr if said.returncode else ""

    assert errors(described) == ""
    described["spec"]["explainer"]["containers"][0]["livenessProb"] = {}
    assert "V1Container has no livenessProb" in errors(described)
