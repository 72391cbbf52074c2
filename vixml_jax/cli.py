"""The command line: `vixml <command> [flags]`.

A command is a module with `define_flags()`, which registers absl flags, and `main() -> int | None`, which
does the work; its docstring is its help. Modules are imported only when their command is called, so that
`vixml --help` and `vixml metrics` do not wait for JAX.

Exit codes: 0 success, 2 a user's mistake (one line on standard error says what would be right), 75 training
was pre-empted (SIGTERM; all is saved, the same command continues), 130 interrupted; a bug keeps its traceback
and exits with 1.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

from vixml_jax import __version__, config_files, host_memory
from vixml_jax.errors import NotFinite, Preempted, UserError, causes

# Command -> its module, and what it does.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("vixml_jax.demo", "train text-only and with pictures on an embedded catalogue, compare both"),
    "prepare": (
        "vixml_jax.prepare",
        "turn a raw folder into a prepared dataset, with a report of every repair",
    ),
    "train": ("vixml_jax.train", "train; run again on the same workdir it resumes"),
    "eval": ("vixml_jax.evaluate", "embed, retrieve and score the test split with the newest checkpoint"),
    "tune": ("vixml_jax.tune", "choose how labels are searched, on held-out training queries"),
    "embed": ("vixml_jax.embed", "export embeddings of train, test, labels or any JSONL"),
    "index": ("vixml_jax.index_labels", "build the label index, add labels to it or take some out"),
    "predict": ("vixml_jax.predict", "label new queries: JSONL in, JSONL out"),
    "serve": ("vixml_jax.serve", "answer over HTTP, with a start page"),
    "report": (
        "vixml_jax.report",
        "one page: figures, curves, examples with their pictures, embedding map",
    ),
    "export": (
        "vixml_jax.export",
        "write a Hugging Face directory that transformers and sentence-transformers load",
    ),
    "plan": (
        "vixml_jax.plan",
        "compile ahead of time for a TPU slice or other devices: memory, links, least time",
    ),
    "tables": ("vixml_jax.tables", "the paper's tables: a command for each row, and what was measured"),
    "metrics": ("vixml_jax.score", "score a prediction file against truth; no model, no accelerator"),
}
# They run towers over and over, and end: what they free they will want again.
KEEP_MEMORY = ("demo", "train", "eval", "tune", "embed", "predict")
EXAMPLE = "vixml train --config=configs/demo.py:images=3 --workdir=runs/demo/vixml"
PREEMPTED = 75  # sysexits.h: a temporary failure, try again
INTERRUPTED = 130
# What a disk says that takes no more, whatever was written, and what to do about it. Python knows the file's
# name only where it was being opened.
_DISK = {
    errno.ENOSPC: "make room and run the same command again",
    errno.EDQUOT: "make room and run the same command again",
    errno.EFBIG: "raise the limit (ulimit -f) and run the same command again",
    errno.EROFS: "give a place that can be written to",
}
# What it says of a path that a user has given.
_PATH = (
    errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP
)  # fmt: skip
# What NumPy raises instead, without the system's reason.
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")
BROKEN_PIPE = 141  # what a shell shows for a program that SIGPIPE ended


def run(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code.

    Args:
      argv: what follows `vixml`; by default that of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # not of a caller's process
        _open_closed_streams()
        if arguments and arguments[0] in KEEP_MEMORY:
            host_memory.keep_freed()
    return _exit_code("vixml", lambda: _dispatch(arguments, is_own=argv is None))


def run_job(job: ModuleType, program: str, argv: Sequence[str] | None = None) -> int:
    """Runs one job as a program of its own, with the same flags, help, errors and exit codes.

    Args:
      job: a module with `define_flags()` and `main() -> int | None`; its docstring is its help.
      program: what a user types, such as "python -m data_prep.images".
      argv: what follows it; by default that of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return _exit_code(program, lambda: _run(job, program, arguments))


def _exit_code(program: str, work: Callable[[], int]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        code = work()
        sys.stdout.flush()  # here, so that a reader who has left is noticed here
        return code
    except UserError as error:
        return _fail(program, str(error))
    except Preempted as error:
        print(f"vixml: {error}", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes standard output once more as it ends; let that go nowhere.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except NotFinite as error:
        return _fail(program, str(error))  # training says at which step, and what to try
    except OSError as error:
        # These are the state of the user's disk. A missing file is checked for where it is read, so that
        # one which turns up here is a bug.
        if error.errno is None and _CUT_SHORT.fullmatch(str(error)):
            fix = "make room, or raise the limit (ulimit -f), and run the same command again"
            return _fail(program, str(UserError("an array could not be written as a whole", fix=fix)))
        if error.errno not in _DISK and (error.filename is None or error.errno not in _PATH):
            raise
        problem, fix = (error.strerror or "unusable").lower(), _DISK.get(error.errno or 0)
        return _fail(program, str(UserError(problem, file=error.filename, fix=fix)))
    except Exception as error:
        number = _disk_problem(error)
        if number is None:
            raise
        return _fail(program, str(UserError(os.strerror(number).lower(), fix=_DISK[number])))


def _open_closed_streams() -> None:
    """Of a process that was started without them (`>&-`), what is printed goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends


def _disk_problem(error: BaseException) -> int | None:
    """What a disk said to Orbax or ArrayRecord, which write from C++ and raise errors of their own for it."""
    for cause in causes(error):
        for number in _DISK:
            if os.strerror(number).lower() in str(cause).lower():
                return number
    return None


def _dispatch(arguments: list[str], *, is_own: bool = False) -> int:
    """Runs a command; in a process of our own (`is_own`) errors are said once."""
    if not arguments or arguments[0] in ("--help", "-h", "-help", "help"):
        if len(arguments) > 1 and arguments[0] == "help":
            return _dispatch([arguments[1], "--help"])
        print(_overview())
        return 0
    command, *rest = arguments
    if command == "--version":
        print(f"vixml {__version__}")
        return 0
    if command not in COMMANDS:
        kind = "flag before the command" if command.startswith("-") else "command"
        raise UserError(f"unknown {kind} {command!r}", fix=_nearest(command, COMMANDS, "vixml --help"))
    job = importlib.import_module(COMMANDS[command][0])
    if is_own and (checkpoint := sys.modules.get("vixml_jax.checkpoint")):  # imported by those that use it
        checkpoint.say_failures_once()
    return _run(job, f"vixml {command}", rest)


def _run(job: ModuleType, program: str, arguments: list[str]) -> int:
    with _own_flags(job) as own:
        if any(argument in ("--help", "-h", "-help") for argument in arguments):
            print(_help(job, own))
            return 0
        _parse(program, arguments, own)
        return job.main() or 0


def _fail(program: str, line: str) -> int:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    print(f"{program}: error: {line}", file=sys.stderr)
    return 2


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "Extreme multi-label classification with text and pictures, in JAX and Flax.\n\n"
        f"usage: vixml <command> [flags]\n\n{commands}\n\n"
        f"example: {EXAMPLE}\n\n`vixml <command> --help` shows a command's flags; `vixml --version`."
    )


@contextlib.contextmanager
def _own_flags(job: ModuleType) -> Iterator[list[str]]:
    """Registers a job's flags and yields their names; takes them out again, so that runs can follow."""
    from absl import flags

    before = set(flags.FLAGS)  # those of the libraries that the job has imported
    try:
        job.define_flags()
        yield [name for name in flags.FLAGS if name not in before]
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


def _help(job: ModuleType, own: list[str]) -> str:
    from absl import flags

    lines = []
    for name in own:
        flag = flags.FLAGS[name]
        if flag.boolean:
            shown = f"--[no]{name}"
        else:
            shown = f"--{name}=" + (
                "FILE[:arg]" if name == "config" else flag.flag_type().upper().split()[-1]
            )
        notes = ""
        if any("other than None" in check.message for check in flag.validators):
            notes = " (required)"
        elif flag.default is not None:
            notes = f" (default: {flag.default_as_str})" if flag.default != "" else ""
        lines.append((shown, f"{flag.help}{notes}"))
        if name == "config":
            lines.append(("--config.SECTION.FIELD=VALUE", "Override of one of the config's fields"))
    width = max((len(shown) for shown, _ in lines), default=0)
    table = "\n".join(f"  {shown:<{width}}  {' '.join(text.split())}" for shown, text in lines)
    return f"{inspect.cleandoc(job.__doc__ or '')}\n\nFlags:\n{table}"


def _parse(program: str, arguments: list[str], own: list[str]) -> None:
    """Parses a command's flags; every way to get them wrong is a UserError."""
    from absl import flags

    # Config flags look for their overrides in sys.argv, and want to stand before them.
    arguments = [_underscored(argument, own) for argument in arguments]
    if "config" in own:
        arguments = _config_first(arguments)
    seen = sys.argv
    sys.argv = [program, *arguments]
    try:
        left_over = flags.FLAGS(sys.argv)[1:]
        if "config" in own:
            # A config whose file could not be opened says so only when it is used.
            getattr(flags.FLAGS.config, "is_locked", None)
    except flags.UnrecognizedFlagError as error:
        raise _unknown_flag(program, error.flagname, own) from None
    except flags.IllegalFlagValueError as error:
        raise _illegal_value(program, str(error)) from None
    except flags.Error as error:
        raise UserError(str(error), fix=f"see `{program} --help`") from None
    except Exception as error:
        if "config" not in own:
            raise
        from vixml_jax import config_errors

        raise config_errors.explained(error, arguments) from None
    finally:
        sys.argv = seen
    if left_over:
        raise UserError(f"unexpected {left_over[0]!r}", fix=f"flags are --name=value; see `{program} --help`")


def _underscored(argument: str, own: list[str]) -> str:
    """--target-recall=1 is --target_recall=1."""
    name, equals, value = argument.partition("=")
    known = "-" + name.lstrip("-").replace("-", "_")
    return f"-{known}{equals}{value}" if name.startswith("--") and known[1:] in own else argument


def _config_first(arguments: list[str]) -> list[str]:
    """Puts --config before all others; a file that is not there is looked for among the package's own.

    Overrides without one are of the config of the run in --workdir.
    """
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config") and (equals or i + 1 < len(arguments)):
            others = arguments[:i] + arguments[i + (1 if equals else 2) :]
            return [f"{flag}={config_files.find(value if equals else arguments[i + 1])}", *others]
    workdir = config_files.value_of("workdir", arguments)
    config = config_files.of_run(workdir) if workdir else None
    if config and any(argument.lstrip("-").startswith("config.") for argument in arguments):
        return [f"--config={config}", *arguments]
    return arguments


def _unknown_flag(program: str, name: str, own: list[str]) -> UserError:
    head, dot, _ = name.partition(".")
    if dot and head == "config" and head in own:
        return UserError(f"--{name} without a config", fix="give --config=FILE, or the --workdir of a run")
    known = [f"--{flag}" for flag in own]
    return UserError(f"unknown flag --{name}", fix=_nearest(f"--{head}", known, f"{program} --help"))


def _illegal_value(program: str, message: str) -> UserError:
    """Rewords absl's "flag --name=value: reason"."""
    from absl import flags

    assignment, _, reason = message.removeprefix("flag ").partition(": ")
    name = assignment.removeprefix("--").partition("=")[0]
    if "other than None" in reason:
        return UserError(f"{program.removeprefix('vixml ')} needs --{name}", fix=f"see `{program} --help`")
    if name in flags.FLAGS and ("invalid literal" in reason or "could not convert" in reason):
        kind = {"int": "a whole number", "float": "a number"}.get(flags.FLAGS[name].flag_type())
        if kind:
            return UserError(f"{assignment} is not {kind}")
    return UserError(f"{assignment}: {reason}", fix=f"see `{program} --help`")


def _nearest(name: str, known: Sequence[str] | dict[str, tuple[str, str]], help_command: str) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"see `{help_command}`"


if __name__ == "__main__":
    sys.exit(run())
