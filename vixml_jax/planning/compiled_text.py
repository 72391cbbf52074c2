"""Reads the text of a compiled program: computations, instructions, and how often each of them runs.

XLA's `as_text` is the one description of a program that every backend gives after all of its passes: which
collectives there are, what is copied, where arrays lie. Its own cost analysis counts the body of a loop once;
here loops are multiplied out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in the text: `bf16[8,128]{1,0:T(8,128)S(1)}`.

    Attributes:
      dtype: as XLA names it.
      dims: its shape.
      layout: what stands in braces behind the shape; "" where nothing does.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes, without padding."""
        bits = BITS.get(self.dtype)
        if bits is None:
            match = re.search(r"\d+", self.dtype)
            bits = int(match.group()) if match else 0
        return math.prod(self.dims) * bits // 8

    @property
    def on_chip(self) -> bool:
        """Whether it lies in another memory than the device's large one (a TPU's VMEM, for example)."""
        return re.search(r"S\([1-9]", self.layout) is not None


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in its computation.
      opcode: such as "fusion".
      arrays: its result; several for a tuple.
      operands: names of the instructions that it reads.
      attributes: the rest of the line.
      argument: what stands between the parentheses, for constants and parameters.
      is_root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    argument: str
    is_root: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its result."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def source(self) -> str:
        """What of the traced program it came from, "" where the compiler made it up."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match.group(1) if match else ""

    def attribute(self, name: str) -> str:
        """Returns the value of `name=value`, "" where there is none; braces are balanced."""
        match = re.search(rf"(?:^|[ ,]){re.escape(name)}=", self.attributes)
        if not match:
            return ""
        rest = self.attributes[match.end() :]
        return _balanced(rest) if rest.startswith("{") else rest.split(", ", 1)[0]

    def called(self, attribute: str) -> str:
        """Returns the computation that an attribute names."""
        return self.attribute(attribute).lstrip("%")


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program.

    Attributes:
      name: of it.
      instructions: by name, in order.
    """

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """Its result."""
        return next(i for i in self.instructions.values() if i.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.argument): i for i in found}

    def operand(self, instruction: Instruction, number: int) -> Instruction:
        """Returns the instruction that gives an operand."""
        return self.instructions[instruction.operands[number]]


@dataclasses.dataclass(frozen=True)
class Use:
    """An instruction where it stands.

    Attributes:
      instruction: it.
      computation: which holds it.
      times: how often it runs in one call of the program.
      fused: whether it is part of a fusion, whose inner arrays touch no memory.
    """

    instruction: Instruction
    computation: Computation
    times: int
    fused: bool


class Program:
    """A compiled program, read from its text.

    Attributes:
      computations: by name.
      entry: name of the one that runs.
      partitions: devices that run it together.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        partitions = re.search(r"num_partitions=(\d+)", text.split("\n", 1)[0])
        self.partitions = int(partitions.group(1)) if partitions else 1
        current: dict[str, Instruction] | None = None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = {}
                name = header.group("name")
                self.computations[name] = Computation(name, current)
                if header.group("entry"):
                    self.entry = name
            elif line.startswith("}"):
                current = None
            elif current is not None and (instruction := _instruction(line)):
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("no entry computation: this is not the text of a compiled program")

    def uses(self) -> Iterator[Use]:
        """Yields every instruction that the program runs, loops and calls followed."""
        yield from self._walk(self.entry, 1, False)

    def _walk(self, name: str, times: int, fused: bool) -> Iterator[Use]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield Use(instruction, computation, times, fused)
            opcode = instruction.opcode
            if opcode == "while":
                trips = times * self.trip_count(instruction)
                yield from self._walk(instruction.called("body"), trips, fused)
                yield from self._walk(instruction.called("condition"), trips, fused)
            elif opcode == "fusion":
                yield from self._walk(instruction.called("calls"), times, True)
            elif opcode == "call":
                yield from self._walk(instruction.called("to_apply"), times, fused)
            elif opcode == "async-start":
                yield from self._walk(instruction.called("calls"), times, fused)
            elif opcode == "conditional":
                for branch in _branches(instruction):
                    yield from self._walk(branch, times, fused)
            elif opcode == "custom-call" and (inner := instruction.called("called_computations")):
                for branch in re.findall(r"[\w.\-]+", inner):
                    yield from self._walk(branch, times, fused)

    def trip_count(self, loop: Instruction) -> int:
        """Returns how often the body of a `while` runs; 1 where the text does not say."""
        if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
            return int(known.group(1))
        # The compiler's own loops count from 0 to a constant, perhaps in steps of more than one.
        condition, body = (self.computations[loop.called(part)] for part in ("condition", "body"))
        inside = condition.instructions.values()
        limits = [int(i.argument) for i in inside if i.opcode == "constant" and i.argument.isdigit()]
        counters = [int(i.attribute("index")) for i in inside if i.opcode == "get-tuple-element"]
        steps = [_increment(body, body.root.operands[number], number) for number in counters]
        return max(1, -(-max(limits, default=1) // max(steps, default=1)))


def _increment(body: Computation, name: str, number: int) -> int:
    """What a loop's body adds to the counter at a place of its tuple; 1 where that is not plain."""
    instruction, added = body.instructions[name], 0
    while instruction.opcode == "add":
        terms = [body.operand(instruction, place) for place in (0, 1)]
        constants = [term for term in terms if term.opcode == "constant"]
        if len(constants) != 1:
            return 1
        added += int(constants[0].argument)
        instruction = next(term for term in terms if term is not constants[0])
    is_counter = instruction.opcode == "get-tuple-element" and int(instruction.attribute("index")) == number
    return added if is_counter and added > 0 else 1


def _branches(instruction: Instruction) -> list[str]:
    named = [instruction.called(f"{kind}_computation") for kind in ("true", "false")]
    return [*filter(None, named), *re.findall(r"[\w.\-]+", instruction.attribute("branch_computations"))]


_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .*\{\s*$")
_LINE = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)$")
_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<dims>[\d,<=]*)\](?P<layout>\{[^{}]*\})?")
_OPCODE = re.compile(r"\s*(?P<opcode>[a-z][\w\-]*)\(")


def _instruction(line: str) -> Instruction | None:
    match = _LINE.match(line)
    if not match:
        return None
    rest = re.sub(r"/\*.*?\*/", "", match.group("rest"))
    shape = _balanced(rest, "()") if rest.startswith("(") else rest.split(" ", 1)[0]
    arrays = tuple(
        Array(found["dtype"], _dims(found["dims"]), found["layout"] or "") for found in _ARRAY.finditer(shape)
    )
    opcode = _OPCODE.match(rest, len(shape))
    if not opcode:
        return None
    argument = _balanced(rest[opcode.end() - 1 :], "()")[1:-1]
    attributes = rest[opcode.end() + len(argument) + 1 :].lstrip(", ")
    # Operands are printed with or without their shapes.
    operands = tuple(re.findall(r"%([\w.\-]+)", argument))
    return Instruction(
        match.group("name"), opcode.group("opcode"), arrays, operands, attributes, argument,
        match.group("root") is not None,
    )  # fmt: skip


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(size.lstrip("<=")) for size in text.split(",") if size)


def _balanced(text: str, pair: str = "{}") -> str:
    """The start of `text`, which begins with an opening bracket, up to the bracket that closes it."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == pair[0]) - (letter == pair[1])
        if not depth:
            return text[: place + 1]
    return text
