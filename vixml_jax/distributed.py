"""Several processes as one run."""

from __future__ import annotations

import os

import jax


def initialize() -> None:
    """Joins the other processes of the run, if there are any; must come before anything else of JAX.

    With VIXML_DISTRIBUTED=1, JAX finds out about them by itself: on Cloud TPU, under Slurm, under Open MPI.
    Elsewhere a launcher sets VIXML_COORDINATOR (host:port), VIXML_PROCESSES and VIXML_PROCESS.
    """
    if jax.distributed.is_initialized():
        return
    if coordinator := os.environ.get("VIXML_COORDINATOR"):
        jax.distributed.initialize(
            coordinator, int(os.environ["VIXML_PROCESSES"]), int(os.environ["VIXML_PROCESS"])
        )
    elif os.environ.get("VIXML_DISTRIBUTED") == "1":
        jax.distributed.initialize()


def is_lead() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0
