"""Says what a config needs before anything runs: `vixml plan --config=configs/demo.py --topology=v5e:16x16`.

Compiles the training step and a call of the encoder from shapes alone, for a TPU slice that need not be
there (v5e:4x4, v5p:4x4x4, v6e:16x16; extra `plan`), for cpu:N devices, or for the GPUs at hand (gpu). Prints
bytes a device, operations, what travels between devices, and a floor of the time: what the matrix units, the
memory or the links of a chip need at their peaks, whichever is longest. No data and no weights are read;
sizes of the paper's datasets and towers are known, of others give --labels and --queries. A config that does
not fit ends with 2, after changes have been tried that would help. docs/scaling.md explains every line.

Examples:
  vixml plan --config=configs/lf_amazontitles_1p3m.py:backbone=qwen2.5-3b,images=3 --topology=v5e:16x16 \\
      --config.mesh.fsdp=16
  vixml plan --config=configs/lf_amazon_131k.py:backbone=qwen2.5-3b,images=3 --topology=cpu:8 --nocompile
  vixml plan --config=configs/own.py --config.dataset.dir=data/own --topology=cpu:8 --json=plan.json
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict

from vixml_jax import config as config_lib
from vixml_jax import config_rules, files, recipes
from vixml_jax.errors import UserError

if TYPE_CHECKING:
    from vixml_jax.planning.abstract_run import AbstractRun, Workload
    from vixml_jax.planning.capacity import ProgramPlan
    from vixml_jax.planning.topology import Topology


def define_flags() -> None:
    """Registers the command's flags."""
    config_lib.define_config_flag(workdir=False)
    flags.DEFINE_string("topology", None, "v5e:4x4 and the like, cpu:8, or gpu", required=True)
    flags.DEFINE_integer("labels", None, "Labels (default: those of config.dataset.dir)", lower_bound=1)
    flags.DEFINE_integer("queries", None, "Training queries (default: the same)", lower_bound=1)
    flags.DEFINE_float("tokens", None, "Text tokens of an item, mean (default: half of text.max_tokens)")
    flags.DEFINE_float("images", None, "Pictures of an item, mean (default: config.vision.images)")
    flags.DEFINE_bool("compile", True, "Without it: what is known in seconds, without activations")
    flags.DEFINE_string("json", None, "File for the figures as JSON; - prints it instead of the tables")


def main() -> int:
    """Runs the command."""
    values = flags.FLAGS
    if values.config is None:
        raise UserError("plan needs --config", fix="as in --config=configs/lf_amazontitles_1p3m.py")
    config = values.config
    config_rules.validate(config)
    from vixml_jax.planning import topology

    devices = topology.topology(values.topology)
    workload = workload_of(config, values.labels, values.queries, values.tokens, values.images)
    figures = plan(config, workload, devices, compiled=values.compile)
    if values.json == "-":
        json.dump(figures, sys.stdout, indent=2)
        print()
    else:
        if values.json:
            files.write_json(values.json, figures)
        print(shown(figures))
    return 0


def workload_of(
    config: ConfigDict,
    labels: int | None,
    queries: int | None,
    tokens: float | None,
    images: float | None,
) -> Workload:
    """Returns the size of what a config works on: as given, of a dataset of the paper, or of a prepared one.

    Raises:
      UserError: if it is not to be known.
    """
    from vixml_jax.planning.abstract_run import Workload

    directory = Path(config.dataset.dir)
    known = recipes.DATASETS.get(directory.name)
    test = known.test if known else 0
    if known:
        labels, queries = labels or known.labels, queries or known.train
    elif directory.is_dir() and not (labels and queries):
        from vixml_jax import data

        dataset = data.load(directory)
        labels, queries = labels or len(dataset.labels), queries or len(dataset.train)
        test = len(dataset.test)
    if not (labels and queries):
        raise UserError(
            f"config.dataset.dir={config.dataset.dir!r} is no dataset of the paper, and not there",
            fix="give --labels=NUMBER --queries=NUMBER",
        )
    if images is None:
        images = float(config.vision.images)
    if not 0 <= images <= config.vision.images:
        raise UserError(
            f"--images={images:g} with config.vision.images={config.vision.images}",
            fix=f"give 0 to {config.vision.images}",
        )
    return Workload(labels, queries, test, tokens or config.text.max_tokens / 2, images)


def plan(
    config: ConfigDict, workload: Workload, devices: Topology, *, compiled: bool = True
) -> dict[str, Any]:
    """Compiles a config's programs, where asked for, and returns the figures, JSON-able.

    Raises:
      UserError: if a device's memory is too small, with what would help.
    """
    from vixml_jax import sharding
    from vixml_jax.planning import capacity
    from vixml_jax.planning.abstract_run import abstract_run

    def make(config: ConfigDict) -> AbstractRun:
        mesh = config.mesh
        return abstract_run(
            config, workload, sharding.make_mesh(mesh.data, mesh.fsdp, mesh.tensor, list(devices.devices))
        )

    run = make(config)
    if not compiled:
        return _figures(run, devices, capacity.known_of_step(run), capacity.known_of_encoding(run))
    try:
        step = capacity.plan_step(run, devices)
        encoding = capacity.plan_encoding(run, devices)
    except capacity.DoesNotFit as problem:
        raise _help(config, make, devices, problem) from problem
    return _figures(run, devices, step, encoding)


def _help(config: ConfigDict, make: Any, devices: Topology, problem: Any) -> UserError:
    """Tries changes; the error says what is missing, and which changes help most."""
    from vixml_jax.planning import capacity, remedies

    def needed_by(changed: ConfigDict) -> float | None:
        print(f"trying {_difference(config, changed)}", file=sys.stderr)
        try:
            run = make(changed)
            return float(capacity.plan_step(run, devices).memory.total)
        except capacity.DoesNotFit as still:
            return still.needed
        except UserError:
            return None  # a batch that does not split so, for example

    print(f"the step {problem}; looking for what helps", file=sys.stderr)
    found = remedies.find(config, len(devices.devices), problem.limit, needed_by)
    fix = "; ".join(
        f"{remedy.flags}: {_gb(remedy.needed)} GB, {'fits' if remedy.fits else 'not enough alone'}"
        for remedy in found
    )
    return UserError(
        f"needs {_gb(problem.needed)} GB a device, {_gb(problem.needed - problem.limit)} more than the "
        f"{_gb(problem.limit)} that a program may take on {devices.name}",
        fix=fix or "take more devices or a smaller config.train.batch_size",
    )


def _difference(old: ConfigDict, new: ConfigDict) -> str:
    before, after = config_lib.flat(old), config_lib.flat(new)
    return " ".join(f"--config.{key}={after[key]}" for key in after if after[key] != before.get(key))


def _figures(run: AbstractRun, devices: Topology, step: ProgramPlan, encoding: ProgramPlan) -> dict[str, Any]:
    from vixml_jax.planning import capacity

    config, workload, spec = run.config, run.workload, run.spec
    steps = config.train.epochs * run.steps_per_epoch
    # All labels and training queries before the first step, labels and what searches or is searched
    # after the last, as each of its modalities.
    views = len(set(config.retrieval.modalities)) if config.vision.images else 1
    searched = views * workload.test_queries
    if config.retrieval.query_weight:
        searched += views * workload.queries
    calls = sum(
        -(-count // run.items_per_call)
        for count in (workload.labels, workload.queries, workload.labels, searched)
    )
    count = len(devices.devices)
    shapes = run.train_batch().tokens.token_ids.shape
    return {
        "topology": devices.name,
        "devices": count,
        "compiled": bool(step.text),
        "chip": devices.chip.name if devices.chip else None,
        "memory_limit": devices.chip.memory if devices.chip else None,
        "mesh": {axis: int(size) for axis, size in run.mesh.shape.items()},
        "tower": config.text.checkpoint,
        "batch_size": config.train.batch_size,
        "labels": workload.labels,
        "queries": workload.queries,
        "tokens_per_item": workload.tokens,
        "images_per_item": workload.images,
        "padding": 1 - run.useful_slots(2 * config.train.batch_size) / (shapes[0] * shapes[1]),
        "epochs": config.train.epochs,
        "steps": steps,
        "items_per_call": run.items_per_call,
        "index_kind": config.retrieval.kind,
        "index_bytes": capacity.index_bytes(run),
        "image_bank_bytes": capacity.image_bank_bytes(run),
        "dim": spec.dim,
        "train": _program(devices, step, steps),
        "encode": _program(devices, encoding, calls),
    }


def _program(devices: Topology, program: ProgramPlan, calls: int) -> dict[str, Any]:
    """Figures of one program, which runs so many times."""
    from vixml_jax.planning import capacity

    count = len(devices.devices)
    floors = {}
    for chip in capacity.chips_shown(devices):
        floor = program.floor(chip)
        floors[chip.name] = {
            **dataclasses.asdict(floor),
            "seconds": floor.seconds,
            "hours": floor.seconds * calls / 3600,
            "fits": program.memory.total <= chip.memory,
        }
    return {
        "calls": calls,
        "bytes_per_device": {**dataclasses.asdict(program.memory), "total": program.memory.total},
        "flops": program.costs.flops * count,
        "useful_flops": program.useful,
        "repeated_flops": program.repeated,
        "collective_bytes_per_device": program.costs.sent_by_kind(),
        "memory_traffic_per_device": program.costs.traffic,
        "floors": floors,
        "compile_seconds": program.compile_seconds,
    }


def shown(figures: dict[str, Any]) -> str:
    """Returns the figures as a person reads them."""
    chip = f" {figures['chip']}" if figures["chip"] else ""
    mesh = ", ".join(f"{axis} {size}" for axis, size in figures["mesh"].items())
    lines = [
        f"{figures['tower']} on {figures['topology']}: {figures['devices']}{chip} devices ({mesh})",
        f"{figures['labels']:,} labels, {figures['queries']:,} queries, batches of {figures['batch_size']:,}",
        f"items of {figures['tokens_per_item']:g} tokens and {figures['images_per_item']:g} pictures, "
        f"{figures['padding']:.1%} padding",
        "" if figures["compiled"] else "not compiled: activations, padding and what travels come on top\n",
    ]
    programs = [figures[name] for name in ("train", "encode")]

    def row(name: str, value: Callable[[dict[str, Any]], float], unit: float) -> tuple[str, ...]:
        return (name, *(_number(value(program) / unit) for program in programs))

    rows = [
        ("", "training step", f"{figures['items_per_call']:,} items encoded"),
        ("calls", *(f"{program['calls']:,}" for program in programs)),
        ("GB a device", "", ""),
    ]
    for part in programs[0]["bytes_per_device"]:
        rows.append(row(f"  {part}", lambda program, part=part: program["bytes_per_device"][part], 1e9))
    if figures["memory_limit"]:
        rows.append(("  of", *[_number(figures["memory_limit"] / 1e9)] * 2))
    rows += [
        row("TFLOP in all", lambda program: program["flops"], 1e12),
        row("  useful", lambda program: program["useful_flops"], 1e12),
        row("  repeated by remat", lambda program: program["repeated_flops"], 1e12),
        ("MB that a device sends", "", ""),
    ]
    for kind in sorted({kind for program in programs for kind in program["collective_bytes_per_device"]}):
        rows.append(
            row(
                f"  {kind}",
                lambda program, kind=kind: program["collective_bytes_per_device"].get(kind, 0),
                1e6,
            )
        )
    widths = [max(len(cells[column]) for cells in rows) for column in range(3)]
    lines += [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}".rstrip() for a, b, c in rows]

    heads = "".join(f"{name:>10}" for name in ("matrix", "memory", "links", "step"))
    lines += ["", f"{'milliseconds at least':<22}{heads}   hours: train    encode"]
    for name, floor in programs[0]["floors"].items():
        units = ("matrix", "memory", "links", "seconds")
        parts = "".join(f"{_number(1e3 * floor[unit]):>10}" for unit in units)
        hours = f"{_number(floor['hours']):>15}{_number(programs[1]['floors'][name]['hours']):>10}"
        room = "" if floor["fits"] else "   too little memory"
        lines.append(f"{figures['devices']} x {name}".ljust(22) + parts + hours + room)
    lines += ["", f"index ({figures['index_kind']}): {_gb(figures['index_bytes'])} GB"]
    if figures["image_bank_bytes"]:
        lines.append(f"embeddings of pictures on disk: {_gb(figures['image_bank_bytes'])} GB")
    return "\n".join(lines)


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.2f}"


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
