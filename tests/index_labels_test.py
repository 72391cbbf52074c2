"""`vixml index` on a trained run: building, adding and removing labels, and what predictions make of it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import scipy.sparse
import tiny

from vixml_jax import XmcModel, cli, index_labels, retrieval
from vixml_jax import config as config_lib
from vixml_jax.added_labels import ADDED
from vixml_jax.checkpoint import steps_in
from vixml_jax.search import OF


@pytest.fixture(autouse=True)
def _quick(one_device):
    """Every test of this file."""


@pytest.fixture
def workdir(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    return tmp_path / "run"


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_long_list_of_uids_is_no_file_name():
    uids = [f"label{number}" for number in range(100)]
    assert index_labels.read_uids(",".join(uids)) == uids


def index(workdir, *arguments):
    return cli.run(["index", f"--workdir={workdir}", *map(str, arguments)])


def found(model, text, k=40):
    """{uid: (place, number, title)} of the labels predicted for a text."""
    (record,) = model.predict_records(iter([{"uid": 0, "title": text, "content": "", "images": []}]), k)
    return {
        label["uid"]: (place, label["index"], label["title"]) for place, label in enumerate(record["labels"])
    }


def newer_checkpoint(workdir):
    """The same checkpoint as that of a later step: what was computed from the old one is stale."""
    step = max(steps_in(workdir / "checkpoints"))
    os.rename(workdir / "checkpoints" / str(step), workdir / "checkpoints" / str(step + 1))


def test_near_training_queries_hand_a_new_label_shares_of_what_its_lenders_get(workdir, tmp_path):
    config = config_lib.load(workdir / "config.json")
    config.retrieval.query_weight, config.retrieval.kind = 0.5, "exact"
    config_lib.save(config, workdir / "config.json")
    assert not index(workdir)
    model = XmcModel.load(workdir)
    before = model.predict(["blue lamp"], k=30)
    best = min(found(model, "blue lamp").values())
    labels = write(tmp_path / "new.jsonl", {"uid": "x", "title": f"{best[2]} new"})
    assert not index(workdir, f"--add={labels}")

    model = XmcModel.load(workdir)
    queries_QD = model.encode_queries(["blue lamp"])
    lent = model.searcher.search(queries_QD, 31)
    nothing = scipy.sparse.csr_matrix(np.eye(30, 31, dtype=np.float32))
    own = dataclasses.replace(model.searcher, lending=nothing).search(queries_QD, 31)
    lent, own = (float(result.scores[result.ids == 30][0]) for result in (lent, own))
    shares_L = model.searcher.lending.toarray()[:, 30]
    assert shares_L.sum() == pytest.approx(1, rel=1e-5)
    (_, label_scores), (near, near_scores) = model.searcher.candidates(queries_QD, 31)
    weights = np.exp(np.concatenate([label_scores[0], near_scores[0]]) / config.retrieval.temperature)
    handed_L = (weights[-len(near[0]) :] / weights.sum()) @ model.searcher.train_targets[near[0]].toarray()
    assert lent == pytest.approx(own + 0.5 * shares_L @ handed_L, rel=1e-4)
    assert lent > own

    (tmp_path / "gone.txt").write_text("x\n")
    assert not index(workdir, f"--remove={tmp_path / 'gone.txt'}")
    after = XmcModel.load(workdir).predict(["blue lamp"], k=30)
    for got, wanted in zip(after, before, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_building_takes_flags_into_the_config_and_tells_what_it_measured(workdir, capsys):
    assert not index(workdir, "--kind=exact", "--dtype=int8", "--dims=32", "--k=7")
    out = capsys.readouterr().out
    measured = json.loads((workdir / "index" / "index.json").read_text())["measured"]
    assert 0.5 < measured["recall"] <= 1
    assert f"{measured['recall']:.4g}" in out
    assert (measured["k"], measured["dtype"]) == (7, "int8")
    settings = config_lib.load(workdir / "config.json").retrieval
    assert (settings.kind, settings.dtype, settings.dims, settings.k) == ("exact", "int8", 32, 7)
    model = XmcModel.load(workdir)
    assert model.searcher.labels.dim == 32
    assert model.encode_queries(["kettle"]).shape == (1, model.dim)
    assert (model.predict(["kettle"], k=9)[0] >= 0).all()


def test_scann_is_tuned_by_the_flags_with_dashes(workdir, capsys):
    assert not index(workdir, "--kind=scann", "--target-recall=0.9", "--k=5")
    measured = json.loads((workdir / "index" / "index.json").read_text())["measured"]
    assert (measured["target_recall"], measured["k"]) == (0.9, 5)
    assert "recall" in capsys.readouterr().out


def test_labels_come_and_go(tiny_run, workdir, tmp_path, capsys):
    """Added ones are found by uid and title under numbers after the known ones; removed ones never."""
    before = XmcModel.load(workdir)
    assert len(found(before, "kettle")) == 30
    picture = tiny_run / "raw" / "images" / "trn1.png"
    labels = write(
        tmp_path / "new.jsonl",
        {"uid": "teapot", "title": "white kettle", "images": [str(picture)]},
        {"uid": 77, "title": "chair of oak"},
        {"uid": "l3", "title": "a wholly different text"},
    )
    assert not index(workdir, f"--add={labels}", "--remove=l5,l0")
    assert "2 labels added, 1 replaced, 2 removed; 30 labels" in capsys.readouterr().out
    model = XmcModel.load(workdir)
    seen = found(model, "kettle")
    assert len(seen) == 30
    assert not {"l5", "l0"} & set(seen)
    assert seen["teapot"][1:] == (30, "white kettle")
    assert seen["77"][1:] == (31, "chair of oak")
    assert seen["l3"][1:] == (3, "a wholly different text")
    numbers, _ = model.predict(["kettle"], k=40)
    assert (numbers == 30).sum() == 1

    # The embedding is the one that encode_labels gives, and what stays scores as it did.
    vector = model.encode_labels(["chair of oak"])[0]
    query = model.encode_queries(["chair"])[0]
    plain = model.searcher.patched.search(query[None], 40)
    place = plain[0][0].tolist().index(31)
    np.testing.assert_allclose(plain[1][0, place], query @ vector, atol=1e-5)

    # A second --add of a uid replaces it; a removed one comes back under its number.
    again = write(tmp_path / "again.jsonl", {"uid": "77", "title": "bench"}, {"uid": "l5", "title": "rug"})
    assert not index(workdir, f"--add={again}")
    assert not index(workdir, "--remove=teapot")
    seen = found(XmcModel.load(workdir), "kettle")
    assert seen["77"][1:] == (31, "bench")
    assert seen["l5"][1:] == (5, "rug")
    assert "teapot" not in seen


def test_changes_outlive_a_checkpoint_and_a_rebuilt_index(workdir, tmp_path, monkeypatch, capsys):
    labels = write(tmp_path / "new.jsonl", {"uid": "x", "title": "blue bench"}, {"uid": "y", "title": "mug"})
    (tmp_path / "gone.txt").write_text("l1\n\nl2\n")
    assert not index(workdir, f"--add={labels}", f"--remove={tmp_path / 'gone.txt'}")
    expected = found(XmcModel.load(workdir), "blue lamp")
    assert {"x", "y"} < set(expected)
    assert not {"l1", "l2"} & set(expected)

    # When changes are many the index takes them in; then nothing is searched beside it.
    monkeypatch.setattr(index_labels, "MANY", 0)
    monkeypatch.setattr(index_labels, "MANY_SHARE", 0)
    (tmp_path / "one.txt").write_text("l3\n")
    assert not index(workdir, f"--remove={tmp_path / 'one.txt'}")
    assert "built anew" in capsys.readouterr().out
    assert retrieval.load(workdir / "index").num_labels == 29
    model = XmcModel.load(workdir)
    assert not model.searcher.pending(model.changes)
    after = found(model, "blue lamp")
    assert set(after) == set(expected) - {"l3"}
    assert [after[uid][1:] for uid in after] == [expected[uid][1:] for uid in after]

    newer_checkpoint(workdir)
    assert found(XmcModel.load(workdir), "blue lamp") == after

    # An evaluation is of the dataset's labels alone, and leaves the changes as they are.
    assert not cli.run(["eval", f"--workdir={workdir}"])
    assert json.loads((workdir / OF).read_text())["changes"] == {}
    assert found(XmcModel.load(workdir), "blue lamp") == after


def test_damaged_embeddings_are_refused_by_name(workdir, tmp_path, capsys):
    labels = write(tmp_path / "new.jsonl", {"uid": "x", "title": "bench"})
    assert not index(workdir, f"--add={labels}")
    content = (workdir / ADDED).read_bytes()
    queries = write(tmp_path / "queries.jsonl", {"title": "mug"})
    predict = ["predict", f"--workdir={workdir}", f"--input={queries}", f"--output={tmp_path / 'o'}"]
    for damaged in (content[:-40], b"", b"{}"):
        (workdir / ADDED).write_bytes(damaged)
        assert cli.run(predict) == 2
        assert f"{ADDED}: damaged" in capsys.readouterr().err
    (workdir / ADDED).unlink()
    assert not cli.run(predict)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"title": "a"}', 'no "uid"'),
        ('{"uid": "", "title": "a"}', 'no "uid"'),
        ('{"uid": "a"}', 'no "title"'),
        ('{"uid": "a", "title": " "}', "without text and pictures"),
        ('{"uid": "good", "title": "a"}', "stands in row 1 already"),
        ('{"uid": "a", "title": "a", "images": ["none.png"]}', "none.png is missing"),
        ("{", "not valid JSON"),
    ],
)
def test_a_wrong_label_is_named_and_nothing_changes(workdir, tmp_path, capsys, line, problem):
    path = tmp_path / "new.jsonl"
    path.write_text('{"uid": "good", "title": "good"}\n' + line + "\n")
    assert index(workdir, f"--add={path}") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "new.jsonl: row 2" in message
    assert problem in message
    assert not (workdir / "labels_changed").exists()


def test_mistakes_take_one_line(workdir, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n")
    for arguments, problem in (
        ((f"--add={tmp_path / 'empty.jsonl'}",), "no labels"),
        ((f"--add={tmp_path / 'nowhere.jsonl'}",), "no such file"),
        (("--remove=nobody",), "no label has the uid 'nobody'"),
        (("--remove=,",), "no uids"),
        (("--kind=fast",), "kind"),
        (("--kind=scann", "--dtype=int8"), "ScaNN has codes of its own"),
        (("--dims=100000",), "config.retrieval.dims=100000"),
        (("--target-recal=1",), "did you mean --target_recall"),
    ):
        before = (workdir / "config.json").read_text()
        assert index(workdir, *arguments) == 2, arguments
        assert problem in capsys.readouterr().err.strip().splitlines()[-1]
        assert (workdir / "config.json").read_text() == before
    assert cli.run(["index"]) == 2


def test_the_shared_run_is_whole(tiny_run):
    """Tests of this file work on copies."""
    assert not (tiny_run / "run" / "labels_changed").exists()
    assert tiny.config(tiny_run / "dataset").retrieval.kind == "exact"
