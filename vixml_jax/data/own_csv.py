"""Tables of one's own: CSV with a header, a row an item, brought into the form of JSON lines."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from vixml_jax.data import fields
from vixml_jax.data.fields import Where
from vixml_jax.data.report import Report
from vixml_jax.data.text_lines import TextFile
from vixml_jax.errors import UserError

# Field -> what its column may be called.
COLUMNS = {
    "uid": ("uid", "id"),
    "title": ("title", "text"),
    "content": ("content",),
    "labels": ("labels", "label"),
    "images": ("images", "image"),
}
# In a table of labels, which have none themselves.
LABEL_COLUMNS = {**COLUMNS, "title": ("title", "text", "label"), "labels": ()}
LISTS = ("labels", "images")
BETWEEN = "|"  # several in a cell
DELIMITERS = (",", ";", "\t")


def rows(file: TextFile, report: Report, *, of_labels: bool) -> Iterator[tuple[dict[str, Any], Where]]:
    """Yields a table's rows as objects of the fields that its columns name.

    `labels` and `images` are split at "|"; a column `label` holds one label as it is. Without a column of
    uids a row's uid is its number, from zero.

    Args:
      file: the table, gone through once.
      report: takes columns that mean nothing here.
      of_labels: whether it is a table of labels, in which `label` is a title.

    Raises:
      UserError: if it has no such header, or a row does not fit it.
    """
    first = next((text for _, text in file.lines()), "")
    table = csv.reader((text + "\n" for _, text in file.lines()), delimiter=_delimiter(first))
    try:
        header = [fields.clean(name) for name in next(table, [])]
        names = _names(header, file, report, of_labels)
        row = 0
        for cells in table:
            if not cells:
                continue
            where = Where(file.path, table.line_num, report)
            if len(cells) != len(header):
                fix = "put a text that holds the separator between quotation marks"
                raise where.error(f"{len(cells)} cells, but {len(header)} columns", fix)
            value = _object(cells, names, header)
            if "uid" not in names.values():
                value["uid"] = str(row)
            yield value, where
            row += 1
    except csv.Error as error:
        raise UserError(f"not CSV ({error})", file=file.path, row=table.line_num) from None


def count(file: TextFile, *, of_labels: bool) -> int:
    """Counts a table's rows: text in quotation marks may hold line breaks."""
    return sum(1 for _ in rows(file, Report(file.path.parent), of_labels=of_labels))


def _delimiter(header: str) -> str:
    """What separates columns; spreadsheets of many countries write semicolons."""
    return max(DELIMITERS, key=header.count)


def _names(header: list[str], file: TextFile, report: Report, of_labels: bool) -> dict[int, str]:
    """Returns the field of each column that is one."""
    columns = LABEL_COLUMNS if of_labels else COLUMNS
    names: dict[int, str] = {}
    for place, name in enumerate(header):
        field = next((field for field, known in columns.items() if name.lower() in known), None)
        if field is None:
            report.note(f"{file.path.name}: the column {name!r} is not used")
        elif field in names.values():
            raise UserError(f"two columns of {field}", file=file.path, row=1, fix="keep one of them")
        else:
            names[place] = field
    for field in ("title",) if of_labels else ("title", "labels"):
        if field not in names.values():
            problem = f"no column {field} among {', '.join(header) or 'none'}"
            fix = "the first line names the columns: title,labels (and uid, content, images)"
            raise UserError(problem, file=file.path, row=1, fix=fix)
    return names


def _object(cells: list[str], names: dict[int, str], header: list[str]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for place, field in names.items():
        cell = cells[place]
        if field == "uid" and not cell.strip():
            continue
        if field not in LISTS:
            value[field] = cell
        elif header[place].lower() == field:
            value[field] = [part for part in cell.split(BETWEEN) if part.strip()]
        else:
            value[field] = [cell] if cell.strip() else []
    return value
