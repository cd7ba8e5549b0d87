"""Keys of people and programs: named, kept as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path

from service.errors import ConfigurationError

_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,100}):(?P<hash>[0-9a-f]{64})")


def read_keys(path: Path) -> Mapping[str, str]:
    """The sha256 of each key by its owner's name: lines `name:sha256`, `#` begins a comment.

    `printf %s "$KEY" | sha256sum` makes the hash. Raises ConfigurationError that names file and
    line.
    """
    keys: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the keys file {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        found = _LINE.fullmatch(text)
        if text and found is None:
            raise ConfigurationError(
                f"{path}, line {number}: a key is written as name:sha256, with 64 digits of 0–9 "
                'and a–f; printf %s "$KEY" | sha256sum makes them.'
            )
        if found is not None:
            keys[found["name"]] = found["hash"]
    return keys


def owner(key: str, keys: Mapping[str, str]) -> str | None:
    """Whose key this is, or None; takes as long for a wrong key as for a right one."""
    given = hashlib.sha256(key.encode()).hexdigest()
    matches = [name for name, known in keys.items() if hmac.compare_digest(given, known)]
    return matches[0] if matches else None
