"""Freed memory comes back without the system's help; counted in page faults, not in seconds."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

# Faults of the last of three arrays of 256 MB, one after the other, as XLA's scratch memory comes and goes.
FAULTS = """
import resource
import numpy as np
from vixml_jax import host_memory
{}
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 26, np.float32)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_freed_memory_is_used_again():
    def faults(line: str) -> int:
        command = [sys.executable, "-c", FAULTS.format(line)]
        return int(subprocess.check_output(command, cwd=Path(__file__).parent.parent))

    assert faults("") > 100  # a fault for each page, also where pages are huge
    assert faults("host_memory.keep_freed()") < 20
