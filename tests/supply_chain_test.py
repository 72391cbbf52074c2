"""Nothing that comes from elsewhere is run: what would do so is called nowhere in the tree."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "vixml_jax").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")])
# Names of what runs a text, a pickle or a program, or unpacks whatever an archive names.
NEVER = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.spawnv",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open",
    "dill.load", "joblib.load", "torch.load", "yaml.load", "subprocess.run", "subprocess.Popen",
    "subprocess.call", "subprocess.check_output", "shutil.unpack_archive", "tarfile.open",
}  # fmt: skip
NEVER_METHODS = {"extractall", "extract"}


def calls(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def faults(path: Path) -> list[str]:
    found = []
    for node, name in calls(path):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in NEVER or name.rpartition(".")[2] in NEVER_METHODS:
            found.append(f"{path.name}:{node.lineno}: {name}")
        if name == "np.load" and not {("allow_pickle", "False")} <= set(keywords.items()):
            found.append(f"{path.name}:{node.lineno}: np.load without allow_pickle=False")
        if name.endswith("from_pretrained") and keywords.get("trust_remote_code") != "False":
            found.append(f"{path.name}:{node.lineno}: {name} without trust_remote_code=False")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_runs_what_a_file_says(path):
    assert faults(path) == []


def test_it_would_be_seen(tmp_path):
    bad = tmp_path / "bad.py"
    for line in (
        "eval(x)",
        "pickle.loads(x)",
        "archive.extractall(x)",
        "np.load(x)",
        "np.load(x, allow_pickle=True)",
        "AutoModel.from_pretrained(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "subprocess.run(x, shell=True)",
    ):
        bad.write_text(line + "\n")
        assert len(faults(bad)) == 1, line
