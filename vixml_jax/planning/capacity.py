"""Compiles a run's programs for its mesh and says what they take: memory, operations, links, least time."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vixml_jax.errors import UserError
from vixml_jax.planning import useful
from vixml_jax.planning.abstract_run import AbstractRun
from vixml_jax.planning.chips import ALWAYS_SHOWN, CHIPS, Chip
from vixml_jax.planning.compiled_text import Program
from vixml_jax.planning.costs import Costs, Matmul, costs_of
from vixml_jax.planning.topology import Topology
from vixml_jax.retrieval import scann_index

# How compilers say that a program takes more memory than there is.
_SIZE = r"([\d.]+[KMGT]?)"
_TOO_LARGE = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class DoesNotFit(Exception):
    """A program that needs more memory than a device has.

    Args:
      needed: bytes.
      limit: bytes that a program may take.
    """

    def __init__(self, needed: float, limit: float):
        self.needed, self.limit = needed, limit
        super().__init__(f"needs {needed / 1e9:.2f} GB a device, of {limit / 1e9:.2f}")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      parameters: those that train and those that do not.
      optimizer: moments.
      tables: centroids, query embeddings, clusters.
      batch: tokens, pictures and targets.
      activations: everything that lives within the step, gradients included.
      code: the program itself.
    """

    parameters: int
    optimizer: int = 0
    tables: int = 0
    batch: int = 0
    activations: int = 0
    code: int = 0

    @property
    def total(self) -> int:
        """Bytes that the device must have."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Floor:
    """Seconds below which a program cannot run on a chip: each of three units at its peak.

    Attributes:
      matrix: matrix units.
      memory: the device's memory.
      links: between devices.
    """

    matrix: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The longest of the three, as they work at the same time."""
        return max(self.matrix, self.memory, self.links)


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """A compiled program and what it takes.

    Attributes:
      memory: of one device.
      costs: of one device.
      useful: operations that the model needs, on all devices together.
      repeated: operations that rematerialisation adds, on all devices together.
      text: of the compiled program.
      compile_seconds: what compiling took here.
    """

    memory: Memory
    costs: Costs
    useful: float
    repeated: float
    text: str
    compile_seconds: float

    def floor(self, chip: Chip) -> Floor:
        """Returns the least time of one call on a chip."""
        sent = sum(self.costs.sent_by_kind().values())
        return Floor(
            self.costs.flops / chip.flops,
            self.costs.traffic / chip.memory_bandwidth,
            sent / chip.link_bandwidth,
        )


def plan_step(run: AbstractRun, topology: Topology) -> ProgramPlan:
    """Compiles the training step.

    Raises:
      DoesNotFit: if the compiler says so.
      UserError: if its program cannot be read.
    """
    return _compiled(known_of_step(run), run.trace_step(), topology)


def plan_encoding(run: AbstractRun, topology: Topology) -> ProgramPlan:
    """Compiles one call of the encoder, on `run.items_per_call` items.

    Raises:
      DoesNotFit: if the compiler says so.
      UserError: if its program cannot be read.
    """
    return _compiled(known_of_encoding(run), run.trace_encoding(), topology)


def known_of_step(run: AbstractRun) -> ProgramPlan:
    """Returns what is known of the training step without compiling it: no activations, no traffic."""
    state, (model, repeated) = run.state, useful.step_flops(run)
    memory = Memory(
        parameters=nbytes(state.params) + nbytes(run.frozen),
        optimizer=nbytes(state.opt_state),
        tables=nbytes(state.tables),
        batch=nbytes(run.train_batch()),
    )
    return _known(run, memory, model, repeated)


def known_of_encoding(run: AbstractRun) -> ProgramPlan:
    """Returns what is known of a call of the encoder without compiling it."""
    memory = Memory(
        parameters=nbytes(run.state.params) + nbytes(run.frozen), batch=nbytes(run.encoding_tokens())
    )
    return _known(run, memory, useful.encoding_flops(run, run.items_per_call), 0.0)


def _known(run: AbstractRun, memory: Memory, model: float, repeated: float) -> ProgramPlan:
    flops = round((model + repeated) / run.mesh.devices.size)
    matmul = Matmul(flops, (run.spec.dtype, run.spec.dtype), (), 1, "the model")
    return ProgramPlan(memory, Costs((matmul,), (), 0.0), model, repeated, "", 0.0)


def _compiled(known: ProgramPlan, traced: jax.stages.Traced, topology: Topology) -> ProgramPlan:
    """Completes what is known of a program by what its compiler makes of it."""
    start = time.monotonic()
    with _uncached():
        try:
            compiled = traced.lower(lowering_platforms=(topology.platform,)).compile()
        except jax.errors.JaxRuntimeError as error:
            if (problem := _does_not_fit(error)) is not None:
                raise problem from error
            raise
    seconds = time.monotonic() - start
    used: Any = compiled.memory_analysis()
    live_after = used.output_size_in_bytes - used.alias_size_in_bytes
    memory = dataclasses.replace(
        known.memory,
        activations=used.temp_size_in_bytes + live_after,
        code=used.generated_code_size_in_bytes,
    )
    try:
        text = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"the program for {topology.name} cannot be read: jax and its compiler are not of one version",
            fix="pip install 'vixml-jax[plan]' brings the TPU compiler that goes with jax",
        ) from error
    return dataclasses.replace(
        known, memory=memory, costs=costs_of(Program(text)), text=text, compile_seconds=seconds
    )


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Keeps programs out of JAX's compilation cache, which cannot read those of absent devices."""
    setting = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, setting)
    jax.config.update(setting, float("inf"))
    try:
        yield
    finally:
        jax.config.update(setting, before)


def nbytes(tree: Any) -> int:
    """Bytes that one device holds of arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def _does_not_fit(error: Exception) -> DoesNotFit | None:
    """What a compiler's message says about memory; None where it is about something else."""
    found = next(filter(None, (form.search(str(error)) for form in _TOO_LARGE)), None)
    if "RESOURCE_EXHAUSTED" not in str(error) or not found:
        return None
    return DoesNotFit(
        *(float(text.rstrip("KMGT")) * _UNITS[text.lstrip("0123456789.")] for text in found.groups())
    )


def chips_shown(topology: Topology) -> list[Chip]:
    """Returns the chips whose floors are shown: the topology's own, then H100 and H200."""
    others = [CHIPS[name] for name in ALWAYS_SHOWN]
    return [*([topology.chip] if topology.chip and topology.chip not in others else []), *others]


def index_bytes(run: AbstractRun) -> int:
    """Bytes of the label index that the config asks for."""
    settings, spec = run.config.retrieval, run.spec
    dim = settings.dims or spec.dim
    if settings.kind == "scann":
        # float32 embeddings for exact reordering, and 4 bits for each block of dimensions.
        return spec.num_labels * (4 * dim + -(-dim // (2 * scann_index.blocks(dim)[0])))
    return spec.num_labels * dim * {"float32": 4, "bfloat16": 2, "int8": 1}[settings.dtype]


def image_bank_bytes(run: AbstractRun) -> int:
    """Bytes on disk of the pictures' embeddings of all splits; 0 for text only."""
    if run.image_shape is None:
        return 0
    workload = run.workload
    items = workload.queries + workload.test_queries + workload.labels
    embeddings = round(items * workload.images) * run.config.vision.tokens
    return embeddings * math.prod(run.image_shape.shape) * 2
