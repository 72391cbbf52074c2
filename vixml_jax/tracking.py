"""Where a run's figures go: `metrics.jsonl`, TensorBoard events, and Weights & Biases where asked for."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import jax
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from vixml_jax import files
from vixml_jax.errors import NotFinite, UserError

# Made by protobuf at run time, so that type checkers see none of them.
_proto: Any = event_pb2

# In the workdir: the id of its run at Weights & Biases, which a continued run goes on with.
WANDB_RUN = "wandb_run.json"
# What names of an evaluation's figures begin with.
EVALUATION = "eval/"


class Tracker:
    """Writes one JSON object a record, with `step` and names such as "train/loss"; the same to TensorBoard.

    Args:
      workdir: the run's directory.
      enabled: False for processes that do not write.
      resumed_at: the step a run continues from; records after it, written by the killed run, are dropped,
        since the continued run writes them again.
      last_step: the step whose evaluation the run writes at its end, and again if it is continued from there.
      wandb_project: at Weights & Biases, where figures go as well; "" for nowhere.
      config: of the run, JSON-able; shown at Weights & Biases.

    Raises:
      UserError: if Weights & Biases is asked for and cannot be used.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        enabled: bool = True,
        resumed_at: int | None = None,
        last_step: int | None = None,
        wandb_project: str = "",
        config: dict[str, Any] | None = None,
    ):
        self._path = workdir / "metrics.jsonl"
        self._file = self._events = self._wandb = None
        self._last_step = last_step
        if enabled:
            workdir.mkdir(parents=True, exist_ok=True)
            if wandb_project:  # before any file is open, since it may fail
                self._wandb = _start_wandb(wandb_project, workdir, config, resumed_at)
            try:
                drop_after(self._path, resumed_at, last_step)
                self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
                self._events = Events(workdir / "events", None if resumed_at is None else resumed_at + 1)
            except BaseException as error:
                self.__exit__(type(error), error, None)  # of what is open already
                raise

    def log(self, step: int, figures: dict[str, jax.Array | float]) -> dict[str, float]:
        """Writes `figures` (scalars, fetched from the device here) and returns them as floats.

        Raises:
          NotFinite: if one of them is not finite.
        """
        values = {name: float(value) for name, value in jax.device_get(figures).items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise NotFinite(
                    f"{name} is {value} at step {step}; nothing was saved after the newest checkpoint"
                )
        if self._file is not None and self._events is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            self._events.write(step, values)
            if self._wandb is not None:
                # It leaves out what goes back: rightly the steps before a kill, which would be the same,
                # but not the last evaluation, which is of the tower's step and follows the classifiers'.
                is_last = _is_last_evaluation(step, values, self._last_step)
                self._wandb.log(values, step=max(step, self._wandb.step) if is_last else step)
        return values

    def log_evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Writes the figures of an evaluation, in percent, as "eval/P@1" and so on."""
        self.log(step, {f"{EVALUATION}{name}": value for name, value in figures.items()})

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as stack:  # all of them, even where the disk is full
            if self._wandb is not None:
                stack.callback(self._wandb.finish, exit_code=int(kind is not None))
            if self._events is not None:
                stack.callback(self._events.close)
            if self._file is not None:
                stack.callback(self._file.close)


class Events:
    """Figures in the format of TensorBoard, on disk when `write` returns.

    tensorboardX has a writer that leaves this to a thread. Where the disk is full the thread ends, and who
    hands it figures waits for ever.

    Args:
      directory: gets one file more.
      purge_from: the first step of which events in earlier files do not count; None for none.
    """

    def __init__(self, directory: Path, purge_from: int | None = None):
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(os.fspath(directory / "events"))
        if purge_from is not None:
            start = _proto.SessionLog(status=_proto.SessionLog.START)
            self._writer.write_event(_proto.Event(step=purge_from, wall_time=time.time(), session_log=start))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the figures of a step."""
        for name, value in values.items():
            figure = summary.scalar(name, value)
            self._writer.write_event(_proto.Event(step=step, wall_time=time.time(), summary=figure))
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


def drop_after(path: Path, step: int | None, last_step: int | None = None) -> None:
    """Takes the records after a step out of `metrics.jsonl`, or all where it is None; makes the file.

    What follows a line that is no record is dropped as well: a kill has cut that line short. So are the
    evaluations of `last_step`, since they come after the run's last checkpoint.
    """
    if step is None or not path.exists():
        with open(path, "w", encoding="utf-8"):
            return
    kept = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
                if record["step"] <= step and not _is_last_evaluation(record["step"], record, last_step):
                    kept.append(line.rstrip("\n") + "\n")  # a kill may have cut off just that
            except (ValueError, TypeError, KeyError, RecursionError):
                break
    with files.atomic_file(path, "w") as file:
        file.writelines(kept)


def _is_last_evaluation(step: int, names: Iterable[str], last_step: int | None) -> bool:
    """Whether figures of these names are those with which a run ends."""
    return step == last_step and any(name.startswith(EVALUATION) for name in names)


def import_wandb() -> ModuleType:
    """Imports what is installed only by those who ask for it.

    Raises:
      UserError: if it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            "config.train.wandb is set, but the package wandb cannot be imported",
            fix="pip install 'vixml-jax[wandb]', or leave the field empty",
        ) from None


def _start_wandb(project: str, workdir: Path, config: dict[str, Any] | None, resumed_at: int | None) -> Any:
    """Begins a run at Weights & Biases, or goes on with that of the workdir."""
    wandb = import_wandb()
    known = workdir / WANDB_RUN
    if resumed_at is None or not known.exists():
        files.write_json(known, {"id": secrets.token_hex(8)})
    try:
        return wandb.init(
            project=project,
            name=workdir.resolve().name,
            id=files.read_json(known)["id"],
            resume="allow",
            dir=str(workdir),
            config=config,
        )
    except wandb.Error as error:
        raise UserError(
            f"Weights & Biases: {error}",
            fix="run `wandb login`, set WANDB_MODE=offline, or clear config.train.wandb",
        ) from None
