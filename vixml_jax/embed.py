"""Exports embeddings for analysis: `vixml embed --workdir=runs/demo --of=labels --out=labels.npy`.

The suffix of --out chooses the format: .npy (float32 [N, D], readable with mmap_mode="r"), .parquet (uid,
title, embedding), .tsv (TensorBoard projector: vectors, with NAME.metadata.tsv beside it).

Examples:
  vixml embed --workdir=runs/demo/vixml --of=labels --out=labels.parquet
  vixml embed --workdir=runs/demo/vixml --of=test --out=queries.tsv
  vixml embed --workdir=runs/demo/vixml --of=new.jsonl --out=new.npy
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags

from vixml_jax import config as config_lib
from vixml_jax import files, sharding
from vixml_jax import run as run_lib
from vixml_jax.errors import UserError
from vixml_jax.predict import XmcModel, read_queries


def define_flags() -> None:
    """Registers the command's flags."""
    flags.DEFINE_string("workdir", None, "Directory of the run")
    flags.DEFINE_string("of", "labels", "train, test, labels, or a JSONL file of queries")
    flags.DEFINE_string("out", None, "File to write: .npy, .parquet or .tsv")


def main() -> int:
    """Runs the command."""
    if not flags.FLAGS.workdir or not flags.FLAGS.out:
        raise UserError(
            "embed needs --workdir and --out", fix="as in --workdir=runs/demo/text --out=labels.npy"
        )
    out = Path(flags.FLAGS.out)
    if out.suffix not in WRITERS:
        raise UserError(f"--out ends with {out.suffix!r}", file=out, fix="give .npy, .parquet or .tsv")
    embeddings_ND, uids, titles = embed(Path(flags.FLAGS.workdir), flags.FLAGS.of)
    WRITERS[out.suffix](out, embeddings_ND, uids, titles)
    print(f"{len(embeddings_ND):,} embeddings of {embeddings_ND.shape[1]} dimensions are in {out}")
    return 0


def embed(workdir: Path, of: str) -> tuple[np.ndarray, Sequence[str], Sequence[str]]:
    """Embeds a split of the run's dataset, or the queries of a JSONL file.

    Args:
      workdir: the run's directory.
      of: "train", "test", "labels" or a path.

    Returns:
      L2-normalised float32 [N, D], uids [N], titles [N].
    """
    if of not in ("train", "test", "labels"):
        if not Path(of).is_file():
            raise UserError("no such file", file=of, fix="give train, test, labels or a JSONL file")
        with open(of, encoding="utf-8") as lines:
            queries = list(read_queries(lines, of))
        embeddings = XmcModel.load(workdir).encode_records(queries)
        return embeddings, [query["uid"] for query in queries], [query["title"] for query in queries]
    config = config_lib.load(workdir / "config.json")
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with sharding.use(mesh):
        run, params, tables = run_lib.load(config, workdir, mesh)
        bank = getattr(run.banks, of)
        if of == "labels":
            embeddings = run.embedder.labels(params, run.frozen, bank, tables)
        else:
            embeddings = run.embedder.queries(params, run.frozen, bank, f"embed {of}")
    split = getattr(run.dataset, of)
    return embeddings, split.uids, split.titles


def write_npy(out: Path, embeddings_ND: np.ndarray, uids: Sequence[str], titles: Sequence[str]) -> None:
    """Writes float32 [N, D]; rows are those of the split or file."""
    with files.atomic_file(out) as file:
        np.save(file, embeddings_ND)


def write_parquet(out: Path, embeddings_ND: np.ndarray, uids: Sequence[str], titles: Sequence[str]) -> None:
    """Writes the columns uid, title and embedding (fixed-size list of float32)."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings_ND.ravel()), embeddings_ND.shape[1])
    table = pa.table({"uid": list(map(str, uids)), "title": list(titles), "embedding": vectors})
    with files.atomic_file(out) as file:
        pq.write_table(table, file)


def write_projector(out: Path, embeddings_ND: np.ndarray, uids: Sequence[str], titles: Sequence[str]) -> None:
    """Writes tab-separated vectors and their metadata, as TensorBoard's projector reads them."""
    with files.atomic_file(out, "w") as file:
        np.savetxt(file, embeddings_ND, fmt="%.6g", delimiter="\t")
    with files.atomic_file(out.with_suffix(".metadata.tsv"), "w") as file:
        file.write("uid\ttitle\n")
        for uid, title in zip(uids, titles, strict=True):
            file.write(f"{' '.join(str(uid).split())}\t{' '.join(title.split())}\n")


WRITERS: dict[str, Callable[[Path, np.ndarray, Sequence[str], Sequence[str]], None]] = {
    ".npy": write_npy,
    ".parquet": write_parquet,
    ".tsv": write_projector,
}
