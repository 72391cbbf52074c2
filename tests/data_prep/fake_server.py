"""A download server on 127.0.0.1 that misbehaves on demand."""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import hashlib
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclasses.dataclass
class Page:
    """What a path answers.

    Attributes:
      body: sent whole, unless `break_after` says otherwise.
      status: of HTTP.
      headers: sent along.
      fail_first: so many requests are answered with 503 first.
      break_after: bytes after which the connection breaks off, unless a range was asked for.
      break_each: bytes after which every connection breaks off.
      seconds_a_piece: waits before every piece of the body.
      piece: bytes of a piece.
      announce: whether Content-Length is sent.
      ranges: whether a Range header is honoured.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    fail_first: int = 0
    break_after: int | None = None
    break_each: int | None = None
    seconds_a_piece: float = 0.0
    piece: int = 1 << 16
    announce: bool = True
    ranges: bool = True


class FakeServer:
    """Serves `pages` by path; counts requests and remembers their Range headers. Over TLS with a context."""

    def __init__(self, tls: ssl.SSLContext | None = None):
        self.pages: dict[str, Page] = {}
        self.requests: Counter[str] = Counter()
        self.ranges: list[str] = []
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):
                    server._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        if tls is not None:
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True)
        self.port = self._http.server_address[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def add(self, path: str, body: bytes = b"", **options) -> str:
        """Serves a page and returns its URL."""
        self.pages[path] = Page(body, **options)
        return self.url + path

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.requests[handler.path] += 1
            number = self.requests[handler.path]
            asked = handler.headers.get("Range", "")
            self.ranges.append(asked)
        page = self.pages.get(handler.path, Page(b"not here", 404))
        if number <= page.fail_first:
            page = Page(b"busy", 503, {"Retry-After": "0"})
        tag = f'"{hashlib.md5(page.body).hexdigest()}"'
        body, status, headers = page.body, page.status, {"ETag": tag, **page.headers}
        span = re.fullmatch(r"bytes=(\d+)-", asked)
        if span and page.ranges and status == 200 and handler.headers.get("If-Range", tag) == tag:
            start = int(span[1])
            if start >= len(body):
                status, headers, body = 416, {"Content-Range": f"bytes */{len(body)}"}, b""
            else:
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                status, body = 206, body[start:]
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Date", email.utils.formatdate(usegmt=True))
        if page.announce:
            handler.send_header("Content-Length", str(len(body)))
        else:
            handler.close_connection = True
        handler.end_headers()
        limit = page.break_each if page.break_each or status != 200 else page.break_after
        if limit is not None:
            body = body[:limit]
            handler.close_connection = True
        for start in range(0, len(body), page.piece):
            time.sleep(page.seconds_a_piece)
            handler.wfile.write(body[start : start + page.piece])
            handler.wfile.flush()


@contextlib.contextmanager
def running(tls: ssl.SSLContext | None = None) -> Iterator[FakeServer]:
    """A server for the time of a test."""
    server = FakeServer(tls)
    try:
        yield server
    finally:
        server.close()
