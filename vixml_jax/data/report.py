"""What preparing a dataset found: counts, and every row that was repaired or left out."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple


class Finding(NamedTuple):
    """One repaired or rejected row.

    Attributes:
      file: path relative to the raw folder.
      line: one-based.
      problem: what was wrong.
      done: what was done about it.
      name: of a picture, as the raw folder names it.
      detail: particulars of the problem.
    """

    file: str
    line: int
    problem: str
    done: str
    name: str = ""
    detail: str = ""


class Report:
    """Collects findings while a raw folder is read.

    Args:
      root: the raw folder; files are named relative to it.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self._root = os.path.abspath(root)
        self.repaired: list[Finding] = []
        self.rejected: list[Finding] = []
        self.notes: list[str] = []

    def repair(self, file: Path, line: int, problem: str, done: str) -> None:
        """Notes a row that was kept in a repaired form."""
        self.repaired.append(Finding(self.relative(file), line, problem, done))

    def reject(
        self, file: Path, line: int, problem: str, done: str = "left out", *, name: str = "", detail: str = ""
    ) -> None:
        """Notes a row, or a part of it, that was not used."""
        self.rejected.append(Finding(self.relative(file), line, problem, done, name, detail))

    def note(self, text: str) -> None:
        """Notes something about a whole file."""
        self.notes.append(text)

    def relative(self, file: str | os.PathLike[str]) -> str:
        """Names a file relative to the raw folder."""
        return os.path.relpath(os.path.abspath(file), self._root)

    def summary(self) -> dict[str, int]:
        """Counts the findings by problem, most frequent first."""
        return dict(Counter(finding.problem for finding in [*self.repaired, *self.rejected]).most_common())

    def as_json(self) -> dict[str, Any]:
        """Returns all findings as JSON-able values."""
        return {
            "notes": self.notes,
            "problems": self.summary(),
            "repaired": [_as_json(finding) for finding in self.repaired],
            "rejected": [_as_json(finding) for finding in self.rejected],
        }


def _as_json(finding: Finding) -> dict[str, Any]:
    return {key: value for key, value in finding._asdict().items() if value != ""}
