"""Downloads the pictures of a dataset: `python -m data_prep.images --urls=img_urls.parquet --raw=DIR`.

--urls is a list of picture addresses (Parquet, CSV or tab-separated: uid and url, several rows a uid),
--raw a raw folder as `vixml prepare` reads it. Pictures of its uids go to DIR/images, each content once, and
DIR/img_paths.{trn,tst,lbl}.csv name them. DIR/images/downloads.csv tells for every address "ok" or why not.
Killed or interrupted, it goes on where it was when it is called again; addresses that failed for a passing
reason are then tried again, those that failed for good only with --again.

Only http and https are fetched, and nothing from private, loopback or link-local addresses (looked at after
the name is resolved, at every redirect) unless --allow_private. Proxies are not used.

Examples:
  python -m data_prep.images --urls=raw/131k/img_urls.parquet --raw=raw/131k
  python -m data_prep.images --urls=pictures.csv --raw=raw/mine --per_row=1 --max_side=384 --workers=32
"""

from __future__ import annotations

import csv
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from absl import flags

from data_prep import url_lists
from data_prep.addresses import Address, is_public
from data_prep.disk import may_fill_up
from data_prep.download_report import NAME, OK, DownloadReport
from data_prep.picture_downloads import PictureDownloads
from data_prep.picture_store import PictureStore
from data_prep.transfers import Limits
from vixml_jax import cli, files
from vixml_jax.data import formats
from vixml_jax.errors import UserError
from vixml_jax.progress import Progress

pc: Any = pyarrow.compute  # its functions are made at import: type checkers do not see them

FOLDER = "images"
# So many failures that may pass, and no success, are a network that is down.
GIVE_UP_AFTER = 100


def define_flags() -> None:
    """Registers the command's flags."""
    flags.DEFINE_string("urls", None, "Parquet, CSV or TSV of uid and url", required=True)
    flags.DEFINE_string("raw", None, "Raw folder; takes the pictures and their lists", required=True)
    flags.DEFINE_integer("per_row", 3, "Pictures of a uid at most; 0 for all", lower_bound=0)
    flags.DEFINE_integer(
        "max_side", 0, "Shrink larger pictures to so many pixels, as JPEG; 0 stores files as they come",
        lower_bound=0,
    )  # fmt: skip
    flags.DEFINE_integer("workers", 16, "Downloads at the same time", lower_bound=1)
    flags.DEFINE_float("idle_seconds", 20, "Longest silence of a server", lower_bound=0.001)
    flags.DEFINE_float("total_seconds", 60, "Longest time of one attempt", lower_bound=0.001)
    flags.DEFINE_float("max_mb", 20, "Largest file, in 10^6 bytes", lower_bound=0)
    flags.DEFINE_integer("retries", 3, "Further attempts after a passing failure", lower_bound=0)
    flags.DEFINE_float("backoff_seconds", 0.5, "Before the first of them; doubles", lower_bound=0)
    flags.DEFINE_bool("again", False, "Try also what failed for good in an earlier run")
    flags.DEFINE_bool("allow_private", False, "Fetch also from private and loopback addresses")


def main() -> int:
    """Runs the command."""
    values = flags.FLAGS
    summary = download(
        values.urls,
        values.raw,
        limits=Limits(
            max_bytes=values.max_mb * 1e6,
            idle_seconds=values.idle_seconds,
            total_seconds=values.total_seconds,
            retries=values.retries,
            backoff_seconds=values.backoff_seconds,
        ),
        per_row=values.per_row,
        max_side=values.max_side,
        workers=values.workers,
        again=values.again,
        allowed=(lambda _: True) if values.allow_private else is_public,
    )
    print(table(summary))
    print(f"report: {Path(values.raw) / FOLDER / NAME}; next: vixml prepare --raw={values.raw} --out=DIR")
    return 0


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a folder of pictures holds after a run.

    Attributes:
      outcomes: addresses by outcome, "ok" or a reason.
      rows: rows of each split, and how many of them have a picture.
      skipped: rows of the list that were not wanted, by reason.
    """

    outcomes: dict[str, int]
    rows: dict[str, tuple[int, int]]
    skipped: dict[str, int]


def download(
    urls: str | Path,
    raw: str | Path,
    *,
    limits: Limits,
    per_row: int = 3,
    max_side: int = 0,
    workers: int = 16,
    again: bool = False,
    allowed: Callable[[Address], bool] = is_public,
) -> Summary:
    """Downloads the pictures that a list names for the uids of a raw folder, and writes its image lists.

    Args:
      urls: the list, see `url_lists.read`.
      raw: a raw folder of the repository's layouts.
      limits: of each transfer.
      per_row: pictures of a uid at most, 0 for all.
      max_side: larger pictures are shrunk to it, 0 for none.
      workers: downloads at the same time.
      again: try also what an earlier run found to fail for good.
      allowed: which addresses may be fetched from.

    Raises:
      UserError: if list or folder cannot be used, the disk is full, or nothing can be downloaded at all.
    """
    raw = Path(raw)
    uids = _uids(raw)
    listed = _wanted(urls, uids, raw, per_row)
    with DownloadReport(raw / FOLDER) as report:
        store = PictureStore(raw / FOLDER, max_side)
        store.sweep()
        todo = np.flatnonzero(~report.done(listed.urls, store.holds, again))
        total = len(listed.urls)
        with (
            may_fill_up(raw),
            PictureDownloads(store.add, limits, allowed, workers) as downloads,
            Progress(total, "download pictures", "pictures", initial=total - len(todo)) as progress,
        ):
            none = 0  # failures that may pass, while nothing has succeeded
            for outcome in downloads.outcomes(listed.urls[int(row)].as_py() for row in todo):
                report.add(outcome)
                progress.update()
                none = -len(todo) if outcome.outcome == OK else none + outcome.again
                if none >= GIVE_UP_AFTER:
                    problem = f"none of the first {none} pictures could be downloaded ({outcome.outcome})"
                    raise UserError(problem, fix="look at the network, then run the same command again")
        lines = report.tidy(listed.urls)
        filled = _write_lists(raw, uids, listed, lines)
    outcomes = Counter(lines["outcome"].to_pylist())
    rows = {split: (len(known), filled[split]) for split, known in uids.items()}
    return Summary(dict(outcomes.most_common()), rows, listed.skipped)


def table(summary: Summary) -> str:
    """Lays a summary out."""
    lines = [f"{'':<8}{'rows':>12}{'with picture':>14}"]
    for split, (rows, filled) in summary.rows.items():
        lines.append(f"{split:<8}{rows:>12,}{filled:>14,}  {100 * filled / max(rows, 1):6.2f} %")
    lines += [f"{count:,} x {outcome}" for outcome, count in summary.outcomes.items()]
    lines += [f"not wanted: {count:,} rows of the list {reason}" for reason, count in summary.skipped.items()]
    return "\n".join(lines)


def _wanted(urls: str | Path, uids: dict[str, pa.Array], raw: Path, per_row: int) -> url_lists.Wanted:
    """Reads a list and picks what is to be downloaded for `uids`.

    Raises:
      UserError: if it cannot be read, or nothing is.
    """
    found = url_lists.wanted(url_lists.read(urls), list(uids.values()), per_row)
    if not len(found.urls):
        problem = f"no picture for a uid of {raw}"
        raise UserError(problem, file=urls, fix="its uids are those of the raw files")
    return found


def _uids(raw: Path) -> dict[str, pa.Array]:
    """Reads the uids of every split of a raw folder.

    Raises:
      UserError: if it is none that takes image lists.
    """
    folder = formats.open_raw(raw)
    if not isinstance(folder, formats.RepositoryFolder):
        fix = 'name the files in "images" of each row, or bring the rows into trn.json.gz and so on'
        raise UserError("one's own JSON lines take no image lists", file=raw, fix=fix)
    uids = {}
    for split in folder.splits:
        with Progress(folder.sizes[split], f"read {split}") as progress:
            found = []
            for record in folder.records(split):
                found.append(record.uid)
                progress.update()
        uids[split] = pa.array(found, pa.string())
    return uids


def _write_lists(
    raw: Path, uids: dict[str, pa.Array], listed: url_lists.Wanted, lines: pa.Table
) -> dict[str, int]:
    """Writes the image list of every split; returns how many of its rows have a picture."""
    ok = lines.filter(pc.equal(lines["outcome"], OK))
    place_U = np.asarray(pc.index_in(listed.urls, value_set=ok["url"].combine_chunks()).fill_null(-1))
    place_R = place_U[listed.url_R]
    found = np.flatnonzero(place_R >= 0)
    pictures = pa.table(
        {
            "uid": listed.uids.take(pa.array(found)),
            "file": ok["file"].combine_chunks().take(pa.array(place_R[found])),
        }
    )
    filled = {}
    for split, known in uids.items():
        mine = pictures.filter(pc.is_in(pictures["uid"], value_set=known))
        with files.atomic_file(raw / f"img_paths.{formats.SHORT[split]}.csv", "w") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("uid", "path"))
            writer.writerows(
                (row["uid"], f"{FOLDER}/{row['file']}")
                for batch in mine.to_batches(max_chunksize=1 << 16)
                for row in batch.to_pylist()
            )
        filled[split] = int(pc.sum(pc.is_in(known, value_set=pc.unique(mine["uid"]))).as_py() or 0)
    return filled


if __name__ == "__main__":
    sys.exit(cli.run_job(sys.modules[__name__], "python -m data_prep.images"))
