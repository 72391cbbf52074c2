"""What a compiled program costs a device: operations, collectives, memory traffic; loops multiplied out."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

from vixml_jax.planning.compiled_text import Array, Computation, Instruction, Program, Use

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\S*\))? \{([^}]*)\}")
# They move or name what is there already.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "partition-id", "replica-id", "iota", "opt-barrier", "add-dependency", "domain"),
}


@dataclasses.dataclass(frozen=True)
class Matmul:
    """A matrix product (or convolution), as a device runs it.

    Attributes:
      flops: of all its runs, a multiplication and an addition counting as two.
      dtypes: of its operands.
      dims: of its operands and its result.
      times: how often it runs.
      source: what of the traced program it came from.
    """

    flops: int
    dtypes: tuple[str, str]
    dims: tuple[tuple[int, ...], ...]
    times: int
    source: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective, as a device takes part in it.

    Attributes:
      kind: of COLLECTIVES.
      arrays: what comes out.
      group: devices that take part together.
      times: how often it runs.
      sent: bytes that the device sends in all its runs, by an algorithm that sends the least.
      source: what of the traced program it came from.
    """

    kind: str
    arrays: tuple[Array, ...]
    group: int
    times: int
    sent: float
    source: str

    @property
    def nbytes(self) -> int:
        """Bytes of the larger side, of one run."""
        whole = sum(array.nbytes for array in self.arrays)
        return whole * self.group if self.kind == "reduce-scatter" else whole


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one call of a program, for one device.

    Attributes:
      matmuls: all matrix products.
      collectives: all collectives.
      traffic: bytes read from and written to the device's memory.
    """

    matmuls: tuple[Matmul, ...]
    collectives: tuple[Collective, ...]
    traffic: float

    @property
    def flops(self) -> int:
        """Operations of all matrix products."""
        return sum(matmul.flops for matmul in self.matmuls)

    def sent_by_kind(self) -> dict[str, float]:
        """Returns the bytes that a device sends, by kind of collective."""
        kinds = sorted({collective.kind for collective in self.collectives})
        return {kind: sum(c.sent for c in self.collectives if c.kind == kind) for kind in kinds}


def costs_of(program: Program) -> Costs:
    """Adds up what a program does."""
    uses = list(program.uses())
    return Costs(
        tuple(_matmuls(uses)),
        tuple(_collectives(uses, program.partitions)),
        sum(_traffic(program, use) for use in uses),
    )


def _matmuls(uses: Iterable[Use]) -> Iterable[Matmul]:
    for use in uses:
        instruction, computation = use.instruction, use.computation
        if instruction.opcode == "dot":
            flops = _dot_flops(computation, instruction)
        elif instruction.opcode == "convolution":
            flops = _convolution_flops(computation, instruction)
        elif instruction.opcode == "custom-call" and "matmul" in instruction.attribute("custom_call_target"):
            flops = _library_matmul_flops(computation, instruction)
        else:
            continue
        left, right = (computation.operand(instruction, i).arrays[0] for i in (0, 1))
        yield Matmul(
            flops * use.times,
            (left.dtype, right.dtype),
            (left.dims, right.dims, instruction.arrays[0].dims),
            use.times,
            instruction.source,
        )


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", text)]


def _dot_flops(computation: Computation, dot: Instruction) -> int:
    left = computation.operand(dot, 0).arrays[0]
    contracted = _numbers(dot.attribute("lhs_contracting_dims"))
    return 2 * math.prod(dot.arrays[0].dims) * math.prod(left.dims[axis] for axis in contracted)


def _library_matmul_flops(computation: Computation, call: Instruction) -> int:
    """A library's product of matrices (oneDNN, cuBLAS): the result's rows and columns are the operands'."""
    left, right = (math.prod(computation.operand(call, i).arrays[0].dims) for i in (0, 1))
    out = math.prod(call.arrays[0].dims)
    batch = math.prod(call.arrays[0].dims[:-2]) if len(computation.operand(call, 1).arrays[0].dims) > 2 else 1
    # (b m k) (b k n) (b m n) = (b m n k)^2 b
    return 2 * round(math.sqrt(left * right * out * batch))


def _convolution_flops(computation: Computation, convolution: Instruction) -> int:
    """Counts as XLA does: products with padding and with the holes of dilation are none."""
    left, right = (computation.operand(convolution, i).arrays[0].dims for i in (0, 1))
    out = convolution.arrays[0].dims
    left_names, right_names, out_names = re.split(r"_|->", convolution.attribute("dim_labels"))
    window = dict(re.findall(r"(\w+)=([\w\-]+)", convolution.attribute("window")))
    groups = int(convolution.attribute("feature_group_count") or 1)
    batch_groups = int(convolution.attribute("batch_group_count") or 1)
    positions = 1
    for number in range(len(left) - 2):
        field = lambda name, plain, number=number: (  # noqa: E731
            window[name].split("x")[number] if name in window else plain
        )
        low = int(field("pad", "0_0").split("_")[0])
        positions *= _valid_positions(
            left[left_names.index(str(number))],
            right[right_names.index(str(number))],
            out[out_names.index(str(number))],
            stride=int(field("stride", 1)),
            low=low,
            input_dilation=int(field("lhs_dilate", 1)),
            kernel_dilation=int(field("rhs_dilate", 1)),
        )
    inputs, batch = left[left_names.index("f")], left[left_names.index("b")]
    outputs = out[out_names.index("f")]
    return 2 * (inputs // groups) * outputs * (batch // batch_groups) * positions


def _valid_positions(
    size: int, kernel: int, out: int, *, stride: int, low: int, input_dilation: int, kernel_dilation: int
) -> int:
    """Pairs of an output and a place of the kernel that meet an input."""
    outputs = np.arange(out)
    count = 0
    for place in range(kernel):
        undilated = outputs * stride - low + place * kernel_dilation
        inputs, rest = np.divmod(undilated, input_dilation)
        count += int(((rest == 0) & (inputs >= 0) & (inputs < size)).sum())
    return count


def kind_of(instruction: Instruction) -> str | None:
    """Returns which of COLLECTIVES an instruction starts, None for any other."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def group_size(instruction: Instruction, devices: int) -> int:
    """Returns how many devices take part in a collective together."""
    if instruction.attribute("source_target_pairs"):
        return 2
    groups = instruction.attribute("replica_groups")
    if match := re.match(r"\[(\d+),(\d+)\]", groups):
        return int(match.group(2))
    # Axes of a mesh, or parts of them; the order of its devices may stand between.
    if match := _MESH_GROUPS.search(instruction.attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match.group(1)))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match.group(2))
        return math.prod(int(part or sizes[name]) for name, part in axes)
    first = re.search(r"\{([\d,]+)\}", groups)
    return len(first.group(1).split(",")) if first else devices


def _collectives(uses: Iterable[Use], devices: int) -> Iterable[Collective]:
    seen = set()
    for use in uses:
        instruction = use.instruction
        kind = kind_of(instruction)
        # TPU: one that goes on beside several fusions stands in each of them, under one number.
        channel = instruction.attribute("channel_id")
        if kind is None or (channel and use.fused and (channel, use.times) in seen):
            continue
        seen.add((channel, use.times))
        group = group_size(instruction, devices)
        given = tuple(
            array
            for number in range(len(instruction.operands))
            for array in use.computation.operand(instruction, number).arrays
        )
        arrays = instruction.arrays
        if instruction.opcode.endswith("-start") and kind != "all-reduce":
            # (operands, results, and perhaps context)
            arrays = arrays[len(given) : 2 * len(given)] or arrays
        # TPU: an all-reduce of which each device keeps a slice is one operation.
        if kind == "all-reduce" and use.computation.name.startswith("all-reduce-scatter"):
            kind, arrays = "reduce-scatter", use.computation.root.arrays
        moved, came = (sum(array.nbytes for array in side) for side in (given, arrays))
        share = (group - 1) / group if group > 1 else 0.0
        sent = {
            "all-gather": moved * (group - 1),
            "all-reduce": 2 * moved * share,
            "reduce-scatter": moved * share,
            "all-to-all": moved * share,
            "ragged-all-to-all": moved * share,
            "collective-permute": came,
            "collective-broadcast": came,
        }[kind]
        yield Collective(kind, arrays, group, use.times, sent * use.times, instruction.source)


def _traffic(program: Program, use: Use) -> float:
    """Bytes that an instruction moves between the device's memory and its cores."""
    instruction = use.instruction
    opcode = instruction.opcode
    if use.fused or opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    if opcode.endswith("-start") and opcode != "copy-start":
        return 0.0  # its wrapped computation is walked, or it goes over links
    result = instruction.arrays[:1] if opcode == "copy-start" else instruction.arrays
    written = sum(array.nbytes for array in result if not array.on_chip)
    read = 0.0
    if opcode in ("dynamic-slice", "gather", "slice"):
        return use.times * (2.0 * written if not use.computation.operand(instruction, 0).arrays[0].on_chip
                            else float(written))  # fmt: skip
    if opcode in ("dynamic-update-slice", "scatter"):
        update = use.computation.operand(instruction, 1 if opcode == "dynamic-update-slice" else -1)
        return use.times * 2.0 * update.nbytes
    if opcode == "fusion":
        inner = program.computations[instruction.called("calls")]
        for number in range(len(instruction.operands)):
            operand = use.computation.operand(instruction, number)
            if not all(array.on_chip for array in operand.arrays):
                read += _read_of(inner, number, operand)
        written = _written_of(inner, instruction)
    else:
        for number in range(len(instruction.operands)):
            arrays = use.computation.operand(instruction, number).arrays
            read += sum(array.nbytes for array in arrays if not array.on_chip)
    return use.times * (read + written)


def _read_of(inner: Computation, number: int, operand: Instruction) -> float:
    """Bytes that a fusion reads of an operand: slices where it takes nothing else of it."""
    parameter = inner.parameters.get(number)
    if parameter is None:
        return operand.nbytes
    users = [i for i in inner.instructions.values() if parameter.name in i.operands]
    sliced = 0.0
    for user in users:
        first = user.operands[0] == parameter.name
        if user.opcode in ("dynamic-slice", "slice", "gather") and first:
            sliced += user.nbytes
        elif not (user.opcode in ("dynamic-update-slice", "scatter") and first):
            return operand.nbytes
    return min(sliced, operand.nbytes)


def _written_of(inner: Computation, fusion: Instruction) -> float:
    """Bytes that a fusion writes: updates where its result is an operand with some rows replaced."""
    written = 0.0
    root = inner.root
    results = [inner.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for array, result in zip(fusion.arrays, results, strict=False):
        if array.on_chip:
            continue
        while result.opcode == "bitcast":
            result = inner.instructions[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            written += inner.operand(result, 1).nbytes
        elif result.opcode == "scatter":
            written += inner.operand(result, -1).nbytes
        else:
            written += array.nbytes
    return written
