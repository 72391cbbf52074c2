"""Transfers end, whatever the server does."""

from __future__ import annotations

import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time

import fake_server
import pytest

from data_prep import addresses, transfers
from data_prep.transfers import Client, Failed, Limits

LOOPBACK = ipaddress.ip_address("127.0.0.1")


def _only_this_server(address) -> bool:
    """127.0.0.1 stands for the public internet; all else is judged as always."""
    return address == LOOPBACK or addresses.is_public(address)


@pytest.fixture
def client():
    limits = Limits(1000, idle_seconds=0.3, total_seconds=1.0, retries=2, backoff_seconds=0.001)
    with Client(limits, _only_this_server) as client:
        yield client


def test_a_body_arrives(server, client):
    server.add("/%C3%A4.jpg?size=2", b"x" * 777)
    assert client.fetch(f"{server.url}/ä.jpg?size=2#part") == b"x" * 777
    assert client.fetch(server.add("/empty")) == b""


def test_passing_failures_are_tried_again(server, client):
    assert client.fetch(server.add("/busy", b"now", fail_first=2)) == b"now"
    assert server.requests["/busy"] == 3
    with pytest.raises(Failed, match="HTTP 503") as failure:
        client.fetch(server.add("/too_busy", b"never", fail_first=9))
    assert failure.value.again
    assert server.requests["/too_busy"] == 3


@pytest.mark.parametrize("status", [400, 403, 404, 410, 451])
def test_lasting_failures_are_not(server, client, status):
    with pytest.raises(Failed, match=f"HTTP {status}") as failure:
        client.fetch(server.add("/gone", b"", status=status))
    assert not failure.value.again
    assert server.requests["/gone"] == 1


def test_a_broken_transfer_is_noticed_and_tried_again(server, client):
    with pytest.raises(Failed, match="broke off after 10 of 500 bytes"):
        client.fetch(server.add("/broken", b"x" * 500, break_after=10))
    assert server.requests["/broken"] == 3


@pytest.mark.parametrize("announce", [True, False])
def test_a_body_that_is_too_large(server, client, announce):
    with pytest.raises(Failed, match="larger than 1,000 bytes") as failure:
        client.fetch(server.add("/large", b"x" * 1001, announce=announce))
    assert not failure.value.again
    assert client.fetch(server.add("/fits", b"x" * 1000, announce=announce)) == b"x" * 1000


def test_a_silent_and_a_trickling_server(server, client):
    """The second one is never silent for long: only the limit on the whole ends it."""
    for path, page in (
        ("/silent", {"seconds_a_piece": 5.0}),
        ("/trickle", {"seconds_a_piece": 0.2, "piece": 1}),
    ):
        url, started = server.add(path, b"x" * 100, **page), time.monotonic()
        with pytest.raises(Failed, match="timed out") as failure, client.open(url) as reply:
            list(reply.pieces())
        assert failure.value.again
        assert time.monotonic() - started < 1.5


def test_headers_that_trickle(client):
    """http.client itself would wait anew for every byte of a header."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            with connection:
                try:
                    while True:
                        connection.sendall(b"H")
                        time.sleep(0.1)
                except OSError:
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        started = time.monotonic()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        with pytest.raises(Failed, match="timed out"), client.open(url):
            pass
        assert time.monotonic() - started < 1.5
        thread.join()


def test_what_is_no_http(client):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"220 mail.example ESMTP\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        with pytest.raises(Failed, match="not an HTTP answer"), client.open(url):
            pass
        thread.join()
    with pytest.raises(Failed, match="no connection") as failure, client.open(url):
        pass
    assert failure.value.again


def test_redirects(server, client):
    target = server.add("/target", b"here")
    assert client.fetch(server.add("/moved", status=302, headers={"Location": target})) == b"here"
    assert client.fetch(server.add("/relative", status=301, headers={"Location": "target"})) == b"here"
    with pytest.raises(Failed, match="redirects"):
        client.fetch(server.add("/loop", status=302, headers={"Location": "/loop"}))
    with pytest.raises(Failed, match="HTTP 302"):
        client.fetch(server.add("/nowhere", status=302))


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://127.0.0.2:1/x", "public internet"),
        ("http://169.254.169.254/latest/meta-data", "public internet"),
        ("http://[::1]:1/x", "public internet"),
        ("http://10.0.0.1/x", "public internet"),
        ("file:///etc/passwd", "neither http nor https"),
        ("ftp://example.org/x", "neither http nor https"),
        ("http://[::1/x", "no URL"),
    ],
)
def test_redirects_are_checked_like_the_first_address(server, client, location, reason):
    url = server.add("/moved", status=302, headers={"Location": location})
    with pytest.raises(Failed, match=reason) as failure:
        client.fetch(url)
    assert not failure.value.again


def test_a_connection_is_used_again_and_replaced_when_it_is_dead(server, client):
    url = server.add("/a", b"a")
    client.fetch(url)
    kept = client._connection
    client.fetch(url)
    assert client._connection is kept
    kept._http.sock._sock.shutdown(socket.SHUT_RDWR)  # as a server does that is tired of waiting
    assert client.fetch(url) == b"a"
    assert client._connection is not kept
    with pytest.raises(Failed):
        client.fetch(server.add("/broken", b"x" * 500, break_after=10))
    assert client.fetch(url) == b"a"


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
def test_https(tmp_path, client, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-subj", "/CN=elsewhere.example", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with fake_server.running(context) as server:
        url = server.add("/a", b"x" * 900)
        assert url.startswith("https:")
        with pytest.raises(Failed, match="certificate is not valid") as failure:
            client.fetch(url)
        assert not failure.value.again
        monkeypatch.setattr(transfers, "_tls", lambda: ssl.create_default_context(cafile=str(certificate)))
        assert client.fetch(url) == b"x" * 900
        with pytest.raises(Failed, match="certificate is not valid"):
            client.fetch(url.replace("127.0.0.1", "localhost"))  # the certificate is another's
        slow = server.add("/slow", b"x", seconds_a_piece=5)
        with pytest.raises(Failed, match="timed out"), client.open(slow) as reply:
            list(reply.pieces())


def test_a_host_that_does_not_resolve(client, monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "no such host")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(Failed, match="does not resolve") as failure:
        client.fetch("http://nowhere.example/")
    assert failure.value.again
