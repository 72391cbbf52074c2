"""Orbax checkpoints: the whole train state, written while training goes on, read back for any mesh.

A checkpoint has three parts, so that prediction reads no optimizer moments: "params" (what trains), "tables"
(see train_state.Tables) and "training" (step and optimizer state).

Orbax renames a checkpoint to its final name when it is whole, but would read one whose bytes have changed
since then: `checkpoint_sums/STEP.json` has size and CRC-32 of its files. A checkpoint that does not agree
with them is passed over, with a warning, for the newest one that does. (Of one whose run was killed before
its sums were written nothing is known; it counts as sound.)
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import re
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
from absl import logging as absl_logging
from orbax.checkpoint import v1 as ocp

from vixml_jax import distributed, files
from vixml_jax.errors import UserError, causes
from vixml_jax.train_state import TrainState, shapes_of

Tree = TypeVar("Tree")

DIRECTORY, SUMS, DAMAGED = "checkpoints", "checkpoint_sums", "checkpoints_damaged"
# What prediction reads of a checkpoint.
MODEL_PARTS = ("params", "tables")
# How TensorStore begins what it says of files: "DATA_LOSS: ".
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")


class Checkpointer:
    """Saves and restores a run's state under `workdir/checkpoints`.

    Every process of a run must make one and call its methods alike.

    Args:
      workdir: the run's directory.
      keep: number of newest checkpoints kept.
      keep_every: those of steps that are multiples of it are kept as well; 0 for none.
      only: names of the parts that are read, for those who predict with a run: nothing else is checked. The
        run itself moves damaged checkpoints to `workdir/checkpoints_damaged`: it saves their steps again.
    """

    def __init__(self, workdir: Path, keep: int = 1, keep_every: int = 0, *, only: tuple[str, ...] = ()):
        self._root = (workdir / DIRECTORY).absolute()
        self._sums = (workdir / SUMS).absolute()
        self._newest: int | None = distributed.on_lead(lambda: _newest_sound(self._root, self._sums, only))
        # Orbax's own policies do not fit its own protocols, as type checkers see it.
        policies: Any = ocp.training
        kept = [policies.preservation_policies.LatestN(keep)]
        if keep_every:
            kept.append(policies.preservation_policies.EveryNSteps(keep_every))
        self._orbax = ocp.training.Checkpointer(
            os.fspath(self._root),
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.preservation_policies.AnyPreservationPolicy(kept),
        )
        self._saving: Any = None
        self._unsummed: int | None = None
        self._summing = concurrent.futures.ThreadPoolExecutor(1)
        self._sum: concurrent.futures.Future[None] | None = None

    def save(self, state: TrainState, step: int) -> None:
        """Starts writing `state`, and returns before it is on disk. A step that is saved is left alone."""
        if self._newest == step:
            return
        training = {"step": state.step, "opt_state": state.opt_state}
        self.save_parts({"params": state.params, "tables": state.tables, "training": training}, step)

    def save_parts(self, parts: dict[str, Any], step: int) -> None:
        """Starts writing trees of arrays by name, and returns before they are on disk."""
        self._wait_for_save()
        self._sum_last()
        # Orbax takes no empty trees: a tower of which nothing trains leaves one.
        filled = {name: tree for name, tree in parts.items() if jax.tree.leaves(tree)}
        self._saving = self._orbax.save_checkpointables_async(step, filled)
        self._newest = self._unsummed = step

    def latest_step(self) -> int | None:
        """Returns the step of the newest sound checkpoint, None where there is none."""
        return self._newest

    def restore(self, like: TrainState) -> TrainState:
        """Reads the newest sound checkpoint into the shapes, dtypes and shardings of `like`.

        Args:
          like: a state, or its shapes (train_state.abstract).

        Raises:
          UserError: if it does not fit the config's model and dataset.
        """
        training = {"step": like.step, "opt_state": like.opt_state}
        parts = self.restore_parts({"params": like.params, "tables": like.tables, "training": training})
        training = parts["training"]
        return TrainState(training["step"], parts["params"], training["opt_state"], parts["tables"])

    def restore_model(self, params: Tree, tables: Any) -> tuple[Tree, Any]:
        """Reads only what prediction needs: parameters and tables, like those given."""
        parts = self.restore_parts({"params": params, "tables": tables})
        return parts["params"], parts["tables"]

    def restore_parts(self, like: dict[str, Any]) -> dict[str, Any]:
        """Reads those parts of the newest sound checkpoint that `like` names, into its shapes and shardings.

        Raises:
          UserError: if there is no checkpoint, or it does not fit.
        """
        step = self.latest_step()
        if step is None:
            raise UserError("no checkpoint", file=self._root, fix="train first: `vixml train`")
        try:
            filled = {name: tree for name, tree in like.items() if jax.tree.leaves(tree)}
            return like | self._orbax.load_checkpointables(step, shapes_of(filled))
        except (ValueError, KeyError, TypeError) as error:
            explained = self._explained(error, step)
            raise explained from (None if isinstance(explained, OSError) else error)

    def _explained(self, error: BaseException, step: int) -> Exception:
        """What was wrong with a checkpoint that Orbax cannot load: the error's first cause alone says it."""
        *_, error = causes(error)
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            return error  # the machine's: too many open files, no permission
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        if isinstance(error, FileNotFoundError) or _STATUS.match(reason):
            return UserError(
                f"the checkpoint cannot be read ({reason})",
                file=self._root / str(step),
                fix="if it is damaged, move it away: the one before it is taken, or training begins anew",
            )
        return UserError(
            f"the checkpoint of step {step} does not fit the model: {reason}",
            file=self._root,
            fix="use the config and dataset that it was made with",
        )

    def close(self) -> None:
        """Waits until everything is on disk."""
        with self._summing, contextlib.closing(self._orbax):
            self._wait_for_save()
            self._sum_last()
            self._wait_for_sum()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _wait_for_save(self) -> None:
        """Raises what went wrong there.

        Orbax's own `wait` would leave the save's thread, event loop and three open files behind, for ever.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _sum_last(self) -> None:
        """Starts summing the checkpoint that was written last, once the one before it is summed."""
        self._wait_for_sum()
        if self._unsummed is not None and distributed.is_lead():
            self._sum = self._summing.submit(_write_sums, self._root, self._sums, self._unsummed)
        self._unsummed = None

    def _wait_for_sum(self) -> None:
        """Raises what went wrong there, such as a full disk."""
        done, self._sum = self._sum, None
        if done is not None:
            done.result()


def say_failures_once() -> None:
    """Keeps Orbax from printing what it raises, in all of this process: not for one of somebody else's.

    A write that fails, as on a full disk, fails in several of its threads; each logs a traceback, and leaves
    coroutines and callbacks behind that complain of it, some when the process ends. The error itself reaches
    whoever waits for the write.
    """
    absl_logging.get_absl_logger().addFilter(_is_not_raised_by_orbax)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    if not isinstance(sys.excepthook, _QuietHook):
        sys.excepthook = _QuietHook(sys.excepthook)


def _is_not_raised_by_orbax(record: logging.LogRecord) -> bool:
    is_failure = record.exc_info and record.levelno >= logging.ERROR
    return not (is_failure and "orbax" in Path(record.pathname).parts)


class _QuietHook:
    """Leaves out what TensorStore's own threads say when the event loop of a failed write is gone.

    Args:
      before: the hook that gets all else: Python's own, or that of the program that uses this package.
    """

    def __init__(self, before: Callable[[type[BaseException], BaseException, TracebackType | None], Any]):
        self._before = before

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread() or str(error) != "Event loop is closed":
            self._before(kind, error, trace)


def steps_in(root: Path) -> list[int]:
    """Returns the steps of all whole checkpoints, newest first."""
    if not root.is_dir():
        return []
    names = (path.name for path in root.iterdir())
    return sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)


def damage(checkpoint: Path, sums: Path, only: tuple[str, ...] = ()) -> str | None:
    """Says how a checkpoint, or only some parts of it, differs from its sums; None where it does not."""
    if not sums.exists():
        return None
    try:
        expected = files.read_json(sums)
    except UserError:
        expected = None
    if expected is None or not _are_sums(expected):
        return None  # they are damaged themselves, for all that is known
    for name, (size, crc) in expected.items():
        if only and name.split("/")[0] not in only:
            continue
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or _crc(file) != crc:
            return f"{name} has changed"
    return None


def _are_sums(value: Any) -> bool:
    """Whether a value is what `_write_sums` writes."""
    return isinstance(value, dict) and all(
        re.fullmatch(r"[\w.-]{1,100}(/[\w.-]{1,100}){0,9}", name, re.ASCII)
        and isinstance(sums, list)
        and len(sums) == 2
        and all(type(number) is int for number in sums)
        for name, sums in value.items()
    )


def _newest_sound(root: Path, sums: Path, only: tuple[str, ...]) -> int | None:
    for step in steps_in(root):
        checkpoint = root / str(step)
        problem = damage(checkpoint, sums / f"{step}.json", only)
        if problem is None:
            return step
        logging.warning("%s: damaged, an older checkpoint is taken: %s", checkpoint, problem)
        if not only:
            aside = root.parent / DAMAGED
            aside.mkdir(exist_ok=True)
            number = len(list(aside.iterdir()))
            checkpoint.rename(aside / f"{step}-{number}")
            (sums / f"{step}.json").unlink()
    return None


def _write_sums(root: Path, sums: Path, step: int) -> None:
    checkpoint = root / str(step)
    with contextlib.suppress(FileNotFoundError):  # it is an old one by now, and removed
        paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        found = {os.fspath(path.relative_to(checkpoint)): [path.stat().st_size, _crc(path)] for path in paths}
        files.write_json(sums / f"{step}.json", found)
    kept = {f"{step}.json" for step in steps_in(root)}
    for path in sums.glob("*.json"):
        if path.name not in kept:
            path.unlink(missing_ok=True)


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
