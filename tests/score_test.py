from __future__ import annotations

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse

from vixml_jax import cli, metrics, score
from vixml_jax.data import predictions_file, sparse_text
from vixml_jax.errors import UserError


@pytest.fixture
def case(tmp_path):
    """Truth, training labels, predictions and filter pairs, as matrices and as files."""
    rng = np.random.default_rng(0)

    def sparse(rows: int, share: float, values) -> scipy.sparse.csr_matrix:
        kept = rng.random((rows, 40)) < share
        matrix = scipy.sparse.csr_matrix(kept.astype(np.float32))
        matrix.data = values(matrix.nnz).astype(np.float32)
        return matrix

    truth, train = sparse(30, 0.1, np.ones), sparse(50, 0.1, np.ones)
    predictions = sparse(30, 0.5, lambda n: rng.integers(-4, 5, n) / 8)  # exact in text; some stored zeros
    pairs = np.argwhere(rng.random((30, 40)) < 0.05)
    sparse_text.write_sparse_text(tmp_path / "truth.txt", truth)
    sparse_text.write_sparse_text(tmp_path / "train.txt", train)
    scipy.sparse.save_npz(tmp_path / "train.npz", train)
    scipy.sparse.save_npz(tmp_path / "truth.npz", truth)
    sparse_text.write_sparse_text(tmp_path / "predictions.txt", predictions)
    predictions_file.write_npz(tmp_path / "predictions.npz", predictions)
    lines = [
        json.dumps(
            {
                "uid": f"q{i}",
                "labels": [
                    {
                        "index": int(label),
                        "uid": str(label),
                        "title": 'a "label": {3}\n',
                        "score": float(value),
                    }
                    for label, value in zip(row.indices[::-1], row.data[::-1], strict=True)
                ],
            }
        )
        for i, row in enumerate(predictions)
    ]
    (tmp_path / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "predictions.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    np.savetxt(tmp_path / "filter.txt", pairs, fmt="%d")
    wanted = metrics.evaluate(predictions, truth, train, (1, 7), 0.6, 2.6, pairs)
    return tmp_path, wanted


def flags_of(
    folder, predictions: str = "predictions.npz", truth: str = "truth.txt", **more: str
) -> list[str]:
    files = {"predictions": folder / predictions, "truth": folder / truth}
    return ["metrics", *(f"--{name}={value}" for name, value in {**files, **more}.items())]


@pytest.mark.parametrize("predictions", ["txt", "npz", "jsonl", "jsonl.gz"])
@pytest.mark.parametrize("kind", ["txt", "npz"])
def test_every_kind_of_file_gives_the_same_figures(case, predictions, kind, capsys):
    folder, wanted = case
    flags = flags_of(folder, f"predictions.{predictions}", f"truth.{kind}", train=folder / f"train.{kind}",
                     filter=folder / "filter.txt", A="0.6", B="2.6", ks="1,7", json="-")  # fmt: skip
    assert cli.run(flags) == 0
    got = json.loads(capsys.readouterr().out)
    assert list(got) == list(wanted)
    assert got == pytest.approx(wanted, abs=1e-9)


def test_table_and_json_file(case, capsys):
    folder, _ = case
    assert cli.run([*flags_of(folder), f"--json={folder}/new/figures.json"]) == 0
    shown = capsys.readouterr().out
    figures = json.loads((folder / "new" / "figures.json").read_text())
    assert not [name for name in figures if name.startswith("PS")]
    line = next(line for line in shown.splitlines() if line.startswith("nDCG"))
    assert line.split() == ["nDCG", "@1", f"{figures['nDCG@1']:.2f}", "@3", f"{figures['nDCG@3']:.2f}",
                            "@5", f"{figures['nDCG@5']:.2f}"]  # fmt: skip


def test_from_python(case):
    folder, wanted = case
    got = score.score(folder / "predictions.txt", folder / "truth.npz", train=folder / "train.txt",
                      filter_pairs=folder / "filter.txt", ks=(1, 7), A=0.6, B=2.6)  # fmt: skip
    assert got == pytest.approx(wanted, abs=1e-9)


def fails(capsys, flags: list[str]) -> str:
    """The one line that a wrong command line gives."""
    assert cli.run(flags) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.count("\n") == 1
    return captured.err


def test_files_that_do_not_fit_are_both_named(case, capsys):
    folder, _ = case
    sparse_text.write_sparse_text(folder / "wide.txt", scipy.sparse.csr_matrix((5, 41), dtype=np.float32))
    line = fails(capsys, flags_of(folder, train=folder / "wide.txt"))
    assert "truth.txt" in line
    assert f"40 labels, but {folder}/wide.txt has 41" in line
    line = fails(capsys, flags_of(folder, predictions="wide.txt"))
    assert f"wide.txt: 5 rows and 41 labels, but {folder}/truth.txt has 30 and 40" in line
    (folder / "bad_filter.txt").write_text("0 1\n30 2\n")
    line = fails(capsys, flags_of(folder, filter=folder / "bad_filter.txt"))
    assert "bad_filter.txt: pair 30 2, but" in line
    assert "truth.txt has 30 rows" in line


def test_mistakes_in_flags(case, capsys):
    folder, _ = case
    assert "metrics needs --truth" in fails(capsys, ["metrics", f"--predictions={folder}/predictions.npz"])
    for ks in ("0", "1,x", "", "-1", "1.5"):
        assert "whole numbers of at least 1" in fails(capsys, flags_of(folder, ks=ks))
    assert "--A=x is not a number" in fails(capsys, flags_of(folder, A="x"))
    assert "no such file" in fails(capsys, flags_of(folder, predictions="nothing.npz"))
    assert "no such file" in fails(capsys, flags_of(folder, predictions="nothing.jsonl"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ('{"labels": [{"index": 3, "score": NaN}]}', "score of label 3 is not a number"),
        ('{"labels": [{"index": 40, "score": 1}]}', "label 40 of 40 labels"),
        ('{"labels": [{"index": -1, "score": 1}]}', "label -1 of 40 labels"),
        ('{"labels": [{"index": "3", "score": 1}]}', 'without "index" and "score"'),
        ('{"labels": [{"index": 3}]}', 'without "index" and "score"'),
        ('{"labels": [{"index": true, "score": 1}]}', 'without "index" and "score"'),
        ('{"labels": [3]}', 'without "index" and "score"'),
        ('{"labels": null}', 'no list "labels"'),
        ('{"label": []}', 'no list "labels"'),
        ("[]", 'no list "labels"'),
        ("[" * 100_000, "not valid JSON"),
        ('{"labels": [{"index": ' + "9" * 5000 + ', "score": 1}]}', "not valid JSON"),
        ('{"labels": [{"index": 3, "score": ' + "9" * 400 + "}]}", "score of label 3 is too large"),
        ('{"labels": [{"index": 3, "score": -' + "9" * 400 + "}]}", "score of label 3 is too large"),
        ('{"labels": [{"index": 3, "score": "1"}]}', 'without "index" and "score"'),
    ],
    ids=range(16),
)
def test_wrong_lines_of_jsonl(tmp_path, line, message):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"labels": [{"index": 39, "score": 1}]}\n' + line + '\n{"labels": []}\n')
    with pytest.raises(UserError) as error:
        predictions_file.read(path, 40)
    assert f"{path}: row 2: " in str(error.value)
    assert message in str(error.value)


def test_a_score_beyond_float32_is_infinite(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"labels": [{"index": 0, "score": 1e300}, {"index": 1, "score": -1e300}]}\n')
    np.testing.assert_array_equal(predictions_file.read(path).data, [np.inf, -np.inf])


def test_unusual_jsonl(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text(
        '{"labels": [{"index": 2, "score": 1}, {"index": 0, "score": -Infinity}, '
        '{"score": 3, "index": 2}]}\r\n'
        "\n"
        '{"uid": 3, "labels": [], "more": [{}]}\n'
        '{"labels": [{"index": 1, "score": 2, "score": 4}]}'
    )
    matrix = predictions_file.read(path)
    assert matrix.shape == (3, 3)
    np.testing.assert_array_equal(matrix.indptr, [0, 2, 2, 3])
    np.testing.assert_array_equal(matrix.indices, [0, 2, 1])
    np.testing.assert_array_equal(matrix.data, [-np.inf, 3, 4])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no predictions"):
        predictions_file.read(tmp_path / "empty.jsonl")


def test_jsonl_in_several_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions_file.text_lines, "PIECE_BYTES", 64)
    monkeypatch.setattr(predictions_file.text_lines.pieces, "__defaults__", (64,))
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(f'{{"labels": [{{"index": {i}, "score": {i / 8}}}]}}\n' for i in range(50)))
    matrix = predictions_file.read(path)
    np.testing.assert_array_equal(matrix.indices, np.arange(50))
    np.testing.assert_array_equal(matrix.data, np.arange(50) / 8)
    with pytest.raises(UserError, match="row 42: label 41 of 41"):
        predictions_file.read(path, 41)


def test_imports_nothing_heavy(case):
    """So that it starts within a second: half of that is NumPy and SciPy."""
    folder, _ = case
    program = (
        "import sys; from vixml_jax import cli; code = cli.run(sys.argv[1:]); "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'grain', 'transformers', 'tensorflow_datasets', "
        "'pandas', 'PIL', 'tensorboardX'})); "
        "sys.exit(code)"
    )
    flags = flags_of(folder, "predictions.jsonl", train=folder / "train.txt", filter=folder / "filter.txt")
    run = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
    assert not run.stderr
