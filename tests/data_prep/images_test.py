"""`python -m data_prep.images`: pictures once each, lists for `vixml prepare`, going on after a kill."""

from __future__ import annotations

import csv
import errno
import io
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import raw_folders
from PIL import Image

from data_prep import images
from data_prep.download_report import DownloadReport, Outcome
from data_prep.transfers import Limits
from vixml_jax import cli
from vixml_jax.data import formats
from vixml_jax.errors import UserError

ROOT = Path(__file__).parent.parent.parent
LIMITS = Limits(100_000, idle_seconds=0.3, total_seconds=1.0, retries=1, backoff_seconds=0.001)


def _anywhere(_):
    return True


def _list(path: Path, rows: list[tuple[str, str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("uid", "url"), *rows])
    return path


def _rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _report(raw: Path) -> dict[str, dict[str, str]]:
    return {row["url"].rpartition("/")[2]: row for row in _rows(raw / "images" / "downloads.csv")}


def _download(urls: Path, raw: Path, **options) -> images.Summary:
    return images.download(urls, raw, **{"limits": LIMITS, "allowed": _anywhere, "workers": 4, **options})


@pytest.fixture
def raw(tmp_path):
    """A raw folder whose label l1 has the uid of a training row, as products have that are both."""
    labels = [*raw_folders.LABELS[:1], {**raw_folders.LABELS[1], "uid": "a"}, *raw_folders.LABELS[2:]]
    return raw_folders.json_folder(tmp_path / "raw", lbl=labels)


def test_the_whole(server, raw, tmp_path):
    red, blue = raw_folders.picture("red", "JPEG"), raw_folders.picture("blue")
    good = {"red": red, "again": red, "blue": blue, "late": blue}
    for name, body in good.items():
        server.add(f"/{name}", body, fail_first=name == "late")
    bad = {
        "gone": ({"status": 404}, b"", "HTTP 404 Not Found"),
        "down": ({"status": 500}, b"", "HTTP 500 Internal Server Error"),
        "page": ({}, b"<html>sorry</html>", "not a picture"),
        "empty": ({}, b"", "an empty file"),
        "pixel": ({}, _one_pixel(), "a placeholder of one pixel"),
        "bomb": ({}, _bomb(), "not a picture"),
        "large": ({}, b"x" * 100_001, "larger than 100,000 bytes"),
        "broken": ({"break_after": 20}, red, f"broke off after 20 of {len(red):,} bytes"),
        "slow": ({"seconds_a_piece": 2.0}, red, "timed out (silent for 0.3 s, or too slow)"),
        "moved": (
            {"status": 302, "headers": {"Location": "file:///etc/passwd"}},
            b"",
            "neither http nor https: file",
        ),
    }
    for name, (options, body, _) in bad.items():
        server.add(f"/{name}", body, **options)
    rows = [("a", f"{server.url}/red"), ("a", f"{server.url}/blue"), ("b", f"{server.url}/again")]
    rows += [("e", f"{server.url}/{name}") for name in bad] + [("f", f"{server.url}/late")]
    rows += [
        ("a", f"{server.url}/red"),
        ("", "http://x/"),
        ("stranger", "http://x/"),
        ("f", "file:///etc/passwd"),
    ]
    urls = _list(tmp_path / "urls.csv", rows)
    summary = _download(urls, raw, per_row=0)

    report = _report(raw)
    assert {name: report[name]["outcome"] for name in good} == dict.fromkeys(good, "ok")
    assert {name: report[name]["outcome"] for name in bad} == {
        name: reason for name, (_, _, reason) in bad.items()
    }
    in_order = list(dict.fromkeys(url for _, url in rows[:-4] + rows[-1:]))
    assert [row["url"] for row in _rows(raw / "images" / "downloads.csv")] == in_order
    assert {name for name, row in report.items() if row["again"] == "1"} == {"down", "broken", "slow"}
    assert summary.outcomes["ok"] == 4
    assert summary.rows == {"train": (4, 2), "test": (2, 1), "labels": (3, 1)}
    assert summary.skipped == {
        "without uid or url": 1,
        "of a uid that the dataset does not have": 1,
        "named twice": 1,
    }

    stored = [path for path in (raw / "images").rglob("*") if path.is_file() and path.name != "downloads.csv"]
    assert sorted(path.read_bytes() for path in stored) == sorted(
        [red, blue]
    )  # each once, and nothing left over
    assert {path.suffix for path in stored} == {".jpg", ".png"}
    # `vixml prepare` finds each picture where it belongs.
    folder = formats.open_raw(raw)
    found = {
        (split, record.uid): [picture.data for picture in folder.images.read(record.images, check=True)]
        for split in folder.splits
        for record in folder.records(split)
    }
    assert {key: value for key, value in found.items() if value} == {
        ("train", "a"): [red, blue],
        ("train", "b"): [red],
        ("test", "f"): [blue],
        ("labels", "a"): [red, blue],
    }
    assert not folder.report.rejected

    # Again: only what may have passed is asked for, and now succeeds.
    before = server.requests.copy()
    for name in ("down", "broken", "slow", "gone"):
        server.add(f"/{name}", blue)
    summary = _download(urls, raw, per_row=0)
    assert {path for path in server.requests if server.requests[path] > before[path]} == {
        "/down",
        "/broken",
        "/slow",
    }
    assert summary.outcomes["ok"] == 7
    # And with `again` what failed for good.
    assert _download(urls, raw, per_row=0, again=True).outcomes["ok"] == 8
    # A picture that has been lost is fetched once more; nothing else is.
    next(path for path in stored if path.suffix == ".jpg").unlink()
    before = server.requests.copy()
    _download(urls, raw, per_row=0)
    assert {path for path in server.requests if server.requests[path] > before[path]} == {"/red", "/again"}


def _bomb() -> bytes:
    """The head of a PNG that says it is 50,000 pixels wide and high."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


def _one_pixel() -> bytes:
    buffer = io.BytesIO()
    Image.new("P", (1, 1)).save(buffer, "GIF")
    return buffer.getvalue()


def test_so_many_a_row_and_shrunk(server, raw, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGBA", (300, 100), (0, 200, 0, 128)).save(buffer, "PNG")
    rows = [("a", server.add(f"/{i}", buffer.getvalue())) for i in range(3)]
    _download(_list(tmp_path / "urls.csv", rows), raw, per_row=2, max_side=60)
    assert set(server.requests) == {"/0", "/1"}
    (name,) = {row["path"] for row in _rows(raw / "img_paths.trn.csv")}
    with Image.open(raw / name) as image:
        assert (image.format, image.size) == ("JPEG", (60, 20))


def test_private_addresses_need_a_flag(server, raw, tmp_path):
    urls = _list(tmp_path / "urls.csv", [("a", server.add("/red", raw_folders.picture()))])
    flags = [f"--urls={urls}", f"--raw={raw}", "--retries=0"]
    assert cli.run_job(images, "images", flags) == 0
    assert _report(raw)["red"]["outcome"] == "127.0.0.1 is not on the public internet (127.0.0.1)"
    assert not server.requests
    assert cli.run_job(images, "images", [*flags, "--allow_private", "--again"]) == 0
    assert _report(raw)["red"]["outcome"] == "ok"


def test_a_kill_in_the_middle(server, raw, tmp_path):
    rows = []
    for i in range(40):
        body = raw_folders.picture(f"rgb({i}, 0, 0)")
        rows.append(("abcdef"[i % 6], server.add(f"/{i}", body, seconds_a_piece=0.15)))
    urls = _list(tmp_path / "urls.csv", rows)
    command = [sys.executable, "-m", "data_prep.images", f"--urls={urls}", f"--raw={raw}", "--per_row=0"]
    command += ["--allow_private", "--workers=4"]
    report = raw / "images" / "downloads.csv"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not report.exists() or report.read_bytes().count(b",ok,") < 8:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    done = {row["url"].rpartition("/")[2] for row in _rows(report) if row["outcome"] == "ok" and row["again"]}
    assert 8 <= len(done) < 40
    with open(report, "ab") as file:
        file.write(b"http://127.0.0.1/half a li")  # what a kill between two writes may leave
    (raw / "images" / ".part-1").write_bytes(b"half a picture")
    before = server.requests.copy()
    assert _download(urls, raw, per_row=0).outcomes == {"ok": 40}
    assert not [path for path in done if server.requests[f"/{path}"] > before[f"/{path}"]]
    assert len(_rows(report)) == 40
    assert len(_rows(raw / "img_paths.trn.csv")) == 28  # uids a, b, c, d of a to f
    assert not list((raw / "images").glob(".part-*"))


def test_a_full_disk_and_a_second_run(server, raw, tmp_path, monkeypatch):
    rows = [("a", server.add(f"/{colour}", raw_folders.picture(colour))) for colour in ("red", "blue")]
    urls = _list(tmp_path / "urls.csv", rows)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match="the disk is full; make room"):
            _download(urls, raw)
        patch.undo()
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match="the disk is full; make room"):
            _download(urls, raw)
    assert not list((raw / "images").glob(".part-*"))
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "write", lambda handle, data: real(handle, data[:9])
        )  # as a disk does that is nearly full
        with pytest.raises(UserError, match="the disk is full"):
            _download(urls, raw)
    with DownloadReport(raw / "images"), pytest.raises(UserError, match="another run"):
        _download(urls, raw)
    assert _download(urls, raw).outcomes == {"ok": 2}


def test_a_network_that_is_down(server, raw, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "GIVE_UP_AFTER", 5)
    urls = _list(tmp_path / "urls.csv", [("a", f"http://127.0.0.1:1/{i}") for i in range(9)])
    with pytest.raises(UserError, match="none of the first 5 pictures could be downloaded"):
        _download(urls, raw, per_row=0)


def test_mistakes(raw, tmp_path, capsys):
    own = raw_folders.own_folder(tmp_path / "own")
    some = _list(tmp_path / "some.csv", [("a", "http://x/")])
    strangers = _list(tmp_path / "strangers.csv", [("nobody", "http://x/")])
    for flags, message in (
        ([f"--raw={raw}"], "needs --urls"),
        ([f"--urls={some}", f"--raw={tmp_path / 'none'}"], "no such folder"),
        ([f"--urls={some}", f"--raw={own}"], "take no image lists"),
        ([f"--urls={strangers}", f"--raw={raw}"], "no picture for a uid of"),
        ([f"--urls={tmp_path / 'none.csv'}", f"--raw={raw}"], "no such file"),
        ([f"--urls={some}", f"--raw={raw}", "--workers=0"], "workers"),
    ):
        assert cli.run_job(images, "python -m data_prep.images", flags) == 2
        error = capsys.readouterr().err
        assert message in error.splitlines()[-1]
        assert error.splitlines()[-1].startswith("python -m data_prep.images: error: ")
    assert cli.run_job(images, "images", ["--help"]) == 0
    assert "--allow_private" in capsys.readouterr().out


def test_the_report_keeps_the_newest_line(tmp_path):
    path = tmp_path / "images" / "downloads.csv"
    with DownloadReport(path.parent) as report:
        for outcome in (
            Outcome("u1", "HTTP 500", again=True),
            Outcome("u2", "ok", "f", 3),
            Outcome("u1", "ok", "g", 4),
        ):
            report.add(outcome)
    with DownloadReport(path.parent) as report:
        assert {row["url"]: row["file"] for row in report.last().to_pylist()} == {"u1": "g", "u2": "f"}
    path.write_text("something else\n")
    with DownloadReport(path.parent) as report, pytest.raises(UserError, match="not a report"):
        report.last()
