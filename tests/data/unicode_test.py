"""Texts of every script: through files, cleaning and tokens, nothing is lost but what no file can hold."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_folders import json_folder

from vixml_jax.data import fields, formats, query_lines
from vixml_jax.data.tokenizer import Tokenizer

# All code points, half surrogates included, which JSON can name and UTF-8 cannot hold.
ANY_TEXT = st.text(st.characters(), max_size=200)
MEGABYTE = 1_000_000
PLANES = {
    f"plane {plane}": "".join(chr(plane << 16 | point) for point in range(0x20, 0xFFFE, 37))
    for plane in range(17)
}
TEXTS = {
    **PLANES,
    "right to left": "\u202e\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627\u202c \u2067abc\u2069",
    "combining": "e" + "\u0301" * 10_000 + "a\u0335\u0489",
    "joined": "\U0001f468\u200d\U0001f469\u200d\U0001f467\ufe0f\U000e0067" * 50,
    "null": "a\0b\0",
    "separators": "a\u2028b\u2029c\u0085d\x0be\x1cf",
    "half surrogates": "a\ud83db\udc00c",
    "one word of a megabyte": "x" * MEGABYTE,
    "a megabyte of words": "word " * (MEGABYTE // 5),
    "a megabyte of one mark": "\u0301" * (MEGABYTE // 2),
    "a megabyte of CJK": "\u6f22" * (MEGABYTE // 3),
}


def check_clean(text: str) -> None:
    cleaned = fields.clean(text)
    cleaned.encode()
    assert fields.clean(cleaned) == cleaned
    assert "\0" not in cleaned
    assert cleaned == cleaned.strip()
    # What is neither white space, a control character nor half a character is as it was.
    kept = [c for c in text if not c.isspace() and unicodedata.category(c) not in ("Cc", "Cs")]
    assert [c for c in cleaned if unicodedata.category(c) != "Cc" and not c.isspace() and c != "\ufffd"] == [
        c for c in kept if c != "\ufffd"
    ]


@given(ANY_TEXT)
@settings(deadline=None)
def test_cleaning_keeps_all_that_can_be_kept(text):
    check_clean(text)


@pytest.mark.parametrize("name", TEXTS)
def test_cleaning_keeps_every_script(name):
    check_clean(TEXTS[name])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(
        [fields.clean(text)[:200] for text in PLANES.values()] + ["red shoe", "e\u0301"], 300
    )


@pytest.mark.parametrize("name", TEXTS)
def test_every_text_becomes_few_tokens(tokenizer, name):
    values, lengths = tokenizer.encode_batch([fields.clean(TEXTS[name]), "red shoe"], 16)
    assert (lengths <= 16).all()
    assert (values >= 0).all()
    assert (values < tokenizer.vocab_size).all()
    alone, _ = tokenizer.encode_batch(["red shoe"], 16)
    np.testing.assert_array_equal(values[lengths[0] :], alone)


@pytest.mark.parametrize("ascii_only", [True, False])
def test_every_text_comes_back_from_files(tmp_path, ascii_only):
    """As a title of a dataset, and as a query to be predicted; every line stays one line."""
    texts = [text for text in TEXTS.values() if ascii_only or not re.search("[\ud800-\udfff]", text)]
    # Two halves that meet in JSON are one character.
    wanted = [fields.clean(json.loads(json.dumps(text))) for text in texts]
    rows = [{"uid": str(i), "title": text, "content": text, "target_ind": []} for i, text in enumerate(texts)]
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    folder = json_folder(tmp_path / "raw", trn=lines)
    raw = formats.open_raw(folder)
    records = {split: list(raw.records(split)) for split in raw.splits}
    assert [record.title for record in records["train"]] == wanted
    assert [record.content for record in records["train"]] == wanted
    path = Path(tmp_path / "queries.jsonl")
    path.write_bytes("\n".join(lines).encode())
    assert [query["title"] for query in query_lines.read_queries(path)] == wanted
