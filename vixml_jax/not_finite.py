"""The end of a run whose loss or gradients are no numbers any more: step, batch, and what to try."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from vixml_jax import distributed, files
from vixml_jax.checkpoint import Checkpointer
from vixml_jax.data.dataset import XmcDataset
from vixml_jax.data.pipeline import EpochSource, TrainingData, num_batches
from vixml_jax.errors import NotFinite

FILE = "not_finite.json"


def first_of(figures: Sequence[dict[str, float]]) -> int | None:
    """Returns the place of the first of some steps' figures that are not all finite; None without any."""
    for place, values in enumerate(figures):
        if not all(map(math.isfinite, values.values())):
            return place
    return None


def stop(
    workdir: Path,
    dataset: XmcDataset,
    data: TrainingData,
    order: np.ndarray,
    checkpointer: Checkpointer,
    step: int,
    figures: dict[str, float],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
) -> NoReturn:
    """Writes the step's batch to `not_finite.json` and ends the run. All processes must call it.

    Args:
      workdir: of the run.
      dataset: what it trains on.
      data: what its batches are made of.
      order: int64 [N]; the epoch's order of the queries.
      checkpointer: of the run.
      step: the first step whose figures are not all finite, counted from 1.
      figures: of the step.
      batch_size: B.
      seed: of the sampled positives.
      epoch: the step's, from 0.

    Raises:
      NotFinite: naming step, figures, file and what to try.
    """

    kept = checkpointer.latest_step()

    def write() -> None:
        index = (step - 1) % num_batches(len(order), batch_size)
        batch = EpochSource(data, order, batch_size, seed=seed, epoch=epoch)[index]
        rows, labels = np.asarray(batch.query_rows), np.asarray(batch.label_ids)
        found = {
            "step": step,
            "epoch": epoch,
            # NaN and inf are no JSON.
            "figures": {name: repr(value) for name, value in figures.items()},
            "checkpoint": kept,
            "query_rows": rows.tolist(),
            "query_uids": dataset.train.uids[rows.astype(np.int64)],
            "label_ids": labels.tolist(),
            "label_uids": dataset.labels.uids[labels.astype(np.int64)],
        }
        files.write_json(workdir / FILE, found)

    distributed.on_lead(write)
    bad = ", ".join(f"{name} is {value}" for name, value in figures.items() if not math.isfinite(value))
    saved = "there is no checkpoint yet" if kept is None else f"the checkpoint of step {kept} is kept"
    raise NotFinite(
        f"{bad} at step {step}; {workdir / FILE} names the queries and labels of its batch; {saved}; "
        "in another --workdir (this one keeps its settings) try a lower config.optimizer.lr, "
        "config.optimizer.clip_norm=1.0 or a longer config.optimizer.warmup_steps"
    )
