"""Scores a prediction file against truth: `vixml metrics --predictions=FILE --truth=FILE`.

Needs no model and no accelerator. Files are sparse text (header `rows columns`, then `label:score` pairs), a
CSR matrix in .npz, or, for predictions, the JSONL of `vixml predict`; text may be gzipped. With --train the
propensity-scored figures are given too; --A and --B are 0.6 and 2.6 for the Amazon family, 0.5 and 0.4 for
Wikipedia-500K. Figures are in percent.

Examples:
  vixml metrics --predictions=runs/demo/vixml/predictions.npz --truth=tst_X_Y.txt
  vixml metrics --predictions=out.jsonl --truth=tst_X_Y.txt --train=trn_X_Y.txt \\
      --filter=filter_labels_test.txt --A=0.6 --B=2.6 --json=figures.json
  vixml metrics --predictions=scores.txt --truth=tst_X_Y.npz --ks=1,10 --json=-
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from vixml_jax import files, metrics
from vixml_jax.data import predictions_file, sparse_text
from vixml_jax.errors import UserError


def define_flags() -> None:
    """Registers the command's flags."""
    flags.DEFINE_string("predictions", None, "Sparse text, .npz or JSONL of scores", required=True)
    flags.DEFINE_string("truth", None, "Sparse text or .npz of the relevant labels", required=True)
    flags.DEFINE_string("train", None, "Sparse text or .npz of the training labels, for PSP, PSnDCG and PSR")
    flags.DEFINE_string("filter", None, "Pairs `row label`, one a line, taken out of the predictions")
    flags.DEFINE_float("A", 0.55, "Of the propensity model")
    flags.DEFINE_float("B", 1.5, "Of the propensity model")
    flags.DEFINE_list("ks", ["1", "3", "5"], "Cuts")
    flags.DEFINE_string("json", None, "File for the figures as JSON; - prints it instead of the table")


def main() -> int:
    """Runs the command."""
    values = flags.FLAGS
    figures = score(
        values.predictions,
        values.truth,
        train=values.train,
        filter_pairs=values.filter,
        ks=_cuts(values.ks),
        A=values.A,
        B=values.B,
    )
    if values.json == "-":
        json.dump(figures, sys.stdout, indent=2)
        print()
        return 0
    if values.json:
        files.write_json(values.json, figures)
    print(table(figures))
    return 0


def score(
    predictions: str | Path,
    truth: str | Path,
    *,
    train: str | Path | None = None,
    filter_pairs: str | Path | None = None,
    ks: Sequence[int] = (1, 3, 5),
    A: float = 0.55,
    B: float = 1.5,
) -> dict[str, float]:
    """Reads the files and returns what `metrics.evaluate` gives.

    Raises:
      UserError: naming the files, if one cannot be read or two do not fit each other.
    """
    relevant: Any = sparse_text.read_sparse(truth)
    seen: Any = None if train is None else sparse_text.read_sparse(train)
    if seen is not None and seen.shape[1] != relevant.shape[1]:
        raise UserError(
            f"{relevant.shape[1]} labels, but {train} has {seen.shape[1]}",
            file=truth,
            fix="give truth and training labels of the same dataset",
        )
    pairs = None if filter_pairs is None else sparse_text.read_filter_pairs(filter_pairs)
    if pairs is not None:
        _check_pairs(pairs, filter_pairs, relevant.shape, truth)
    scores: Any = predictions_file.read(predictions, relevant.shape[1])
    if scores.shape != relevant.shape:
        raise UserError(
            f"{scores.shape[0]} rows and {scores.shape[1]} labels, "
            f"but {truth} has {relevant.shape[0]} and {relevant.shape[1]}",
            file=predictions,
            fix="give predictions of exactly the truth's rows and labels",
        )
    return metrics.evaluate(scores, relevant, seen, ks=ks, A=A, B=B, filter_pairs=pairs)


def table(figures: dict[str, float]) -> str:
    """Lays figures out in percent: one line a metric, its cuts side by side."""
    rows: dict[str, list[str]] = {}
    for name, value in figures.items():
        metric, _, cut = name.partition("@")
        rows.setdefault(metric, []).append(f"{'@' + cut if cut else '':>5} {value:6.2f}")
    return "\n".join(f"{metric:<8}{'  '.join(cells)}" for metric, cells in rows.items())


def _check_pairs(
    pairs: np.ndarray, filter_file: str | Path | None, shape: tuple[int, int], truth: str | Path
) -> None:
    rows, labels = shape
    wrong = (pairs[:, 0] >= rows) | (pairs[:, 1] >= labels)
    if wrong.any():
        row, label = pairs[wrong][0].tolist()
        raise UserError(
            f"pair {row} {label}, but {truth} has {rows} rows and {labels} labels",
            file=filter_file,
            fix="give the pairs of this truth, zero-based",
        )


def _cuts(texts: Sequence[str]) -> tuple[int, ...]:
    if not texts or not all(text.strip().isdecimal() and int(text) > 0 for text in texts):
        raise UserError(f"--ks={','.join(texts)}", fix="give whole numbers of at least 1, as in --ks=1,3,5")
    return tuple(map(int, texts))
