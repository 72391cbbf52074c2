"""Embeddings by the content of what they embed: a directory that grows at its end and survives being killed.

  made_from.json    what the embeddings were made with
  rows.bin          bfloat16 [M, V], memory-mapped
  digests.bin       16 bytes a row, of the SHA-256 of what it embeds; a row counts once its digest is here
  unreadable.jsonl  {"digest", "problem", "detail"} of what cannot be embedded
  lock              held by the process that adds rows

The same picture in two splits, two views or two versions of a dataset is one row. Rows never move.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vixml_jax import files
from vixml_jax.data.pictures import UnreadablePicture
from vixml_jax.errors import UserError

logger = logging.getLogger(__name__)

DIGEST_BYTES = 16
DIGEST = np.dtype(f"V{DIGEST_BYTES}")
# Of something that is not there at all.
NOTHING = bytes(DIGEST_BYTES)

ROWS, DIGESTS, UNREADABLE, MADE_FROM, LOCK = (
    "rows.bin", "digests.bin", "unreadable.jsonl", "made_from.json", "lock"
)  # fmt: skip


class EmbeddingStore:
    """The embeddings of one directory.

    Args:
      directory: made if it is not there.
      dim: V, size of an embedding.
      made_from: JSON-able; written beside the embeddings for whoever wonders what they are.

    Raises:
      UserError: if the directory cannot be one of these.
    """

    def __init__(self, directory: Path, dim: int, made_from: Any):
        self.directory, self.dim = directory, dim
        if not (directory / MADE_FROM).is_file():
            directory.mkdir(parents=True, exist_ok=True)
            files.write_json(directory / MADE_FROM, {"dim": dim, **made_from})
        known = files.read_json(directory / MADE_FROM)
        if not isinstance(known, dict) or known.get("dim") != dim:
            raise UserError("not embeddings of this tower", file=directory, fix="delete it")
        self.refresh()

    def refresh(self) -> None:
        """Reads what other processes have added."""
        digests = _whole(self.directory / DIGESTS, DIGEST_BYTES)
        rows = _whole(self.directory / ROWS, 2 * self.dim)
        self.num_rows = min(len(digests) // DIGEST_BYTES, rows.size // (2 * self.dim))
        digests_M = np.frombuffer(bytes(digests), DIGEST)[: self.num_rows]
        self._order = np.argsort(digests_M, kind="stable")
        self._sorted = digests_M[self._order]
        # Bits of bfloat16: what the file system maps is not copied.
        self.rows = (
            rows[: self.num_rows * 2 * self.dim].view(ml_dtypes.bfloat16).reshape(self.num_rows, self.dim)
        )
        self._unreadable = dict(_read_unreadable(self.directory / UNREADABLE))

    def find(self, digests_P: np.ndarray) -> np.ndarray:
        """Returns the row of each digest, int64 [P]; -1 where there is none."""
        if not self.num_rows:
            return np.full(len(digests_P), -1, np.int64)
        places = np.minimum(np.searchsorted(self._sorted, digests_P), self.num_rows - 1)
        return np.where(self._sorted[places] == digests_P, self._order[places], -1)

    def problem(self, digest: bytes) -> UnreadablePicture | None:
        """What is wrong with something that cannot be embedded; None if nothing is known to be."""
        return self._unreadable.get(digest)

    def missing(self, digests_P: np.ndarray) -> np.ndarray:
        """Returns the first places of digests about which nothing is known yet, ascending, int64 [n]."""
        distinct, first = np.unique(digests_P, return_index=True)
        unknown = self.find(distinct) < 0
        settled = np.array([NOTHING, *self._unreadable], DIGEST)
        unknown &= ~np.isin(distinct, settled)
        return np.sort(first[unknown])

    @contextlib.contextmanager
    def adding(self) -> Iterator[Adder]:
        """Lets this process alone add rows; waits for another one that does."""
        with open(self.directory / LOCK, "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.warning("waiting for another process that fills %s", self.directory)
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                pass
            self.refresh()
            with contextlib.ExitStack() as stack:
                yield Adder(self, stack)
            self.refresh()


class Adder:
    """Adds to a store, after cutting off what a killed process has left half-written."""

    def __init__(self, store: EmbeddingStore, stack: contextlib.ExitStack):
        self._store = store
        self._rows, self._digests = (
            stack.enter_context(_open_at(store.directory / name, store.num_rows * size))
            for name, size in ((ROWS, 2 * store.dim), (DIGESTS, DIGEST_BYTES))
        )
        path = store.directory / UNREADABLE
        self._unreadable = stack.enter_context(_open_at(path, _whole_lines(path)))

    def add(
        self,
        digests: Sequence[bytes],
        embeddings_BV: np.ndarray,
        problems: Sequence[UnreadablePicture | None],
    ) -> None:
        """Adds what has been embedded, and notes what cannot be; on disk when it returns.

        Args:
          digests: of B things.
          embeddings_BV: float [B, V]; rows of things with a problem mean nothing.
          problems: why a thing cannot be embedded, or None.
        """
        for digest, problem in zip(digests, problems, strict=True):
            if problem is not None:
                line = {"digest": digest.hex(), "problem": problem.problem, "detail": problem.detail}
                self._unreadable.write(json.dumps(line).encode() + b"\n")
        sound = [number for number, problem in enumerate(problems) if problem is None]
        self._rows.write(np.asarray(embeddings_BV[sound], ml_dtypes.bfloat16).tobytes())
        # Digests last: a row without one does not count, a digest without its row would.
        for file in (self._unreadable, self._rows):
            file.flush()
            os.fsync(file.fileno())
        self._digests.write(b"".join(digests[number] for number in sound))
        self._digests.flush()


def _open_at(path: Path, size: int) -> Any:
    """Opens a file to write from byte `size` on, without what lies beyond."""
    path.touch()
    os.truncate(path, size)
    return open(path, "ab")


def _whole(path: Path, size: int) -> np.ndarray:
    """Maps as many bytes of a file as make whole records of `size`."""
    count = path.stat().st_size // size if path.exists() else 0
    return np.memmap(path, np.uint8, "r", shape=(count * size,)) if count else np.zeros(0, np.uint8)


def _whole_lines(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def _read_unreadable(path: Path) -> Iterator[tuple[bytes, UnreadablePicture]]:
    if not path.exists():
        return
    lines = path.read_bytes()[: _whole_lines(path)].splitlines()
    for row, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            yield bytes.fromhex(value["digest"]), UnreadablePicture(value["problem"], value["detail"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError("not what was written", file=path, row=row, fix="delete the directory") from None
