"""What a reader of files that may come from others is, and how its inputs are written.

It is given the name and the bytes of one file, in a folder where the other files that it needs lie whole. It
returns, or raises UserError; anything else is a fault.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

Seeds = dict[str, list[bytes]]


def nothing(folder: Path) -> None:
    """Needs nothing beside the file."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """What is tried.

    Attributes:
      name: of the reader.
      make_seeds: names of files -> contents that are read without complaint.
      use: reads the folder in which the file of that name lies.
      prepare: writes what must lie beside it.
      cheap: whether 100,000 inputs take minutes, not hours.
      memory: bytes that it may ask for beyond what the process has.
    """

    name: str
    make_seeds: Callable[[], Seeds]
    use: Callable[[Path, str], object]
    prepare: Callable[[Path], None] = nothing
    cheap: bool = True
    memory: int = 1 << 30

    @functools.cached_property
    def seeds(self) -> Seeds:
        """What `make_seeds` makes, once."""
        return self.make_seeds()

    def read(self, folder: Path, name: str, data: bytes) -> None:
        """Reads one input; the folder is as it was afterwards."""
        path = folder / name
        before = path.read_bytes() if path.is_file() else None
        path.write_bytes(data)
        try:
            self.use(folder, name)
        finally:
            if before is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(before)

    def warm_up(self) -> None:
        """Imports what the first input would."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.prepare(Path(folder))
            for name, found in self.seeds.items():
                self.read(Path(folder), name, found[0])


def json_lines(*records: object) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def write(folder: Path, seeds: Seeds) -> None:
    for name, (data, *_) in seeds.items():
        (folder / name).write_bytes(data)
