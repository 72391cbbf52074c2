"""The documentation: commands are real, links lead somewhere, the reference is current, examples work.

The blocks themselves are executed in docs_run_test.py.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys

import documents
import numpy as np
import pyarrow as pa
import pytest
import tiny
from documents import PAGES, ROOT

from vixml_jax import cli, config_files, embed
from vixml_jax import config as config_lib
from vixml_jax.prepare import prepare

# ml_collections loads config files in a way that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

WRITTEN = list(documents.written_commands())
BLOCKS = [block for page in PAGES for block in documents.blocks(page)]


@pytest.mark.parametrize(("place", "command"), WRITTEN, ids=[f"{p} {c.split()[1]}" for p, c in WRITTEN])
def test_every_written_command_is_one(place, command, monkeypatch, capsys, tmp_path):
    """Its flags exist and take such values; a config is there and has the fields that are overridden."""
    monkeypatch.chdir(ROOT)
    # Every workdir is taken for that of a run.
    config_lib.save(config_lib.base(), tmp_path / "config.json")
    of_run = config_files.of_run
    monkeypatch.setattr(config_files, "of_run", lambda workdir: of_run(str(tmp_path)))
    words = shlex.split(re.split(r"\s[|>&]", command)[0], comments=True)[1:]
    assert words[0] in cli.COMMANDS, f"{place}: {command}"
    monkeypatch.setattr(importlib.import_module(cli.COMMANDS[words[0]][0]), "main", lambda: 0)
    assert not cli.run(words), f"{place}: {command}: {capsys.readouterr().err}"


def test_commands_are_found():
    """The checks above look at something."""
    assert documents.commands("a | vixml b --c\nvixml d \\\n  --e  # f\n. x") == [
        (0, "vixml b --c"),
        (1, "vixml d  --e  # f"),
    ]
    named = {command.split()[1] for _, command in WRITTEN}
    assert named == set(cli.COMMANDS), "every command stands in README, docs or docstrings, and no other"


def test_the_readme_lists_every_command():
    listed = re.findall(r"^\| `vixml (\w+)`", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(cli.COMMANDS)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_blocks_say_what_they_hold(block):
    if block.language == "python":
        ast.parse(block.text, str(block))
    elif block.language != "sh":
        lines = block.text.split("\n")
        assert not [line for line in lines if re.match(r"(vixml|make|python|launch/\S+) [a-z-]", line)], (
            f"{block}: commands stand in ```sh, so that the tests execute them"
        )


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_help_has_examples(command, capsys):
    assert not cli.run([command, "--help"])
    shown = capsys.readouterr().out
    examples = documents.commands(shown.partition("Examples:\n")[2].partition("\n\n")[0])
    assert [line for _, line in examples if line.split()[1] == command]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "api.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        target = "".join(target)
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        if found.suffix == ".png":
            assert found.stat().st_size < 200_000, f"{page.name}: {target}"
        if anchor:
            assert anchor in documents.anchors(found), f"{page.name}: {target}"


@pytest.fixture(scope="module")
def make_api():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_current(make_api):
    assert make_api.OUT.read_text(encoding="utf-8") == make_api.render(), "run `make api`"


def test_documented_arguments_are_the_real_ones(make_api):
    for section in make_api.SECTIONS:
        tree = ast.parse(make_api._source(section.module).read_text(encoding="utf-8"))
        for definition in make_api.definitions(tree, section):
            functions = [definition, *getattr(definition, "body", [])]
            for function in functions:
                if not isinstance(function, ast.FunctionDef) or not ast.get_docstring(function):
                    continue
                lines = ast.get_docstring(function).split("\n")
                if "Args:" not in lines:
                    continue
                body = make_api._indented(lines[lines.index("Args:") + 1 :])
                documented = {
                    name.lstrip("*") for names, _ in make_api._items(body) for name in names.split(", ")
                }
                given = function.args
                real = {
                    argument.arg
                    for argument in [
                        *(given.posonlyargs + given.args + given.kwonlyargs),
                        *filter(None, (given.vararg, given.kwarg)),
                    ]
                }
                assert documented == real - {"self", "cls"}, f"{section.module}.{function.name}"


def test_markdown_of_docstrings(make_api):
    doc = (
        "One <line>.\n\nTwo `a<b` _x_ a_b:\n  code * here\n\nArgs:\n  a, b: what\n    they are\n  c: it\n\n"
        "Returns:\n  A value,\n  of two lines.\n\nFunctions\n\n  * do this\n    and that\n  * or not"
    )
    assert make_api.markdown(doc) == (
        "One \\<line>.\n\nTwo `a<b` \\_x\\_ a_b:\n\n```text\ncode * here\n```\n\n**Args**\n\n"
        "* `a`, `b`: what they are\n* `c`: it\n\n**Returns**\n\nA value,\nof two lines.\n\nFunctions\n\n"
        "* do this\n  and that\n* or not"
    )


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The scripts of docs/analysis.md, and labels of which two pairs nearly coincide."""
    root = tmp_path_factory.mktemp("analysis")
    for block in documents.blocks(ROOT / "docs" / "analysis.md"):
        if block.file:
            (root / block.file).write_text(block.text, encoding="utf-8")
    prepare(tiny.write_raw(root / "raw", seed=0, images=False), root / "dataset", "tiny")
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(30, 16)).astype(np.float32)
    vectors[7] = vectors[3] + 0.01 * rng.normal(size=16)
    vectors[20] = vectors[11] + 0.1 * rng.normal(size=16)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    uids, titles = [f"l{i}" for i in range(30)], [f"label {i}" for i in range(30)]
    embed.write_parquet(root / "labels.parquet", 16, [embed.Part(vectors, uids, titles)])
    return root


def script(root, *command) -> str:
    run = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    return run.stdout


def test_near_duplicates_are_found(scripts, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    lines = script(scripts, "near_duplicates.py", "labels.parquet", "0.9").splitlines()
    assert lines[0].startswith("2 pairs of 30 labels")
    assert [re.findall(r"label (\d+)", line) for line in lines[1:]] == [["3", "7"], ["11", "20"]]


def test_the_map_shows_every_label(scripts, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script(scripts, "map.py", "labels.parquet", "dataset", "map.png")
    with Image.open(scripts / "map.png") as image:
        assert image.size == (1600, 1200)
        drawn = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (drawn == (10, 106, 131)).all(1).sum() > 30 * 8  # outlines of 30 circles
    assert pa.parquet.read_table(scripts / "labels.parquet").num_rows == 30
