"""`python -m data_prep.datasets` against a server with small files in the formats of the real downloads."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import raw_folders
from fake_downloads import EMBEDDINGS, REPO, mm_zip, raw_zip, release, serve_hub, zipped

from data_prep import datasets, images, repository, sources
from vixml_jax import cli, files
from vixml_jax.data import formats


@pytest.fixture
def run(server, tmp_path):
    """Runs the command against the server, with pages `/text` and `/filters` and a hub."""

    def run(name: str, *flags: str) -> int:
        addresses = [f"--text_url={server.url}/text", f"--filters_url={server.url}/filters"]
        common = [
            f"--hub_url={server.url}",
            f"--hub_repo={REPO}",
            "--allow_private",
            "--backoff_seconds=0.001",
        ]
        where = [f"--out={tmp_path / 'raw'}", f"--downloads={tmp_path / 'downloads'}"]
        return cli.run_job(datasets, "datasets", [f"--name={name}", *where, *addresses, *common, *flags])

    return run


def _rows(raw: Path) -> dict[str, list[tuple]]:
    folder = formats.open_raw(raw)
    return {
        split: [(row.uid, row.title, row.targets.tolist()) for row in folder.records(split)]
        for split in folder.splits
    }


EXPECTED = {
    split: [(row["uid"], row["title"], row.get("target_ind", [])) for row in raw_folders.ROWS[short]]
    for split, short in formats.SHORT.items()
}


@pytest.mark.parametrize("packed", [True, False])
def test_raw_texts(server, run, tmp_path, capsys, packed):
    server.add("/text", raw_zip(packed=packed))
    serve_hub(server, {"LF-AmazonTitles-131K": release()})
    assert run("lf_amazontitles_131k") == 0
    raw = tmp_path / "raw"
    assert _rows(raw) == EXPECTED
    suffix = ".gz" * packed
    texts = {f"{name}.json{suffix}" for name in raw_folders.ROWS}
    others = {*repository.FILTERS, "about.json", "img_urls.parquet"}
    assert {path.name for path in raw.iterdir()} == texts | others
    shown = capsys.readouterr().out
    assert "train            4  (published: 294,805)" in shown
    assert f"data_prep.images --urls={raw / 'img_urls.parquet'}" in shown
    sums = datasets.read_checksums(tmp_path / "downloads" / "SHA256SUMS")
    assert sums["LF-AmazonTitles-131K.text.zip"] == hashlib.sha256(raw_zip(packed=packed)).hexdigest()
    assert "Ortego26" in formats.open_raw(raw).about()["citation"]
    # Nothing is done twice.
    before = server.requests.copy()
    assert run("lf_amazontitles_131k") == 0
    assert server.requests == before
    assert "has its texts already" in capsys.readouterr().out


def test_texts_after_an_arrow(server, run, tmp_path, capsys):
    server.add("/text", mm_zip())
    assert run("mm_amazontitles_300k") == 0
    raw = tmp_path / "raw"
    titles = {row["uid"]: row["title"] for rows in raw_folders.ROWS.values() for row in rows}
    for split, found in _rows(raw).items():
        assert [(uid, targets) for uid, _, targets in found] == [
            (uid, targets) for uid, _, targets in EXPECTED[split]
        ]
        for uid, title, _ in found:
            assert title == f"{titles[uid].encode('ascii', 'replace').decode()} é"
    assert not (raw / "train.raw.txt").exists()
    assert f"--urls={raw / 'img.urls.txt'}" in capsys.readouterr().out
    assert set(server.requests) == {"/text"}
    # The list of addresses is one that the next command reads.
    flags = [f"--urls={raw / 'img.urls.txt'}", f"--raw={raw}", "--retries=0"]
    assert cli.run_job(images, "images", flags) == 0
    assert "2 x 127.0.0.1 is not on the public internet" in capsys.readouterr().out


def test_what_a_killed_run_has_unpacked_goes_with_the_next(server, run, tmp_path):
    """It may be tens of gigabytes."""
    server.add("/text", raw_zip())
    left = tmp_path / "raw" / ".unpacking.0123abcd.part"
    left.mkdir(parents=True)
    (left / "trn.json").write_text("half of it")
    long_ago = time.time() - files.STALE_SECONDS - 60
    for path in (left / "trn.json", left):
        os.utime(path, (long_ago, long_ago))
    assert not run("lf_amazontitles_131k", "--parts=text")
    assert not list((tmp_path / "raw").glob(".*"))


def test_filters_from_another_archive(server, run, tmp_path, capsys):
    server.add("/text", raw_zip(filters=False))
    members = {f"x/{name}": b"1 2\n" for name in repository.FILTERS}
    bow = zipped({"LF-AmazonTitles-131K/trn_X_Xf.txt": b"1 2\n", **members})
    server.add("/filters", bow)
    assert run("lf_amazontitles_131k", "--parts=text") == 0
    assert (tmp_path / "raw" / repository.FILTERS[1]).read_text() == "1 2\n"
    assert not (tmp_path / "raw" / "trn_X_Xf.txt").exists()


def test_no_filters_at_all(server, run, capsys):
    server.add("/text", raw_zip(filters=False))
    server.add("/filters", zipped({"x/other.txt": b""}))
    assert run("lf_amazon_131k", "--parts=text") == 0
    assert "nothing is left out in evaluation" in capsys.readouterr().out


def test_embeddings_of_the_release(server, run, tmp_path):
    server.add("/text", raw_zip("LF-Amazon-1.3M"))
    # Breaks are gone on from; and the folder on the hub has the other name.
    serve_hub(server, {"sub/LF-Amazon-1.3M": release()}, break_each=6000)
    assert run("lf_amazontitles_1p3m", "--parts=embeddings") == 0
    for name in sources.EMBEDDINGS:
        np.testing.assert_array_equal(np.load(tmp_path / "raw" / name), EMBEDDINGS)
    assert any(asked for asked in server.ranges)
    assert not list((tmp_path / "raw").glob("*.part*"))


@pytest.mark.parametrize(
    ("page", "flags", "message"),
    [
        ({"status": 404}, (), "HTTP 404 Not Found; or put the file at"),
        ({"status": 500}, ("--retries=1",), "HTTP 500"),
        ({"headers": {"Content-Type": "text/html"}}, (), "a web page instead of the file"),
        ({"body": b"PK but no more"}, (), "a broken zip file"),
        ({"body": raw_zip()[:-200]}, (), "a broken zip file"),
        ({"body": zipped({"../trn.json.gz": b""})}, (), "outside its folder"),
        ({"body": zipped({"x/trn_X_Xf.txt": b""})}, (), "neither trn.json.gz nor train.raw.txt"),
        ({"body": zipped({"x/trn.json": b"{}\n"})}, (), "holds no lbl.json"),
        ({"body": raw_zip()}, ("--max_unpacked_gb=0.0000001",), "more than 0.00 GB"),
        ({"status": 302, "headers": {"Location": "file:///etc/passwd"}}, (), "neither http nor https"),
        ({}, ("--noallow_private",), "not on the public internet"),
        ({}, ("--parts=text,music",), "--parts=text,music; give some of text, image_urls, embeddings"),
        ({}, ("--checksums=none.txt",), "none.txt: no such file"),
    ],
)  # fmt: skip
def test_what_goes_wrong(server, run, tmp_path, capsys, page, flags, message):
    server.add("/text", **{"body": raw_zip(), **page})
    assert run("lf_amazontitles_131k", "--parts=text", *flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line
    assert not (tmp_path / "raw" / "about.json").exists()
    assert not list((tmp_path / "raw").glob("*")) if (tmp_path / "raw").exists() else True
    # And then it is put right.
    for path in (tmp_path / "downloads").glob("*"):
        path.unlink()
    server.add("/text", raw_zip())
    assert run("lf_amazontitles_131k", "--parts=text") == 0


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("train.raw.txt", b"a->one\nb two\nc->x\nd->y\n", "train.raw.txt: row 2: no uid before '->'"),
        ("train.raw.txt", b"a->one\n", "trn_X_Y.txt: row 1: 4 rows, but train.raw.txt has 1"),
        ("trn_X_Y.txt", b"4 3\n0:1\nx:1\n\n\n", "trn_X_Y.txt: row 3"),
    ],
)
def test_texts_that_do_not_fit(server, run, capsys, name, data, message):
    members = {}
    with zipfile.ZipFile(io.BytesIO(mm_zip())) as packed:
        members = {info.filename: packed.read(info) for info in packed.infolist()}
    path = next(path for path in members if path.endswith(name))
    server.add("/text", zipped({**members, path: data}))
    assert run("mm_amazontitles_300k") == 2
    assert message in capsys.readouterr().err


def test_checksums(server, run, tmp_path, capsys):
    server.add("/text", raw_zip())
    sums = tmp_path / "sums.txt"
    sums.write_text(f"{'0' * 64}  LF-AmazonTitles-131K.text.zip\n")
    assert run("lf_amazontitles_131k", "--parts=text", f"--checksums={sums}") == 2
    assert f"instead of {'0' * 64}" in capsys.readouterr().err
    sums.write_text(
        f"\n{hashlib.sha256(raw_zip()).hexdigest().upper()} *some/where/LF-AmazonTitles-131K.text.zip\n"
    )
    assert run("lf_amazontitles_131k", "--parts=text", f"--checksums={sums}") == 0
    sums.write_text("\n\nnonsense\n")
    assert run("lf_amazontitles_131k", "--parts=text", f"--checksums={sums}") == 2
    assert "row 3: not a checksum" in capsys.readouterr().err


def test_hubs_that_have_no_such_thing(server, run, capsys):
    server.add("/text", raw_zip())
    at = f"/api/datasets/{REPO}/tree/main?recursive=true"
    assert run("lf_amazontitles_131k") == 2
    assert "HTTP 404" in capsys.readouterr().err
    for body in (b"<html>", b"{}", b'[{"type": "file"}]', b'{"error": "x"}'):
        server.add(at, body)
        assert run("lf_amazontitles_131k") == 2
        assert "not a list of files" in capsys.readouterr().err or body == b"{}"
    serve_hub(server, {"MM-AmazonTitles-300K": release()})
    assert run("lf_amazontitles_131k") == 2
    error = capsys.readouterr().err
    assert "no img_urls.parquet below LF-AmazonTitles-131K or LF-Amazon-131K" in error
    assert "MM-AmazonTitles-300K" in error
    files = release()
    serve_hub(server, {"LF-AmazonTitles-131K": files})
    server.add(f"/cdn/LF-AmazonTitles-131K/{sources.URL_LIST}", files[sources.URL_LIST][::-1])
    assert run("lf_amazontitles_131k") == 2
    assert "its SHA-256 is" in capsys.readouterr().err


def test_dry_run_and_help(tmp_path, capsys):
    flags = ["--name=lf_amazontitles_1p3m", f"--out={tmp_path / 'raw'}", "--dry_run"]
    assert cli.run_job(datasets, "datasets", [*flags, "--parts=text,image_urls,embeddings"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("https://drive.usercontent.google.com/download?id=") == 2
    assert shown.count("https://huggingface.co/datasets/Diegooor/vixml_data") == 7
    assert not (tmp_path / "raw").exists()
    for name, source in sources.SOURCES.items():
        rows = [f"{count:,}" for count in dataclasses.asdict(source)["rows"].values()]
        line = next(line for line in datasets.__doc__.splitlines() if name in line)
        assert [part for part in line.split() if part in rows] == rows
