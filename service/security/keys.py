"""API keys: named, stored as hashes, compared in constant time.

    # /etc/camserve/keys: NAME:SHA256, optionally with limits of this key
    labeling:693ca4183f2a0739a7cb7745832ff52319add39c4cb325a0a063d8243c2f3f48
    nightly:59947020af0d71ecf512d5637c313ee70f932951f7849e628876b5f5358e415d rate=60 cost=5000

`printf %s "$KEY" | sha256sum` computes the hash. If KEY is empty, every request without a key would
match it: the hash of an empty key is refused.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import itertools
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from service.errors import ConfigurationError

_log = structlog.get_logger(__name__)

_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,100}):(?P<hash>[0-9a-f]{64})(?P<limits>(?:\s+\S+)*)")
_LIMIT = re.compile(r"(rate|concurrency|cost)=(\d{1,9})")

CHECK_SECONDS = 1.0
"""Interval at which the file is checked for changes."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key without the key itself.

    rate:        requests per minute. concurrency: concurrent requests. cost: their forward passes.
                 None: the limit of the service; 0: no limit.
    """

    name: str
    sha256: str
    rate: int | None = None
    concurrency: int | None = None
    cost: int | None = None


class KeyFile:
    """The keys of a file, reloaded when the file changes.

    If the file becomes unreadable or invalid, the keys do not change, an error is logged, and
    `is_current` is false until it can be read again.

    Raises ConfigurationError if it is invalid at the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        self._keys = read_keys(path)
        self._looked = time.monotonic()
        self.is_current = True

    def owner(self, key: str) -> Key | None:
        """The entry of a key, or None, in constant time.

        A key without a visible character is never valid.

        key: as in a header, its bytes decoded as Latin-1.
        """
        if time.monotonic() - self._looked >= CHECK_SECONDS:
            self._looked = time.monotonic()
            if _stamp(self._path) != self._stamp:
                self.reread()
        sha256 = hashlib.sha256(key.encode("latin-1", errors="replace")).hexdigest()
        matches = [k for k in self._keys.values() if hmac.compare_digest(sha256, k.sha256)]
        return matches[0] if matches and not is_blank(key) else None

    def reread(self) -> None:
        """Reload the file."""
        self._stamp = _stamp(self._path)
        try:
            self._keys = read_keys(self._path)
        except ConfigurationError as error:
            self.is_current = False
            _log.error("keys_not_reread", detail=error.detail)
        else:
            self.is_current = True
            _log.info("keys_reread", path=str(self._path), keys=len(self._keys))


def read_keys(path: Path) -> Mapping[str, Key]:
    """The keys of a file by their names; `#` starts a comment.

    Raises ConfigurationError with file and line for an invalid line, the hash of an empty key, or
    one key under two names, which would remain valid when one of them is removed. A file without a
    key is invalid, too, because a file looks like this while it is written.
    """
    keys: dict[str, Key] = {}
    names: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the keys file {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        key = _read_key(text)
        if key is None or key.name in keys:
            raise ConfigurationError(
                f"{path}, line {number}: a key is written as name:sha256, with a unique name "
                'and 64 digits of 0–9 and a–f (printf %s "$KEY" | sha256sum), optionally '
                "followed by rate=N, concurrency=N and cost=N."
            )
        if key.sha256 in _blank_hashes():
            raise ConfigurationError(
                f"{path}, line {number}: this is the hash of an empty key, which every request "
                f"without a key would match. The variable with the key of {key.name!r} was empty "
                "when it was hashed; make a key with `openssl rand -hex 32` and hash that."
            )
        if key.sha256 in names:
            raise ConfigurationError(
                f"{path}, line {number}: {key.name!r} has the same key as {names[key.sha256]!r}; "
                "make one key per name, so that each can be limited and removed alone."
            )
        keys[key.name], names[key.sha256] = key, key.name
    if not keys:
        raise ConfigurationError(f"the keys file {path} contains no key.")
    return keys


def _read_key(text: str) -> Key | None:
    match = _LINE.fullmatch(text)
    if match is None:
        return None
    limits = [_LIMIT.fullmatch(word) for word in match["limits"].split()]
    if not all(limits):
        return None
    values = {limit[1]: int(limit[2]) for limit in limits if limit is not None}
    return Key(match["name"], match["hash"], **values)


def is_blank(key: str) -> bool:
    """Whether a key has no visible character: it is empty, spaces, or control characters.

    key: its bytes decoded as Latin-1; decoded as UTF-8 if they are valid UTF-8.
    """
    try:
        text = key.encode("latin-1").decode()
    except UnicodeError:
        text = key
    return not any(character.isprintable() and not character.isspace() for character in text)


@functools.cache
def _blank_hashes() -> frozenset[str]:
    """SHA-256 of short blank strings, such as the output of a shell for an empty variable."""
    few = (" ", "\t", "\n", "\r", "\v", "\f", "\0", "\N{NO-BREAK SPACE}")
    texts = {
        "".join(characters)
        for size in range(4)
        for characters in itertools.product(few, repeat=size)
    }
    # As UTF-8, as Latin-1, and in the encodings of Windows shells.
    encodings = ("utf-8", "latin-1", "utf-16", "utf-16-le")
    return frozenset(
        hashlib.sha256(text.encode(encoding)).hexdigest()
        for text in texts
        for encoding in encodings
    )


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Values that change with a file; None if it is not accessible."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
