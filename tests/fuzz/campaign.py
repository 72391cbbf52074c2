"""Runs one reader over many wrong inputs: each gives a value or a UserError, in bounded time and memory.

python tests/fuzz/campaign.py --reader=predictions --inputs=100000 --seed=1

prints one line of JSON: how many inputs were read and refused, seconds, the slowest, peak memory. An input
that breaks the contract is written to a file, with the traceback, and ends it with exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import mutations
import numpy as np
import readers
from reader import Reader

from vixml_jax.errors import UserError

SECONDS_PER_INPUT = 10


class Broken(Exception):
    """An input that gave neither a value nor a UserError."""

    def __init__(self, reader: str, name: str, data: bytes, error: BaseException):
        self.name, self.data, self.error = name, data, error
        trace = "".join(traceback.format_exception(error))
        super().__init__(f"{reader}: {name}: {data[:300]!r}\n{trace}")


class Hang(BaseException):
    """Not an Exception, which a reader may catch."""


def _ring(*_: object) -> None:
    raise Hang(f"more than {SECONDS_PER_INPUT} s")


def check(reader: Reader, folder: Path, name: str, data: bytes) -> bool:
    """Gives a reader one input; returns whether it was read.

    Raises:
      Broken: if it was neither read nor refused.
    """
    before = signal.signal(signal.SIGALRM, _ring)
    signal.alarm(SECONDS_PER_INPUT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            reader.read(folder, name, data)
        return True
    except UserError as error:
        if "\n" in str(error) or "\0" in str(error):
            raise Broken(reader.name, name, data, error) from error
        return False
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Broken(reader.name, name, data, error) from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(reader: Reader, inputs: int, seed: int, seconds: float = float("inf")) -> dict:
    """Runs a reader over its seeds and `inputs` changed ones, or as many as `seconds` allow."""
    rng = np.random.default_rng(seed)
    read = refused = 0
    slowest, started = 0.0, time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.prepare(folder)
            seeds = [(name, data) for name, found in reader.seeds.items() for data in found]
            for name, data in seeds:
                if not check(reader, folder, name, data):
                    raise AssertionError(f"{reader.name} refuses its seed {name}")
            before = _peak()
            while read + refused < inputs and time.monotonic() - started < seconds:
                name, data = seeds[rng.integers(len(seeds))]
                data = mutations.mutated(data, rng, [other for _, other in seeds])
                began = time.monotonic()
                if check(reader, folder, name, data):
                    read += 1
                else:
                    refused += 1
                slowest = max(slowest, time.monotonic() - began)
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "reader": reader.name,
        "inputs": read + refused,
        "read": read,
        "refused": refused,
        "seconds": round(time.monotonic() - started, 1),
        "slowest_s": round(slowest, 3),
        "grown_mb": round((_peak() - before) / 1024),
        "seed": seed,
    }


def limit_memory(most: int) -> None:
    """Lets the process ask for so many bytes more than it has: beyond, a reader gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + most
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _peak() -> int:
    """KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reader", required=True, choices=sorted(readers.READERS))
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    options = parser.parse_args()
    reader = readers.READERS[options.reader]
    with contextlib.redirect_stderr(io.StringIO()):
        reader.warm_up()
    limit_memory(reader.memory)
    try:
        print(json.dumps(run(reader, options.inputs, options.seed, options.seconds)))
    except Broken as broken:
        path = Path(f"broken-{reader.name}-{options.seed}.bin")
        path.write_bytes(broken.data)
        print(f"{broken}\nthe input is in {path.resolve()}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
