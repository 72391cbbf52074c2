"""HTTP downloads that end: limits on silence, time and size, retries with backoff, redirects checked each.

Built on `http.client`, because the address check of `addresses` belongs to the connection itself: libraries
above it resolve a host once more when they connect, follow redirects on their own, and limit the silence
between two pieces but not the time of the whole. Proxies are not used: behind one, it is the proxy that
resolves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import functools
import http.client
import io
import random
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

from data_prep import addresses
from data_prep.addresses import Address, Origin
from vixml_jax import __version__

T = TypeVar("T")

USER_AGENT = f"vixml-jax/{__version__}"
PIECE_BYTES = 1 << 16
MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
MAX_WAIT_SECONDS = 60.0  # between two attempts, whatever the server asks for


class Failed(Exception):
    """A transfer that did not succeed.

    Attributes:
      reason: why, in one clause.
      again: whether another attempt may succeed: a broken connection, an overloaded server.
      wait_seconds: how long the server asks to wait before it, if it does.
    """

    def __init__(self, reason: str, *, again: bool, wait_seconds: float = 0.0):
        super().__init__(reason)
        self.reason, self.again, self.wait_seconds = reason, again, wait_seconds


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one transfer.

    Attributes:
      max_bytes: of the body.
      idle_seconds: longest silence, while connecting and between two pieces.
      total_seconds: of one attempt, redirects included.
      retries: further attempts after one that may succeed again.
      backoff_seconds: before the first of them; doubles each time, and is scattered by half.
    """

    max_bytes: float
    idle_seconds: float = 20.0
    total_seconds: float = float("inf")
    retries: int = 3
    backoff_seconds: float = 0.5


class Reply:
    """The answer to a request, its body not yet read.

    Attributes:
      status: of HTTP.
      headers: names in any case.
      length: bytes of the body as announced, or None.
    """

    def __init__(self, response: http.client.HTTPResponse, limits: Limits):
        self._response, self._limits = response, limits
        self.status, self.headers, self.length = response.status, response.headers, response.length

    def pieces(self) -> Iterator[bytes]:
        """Yields the body.

        Raises:
          Failed: if it is too large, too slow, or breaks off.
        """
        done, limit = 0, self._limits.max_bytes
        if self.length is not None and self.length > limit:
            raise Failed(f"larger than {limit:,.0f} bytes", again=False)
        while True:
            with _network_errors(self._limits):
                piece = self._response.read(PIECE_BYTES)
            if not piece:
                break
            done += len(piece)
            if done > limit:
                raise Failed(f"larger than {limit:,.0f} bytes", again=False)
            yield piece
        if self.length is not None and done < self.length:
            raise Failed(f"broke off after {done:,} of {self.length:,} bytes", again=True)


class Client:
    """Fetches URLs one after the other, over one connection while they have the same origin.

    Not for several threads at once: give each its own.

    Args:
      limits: of each transfer.
      allowed: the addresses that may be connected to.
    """

    def __init__(self, limits: Limits, allowed: Callable[[Address], bool] = addresses.is_public):
        self.limits, self._allowed = limits, allowed
        self._connection: _Connection | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection, if one is open."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def fetch(self, url: str) -> bytes:
        """Returns the body of a URL, after as many attempts as `limits` allows.

        Raises:
          Failed: if none succeeds.
        """

        def attempt() -> bytes:
            with self.open(url) as reply:
                return b"".join(reply.pieces())

        return self.retrying(attempt)

    def retrying(self, attempt: Callable[[], T]) -> T:
        """Calls `attempt` until it does not fail, or it makes no sense to try again."""
        for number in range(self.limits.retries + 1):
            try:
                return attempt()
            except Failed as failure:
                if not failure.again or number == self.limits.retries:
                    raise
                self.pause(number, failure)
        raise AssertionError("a negative number of retries")

    def pause(self, number: int, failure: Failed) -> None:
        """Waits after the failed attempt `number`, from zero."""
        backoff = self.limits.backoff_seconds * 2**number * random.uniform(0.5, 1.5)
        time.sleep(min(max(backoff, failure.wait_seconds), MAX_WAIT_SECONDS))

    @contextlib.contextmanager
    def open(
        self, url: str, headers: Mapping[str, str] | None = None, accept: Collection[int] = (200,)
    ) -> Iterator[Reply]:
        """Makes one attempt at a URL and follows redirects; every hop is checked like the first.

        Args:
          url: http or https.
          headers: sent along.
          accept: statuses that are no failure.

        Raises:
          Failed: if there is no such answer.
        """
        deadline = time.monotonic() + self.limits.total_seconds
        for _ in range(MAX_REDIRECTS + 1):
            response = self._request(url, headers or {}, deadline)
            location = response.getheader("Location")
            if response.status not in REDIRECTS or not location:
                break
            self._finish(response)
            try:
                url = urllib.parse.urljoin(url, location)
            except ValueError:
                raise Failed("redirects to what is no URL", again=False) from None
        else:
            raise Failed(f"more than {MAX_REDIRECTS} redirects", again=False)
        try:
            if response.status not in accept:
                raise _status_failure(response)
            yield Reply(response, self.limits)
        finally:
            self._finish(response)

    def _request(self, url: str, headers: Mapping[str, str], deadline: float) -> http.client.HTTPResponse:
        sent = {"User-Agent": USER_AGENT, **headers}
        with _network_errors(self.limits):
            origin, path = addresses.parse(url)
            try:
                if self._connection is not None and self._connection.origin == origin:
                    # The server may have closed it in the meantime; then a new one decides.
                    with contextlib.suppress(ConnectionError, http.client.BadStatusLine):
                        return self._connection.get(path, sent, deadline)
                self.close()
                self._connection = _Connection(origin, self.limits.idle_seconds, self._allowed)
                return self._connection.get(path, sent, deadline)
            except BaseException:
                self.close()
                raise

    def _finish(self, response: http.client.HTTPResponse) -> None:
        """Keeps the connection only if the body was read to its end."""
        whole = response.isclosed()
        response.close()
        if not whole or response.will_close:
            self.close()


class _Connection:
    """A connection to one origin, over an address that was checked."""

    def __init__(self, origin: Origin, idle_seconds: float, allowed: Callable[[Address], bool]):
        self.origin, self._idle_seconds, self._allowed = origin, idle_seconds, allowed
        self._http = http.client.HTTPConnection(origin.host, origin.port)
        self._http.default_port = addresses.PORTS[origin.scheme]  # the Host header leaves it out
        self._http.auto_open = 0  # it must never connect by itself: to an address that nobody checked
        self._socket: _TimedSocket | None = None

    def get(self, path: str, headers: Mapping[str, str], deadline: float) -> http.client.HTTPResponse:
        if self._socket is None:
            self._socket = self._connect(deadline)
            self._http.sock = self._socket
        self._socket.deadline = deadline
        self._http.request("GET", path, headers=dict(headers))
        return self._http.getresponse()

    def close(self) -> None:
        self._http.close()
        self._socket = None

    def _connect(self, deadline: float) -> _TimedSocket:
        error: OSError = OSError("no address")
        for family, address in addresses.resolve(self.origin, self._allowed):
            plain = socket.socket(family, socket.SOCK_STREAM)
            timed = _TimedSocket(plain, self._idle_seconds, deadline)
            try:
                timed.arm()
                plain.connect(address)
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.origin.scheme == "https":
                    timed.arm()
                    secure = _tls().wrap_socket(plain, server_hostname=self.origin.host)
                    return _TimedSocket(secure, self._idle_seconds, deadline)
                return timed
            except OSError as failure:
                plain.close()
                error = failure
        raise error


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


class _TimedSocket:
    """What `http.client` needs of a socket, with a deadline: a timeout alone starts anew with every byte."""

    def __init__(self, sock: socket.socket, idle_seconds: float, deadline: float):
        self._sock, self._idle_seconds, self.deadline = sock, idle_seconds, deadline

    def arm(self) -> None:
        """Sets the timeout of the next operation."""
        left = min(self._idle_seconds, self.deadline - time.monotonic())
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)

    def sendall(self, data: bytes) -> None:
        self.arm()
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb", mode
        return io.BufferedReader(_TimedReader(self, self._sock.makefile("rb", buffering=0)))

    def close(self) -> None:
        self._sock.close()


class _TimedReader(io.RawIOBase):
    def __init__(self, timed: _TimedSocket, raw: io.RawIOBase):
        self._timed, self._raw = timed, raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._timed.arm()
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


@contextlib.contextmanager
def _network_errors(limits: Limits) -> Iterator[None]:
    """Turns what the network raises into `Failed`."""
    try:
        yield
    except addresses.Refused as refusal:
        raise Failed(str(refusal), again=False) from None
    except TimeoutError:
        seconds = min(limits.idle_seconds, limits.total_seconds)
        raise Failed(f"timed out (silent for {seconds:g} s, or too slow)", again=True) from None
    except socket.gaierror:
        raise Failed("the host does not resolve", again=True) from None
    except ssl.SSLCertVerificationError as error:
        raise Failed(f"its certificate is not valid ({error.verify_message})", again=False) from None
    except http.client.IncompleteRead:
        raise Failed("broke off", again=True) from None
    except http.client.HTTPException as error:
        raise Failed(f"not an HTTP answer ({type(error).__name__})", again=True) from None
    except OSError as error:
        raise Failed(f"no connection ({error.strerror or type(error).__name__})", again=True) from None


def _status_failure(response: http.client.HTTPResponse) -> Failed:
    again = response.status in (408, 425, 429) or response.status >= 500
    reason = f"HTTP {response.status} {http.client.responses.get(response.status, '')}".strip()
    return Failed(reason, again=again, wait_seconds=_wait_seconds(response.getheader("Retry-After", "")))


def _wait_seconds(value: str) -> float:
    """Reads a Retry-After header: seconds, or a date."""
    if value.strip().isascii() and value.strip().isdigit():
        return float(value)
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return 0.0
