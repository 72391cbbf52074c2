from __future__ import annotations

import errno
import importlib
import os
import resource
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from absl import flags

import vixml_jax
from vixml_jax import cli
from vixml_jax import config as config_lib
from vixml_jax.config import define_config_flag
from vixml_jax.errors import UserError

# ml_collections loads config files in a way that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = Path(__file__).parent.parent
CONFIG = """
from vixml_jax import config as config_lib

def get_config(arg=""):
    args = config_lib.parse_arg(arg, images=0)
    config = config_lib.base()
    if args.images == 7:
        config.optimizer.lrr.x = 3
    config.vision.images = args.images
    return config
"""


@pytest.fixture
def job(monkeypatch):
    """A command `toy` whose main is replaced by the test: `job.main = lambda: ...`."""
    module = ModuleType("toy", "Does nothing: `vixml toy --out=FILE`.\n\nExamples:\n  vixml toy --out=x\n")

    def define_flags() -> None:
        flags.DEFINE_string("out", None, "Where it goes", required=True)
        flags.DEFINE_integer("count", 3, "How many", lower_bound=1)
        flags.DEFINE_float("rate", 0.5, "How fast")
        flags.DEFINE_bool("smoke", False, "Small")
        flags.DEFINE_enum("kind", "a", ["a", "b"], "Which")

    module.define_flags, module.main = define_flags, lambda: None
    monkeypatch.setitem(sys.modules, "toy", module)
    monkeypatch.setitem(cli.COMMANDS, "toy", ("toy", "does nothing"))
    return module


@pytest.fixture
def config_job(job, tmp_path):
    """The same command with --config and --workdir; yields it and a config file."""
    job.define_flags = define_config_flag
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return job, path


def fails(capsys, *arguments: str) -> str:
    """The one line that a wrong command line gives."""
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("vixml: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("vixml: error: ").strip()


def test_help_lists_every_command(capsys):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert cli.run(arguments) == 0
        shown = capsys.readouterr().out
        for name, (_, summary) in cli.COMMANDS.items():
            assert any(line.split() == [name, *summary.split()] for line in shown.splitlines())
        assert cli.EXAMPLE in shown


def test_help_imports_little():
    program = (
        "import sys; from vixml_jax import cli; cli.run(['--help']); "
        "print(len(sys.modules), 'numpy' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    modules, numpy = run.stdout.splitlines()[-1].split()
    assert int(modules) < 200
    assert numpy == "False"


def test_every_command_exists():
    for module, _ in cli.COMMANDS.values():
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("command", ["metrics", "prepare"])
def test_help_of_a_real_command(command, capsys):
    assert cli.run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"vixml {command} --" in shown
    assert "Examples:" in shown
    assert "verbosity" not in shown  # absl's own flags stay out


def test_help_of_a_command(job, capsys):
    for arguments in (["toy", "--help"], ["toy", "--out=x", "-h"], ["help", "toy"]):
        assert cli.run(arguments) == 0
        assert capsys.readouterr().out.splitlines()[-6:] == [
            "Flags:",
            "  --out=STRING  Where it goes (required)",
            "  --count=INT   How many (default: '3')",
            "  --rate=FLOAT  How fast (default: '0.5')",
            "  --[no]smoke   Small (default: 'false')",
            "  --kind=ENUM   <a|b>: Which (default: 'a')",
        ]


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    shown = capsys.readouterr().out.strip()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert shown == f"vixml {project['version']}"


def test_flags_reach_the_job_and_are_gone_afterwards(job):
    seen = []
    job.main = lambda: seen.append(
        (flags.FLAGS.out, flags.FLAGS.count, flags.FLAGS.smoke, flags.FLAGS.is_parsed())
    )
    before = set(flags.FLAGS)
    assert cli.run(["toy", "--out=x", "--count", "4", "--smoke"]) == 0
    assert cli.run(["toy", "--out=y"]) == 0
    assert seen == [("x", 4, True, True), ("y", 3, False, True)]
    assert set(flags.FLAGS) == before


def test_code_of_the_job_is_returned(job):
    job.main = lambda: 5
    assert cli.run(["toy", "--out=x"]) == 5


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["metrcs"], "unknown command 'metrcs'; did you mean metrics?"),
        (["zzz"], "unknown command 'zzz'; see `vixml --help`"),
        (["--out=x", "toy"], "unknown flag before the command '--out=x'; see `vixml --help`"),
        (["toy", "--outt=x"], "unknown flag --outt; did you mean --out?"),
        (["toy", "--out=x", "--nosmok"], "unknown flag --nosmok; did you mean --smoke?"),
        (["toy", "--out=x", "--zzz=1"], "unknown flag --zzz; see `vixml toy --help`"),
        (["toy"], "toy needs --out; see `vixml toy --help`"),
        (["toy", "--out=x", "--count=a"], "--count=a is not a whole number"),
        (["toy", "--out=x", "--rate=a"], "--rate=a is not a number"),
        (["toy", "--out=x", "--count"], "Missing value for flag --count; see `vixml toy --help`"),
        (["toy", "--out=x", "y"], "unexpected 'y'; flags are --name=value; see `vixml toy --help`"),
    ],
)
def test_mistakes_in_flags(job, capsys, arguments, line):
    assert fails(capsys, *arguments) == line


def test_values_out_of_range(job, capsys):
    assert fails(capsys, "toy", "--out=x", "--count=0").startswith("--count=0: ")
    assert "a|b" in fails(capsys, "toy", "--out=x", "--kind=c")
    assert fails(capsys, "toy", "--out=x", "--smoke=maybe").startswith("--smoke=maybe: ")


def test_config_and_overrides(config_job):
    job, path = config_job
    seen = []

    def main() -> None:
        config = flags.FLAGS.config
        seen.append((config.vision.images, config.optimizer.lr, config.dataset.fields, flags.FLAGS.workdir))

    job.main = main
    arguments = ["toy", f"--config={path}:images=2", "--workdir=w", "--config.optimizer.lr=3"]
    assert cli.run([*arguments, "--config.dataset.fields=('title','content')"]) == 0
    assert cli.run(["toy", "--config.train.epochs=3", "--config", str(path)]) == 0
    assert cli.run(["toy", f"--config={path}"]) == 0  # nothing of the last command line is left
    plain = (0, 2e-4, ("title",), None)
    assert seen == [(2, 3.0, ("title", "content"), "w"), plain, plain]


def unknown(field: str, near: str) -> str:
    return f"unknown config field config.{field}; did you mean config.{near}?"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--config.optimizer.lrr=1"], unknown("optimizer.lrr", "optimizer.lr")),
        (["--config.optimizer.lrr", "1"], unknown("optimizer.lrr", "optimizer.lr")),
        (["--config.optimzer.lr=1"], unknown("optimzer.lr", "optimizer.lr")),
        (["--config.vision.imges=1"], unknown("vision.imges", "vision.images")),
        (["--noconfig.nosuch"], unknown("nosuch", "")[:-1]),
        (["--config.nosuch.lr.x=1"], unknown("nosuch.lr.x", "")[:-1]),
        (["--config.train.epo-3"], unknown("train.epo-3", "train.epochs")),
        (["--config.optimizer.lr.x=1"], unknown("optimizer.lr.x", "optimizer.lr")),
        (["--config.optimizer.lr=fast"], "--config.optimizer.lr=fast is not a number"),
        (["--config.train.epochs=1.5"], "--config.train.epochs=1.5 is not a whole number"),
        (["--config.vision=3"], "--config.vision=3: "),
        (["--config.train.epochs"], "Missing value for flag --config.train.epochs"),
        (["--confg.train.epochs=3"], "unknown flag --confg.train.epochs; did you mean --config?"),
    ],
)  # fmt: skip
def test_mistakes_in_overrides(config_job, capsys, arguments, line):
    assert fails(capsys, "toy", f"--config={config_job[1]}", *arguments).startswith(line)


def test_mistakes_around_the_config_file(config_job, capsys, tmp_path):
    job, path = config_job
    job.main = lambda: flags.FLAGS.config
    assert fails(capsys, "toy", "--config.train.epochs=3") == (
        "--config.train.epochs without a config; give --config=FILE, or the --workdir of a run"
    )
    assert fails(capsys, "toy", "--config=nope.py").startswith("nope.py: no such config file")
    assert "no such config file" in fails(capsys, "toy", f"--config={tmp_path}")
    assert "unknown config argument 'imgs'" in fails(capsys, "toy", f"--config={path}:imgs=1")
    assert fails(capsys, "toy", f"--config={path}:images=7").startswith(f"{path}: row 8: AttributeError: ")
    path.write_text("def get_config(:\n")
    assert fails(capsys, "toy", f"--config={path}").startswith(f"{path}: row 1: not valid Python")
    path.write_text("x = 1\n")
    sys.modules.pop("config_config")  # else it is loaded over what an earlier command line left
    assert "get_config" in fails(capsys, "toy", f"--config={path}")
    path.write_text("import nothing_of_this_name\n")
    assert fails(capsys, "toy", f"--config={path}").startswith(f"{path}: row 1: ModuleNotFoundError")


def test_overrides_are_of_the_run_in_the_workdir_that_counts(config_job, tmp_path):
    """absl takes the last of several; names of directories may hold a colon."""
    job, _ = config_job
    job.main = lambda: seen.append((flags.FLAGS.config.train.seed, flags.FLAGS.config.train.epochs))
    seen, workdirs = [], [tmp_path / "first", tmp_path / "the:last"]
    for seed, workdir in enumerate(workdirs):
        config = config_lib.base()
        config.train.seed = seed
        config_lib.save(config, workdir / "config.json")
    given = [f"--workdir={workdir}" for workdir in workdirs]
    assert cli.run(["toy", *given, "--config.train.epochs=3"]) == 0
    assert cli.run(["toy", *given[::-1], "--config.train.epochs=3"]) == 0
    assert seen == [(1, 3), (0, 3)]


def test_a_command_without_a_config_names_the_override_that_it_does_not_take(job, capsys, tmp_path):
    config_lib.save(config_lib.base(), tmp_path / "config.json")
    job.define_flags = lambda: flags.DEFINE_string("workdir", None, "Where it is")
    line = fails(capsys, "toy", f"--workdir={tmp_path}", "--config.train.epochs=3")
    assert line.startswith("unknown flag --config.train.epochs; ")


def test_errors_of_users_take_one_line(job, capsys, tmp_path):
    def main() -> None:
        raise UserError("wrong\nhere", file="a.txt", row=3, fix="do that")

    job.main = main
    assert fails(capsys, "toy", "--out=x") == "a.txt: row 3: wrong here; do that"
    job.main = tmp_path.read_bytes
    assert fails(capsys, "toy", "--out=x") == f"{tmp_path}: is a directory"


@pytest.mark.parametrize(
    ("number", "problem", "fix"),
    [
        (errno.ENOSPC, "no space left on device", "make room"),
        (errno.EDQUOT, "disk quota exceeded", "make room"),
        (errno.EROFS, "read-only file system", "a place that can be written to"),
        (errno.EFBIG, "file too large", "ulimit"),
    ],
)
@pytest.mark.parametrize("file", [None, "a.txt"])
def test_a_disk_that_takes_no_more_is_one_line(job, capsys, number, problem, fix, file):
    """Only where a file was being opened, its name is known."""

    def main() -> None:
        raise OSError(number, os.strerror(number), file)

    job.main = main
    line = fails(capsys, "toy", "--out=x")
    assert line.startswith(f"{file}: {problem}" if file else problem)
    assert fix in line


def test_a_full_disk_that_others_report_is_one_line_too(job, capsys):
    """ArrayRecord and Orbax write from C++, and raise what is no OSError."""

    def main() -> None:
        try:
            raise ValueError("RESOURCE_EXHAUSTED: write failed: No space left on device; at byte 1024")
        except ValueError as error:
            raise RuntimeError("the save failed") from error

    job.main = main
    assert fails(capsys, "toy", "--out=x").startswith("no space left on device; make room")


@pytest.mark.parametrize("which", ["its own cause", "settled before"])
def test_a_bug_is_not_taken_for_a_full_disk(job, which):
    def main() -> None:
        try:
            raise RuntimeError("no space left on device")
        except RuntimeError:
            error = ValueError("deep inside")
            if which == "its own cause":
                raise error from error
            raise error from None

    job.main = main
    with pytest.raises(ValueError, match="deep inside"):
        cli.run(["toy", "--out=x"])


def test_a_name_that_is_too_long_is_one_line(job, capsys):
    path = Path("a" * 300)
    job.main = path.is_file
    assert fails(capsys, "toy", "--out=x") == f"{path}: file name too long"


def test_an_array_that_finds_no_room_is_one_line(job, capsys, tmp_path):
    """NumPy says how much it has written, and not why."""

    def main() -> None:
        with open(tmp_path / "array.npy", "wb") as file:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
            try:
                np.save(file, np.ones(100_000))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    job.main = main
    line = fails(capsys, "toy", "--out=x")
    assert line.startswith("an array could not be written as a whole; make room")


def test_what_a_terminal_would_obey_is_shown_and_not_sent():
    error = UserError("title 'a\x1b[2Jb\0c\u202ed' " + "x" * 10**6, file="a\nb")
    assert str(error).startswith("a b: title 'a\\x1b[2Jb\\x00c\\u202ed' xxx")
    assert len(str(error)) < 30_000
    assert str(UserError("日本語 é 👢")) == "日本語 é 👢"


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, KeyError, OSError, FloatingPointError])
def test_bugs_keep_their_traceback(job, error):
    def main() -> None:
        raise error("deep inside")

    job.main = main
    with pytest.raises(error, match="deep inside"):
        cli.run(["toy", "--out=x"])


def test_a_bug_in_the_flags_is_no_mistake_of_the_user(job):
    def define_flags() -> None:
        raise AttributeError("deep inside")

    job.define_flags = define_flags
    with pytest.raises(AttributeError, match="deep inside"):
        cli.run(["toy"])


def test_interrupt(job, capsys):
    def main() -> None:
        raise KeyboardInterrupt

    job.main = main
    assert cli.run(["toy", "--out=x"]) == 130
    assert capsys.readouterr().err == "vixml: interrupted\n"


def vixml(*arguments: str, **options) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vixml_jax", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_from_a_shell(tmp_path):
    with vixml("metrics", "--predictions=nope.npz", f"--truth={tmp_path}/nope.txt") as process:
        out, err = process.communicate()
    assert process.returncode == 2
    assert not out
    assert err == f"vixml: error: {tmp_path}/nope.txt: no such file\n"


def test_a_reader_that_leaves_is_no_error():
    with vixml("--help") as process:
        process.stdout.close()
        err = process.stderr.read()
    assert not err
    assert process.wait() in (0, cli.BROKEN_PIPE)


@pytest.mark.parametrize("closed", [1, 2])
def test_closed_streams_are_no_error(closed):
    command = [sys.executable, "-m", "vixml_jax", "--help"]
    done = subprocess.run(
        ["bash", "-c", f'exec "$@" {closed}>&-', "bash", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_face_is_lazy():
    program = (
        "import sys, vixml_jax; print('jax' in sys.modules, sorted(vixml_jax.__all__) == vixml_jax.__all__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.split() == ["False", "True"]
    for name in vixml_jax.__all__:
        assert name in dir(vixml_jax)
    assert vixml_jax.metrics.evaluate is importlib.import_module("vixml_jax.metrics").evaluate
    with pytest.raises(AttributeError, match="nothing"):
        _ = vixml_jax.nothing
