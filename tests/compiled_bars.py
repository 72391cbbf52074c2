"""What no compiled step may hold, read from its text: shared by the small test and by those of whole pods."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax

from vixml_jax.planning.abstract_run import AbstractRun
from vixml_jax.planning.capacity import ProgramPlan
from vixml_jax.planning.compiled_text import Program

# Matrices smaller than this many elements are not looked at: biases, norms, a prompt's places.
LARGE = 1 << 16


def forbidden_collectives(run: AbstractRun, plan: ProgramPlan) -> list[str]:
    """Collectives over a whole table, over the similarities of a batch, or over all token activations."""
    batch, dim = run.config.train.batch_size, run.spec.dim
    rows, length = run.train_batch().tokens.token_ids.shape
    tables = _table_rows(run)
    weights = {size for shape in _weight_shapes(run) for size in (math.prod(shape), math.prod(shape[1:]))}
    found = []
    for collective in plan.costs.collectives:
        for array in collective.arrays:
            size = math.prod(array.dims) * (collective.group if collective.kind == "reduce-scatter" else 1)
            is_large = len(array.dims) > 1 and size >= rows * length * dim
            reasons = {
                "a whole table": bool(tables & set(array.dims)) and size >= min(tables) * dim,
                "the similarities": array.dims.count(batch) >= 2 and size not in weights,
                "all activations": is_large and size not in weights,
            }
            where = f"{collective.kind} {array.dtype}{list(array.dims)} {collective.source}"
            found += [f"{where}: {why}" for why, is_so in reasons.items() if is_so]
    return found


def slow_matmuls(run: AbstractRun, plan: ProgramPlan) -> list[str]:
    """Products of the tower, whose operands have slots, in another type than that of the computation."""
    length = run.train_batch().tokens.token_ids.shape[1]
    wanted = {"bfloat16": "bf16", "float32": "f32"}[run.spec.dtype]
    return [
        f"{matmul.dtypes} {matmul.dims} {matmul.source}"
        for matmul in plan.costs.matmuls
        if any(len(dims) > 2 and length in dims[1:] for dims in matmul.dims[:2])
        and set(matmul.dtypes) != {wanted}
    ]


def moved_weights(run: AbstractRun, plan: ProgramPlan) -> list[str]:
    """Casts and copies of frozen weights, and turned tables, other than into the cores' own memory."""
    frozen = {_plain(shape) for leaf in jax.tree.leaves(run.frozen) for shape in _shapes(leaf)}
    frozen = {shape for shape in frozen if len(shape) > 1 and math.prod(shape) >= LARGE}
    stored = {"bfloat16": "bf16", "float32": "f32"}[run.spec.dtype]
    tables = _table_rows(run) | {rows // run.mesh.devices.size for rows in _table_rows(run)}
    found = []
    for use in Program(plan.text).uses():
        instruction = use.instruction
        if instruction.opcode not in ("convert", "copy", "transpose"):
            continue
        before, after = use.computation.operand(instruction, 0).arrays[0], instruction.arrays[0]
        shape = _plain(after.dims)
        in_memory = not (before.on_chip or after.on_chip)
        is_cast = before.dtype == stored != after.dtype
        is_copy = instruction.opcode == "copy" and not use.fused and in_memory
        is_turned = (is_copy and _order(after.layout) != _order(before.layout)) or (
            instruction.opcode == "transpose" and in_memory and after.dims != before.dims
        )
        where = f"{instruction.opcode} {before} -> {after} {instruction.source}"
        if shape in frozen and before.dtype == stored and (is_cast or is_turned or is_copy):
            found.append(f"{where}: a frozen weight")
        if is_turned and len(shape) == 2 and tables & set(shape) and math.prod(shape) >= LARGE:
            found.append(f"{where}: a table")
    return found


def waste(run: AbstractRun, plan: ProgramPlan) -> float:
    """Operations of the program over those of the model and of its rematerialisation."""
    return plan.costs.flops * run.mesh.devices.size / (plan.useful + plan.repeated)


def _table_rows(run: AbstractRun) -> set[int]:
    rows = {table.shape[0] for table in jax.tree.leaves(run.state.tables)}
    return rows | ({run.spec.num_vectors} if run.spec.prototype != "none" else set())


def _weight_shapes(run: AbstractRun) -> Iterator[tuple[int, ...]]:
    for leaf in jax.tree.leaves((run.state.params, run.frozen)):
        yield from _shapes(leaf)


def _shapes(leaf: Any) -> Iterator[tuple[int, ...]]:
    """Shapes in which a weight may be met: whole or a device's part, stacked or one layer."""
    for shape in (tuple(leaf.shape), leaf.sharding.shard_shape(leaf.shape)):
        yield shape
        yield shape[1:]


def _order(layout: str) -> str:
    """Which axis of an array changes fastest in memory, and so on: "1,0" of "{1,0:T(8,128)}"."""
    return layout.strip("{}").partition(":")[0]


def _plain(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in dims if size > 1)
