"""Which `Host` headers are accepted, by where the service listens and what is listed."""

from __future__ import annotations

import socket

import pytest

from service.errors import ConfigurationError
from service.routes.hosts import HostRule, host_rule

LOOPBACK = ["127.0.0.1", "127.0.0.5", "::1", "localhost", "LocalHost"]
BEYOND = ["0.0.0.0", "::", "", "192.168.1.5", "camserve.example.org"]  # noqa: S104 - only read

NEAR = [
    "localhost",
    "LOCALHOST",
    "localhost:",
    "localhost:8000",
    "localhost.",
    "localhost.:80",
    "127.0.0.1",
    "127.0.0.1:8000",
    "127.8.9.10:1",
    "[::1]",
    "[::1]:8000",
    "[0:0:0:0:0:0:0:1]:8000",
]
PUBLIC = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "127.0.0.1.nip.io",
    "evil-localhost.com",
    "notlocalhost.org",
    "internal.evil.example",
    "xlocal.co",
]
MALFORMED = [
    "",
    " ",
    ":8000",
    "localhost:80000000",
    "localhost:80:80",
    "localhost:8000, evil.example",
    "localhost@evil.example",
    "evil.example@localhost",
    "localhost/evil.example",
    "localhost#evil.example",
    "localhost\\evil.example",
    "[::1",
    "::1]",
    "[::1]x",
    "[::1]:80:80",
    "[localhost]",
    "[127.0.0.1]",
    "[]",
    "local host",
    "localhost\0",
    "localhost\t.evil.example",
    "löcalhost",
    "..",
    ".",
    "a..b",
    "*",
    "*.localhost",
    "x" * 100_000,
    "a." * 50_000,
    "[" * 1000 + "::1" + "]" * 1000,
]
ADDRESSES = ["10.1.2.3", "192.168.1.5:8000", "8.8.8.8", "[fd00::1]:8000", "[2001:db8::1]"]
INSIDE = [
    "camserve",
    "camserve:8000",
    "camserve.vision.svc",
    "camserve.vision.svc.cluster.local:80",
    "gpu.internal:8000",
    "host.docker.internal:8000",
    "printer.local",
    "x.localhost:3000",
]


def rule(listens_on: str, *listed: str, keys: bool = False) -> HostRule:
    found = host_rule(listens_on, listed, keys=keys)
    assert found is not None
    return found


@pytest.mark.parametrize("listens_on", LOOPBACK)
def test_on_loopback_without_keys_only_loopback_names_are_accepted(listens_on: str) -> None:
    found = rule(listens_on)
    assert [each for each in NEAR if not found.accepts(each)] == []
    strange = [*PUBLIC, *ADDRESSES, *INSIDE, "0.0.0.0:8000", "testserver"]
    assert [each for each in strange if found.accepts(each)] == []


@pytest.mark.parametrize("listens_on", BEYOND)
def test_beyond_loopback_without_keys_addresses_and_private_names_are_accepted(
    listens_on: str,
) -> None:
    """Compose asks by the service's name, Kubernetes' probes by the pod's address."""
    found = rule(listens_on)
    accepted = [*NEAR, *ADDRESSES, *INSIDE, socket.gethostname()]
    assert [each for each in accepted if not found.accepts(each)] == []
    assert [each for each in PUBLIC if found.accepts(each)] == []


def test_the_name_that_the_service_listens_on_is_accepted() -> None:
    assert rule("camserve.example.org").accepts("CamServe.example.org:8000")
    assert not rule("camserve.example.org").accepts("www.camserve.example.org")


def test_with_keys_every_host_is_accepted_unless_some_are_listed() -> None:
    assert host_rule("127.0.0.1", (), keys=True) is None
    assert host_rule("::", (), keys=True) is None
    assert not rule("127.0.0.1", "one.example", keys=True).accepts("two.example")


@pytest.mark.parametrize("listens_on", ["127.0.0.1", "0.0.0.0"])  # noqa: S104 - only read
def test_listed_names_are_accepted_and_no_others(listens_on: str) -> None:
    found = rule(listens_on, "Vision.Example.org", " *.cam.example", "10.0.0.9", "[fd00::9]")
    listed = ["vision.example.org:443", "a.cam.example", "a.b.cam.example", "10.0.0.9", "[fd00::9]"]
    assert [each for each in [*NEAR, *listed] if not found.accepts(each)] == []
    others = ["cam.example", "evilcam.example", "x.vision.example.org", "camserve", *PUBLIC]
    assert [each for each in others if found.accepts(each)] == []
    assert found.accepts("10.0.0.8") == (listens_on == "0.0.0.0")  # noqa: S104 - only compared


@pytest.mark.parametrize("keys", [True, False])
def test_a_star_accepts_every_host(*, keys: bool) -> None:
    assert host_rule("127.0.0.1", ("one.example", "*"), keys=keys) is None


@pytest.mark.parametrize("listens_on", ["127.0.0.1", "0.0.0.0"])  # noqa: S104 - only read
@pytest.mark.parametrize("value", MALFORMED, ids=lambda value: repr(value[:30]))
def test_a_malformed_host_is_refused(listens_on: str, value: str) -> None:
    assert not rule(listens_on, "*.example.org").accepts(value)
    assert not rule(listens_on).accepts(value)


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "http://vision.example.org",
        "vision.example.org/",
        "vision.example.org:443",
        "10.0.0.9:80",
        "[fd00::9]:80",
        "*.10.0.0.9",
        "*example.org",
        "a.*.org",
        "**",
        "a b",
        "x" * 1000,
    ],
)
def test_an_entry_of_another_form_stops_the_start_and_is_named(entry: str) -> None:
    with pytest.raises(ConfigurationError, match=r"--allowed-hosts: .* is not a host name"):
        host_rule("127.0.0.1", (entry,), keys=False)
