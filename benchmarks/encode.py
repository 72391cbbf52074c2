"""Encoding against eager PyTorch in one run: the same texts, the same weights, the same cores.

  python benchmarks/encode.py
  python benchmarks/encode.py --dataset=data/picto_tags --checkpoint=MINILM --layers=3 --json=encode.json

Ours is what fills the label bank: token ids to pooled embeddings on the host, packing included. The peer
(torch_peer.py) takes --batch items in the order of the dataset, padded to the longest of the batch;
"peer_sorted" sorts all of them by length first, as sentence-transformers does, which leaves little padding.
Token ids are ready for all three. The embeddings must agree. They run in turn, --rounds times; ratios are
medians.

Needs the extra `test` (PyTorch).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import measured_run
import numpy as np
import timing
import torch
import torch_peer
from flax import nnx

from vixml_jax import sharding
from vixml_jax.data.items import ItemBank


def main() -> None:
    """Runs the comparison."""
    parser = measured_run.parser(__doc__)
    parser.add_argument("--items", type=int, default=8192, help="training queries that are encoded")
    options = parser.parse_args()
    cores = measured_run.begin(options)
    if options.quick:
        options.items = 128
    if options.images or options.lora_rank:
        parser.error("encode.py compares text towers: leave --images and --lora_rank out")
    measured_run.report(measure, options, cores)


def measure(options: argparse.Namespace, cores: int, folder: Path) -> dict[str, Any]:
    """Returns the figures."""
    torch.set_num_threads(cores)
    config = measured_run.config_of(options, folder)
    with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])) as mesh:
        run, params, _, training = measured_run.start(config, folder / "run", mesh)
        bank = ItemBank(_first(training.queries.tokens, options.items), training.queries.template)
        (folder / "peer").mkdir()
        model = nnx.merge(run.graphdef, params, run.frozen)
        peer = torch_peer.Peer(model, folder / "peer", dtype=options.dtype).eval()
        lengths = bank.tokens.lengths()
        found: dict[str, np.ndarray] = {}

        def ours() -> None:
            found["ours"] = run.embedder.pooled(params, run.frozen, bank, None)

        def padded(name: str, order: np.ndarray) -> None:
            result = np.empty((len(bank), run.spec.dim), np.float32)
            with torch.inference_mode(), torch.autocast("cpu", peer.dtype, options.dtype != "float32"):
                for start in range(0, len(order), options.batch):
                    rows = order[start : start + options.batch]
                    result[rows] = peer.pooled(_padded(bank, rows)).float().numpy()
            found[name] = result

        functions = {
            "ours": ours,
            "peer": lambda: padded("peer", np.arange(len(bank))),
            "peer_sorted": lambda: padded("peer_sorted", np.argsort(-lengths, kind="stable")),
        }
        for function in functions.values():
            function()  # compiles, warms up
        seconds = timing.in_turn(functions, options.rounds)
    tolerance = 1e-3 if options.dtype == "float32" else 0.1
    for name in ("peer", "peer_sorted"):
        np.testing.assert_allclose(found["ours"], found[name], atol=tolerance)
    widths = [lengths[start : start + options.batch] for start in range(0, len(bank), options.batch)]
    return {
        **measured_run.conditions(options, cores),
        "checkpoint": options.checkpoint,
        "layers": run.spec.text["num_layers"],
        "items": len(bank),
        "mean_slots": float(lengths.mean()),
        "peer_padding": 1 - lengths.sum() / sum(len(each) * each.max() for each in widths),
        **{f"{name}_items_per_s": len(bank) / value for name, value in timing.medians(seconds).items()},
        "speedup": timing.ratio(seconds["peer"], seconds["ours"]),
        "speedup_over_sorted": timing.ratio(seconds["peer_sorted"], seconds["ours"]),
    }


def _first(tokens: Any, count: int) -> Any:
    """The first rows of a ragged array."""
    count = min(count, len(tokens))
    return type(tokens)(tokens.values[: tokens.offsets[count]], tokens.offsets[: count + 1])


def _padded(bank: ItemBank, rows: np.ndarray) -> torch_peer.Padded:
    """Items as PyTorch's tokenizers give them: one a row, padded to the longest."""
    values, lengths = bank.tokens.take(rows)
    mask = np.arange(lengths.max()) < lengths[:, None]
    token_ids = np.zeros(mask.shape, np.int64)
    token_ids[mask] = values
    return torch_peer.Padded(torch.from_numpy(token_ids), torch.from_numpy(mask))


if __name__ == "__main__":
    main()
