"""A workdir has one owner; what a dead one has left is taken over."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import pytest

from vixml_jax import ownership
from vixml_jax.errors import UserError
from vixml_jax.ownership import OWNER

HOLD = """
import sys, time
from pathlib import Path
from vixml_jax import ownership
ownership.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def owner(workdir) -> dict:
    return json.loads((workdir / OWNER).read_text())


def claim(workdir, **changes) -> None:
    """Leaves the file of an owner that is like this process but for `changes`."""
    ownership.take(workdir)
    (workdir / OWNER).write_text(json.dumps({**owner(workdir), **changes}))


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    command = [sys.executable, "-c", HOLD, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {first.pid} on {socket.gethostname()}") as caught:
            ownership.take(tmp_path)
        assert "\n" not in str(caught.value)
        assert OWNER in str(caught.value)
        first.kill()
    with ownership.owned(tmp_path):  # killed, it could not give the workdir up
        assert owner(tmp_path)["process"] == os.getpid()
    assert not (tmp_path / OWNER).exists()


def test_the_owner_gives_up_at_the_end_and_leaves_no_empty_directory(tmp_path):
    with ownership.owned(tmp_path / "new"):
        assert owner(tmp_path / "new")["process"] == os.getpid()
    assert not (tmp_path / "new").exists()
    with ownership.owned(tmp_path / "full"):
        (tmp_path / "full" / "checkpoint").touch()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["checkpoint"]


def test_a_number_that_another_process_has_by_now_is_no_owner(tmp_path):
    claim(tmp_path, started="1")
    ownership.take(tmp_path)
    assert owner(tmp_path)["started"] != "1"


def test_an_owner_on_another_host_lives_as_long_as_it_touches_its_file(tmp_path):
    claim(tmp_path, host="elsewhere", process=7)
    with pytest.raises(UserError, match="process 7 on elsewhere"):
        ownership.take(tmp_path)
    old = time.time() - 2 * ownership.DEAD_SECONDS
    os.utime(tmp_path / OWNER, (old, old))
    ownership.take(tmp_path)
    assert owner(tmp_path)["host"] == socket.gethostname()


def test_the_file_is_touched_while_its_owner_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "TOUCH_SECONDS", 0.01)
    with ownership.owned(tmp_path):
        os.utime(tmp_path / OWNER, (1, 1))
        deadline = time.monotonic() + 20
        while (tmp_path / OWNER).stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_who_was_taken_for_dead_leaves_the_new_owner_alone(tmp_path):
    with ownership.owned(tmp_path):
        claim(tmp_path, host="elsewhere")
    assert owner(tmp_path)["host"] == "elsewhere"
