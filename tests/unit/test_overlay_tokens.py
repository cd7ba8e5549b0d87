"""Keys of overlays: signed, for some pictures, one origin and a time."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time

import pytest

from service.errors import ConfigurationError, InvalidOption, Unauthorized
from service.security.overlay_tokens import Grant, read, sign

SECRET = "a secret of sixteen"  # noqa: S105
GRANT = Grant(("/data/upload/1/", "https://photos.test/cats/"), "http://localhost:8080")


def test_a_signed_grant_is_read_again() -> None:
    full = Grant(("/data/upload/1/",), "http://localhost:8080", "m", "layercam", time.time() + 60)
    for grant in (GRANT, full):
        assert read(sign(grant, SECRET), SECRET) == grant


def test_a_token_can_stand_in_a_query_and_in_xml() -> None:
    assert not set(sign(GRANT, SECRET)) & set("&=+/\"'<> %")


def forged() -> dict[str, str]:
    token = sign(GRANT, SECRET)
    payload, signature = token.split(".")
    said = json.loads(base64.urlsafe_b64decode(payload + "=="))
    more = json.dumps(said | {"prefixes": ["/"]}).encode()
    return {
        "empty": "",
        "a dot": ".",
        "no signature": payload,
        "another secret": sign(GRANT, "another of sixteen"),
        "another payload": f"{base64.urlsafe_b64encode(more).decode().rstrip('=')}.{signature}",
        "cut": token[:-1],
        "not ASCII": f"{payload}.ä",
    }


@pytest.mark.parametrize("name", forged())
def test_a_forged_token_opens_nothing(name: str) -> None:
    with pytest.raises(Unauthorized):
        read(forged()[name], SECRET)


@pytest.mark.parametrize("secret", ["", " " * 40, "\n" * 20, "short", "   fifteen chars   "])
def test_a_secret_that_is_empty_blank_or_short_signs_and_opens_nothing(secret: str) -> None:
    payload = sign(GRANT, SECRET).partition(".")[0]
    signature = hmac.new(secret.encode(), payload.encode(), hashlib.sha256).digest()
    forged = f"{payload}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"
    with pytest.raises(ConfigurationError, match="at least 16"):
        read(forged, secret)
    with pytest.raises(ConfigurationError, match="at least 16"):
        sign(GRANT, secret)


def test_a_token_ends() -> None:
    old = Grant(GRANT.prefixes, GRANT.origin, expires=time.time() - 1)
    with pytest.raises(Unauthorized, match="expired"):
        read(sign(old, SECRET), SECRET)


@pytest.mark.parametrize(
    "source",
    [
        "/data/upload/1/ab-cat.jpg",
        "/data/upload/1/my%20cat.jpg",
        "/data/upload/1/a..b.jpg",
        "https://photos.test/cats/1.jpg?X-Signature=a&X-Expires=9",
    ],
)
def test_it_covers_what_is_below_its_prefixes(source: str) -> None:
    assert GRANT.covers(source)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "/data/upload/2/a.jpg",
        "/data/upload/1",
        "/data/upload/1/../2/a.jpg",
        "/data/upload/1/%2e%2e/2/a.jpg",
        "/data/upload/1/%252e%252e/2/a.jpg",
        "/data/upload/1/..\\2\\a.jpg",
        "/data/upload/1/./a.jpg",
        "/data/upload/1/a.jpg?d=1&d=2",
        "https://photos.test/dogs/1.jpg",
        "https://photos.test/cats/../dogs/1.jpg",
        "https://photos.test.evil.test/cats/1.jpg",
        "http://photos.test/cats/1.jpg",
    ],
)
def test_it_covers_nothing_else(source: str) -> None:
    assert not GRANT.covers(source)


def test_a_second_parameter_cannot_name_another_local_file() -> None:
    """Of two parameters of one name Label Studio takes the last."""
    grant = Grant(("/data/local-files/?d=cats/",), "http://localhost:8080")
    assert grant.covers("/data/local-files/?d=cats/1.jpg")
    assert not grant.covers("/data/local-files/?d=cats/1.jpg&d=secret/1.jpg")
    assert not grant.covers("/data/local-files/?d=cats/../secret/1.jpg")


@pytest.mark.parametrize(
    ("prefixes", "origin"),
    [
        ((), "http://localhost:8080"),
        (("data/upload/",), "http://localhost:8080"),
        (("https://photos.test",), "http://localhost:8080"),
        (("/data/../",), "http://localhost:8080"),
        (("/data/upload/",), "localhost:8080"),
        (("/data/upload/",), "http://localhost:8080/"),
        (("/data/upload/",), "*"),
    ],
)
def test_a_grant_of_nothing_or_to_nobody_is_refused(prefixes, origin: str) -> None:
    with pytest.raises(InvalidOption):
        Grant(prefixes, origin)
