"""How far two arrays are apart."""

from __future__ import annotations

import numpy as np


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    return float(np.linalg.norm(np.asarray(got) - expected) / np.linalg.norm(expected))
