"""Lists of picture addresses: Parquet, CSV or tab-separated text of uid and url, several rows a uid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from vixml_jax.data import text_lines
from vixml_jax.errors import UserError

pc: Any = pyarrow.compute  # its functions are made at import: type checkers do not see them

UID_NAMES = ("uid", "id")  # the public ViXML release writes id
URL_NAMES = ("url", "image_url")


class Wanted(NamedTuple):
    """Rows of a list that are to be downloaded.

    Attributes:
      uids: string [R].
      urls: string [U], each once, in the order of the list.
      url_R: int32 [R], rows of `urls`.
      skipped: rows of the list by the reason for which they are not wanted.
    """

    uids: pa.Array
    urls: pa.Array
    url_R: np.ndarray
    skipped: dict[str, int]


def read(path: str | Path) -> pa.Table:
    """Reads a list.

    Returns:
      Columns `uid` and `url`, strings; null where a cell is empty or holds a line break.

    Raises:
      UserError: if it cannot be read, or has no such columns.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("no such file", file=path)
    try:
        table = _read_parquet(path) if path.suffix == ".parquet" else _read_text(path)
        columns = [pc.utf8_trim_whitespace(table[name].cast(pa.string())) for name in ("uid", "url")]
    except (
        pa.ArrowException,
        OSError,
        UnicodeDecodeError,
    ) as error:  # of a broken file Arrow says now this, now that
        problem = " ".join(str(error).split())
        raise UserError(f"cannot be read ({problem})", file=path, fix="give rows of uid and url") from None
    none = pa.scalar(None, pa.string())
    filled = [pc.if_else(pc.match_substring_regex(column, r"^$|[\r\n]"), none, column) for column in columns]
    return pa.table({"uid": filled[0], "url": filled[1]})


def wanted(table: pa.Table, known: Sequence[pa.Array], per_row: int) -> Wanted:
    """Picks the rows to download: of known uids, without repetitions, at most so many a uid.

    Args:
      table: as `read` gives it.
      known: uids that the dataset has, an array a split.
      per_row: pictures of a uid at most, the first ones of the list; 0 for all.
    """
    rows = len(table)
    table = table.drop_null()
    skipped = {"without uid or url": rows - len(table)}
    inside = pc.is_in(table["uid"], value_set=pa.chunked_array(known, pa.string()))
    table = table.filter(inside)
    skipped["of a uid that the dataset does not have"] = rows - sum(skipped.values()) - len(table)
    uids, urls = (table[name].combine_chunks().dictionary_encode() for name in ("uid", "url"))
    uid_R, url_R = (np.asarray(column.indices) for column in (uids, urls))
    pairs = uid_R.astype(np.int64) * max(len(urls.dictionary), 1) + url_R
    first = np.sort(np.unique(pairs, return_index=True)[1])
    skipped["named twice"] = len(table) - len(first)
    if per_row:
        rank = _rank_in_group(uid_R[first])
        skipped[f"after the first {per_row} of a uid"] = int((rank >= per_row).sum())
        first = first[rank < per_row]
    # Numbered anew: some urls are no longer asked for.
    kept = urls.take(pa.array(first)).cast(pa.string()).dictionary_encode()
    return Wanted(
        table["uid"].combine_chunks().take(pa.array(first)),
        kept.dictionary,
        np.asarray(kept.indices),
        {reason: count for reason, count in skipped.items() if count},
    )


def _rank_in_group(group_R: np.ndarray) -> np.ndarray:
    """Counts, for each element, the earlier elements of its group."""
    order = np.argsort(group_R, kind="stable")
    starts = np.flatnonzero(np.diff(group_R[order], prepend=-1))
    sizes = np.diff(np.append(starts, len(order)))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(starts, sizes)
    return rank


def _read_parquet(path: Path) -> pa.Table:
    names = pyarrow.parquet.read_schema(path).names
    uid, url = _column(names, UID_NAMES, path), _column(names, URL_NAMES, path)
    return pyarrow.parquet.read_table(path, columns=[uid, url]).rename_columns({uid: "uid", url: "url"})


def _read_text(path: Path) -> pa.Table:
    first = next(text_lines.lines(path), b"").decode("utf-8", "replace")
    tab = "\t" in first
    cells = [cell.strip().strip('"') for cell in first.split("\t" if tab else ",")]
    # MUFIN's img.urls.txt has no header.
    headless = len(cells) == 2 and cells[1].startswith(("http://", "https://"))
    names = ["uid", "url"] if headless else cells
    uid, url = _column(names, UID_NAMES, path), _column(names, URL_NAMES, path)
    table = pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(column_names=names, skip_rows=0 if headless else 1),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter="\t" if tab else ",", quote_char=False if tab else '"'
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types={uid: pa.string(), url: pa.string()}, include_columns=[uid, url]
        ),
    )
    return table.rename_columns({uid: "uid", url: "url"})


def _column(names: Sequence[str], known: Sequence[str], path: Path) -> str:
    for name in names:
        if name.lower() in known:
            return name
    raise UserError(
        f"no column {' or '.join(known)} among {', '.join(names) or 'none'}",
        file=path,
        row=1,
        fix="the columns are uid and url",
    )
