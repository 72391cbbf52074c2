"""From a raw folder to a prepared dataset: `vixml prepare --raw=DIR --out=DIR --name=NAME`.

Reads the Extreme Classification Repository's files, or your own JSONL or CSV with pictures, checks every row,
and writes a TFDS dataset with a report of everything that was repaired or left out. See docs/data_formats.md.

Examples:
  vixml prepare --raw=raw/LF-AmazonTitles-131K --out=data/131k --name=lf_amazontitles_131k
  vixml prepare --raw=my_catalogue --out=data/mine
  vixml prepare --raw=my_catalogue --out=data/mine --beam_runner=FlinkRunner --beam_options=--parallelism=64
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from vixml_jax import files
from vixml_jax.data import dataset as dataset_lib
from vixml_jax.data.beam_run import RUNNERS, BeamRun
from vixml_jax.data.dataset import IMAGE_EMBEDDINGS
from vixml_jax.data.formats import RawFolder, open_raw
from vixml_jax.errors import UserError

OTHER_CONTENT_FIX = "give another --out, or --overwrite to replace it"


def define_flags() -> None:
    """Registers --raw, --out, --name, --overwrite, --beam_runner and --beam_options."""
    flags.DEFINE_string("raw", None, "Folder of the raw files", required=True)
    flags.DEFINE_string("out", None, "Directory that becomes the prepared dataset", required=True)
    flags.DEFINE_string("name", None, "Name of the dataset; the raw folder's by default")
    flags.DEFINE_bool("overwrite", False, "Replace a prepared dataset of another content at --out")
    flags.DEFINE_enum(
        "beam_runner", None, RUNNERS, f"Apache Beam reads the pictures: {', '.join(RUNNERS)} (extra `beam`)"
    )
    flags.DEFINE_multi_string(
        "beam_options", None, "A pipeline option of Beam, such as --parallelism=64; once for each"
    )


def main() -> int:
    """Runs the command."""
    values = flags.FLAGS
    report = prepare(
        values.raw,
        values.out,
        values.name,
        overwrite=values.overwrite,
        beam_runner=values.beam_runner,
        beam_options=values.beam_options or (),
    )
    print(table(report))
    if report["unchanged"]:
        print(f"{values.out} already holds this dataset")
    else:
        print(f"prepared {values.out} (report: {Path(values.out) / dataset_lib.REPORT})")
    return 0


def prepare(
    raw: str | os.PathLike[str],
    out: str | os.PathLike[str],
    name: str | None = None,
    *,
    overwrite: bool = False,
    beam_runner: str | None = None,
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Turns a raw folder into a prepared dataset.

    Args:
      raw: the raw folder; docs/data_formats.md says what it may hold.
      out: becomes the dataset; appears only once it is complete. If it already holds a dataset of the same
        content, nothing is done.
      name: of the dataset; the raw folder's by default.
      overwrite: replace a prepared dataset of another content at `out`.
      beam_runner: the runner of Apache Beam whose workers read the pictures, such as "DirectRunner"; None
        for threads of this process. The dataset is the same.
      beam_options: Beam's pipeline options, such as "--parallelism=64".

    Returns:
      What `meta.json` says (name, fingerprint, counts of each split), with `problems`: how often each problem
      was found, `notes`, and `unchanged`: whether `out` already held this dataset.

    Raises:
      UserError: naming file and line, if the raw folder is wrong; or if `out` holds something else; or if
        Beam is missing or its pipeline fails.
    """
    if beam_options and not beam_runner:
        raise UserError("--beam_options without a runner", fix=f"give --beam_runner: {', '.join(RUNNERS)}")
    beam = BeamRun(beam_runner, beam_options) if beam_runner else None
    raw, out = Path(raw), Path(out)
    folder = open_raw(raw)
    if _occupied(out):
        known = _unchanged(folder, raw, out, overwrite)
        if known is not None:
            return known
    from vixml_jax.data import builder  # TFDS takes a while to import, and bad input should not wait for it

    name = name or raw.resolve().name
    builder.tfds_name(name)
    make = builder.XmcBuilder
    if beam is not None:
        from vixml_jax.data.beam_builder import BeamBuilder

        make = functools.partial(BeamBuilder, beam=beam)
    try:
        with files.atomic_dir(out) as directory:
            with_embeddings = {
                # First, as they may not fit, and pictures take long.
                split: ready.write(directory / IMAGE_EMBEDDINGS / split, folder.sizes[split], folder.report)
                for split, ready in folder.embeddings.items()
            }
            counts, image_digest = builder.write(folder, directory, name, make)
            for split, rows in with_embeddings.items():
                counts[split]["rows_with_embeddings"] = rows
            meta = {
                "format": dataset_lib.FORMAT,
                "name": name,
                "fingerprint": _fingerprint(folder, image_digest),
                "layout": folder.layout,
                "labels": folder.num_labels,
                "splits": {split: counts[split] for split in ("train", "test", "labels") if split in counts},
            }
            report = folder.report.as_json()
            files.write_json(directory / dataset_lib.META, meta)
            files.write_json(directory / dataset_lib.REPORT, {**meta, **report})
            _keep_embeddings(out, directory)
    except OSError as error:
        raise UserError(f"cannot be used ({error.strerror or error})", file=error.filename or out) from error
    return {**meta, "problems": report["problems"], "notes": report["notes"], "unchanged": False}


def prepare_demo(out: str | os.PathLike[str], num_train: int) -> None:
    """Draws the embedded catalogue and makes `out` its prepared dataset, unless `out` is one already.

    Args:
      out: becomes the dataset.
      num_train: training queries of the catalogue.
    """
    if dataset_lib.is_prepared(out):
        known = len(dataset_lib.load(out).train)
        if known != num_train:
            raise UserError(
                f"has {known} training queries, config.dataset.demo_queries={num_train}",
                file=out,
                fix="give another config.dataset.dir, or the same number",
            )
        return
    from vixml_jax import demo_catalogue

    with files.scratch_dir(out) as raw:
        prepare(demo_catalogue.write_raw(raw / "raw", num_train), out, "demo_catalogue")


def table(report: dict[str, Any]) -> str:
    """Lays out the counts of each split and of each problem found."""
    columns = {
        "rows": "rows",
        "positives": "positives",
        "rows_without_labels": "no labels",
        "rows_with_images": "with images",
        "images": "images",
        "images_missing": "missing",
    }
    if any("rows_with_embeddings" in counts for counts in report["splits"].values()):
        columns["rows_with_embeddings"] = "embedded"
    lines = [f"{report['name']:<12}" + "".join(f"{title:>13}" for title in columns.values())]
    for split, counts in report["splits"].items():
        cells = (f"{counts[key]:,}" if key in counts else "-" for key in columns)
        lines.append(f"{split:<12}" + "".join(f"{cell:>13}" for cell in cells))
    lines += [f"note: {note}" for note in report["notes"]]
    lines += [f"{count:,} x {problem}" for problem, count in report["problems"].items()]
    return "\n".join(lines)


def _keep_embeddings(old: Path, new: Path) -> None:
    """Hands the embeddings of pictures on to the dataset that replaces `old`: they go by content."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            shutil.copy2(source, target)

    for store in (old / "derived").glob("images-*"):
        shutil.copytree(store, new / "derived" / store.name, copy_function=link)


def _occupied(out: Path) -> bool:
    """Whether something stands at `out` that must not just be replaced."""
    if out.is_dir():
        return any(out.iterdir())
    if out.exists():
        raise UserError("a file", file=out, fix="give --out a directory")
    return False


def _unchanged(folder: RawFolder, raw: Path, out: Path, overwrite: bool) -> dict[str, Any] | None:
    """Returns the report of the dataset at `out` if it has the raw folder's content, None to replace it."""
    if not dataset_lib.is_prepared(out):
        raise UserError(
            "holds something else than a prepared dataset",
            file=out,
            fix="give another --out; it is not touched",
        )
    known = files.read_json(out / dataset_lib.REPORT)
    if not isinstance(known, dict) or not isinstance(known.get("fingerprint"), str):
        raise UserError("damaged", file=out / dataset_lib.REPORT, fix="move the dataset away")
    data_digest = known["fingerprint"].partition("-")[0]
    if folder.digest().startswith(data_digest) and known.get("format") == dataset_lib.FORMAT:
        from vixml_jax.data import builder

        # Read through a second view of the folder: this one may still have to be written.
        if _fingerprint(folder, builder.image_digest(open_raw(raw))) == known["fingerprint"]:
            return {
                **{key: known[key] for key in known if key not in ("repaired", "rejected")},
                "unchanged": True,
            }
    if not overwrite:
        raise UserError("holds a prepared dataset of another content", file=out, fix=OTHER_CONTENT_FIX)
    return None


def _fingerprint(folder: RawFolder, image_digest: str) -> str:
    """Names the content: the first half goes by the text files, the second by the pictures."""
    return f"{folder.digest()[:16]}-{image_digest[:16]}"
