"""Freed memory comes back without the system's help, counted in page faults; what is in pieces goes back."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from vixml_jax import host_memory

ROOT = Path(__file__).parent.parent
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")

# Faults of the last of three pieces of 256 MB, one after the other, as XLA's scratch memory comes and goes.
FAULTS = """
import resource
from vixml_jax import host_memory
{}
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (1 << 28)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""

# MB in the end of a process that is past its share from the start, after pieces with small ones in between.
PIECES = """
import time
from vixml_jax import host_memory
host_memory.SHARE, host_memory.SECONDS_BETWEEN_LOOKS = {}, 0.05
host_memory.keep_freed()
large, small = [], []
for _ in range(32):
    large.append(b"x" * (8 << 20))
    small.append(bytearray(1 << 10))
del large
for _ in range(100):
    time.sleep(0.05)
    if host_memory.resident_bytes() < 128 << 20:
        break
print(host_memory.resident_bytes() >> 20)
"""


def printed(code: str) -> int:
    return int(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT))


@glibc
def test_freed_memory_is_used_again():
    assert printed(FAULTS.format("")) > 100  # one for each page, also where pages are huge
    assert printed(FAULTS.format("host_memory.keep_freed()")) < 20


@glibc
@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 127), (1.0, 256, 1024)])
def test_past_its_share_a_process_gives_back_what_is_free(share, least, most):
    assert least <= printed(PIECES.format(share)) <= most


def test_a_limit_that_is_in_use_grows():
    limit = host_memory.Limit(1000)
    assert not limit.is_passed(999, 0.0)
    assert limit.is_passed(1000, 1.0)
    assert not limit.is_passed(400, 2.0)
    assert limit.is_passed(1100, 3.0)  # again so soon: no pieces, but what it needs
    assert not limit.is_passed(1400, 4.0)
    assert limit.is_passed(1500, 100.0)
    assert limit.is_passed(1600, 200.0)  # long after: pieces
    assert not limit.is_passed(1499, 300.0)


@pytest.mark.parametrize(("written", "expected"), [("max\n", None), ("1048576\n", 1 << 20), (None, None)])
def test_a_container_has_less_than_its_machine(monkeypatch, tmp_path, written, expected):
    path = tmp_path / "memory.max"
    if written is not None:
        path.write_text(written)
    monkeypatch.setattr(host_memory, "_CGROUP_LIMIT", path)
    machine = host_memory.machine_bytes()
    assert machine == expected if expected else machine > 1 << 28
