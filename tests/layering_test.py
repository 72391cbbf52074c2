"""Holds the architecture: imports point one way, and what we do without stays out.

jobs -> training parts -> parts that do not know each other -> ground. A new module is placed by adding its
name to LEVELS.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vixml_jax"

JOBS, TRAINING, PARTS, GROUND = 4, 3, 2, 1
# Level -> groups -> modules; a package stands for all that is in it. Modules of a group may import each
# other, groups of one level where MIXES says so.
LEVELS: dict[int, dict[str, tuple[str, ...]]] = {
    JOBS: {
        "cli": ("cli", "__main__"),
        "jobs": (
            *(
                "demo",
                "embed",
                "evaluate",
                "export",
                "index_labels",
                "plan",
                "planning",
                "predict",
                "prepare",
                "report",
                "report_charts",
            ),
            *("report_examples", "report_published", "report_runs", "score", "serve", "serving"),
            *("tables", "train", "tune", "xmc_model"),
        ),
    },
    TRAINING: {
        "training": (
            *("added_labels", "banks", "centroids", "checkpoint", "classifier_stage", "classifiers"),
            *("collapse", "embedding", "global_batch", "label_changes", "model_factory"),
            *("not_finite", "optim", "run", "search", "train_state", "train_step"),
        ),
    },
    PARTS: {
        "data": ("data", "demo_catalogue"),
        "losses": ("loss_terms", "losses"),
        "metrics": ("metrics", "ranking"),
        "mining": ("mining", "two_means"),
        "models": ("models",),
        "retrieval": ("retrieval",),
    },
    GROUND: {
        "ground": (
            *(
                "config",
                "config_errors",
                "config_files",
                "config_rules",
                "run_config",
                "distributed",
                "errors",
                "files",
                "host_memory",
                "npy",
                "ownership",
                "preemption",
                "progress",
                "recipes",
                "row_tables",
                "sharding",
                "tracking",
            ),
            "types",
        ),
    },
}
# Whether groups of one level may import each other.
MIXES = {JOBS: True, TRAINING: True, PARTS: False, GROUND: True}
# The face: imports nothing until it is used, and then anything.
FACE = "__init__"
# They import no JAX, directly or through others.
WITHOUT_JAX = ("cli", "config_errors", "config_files",
                "run_config", "errors", "files", "host_memory", "metrics",
               "plan", "progress", "ranking", "recipes", "score", "tables",
               "data.predictions_file", "data.sparse_text")  # fmt: skip
MAY_PRINT = (JOBS, "progress")

BANNED_MODULES = {
    "jax._src": "jax's private modules change without notice",
    "jax.experimental.pjit": "jax.jit with shardings has replaced it",
    "jax.experimental.shard_map": "jax.shard_map has replaced it",
    "torch": "only tests compare with it",
    "tensorflow": "we do without it",
}
BANNED_ATTRIBUTES = {"nnx.DiffState": "split the state instead", "jax._src": "private"}

FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """`data.formats` for vixml_jax/data/formats.py, `data` for vixml_jax/data/__init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def place_of(module: str) -> tuple[int, str]:
    """Level and group."""
    top = module.partition(".")[0]
    for level, groups in LEVELS.items():
        for group, modules in groups.items():
            if top in modules:
                return level, group
    pytest.fail(f"vixml_jax.{module} has no level yet: add {top!r} to LEVELS in {Path(__file__).name}")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, names taken from a module included."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import; write vixml_jax in full"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def own_imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, module of this package)."""
    own = []
    for line, name in imports_of(path):
        package, _, rest = name.partition(".")
        if package == "vixml_jax" and rest and not rest.startswith("__"):
            own.append((line, rest))
    return own


def dotted(node: ast.AST) -> str:
    """ "a.b.c" for such an expression, else ""."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


def by_name(path: Path) -> str:
    return module_of(path)


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_imports_point_one_way(path):
    module = module_of(path)
    if module == FACE:
        return
    level, group = place_of(module)
    for line, imported in own_imports_of(path):
        where = f"{path}:{line}: {module} imports {imported}"
        imported_level, imported_group = place_of(imported)
        assert imported_level <= level, f"{where}, which is above it"
        if imported_level == level and not MIXES[level]:
            assert imported_group == group, f"{where}, but parts do not know each other"
        assert imported_group != "cli" or group == "cli", f"{where}: nobody imports the command line"


@pytest.mark.parametrize("path", FILES, ids=by_name)
def test_bans(path):
    for line, name in imports_of(path):
        for banned, reason in BANNED_MODULES.items():
            assert not f"{name}.".startswith(f"{banned}."), f"{path}:{line}: {banned}: {reason}"
    module = module_of(path)
    may_print = module != FACE and (place_of(module)[0] in MAY_PRINT or module in MAY_PRINT)
    for node in ast.walk(tree_of(path)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute):
            assert dotted(node) not in BANNED_ATTRIBUTES, f"{where}: {dotted(node)}"
        elif isinstance(node, ast.With):
            for item in node.items:
                entered = dotted(item.context_expr)
                assert entered.split(".")[-1] != "mesh", (
                    f"{where}: `with mesh:` is deprecated; use sharding.use"
                )
        elif isinstance(node, ast.Call) and dotted(node.func) == "print":
            assert may_print, f"{where}: print; use progress or logging"


def test_what_needs_no_jax_imports_none():
    modules = [f"vixml_jax.{name}" for name in WITHOUT_JAX]
    program = (
        "import importlib, sys\n"
        "heavy = {'jax', 'flax', 'grain', 'tensorflow_datasets', 'transformers'}\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        "    assert not heavy & set(sys.modules), name"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert not run.returncode, run.stderr


def test_the_table_notices(tmp_path, monkeypatch):
    """The checks above fail when they should."""
    package = tmp_path / "vixml_jax"
    package.mkdir()
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", package)
    for name, text, message in (
        ("losses", "from vixml_jax import train", "above it"),
        ("losses", "def f():\n    import vixml_jax.data.dataset", "do not know each other"),
        ("train", "from vixml_jax.cli import run", "nobody imports"),
        ("train", "from . import data", "relative"),
    ):
        path = package / f"{name}.py"
        path.write_text(text)
        tree_of.cache_clear()
        with pytest.raises(AssertionError, match=message):
            test_imports_point_one_way(path)
    for text in (
        "import jax._src.core",
        "from jax._src import core",
        "import jax\njax._src",
        "from jax.experimental import pjit",
        "with self.mesh:\n    pass",
        "x = nnx.DiffState",
        "print(3)",
    ):
        path = package / "mining.py"
        path.write_text(text)
        tree_of.cache_clear()
        with pytest.raises(AssertionError):
            test_bans(path)
    (package / "novel.py").write_text("")
    with pytest.raises(pytest.fail.Exception, match="'novel' to LEVELS"):
        test_imports_point_one_way(package / "novel.py")
    tree_of.cache_clear()
