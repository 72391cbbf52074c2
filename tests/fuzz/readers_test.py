"""Whatever a file holds, its reader gives a value or a UserError: see `campaign`.

What earlier campaigns have found stands in FOUND, and is tried every time.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import campaign
import fresh
import mutations
import numpy as np
import pytest
import readers
import scipy.sparse
import tower_readers
from reader import Reader, npy

HERE = Path(__file__).parent
QUICK, LONG = {True: 100, False: 10}, {True: 100_000, False: 3_000}


@pytest.mark.parametrize("name", readers.READERS)
def test_changed_files_are_read_or_refused(name):
    (seed,) = fresh.seeds(1)
    reader = readers.READERS[name]
    figures = campaign.run(reader, QUICK[reader.cheap], seed)
    assert figures["inputs"] == QUICK[reader.cheap]


@pytest.mark.slow
@pytest.mark.parametrize("name", readers.READERS)
def test_a_hundred_thousand_changed_files(name, tmp_path):
    """In a process of its own, whose memory has a bound."""
    (seed,) = fresh.seeds(1)
    inputs = LONG[readers.READERS[name].cheap]
    command = [
        sys.executable,
        HERE / "campaign.py",
        f"--reader={name}",
        f"--inputs={inputs}",
        f"--seed={seed}",
    ]
    environment = {**os.environ, "PYTHONPATH": os.fspath(HERE.parent.parent), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert json.loads(done.stdout.splitlines()[-1])["inputs"] == inputs


def test_the_campaign_sees_what_is_no_refusal(tmp_path):
    """A reader that lets an error of its own through, one that hangs, one that says two lines."""

    def fault(kind):
        def use(folder, name):
            if (folder / name).read_bytes() == b"good":
                return
            raise kind

        return Reader("bad", lambda: {"x": [b"good"]}, use)

    for kind in (KeyError("a"), MemoryError(), RecursionError(), SystemExit(2), AssertionError()):
        with pytest.raises(campaign.Broken, match="bad: x: "):
            campaign.check(fault(kind), tmp_path, "x", b"other")
    assert campaign.check(fault(KeyError()), tmp_path, "x", b"good")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["json_folder", "hf_safetensors", "sparse", "overrides"])
def test_changes_reach_what_is_packed(name):
    """Of a thousand changes of a seed, many are read and many refused: neither all whole nor all broken."""
    rng = np.random.default_rng(0)
    seeds = [data for found in readers.READERS[name].seeds.values() for data in found]
    changed = {mutations.mutated(seed, rng, seeds) for seed in seeds for _ in range(20)}
    assert len(changed) > 15 * len(seeds)
    assert all(len(data) <= mutations.MOST_BYTES for data in changed)


def packed(**members: bytes) -> bytes:
    """A zip archive, as .npz files are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def columns_first(rows: int) -> bytes:
    """A matrix that does not store its rows, in an archive."""
    buffer = io.BytesIO()
    scipy.sparse.save_npz(buffer, scipy.sparse.coo_matrix(([1.0], ([0], [1])), (rows, 2)))
    return buffer.getvalue()


def ends_empty() -> bytes:
    """A matrix by columns that says it is empty, with a column before that reaches beyond all memory."""
    buffer = io.BytesIO()
    starts = np.array([0, 2**30, 2**30, 2**30, 0], np.int32)
    np.savez(buffer, format=b"csc", shape=(3, 4), indices=starts[:0], indptr=starts, data=np.zeros(0))
    return buffer.getvalue()


TOKENIZER = readers.READERS["tokenizer"].seeds["tokenizer.json"][0]
UNKNOWN = re.sub(rb'"unk_token": *"[^"]*"', b'"unk_token":"[NONE]"', TOKENIZER)
PARQUET = readers.READERS["url_lists"].seeds["urls.parquet"][0]
# (reader, file, content) of faults that are repaired; all of them are refused now.
FOUND = {
    "a member that is no array": ("sparse", "matrix.npz", packed(format=b"csr", shape=b"", data=b"")),
    "a label of 5000 digits": ("predictions", "predictions.txt", b"2 5\n" + b"9" * 5000 + b":1\n"),
    "null for a row": ("predictions", "predictions.jsonl", b"null\n"),
    "a value of many digits": ("sparse", "matrix.txt", b"1 2\n1:" + b"9" * 250_000 + b"-\n"),
    "rows without end": ("sparse", "matrix.txt", b"922337203 4\n"),
    "columns first, and rows without end": ("sparse", "matrix.npz", columns_first(2**31 - 1)),
    "columns that go back": ("sparse", "matrix.npz", ends_empty()),
    "a name of brackets": ("overrides", "overrides", b"\n" + b'm{"a":' * 300),
    "cuts that are texts": ("overrides", "overrides", b"\neval.ks=('a',1)"),
    "a rate that is no number": ("overrides", "overrides", b"\noptimizer.weight_decay=nan"),
    "a seed beyond JAX's": ("overrides", "overrides", b"\ntrain.seed=99999999999"),
    "a field of another type": ("config_json", "config.json", b'{"prototype": {"free_vectors": 0.5}}'),
    "a number beyond floats": (
        "config_json",
        "config.json",
        b'{"optimizer": {"lr": 1' + b"0" * 400 + b"}}",
    ),
    "a token with an id beyond its type": (
        "tokenizer",
        "tokenizer.json",
        TOKENIZER.replace(b'"[CLS]",2]', b'"[CLS]",2147483648]'),
    ),
    "an unknown token that is unknown": ("tokenizer", "tokenizer.json", UNKNOWN),
    "an array of texts": ("arrays", "embeddings.npy", npy(np.zeros((0, 2), "S2"))),
    "a number for a section": ("config_json", "config.json", b'{"prototype": 3}'),
    "a list for a config": ("config_json", "config.json", b"[]"),
    "an unfinished header": (
        "added_labels",
        "index_added.npz",
        packed(step=b"\x93NUMPY\x01\x00\x10\x00{'descr': (     "),
    ),
    "layers without end": (
        "hf_config",
        "config.json",
        json.dumps({**tower_readers.HF_CONFIGS[2], "num_hidden_layers": 2**31}).encode(),
    ),
    "a broken footer": ("url_lists", "urls.parquet", PARQUET[:4] + PARQUET[-9:3:-1] + PARQUET[-8:]),
}


@pytest.mark.parametrize("fault", FOUND)
def test_what_was_found_stays_repaired(fault, tmp_path):
    name, file, data = FOUND[fault]
    reader = readers.READERS[name]
    reader.prepare(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not campaign.check(reader, tmp_path, file, data)


@pytest.mark.parametrize(
    "text",
    [
        b'{"step": 1' + b"0" * 400 + b', "train/loss": 1}\n',
        b'{"train/loss": 1}\n',
        b"3\n",
        b'{"step": [1], "train/loss": 1}\n',
        b"\xff",
    ],
)
def test_records_that_are_none_are_passed_over(text, tmp_path):
    assert campaign.check(readers.READERS["metrics_jsonl"], tmp_path, "metrics.jsonl", text)


def test_sums_of_a_name_that_no_file_can_have(tmp_path):
    reader = readers.READERS["checkpoint_sums"]
    reader.prepare(tmp_path)
    for name in ("x" * 5000, "../../etc/passwd", "a\0b", "/"):
        assert campaign.check(reader, tmp_path, "3.json", json.dumps({name: [1, 2]}).encode())
