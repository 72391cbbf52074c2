"""What may be fetched, and that the address which was checked is the one connected to."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from data_prep import addresses
from data_prep.addresses import Origin, Refused
from data_prep.transfers import Client, Failed, Limits


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://example.org", (("http", "example.org", 80), "/")),
        (
            " HTTPS://Example.org:84/a%20b?r=ü#part ",
            (("https", "example.org", 84), "/a%20b?r=%C3%BC"),
        ),
        ("http://bücher.example/ä.jpg", (("http", "xn--bcher-kva.example", 80), "/%C3%A4.jpg")),
        ("http://[2001:db8::1]/x", (("http", "2001:db8::1", 80), "/x")),
    ],
)
def test_parse(url, target):
    assert addresses.parse(url) == target


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.org/x",
        "gopher://127.0.0.1:70/_x",
        "data:image/png;base64,AAAA",
        "//example.org/x",
        "example.org/x",
        "http:///x",
        "http://",
        "",
        "http://user:word@example.org/",
        "http://example.org:99999/",
        "http://example.org:port/",
        "http://[::1/",
        "http://exa mple.org/",
        "http://example.org/a\r\nHost: other",
        f"http://{'a' * 64}.example/",
    ],
)
def test_not_parsed(url):
    with pytest.raises(Refused):
        addresses.parse(url)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.0.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "fc00::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1"),
        *("2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2001:0:7f00:1::"),
    ],
)
def test_private(address):
    assert not addresses.is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "64:ff9b::808:808"])
def test_public(address):
    assert addresses.is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "::1", "::ffff:127.0.0.1"]
)
def test_loopback_in_any_notation_is_refused(host):
    with pytest.raises(Refused, match="public internet"):
        addresses.resolve(Origin("http", host, 80))


def _resolver(*answers):
    """A `getaddrinfo` that gives one answer (a list of addresses) after the other."""
    left = list(answers)

    def getaddrinfo(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in left.pop(0)]

    return getaddrinfo


def test_only_public_addresses_of_a_host_are_used(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", _resolver(["10.0.0.1", "93.184.216.34"]))
    found = addresses.resolve(Origin("http", "mixed.example", 80))
    assert [endpoint.address[0] for endpoint in found] == ["93.184.216.34"]


def test_the_connection_goes_to_what_was_checked(monkeypatch):
    """A name that turns private after the check: it is not resolved a second time."""
    monkeypatch.setattr(socket, "getaddrinfo", _resolver(["93.184.216.34"], ["127.0.0.1"]))
    connected = []

    def connect(_, address):
        connected.append(address)
        raise ConnectionRefusedError(111, "refused")

    monkeypatch.setattr(socket.socket, "connect", connect)
    client = Client(Limits(max_bytes=100, retries=0))
    with pytest.raises(Failed, match="refused"):
        client.fetch("http://rebinding.example:8080/x")
    assert connected == [("93.184.216.34", 8080)]
    with pytest.raises(Failed, match="not on the public internet"):
        client.fetch("http://rebinding.example:8080/x")
    assert len(connected) == 1
