"""Writes docs/api.md from the docstrings of the Python face: `python docs/make_api.py`.

Reads the source alone and imports nothing of the package. `--check` writes nothing and ends with 1 where
docs/api.md is not what the docstrings say.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "api.md"
HEAD = """# API reference

Made from the docstrings by `make api`. After `import vixml_jax as vx`, which is quick, everything here is
imported when it is first used. Letters in shapes and names are those of [notation.md](notation.md): N rows,
Q queries, L labels, D dimensions. A mistake of the user is an `errors.UserError`. The command line is in the
[README](../README.md#commands) and in `vixml <command> --help`.
"""


class Section(NamedTuple):
    """A heading of the page.

    Attributes:
      title: as one writes it after `import vixml_jax as vx`.
      module: where its names are defined.
      names: which ones, in this order; empty for all public ones.
      prefix: of the names, as one writes them.
    """

    title: str
    module: str
    names: tuple[str, ...] = ()
    prefix: str = ""


SECTIONS = (
    Section("Models", "xmc_model", ("XmcModel",), "vx."),
    Section(
        *("Data", "data.dataset", ("load", "holdout", "subset", "XmcDataset", "Split")),
        prefix="vx.data.",
    ),
    Section("Metrics", "metrics", prefix="vx.metrics."),
    Section("Retrieval", "retrieval", ("build", "load"), "vx.retrieval."),
    Section("An index", "retrieval.index", ("Index",), "vx.retrieval.index."),
    Section("Losses", "losses", prefix="vx.losses."),
    Section("Mining", "mining", prefix="vx.mining."),
    Section(
        *("Towers", "models.hub", ("load_text_tower", "load_vision_tower", "text_config", "vision_config")),
        prefix="vx.models.hub.",
    ),
    Section("Preparing", "prepare", ("prepare",), "vixml_jax.prepare."),
    Section("Training", "train", ("train",), "vixml_jax.train."),
    Section("Embeddings", "embed", ("embed",), "vixml_jax.embed."),
    Section("Reports", "report", ("write_report",), "vixml_jax.report."),
    Section("Errors", "errors", ("UserError",), "vixml_jax.errors."),
)
# Sections of a docstring whose lines are "name: what it is".
NAMED = ("Args", "Attributes")
PROSE = ("Returns", "Yields", "Raises")

Definition = ast.FunctionDef | ast.ClassDef


def main() -> int:
    """Writes or checks the page."""
    page = render()
    if sys.argv[1:] == ["--check"]:
        return int(not OUT.is_file() or OUT.read_text(encoding="utf-8") != page)
    OUT.write_text(page, encoding="utf-8")
    return 0


def render() -> str:
    """The whole page."""
    parts = [HEAD, "\n".join(f"* [{section.title}](#{_anchor(section.title)})" for section in SECTIONS)]
    for section in SECTIONS:
        tree = ast.parse(_source(section.module).read_text(encoding="utf-8"))
        parts.append(f"## {section.title}")
        if not section.names and (doc := ast.get_docstring(tree)):
            parts.append(markdown(doc))
        for definition in definitions(tree, section):
            parts.append(entry(definition, section.prefix))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def definitions(tree: ast.Module, section: Section) -> list[Definition]:
    """What a section shows of its module, in the section's order or else the module's.

    Raises:
      KeyError: if one of the section's names is not defined there.
    """
    found = {node.name: node for node in tree.body if isinstance(node, Definition)}
    if section.names:
        return [found[name] for name in section.names]
    return [node for name, node in found.items() if not name.startswith("_")]


def entry(node: Definition, prefix: str) -> str:
    """One function or class, with its methods.

    Raises:
      ValueError: if it has no docstring.
    """
    if isinstance(node, ast.FunctionDef):
        return "\n\n".join([f"### `{prefix}{node.name}`", _code(signature(node)), markdown(_doc(node))])
    parts = [f"### `{prefix}{node.name}`", markdown(_doc(node))]
    for method in node.body:
        if not isinstance(method, ast.FunctionDef) or method.name.startswith("_"):
            continue
        kinds = {getattr(kind, "id", getattr(kind, "attr", "")) for kind in method.decorator_list}
        if kinds & {"property", "cached_property"}:
            returned = f": {ast.unparse(method.returns)}" if method.returns else ""
            shown = f"{method.name}{returned}"
        else:
            shown = signature(method, drop_first=True)
        parts += [f"#### `{node.name}.{method.name}`", _code(shown), markdown(_doc(method))]
    return "\n\n".join(parts)


def signature(node: ast.FunctionDef, drop_first: bool = False) -> str:
    """`name(arguments) -> result`, on one line where it fits; without `self` where `drop_first`."""
    arguments = _arguments(node.args)[drop_first:]
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{node.name}({', '.join(arguments)}){returned}"
    if len(line) <= 100:
        return line
    one_each = "".join(f"    {argument},\n" for argument in arguments)
    return f"{node.name}(\n{one_each}){returned}"


def markdown(doc: str) -> str:
    """A docstring as Markdown: sections become lists, indented lines code."""
    blocks: list[str] = []
    lines = doc.split("\n")
    while lines:
        line = lines.pop(0)
        name = line.rstrip(":")
        if line.endswith(":") and name in NAMED + PROSE:
            body = _indented(lines)
            if name in NAMED:
                blocks.append(f"**{name}**\n\n" + "\n".join(_item(*item) for item in _items(body)))
            else:
                blocks.append(f"**{name}**\n\n{_prose(body)}")
        elif line.startswith("  * "):
            bullets = "\n".join([line[2:], *_indented(lines)])
            blocks.append("\n".join(f"* {_plain(bullet)}" for bullet in bullets[2:].split("\n* ")))
        elif line.startswith("  "):
            blocks.append(_code("\n".join([line[2:], *_indented(lines)]), "text"))
        elif line.strip():
            paragraph = [line]
            while lines and lines[0].strip() and not lines[0].startswith("  "):
                paragraph.append(lines.pop(0))
            blocks.append(_plain("\n".join(paragraph)))
    return "\n\n".join(blocks)


def _items(body: list[str]) -> list[tuple[str, str]]:
    """("name", "what it is") of each item; names may be several, and further lines stand deeper."""
    items: list[tuple[str, str]] = []
    for line in body:
        if line[:1].strip():
            key, _, text = line.partition(":")
            items.append((key, text))
        elif items:
            items[-1] = (items[-1][0], f"{items[-1][1]} {line}")
    return items


def _item(names: str, text: str) -> str:
    code = ", ".join(f"`{name}`" for name in names.split(", "))
    return f"* {code}: {_plain(' '.join(text.split()))}"


def _prose(body: list[str]) -> str:
    paragraphs = "\n".join(body).strip("\n").split("\n\n")
    return "\n\n".join(_plain(inspect.cleandoc(text)) for text in paragraphs)


def _indented(lines: list[str]) -> list[str]:
    """Takes the lines that stand deeper from the front of `lines`, two blanks off each."""
    taken = []
    while lines and (lines[0].startswith("  ") or not lines[0].strip()):
        taken.append(lines.pop(0)[2:])
    while taken and not taken[-1].strip():
        taken.pop()
    return taken


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: outside of code, what it takes for mark-up is escaped."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(
        piece if piece.startswith("`") else re.sub(r"([<*\\]|\b_|_\b)", r"\\\1", piece) for piece in pieces
    )


def _arguments(given: ast.arguments) -> list[str]:
    """Each argument with its type and default, as ruff would format it; also the bare `*`."""
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + given.defaults
    parts = [_argument(*pair) for pair in zip(plain, defaults, strict=True)]
    if given.vararg:
        parts.append(f"*{ast.unparse(given.vararg)}")
    elif given.kwonlyargs:
        parts.append("*")
    parts += [_argument(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg:
        parts.append(f"**{ast.unparse(given.kwarg)}")
    return parts


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return ast.unparse(argument)
    return f"{ast.unparse(argument)}{' = ' if argument.annotation else '='}{ast.unparse(default)}"


def _doc(node: Definition) -> str:
    doc = ast.get_docstring(node)
    if not doc:
        raise ValueError(f"{node.name} (line {node.lineno}) has no docstring")
    return doc


def _source(module: str) -> Path:
    path = ROOT / "vixml_jax" / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text}\n```"


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main())
