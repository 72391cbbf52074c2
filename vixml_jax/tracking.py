"""Where a run's figures go: `metrics.jsonl` and TensorBoard events in the workdir."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType

import jax
from tensorboardX import SummaryWriter

from vixml_jax import files


class Tracker:
    """Writes one JSON object a record, with `step` and names such as "train/loss"; the same to TensorBoard.

    Args:
      workdir: the run's directory.
      enabled: False for processes that do not write.
      resumed_at: the step a run continues from; records after it, written by the killed run, are dropped,
        since the continued run writes them again.
    """

    def __init__(self, workdir: Path, *, enabled: bool = True, resumed_at: int | None = None):
        self._path = workdir / "metrics.jsonl"
        self._file = self._events = None
        if enabled:
            workdir.mkdir(parents=True, exist_ok=True)
            self._drop_after(resumed_at)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
            purge = None if resumed_at is None else resumed_at + 1
            self._events = SummaryWriter(str(workdir / "events"), purge_step=purge)

    def log(self, step: int, figures: dict[str, jax.Array | float]) -> dict[str, float]:
        """Writes `figures` (scalars, fetched from the device here) and returns them as floats.

        Raises:
          FloatingPointError: if one of them is not finite.
        """
        values = {name: float(value) for name, value in jax.device_get(figures).items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {step}; a lower config.optimizer.lr or "
                    "config.optimizer.clip_norm=1.0 may help; the newest checkpoint is from before"
                )
        if self._file is not None and self._events is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        return values

    def log_evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Writes the figures of an evaluation, in percent, as "eval/P@1" and so on."""
        self.log(step, {f"eval/{name}": value for name, value in figures.items()})

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None and self._events is not None:
            self._file.close()
            self._events.close()

    def _drop_after(self, resumed_at: int | None) -> None:
        if resumed_at is None or not os.path.exists(self._path):
            with open(self._path, "w", encoding="utf-8"):
                return
        kept = []
        with open(self._path, encoding="utf-8") as file:
            for line in file:
                try:
                    if json.loads(line)["step"] <= resumed_at:
                        kept.append(line.rstrip("\n") + "\n")  # a kill may have cut off just that
                except json.JSONDecodeError:
                    break  # the line that the kill cut short is the last one
        with files.atomic_file(self._path, "w") as file:
            file.writelines(kept)
