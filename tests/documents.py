"""What the documentation says that can be tried: fenced blocks, command lines, links."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"]
    if path.name not in ("api.md", "CHANGELOG.md")
)
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
_FILE = re.compile(r"<!-- file: (\S+) -->")


class Block(NamedTuple):
    """A fenced block of a page.

    Attributes:
      page: where it stands.
      line: one-based, of its first line of text.
      language: what stands behind the fence, "" for nothing.
      text: the lines between the fences.
      not_run: why the tests do not execute it, from the comment before it; "" if they do.
      file: what it is saved as, from the comment before it; "" if it is not.
    """

    page: Path
    line: int
    language: str
    text: str
    not_run: str
    file: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found: list[Block] = []
    opened: tuple[int, str] | None = None
    body: list[str] = []
    before = ""
    for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), 1):
        if line.startswith("```"):
            if opened is None:
                opened, body = (number + 1, line[3:].strip()), []
                continue
            not_run, file = _NOT_RUN.fullmatch(before), _FILE.fullmatch(before)
            found.append(
                Block(
                    page,
                    *opened,
                    "\n".join(body) + "\n",
                    not_run[1] if not_run else "",
                    file[1] if file else "",
                )
            )
            opened, before = None, ""
        elif opened is not None:
            body.append(line)
        elif line.strip():
            before = line.strip()
    assert opened is None, f"{page}: a fence is not closed"
    return found


def commands(text: str) -> list[tuple[int, str]]:
    """(line from 0, command) of every `vixml` command of a shell script, continued lines joined."""
    found = []
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if not (start := re.search(r"(?:^|[|;(] ?)\s*(vixml [a-z].*)", line)):
            continue
        command, further = start[1], number
        while command.rstrip().endswith("\\") and further + 1 < len(lines):
            further += 1
            command = command.rstrip()[:-1] + " " + lines[further].strip()
        found.append((number, command))
    return found


def written_commands() -> Iterator[tuple[str, str]]:
    """(place, command) of every full `vixml` command line in pages and docstrings."""
    for page in PAGES:
        for block in blocks(page):
            if block.language == "sh":
                for line, command in commands(block.text):
                    yield f"{page.relative_to(ROOT)}:{block.line + line}", command
        yield from _inline(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))
    for folder in ("vixml_jax", "configs", "data_prep", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            place = str(path.relative_to(ROOT))
            for line, command in commands(doc):
                yield f"{place}:{line + 1}", command
            yield from _inline(doc, place)


def _inline(text: str, place: str) -> Iterator[tuple[str, str]]:
    """Commands between backticks that have flags with values; `vixml prepare --out` only names a flag."""
    for found in re.finditer(r"(?<!`)`(vixml [a-z]+ [^`]*=[^`]*)`(?!`)", text):
        yield f"{place}:{text.count(chr(10), 0, found.start()) + 1}", " ".join(found[1].split())


def anchors(page: Path) -> set[str]:
    """The names that headings of a page have in links, as GitHub makes them."""
    names = set()
    for line in page.read_text(encoding="utf-8").split("\n"):
        if line.startswith("#"):
            words = re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower())
            names.add(words.replace(" ", "-"))
    return names
