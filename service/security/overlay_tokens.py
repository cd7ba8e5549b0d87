"""Signed tokens that allow the pages of one origin to read overlays of certain images.

    token = sign(Grant(("/data/upload/1/",), "http://localhost:8080"), secret)
    grant = read(token, secret)             # or Unauthorized
    grant.covers("/data/upload/1/ab12-cat.jpg")

A labeling page requests overlays without credentials and without encoding the address of the image,
so the token is in the project's configuration, where every annotator can read it. It therefore
allows only images whose addresses have certain prefixes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import time
from dataclasses import asdict, dataclass
from urllib.parse import unquote

from service.errors import ConfigurationError, InvalidOption, Unauthorized

MIN_SECRET = 16
"""Minimum characters of a secret, without surrounding spaces."""

_ORIGIN = re.compile(r"https?://[^/?#\s]+")
_PREFIX = re.compile(r"(?:/|https?://[^/?#\s]+/)\S*")
_BETWEEN = re.compile(r"[/=?&]")


@dataclass(frozen=True, slots=True)
class Grant:
    """The permissions of a token.

    prefixes: of image addresses, paths of Label Studio or URLs.
    origin:   of the pages that may read the overlay, such as http://localhost:8080.
    model, method: of the explanation; None: the defaults of the service.
    expires:  seconds since 1970; None: no expiry.

    Raises InvalidOption.
    """

    prefixes: tuple[str, ...]
    origin: str
    model: str | None = None
    method: str | None = None
    expires: float | None = None

    def __post_init__(self) -> None:
        if not _ORIGIN.fullmatch(self.origin):
            raise InvalidOption(
                f"{self.origin!r} is not an origin; write scheme, host and port, such as "
                "http://localhost:8080."
            )
        strays = [
            prefix for prefix in self.prefixes if not _PREFIX.fullmatch(prefix) or _strays(prefix)
        ]
        if strays or not self.prefixes:
            raise InvalidOption(
                f"{', '.join(map(repr, strays)) or 'Nothing'} is not a prefix of image "
                "addresses; write a path of Label Studio, such as /data/upload/1/, or a URL with a "
                "host and a slash."
            )

    def covers(self, source: str) -> bool:
        """Whether an image address has one of the prefixes, without leaving it."""
        below = [prefix for prefix in self.prefixes if source.startswith(prefix)]
        # A second parameter could name another file than the one that was checked.
        ampersands = max((prefix.count("&") for prefix in below), default=0)
        local = source.startswith("/")
        return (
            bool(below) and not _strays(source) and not (local and source.count("&") > ampersands)
        )


def check_secret(secret: str) -> None:
    """Refuse a secret that can be guessed. Raises ConfigurationError."""
    visible = len(secret.strip())
    if visible < MIN_SECRET:
        raise ConfigurationError(
            f"--overlay-secret has {visible} characters; use at least {MIN_SECRET}, for instance "
            "the output of `openssl rand -hex 32`."
        )


def sign(grant: Grant, secret: str) -> str:
    """A grant as a token: base64 of JSON, a dot, and its HMAC-SHA256.

    Raises ConfigurationError for a secret that `check_secret` refuses.
    """
    check_secret(secret)
    fields = {name: value for name, value in asdict(grant).items() if value is not None}
    payload = _base64(json.dumps(fields, separators=(",", ":")).encode())
    return f"{payload}.{_base64(_mac(payload, secret))}"


def read(token: str, secret: str) -> Grant:
    """The grant of a token.

    Raises Unauthorized if the signature is invalid or the token has expired; ConfigurationError for
    a secret that `check_secret` refuses.
    """
    check_secret(secret)
    payload, _, signature = token.partition(".")
    expected = _base64(_mac(payload, secret))
    if not hmac.compare_digest(signature.encode(), expected.encode()):
        raise Unauthorized(
            "The overlay key is not signed with the secret of this service; create one with "
            "overlay-token."
        )
    try:
        fields = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        grant = Grant(**{**fields, "prefixes": tuple(fields["prefixes"])})
    except (binascii.Error, ValueError, TypeError, KeyError) as error:
        raise Unauthorized("The overlay key is of another version; create a new one.") from error
    if grant.expires is not None and time.time() > grant.expires:
        raise Unauthorized("The overlay key has expired; create a new one with overlay-token.")
    return grant


def _strays(address: str) -> bool:
    """Whether an address contains a backslash, or `.` or `..` as a part."""
    plain = unquote(unquote(address))
    return "\\" in plain or bool({".", ".."} & set(_BETWEEN.split(plain)))


def _mac(payload: str, secret: str) -> bytes:
    return hmac.new(secret.encode(), payload.encode(), hashlib.sha256).digest()


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")
