"""Of all hashed requirements keep those that pip resolved, so that pip installs these alone.

    pip install --dry-run --report resolved.json …
    python pick.py resolved.json packages.txt "$UNHASHED"

Writes hashed.txt, and unhashed.txt with those that the third argument names, separated by commas:
builds of another index, whose hashes packages.txt does not have.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

_ENTRY = re.compile(
    r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>\S+)(?P<hashes>(?: \\\n +--hash=\S+)+)", re.MULTILINE
)


def normalised(name: str) -> str:
    """A distribution's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def entries(text: str) -> dict[str, str]:
    """Each requirement with its hashes, by its normalised name."""
    return {normalised(found["name"]): found[0] for found in _ENTRY.finditer(text)}


def pick(
    resolved: Mapping[str, str], hashed: Mapping[str, str], unhashed: Iterable[str]
) -> tuple[list[str], list[str]]:
    """The requirements to install with hashes, and those without.

    resolved: versions by name. Raises SystemExit where one has no hashes and none need be.
    """
    without = {normalised(name) for name in unhashed}
    missing = [
        f"{name}=={version}"
        for name, version in resolved.items()
        if name not in without and not hashed.get(name, "").startswith(f"{name}=={version} ")
    ]
    if missing:
        raise SystemExit(
            f"packages.txt has no hashes of {', '.join(missing)}: run `make lock`, or name what "
            "comes from another index in the build argument UNHASHED."
        )
    return (
        [hashed[name] for name in resolved if name not in without],
        [f"{name}=={version}" for name, version in resolved.items() if name in without],
    )


def main(report: str, packages: str, unhashed: str) -> None:
    """Read both files, and write two beside them."""
    installs = json.loads(Path(report).read_text())["install"]
    resolved = {
        normalised(each["metadata"]["name"]): each["metadata"]["version"] for each in installs
    }
    names = filter(None, re.split(r"[,\s]+", unhashed))
    chosen = pick(resolved, entries(Path(packages).read_text()), names)
    for name, lines in zip(("hashed.txt", "unhashed.txt"), chosen, strict=True):
        Path(name).write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
