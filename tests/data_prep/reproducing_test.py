"""All of docs/reproducing.md, executed against a server with small files in the real downloads' formats.

What differs from the page: addresses are the server's, and rows are trained with `smoke`, on what it sent.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import documents
import fake_downloads
import pytest
from documents import ROOT
from PIL import Image

from data_prep import sources

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "reproducing.md"
# Dataset and the folder of its raw files, as the page names them.
FOLDERS = {
    "lf_amazontitles_131k": "LF-AmazonTitles-131K",
    "lf_amazon_131k": "LF-Amazon-131K",
    "mm_amazontitles_300k": "MM-AmazonTitles-300K",
    "lf_amazontitles_1p3m": "LF-AmazonTitles-1.3M",
}


def joined(text: str) -> list[str]:
    """The commands of a block, continued lines joined, comments left out."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


@pytest.fixture
def shell(tmp_path):
    """Runs a command line in a directory like a checkout; returns its exit code and what it printed."""
    for name in ("configs", "data_prep", "vixml_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, module in {"python": "", "vixml": " -m vixml_jax"}.items():
        (bin_ / name).write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable}{module} "$@"\n')
        (bin_ / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{bin_}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}

    def run(command: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.returncode, done.stdout

    return run


def serve(server, tmp_path: Path) -> None:
    """Archives of all four sets, whose connections break once, and pictures."""
    for number, colour in enumerate(("red", "blue"), 1):
        path = tmp_path / f"{number}.jpg"
        Image.new("RGB", (20, 20), colour).save(path)
        for name in (f"/{number}", f"/{number}.jpg"):
            server.add(name, path.read_bytes(), fail_first=1)
    for name, folder in FOLDERS.items():
        is_mm = name.startswith("mm")
        archive = fake_downloads.mm_zip(server.url) if is_mm else fake_downloads.raw_zip(folder)
        server.add(f"/text/{name}", archive, break_after=len(archive) // 2)
    release = fake_downloads.release(server.url)
    folders = {folder: release for source in sources.SOURCES.values() for folder in source.hub_folders[:1]}
    fake_downloads.serve_hub(server, folders, break_after=50)


def test_the_page_from_nothing_to_the_last_table(server, shell, tmp_path):
    serve(server, tmp_path)
    downloads = (
        f"--hub_url={server.url} --hub_repo={fake_downloads.REPO} --allow_private --backoff_seconds=0.001"
    )

    def as_here(command: str) -> str:
        """The page's command with the server's addresses, and rows that train in seconds."""
        if "data_prep.datasets" in command:
            name = re.search(r"--name=(\w+)", command)
            assert name is not None
            return f"{command} {downloads} --text_url={server.url}/text/{name[1]}"
        if "data_prep.images" in command:
            return f"{command} --allow_private --backoff_seconds=0.001"
        if found := re.match(r"vixml (?:train|eval) --config=configs/(\w+)\.py:", command):
            if "smoke" in command:
                return command
            command = re.sub(r"(--config=configs/\S+)", r"\1,smoke", command, count=1)
            command = command.replace("--config.classifier.epochs=100", "--config.classifier.epochs=2")
            return (
                f"{command} --config.dataset.dir=data/{found[1]} --config.dataset.demo_queries=0 "
                "--config.train.batch_size=4 --config.classifier.batch_size=4"
            )
        return command

    def do(command: str) -> str:
        if command.startswith("cp -r "):  # for whoever has trained the row of another table, and not this one
            _, _, source, target = command.split()
            config = f"configs/lf_amazontitles_131k.py:backbone={Path(source).name.replace('_', ',')}"
            do(f"vixml train --config={config} --workdir={source}")
            shell(f"rm -r {target}")
        code, printed = shell(as_here(command))
        assert code == 0, f"{command}\n{printed[-6000:]}"
        return printed

    blocks = [block for block in documents.blocks(PAGE) if block.language == "sh"]
    data = next(block for block in blocks if "data_prep.datasets" in block.text)
    first = joined(data.text)[0]

    # What goes wrong says so in a line, and the same command goes on afterwards.
    (tmp_path / "wrong").write_text(f"{'0' * 64}  LF-AmazonTitles-131K.text.zip\n")
    code, printed = shell(f"{as_here(first)} --checksums=wrong")
    assert code == 2, printed
    assert "LF-AmazonTitles-131K.text.zip" in printed.splitlines()[-1]
    code, printed = shell(f"ulimit -f 0; {as_here(first)}")  # no room for a byte
    assert code == 2, printed
    assert "Traceback" not in printed

    for block in blocks:
        if "pip install" in block.text:
            continue
        for command in joined(block.text):
            printed = do(command)
            if command.startswith("vixml tables --table=7 --collect"):
                assert "runs/lf_amazontitles_131k/qwen2.5-7b_images=3_rae" in printed
            if block is data and command == joined(data.text)[-1]:
                for name, folder in list(FOLDERS.items())[1:]:  # "The others are ..."
                    for other in joined(data.text):
                        other = other.replace("lf_amazontitles_131k", name).replace(
                            FOLDERS["lf_amazontitles_131k"], folder
                        )
                        if name.startswith("mm"):  # whose list comes with the texts
                            other = other.replace("img_urls.parquet", "img.urls.txt")
                        do(other)
    finished = {path.parent.name for path in (tmp_path / "runs").rglob("metrics.json")}
    assert {
        "3b", "qwen2.5-7b_images=3_rae", "qwen2.5-3b_images=3_rae", "distilbert_loss=ngame",
        "qwen3-embedding-4b_prompt=bare_epochs=0",
    } <= finished  # fmt: skip
    assert len(list((tmp_path / "data").glob("*/report.json"))) == len(FOLDERS)
