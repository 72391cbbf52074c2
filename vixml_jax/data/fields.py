"""The fields of a raw record: checked, cleaned, and every repair noted."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vixml_jax.data.report import Report
from vixml_jax.errors import UserError

_CONTROL = re.compile("[\x01-\x08\x0e-\x1f\x7f]")  # besides white space and the null character
IMAGES_FIX = 'give a list of paths: "images": ["pictures/1.jpg"]'
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which UTF-8 cannot hold


class Where(NamedTuple):
    """A line of a raw file, and where findings about it go."""

    file: Path
    line: int
    report: Report

    def error(self, problem: str, fix: str | None = None) -> UserError:
        """Returns the error that ends the job at this line."""
        return UserError(problem, file=self.file, row=self.line, fix=fix)

    def repair(self, problem: str, done: str) -> None:
        """Notes that the line was kept in a repaired form."""
        self.report.repair(self.file, self.line, problem, done)


def clean(text: str) -> str:
    """Drops null characters, and makes every run of white space and control characters one blank."""
    if text.isascii() and text.isprintable() and "  " not in text and text == text.strip():
        return text  # nearly all of them
    text = _CONTROL.sub(" ", text.replace("\0", ""))
    return " ".join(_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text).split())


def parse_object(text: str, where: Where) -> dict[str, Any]:
    """Reads one JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise where.error(f"not valid JSON ({reason})", "every line is one JSON object") from None
    if not isinstance(value, dict):
        raise where.error("not a JSON object", "every line is one JSON object such as {" + '"uid": ...}')
    return value


def title(value: Any, where: Where) -> str:
    """Checks and cleans a title."""
    if not isinstance(value, str):
        raise where.error(f'"title" is {_kind(value)}', 'give a text, "" if there is none')
    cleaned = clean(value)
    if cleaned != value:
        where.repair("white space or control characters in the title", "cleaned")
    return cleaned


def content(record: dict[str, Any], where: Where) -> str:
    """Checks and cleans a record's content; a missing one is empty."""
    value = record.get("content", "")
    if value is None:
        where.repair('"content" is null', "taken as empty")
        return ""
    if not isinstance(value, str):
        raise where.error(f'"content" is {_kind(value)}', 'give a text, "" if there is none')
    if "\0" in value or _CONTROL.search(value) or _SURROGATE.search(value):
        where.repair("control characters in the content", "cleaned")
    return clean(value)


def uid(record: dict[str, Any], row: int, where: Where) -> str:
    """Returns a record's uid as text; the zero-based row number where it has none."""
    value = record.get("uid")
    if value is None:
        where.repair("no uid", f"its row number {row} taken")
        return str(row)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise where.error(f'"uid" is {_kind(value)}', "give a text or a whole number")
    return clean(str(value))


def target_ind(record: dict[str, Any], num_labels: int, where: Where) -> np.ndarray:
    """Checks the label indices of a record, int32, increasing; labels of relevance 0 are dropped."""
    if "target_ind" not in record:
        raise where.error('no "target_ind"', 'give a list of label indices, [] for none: "target_ind": [0]')
    indices = record["target_ind"]
    if not isinstance(indices, list):
        raise where.error(f'"target_ind" is {_kind(indices)}', "give a list of label indices")
    for index in indices:
        if type(index) is not int:
            raise where.error(
                f'"target_ind" holds {_kind(index)}', "label indices are whole numbers from zero"
            )
        if not 0 <= index < num_labels:
            raise where.error(
                f"label index {index} is outside the {num_labels} labels",
                f"indices are 0 to {num_labels - 1}",
            )
    relevances = record.get("target_rel")
    if relevances is not None:
        indices = _relevant(indices, relevances, where)
    return increasing(indices, where)


def increasing(indices: Sequence[int], where: Where) -> np.ndarray:
    """Sorts label indices, noting rows that were not sorted or name a label twice."""
    array = np.asarray(indices, np.int32)
    if len(array) > 1:
        steps = np.diff(array)
        if (steps < 0).any():
            where.repair("labels not in increasing order", "sorted")
        if (steps <= 0).any():
            unique = np.unique(array)
            if len(unique) < len(array):
                where.repair("a label named twice", "kept once")
            array = unique
    return array


def label_texts(record: dict[str, Any], where: Where) -> list[str]:
    """Checks a record's label texts; repeated ones are kept once, empty ones dropped."""
    fix = 'give a list of label texts, [] for none: "labels": ["red", "shoe"]'
    texts = texts_of(record, "labels", where, fix, required=True)
    cleaned = [clean(text) for text in texts]
    filled = [text for text in cleaned if text]
    if len(filled) < len(cleaned):
        where.repair("an empty label", "dropped")
    unique = list(dict.fromkeys(filled))
    if len(unique) < len(filled):
        where.repair("a label named twice", "kept once")
    return unique


def texts_of(record: dict[str, Any], field: str, where: Where, fix: str, required: bool = False) -> list[str]:
    """Checks that a field is a list of texts; a missing one is empty unless it is required."""
    if field not in record and required:
        raise where.error(f'no "{field}"', fix)
    values = record.get(field)
    if values is None and not required:
        return []
    if not isinstance(values, list):
        raise where.error(f'"{field}" is {_kind(values)}', fix)
    for value in values:
        if not isinstance(value, str):
            raise where.error(f'"{field}" holds {_kind(value)}', fix)
    return values


def _relevant(indices: list[int], relevances: Any, where: Where) -> list[int]:
    if not isinstance(relevances, list) or len(relevances) != len(indices):
        raise where.error('"target_rel" does not fit "target_ind"', "give one number for each index")
    for relevance in relevances:
        if isinstance(relevance, bool) or not isinstance(relevance, int | float):
            raise where.error(f'"target_rel" holds {_kind(relevance)}', "relevances are numbers")
    kept = [index for index, relevance in zip(indices, relevances, strict=True) if relevance > 0]
    if len(kept) < len(indices):
        where.repair("a label of relevance 0", "dropped")
    return kept


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    return "a list" if isinstance(value, list) else "an object"
