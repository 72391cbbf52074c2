"""The exceptions that are no bugs: a user's mistake, and a scheduler's wish."""

from __future__ import annotations

import os


class UserError(Exception):
    """A mistake in a user's files, flags or config; the command line prints it as one line and exits with 2.

    Args:
      problem: what is wrong, in one clause.
      file: the file that holds it, if any.
      row: the one-based line of `file`, if any.
      fix: what would be right, in one clause.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | os.PathLike[str] | None = None,
        row: int | None = None,
        fix: str | None = None,
    ):
        self.problem, self.file, self.row, self.fix = problem, file, row, fix
        parts = []
        if file is not None:
            parts.append(os.fspath(file))
        if row is not None:
            parts.append(f"row {row}")
        parts.append(problem)
        line = ": ".join(parts)
        super().__init__(" ".join((f"{line}; {fix}" if fix else line).split()))


class Preempted(Exception):
    """The process was asked to end (SIGTERM), has saved what there was to save, and can be started again."""
