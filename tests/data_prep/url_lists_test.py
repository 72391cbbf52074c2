"""Lists of picture addresses in every form in which they are handed out."""

from __future__ import annotations

import gzip

import fresh
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from data_prep import url_lists
from vixml_jax.errors import UserError

ROWS = [("a", "http://x/1"), ("b", "http://x/2,3"), ("a", "http://x/4")]


def _write(path, text):
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("form", ["vixml", "mufin", "csv", "csv.gz", "tsv", "other_columns"])
def test_read(tmp_path, form):
    if form in ("vixml", "other_columns"):
        table = pa.table({"id": [uid for uid, _ in ROWS], "url": [url for _, url in ROWS]})
        if form == "other_columns":
            table = table.append_column("UID2", pa.array([1, 2, 3])).rename_columns(
                ["UID", "image_url", "size"]
            )
        path = tmp_path / "img_urls.parquet"
        pyarrow.parquet.write_table(table, path)
    elif form == "mufin":  # no header, and a quotation mark is only a letter
        path = _write(tmp_path / "img.urls.txt", "".join(f"{uid}\t{url}\n" for uid, url in ROWS))
    elif form == "tsv":
        path = _write(tmp_path / "list.tsv", "url\tuid\n" + "".join(f"{url}\t{uid}\n" for uid, url in ROWS))
    else:
        text = "uid,url\n" + "".join(f'{uid},"{url}"\n' for uid, url in ROWS)
        path = _write(tmp_path / f"list.{form}", text)
    found = url_lists.read(path)
    assert list(zip(found["uid"].to_pylist(), found["url"].to_pylist(), strict=True)) == ROWS


def test_numbers_as_uids_and_empty_cells(tmp_path):
    path = tmp_path / "list.parquet"
    table = pa.table({"uid": [7, None, 9, 10], "url": ["http://x/1", "http://x/2", " ", "http://x/\n3"]})
    pyarrow.parquet.write_table(table, path)
    assert url_lists.read(path)["uid"].to_pylist() == ["7", None, "9", "10"]
    assert url_lists.read(path)["url"].to_pylist() == ["http://x/1", "http://x/2", None, None]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("missing.csv", None, "no such file"),
        ("list.csv", b"uid,link\na,http://x\n", r"row 1: no column url or image_url among uid, link"),
        ("list.csv", b"", "no column uid"),
        ("list.csv", b"uid,url\na,http://x\nb,c,d\n", "Expected 2 columns, got 3"),
        ("list.csv", b"uid,url\na,http://x/\xff\xfe\n", "UTF8"),
        ("list.parquet", b"PAR1 and then nothing", "cannot be read"),
        ("list.csv.gz", b"not gzip", "not a gzip file"),
    ],
)
def test_a_bad_list(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        url_lists.read(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize("per_row", [0, 1, 3])
def test_wanted_is_what_a_loop_would_pick(per_row):
    rng = np.random.default_rng(fresh.seeds(1)[0])
    uids = [None if x == 0 else f"u{x}" for x in rng.integers(0, 12, 200)]
    urls = [None if x == 0 else f"http://x/{x}" for x in rng.integers(0, 30, 200)]
    known = [[f"u{x}" for x in range(1, 5)], [f"u{x}" for x in range(4, 8)]]
    found = url_lists.wanted(pa.table({"uid": uids, "url": urls}), [pa.array(x) for x in known], per_row)
    expected = []
    for uid, url in zip(uids, urls, strict=True):
        taken = [pair for pair in expected if pair[0] == uid]
        room = not per_row or len(taken) < per_row
        if uid and url and uid in {*known[0], *known[1]} and room and (uid, url) not in taken:
            expected.append((uid, url))
    pairs = list(zip(found.uids.to_pylist(), found.urls.take(pa.array(found.url_R)).to_pylist(), strict=True))
    assert pairs == expected
    assert found.urls.to_pylist() == list(dict.fromkeys(url for _, url in expected))
    assert sum(found.skipped.values()) == len(uids) - len(expected)
