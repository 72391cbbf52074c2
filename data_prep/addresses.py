"""Which addresses a download may go to: http and https only, and only machines on the public internet.

A list of picture URLs is somebody else's input. Without this check a line such as `http://169.254.169.254/...`
would read what only this machine may read. The check is made on the resolved address, and the connection goes
to exactly the address that was checked, so that a name which resolves differently a second time (DNS
rebinding) gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket
import urllib.parse
from collections.abc import Callable
from typing import NamedTuple

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
PORTS = {"http": 80, "https": 443}
# Carries an IPv4 address in its last 32 bits (RFC 6052); a gateway forwards to that.
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class Refused(Exception):
    """A URL that must not be fetched; the message says why."""


class Origin(NamedTuple):
    """Where a URL is fetched from."""

    scheme: str
    host: str
    port: int


class Target(NamedTuple):
    """A URL taken apart: its origin, and the path with its query."""

    origin: Origin
    path: str


class Endpoint(NamedTuple):
    """An address to connect to, as `socket` takes it."""

    family: socket.AddressFamily
    address: tuple


def parse(url: str) -> Target:
    """Takes a URL apart.

    Raises:
      Refused: if it is not http or https, names no host, or is no URL at all.
    """
    if any(character.isspace() or not character.isprintable() for character in url.strip()):
        raise Refused("not a URL: it holds white space")
    try:
        parts = urllib.parse.urlsplit(url.strip())
        port = parts.port
        # IDNA, so that a name outside ASCII is resolved, and sent in the Host header, as what it stands for.
        host = (parts.hostname or "").encode("idna").decode("ascii")
    except (ValueError, UnicodeError):
        raise Refused("not a URL") from None
    if parts.scheme not in PORTS:
        raise Refused(f"neither http nor https: {parts.scheme or 'no scheme'}")
    if not host:
        raise Refused("not a URL: it names no host")
    if parts.username is not None or parts.password is not None:
        raise Refused("a URL with a user name")
    path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    if parts.query:
        path += "?" + urllib.parse.quote(parts.query, safe="/?%:@!$&'()*+,;=~")
    return Target(Origin(parts.scheme, host, port or PORTS[parts.scheme]), path)


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet: not private, loopback, link-local or multicast.

    IPv6 addresses that stand for an IPv4 address (mapped, 6to4, Teredo, NAT64) are judged by that one too.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        known = [ipv4 for ipv4 in inner if ipv4 is not None]
        if known:
            return all(map(is_public, known))
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def resolve(origin: Origin, allowed: Callable[[Address], bool] = is_public) -> list[Endpoint]:
    """Looks a host up once and returns the addresses that may be connected to.

    Args:
      origin: its host is a name or a literal address in any notation that the resolver takes.
      allowed: which addresses may be.

    Raises:
      Refused: if the host resolves, but to no allowed address.
      OSError: if it does not resolve.
    """
    found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    endpoints, refused = [], []
    for family, _, _, _, address in found:
        # A link-local address carries its interface after a percent sign.
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if allowed(ip):
            endpoints.append(Endpoint(socket.AddressFamily(family), address))
        else:
            refused.append(str(ip))
    if not endpoints:
        raise Refused(f"{origin.host} is not on the public internet ({', '.join(sorted(set(refused)))})")
    return endpoints
