"""The exceptions that are no bugs: a mistake, a run that diverged, a scheduler's wish; an error's causes."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Characters of a message; some hold a title, or the names of all tensors of a tower.
LONGEST = 20_000


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
        super().__init__(_one_line(f"{line}; {fix}" if fix else line))


def _one_line(text: str) -> str:
    """A text of any origin on one line: without what a terminal would obey, and no longer than helps."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    text = " ".join(text.split())
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class NotFinite(FloatingPointError):
    """Loss, gradients or other figures are no numbers any more; the message says where and what to try."""


class Preempted(Exception):
    """The process was asked to end (SIGTERM), has saved what there was to save, and can be started again."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error, then what it was raised from, back to the first; `from None` ends it."""
    seen = set()  # an error may be its own cause
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
