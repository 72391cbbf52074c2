"""What smaller label banks cost: dtypes and shorter embeddings on a trained run, against float32 as it is.

  python benchmarks/label_banks.py --workdir=runs/picto --json=label_banks.json
  python benchmarks/label_banks.py --workdir=runs/picto_dims --dims=32,64,128

Takes the embeddings that an evaluation left in the workdir, searches them exactly by labels alone, and scores
the test split: P@1, P@5, R@100, the share of the 100 best of float32 that is found, and the megabytes of the
bank.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from vixml_jax import config as config_lib
from vixml_jax import files, metrics, retrieval
from vixml_jax import run as run_lib
from vixml_jax.search import prefix

K = 100
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def main() -> None:
    """Prints a row for each bank."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="a run that was evaluated")
    parser.add_argument("--dims", default="", help="prefixes of the embeddings beside the whole, with commas")
    parser.add_argument("--json", default="label_banks.json", help="where the figures go")
    options = parser.parse_args()
    config = config_lib.load(options.workdir / "config.json")
    dataset = run_lib.open_dataset(config)
    queries, labels = (np.load(options.workdir / "embeddings" / f"{of}.npy") for of in ("test", "labels"))
    wanted, _ = retrieval.build(labels, kind="exact").search(queries, K)
    pairs = dataset.filter_pairs_test
    k = K + (int(np.bincount(pairs[:, 0]).max()) if len(pairs) else 0)
    banks = [(0, dtype) for dtype in BYTES]
    banks += [(int(dims), dtype) for dims in options.dims.split(",") if dims for dtype in ("float32", "int8")]
    rows = []
    print(f"{'dims':>6} {'dtype':>9} {'MB':>9} {'P@1':>7} {'P@5':>7} {'R@100':>7} {'found':>7}")
    for dims, dtype in banks:
        index = retrieval.build(prefix(labels, dims), kind="exact", dtype=dtype)
        found = index.search(prefix(queries, dims), k)
        figures = metrics.evaluate(
            found, dataset.test_targets, dataset.train_targets, ks=(1, 5), filter_pairs=pairs
        )
        best = found[0][:, :K].tolist()
        hits = sum(len(set(a) & set(b)) for a, b in zip(best, wanted.tolist(), strict=True))
        size = index.num_labels * (index.dim * BYTES[dtype] + 4 * (dtype == "int8")) / 1e6
        row = {"dims": index.dim, "dtype": dtype, "mb": size, "found": hits / wanted.size}
        row |= {name: figures[name] for name in ("P@1", "P@5", "R@100")}
        rows.append(row)
        print(
            f"{index.dim:>6} {dtype:>9} {size:>9.2f} {row['P@1']:>7.2f} {row['P@5']:>7.2f} "
            f"{row['R@100']:>7.2f} {row['found']:>7.4f}",
            flush=True,
        )
    files.write_json(options.json, {"workdir": str(options.workdir), "rows": rows})


if __name__ == "__main__":
    main()
