"""The hosts that images may be fetched from, and the addresses that their names may have.

    hosts = parse_hosts(["*.example.org", "private:minio.local:9000"])
    location = parse_image_url("https://img.example.org/cat.jpg", hosts)   # or ImageUrlRefused
    is_allowed("10.0.0.5", private=location.private)              # False: a public name, inside

A URL is checked by its text: anything but a plain URL of an allowed host is refused before a name
is resolved. `is_allowed` checks the resolved addresses.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from service.errors import ConfigurationError, ImageUrlRefused

MAX_URL = 2048
"""Maximum length of a URL, in characters."""

_PORTS = {"http": 80, "https": 443}
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_ENTRY = re.compile(
    r"(?P<private>private:)?(?P<name>\*|(?:\*\.)?[^*:\[\]]+|\[[^\]]+\])(?::(?P<port>[1-9]\d{0,4}))?"
)
_PRINTABLE = re.compile(r"[!-~]+")
_URL = re.compile(r"https?://[^/?#@\\]+(?:[/?#]|$)", re.IGNORECASE)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _networks(*texts: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(map(ipaddress.ip_network, texts))


# IANA's special-purpose registries; only global unicast is public.
_NOT_PUBLIC_4 = _networks(
    "0.0.0.0/8",  # this network
    "10.0.0.0/8",  # private
    "100.64.0.0/10",  # shared by carriers, and metadata of one cloud
    "127.0.0.0/8",  # loopback
    "168.63.129.16/32",  # the host agent of one cloud, at a public address
    "169.254.0.0/16",  # link-local: the metadata of most clouds
    "172.16.0.0/12",  # private
    "192.0.0.0/24",  # protocol assignments
    "192.0.2.0/24",  # documentation
    "192.31.196.0/24",  # AS112
    "192.52.193.0/24",  # AMT
    "192.88.99.0/24",  # 6to4 relays
    "192.168.0.0/16",  # private
    "192.175.48.0/24",  # AS112
    "198.18.0.0/15",  # benchmarks
    "198.51.100.0/24",  # documentation
    "203.0.113.0/24",  # documentation
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, and broadcast
)
_UNICAST_6 = ipaddress.ip_network("2000::/3")
# Global unicast that embeds an IPv4 address or is not routed. Mapped addresses (::ffff:0:0/96),
# NAT64 (64:ff9b::/96, 64:ff9b:1::/48) and all others are outside of 2000::/3.
_NOT_PUBLIC_6 = _networks(
    "2001::/23",  # protocol assignments, Teredo among them
    "2001:db8::/32",  # documentation
    "2002::/16",  # 6to4
    "2620:4f:8000::/48",  # AS112
    "3fff::/20",  # documentation
)
_PRIVATE = _networks(
    "10.0.0.0/8", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7"
)
_NEVER = _networks("fd00:ec2::/32", "fd20:ce::/32")  # metadata of clouds, among unique local ones


@dataclass(frozen=True, slots=True)
class AllowedHost:
    """An entry of the allow-list.

    name:    "img.example.org", "*.example.org" for names under it, "*" for every public host,
             or an address.
    port:    the only port, or None: 80 for http and 443 for https.
    private: whether its addresses may be private or loopback ones.
    """

    name: str
    port: int | None = None
    private: bool = False

    def matches(self, host: str, port: int, scheme: str) -> bool:
        """Whether a URL of this host and port is allowed."""
        if port != (self.port or _PORTS[scheme]):
            return False
        if self.name.startswith("*"):
            return host.endswith(self.name[1:])
        return host == self.name


@dataclass(frozen=True, slots=True)
class ImageLocation:
    """The parts of an image URL: `target` is path and query; `private` as in AllowedHost."""

    scheme: str
    host: str
    port: int
    target: str
    private: bool

    @property
    def host_header(self) -> str:
        """The host, with the port unless it is the default of the scheme."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL in its normal form."""
        return f"{self.scheme}://{self.host_header}{self.target}"


def parse_hosts(entries: Iterable[str]) -> tuple[AllowedHost, ...]:
    """Read entries `[private:]HOST[:PORT]`. Raises ConfigurationError."""
    return tuple(map(_parse_host, entries))


def _parse_host(entry: str) -> AllowedHost:
    match = _ENTRY.fullmatch(entry.lower())
    name = match["name"] if match else ""
    plain = name.removeprefix("*.").strip("[]")
    if match is None or not (name == "*" or _is_host(plain)) or (match["private"] and name == "*"):
        raise ConfigurationError(
            f"--allowed-image-hosts: {entry!r} is not of the form [private:]HOST[:PORT], with HOST "
            "a name, *.name for all names under it, an address, or * for every public host "
            "(which cannot be private)."
        )
    port = None if match["port"] is None else int(match["port"])
    return AllowedHost(name.strip("[]"), port, private=bool(match["private"]))


def parse_image_url(url: str, hosts: Sequence[AllowedHost]) -> ImageLocation:
    """Read a URL and find its host in the allow-list.

    Raises ImageUrlRefused, which depends only on the URL and the list.
    """
    if len(url) > MAX_URL or not _PRINTABLE.fullmatch(url) or not _URL.match(url):
        raise ImageUrlRefused(
            f"An image URL starts with http:// or https:// and has at most {MAX_URL} ASCII "
            "characters, without a user, a backslash or a space."
        )
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname or "", parts.port
    except ValueError as error:
        raise ImageUrlRefused("The host or port of the image URL cannot be read.") from error
    if not _is_host(host) or parts.netloc.endswith(":"):
        raise ImageUrlRefused("The host of the image URL is not a plain name or address.")
    port = _PORTS[scheme] if port is None else port
    matching = [allowed for allowed in hosts if allowed.matches(host, port, scheme)]
    if not matching:
        raise ImageUrlRefused(
            "This service fetches no images from this host and port; send the image in `data`, or "
            "ask the operator of the service to allow the host."
        )
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return ImageLocation(scheme, host, port, target, any(entry.private for entry in matching))


def is_allowed(address: str, *, private: bool) -> bool:
    """Whether a connection to this address may be made.

    Public unicast addresses always; private, unique local and loopback ones if `private`;
    link-local, multicast and reserved ones, and those that embed an IPv4 address, never.
    """
    try:
        parsed: Address = ipaddress.ip_address(address)
    except ValueError:
        return False
    if getattr(parsed, "scope_id", None) is not None or _within(parsed, _NEVER):
        return False
    if private and _within(parsed, _PRIVATE):
        return True
    if parsed.version == 4:
        return not _within(parsed, _NOT_PUBLIC_4)
    return parsed in _UNICAST_6 and not _within(parsed, _NOT_PUBLIC_6)


def _within(
    address: Address, networks: Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]
) -> bool:
    return any(address in network for network in networks if network.version == address.version)


def _is_host(host: str) -> bool:
    """Whether it is a name in lower-case ASCII, or an address in its normal form."""
    try:
        return ipaddress.ip_address(host).compressed == host and "%" not in host
    except ValueError:
        pass
    # Some resolvers read a name that ends in a number as an address: 127.1, 2130706433, 0x7f.1.
    last = host.rpartition(".")[2]
    numeric = last.isdigit() or re.fullmatch(r"0x[0-9a-f]*", last) is not None
    return len(host) <= 253 and _NAME.fullmatch(host) is not None and not numeric
