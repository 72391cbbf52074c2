"""Training steps against eager PyTorch in one run: same batches, same weights, same loss, same cores.

  python benchmarks/train_step.py
  python benchmarks/train_step.py --dataset=data/picto_tags --checkpoint=MINILM --layers=3 --json=step.json

Ours packs queries and labels into rows; the peer (torch_peer.py) pads each side to its longest item. Both
take the same batches from the input pipeline, prepared before the clock starts, in the same order, so the
losses must agree; if they do not, the benchmark fails. They run in turn, --rounds times --steps steps; the
ratio is the median over rounds. MFU counts the tower's FLOPs on useful slots, forward and backward, without
padding and without what rematerialisation repeats, over the matrix product that this machine measures in
the same type.

Needs the extra `test` (PyTorch), and `peft` for --lora_rank. On a GPU install a PyTorch for it, and give
--dtype=bfloat16.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both sides share a GPU's memory

import jax
import jax.numpy as jnp
import measured_run
import numpy as np
import timing
import torch
import torch_peer
from flax import nnx

from vixml_jax import optim, sharding, train
from vixml_jax.data.pipeline import train_batches
from vixml_jax.run import Run
from vixml_jax.train_state import create
from vixml_jax.train_step import compile_step, make_loss

TOTAL_STEPS = 1000  # of the learning rate's schedule


def useful_flops(run: Run, params: nnx.State, lengths: np.ndarray) -> float:
    """FLOPs of the tower for items of these lengths, forward and backward.

    A weight costs 2 FLOPs a slot forward, 2 for the gradient of its input and 2 for its own, if it trains;
    attention 4 D a pair of slots and layer forward, twice that backward.
    """
    trained, whole = 0, 0
    for state, trains in ((params, True), (run.frozen, False)):
        for path, leaf in nnx.to_flat_state(state):
            if path[:3] == ("tower", "text", "layers") and path[-1] in ("kernel", "lora_a", "lora_b"):
                whole += leaf.get_value().size
                trained += leaf.get_value().size if trains else 0
    slots, pairs = float(lengths.sum()), float(np.square(lengths).sum())
    attention = 12 * pairs * run.spec.dim * run.spec.text["num_layers"]
    return slots * (4 * whole + 2 * trained) + attention


def peak_flops(dtype: str, size: int) -> float:
    """FLOPs a second of a square matrix product, the best of five."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    return 2 * size**3 / min(timing.timed(lambda: product(a, a).block_until_ready())[0] for _ in range(5))


def main() -> None:
    """Runs the comparison."""
    parser = measured_run.parser(__doc__)
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--ours_only", action="store_true", help="leave the peer out, as for a profile")
    parser.add_argument(
        "--profile", help="directory for a trace of a round of ours, for xprof or TensorBoard"
    )
    options = parser.parse_args()
    cores = measured_run.begin(options)
    if options.quick:
        options.steps = 2
    measured_run.report(measure, options, cores)


def measure(options: argparse.Namespace, cores: int, folder: Path) -> dict[str, Any]:
    """Returns the figures."""
    torch.set_num_threads(cores)
    torch_device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    config = measured_run.config_of(options, folder)
    with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])) as mesh:
        run, params, tables, training = measured_run.start(config, folder / "run", mesh)
        order = np.random.default_rng(0).permutation(run.spec.num_queries)
        stream = train_batches(training, order, options.batch, mesh, seed=0, epoch=0)
        batches = [batch for batch, _ in zip(stream, range(options.steps), strict=False)]
        shapes = {batch.tokens.token_ids.shape for batch in batches}
        lengths = [_lengths(batch) for batch in batches]

        optimizer = optim.make(**config.optimizer, total_steps=TOTAL_STEPS)
        peer_step, peer_batches = None, []
        if not options.ours_only:
            clusters, centroids = np.asarray(tables.label_clusters), np.asarray(tables.centroids)
            peer_batches = [torch_peer.peer_batch(b, clusters, centroids, torch_device) for b in batches]
            peer_step = make_peer_step(options, config, nnx.merge(run.graphdef, params, run.frozen),
                                       folder, torch_device)  # fmt: skip
        flops = sum(useful_flops(run, params, each) for each in lengths)
        state = create(params, optimizer, tables, mesh)
        del params, tables
        step_fn = compile_step(
            run.graphdef, optimizer, make_loss(**train.loss_settings(config)), state, config.train.seed
        )
        losses: dict[str, list[float]] = {"ours": [], "peer": []}

        def ours() -> None:
            nonlocal state
            for batch in batches:
                state, figures = step_fn(state, run.frozen, batch)
            losses["ours"].append(float(figures["train/loss"]))  # waits for the last step

        def peer() -> None:
            assert peer_step is not None
            for batch in peer_batches:
                loss = peer_step(batch)
            losses["peer"].append(loss.item())

        functions = {"ours": ours} if options.ours_only else {"ours": ours, "peer": peer}
        compiling = timing.timed(ours)[0]
        if not options.ours_only:
            peer()  # warms up as well
        seconds = timing.in_turn(functions, options.rounds)
        if options.profile:
            with jax.profiler.trace(options.profile):
                ours()
        np.testing.assert_allclose(losses["ours"][: len(losses["peer"])], losses["peer"], rtol=2e-2)

        medians = timing.medians(seconds)
        slots = sum(int(each.sum()) for each in lengths)
        peak = peak_flops(options.dtype, 512 if options.quick else 2048 if torch_device == "cpu" else 8192)
        examples = options.batch * options.steps
        figures = {
            **measured_run.conditions(options, cores),
            "checkpoint": options.checkpoint,
            "layers": run.spec.text["num_layers"],
            "rounds": options.rounds,
            "mean_slots": slots / examples / 2,
            "first_round_s": compiling,
            "shapes": len(shapes),
            "ours_padding": 1 - slots / sum(b.tokens.token_ids.size for b in batches),
            "ours_examples_per_s": examples / medians["ours"],
            "peak_gflops": peak / 1e9,
            "ours_mfu": flops / medians["ours"] / peak,
            "last_loss_ours": losses["ours"][-1],
        }
        if not options.ours_only:
            figures |= {
                "peer_padding": float(np.mean([batch.padding for batch in peer_batches])),
                "peer_examples_per_s": examples / medians["peer"],
                "peer_mfu": flops / medians["peer"] / peak,
                "last_loss_peer": losses["peer"][-1],
                "speedup": timing.ratio(seconds["peer"], seconds["ours"]),
            }
        return figures


def make_peer_step(options: argparse.Namespace, config: Any, model: Any, folder: Path, device: str) -> Any:
    """Returns the peer's step: (batch) -> loss."""
    directory = folder / "peer"
    directory.mkdir()
    peer = torch_peer.Peer(
        model,
        directory,
        dtype=options.dtype,
        lora_rank=options.lora_rank,
        checkpointing=options.remat != "none",
        device=device,
    )
    settings = config.optimizer
    optimizer = torch_peer.adamw(peer, settings.lr, settings.head_lr, settings.weight_decay, settings.eps)
    share = optim.schedule(1.0, settings.warmup_steps, TOTAL_STEPS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(share(step)))

    def step(batch: torch_peer.PeerBatch) -> torch.Tensor:
        loss = peer(batch, config.loss.temperature)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        return loss

    return step


def _lengths(batch: Any) -> np.ndarray:
    """Slots of each item of a batch, int64 [2 B]."""
    count = 2 * len(batch.query_rows)
    return np.bincount(np.asarray(batch.tokens.item_index).ravel(), minlength=count + 1)[:count]


if __name__ == "__main__":
    main()
