"""NumPy's .npy files as what they are here: arrays of plain numbers, never pickles."""

from __future__ import annotations

import os
from typing import Literal

import numpy as np

from vixml_jax.errors import UserError


def load(path: str | os.PathLike[str], *, fix: str, mmap_mode: Literal["r"] | None = "r") -> np.ndarray:
    """Opens an array, memory-mapped unless `mmap_mode` is None.

    Args:
      path: the file.
      fix: what to do where it cannot be read.
      mmap_mode: as in `np.load`.

    Raises:
      UserError: if it is missing, cut off, or anything but an array of plain numbers.
    """
    try:
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            array.close()
            reason = "it is an archive of several"
        elif array.dtype.kind in "biuf":
            return array
        else:
            reason = f"its values are {array.dtype}"
    except FileNotFoundError:
        raise UserError("no such file", file=path, fix=fix) from None
    except (PermissionError, IsADirectoryError, MemoryError):  # of which the file may be innocent
        raise
    except Exception as error:  # NumPy reads a header as a Python literal, and raises what that raises
        reason = f"{type(error).__name__}: {error}"
    raise UserError(f"not a .npy file of numbers ({reason})", file=path, fix=fix)
