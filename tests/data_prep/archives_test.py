"""Archives that were made to do harm, and such as are only broken."""

from __future__ import annotations

import io
import shutil
import stat
import struct
import zipfile

import pytest

from data_prep import archives, disk
from vixml_jax.errors import UserError

WANTED = {"a.txt": "a.txt", "b.txt": "renamed.txt"}


def _zip(path, members, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in members.items():
            packed.writestr(name, data, **options)
    return path


@pytest.fixture
def out(tmp_path):
    directory = tmp_path / "out"
    directory.mkdir()
    return directory


def test_only_what_is_wanted(tmp_path, out):
    members = {"set/": b"", "set/a.txt": b"a" * 3000, "set/raw/b.txt": b"", "c.txt": b"c"}
    archive = _zip(tmp_path / "x.zip", members)
    assert archives.names(archive) == {"a.txt", "b.txt", "c.txt"}
    assert archives.unpack(archive, WANTED, out, 1e6) == {"a.txt", "renamed.txt"}
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    assert found == {"a.txt": b"a" * 3000, "renamed.txt": b""}


def test_a_file_without_a_name(tmp_path, out):
    archive = _zip(tmp_path / "x.zip", {"a.txt": b"a", "?": b"unnamed"})
    archive.write_bytes(archive.read_bytes().replace(b"?", b"\0"))  # where zipfile ends the name
    archives.names(archive)
    assert archives.unpack(archive, WANTED, out, 1e6) == {"a.txt"}


@pytest.mark.parametrize(
    "name", ["../a.txt", "/etc/a.txt", "set/../../a.txt", "..\\a.txt", "C:/a.txt", "../elsewhere.txt"]
)
def test_paths_that_leave_the_folder(tmp_path, out, name):
    archive = _zip(tmp_path / "x.zip", {"b.txt": b"b", name: b"x"})
    with pytest.raises(UserError, match="outside its folder"):
        archives.unpack(archive, WANTED, out, 1e6)
    assert not list(out.iterdir())
    assert not (tmp_path / "a.txt").exists()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices(tmp_path, out, kind):
    info = zipfile.ZipInfo("a.txt")
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="link or a device"):
        archives.unpack(tmp_path / "x.zip", WANTED, out, 1e6)


def test_bombs(tmp_path, out, monkeypatch):
    archive = _zip(tmp_path / "x.zip", {"a.txt": bytes(5_000_000)})
    assert archive.stat().st_size < 10_000
    with pytest.raises(UserError, match=r"more than 0\.00 GB"):
        archives.unpack(archive, WANTED, out, 4_999_999)
    # One that lies about its size: never more than it says comes out.
    data = bytearray(archive.read_bytes())
    directory = data.rindex(b"PK\x01\x02")
    data[directory + 24 : directory + 28] = struct.pack("<I", 1000)
    (tmp_path / "liar.zip").write_bytes(data)
    with pytest.raises(UserError, match="broken zip file"):
        archives.unpack(tmp_path / "liar.zip", WANTED, out, 1e6)
    assert (out / "a.txt").stat().st_size <= 1000
    # And one that is right, but for which there is no room.
    usage = shutil.disk_usage(tmp_path)._replace(free=disk.RESERVE_BYTES + 4_999_999)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="make room"):
        archives.unpack(archive, WANTED, out, 1e9)


def test_broken_ones(tmp_path, out):
    good = _zip(tmp_path / "x.zip", {"set/a.txt": bytes(range(256)) * 40}).read_bytes()
    flipped = bytearray(good)
    flipped[60] ^= 255
    encrypted = bytearray(good)
    encrypted[6] |= 1
    encrypted[good.rindex(b"PK\x01\x02") + 8] |= 1
    for data in (b"", b"<html>", good[:-30], good[40:], bytes(flipped), bytes(encrypted)):
        (tmp_path / "y.zip").write_bytes(data)
        with pytest.raises(UserError) as error:
            archives.unpack(tmp_path / "y.zip", WANTED, out, 1e6)
        assert "y.zip" in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        archives.names(tmp_path / "none.zip")
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as packed:
        packed.writestr("one/a.txt", "1")
        packed.writestr("two/a.txt", "2")
    (tmp_path / "y.zip").write_bytes(twice.getvalue())
    with pytest.raises(UserError, match=r"both 'one/a.txt' and 'two/a.txt'"):
        archives.unpack(tmp_path / "y.zip", WANTED, out, 1e6)
