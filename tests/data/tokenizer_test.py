import json
import subprocess
import sys

import numpy as np
import pytest
import transformers

from vixml_jax.data import token_bank
from vixml_jax.data.ragged import Ragged
from vixml_jax.data.tokenizer import Tokenizer
from vixml_jax.errors import UserError

TEXTS = [
    "Red shoe, size 42",
    "a blue kettle",
    "",
    "Ölbild naïve",
    "kettle " * 5,
    "👢 boot",
]


@pytest.fixture
def trained():
    return Tokenizer.train(TEXTS * 3, 120)


def rows_of(tokenizer, texts, max_tokens=32):
    values, lengths = tokenizer.encode_batch(texts, max_tokens)
    assert values.dtype == np.int32
    assert lengths.dtype == np.int64
    return [row.tolist() for row in np.split(values, np.cumsum(lengths)[:-1])]


def test_texts_stand_between_cls_and_sep(trained):
    rows = rows_of(trained, TEXTS)
    assert len(rows) == len(TEXTS)
    assert all(row[0] == 2 and row[-1] == 3 for row in rows)
    assert rows[2] == [2, 3]  # nothing but them
    assert max(map(max, rows)) < trained.vocab_size <= 120


def test_long_texts_are_cut_and_keep_their_end_token(trained):
    whole = rows_of(trained, TEXTS)
    for row, cut in zip(whole, rows_of(trained, TEXTS, 5), strict=True):
        assert cut == (row if len(row) <= 5 else [*row[:4], 3])
    assert rows_of(trained, TEXTS) == whole  # the cut leaves nothing behind


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_special_tokens_leave_room_for_a_text(trained, max_tokens):
    with pytest.raises(UserError, match="no room for a text beside 2 special tokens; give 3 or more"):
        trained.encode_batch(TEXTS, max_tokens)
    assert max(map(len, rows_of(trained, TEXTS, 3))) == 3


def test_saved_and_loaded_it_is_the_same(trained, tmp_path):
    trained.save(tmp_path / "tokenizer")
    loaded = Tokenizer.load(tmp_path / "tokenizer")
    assert loaded.fingerprint == trained.fingerprint
    assert loaded.vocab_size == trained.vocab_size
    assert rows_of(loaded, TEXTS) == rows_of(trained, TEXTS)
    assert Tokenizer.train(TEXTS, 60).fingerprint != trained.fingerprint


@pytest.mark.parametrize("keep", ["tokenizer.json", "vocab.txt"])
def test_a_checkpoints_own_tokenizer_gives_what_transformers_gives(trained, tmp_path, keep):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "shoe", ",", "size", "4", "##2", "a",
              "blue", "kettle", "o", "##l", "##bild", "naive", "boot"]  # fmt: skip
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    if keep == "tokenizer.json":
        # Published files have padding and truncation of their own.
        reference.backend_tokenizer.enable_padding(length=64)
        reference.backend_tokenizer.enable_truncation(3)
        (tmp_path / "tokenizer.json").write_text(reference.backend_tokenizer.to_str())
        (tmp_path / "vocab.txt").unlink()
        reference.backend_tokenizer.no_padding()
    expected = reference(TEXTS, truncation=True, max_length=6)["input_ids"]
    assert rows_of(Tokenizer.load(tmp_path), TEXTS, 6) == expected


def test_training_gives_the_same_ids_in_every_process():
    texts = TEXTS * 3 + [f"thing {number} {number * 7}" for number in range(200)]
    program = (
        f"from vixml_jax.data.tokenizer import Tokenizer as T\nprint(T.train({texts!r}, 150).fingerprint)"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(3)]
    assert len({run.stdout for run in runs}) == 1, runs[0].stderr
    assert runs[0].stdout.strip()


def test_no_tokenizer_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_the_bank_is_made_once_and_anew_when_anything_changes(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(token_bank, "TEXTS_AT_ONCE", 4)
    bank = token_bank.build_or_load(TEXTS, trained, 8, tmp_path, ["a"])
    assert [bank[i].tolist() for i in range(len(bank))] == rows_of(trained, TEXTS, 8)

    calls = []
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda *args: calls.append(1) or encode(*args))
    again = token_bank.build_or_load(TEXTS, trained, 8, tmp_path, ["a"])
    assert isinstance(again, Ragged)
    assert not calls
    np.testing.assert_array_equal(again.values, bank.values)
    for changed in (
        (TEXTS, trained, 9, tmp_path, ["a"]),
        (TEXTS, trained, 8, tmp_path, ["b"]),
        (TEXTS, Tokenizer.train(TEXTS, 70), 8, tmp_path, ["a"]),
    ):
        calls.clear()
        token_bank.build_or_load(*changed)
        assert calls


def test_a_bank_that_is_broken_off_leaves_nothing(trained, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("stopped")

    monkeypatch.setattr(Tokenizer, "encode_batch", broken)
    with pytest.raises(RuntimeError):
        token_bank.build_or_load(TEXTS, trained, 8, tmp_path, ["a"])
    assert not list(tmp_path.iterdir())


_BERT = {"config.json": b'{"model_type": "bert"}'}


@pytest.mark.parametrize(
    "content",
    [
        _BERT,  # of which transformers makes a tokenizer that knows no word
        {**_BERT, "vocab.txt": b""},
        {**_BERT, "vocab.txt": b"\xff\xfe\x00"},
        {"config.json": b"[]", "vocab.txt": b"[PAD]\na\n"},
        {"config.json": b'{"model_type": "gpt2"}', "vocab.json": b"[]", "merges.txt": b"x"},
        {
            "config.json": b'{"model_type": "qwen2"}',
            "vocab.json": b'{"a": 0}',
            "merges.txt": b"#version\nq w",
        },
    ],
    ids=["no words", "empty", "bytes", "config", "vocabulary", "merges"],
)
def test_older_files_that_are_broken_are_one_line(content, tmp_path):
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=r"no tokenizer \(.+\); give a Hugging Face directory"):
        Tokenizer.load(tmp_path)
