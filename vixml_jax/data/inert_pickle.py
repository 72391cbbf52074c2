"""Reads NumPy files of Python lists without running anything of what is in them.

`np.save` writes an array of lists as a pickle, and a pickle is a program: loading one from the web runs what
its author wrote. Here its instructions build plain records of what they would have done; nothing is imported
and nothing is called. What is then found to be a NumPy array of lists of whole numbers is read, anything else
is refused. Time and memory go with the size of the file.
"""

from __future__ import annotations

import math
import os
import struct
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vixml_jax.errors import UserError

# A map of pictures is far smaller. A byte may stand for an object of some sixty bytes in memory.
MAX_BYTES = 256 << 20
# A list may be named again by two bytes: so many values may stand for each byte of a file.
MAX_VALUES_PER_BYTE = 16
# Arrays within an array, of whole numbers: dtype codes without their byte order.
_INTEGERS = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)}
_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")


class _Global(NamedTuple):
    """Something that would have been imported."""

    module: str
    name: str


class _Call:
    """Something that would have been called, and the state that its result would have been given."""

    def __init__(self, function: Any, arguments: Any):
        self.function, self.arguments, self.state = function, arguments, None


class _Unsupported(Exception):
    """The file is no array of lists of whole numbers, or a broken one."""


_MARK = object()


def load_lists(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Reads lists of whole numbers from a .npy file.

    The file holds an object array [N] of lists (or tuples, or arrays) of whole numbers, single whole numbers,
    or None, which counts as an empty list; or a plain array of whole numbers, [N] or [N, K].

    Returns:
      int64 values of all lists, one after the other, and the length of each, int64 [N].

    Raises:
      UserError: if the file is anything else, naming the element of the array where that is known.
    """
    try:
        with open(path, "rb") as file:
            dtype, shape = _header(file)
            if not dtype.hasobject:
                return _plain(np.load(path, mmap_mode="r", allow_pickle=False))
            if dtype != np.dtype(object):
                raise _Unsupported(f"an array of {dtype}")
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise _Unsupported(f"more than {MAX_BYTES:,} bytes")
            elements = _elements(_Machine(file.read()).run(), shape)
        values, lengths = array("q"), np.zeros(len(elements), np.int64)
        for row, element in enumerate(elements):
            numbers = _whole_numbers(element, row)
            if len(values) + len(numbers) > MAX_VALUES_PER_BYTE * size:
                raise _Unsupported("far more numbers than bytes")
            values.extend(numbers)
            lengths[row] = len(numbers)
        return np.frombuffer(values, np.int64) if values else np.zeros(0, np.int64), lengths
    except (_Unsupported, ValueError, OverflowError) as error:
        fix = "it must be a NumPy array of lists of whole numbers; nothing in it was run"
        raise UserError(f"not a map of pictures ({error})", file=path, fix=fix) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})", file=path) from None


def _header(file: Any) -> tuple[np.dtype, tuple[int, ...]]:
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
    except Exception as error:  # NumPy reads a header as a Python literal, and raises what that raises
        raise _Unsupported(f"a broken header: {type(error).__name__}") from None
    return dtype, shape


def _plain(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise _Unsupported(f"an array of {array.dtype} with {array.ndim} axes")
    rows = array.reshape(len(array), -1)
    return rows.astype(np.int64).ravel(), np.full(len(rows), rows.shape[1], np.int64)


def _elements(value: Any, shape: tuple[int, ...]) -> list[Any]:
    """The elements of the pickled object array, or the rows of one with two axes."""
    found = _array(value)
    if found is None or not isinstance(found[1], list):
        raise _Unsupported("no array of lists")
    inner_shape, elements = found[0], found[1]
    if inner_shape != shape or len(elements) != math.prod(shape) or len(shape) not in (1, 2):
        raise _Unsupported(f"a shape of {shape} around {len(elements)} elements")
    if len(shape) == 1:
        return elements
    width = shape[1]
    return [elements[start : start + width] for start in range(0, shape[0] * width, max(width, 1))]


def _array(value: Any) -> tuple[tuple[int, ...], list[Any] | np.ndarray] | None:
    """Shape and elements of a pickled array; None if it is something else."""
    if not isinstance(value, _Call) or not _is_numpy(value.function, "_reconstruct"):
        return None
    match value.state:
        case (_, tuple(shape), _Call() as dtype, bool(fortran), list() | bytes() as data) if not fortran:
            if not all(isinstance(size, int) and size >= 0 for size in shape):
                return None
            if isinstance(data, list):
                return shape, data
            return shape, np.frombuffer(data, _integer_dtype(dtype))
    return None


def _is_numpy(function: Any, name: str) -> bool:
    return isinstance(function, _Global) and function.module in _MODULES and function.name == name


def _integer_dtype(value: Any) -> np.dtype:
    match value:
        case _Call(function=_Global("numpy", "dtype"), arguments=(str(code), *_), state=(_, str(order), *_)):
            if code in _INTEGERS and order in ("<", ">", "|"):
                return np.dtype(order + code)
    raise _Unsupported("an array of other than whole numbers")


def _whole_numbers(element: Any, row: int) -> list[int]:
    if element is None:
        return []
    numbers = list(element) if isinstance(element, list | tuple) else [element]
    if isinstance(element, _Call) and (found := _array(element)) is not None:
        numbers = found[1] if isinstance(found[1], list) else found[1].tolist()
    whole = [_whole_number(number) for number in numbers]
    if None in whole:
        raise _Unsupported(f"element {row} is no list of whole numbers")
    return whole  # pyright: ignore[reportReturnType]


def _whole_number(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, _Call) and _is_numpy(value.function, "scalar"):
        match value.arguments:
            case (dtype, bytes(data)):
                numbers = np.frombuffer(data, _integer_dtype(dtype))
                return int(numbers[0]) if len(numbers) == 1 else None
    return None


class _Machine:
    """Follows the instructions of a pickle (PEP 3154 and before) as far as arrays of lists need them.

    Args:
      data: the pickle.
    """

    def __init__(self, data: bytes):
        self._data, self._at = data, 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Returns what the pickle stands for: numbers, strings, lists, tuples and records of calls.

        Raises:
          _Unsupported: at the first instruction that has no place in an array of lists.
        """
        data, stop = self._data, ord(".")
        try:
            while (code := data[self._at]) != stop:
                self._at += 1
                _INSTRUCTIONS[code](self)
            return self._stack.pop()
        except KeyError as error:
            raise _Unsupported(f"instruction {error} at byte {self._at} of its pickle") from None
        except (IndexError, struct.error, TypeError, UnicodeDecodeError):
            raise _Unsupported(f"broken at byte {self._at} of its pickle") from None

    def push(self, value: Any) -> None:
        """Puts a value on the stack."""
        self._stack.append(value)

    def pop(self) -> Any:
        """Takes the topmost value off the stack."""
        value = self._stack.pop()
        if value is _MARK:
            raise IndexError("a mark")
        return value

    def take(self, size: int) -> bytes:
        """Reads the next bytes."""
        part = self._data[self._at : self._at + size]
        if size < 0 or len(part) != size:
            raise IndexError(size)
        self._at += size
        return part

    def number(self, form: str) -> int:
        """Reads a number of a `struct` format."""
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def line(self) -> str:
        """Reads the text up to the next line break."""
        end = self._data.index(b"\n", self._at)
        text = self._data[self._at : end].decode()
        self._at = end + 1
        return text

    def popped_mark(self) -> list[Any]:
        """Takes all values above the topmost mark off the stack, and the mark."""
        stack = self._stack
        for place in range(len(stack) - 1, -1, -1):
            if stack[place] is _MARK:
                values = stack[place + 1 :]
                del stack[place:]
                return values
        raise IndexError("no mark")

    def top(self) -> Any:
        """The topmost value."""
        if self._stack[-1] is _MARK:
            raise IndexError("a mark")
        return self._stack[-1]

    def remember(self, number: int) -> None:
        """Stores the topmost value in the memo."""
        self._memo[number] = self.top()

    def memoize(self) -> None:
        """Stores the topmost value in the memo under the next number."""
        self._memo[len(self._memo)] = self.top()

    def recall(self, number: int) -> None:
        """Puts a value of the memo on the stack."""
        if number not in self._memo:
            raise IndexError(number)
        self.push(self._memo[number])

    def extend(self, values: list[Any]) -> None:
        """Appends to the topmost value, which must be a list."""
        target = self.top()
        if not isinstance(target, list):
            raise TypeError(target)
        target.extend(values)

    def append(self) -> None:
        """Appends the topmost value to the list below it."""
        value = self.pop()
        self.extend([value])

    def call(self) -> None:
        """Notes a call; old protocols write bytes as the encoding of a text."""
        arguments, function = self.pop(), self.pop()
        match function, arguments:
            case _Global("_codecs", "encode"), (str(text), "latin1"):
                self.push(text.encode("latin1"))
            case _Global("__builtin__", "bytes"), ():
                self.push(b"")
            case _:
                self.push(_Call(function, arguments))

    def build(self) -> None:
        """Notes the state of what a call would have made."""
        state, made = self.pop(), self.top()
        if not isinstance(made, _Call):
            raise TypeError(made)
        made.state = state

    def take_global(self) -> None:
        """Notes an import whose names are on the stack."""
        name, module = self.pop(), self.pop()
        self.push(_Global(str(module), str(name)))


def _tuple(machine: _Machine, size: int) -> None:
    values = [machine.pop() for _ in range(size)]
    machine.push(tuple(reversed(values)))


def _long(machine: _Machine, size: int) -> None:
    if size > 16:
        raise IndexError(size)
    machine.push(int.from_bytes(machine.take(size), "little", signed=True))


# Numbers of the instructions are those of the standard library's pickletools.
_INSTRUCTIONS: dict[int, Callable[[_Machine], Any]] = {
    ord(code): follow
    for code, follow in {
        "\x80": lambda machine: machine.take(1),  # PROTO
        "\x95": lambda machine: machine.take(8),  # FRAME
        "(": lambda machine: machine.push(_MARK),
        "0": lambda machine: machine.pop(),
        "N": lambda machine: machine.push(None),
        "\x88": lambda machine: machine.push(True),
        "\x89": lambda machine: machine.push(False),
        "K": lambda machine: machine.push(machine.take(1)[0]),  # BININT1
        "M": lambda machine: machine.push(machine.number("<H")),  # BININT2
        "J": lambda machine: machine.push(machine.number("<i")),  # BININT
        "\x8a": lambda machine: _long(machine, machine.take(1)[0]),  # LONG1
        "X": lambda machine: machine.push(machine.take(machine.number("<I")).decode()),  # BINUNICODE
        "\x8c": lambda machine: machine.push(machine.take(machine.take(1)[0]).decode()),
        "B": lambda machine: machine.push(machine.take(machine.number("<I"))),  # BINBYTES
        "C": lambda machine: machine.push(machine.take(machine.take(1)[0])),
        "]": lambda machine: machine.push([]),
        "a": lambda machine: machine.append(),
        "e": lambda machine: machine.extend(machine.popped_mark()),  # APPENDS
        ")": lambda machine: machine.push(()),
        "t": lambda machine: machine.push(tuple(machine.popped_mark())),
        "\x85": lambda machine: _tuple(machine, 1),
        "\x86": lambda machine: _tuple(machine, 2),
        "\x87": lambda machine: _tuple(machine, 3),
        "\x94": lambda machine: machine.memoize(),
        "q": lambda machine: machine.remember(machine.take(1)[0]),  # BINPUT
        "r": lambda machine: machine.remember(machine.number("<I")),  # LONG_BINPUT
        "h": lambda machine: machine.recall(machine.take(1)[0]),  # BINGET
        "j": lambda machine: machine.recall(machine.number("<I")),  # LONG_BINGET
        "c": lambda machine: machine.push(_Global(machine.line(), machine.line())),
        "\x93": lambda machine: machine.take_global(),  # STACK_GLOBAL
        "R": lambda machine: machine.call(),
        "b": lambda machine: machine.build(),
    }.items()
}
