"""Fresh seeds, and that no test file draws others while it is collected."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import fresh
import pytest

TESTS = Path(__file__).parent
RANDOM = {"SeedSequence", "default_rng", "time", "urandom", "uuid4", "token_hex"}


def drawn_at_import(tree: ast.Module) -> list[int]:
    """Lines outside functions that call something of RANDOM without a seed."""
    found: list[int] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for decorator in getattr(node, "decorator_list", []):
                visit(decorator)
            return
        if isinstance(node, ast.Call) and not node.args and not node.keywords:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            found.extend([node.lineno] * (name in RANDOM))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*_test.py")), ids=lambda path: path.stem)
def test_workers_collect_the_same_tests(path):
    lines = drawn_at_import(ast.parse(path.read_text(encoding="utf-8")))
    assert not lines, (
        f"{path}:{lines[0]}: take it from fresh.seeds, or make test finds other ids in each process"
    )


def test_the_check_notices():
    for text in (
        "SEEDS = [int(s) for s in np.random.SeedSequence().generate_state(2)]",
        "@pytest.mark.parametrize('seed', [np.random.default_rng().integers(9)])\ndef test(seed):\n    pass",
        "class A:\n    started = time.time()",
    ):
        assert drawn_at_import(ast.parse(text))
    assert not drawn_at_import(ast.parse("RNG = default_rng(3)\ndef f():\n    return default_rng()"))


def test_a_session_has_one_seed():
    program = "import fresh; print(*fresh.seeds(3))"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=TESTS, capture_output=True, text=True, check=True
    )
    assert list(map(int, run.stdout.split())) == fresh.seeds(3)
    assert len(set(fresh.seeds(3))) == 3
