"""Executes the documentation: each page's commands and scripts, in order, as a reader would type them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import documents
import pytest
from documents import PAGES, ROOT

pytestmark = pytest.mark.slow

PAGES_RUN = [
    page
    for page in PAGES
    if any(block.language in ("sh", "python") and not block.not_run for block in documents.blocks(page))
]


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """What `make demo` leaves in runs/, but small."""
    root = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "vixml_jax", "demo", "--smoke", "--workdir=runs/demo"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    for name in ("text", "vixml", "dataset", "report.html"):  # as the whole demo has them
        (root / "runs" / "demo" / name).symlink_to(Path("smoke") / name)
    return root / "runs"


@pytest.fixture
def clone(demo, tmp_path):
    """A directory like a clone in which `make demo` has run."""
    root = tmp_path / "clone"
    bin_ = root / ".venv" / "bin"
    bin_.mkdir(parents=True)
    for name, command in {"python": "", "vixml": " -m vixml_jax"}.items():
        (bin_ / name).write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable}{command} "$@"\n')
        (bin_ / name).chmod(0o755)
    (bin_ / "activate").write_text(f'export PATH="{bin_}:$PATH"\n')
    for name in ("configs", "launch", "data_prep", "benchmarks", "Makefile"):
        (root / name).symlink_to(ROOT / name)
    shutil.copytree(demo, root / "runs", symlinks=True)
    return root


def walk(page: Path, root: Path) -> str:
    """Does what a page says, in `root`; returns what was printed."""
    script = ["set -euo pipefail"]
    if page.name != "README.md":  # which says so itself
        script.append(". .venv/bin/activate")
    for block in documents.blocks(page):
        if block.not_run:
            continue
        if block.file:
            (root / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "sh":
            script += [f": {block}", block.text]
        elif block.language == "python":
            script += [f": {block}", f"python - <<'END_OF_PYTHON'\n{block.text}END_OF_PYTHON"]
    # -v shows each line as it is read, so that an error stands below what it is about.
    done = subprocess.run(
        ["bash", "-v"], input="\n".join(script) + "\n", cwd=root, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert not done.returncode, f"{page}: exit code {done.returncode}\n{done.stdout[-8000:]}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES_RUN, ids=lambda page: page.name)
def test_a_page_does_what_it_says(page, clone):
    walk(page, clone)
    if page.name == "README.md":
        lines = (clone / "predicted.jsonl").read_text(encoding="utf-8").splitlines()
        shoe, hat = ({label["title"] for label in json.loads(line)["labels"][:2]} for line in lines)
        assert shoe == {"red", "shoes"}
        assert hat == {"blue", "hats"}
