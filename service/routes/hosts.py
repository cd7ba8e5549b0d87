"""Which `Host` headers are accepted: a protection against DNS rebinding.

After a page of http://evil.example:8000 is loaded, its owner can point that name to 127.0.0.1 or to
an address in the visitor's network. The browser then treats this service as the page's own origin
and lets the page read all responses. Such a request cannot hide its `Host`.

A service with API keys is not vulnerable: the page has no key. So if no hosts are listed:

    keys   listens on       accepted
    yes    anything         every host
    no     loopback         localhost and loopback addresses
    no     anything else    these, every IP address, and names that no public DNS zone has:
                            those without a dot, this machine's own, *.internal, *.local …

An IP address is safe because it needs no DNS; probes of Kubernetes and load balancers send one. A
list replaces the names of the last row, and also applies if there are keys.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from service.errors import ConfigurationError

MAX_NAME = 253
"""Characters of a DNS name."""

PRIVATE_SUFFIXES = (".cluster.local", ".home.arpa", ".internal", ".local", ".localhost", ".svc")
"""Reserved for private use by RFC 6761, 6762 and 8375, ICANN or Kubernetes: no public
domain ends in one of them."""

_NAME = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
_PORT = re.compile(r"(?::[0-9]{0,5})?")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class HostRule:
    """The hosts that are accepted; loopback addresses always are.

    names:     exact names and addresses, in lower case.
    suffixes:  ends of names, each with its leading dot.
    addresses: whether every IP address is accepted.
    undotted:  whether every name without a dot is accepted.
    """

    names: tuple[str, ...]
    suffixes: tuple[str, ...] = ()
    addresses: bool = False
    undotted: bool = False

    def accepts(self, header: str) -> bool:
        """Whether the value of a `Host` header, with its port if it has one, is accepted."""
        host = _host_of(header)
        if isinstance(host, Address):
            return self.addresses or host.is_loopback or str(host) in self.names
        if host is None:
            return False
        listed = host in self.names or host.endswith(self.suffixes)
        return listed or (self.undotted and "." not in host)

    def __str__(self) -> str:
        """What is accepted, without names of this machine and the list: any client can read it."""
        kinds = ["localhost", "every IP address" if self.addresses else "loopback addresses"]
        if self.undotted:
            kinds += ["names without a dot", *(f"*{suffix}" for suffix in PRIVATE_SUFFIXES)]
        return ", ".join([*kinds, "and the names that CAMSERVE_ALLOWED_HOSTS lists"])


def host_rule(listens_on: str, listed: Sequence[str], *, keys: bool) -> HostRule | None:
    """The rule of a service; None: every host is accepted.

    listens_on: address or name that the service listens on. listed: NAME, *.NAME, an address or *,
    as the operator wrote them. keys: whether requests need an API key.

    Raises ConfigurationError for an entry of another form.
    """
    entries = [_entry(text) for text in listed]
    if "*" in entries or (keys and not entries):
        return None
    names = [entry for entry in entries if not entry.startswith("*")]
    suffixes = [entry[1:] for entry in entries if entry.startswith("*")]
    near, host = is_loopback(listens_on), _host_of(listens_on)
    if isinstance(host, str):
        names = [host, *names]
    if not near and not entries:
        names, suffixes = [*names, socket.gethostname().lower()], list(PRIVATE_SUFFIXES)
    return HostRule(
        names=tuple(dict.fromkeys(["localhost", *names])),
        suffixes=tuple(suffixes),
        addresses=not near,
        undotted=not near and not entries,
    )


def is_loopback(listens_on: str) -> bool:
    """Whether only this machine can connect to that address."""
    try:
        return ipaddress.ip_address(listens_on).is_loopback
    except ValueError:
        return listens_on.lower() == "localhost"


def _host_of(header: str) -> str | Address | None:
    """The name or address in a `Host` header, without its port; None if it is malformed."""
    text = header.strip().lower()
    if len(text) > MAX_NAME + len("[]:65535"):
        return None
    if text.startswith("["):
        name, bracket, port = text[1:].partition("]")
        address = _address(name)
        is_whole = bracket and _PORT.fullmatch(port) and isinstance(address, ipaddress.IPv6Address)
        return address if is_whole else None
    bare = _address(text)  # as a setting has it: `::1`
    if bare is not None:
        return bare
    name, colon, port = text.partition(":")
    name = name.removesuffix(".")
    if not _NAME.fullmatch(name) or not _PORT.fullmatch(colon + port):
        return None
    return _address(name) or name


def _address(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _entry(text: str) -> str:
    """An entry of the list in its normal form. Raises ConfigurationError."""
    entry = text.strip().lower()
    if entry == "*":
        return entry
    wildcard = "*" if entry.startswith("*.") else ""
    rest = entry.removeprefix("*.") if wildcard else entry
    host = _host_of(rest)
    has_port = ":" in rest and _address(rest.strip("[]")) is None
    if host is None or has_port or (wildcard and not isinstance(host, str)):
        raise ConfigurationError(
            f"--allowed-hosts: {text!r} is not a host name, *.NAME for all names under it, an IP "
            "address, or * for every host; write it without scheme, port and path."
        )
    return f"{wildcard}.{host}" if wildcard else str(host)
