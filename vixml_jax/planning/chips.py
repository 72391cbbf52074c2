"""What accelerators can do at most, as their makers state it.

Sources, read in November 2026: docs.cloud.google.com/tpu/docs/v5e, /v5p and /v6e ("system architecture": peak
compute, HBM capacity and bandwidth, bidirectional inter-chip bandwidth, of which one direction is half);
NVIDIA's data sheets of the H100 and H200 SXM (dense bfloat16, NVLink 900 GB/s in both directions).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: as it is shown.
      flops: bfloat16 operations a second of its matrix units.
      memory: bytes.
      memory_bandwidth: bytes a second.
      link_bandwidth: bytes a second to the other chips of its slice or host, in one direction.
    """

    name: str
    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float


# By the prefix of a topology.
CHIPS = {
    "v5e": Chip("TPU v5e", 197e12, 16e9, 819e9, 200e9),
    "v5p": Chip("TPU v5p", 459e12, 95e9, 2765e9, 600e9),
    "v6e": Chip("TPU v6e", 918e12, 32e9, 1638e9, 400e9),
    "h100": Chip("H100 SXM", 989e12, 80e9, 3350e9, 450e9),
    "h200": Chip("H200 SXM", 989e12, 141e9, 4800e9, 450e9),
}
# Shown beside every topology: the same program on as many of these.
ALWAYS_SHOWN = ("h100", "h200")
