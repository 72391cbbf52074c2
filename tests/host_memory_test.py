"""Large memory comes in huge pages; counted in page faults, not in seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vixml_jax import cli, host_memory

# Faults of a piece of 256 MB, and what the process was called with. NumPy asks for huge pages for its arrays.
FAULTS = """
import os, resource, sys
{}
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b'x' * (1 << 28)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, os.getpid(), *sys.argv[1:])
"""
USE = "from vixml_jax import host_memory; host_memory.use_huge_pages()"


def run(line: str, **environment: str) -> tuple[int, int, int, list[str]]:
    """Faults; process number as started and in the end; arguments."""
    clean = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-X", "utf8", "-c", FAULTS.format(line), "a b", "--flag=ü"]
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parent.parent,
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )
    output, _ = process.communicate()
    assert not process.returncode
    faults, number, *arguments = output.split(maxsplit=2)
    return int(faults), process.pid, int(number), arguments


@pytest.mark.skipif(not host_memory._are_there(), reason="no huge pages here")
def test_a_process_begins_anew_as_it_was_called():
    faults, started, ended, arguments = run(USE)
    assert faults < 1000  # 128 of them are its pages
    assert started == ended
    assert arguments == ["a b --flag=ü\n"]
    plain, *_ = run("")
    if "[always]" not in host_memory._SYSTEM.read_text():
        assert plain > 60_000


@pytest.mark.parametrize(
    "tunables", ["glibc.malloc.hugetlb=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=2"]
)
def test_what_is_set_already_stays(monkeypatch, tunables):
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("began anew"))
    host_memory.use_huge_pages()
    assert os.environ["GLIBC_TUNABLES"] == tunables


def test_others_settings_are_kept(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    monkeypatch.setattr(host_memory, "_are_there", lambda: True)
    begun = []
    monkeypatch.setattr(os, "execv", lambda *arguments: begun.append(arguments))
    host_memory.use_huge_pages()
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    assert begun == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]


@pytest.mark.parametrize("settings", ["always madvise [never]\n", None])
def test_where_there_are_none_nothing_happens(monkeypatch, tmp_path, settings):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    pages = tmp_path / "enabled"
    if settings:
        pages.write_text(settings)
    monkeypatch.setattr(host_memory, "_SYSTEM", pages)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("began anew"))
    host_memory.use_huge_pages()
    assert "GLIBC_TUNABLES" not in os.environ


def test_a_caller_in_python_is_never_replaced(monkeypatch, capsys):
    monkeypatch.setattr(host_memory, "use_huge_pages", lambda: pytest.fail("began anew"))
    assert cli.run(["train", "--help"]) == 0
    assert "--workdir" in capsys.readouterr().out
