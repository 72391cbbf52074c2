"""The commands on a trained run: what they print, write and refuse."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.sparse

from vixml_jax import XmcModel, cli, data, retrieval
from vixml_jax import config as config_lib

# ml_collections loads config files in a way that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(autouse=True)
def _quick(one_device):
    """Every test of this file."""


@pytest.fixture(scope="module")
def run(tiny_run):
    """A run with pictures, and its raw folder."""
    return tiny_run


@pytest.fixture(scope="module")
def queries(run):
    path = run / "raw" / "new.jsonl"
    records = [
        {"uid": "a", "title": "kettle number 3", "images": ["images/trn1.png"]},
        {"title": "lamp", "content": "ignored by this config"},
        {"uid": 7, "title": "", "images": ["images/there_is_none.png"]},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def fails(capsys, *arguments):
    """Runs a command that must end with exit code 2, and returns its one line."""
    assert cli.run([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


def test_predict_writes_a_line_a_query(run, queries, capsys):
    out = run / "predicted.jsonl"
    assert not cli.run(
        ["predict", f"--workdir={run / 'run'}", f"--input={queries}", f"--output={out}", "--k=4"]
    )
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["uid"] for record in records] == ["a", "1", 7]
    labels = data.load(run / "dataset").labels
    for record in records:
        assert len(record["labels"]) == 4
        scores = [label["score"] for label in record["labels"]]
        assert scores == sorted(scores, reverse=True)
        for label in record["labels"]:
            assert label["title"] == labels.titles[label["index"]]
            assert label["uid"] == labels.uids[label["index"]]


def test_eval_with_and_without_pictures(run, capsys):
    assert not cli.run(["eval", f"--workdir={run / 'run'}", "--modalities"])
    shown = capsys.readouterr().out
    matrix = json.loads((run / "run" / "modalities.json").read_text())
    labels = ("text", "text+image")
    assert set(matrix) == {
        f"{query}/{label}" for query in ("text", "image", "text+image") for label in labels
    }
    usual = json.loads((run / "run" / "metrics.json").read_text())
    assert matrix["text+image/text+image"] == pytest.approx(usual)
    # The labels of this catalogue have no pictures, its queries do.
    assert matrix["text/text"] == pytest.approx(matrix["text/text+image"])
    assert matrix["text/text"]["R@3"] < usual["R@3"]
    assert matrix["image/text"]["R@3"] != pytest.approx(usual["R@3"])
    assert f"{usual['P@1']:.2f}" in shown


def test_predict_reads_and_writes_streams(run, queries, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"title": "red kettle"}\n\n{"title": "rug"}\n'))
    assert not cli.run(["predict", f"--workdir={run / 'run'}", "--input=-", "--output=-", "--k=99"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(record["labels"]) for record in records] == [30, 30]  # all labels there are


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON"),
        ("[1]", "title"),
        ('{"title": 3}', "title"),
        ('{"title": "a", "content": 3}', "content"),
        ('{"title": "a", "images": "a.png"}', "images"),
    ],
)
def test_predict_names_the_row_it_cannot_read(run, capsys, tmp_path, line, problem):
    (tmp_path / "in.jsonl").write_text(f'{{"title": "good"}}\n{line}\n')
    command = ["predict", f"--workdir={run / 'run'}", f"--input={tmp_path / 'in.jsonl'}"]
    message = fails(capsys, *command, f"--output={tmp_path / 'out.jsonl'}")
    assert "in.jsonl: row 2" in message
    assert problem in message
    assert not (tmp_path / "out.jsonl").exists()


def test_evaluating_again_gives_the_same(run, capsys):
    copy = run / "again"
    shutil.copytree(run / "run", copy)
    before = json.loads((copy / "metrics.json").read_text())
    for name in ("metrics.json", "predictions.npz", "embeddings", "index", "index_queries"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not cli.run(["eval", f"--workdir={copy}"])
    assert json.loads((copy / "metrics.json").read_text()) == before
    for name in ("predictions.npz", "embeddings/test.npy", "index/index.json", "index_queries/index.json"):
        assert (copy / name).exists(), name


def test_overrides_alone_change_the_config_of_the_run(run, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(run / "run", workdir)
    before = config_lib.load(workdir / "config.json")
    assert not cli.run(["eval", f"--workdir={workdir}", "--config.eval.ks=(1,2)", "--config.retrieval.k=7"])
    assert "P@2" in json.loads((workdir / "metrics.json").read_text())
    before.eval.ks, before.retrieval.k = (1, 2), 7
    assert config_lib.load(workdir / "config.json").to_dict() == before.to_dict()
    problem = fails(capsys, "eval", f"--workdir={workdir}", "--config.train.seed=9")
    assert "seed" in problem  # another run
    problem = fails(capsys, "eval", f"--workdir={workdir}", "--config.eval.kss=(1,)")
    assert "did you mean config.eval.ks?" in problem


def test_a_run_is_continued_by_its_workdir_alone(run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run / "run", workdir)
    (workdir / "metrics.json").unlink()
    assert not cli.run(["train", f"--workdir={workdir}"])
    assert json.loads((workdir / "metrics.json").read_text())["P@1"] > 0


def test_the_metrics_command_agrees_with_the_run(run, capsys):
    predictions, dataset = run / "run" / "predictions.npz", run / "dataset"
    arguments = [f"--predictions={predictions}", f"--truth={dataset / 'targets_test.npz'}"]
    assert not cli.run(["metrics", *arguments, f"--train={dataset / 'targets_train.npz'}", "--json=-"])
    figures = json.loads(capsys.readouterr().out)
    expected = json.loads((run / "run" / "metrics.json").read_text())
    for name, value in figures.items():
        assert value == pytest.approx(expected[name], abs=1e-6), name


@pytest.mark.parametrize("of", ["train", "test", "labels", "new"])
def test_embed_in_three_formats(run, queries, tmp_path, of):
    source = str(queries) if of == "new" else of
    for suffix in ("npy", "parquet", "tsv"):
        out = f"--out={tmp_path / f'e.{suffix}'}"
        assert not cli.run(["embed", f"--workdir={run / 'run'}", f"--of={source}", out])
    vectors = np.load(tmp_path / "e.npy", mmap_mode="r")
    assert vectors.dtype == np.float32
    assert len(vectors) == {"train": 96, "test": 24, "labels": 30, "new": 3}[of]
    table = pq.read_table(tmp_path / "e.parquet").to_pydict()
    np.testing.assert_allclose(table["embedding"], vectors, atol=1e-5)
    np.testing.assert_allclose(np.loadtxt(tmp_path / "e.tsv", delimiter="\t"), vectors, atol=1e-5)
    metadata = (tmp_path / "e.metadata.tsv").read_text().splitlines()
    assert metadata[0] == "uid\ttitle"
    assert len(metadata) == len(vectors) + 1
    if of in ("test", "labels"):
        np.testing.assert_allclose(vectors, np.load(run / "run" / "embeddings" / f"{of}.npy"), atol=1e-5)


def test_queries_search_by_the_mean_of_their_modalities(run, tmp_path):
    """Alike in evaluation, `embed` and the Python face; here against one embedding a time."""
    workdir = shutil.copytree(run / "run", tmp_path / "run")
    override = '--config.retrieval.modalities=("text","image","text+image")'
    assert not cli.run(["eval", f"--workdir={workdir}", override, "--config.retrieval.query_weight=0.3"])
    test = data.load(run / "dataset").test
    once = XmcModel.load(run / "run")  # by the run's own setting
    wanted = []
    for text, pictures in zip(test.texts, test.images, strict=True):
        seen = [([text], [list(pictures)])]
        if len(pictures):
            seen += [([text], [[]]), ([""], [list(pictures)])]
        total = sum(once.encode_queries(*item)[0] for item in seen)
        wanted.append(total / np.linalg.norm(total))
    assert 0 < sum(len(pictures) > 0 for pictures in test.images) < len(test.images)
    found = np.load(workdir / "embeddings" / "test.npy")
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    model = XmcModel.load(workdir)
    pictures = [list(item) for item in test.images]
    np.testing.assert_allclose(model.encode_queries(test.texts, pictures), wanted, atol=1e-5)
    for of in ("test", "train"):
        assert not cli.run(["embed", f"--workdir={workdir}", f"--of={of}", f"--out={tmp_path / of}.npy"])
    np.testing.assert_allclose(np.load(tmp_path / "test.npy"), wanted, atol=1e-5)
    # Training queries that are searched too are embedded alike: each finds itself.
    train_ND = np.load(tmp_path / "train.npy")
    _, scores = retrieval.load(workdir / "index_queries").search(train_ND, 1)
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-5)
    predictions = scipy.sparse.load_npz(workdir / "predictions.npz")
    ids, scores = model.predict(test.texts, pictures, k=5)
    np.testing.assert_allclose(
        np.sort(np.take_along_axis(predictions.toarray(), ids, 1), 1)[:, ::-1], scores, atol=1e-5
    )


def test_the_saved_index_is_the_one_searched(run):
    index = retrieval.load(run / "run" / "index")
    model = XmcModel.load(run / "run")
    test = data.load(run / "dataset").test
    queries = model.encode_queries(test.texts, [list(pictures) for pictures in test.images])
    ids, _ = index.search(queries, 5)
    labels = np.load(run / "run" / "embeddings" / "labels.npy")
    np.testing.assert_array_equal(ids[:, 0], (queries @ labels.T).argmax(1))
    predictions = scipy.sparse.load_npz(run / "run" / "predictions.npz")
    assert predictions.shape == (24, 30)


def test_mistakes_take_one_line(run, tmp_path, capsys, queries):
    assert "vixml train" in fails(capsys, "eval", f"--workdir={tmp_path}")
    assert "vixml train" in fails(
        capsys, "predict", f"--workdir={tmp_path}", f"--input={queries}", "--output=-"
    )
    assert "no such file" in fails(
        capsys, "predict", f"--workdir={run / 'run'}", "--input=nowhere.jsonl", "--output=-"
    )
    assert ".npy, .parquet or .tsv" in fails(capsys, "embed", f"--workdir={run / 'run'}", "--out=a.txt")
    assert "train, test, labels" in fails(
        capsys, "embed", f"--workdir={run / 'run'}", "--of=nothing", "--out=a.npy"
    )
    config = Path(__file__).parent.parent / "configs" / "own.py"
    message = fails(
        capsys, "train", f"--config={config}", f"--workdir={tmp_path / 'w'}", "--config.optimizer.learning=1"
    )
    assert "did you mean config.optimizer." in message
    message = fails(capsys, "train", f"--config={config}", f"--workdir={tmp_path / 'w'}")
    assert "config.dataset.dir" in message


def test_a_wrong_start_does_not_bind_the_workdir(run, tmp_path, capsys):
    config = Path(__file__).parent.parent / "configs" / "own.py"
    common = ["train", f"--config={config}:smoke", f"--workdir={tmp_path / 'w'}"]
    dataset = f"--config.dataset.dir={run / 'dataset'}"
    assert "no such preset" in fails(capsys, *common, dataset, "--config.text.checkpoint=random:nothing")
    assert "not a prepared dataset" in fails(capsys, *common, f"--config.dataset.dir={tmp_path}")
    assert not cli.run([*common, dataset, "--config.train.epochs=1"])
    assert config_lib.load(tmp_path / "w" / "config.json").train.epochs == 1


def test_a_dataset_without_test_queries_says_what_to_do(tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = [json.dumps({"title": f"item {i}", "labels": [f"label {i % 3}"]}) for i in range(10)]
    (raw / "train.jsonl").write_text("\n".join(lines) + "\n")
    assert not cli.run(["prepare", f"--raw={raw}", f"--out={tmp_path / 'mine'}"])
    config = Path(__file__).parent.parent / "configs" / "own.py"
    common = ["train", f"--config={config}:smoke", f"--config.dataset.dir={tmp_path / 'mine'}"]
    assert "config.dataset.holdout" in fails(capsys, *common, f"--workdir={tmp_path / 'w'}")
    assert not cli.run([*common, f"--workdir={tmp_path / 'w'}", "--config.dataset.holdout=0.2"])
    (tmp_path / "new.jsonl").write_text('{"title": "item 1"}\n')
    predict = ["predict", f"--workdir={tmp_path / 'w'}", f"--input={tmp_path / 'new.jsonl'}"]
    assert not cli.run([*predict, f"--output={tmp_path / 'out.jsonl'}"])
    assert len(json.loads((tmp_path / "out.jsonl").read_text())["labels"]) == 3
