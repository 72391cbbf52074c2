"""Exports embeddings for analysis: `vixml embed --workdir=runs/demo/vixml --of=labels --out=labels.npy`.

The suffix of --out chooses the format: .npy (float32 [N, D], readable with mmap_mode="r"), .parquet (uid,
title, embedding), .tsv (TensorBoard projector: vectors, with NAME.metadata.tsv beside it).

Examples:
  vixml embed --workdir=runs/demo/vixml --of=labels --out=labels.parquet
  vixml embed --workdir=runs/demo/vixml --of=test --out=queries.tsv
  vixml embed --workdir=runs/demo/vixml --of=new.jsonl --out=new.npy
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags

from vixml_jax import config as config_lib
from vixml_jax import files, sharding
from vixml_jax import run as run_lib
from vixml_jax.data.query_lines import read_queries
from vixml_jax.errors import UserError
from vixml_jax.evaluate import embed_labels, embed_queries
from vixml_jax.xmc_model import XmcModel, chunks


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
    dim, parts = embed(Path(flags.FLAGS.workdir), flags.FLAGS.of)
    count = WRITERS[out.suffix](out, dim, parts)
    print(f"{count:,} embeddings of {dim} dimensions are in {out}")
    return 0


class Part(NamedTuple):
    """Consecutive rows of a split or file.

    Attributes:
      embeddings_ND: L2-normalised float32 [N, D].
      uids: [N].
      titles: [N].
    """

    embeddings_ND: np.ndarray
    uids: Sequence[str]
    titles: Sequence[str]


def embed(workdir: Path, of: str) -> tuple[int, Iterator[Part]]:
    """Embeds a split of the run's dataset, or the queries of a JSONL file.

    Args:
      workdir: the run's directory.
      of: "train", "test", "labels" or a path.

    Returns:
      The embeddings' dimensions, and the parts: one for a split, one for each chunk of a file, which is
      embedded when it is asked for.
    """
    if of not in ("train", "test", "labels"):
        if not Path(of).exists():
            raise UserError("no such file", file=of, fix="give train, test, labels or a JSONL file")
        queries = read_queries(of)
        model = XmcModel.load(workdir)
        return model.dim, _parts(model, queries)
    config = config_lib.load(workdir / "config.json")
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with sharding.use(mesh):
        run, model = run_lib.load(config, workdir, mesh)
        if of == "labels":
            embeddings_ND = embed_labels(run, model.params, model.tables)
        else:
            embeddings_ND = embed_queries(run, model.params, getattr(run.banks, of), f"embed {of}")
    split = getattr(run.dataset, of)
    return embeddings_ND.shape[1], iter([Part(embeddings_ND, split.uids, split.titles)])


def write_npy(out: Path, dim: int, parts: Iterable[Part]) -> int:
    """Writes float32 [N, D]; rows are those of the split or file. Returns N."""
    count = 0
    with _seekable_file(out) as file:
        # A header leaves room for any N: that of the rows counted then takes the place of the first one.
        _write_npy_header(file, count, dim)
        for part in parts:
            file.write(np.ascontiguousarray(part.embeddings_ND, "<f4").data)
            count += len(part.embeddings_ND)
        file.seek(0)
        _write_npy_header(file, count, dim)
    return count


def write_parquet(out: Path, dim: int, parts: Iterable[Part]) -> int:
    """Writes the columns uid, title and embedding (fixed-size list of float32). Returns their length."""
    count = 0
    kind = pa.list_(pa.float32(), dim)
    schema = pa.schema({"uid": pa.string(), "title": pa.string(), "embedding": kind})
    with _seekable_file(out) as file, pq.ParquetWriter(file, schema) as writer:
        for embeddings_ND, uids, titles in parts:
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings_ND.ravel()), type=kind)
            writer.write_table(pa.table([list(map(str, uids)), list(titles), vectors], schema=schema))
            count += len(embeddings_ND)
    return count


def write_projector(out: Path, dim: int, parts: Iterable[Part]) -> int:
    """Writes tab-separated vectors and their metadata, as TensorBoard's projector reads them.

    Returns the number of rows.
    """
    count = 0
    with (
        files.atomic_file(out, "w") as vectors,
        files.atomic_file(out.with_suffix(".metadata.tsv"), "w") as metadata,
    ):
        metadata.write("uid\ttitle\n")
        for embeddings_ND, uids, titles in parts:
            np.savetxt(vectors, embeddings_ND, fmt="%.6g", delimiter="\t")
            for uid, title in zip(uids, titles, strict=True):
                metadata.write(f"{' '.join(str(uid).split())}\t{' '.join(title.split())}\n")
            count += len(embeddings_ND)
    return count


WRITERS: dict[str, Callable[[Path, int, Iterable[Part]], int]] = {
    ".npy": write_npy,
    ".parquet": write_parquet,
    ".tsv": write_projector,
}


def _parts(model: XmcModel, queries: Iterator[dict[str, Any]]) -> Iterator[Part]:
    for chunk in chunks(queries):
        yield Part(
            model.encode_records(chunk),
            [query["uid"] for query in chunk],
            [query["title"] for query in chunk],
        )


def _write_npy_header(file: IO[bytes], count: int, dim: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (count, dim)}
    np.lib.format.write_array_header_1_0(file, header)


@contextlib.contextmanager
def _seekable_file(out: Path) -> Iterator[IO[bytes]]:
    """Opens a file to write; what goes to a pipe or a device is gathered in a temporary file first."""
    with files.atomic_file(out) as file:
        if not out.exists() or out.is_file():
            yield file
            return
        with tempfile.TemporaryFile() as whole:
            yield whole
            whole.seek(0)
            shutil.copyfileobj(whole, file)
