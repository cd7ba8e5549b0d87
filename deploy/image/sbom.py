"""Write what the image is made of as CycloneDX: Python's distributions, Debian's packages, CPython.

    python sbom.py /opt/camserve/bin/python 0.1.0 camserve.cdx.json

Runs in a stage of the Dockerfile, with `cyclonedx-bom` for the first part. What does not hold to
the schema ends the build.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

_FIELDS = ("Package", "Version", "Architecture", "source:Package", "source:Version")


def python_packages(interpreter: str) -> dict[str, Any]:
    """The document of an environment's distributions."""
    command = [sys.executable, "-m", "cyclonedx_py", "environment", interpreter]
    command += ["--output-reproducible", "--spec-version", SchemaVersion.V1_6.to_version()]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    return dict(json.loads(done.stdout))


def debian_packages() -> list[dict[str, Any]]:
    """A component for each installed package, with the source package that it was built from."""
    form = "\t".join(f"${{{field}}}" for field in _FIELDS)
    command = ["dpkg-query", "--show", "--showformat", f"${{db:Status-Abbrev}}\t{form}\n"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
    release = platform.freedesktop_os_release()
    components = []
    for line in listed.splitlines():
        status, name, version, architecture, source, built_from = line.split("\t")
        if not status.startswith("ii"):
            continue
        purl = PackageURL(
            "deb",
            release["ID"],
            name,
            version,
            {"arch": architecture, "distro": f"{release['ID']}-{release['VERSION_ID']}"},
        ).to_string()
        components.append(
            {
                "type": "library",
                "bom-ref": purl,
                "name": name,
                "version": version,
                "purl": purl,
                "properties": [{"name": "debian:source", "value": f"{source} {built_from}"}],
            }
        )
    return components


def interpreter_itself() -> dict[str, Any]:
    """CPython, which the base image builds from source, so that no package manager knows it."""
    version = platform.python_version()
    purl = PackageURL("generic", None, "cpython", version).to_string()
    return {
        "type": "platform",
        "bom-ref": purl,
        "name": "cpython",
        "version": version,
        "purl": purl,
        "cpe": f"cpe:2.3:a:python:python:{version}:*:*:*:*:*:*:*",
    }


def main(interpreter: str, version: str, out: str) -> None:
    """Put the parts together, hold them against the schema, and write them."""
    document = python_packages(interpreter)
    document["metadata"]["component"] = {
        "type": "application",
        "bom-ref": "camserve",
        "name": "camserve",
        "version": version,
        "licenses": [{"license": {"id": "Apache-2.0"}}],
    }
    document.setdefault("components", []).extend([*debian_packages(), interpreter_itself()])
    text = json.dumps(document, indent=1, ensure_ascii=False)
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if wrong is not None:
        raise SystemExit(f"the SBOM does not hold to its schema: {wrong}")
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"{out}: {len(document['components'])} components")


if __name__ == "__main__":
    main(*sys.argv[1:])
