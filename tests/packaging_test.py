"""What the repository ships around its code: the wheel, pins, citation, templates and hooks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import vixml_jax

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Not in constraints.txt, whose pins are for the plain CPU environment of the tests; Beam has pins of its own.
UNPINNED_EXTRAS = {"gpu", "tpu", "beam"}


def canonical(requirement: str) -> str:
    """ "jax" for "jax[tpu]>=0.9"."""
    return re.split(r"[\[<>=!;\s]", requirement)[0].lower().replace("_", "-")


def test_there_is_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == vixml_jax.__version__ == citation["version"]
    assert PROJECT["license"] == citation["license"]
    for work in (citation, *citation["references"]):
        assert work["authors"], work
        assert work["title"], work


def pinned(file: str) -> list[str]:
    """The packages that a file of constraints pins."""
    lines = (ROOT / file).read_text().splitlines()[1:]
    names = [line.partition("==")[0].lower().replace("_", "-") for line in lines]
    assert all("==" in line for line in lines)
    assert len(set(names)) == len(names)
    return names


def test_what_ci_runs_is_pinned():
    wanted = [*PROJECT["dependencies"]]
    for extra, requirements in PROJECT["optional-dependencies"].items():
        wanted += [] if extra in UNPINNED_EXTRAS else requirements
    own = {PROJECT["name"]}  # an extra may ask for another one
    assert not {canonical(requirement) for requirement in wanted} - set(pinned("constraints.txt")) - own


def test_what_the_tests_of_beam_run_is_pinned():
    beam = {canonical(name) for name in PROJECT["optional-dependencies"]["beam"]}
    assert beam <= set(pinned("constraints-beam.txt"))
    # Elsewhere it would be the other tests' business as well.
    assert not beam & set(pinned("constraints.txt"))


@pytest.mark.parametrize("name", ["bug", "reproduction", "feature"])
def test_issue_forms(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"]
    assert form["description"]
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in asked} <= {"input", "textarea", "dropdown", "checkboxes"}
    ids = [part["id"] for part in asked]
    assert len(set(ids)) == len(ids)
    assert all(part["attributes"]["label"] for part in asked)
    assert any(part.get("validations", {}).get("required") for part in asked)


def test_hooks_run_the_tools_of_the_dev_extra():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"  # so that versions stand in constraints.txt alone
    dev = {canonical(name).removesuffix("-py") for name in PROJECT["optional-dependencies"]["dev"]}
    for hook in repo["hooks"]:
        folder, tool = hook["entry"].split()[0].rsplit("/", 1)
        assert folder == ".venv/bin"
        assert tool in dev


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from what git would commit."""
    root = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            copy = root / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", f"--outdir={root / 'dist'}"],
        cwd=root / "source", check=True, capture_output=True,
    )  # fmt: skip
    (found,) = (root / "dist").glob("*.whl")
    return found


def run(*command, **options) -> str:
    """Runs a command, with nothing of this checkout in its path, and returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **options)
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_installs_and_runs(wheel, tmp_path):
    """In a new environment, which borrows nothing of this one but the dependencies."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {
        f"vixml_jax/{path.relative_to(ROOT / 'vixml_jax')}"
        for path in (ROOT / "vixml_jax").rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".pyo")
    }
    assert package <= names
    assert {f"vixml_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "build"))]

    venv.create(tmp_path / "venv", with_pip=False)
    python, vixml = (tmp_path / "venv" / "bin" / name for name in ("python", "vixml"))
    run(
        *(sys.executable, "-m", "pip", f"--python={python}", "--disable-pip-version-check", "install"),
        *("--no-index", "--no-deps", wheel),
    )
    # A plain path: what is installed here in editable form stays out of it.
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import vixml_jax; print(vixml_jax.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(site)

    assert "vixml <command>" in run(vixml, "--help", cwd=tmp_path)
    (tmp_path / "truth.txt").write_text("3 4\n0:1 2:1\n1:1\n\n")
    (tmp_path / "scores.txt").write_text("3 4\n0:0.9 1:0.5 2:0.1\n0:0.3 1:0.2 2:0.1\n0:0.9 1:0.1 2:0.3\n")
    arguments = ("metrics", "--predictions=scores.txt", "--truth=truth.txt", "--json=-")
    figures = json.loads(run(vixml, *arguments, cwd=tmp_path))
    assert figures["P@1"] == pytest.approx(100 / 3)
    assert figures["R@3"] == pytest.approx(200 / 3)
    # Configs come along: none lies in the directory that this runs in.
    shown = run(vixml, "tables", "--table=1", cwd=tmp_path)
    assert "configs/lf_amazontitles_131k.py" in shown


@pytest.mark.network
def test_the_wheel_brings_its_dependencies(wheel, tmp_path):
    """From the registry, with the demo after it, as a user would."""
    venv.create(tmp_path / "venv", with_pip=True)
    bin_ = tmp_path / "venv" / "bin"
    run(bin_ / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel)
    shown = run(bin_ / "vixml", "demo", "--smoke", f"--workdir={tmp_path / 'demo'}", cwd=tmp_path)
    assert "P@1" in shown
    assert (tmp_path / "demo" / "smoke" / "report.html").is_file()
