"""Fresh seeds: other ones in every session, the same in all of its processes, since ids of tests hold them.

The header of a session shows its seed; VIXML_TEST_SEED=N repeats one.
"""

from __future__ import annotations

import os

import numpy as np

# Through the environment, which workers of pytest-xdist inherit.
SESSION = int(os.environ.setdefault("VIXML_TEST_SEED", str(np.random.SeedSequence().generate_state(1)[0])))


def seeds(count: int) -> list[int]:
    """Returns `count` seeds below 2**32."""
    return np.random.SeedSequence(SESSION).generate_state(count).tolist()
