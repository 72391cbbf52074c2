from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vixml_jax import files
from vixml_jax.errors import UserError
from vixml_jax.files import STALE_SECONDS, atomic_dir, atomic_file


def age(path, seconds=STALE_SECONDS + 60):
    os.utime(path, (time.time() - seconds,) * 2)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_nobody_sees_half_a_file(tmp_path):
    path = tmp_path / "new" / "f"
    with atomic_file(path, "w") as file:
        file.write("é")
        assert not path.exists()
    assert path.read_bytes() == "é".encode()
    with pytest.raises(UnicodeEncodeError), atomic_file(path, "w") as file:
        file.writelines(["half", "\ud800"])
    assert path.read_bytes() == "é".encode()
    assert names(path.parent) == ["f"]


@pytest.mark.parametrize(
    "text", ["", "{", '{"a": 1}}', "[" * 100_000, "9" * 10_000, '{"a": "\\', "\xff", "\0", "nul"]
)
def test_what_is_no_json_is_named(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"x\.json: .*not valid JSON"):
        files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_stays_a_link(tmp_path, exists):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "target", tmp_path / "link"
    if exists:
        target.write_text("old")
    link.symlink_to(Path("there") / "target")
    with atomic_file(link, "w") as file:
        file.write("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert not target.is_symlink()
    assert names(tmp_path) == ["link", "there"]
    assert names(tmp_path / "there") == ["target"]


def test_devices_are_written_to_as_they_are(tmp_path):
    before = os.stat(os.devnull)
    link = tmp_path / "null"
    link.symlink_to(os.devnull)
    for path in (os.devnull, link):
        with atomic_file(path, "w") as file:
            file.write("gone")
    after = os.stat(os.devnull)
    assert stat.S_ISCHR(after.st_mode)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert link.is_symlink()


def test_a_pipe_is_written_to_as_it_is(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    with atomic_file(pipe) as file:
        file.write(b"through")
    reader.join(60)
    assert read == [b"through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert names(tmp_path) == ["pipe"]


@pytest.mark.parametrize("to", ["pipe", "file"])
def test_standard_output_can_be_named(tmp_path, to):
    program = "from vixml_jax import files\nwith files.atomic_file('/dev/stdout') as f: f.write(b'out')"
    if to == "pipe":
        run = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, stdout=subprocess.PIPE)
        assert run.stdout == b"out"
        return
    with open(tmp_path / "f", "wb") as file:
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60, stdout=file)
    assert (tmp_path / "f").read_bytes() == b"out"


@pytest.mark.parametrize("atomic", [atomic_file, atomic_dir])
def test_what_killed_runs_left_is_removed(tmp_path, atomic):
    path = tmp_path / "a.b"
    stale = [tmp_path / ".a.b.0123abc_.part", tmp_path / ".a.b.01234567.part", tmp_path / ".a.b.01234567.old"]
    kept = [tmp_path / ".a.b.young123.part", tmp_path / ".a.b.c.01234567.part", tmp_path / ".a.01234567.part",
            tmp_path / ".a.b.notes.part", tmp_path / ".a.b.filled12.part"]  # fmt: skip
    for left in (*stale[1:], kept[4]):
        left.mkdir()
        (left / "f").write_text("")
    for left in (stale[0], *kept[:4]):
        left.write_text("")
    for left in (*stale, *(left / "f" for left in stale[1:]), *kept[1:]):
        age(left)
    with atomic(path):
        # While there is no a.b, the old one may be its only copy.
        assert names(tmp_path)[-1] != "a.b"
        assert [left.exists() for left in stale] == [False, False, True]
    with atomic(path):
        pass
    assert names(tmp_path) == sorted(["a.b", *(left.name for left in kept)])


@pytest.mark.parametrize("atomic", [atomic_file, atomic_dir])
def test_what_is_still_being_written_is_kept(tmp_path, atomic):
    path = tmp_path / "a"
    with atomic(path):
        (slow,) = tmp_path.iterdir()
        age(slow)
        with atomic(path):
            assert slow.exists()
        assert slow.exists()
    assert names(tmp_path) == ["a"]


def test_without_locks_the_age_decides(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError("not supported")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    left = tmp_path / ".a.01234567.part"
    left.write_text("")
    age(left)
    with atomic_file(tmp_path / "a"):
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == ["a"]


def test_a_replacement_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    """Also SIGTERM and Ctrl-C may come between the two renames."""
    path, replace = tmp_path / "a", os.replace
    with atomic_dir(path) as directory:
        (directory / "f").write_text("old")

    def interrupted(source, target):
        if Path(target) == path:
            monkeypatch.undo()
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_dir(path) as directory:
        (directory / "f").write_text("new")
    assert (path / "f").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_directory_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "a", []
    fsync = os.fsync

    def noted(handle):
        assert not path.exists()
        synced.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", noted)
    with atomic_dir(path) as directory:
        (directory / "inner").mkdir()
        written = [directory / "f", directory / "inner" / ".g"]
        for file in written:
            file.write_text("whole")
    assert sorted(synced) == sorted((path / file.relative_to(directory)).stat().st_ino for file in written)


def test_what_went_wrong_is_not_hidden_by_what_follows(tmp_path, monkeypatch):
    def no_unlink(_):
        raise OSError("a stale handle")

    monkeypatch.setattr(files.os, "unlink", no_unlink)
    with pytest.raises(UserError, match="the reason"), atomic_file(tmp_path / "f"):
        raise UserError("the reason")


def test_a_scratch_directory_of_a_killed_run_is_removed_later(tmp_path):
    with files.scratch_dir(tmp_path / "a") as scratch:
        (scratch / "f").write_text("")
        assert scratch.parent == tmp_path
    assert names(tmp_path) == []
    scratch.mkdir()
    age(scratch)
    with atomic_file(tmp_path / "a"):
        pass
    assert names(tmp_path) == ["a"]
