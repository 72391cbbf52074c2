"""Prediction: any number of queries, in order, in few shapes and in constant memory; bad lines by flag."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vixml_jax import XmcModel, cli, xmc_model


@pytest.fixture(autouse=True)
def _quick(one_device):
    """Every test of this file."""


@pytest.fixture(scope="module")
def model(tiny_run):
    import tiny

    with tiny.only_devices(1):
        return XmcModel.load(tiny_run / "run")


def test_an_embedding_is_the_same_in_any_company(model, tiny_run):
    rng = np.random.default_rng(0)
    texts = [" ".join(["kettle", "red", "number", "rug"][:n]) for n in rng.integers(1, 5, 45)]
    pictures = [[tiny_run / "raw" / "images" / "trn1.png"] * int(n) for n in rng.integers(0, 3, 45)]
    together = model.encode_queries(texts, pictures)
    for part in (slice(0, 1), slice(3, 10), slice(10, 43)):
        alone = model.encode_queries(texts[part], pictures[part], progress=False)
        np.testing.assert_allclose(alone, together[part], atol=1e-5)


def test_few_queries_meet_few_shapes(model):
    """A service must not compile for every new number of queries, lengths and pictures."""
    rng = np.random.default_rng(1)
    compiled = model._embedder._pooled
    for count in range(1, 10):
        words = [" ".join(["lamp"] * int(n)) for n in rng.integers(1, 14, count)]
        model.encode_queries(words, [[]] * count, progress=False)
    before = compiled._cache_size()
    assert before < 20
    for count in [*range(1, 10)] * 2:
        words = [" ".join(["lamp"] * int(n)) for n in rng.integers(1, 14, count)]
        model.encode_queries(words, [[]] * count, progress=False)
    assert compiled._cache_size() <= before + 5


def test_queries_are_read_as_they_are_needed_and_answered_in_order(model, monkeypatch):
    monkeypatch.setattr(xmc_model, "QUERIES_PER_CHUNK", 8)
    taken = 0

    def queries():
        nonlocal taken
        for number in range(30):
            taken += 1
            yield {"uid": number, "title": f"mug number {number}", "content": "", "images": []}

    for place, record in enumerate(model.predict_records(queries(), k=3)):
        assert record["uid"] == place
        assert taken <= (place // 8 + 1) * 8
    assert taken == 30


def test_bad_lines_are_reported_and_left_out(tiny_run, tmp_path, caplog, capsys):
    lines = ['{"title": "mug", "uid": "a"}', "{", "", '{"title": 3}', '{"title": "rug", "uid": "b"}', "\xff"]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = ["predict", f"--workdir={tiny_run / 'run'}", f"--input={tmp_path / 'in.jsonl'}"]
    command.append(f"--output={tmp_path / 'out.jsonl'}")
    assert cli.run(command) == 2
    assert "in.jsonl: row 2: not valid JSON" in capsys.readouterr().err
    assert not cli.run([*command, "--on-error=skip"])
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["uid"] for record in records] == ["a", "b"]
    for row in (2, 4, 6):
        assert f"in.jsonl: row {row}: " in caplog.text
    assert "3 lines left out" in caplog.text
    assert "predict: 2/5 queries" in capsys.readouterr().err
