"""What the field's papers claim, tried on the two real sets: every setting on several seeds, one script.

  python benchmarks/claims.py --picto=data/picto_tags --tate=data/tate_subjects --checkpoint=MINILM_L6_DIR \
      --vision=runs/pictures/tower --out=runs/claims --figures=docs/claims.json --write=docs/results.md

Each setting is a `vixml train` of its own, below --out, small enough for two minutes on one core: the first
two layers of MiniLM-L6, two epochs of MM-PictoTags or one of 20,000 queries of LF-TateSubjects, batches of
256 without mining. Labels alone are searched, as in the paper's comparisons. Only one thing differs within a
claim. Nothing is chosen here by what comes out. --figures keeps what each run measured: those are not
repeated, so that a stopped script goes on; --seeds=0 shows what there is.

A claim holds if the gain, taken seed by seed, is above zero in a one-sided t-test at 5 percent; it is said to
be reversed where the loss is.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import scipy.stats
import timing

from vixml_jax import files

ROOT = Path(__file__).parent.parent
METRICS = ("P@1", "PSP@1", "R@100")
SETS = {"picto": "MM-PictoTags", "tate": "LF-TateSubjects"}
# The table stands between these lines of --write.
START, END = "<!-- claims: written by benchmarks/claims.py -->", "<!-- end of claims -->"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
      dataset: "picto" or "tate".
      name: as the table shows it.
      args: of the dataset's config.
      flags: overrides, beside those of all.
      decoder: a tiny decoder of random weights instead of the encoder.
    """

    dataset: str
    name: str
    args: str = ""
    flags: tuple[str, ...] = ()
    decoder: bool = False

    @property
    def slug(self) -> str:
        """Name of its folder: settings that compute the same have the same."""
        parts = [self.dataset, self.args, *self.flags, "decoder" if self.decoder else ""]
        words = "_".join(part for part in parts if part).replace("--config.", "")
        return re.sub(r"[^\w.=,+-]+", "-", words)


@dataclasses.dataclass(frozen=True)
class Claim:
    """That one setting is better than another, as a paper has it."""

    text: str
    better: Setting
    worse: Setting


def _losses(dataset: str) -> dict[str, Setting]:
    names = {
        "prime": "PRIME",
        "dexa": "DEXA",
        "ngame": "NGAME triplet",
        "info_nce": "in-batch softmax",
        "decoupled_softmax": "decoupled softmax (DEXML)",
    }
    return {loss: Setting(dataset, name, f"loss={loss}") for loss, name in names.items()}


def _prompted(name: str, prompt: str, images: int = 0) -> Setting:
    return Setting("picto", name, f"images={images}", (f"--config.text.prompt={prompt}",), decoder=True)


# The config's own: two layers, no pictures, the decoupled softmax, but with PRIME's prototypes: not DEXML.
PLAIN = Setting("picto", "as configured", "images=0")
PICTURES = {
    0: PLAIN,
    **{count: Setting("picto", f"{count} picture(s) an item", f"images={count}") for count in (1, 2, 3)},
}
LAYERS = {
    2: PLAIN,
    **{
        count: Setting("picto", f"{count} layer(s)", "images=0", (f"--config.text.layers={count}",))
        for count in (1, 4)
    },
}
PICTO_LOSSES, TATE_LOSSES = _losses("picto"), _losses("tate")
BARE, PROMPT = (
    _prompted("decoder, no prompt", "{text}{eos}"),
    _prompted("decoder, prompt", "This product text {text}{eos}"),
)
IMAGES_FIRST, IMAGES_LAST = (
    _prompted("decoder, pictures first", "{images}{text}{eos}", images=3),
    _prompted("decoder, pictures last", "{text}{images}{eos}", images=3),
)

CLAIMS = (
    Claim("pictures help (ViXML, Table 3)", PICTURES[3], PICTURES[0]),
    Claim("two pictures beat one (Table 10)", PICTURES[2], PICTURES[1]),
    Claim("three pictures beat two (Table 10)", PICTURES[3], PICTURES[2]),
    Claim("PRIME beats DEXA (Table 5)", PICTO_LOSSES["prime"], PICTO_LOSSES["dexa"]),
    Claim("DEXA beats NGAME (Table 5)", PICTO_LOSSES["dexa"], PICTO_LOSSES["ngame"]),
    Claim("PRIME beats DEXML", PICTO_LOSSES["prime"], PICTO_LOSSES["decoupled_softmax"]),
    Claim("DEXML beats the in-batch softmax", PICTO_LOSSES["decoupled_softmax"], PICTO_LOSSES["info_nce"]),
    Claim("PRIME beats DEXA (Table 5)", TATE_LOSSES["prime"], TATE_LOSSES["dexa"]),
    Claim("DEXA beats NGAME (Table 5)", TATE_LOSSES["dexa"], TATE_LOSSES["ngame"]),
    Claim("PRIME beats DEXML", TATE_LOSSES["prime"], TATE_LOSSES["decoupled_softmax"]),
    Claim("DEXML beats the in-batch softmax", TATE_LOSSES["decoupled_softmax"], TATE_LOSSES["info_nce"]),
    Claim("two layers beat one (Table 1)", LAYERS[2], LAYERS[1]),
    Claim("four layers beat two (Table 1)", LAYERS[4], LAYERS[2]),
    Claim("a prompt beats none (Table 6)", PROMPT, BARE),
    Claim("pictures last beat pictures first (Table 6)", IMAGES_LAST, IMAGES_FIRST),
)


def main() -> None:
    """Trains what is missing, and writes the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picto", help="MM-PictoTags, prepared")
    parser.add_argument("--tate", help="LF-TateSubjects, prepared")
    parser.add_argument("--checkpoint", help="directory of MiniLM-L6")
    parser.add_argument(
        "--vision", help="vision tower for MM-PictoTags, as configs/pretrain_vision.py makes it"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/claims"), help="folder of the runs")
    parser.add_argument(
        "--figures", type=Path, default=ROOT / "docs" / "claims.json", help="what was measured"
    )
    parser.add_argument("--seeds", type=int, default=3, help="0 .. n-1 of each setting; 0 trains nothing")
    parser.add_argument("--only", default="", help="claims whose text or set has this in it")
    parser.add_argument(
        "--quick", action="store_true", help="a size that takes seconds; its figures stay in --out/quick"
    )
    parser.add_argument("--write", type=Path, help="Markdown file with a place for the tables")
    options = parser.parse_args()
    if options.quick:  # what it measures says nothing
        options.out /= "quick"
        options.figures, options.write = options.out / "claims.json", None
    if options.write:
        split_at_place(options.write)  # now, not after hours
    claims = [claim for claim in CLAIMS if options.only in f"{claim.text} {claim.better.dataset}"]
    settings = list(dict.fromkeys(setting for claim in claims for setting in (claim.better, claim.worse)))

    measured = files.read_json(options.figures) if options.figures.exists() else {}
    todo = [
        (setting, seed)
        for seed in range(options.seeds)
        for setting in settings
        if str(seed) not in measured.get(setting.slug, {})
    ]
    began = time.monotonic()
    for number, (setting, seed) in enumerate(todo):
        left = (time.monotonic() - began) / number * (len(todo) - number) / 60 if number else math.nan
        print(f"{number + 1}/{len(todo)}: {setting.slug}, seed {seed}; {left:.0f} min left", flush=True)
        run = train(setting, seed, options)
        figures = {metric: round(run[metric], 3) for metric in METRICS}
        measured.setdefault(setting.slug, {})[str(seed)] = {**figures, **timing.machine()}
        files.write_json(options.figures, measured)

    found = {setting: by_metric(measured, setting) for setting in settings}
    text = "\n".join([*setting_table(found), "", *claim_table(claims, found)])
    print(text)
    if options.write:
        write_between(options.write, text)


def train(setting: Setting, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Runs `vixml train`, whose log lies beside the run, and returns its figures."""
    directory = getattr(options, setting.dataset)
    if not directory or not (options.checkpoint or setting.decoder):
        sys.exit(f"{setting.name} needs --{setting.dataset} and --checkpoint")
    config = {"picto": "picto_tags", "tate": "tate_subjects"}[setting.dataset]
    flags = [
        f"--config={ROOT}/configs/{config}.py:{setting.args}",
        f"--config.dataset.dir={directory}",
        "--config.text.dtype=float32",
        "--config.train.batch_size=256",
        "--config.retrieval.kind=exact",
        "--config.retrieval.query_weight=0.0",
        "--config.retrieval.prior_weight=0.0",
        "--config.retrieval.k=100",
    ]
    if setting.decoder:
        flags += ["--config.text.checkpoint=random:qwen2-tiny", "--config.optimizer.lr=1e-3"]
    else:
        flags.append(f"--config.text.checkpoint={options.checkpoint}")
        if not any("text.layers" in flag for flag in setting.flags):
            flags.append("--config.text.layers=2")
    if setting.dataset == "picto":
        flags.append("--config.train.epochs=2")
    else:
        flags.append("--config.dataset.max_train=20000")
    if options.vision and "images=" in setting.args and "images=0" not in setting.args:
        flags.append(f"--config.vision.checkpoint={options.vision}")
    if options.quick:
        flags += ["--config.train.epochs=1", "--config.train.batch_size=32", "--config.dataset.max_train=64"]
    target = options.out / setting.slug / f"seed={seed}"
    flags += [*setting.flags, f"--config.train.seed={seed}", f"--workdir={target}"]
    target.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f"seed={seed}.log", "w") as log:
        command = [sys.executable, "-m", "vixml_jax", "train", *flags]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        sys.exit(f"exit code {code}: see {target.parent}/seed={seed}.log")
    return files.read_json(target / "metrics.json")


def by_metric(
    measured: dict[str, dict[str, dict[str, float]]], setting: Setting
) -> dict[str, dict[str, float]]:
    """Figures of a setting: metric -> seed -> percent."""
    runs = measured.get(setting.slug, {})
    return {metric: {seed: run[metric] for seed, run in sorted(runs.items())} for metric in METRICS}


def setting_table(found: dict[Setting, dict[str, dict[str, float]]]) -> Iterable[str]:
    """Yields the lines of the table of settings: mean and standard deviation."""
    yield f"| set | setting | {' | '.join(METRICS)} | seeds |"
    yield "|---|---|" + "---|" * (len(METRICS) + 1)
    for setting, figures in found.items():
        cells = [shown(list(by_seed.values())) for by_seed in figures.values()]
        yield f"| {SETS[setting.dataset]} | {setting.name} | {' | '.join(cells)} | {len(figures['P@1'])} |"


def claim_table(claims: Sequence[Claim], found: dict[Setting, dict[str, dict[str, float]]]) -> Iterable[str]:
    """Yields the lines of the table of claims: gains, seed by seed, and whether the claim holds."""
    yield "| claim | set | gain in P@1 | gain in R@100 | by P@1 |"
    yield "|---|---|---|---|---|"
    for claim in claims:
        gains = {}
        for metric in ("P@1", "R@100"):
            better, worse = found[claim.better][metric], found[claim.worse][metric]
            gains[metric] = [better[seed] - worse[seed] for seed in better.keys() & worse.keys()]
        cells = " | ".join(shown(values, sign="+") for values in gains.values())
        yield f"| {claim.text} | {SETS[claim.better.dataset]} | {cells} | {verdict(gains['P@1'])} |"


def shown(values: Sequence[float], sign: str = "") -> str:
    """Returns mean and standard deviation as text."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{spread}"


def verdict(gains: Sequence[float]) -> str:
    """Says whether gains are above zero beyond chance."""
    if len(gains) < 2:
        return "too few runs"
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    below = float(scipy.stats.t.sf(statistics.mean(gains) / max(error, 1e-9), len(gains) - 1))
    return "holds" if below < 0.05 else "reversed" if below > 0.95 else "not decided"


def split_at_place(path: Path) -> tuple[str, str]:
    """Returns what stands before START and after END of a file."""
    old = path.read_text(encoding="utf-8")
    head, start, rest = old.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end or START in rest or END in head + tail:
        sys.exit(f"{path}: no place between {START!r} and {END!r}")
    return head, tail


def write_between(path: Path, text: str) -> None:
    """Puts the text between START and END of a file."""
    head, tail = split_at_place(path)
    with files.atomic_file(path, "w") as file:
        file.write(f"{head}{START}\n{text}\n{END}{tail}")


if __name__ == "__main__":
    main()
