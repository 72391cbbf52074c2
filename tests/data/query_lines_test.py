from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import fresh
import numpy as np
import pytest

from vixml_jax.data import text_lines
from vixml_jax.data.formats import open_raw
from vixml_jax.data.query_lines import read_queries
from vixml_jax.errors import UserError

(ENTROPY,) = fresh.seeds(1)
ALPHABET = list("ab<é漢😀 \t\n\r\0\x01\x1f\x7f\x85\xa0\u2028\ufeff\ud800\udfff")
GOOD = b'{"title": "good"}\n'


def fatal(source, name=None):
    with pytest.raises(UserError) as caught:
        list(read_queries(source, name))
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("seed", [0, ENTROPY])
def test_queries_are_cleaned_as_prepare_cleans(tmp_path, seed, encoding):
    rng = np.random.default_rng(seed)

    def text():
        return "".join(rng.choice(ALPHABET, rng.integers(0, 12)))

    records = [{"title": "é", "labels": ["x"]}]
    for _ in range(60):
        record = {"title": text(), "labels": ["x"]}
        if rng.random() < 0.7:
            record["content"] = None if rng.random() < 0.2 else text()
        if rng.random() < 0.5:
            record["uid"] = text()
        records.append(record)
    lines = []
    for record in records:
        line = json.dumps(record, ensure_ascii=bool(rng.random() < 0.5))
        try:
            lines.append(line.encode(encoding))
        except UnicodeEncodeError:
            lines.append(json.dumps(record).encode())
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\r\n".join(lines))
    prepared = list(open_raw(tmp_path).records("train"))
    queries = list(read_queries(path))
    assert [(q["uid"], q["title"], q["content"]) for q in queries] == [
        (record.uid, record.title, record.content) for record in prepared
    ]
    if encoding == "utf-8":
        assert list(read_queries(io.BytesIO(path.read_bytes()), str(path))) == queries


def test_a_source_may_be_anything_that_holds_lines(tmp_path):
    data = text_lines.BOM + '{"title": "é", "images": ["a/b.png"], "uid": 7}\n \n{"title": "b"}'.encode()
    expected = [
        {"uid": 7, "title": "é", "content": "", "images": [tmp_path / "a/b.png"]},
        {"uid": "2", "title": "b", "content": "", "images": []},
    ]
    path, packed, pipe = tmp_path / "q", tmp_path / "packed", tmp_path / "pipe"
    path.write_bytes(data)
    packed.write_bytes(gzip.compress(data))
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=[data]).start()
    for source in (path, str(packed), pipe):
        assert list(read_queries(source)) == expected
    name = str(path)
    with open(path, encoding="ascii") as text, open(packed, "rb") as stream:
        for source in (text, stream, io.BytesIO(data), io.StringIO(data.decode())):
            assert list(read_queries(source, name)) == expected
    assert next(read_queries(io.StringIO(data.decode()), "-"))["images"] == [Path.cwd() / "a/b.png"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 200_000, "not valid JSON"),
        (b'{"title": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"title": "a\0"}', "not valid JSON"),
        (b"3", "not a JSON object"),
        (b"{}", 'no "title"'),
        (b'{"title": null}', '"title" is null'),
        (b'{"title": ["a"]}', '"title" is a list'),
        (b'{"title": "a", "content": 0}', '"content" is the number 0'),
        (b'{"title": "a", "images": "a.png"}', '"images" is the text'),
        (b'{"title": "a", "images": ["a.png", 3]}', '"images" holds the number 3'),
        (b'{"title": "a", "uid": true}', '"uid" is the truth value true'),
    ],
    ids=lambda value: value[:24].decode() if isinstance(value, bytes) else "",
)
def test_a_line_that_is_no_query_is_named(tmp_path, line, problem, stream):
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    error = fatal(io.BytesIO(path.read_bytes()), str(path)) if stream else fatal(path)
    assert (error.file, error.row) == (path, 3)
    assert problem in error.problem


@pytest.mark.parametrize(
    "make",
    [
        io.BytesIO,
        lambda data: io.TextIOWrapper(io.BytesIO(data), "utf-8"),
        lambda data: io.StringIO(data.decode(errors="surrogateescape")),
    ],
)
def test_a_stream_must_be_utf_8(make):
    error = fatal(make(GOOD + GOOD + '{"title": "é"}'.encode("latin-1")), "-")
    assert str(error).startswith("-: row 3: not valid UTF-8")


def test_unreadable_files_are_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_queries(tmp_path / "none")
    with pytest.raises(UserError, match="directory"):
        read_queries(tmp_path)
    (tmp_path / "cut").write_bytes(gzip.compress(GOOD * 1000)[:-9])
    with pytest.raises(UserError, match="broken gzip"):
        read_queries(tmp_path / "cut")
    with open(tmp_path / "cut", "rb") as stream:
        assert "broken gzip" in fatal(stream, "-").problem
    (tmp_path / "wide").write_bytes(GOOD.decode().encode("utf-16"))
    with pytest.raises(UserError, match="row 1: UTF-16"):
        read_queries(tmp_path / "wide")


def test_an_endless_stream_is_read_as_it_comes():
    def lines():
        yield from itertools.repeat('{"title": " a\\u0000 "}\n')

    queries = read_queries(lines(), "-")  # type: ignore[arg-type]
    assert [query["title"] for query in itertools.islice(queries, 1000)] == ["a"] * 1000


def test_it_needs_no_jax():
    program = "import sys, vixml_jax.data.query_lines; assert not {'jax', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
