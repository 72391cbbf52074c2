"""Inputs made wrong: bytes, numbers, JSON values and lines changed at random, alone or several at once."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

# Whatever may stand where a value was expected.
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63) - 1, 10**400,
    0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan"), "", " ", "0", "nan",
    "\0", "a\0b", "\ud800", "\u202e\u0645", "e\u0301" * 40, "\U0010ffff", "../../x", "/etc/passwd",
    "x" * 5000, [], {}, [[]], [{}], [0], [None], {"": None}, [[[[[[[[]]]]]]]],
    ["a", 1, None], {"index": 0, "score": 1},
]  # fmt: skip
TOKENS = [
    b"", b"-1", b"0", b"1", b"-0", b"00", b"2147483647", b"2147483648", b"4294967296", b"9223372036854775807",
    b"9223372036854775808", b"1e308", b"1e309", b"-1e999", b"nan", b"inf", b"-inf", b"NaN", b"Infinity",
    b"1_0", b"0x10", b"9" * 5000, b"1e" + b"9" * 30, b"null", b"true", b"[]", b"{}", b'""', b'"',
    b"\\", b"\\u0000",
    b"\\ud800", b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", b"\r", b"\n", b"\n\n",
    b"\t", b",", b":", b";", b"|", b"\xc3\x28", b"\xf4\x90\x80\x80", "\u2028".encode(),
    "\u0661\u0662".encode(),
    "\u202e\u05d0".encode(), b"..", b"/", b"#", b"'", b"(", b")", b"lambda:0", b"x" * 70000,
]  # fmt: skip
# Longer inputs say nothing more, and take time.
MOST_BYTES = 1 << 18

Change = Callable[[bytes, np.random.Generator], bytes]


def mutated(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    """Changes an input, in one place or in several; what wraps it (gzip, zip) stays whole or not."""
    if rng.random() < 0.85:
        inner = _unwrapped(data, rng)
        if inner is not None:
            content, wrap = inner
            return wrap(_changed(content, rng, others))[:MOST_BYTES]
    return _changed(data, rng, others)[:MOST_BYTES]


def _changed(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    for _ in range(1 if rng.random() < 0.6 else int(rng.integers(2, 6))):
        change = CHANGES[rng.integers(len(CHANGES))]
        data = _splice(data, rng, others) if change is _splice else change(data, rng)
    return data


def _unwrapped(data: bytes, rng: np.random.Generator) -> tuple[bytes, Callable[[bytes], bytes]] | None:
    """The content of a container, and how it is packed again."""
    if data.startswith(b"\x1f\x8b"):
        try:
            return gzip.decompress(data), lambda content: gzip.compress(content, 1)
        except (OSError, EOFError, zlib.error):
            return None
    if data.startswith(b"PK"):
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as packed:
                members = {info.filename: packed.read(info) for info in packed.infolist()}
        except Exception:
            return None
        if not members:
            return None
        name = list(members)[rng.integers(len(members))]

        def pack(content: bytes) -> bytes:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as packed:
                for other, old in members.items():
                    packed.writestr(other, content if other == name else old)
            return buffer.getvalue()

        return members[name], pack
    if len(data) > 8 and data[8:9] == b"{":  # safetensors: the header's length, then the header
        (length,) = struct.unpack("<Q", data[:8])
        if length <= len(data) - 8:
            header, rest = data[8 : 8 + length], data[8 + length :]
            return header, lambda content: struct.pack("<Q", len(content)) + content + rest
    return None


def _flip(data: bytes, rng: np.random.Generator) -> bytes:
    array = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if array:
            array[rng.integers(len(array))] = int(rng.integers(256))
    return bytes(array)


def _cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(len(data) + 1)]


def _drop(data: bytes, rng: np.random.Generator) -> bytes:
    start, end = sorted(rng.integers(0, len(data) + 1, 2))
    return data[:start] + data[min(end, start + 64) :]


def _repeat(data: bytes, rng: np.random.Generator) -> bytes:
    start, end = sorted(rng.integers(0, len(data) + 1, 2))
    return data[:end] + data[start:end] * int(rng.integers(1, 4)) + data[end:]


def _insert(data: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(data) + 1))
    return data[:at] + TOKENS[rng.integers(len(TOKENS))] + data[at:]


def _replace_word(data: bytes, rng: np.random.Generator) -> bytes:
    """Puts a token in the place of a run of letters and digits."""
    places = [i for i in range(len(data)) if data[i : i + 1].isalnum() and not data[i - 1 : i].isalnum()]
    if not places:
        return _insert(data, rng)
    start = places[rng.integers(len(places))]
    end = start
    while end < len(data) and data[end : end + 1].isalnum():
        end += 1
    return data[:start] + TOKENS[rng.integers(len(TOKENS))] + data[end:]


def _lines(data: bytes, rng: np.random.Generator) -> bytes:
    lines = data.split(b"\n")
    i, j = rng.integers(len(lines), size=2)
    match rng.integers(4):
        case 0:
            lines[i], lines[j] = lines[j], lines[i]
        case 1:
            lines.insert(i, lines[j])
        case 2:
            del lines[i]
        case _:
            lines[i] = b""
    return b"\n".join(lines)


def _number(data: bytes, rng: np.random.Generator) -> bytes:
    """Writes a binary number of some width somewhere."""
    width = int(rng.choice([1, 2, 4, 8]))
    if len(data) < width:
        return data
    values = [0, 1, 0x7F, 0x80, 0xFF, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1]
    value = int(values[rng.integers(len(values))]) % 2 ** (8 * width)
    at = int(rng.integers(len(data) - width + 1))
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


def _json(data: bytes, rng: np.random.Generator) -> bytes:
    """Changes a value of a JSON document, or of one line that is one."""
    lines = [data] if rng.random() < 0.3 else data.split(b"\n")
    at = int(rng.integers(len(lines)))
    try:
        document = json.loads(lines[at])
    except (ValueError, RecursionError):
        return _replace_word(data, rng)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        if len(places) > 500:
            return
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    if isinstance(document, dict | list):
        walk(document)
    chosen = VALUES[rng.integers(len(VALUES))]
    if not places:
        document = chosen
    else:
        holder, key = places[rng.integers(len(places))]
        match rng.integers(4):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[str(VALUES[rng.integers(len(VALUES))])[:50]] = holder[key]
            case _:
                holder[key] = chosen
    lines[at] = json.dumps(document, ensure_ascii=bool(rng.random() < 0.5)).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def _splice(data: bytes, rng: np.random.Generator, others: list[bytes]) -> bytes:
    other = others[rng.integers(len(others))]
    return data[: rng.integers(len(data) + 1)] + other[rng.integers(len(other) + 1) :]


CHANGES: list[Any] = [
    _flip, _flip, _cut, _drop, _repeat, _insert, _insert, _replace_word, _replace_word, _lines, _number,
    _json, _json, _json, _splice,
]  # fmt: skip
