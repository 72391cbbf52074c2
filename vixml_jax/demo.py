"""The main job on embedded data: `vixml demo`.

Draws a catalogue of products, prepares it, trains one model on titles alone and one on titles with pictures,
retrieves, scores, and shows both in one table. Everything lies under --workdir (runs/demo).

Examples:
  vixml demo
  vixml demo --workdir=/data/demo
"""

from __future__ import annotations

from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from vixml_jax import config as config_lib
from vixml_jax.report import write_report
from vixml_jax.train import train

# The runs of the demo: directory -> pictures an item.
RUNS = {"text": 0, "vixml": 3}
SHOWN = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "R@10", "R@100")


def define_flags() -> None:
    """Registers --workdir."""
    flags.DEFINE_string("workdir", "runs/demo", "Directory of both runs, the catalogue and the report")
    flags.DEFINE_bool("smoke", False, "A tiny catalogue and two epochs, in the directory smoke of --workdir")


def main() -> int:
    """Runs the command."""
    workdir = Path(flags.FLAGS.workdir) / ("smoke" if flags.FLAGS.smoke else "")
    figures = {}
    for name, images in RUNS.items():
        config = get_config(images=images, smoke=flags.FLAGS.smoke)
        config.dataset.dir = str(workdir / "dataset")
        print(
            f"--- {name}: {'titles and up to ' + str(images) + ' pictures' if images else 'titles alone'}",
            flush=True,
        )
        figures[name] = train(config, workdir / name)
    write_report([workdir / name for name in RUNS], workdir / "report.html", "The demo catalogue")
    print()
    print(comparison(figures))
    print(f"\nruns: {', '.join(str(workdir / name) for name in RUNS)}; report: {workdir / 'report.html'}")
    return 0


def get_config(images: int = 0, smoke: bool = False) -> ConfigDict:
    """Returns the config of one run on the embedded catalogue.

    Args:
      images: pictures used of an item; 0 = text only.
      smoke: shrinks it to under a minute on 2 cores.
    """
    config = config_lib.base()
    config.dataset.dir = "runs/demo/dataset"
    config.dataset.demo_queries = 3000  # size of the catalogue that is drawn
    config.text.checkpoint = "random:minilm-tiny"
    config.text.vocab_size = 2048
    config.vision.images = images
    # A softmax over the batch learns from random weights; see configs/own.py.
    config.loss.name = "decoupled_softmax"
    config.loss.temperature = 0.05
    config.optimizer.lr = 1e-3
    config.optimizer.head_lr = 2e-3
    config.optimizer.warmup_steps = 20
    config.mining.start = 4
    config.mining.every = 2
    config.mining.double_at = (8,)
    config.train.epochs = 12
    config.train.batch_size = 256
    config.checkpoint.every_steps = 0
    config.eval.every = 4
    if smoke:
        config_lib.shrink(config)
        config.dataset.dir = "runs/smoke/dataset"
        config.dataset.demo_queries = 200
    return config


def comparison(figures: dict[str, dict[str, float]]) -> str:
    """Lays the runs' figures side by side, one line a run."""
    lines = [f"{'percent':<10}" + "".join(f"{name:>9}" for name in SHOWN)]
    for run, values in figures.items():
        lines.append(f"{run:<10}" + "".join(f"{values[name]:>9.2f}" for name in SHOWN))
    return "\n".join(lines)
