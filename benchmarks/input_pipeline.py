"""The input pipeline alone: batches a second beside what the step takes, and how full packed rows are.

  python benchmarks/input_pipeline.py
  python benchmarks/input_pipeline.py --dataset=data/picto_tags --checkpoint=MINILM --layers=3

A round takes --batches batches of an epoch as training does (Grain, sampled positives, packing, placing on
the device) and throws them away; the step then runs on a few of them. Both in one run, in turn.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import measured_run
import numpy as np
import timing

from vixml_jax import optim, sharding, train
from vixml_jax.data.pipeline import train_batches
from vixml_jax.train_state import create
from vixml_jax.train_step import compile_step, make_loss

STEPS = 3


def main() -> None:
    """Runs the comparison."""
    parser = measured_run.parser(__doc__)
    parser.add_argument("--batches", type=int, default=50, help="of a round")
    options = parser.parse_args()
    cores = measured_run.begin(options)
    if options.quick:
        options.batches = 5
    measured_run.report(measure, options, cores)


def measure(options: argparse.Namespace, cores: int, folder: Path) -> dict[str, Any]:
    """Returns the figures."""
    config = measured_run.config_of(options, folder)
    with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])) as mesh:
        run, params, tables, training = measured_run.start(config, folder / "run", mesh)
        order = np.random.default_rng(0).permutation(run.spec.num_queries)
        kept: list[Any] = []
        epoch = 0

        def pipeline() -> None:
            nonlocal epoch
            epoch += 1
            stream = train_batches(training, order, options.batch, mesh, seed=0, epoch=epoch)
            kept[:] = [batch for _, batch in zip(range(options.batches), stream, strict=False)]
            jax.block_until_ready(kept[-1])

        optimizer = optim.make(**config.optimizer, total_steps=1000)
        state = create(params, optimizer, tables, mesh)
        del params, tables
        step_fn = compile_step(
            run.graphdef, optimizer, make_loss(**train.loss_settings(config)), state, config.train.seed
        )
        pipeline()
        batches = kept[:STEPS]

        def step() -> None:
            nonlocal state
            for batch in batches:
                state, figures = step_fn(state, run.frozen, batch)
            jax.block_until_ready(figures)

        step()
        seconds = timing.in_turn({"pipeline": pipeline, "step": step}, options.rounds)
    filled = [1 - float((np.asarray(batch.tokens.segment_ids) == 0).mean()) for batch in kept]
    medians = timing.medians(seconds)
    pipeline_speed = len(kept) * options.batch / medians["pipeline"]
    step_speed = len(batches) * options.batch / medians["step"]
    return {
        **measured_run.conditions(options, cores),
        "row_length": options.row_length,
        "batches": len(kept),
        "shapes": len({batch.tokens.token_ids.shape for batch in kept}),
        "padding": 1 - float(np.mean(filled)),
        "pipeline_examples_per_s": pipeline_speed,
        "step_examples_per_s": step_speed,
        "pipeline_over_step": pipeline_speed / step_speed,
    }


if __name__ == "__main__":
    main()
