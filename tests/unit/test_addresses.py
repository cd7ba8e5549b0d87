"""Which hosts and addresses images may come from."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ConfigurationError, ImageUrlRefused
from service.integrations.label_studio.host import LabelStudioHost
from service.security.addresses import is_allowed, parse_hosts, parse_image_url

PUBLIC = ["93.184.215.14", "1.1.1.1", "172.32.0.1", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"]
PRIVATE = ["10.0.0.5", "172.16.0.1", "172.31.255.255", "192.168.1.1", "127.0.0.1", "127.9.9.9"]
PRIVATE += ["::1", "fc00::1", "fd12:3456::1"]
NEVER = [
    "0.0.0.0",  # noqa: S104 - not to listen on
    "0.1.2.3",
    "100.64.0.1",
    "100.100.100.200",
    "168.63.129.16",
    "169.254.169.254",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::808:808",
    "64:ff9b:1::a00:1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:808:808::1",
    "3fff::1",
    "5f00::1",
    "fe80::1",
    "fe80::1%eth0",
    "2606:2800::1%eth0",
    "fec0::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "ff02::1",
    "",
    "localhost",
    "127.1",
    "0x7f.0.0.1",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_allowed(address, private=False)
    assert is_allowed(address, private=True)


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_allowed_for_private_hosts_alone(address: str) -> None:
    assert not is_allowed(address, private=False)
    assert is_allowed(address, private=True)


@pytest.mark.parametrize("address", NEVER)
def test_other_addresses_are_never_allowed(address: str) -> None:
    assert not is_allowed(address, private=False)
    assert not is_allowed(address, private=True)


@given(st.ip_addresses())
def test_what_python_calls_not_global_is_not_public(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    """The standard library's own tables are a second opinion."""
    if not address.is_global or address.is_multicast or address.is_reserved:
        assert not is_allowed(str(address), private=False)


# ---- the allow-list


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "http://example.org",
        "example.org/images",
        "example.org:0",
        "example.org:x",
        "user@example.org",
        "*.*.example.org",
        "images.*",
        "private:*",
        "private:",
        "::1",
        "[::1",
        "0x7f.1",
        "2130706433",
        "127.1",
        "exämple.org",
        "example.org.",
    ],
)
def test_an_entry_that_cannot_be_read_stops_the_start(entry: str) -> None:
    with pytest.raises(ConfigurationError, match="allowed-image-hosts"):
        parse_hosts([entry])


@pytest.mark.parametrize(
    ("entry", "url"),
    [
        ("img.example.org", "http://img.example.org"),
        ("img.example.org", "HTTPS://IMG.example.org:443/a/b.jpg?size=1&x=%20#top"),
        ("IMG.example.org", "https://img.example.org/"),
        ("*.example.org", "https://a.b.example.org/"),
        ("*", "https://anything.example/"),
        ("minio:9000", "http://minio:9000/bucket/cat.jpg"),
        ("minio:9000", "https://minio:9000/bucket/cat.jpg"),
        ("label_studio:8080", "http://label_studio:8080/data/upload/1/cat.jpg"),
        ("93.184.215.14", "http://93.184.215.14/cat.jpg"),
        ("[2606:2800::1]:8443", "https://[2606:2800::1]:8443/"),
        ("xn--bcher-kva.example", "https://xn--bcher-kva.example/"),
    ],
)
def test_a_url_of_an_allowed_host_is_found(entry: str, url: str) -> None:
    assert not parse_image_url(url, parse_hosts([entry])).private
    assert parse_image_url(url, parse_hosts([f"private:{entry}"] if entry != "*" else [entry])).url


@pytest.mark.parametrize(
    ("entry", "url"),
    [
        ("example.org", "https://www.example.org/"),
        ("example.org", "https://example.org.evil.example/"),
        ("example.org", "https://evilexample.org/"),
        ("example.org", "https://example.org:8443/"),
        ("example.org", "http://example.org:443/"),
        ("example.org", "https://example.org:80/"),
        ("*.example.org", "https://example.org/"),
        ("*.example.org", "https://evilexample.org/"),
        ("minio:9000", "http://minio/"),
        ("minio:9000", "http://minio:9001/"),
        ("xn--bcher-kva.example", "https://bücher.example/"),
    ],
)
def test_a_url_of_another_host_or_port_is_refused(entry: str, url: str) -> None:
    with pytest.raises(ImageUrlRefused):
        parse_image_url(url, parse_hosts([entry]))


@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
def test_a_url_without_a_port_means_the_port_of_its_scheme(scheme: str, port: int) -> None:
    hosts = parse_hosts(["example.org"])
    for host in ("example.org", f"example.org:{port}"):
        place = parse_image_url(f"{scheme}://{host}/a", hosts)
        assert (place.port, place.host_header) == (port, "example.org")


@pytest.mark.parametrize("url", ["http://studio.example.org", "https://studio.example.org/ls"])
def test_a_label_studio_without_a_port_is_at_the_port_of_its_scheme(url: str) -> None:
    host = LabelStudioHost(url, None, allowed=(), max_bytes=1, seconds=1)
    assert host.is_its(f"{url}/data/upload/1/cat.jpg")
    assert not host.is_its("http://studio.example.org:8080/data/upload/1/cat.jpg")


def test_the_path_and_query_go_on_as_they_were_written_and_the_fragment_stays() -> None:
    place = parse_image_url("https://example.org/a%2Fb/../c?x=1%0A&y=a/b?#frag", parse_hosts(["*"]))
    assert place.target == "/a%2Fb/../c?x=1%0A&y=a/b?"
    assert (place.host_header, place.port) == ("example.org", 443)
