"""Large files arrive whole or not at all, and what was received is not fetched twice."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep import disk, downloads
from data_prep.download_report import DownloadReport, Outcome
from data_prep.transfers import Client, Limits
from vixml_jax.errors import UserError

ROOT = Path(__file__).parent.parent.parent
DATA = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def client():
    limits = Limits(float("inf"), idle_seconds=0.3, retries=2, backoff_seconds=0.001)
    with Client(limits, lambda _: True) as client:
        yield client


def test_a_whole_file_and_once_only(server, client, tmp_path):
    url, path = server.add("/a.zip", DATA), tmp_path / "new" / "a.zip"
    assert downloads.download(url, path, client, sha256=SHA256.upper(), size=len(DATA)) == SHA256
    assert path.read_bytes() == DATA
    assert [file.name for file in path.parent.iterdir()] == ["a.zip"]
    assert downloads.download(url, path, client, sha256=SHA256) == SHA256
    assert server.requests["/a.zip"] == 1


def test_breaks_are_gone_on_from(server, client, tmp_path):
    """Each request brings 50,000 bytes more: more breaks than there are retries."""
    url = server.add("/a.zip", DATA, break_each=50_000)
    assert downloads.download(url, tmp_path / "a.zip", client) == SHA256
    assert server.ranges == ["", *(f"bytes={start}-" for start in range(50_000, 300_000, 50_000))]


@pytest.mark.parametrize("options", [{"ranges": False}, {"headers": {"ETag": 'W/"weak"'}}])
def test_without_ranges_it_starts_again(server, client, tmp_path, options):
    url = server.add("/a.zip", DATA, break_after=50_000, **options)
    with pytest.raises(UserError, match="broke off after 50,000 of 300,000 bytes"):
        downloads.download(url, tmp_path / "a.zip", client)
    assert server.requests["/a.zip"] == 3
    server.add("/a.zip", DATA, **options)
    assert downloads.download(url, tmp_path / "a.zip", client) == SHA256


def test_a_file_that_changed_meanwhile(server, client, tmp_path):
    url = server.add("/a.zip", DATA[::-1], break_after=50_000, ranges=False)
    with pytest.raises(UserError, match="broke off"):
        downloads.download(url, tmp_path / "a.zip", client)
    assert (tmp_path / "a.zip.part").stat().st_size == 50_000
    server.add("/a.zip", DATA)
    assert downloads.download(url, tmp_path / "a.zip", client) == SHA256
    assert server.ranges[-1] == "bytes=50000-"


def test_a_part_that_is_whole_already(server, client, tmp_path):
    url = server.add("/a.zip", DATA, break_after=200_000)
    server.pages["/a.zip"].ranges = False
    with pytest.raises(UserError):
        downloads.download(url, tmp_path / "a.zip", client)
    with open(tmp_path / "a.zip.part", "ab") as part:
        part.write(DATA[200_000:])
    server.add("/a.zip", DATA)
    assert downloads.download(url, tmp_path / "a.zip", client) == SHA256
    assert server.ranges[-1] == "bytes=300000-"
    (tmp_path / "a.zip").rename(tmp_path / "a.zip.part")
    with open(tmp_path / "a.zip.part", "ab") as part:
        part.write(b"more than there is")
    assert downloads.download(url, tmp_path / "a.zip", client) == SHA256


def test_what_was_not_expected(server, client, tmp_path):
    url, path = server.add("/a.zip", DATA), tmp_path / "a.zip"
    with pytest.raises(UserError, match=f"SHA-256 is {SHA256} instead of {'0' * 64}"):
        downloads.download(url, path, client, sha256="0" * 64)
    with pytest.raises(UserError, match="300,000 bytes instead of 7"):
        downloads.download(url, path, client, size=7)
    for page in ({"status": 404}, {"headers": {"Content-Type": "text/html; charset=utf-8"}}):
        with pytest.raises(UserError, match=r"HTTP 404|web page") as error:
            downloads.download(server.add("/a.zip", b"<html>", **page), path, client)
        assert str(path) in str(error.value)  # where to put it by hand
    assert not path.exists()
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="delete it"):
        downloads.download(url, path, client, sha256=SHA256)
    assert path.read_bytes() == b"something else"


def test_room_is_checked_before(server, client, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=disk.RESERVE_BYTES + len(DATA) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"needs 0\.00 GB.*make room"):
        downloads.download(server.add("/a.zip", DATA), tmp_path / "a.zip", client)
    assert (tmp_path / "a.zip.part").stat().st_size == 0


def test_a_disk_that_fills_up(server, client, tmp_path, monkeypatch):
    url, real = server.add("/a.zip", DATA), os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full; make room"):
        downloads.download(url, tmp_path / "a.zip", client)
    monkeypatch.setattr(os, "fsync", real)
    assert downloads.download(url, tmp_path / "a.zip", client) == SHA256


def test_a_kill(server, tmp_path):
    url = server.add("/a.zip", DATA, seconds_a_piece=0.1, piece=20_000)
    path = tmp_path / "a.zip"
    program = (
        "import sys, pathlib; from data_prep import downloads, transfers as t\n"
        "with t.Client(t.Limits(float('inf')), lambda _: True) as client:\n"
        "    print(downloads.download(sys.argv[1], pathlib.Path(sys.argv[2]), client))"
    )
    command = [sys.executable, "-c", program, url, str(path)]
    part = tmp_path / "a.zip.part"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not part.exists() or part.stat().st_size < 40_000:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    have = part.stat().st_size
    server.add("/a.zip", DATA)
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() == SHA256
    assert server.ranges[-1] == f"bytes={have}-"


def test_two_runs(server, client, tmp_path):
    with open(tmp_path / "a.zip.part", "ab") as part:
        downloads._lock(part, tmp_path / "a.zip.part")
        with pytest.raises(UserError, match="another run"):
            downloads.download(server.add("/a.zip", DATA), tmp_path / "a.zip", client)


def test_what_is_looked_at_is_still_locked(server, client, tmp_path, monkeypatch):
    """Another run would go on with it, or begin it anew."""
    url, path = server.add("/a.zip", DATA), tmp_path / "a.zip"
    sha256 = downloads.files.sha256

    def meanwhile(part):
        with Client(client.limits, lambda _: True) as other, pytest.raises(UserError, match="another run"):
            downloads.download(url, path, other)
        return sha256(part)

    monkeypatch.setattr(downloads.files, "sha256", meanwhile)
    assert downloads.download(url, path, client) == SHA256


def test_without_locks_it_works_too(server, client, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(downloads.fcntl, "flock", none)
    assert downloads.download(server.add("/a.zip", DATA), tmp_path / "a.zip", client) == SHA256
    with DownloadReport(tmp_path / "images") as report:
        report.add(Outcome("http://x", "ok", "a", 1))
