"""A folder of Kustomize as the objects that it stands for, as far as ours use Kustomize.

That is: resources, components, patches by strategic merge, images and the namespace. What else a
kustomization says is refused here, so that nothing is left out silently.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

_READ = {"apiVersion", "kind", "namespace", "resources", "components", "patches", "images"}
_CLUSTER_WIDE = ("Namespace",)


def kustomized(folder: Path) -> list[Manifest]:
    """The objects of `kubectl kustomize folder`. Raises AssertionError where it would refuse."""
    found: list[Manifest] = []
    _add(folder, found)
    return found


def _add(folder: Path, found: list[Manifest]) -> None:
    said = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(said) <= _READ, f"{folder}: {set(said) - _READ} is not understood here"
    for name in said.get("resources", []):
        place = (folder / name).resolve()
        if place.is_dir():
            _add(place, found)
        else:
            found.extend(each for each in yaml.safe_load_all(place.read_text()) if each)
    for name in said.get("components", []):
        _add((folder / name).resolve(), found)
    for patch in said.get("patches", []):
        assert set(patch) == {"path"}
        change = yaml.safe_load((folder / patch["path"]).read_text())
        of = [each for each in found if _identity(each) == _identity(change)]
        assert len(of) == 1, f"{patch['path']} is of {len(of)} objects"
        merge(of[0], change)
    for image in said.get("images", []):
        used = [c for c in containers(found) if c["image"].partition(":")[0] == image["name"]]
        assert used, f"no container runs {image['name']}"
        for container in used:
            container["image"] = f"{image['newName']}:{image['newTag']}"
    if "namespace" in said:
        for each in found:
            if each["kind"] not in _CLUSTER_WIDE:
                each["metadata"]["namespace"] = said["namespace"]
    identities = [_identity(each) for each in found]
    assert len(set(identities)) == len(identities), "two objects of one name"


def _identity(manifest: Manifest) -> tuple[str, str, str]:
    return manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"]


def containers(manifests: list[Manifest]) -> list[Manifest]:
    """Every container of their pods."""
    pods = [each["spec"]["template"]["spec"] for each in manifests if each["kind"] == "Deployment"]
    return [container for pod in pods for container in pod["containers"]]


def merge(into: Manifest, change: Manifest) -> None:
    """Change an object by strategic merge: lists of what has names by those, other lists whole."""
    for key, value in change.items():
        old = into.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            merge(old, value)
        elif key in ("containers", "env") and isinstance(old, list):
            _merge_named(old, value)
        else:
            into[key] = value


def _merge_named(into: list[Manifest], changes: list[Manifest]) -> None:
    names = {each["name"]: each for each in into}
    for change in reversed(changes):  # what is new goes before, in its own order
        if change["name"] in names:
            merge(names[change["name"]], change)
        else:
            into.insert(0, change)
