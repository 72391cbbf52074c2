"""Several processes as one run."""

from __future__ import annotations

import os

import jax


def initialize() -> None:
    """Joins the other processes of the run, if there are any; must come before anything else of JAX.

    Cloud TPU, Slurm and Kubernetes are recognised by JAX itself. Elsewhere a launcher sets
    VIXML_COORDINATOR (host:port), VIXML_PROCESSES and VIXML_PROCESS.
    """
    if jax.distributed.is_initialized():
        return
    if coordinator := os.environ.get("VIXML_COORDINATOR"):
        jax.distributed.initialize(
            coordinator, int(os.environ["VIXML_PROCESSES"]), int(os.environ["VIXML_PROCESS"])
        )
    elif _under_a_launcher():
        jax.distributed.initialize()


def is_lead() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def _under_a_launcher() -> bool:
    slurm = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ
    tpu_pod = len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    return slurm or tpu_pod
