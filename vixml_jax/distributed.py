"""Several processes as one run: how they find each other, wait for each other and agree.

The lead does what is done once: it prepares data, writes files, searches and scores. The others wait for it
without time limit, however long that takes; if it fails, all fail alike. A shared file system is assumed.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from vixml_jax import progress
from vixml_jax.errors import UserError

Result = TypeVar("Result")

# The others wait so long for the lead; if it dies, they learn that much sooner, by its missing heartbeat.
WAIT_MS = 7 * 24 * 60 * 60 * 1000

# Messages are filled up to a multiple of this, so that few programs are compiled for them.
MESSAGE_BYTES = 1024

_barriers = itertools.count()


def initialize() -> None:
    """Joins the other processes of the run, if there are any; must come before anything else of JAX.

    With VIXML_DISTRIBUTED=1, JAX finds out about them by itself: on Cloud TPU, under Slurm, under Open MPI.
    Elsewhere a launcher sets VIXML_COORDINATOR (host:port), VIXML_PROCESSES and VIXML_PROCESS.
    """
    if jax.distributed.is_initialized():
        return
    if coordinator := os.environ.get("VIXML_COORDINATOR"):
        local = coordinator.startswith(("127.0.0.1:", "localhost:"))
        processes, process = _number("VIXML_PROCESSES"), _number("VIXML_PROCESS")
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            coordinator_bind_address=coordinator if local else None,  # else any address of the host
            cluster_detection_method="deactivate",
        )
    elif os.environ.get("VIXML_DISTRIBUTED") == "1":
        try:
            jax.distributed.initialize()
        except ValueError as error:  # something that it needs to know, nobody has told it
            raise UserError(
                f"VIXML_DISTRIBUTED=1, but JAX finds no processes to join ({error})",
                fix="unset it, or set VIXML_COORDINATOR, VIXML_PROCESSES and VIXML_PROCESS",
            ) from error
    else:
        return
    if not is_lead():
        progress.mute()


def _number(variable: str) -> int:
    """A whole number of the environment."""
    text = os.environ.get(variable, "")
    if not (text.isascii() and text.isdecimal()):
        raise UserError(
            f"{variable}={text!r} beside VIXML_COORDINATOR", fix="set it to a whole number, in every process"
        )
    return int(text)


def is_lead() -> bool:
    """Whether this process does what is done once."""
    return jax.process_index() == 0


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        # Orbax hands out the barriers of JAX's coordination service. Those of devices have time limits.
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=f"vixml-{next(_barriers)}", timeout_ms=WAIT_MS)


def on_lead(work: Callable[[], Result]) -> Result:
    """Calls `work` in the lead while the others wait, and returns its result, which is JSON-able, in all.

    Raises:
      UserError: in every process, if `work` raised it.
      RuntimeError: in the others, if `work` raised anything else.
    """
    if jax.process_count() == 1:
        return work()
    outcome: dict[str, Any] = {}
    error = None
    if is_lead():
        try:
            outcome["result"] = work()
        except Exception as caught:
            error = caught
            outcome["mistake" if isinstance(caught, UserError) else "failure"] = str(caught)
    wait_for_all()
    outcome = _from_lead(outcome)
    if error is not None:
        raise error
    if "mistake" in outcome:
        raise UserError(outcome["mistake"])
    if "failure" in outcome:
        raise RuntimeError(f"process 0 failed: {outcome['failure']}")
    return outcome["result"]


def lead_first(work: Callable[[], Result]) -> Result:
    """Calls `work` in the lead, then in the others, and returns each one's own result.

    For what builds files, or opens those that are there: the others find what the lead has written.
    """
    if jax.process_count() == 1:
        return work()
    results = []
    on_lead(lambda: results.append(work()))
    return results[0] if is_lead() else work()


def _from_lead(message: Any) -> Any:
    """Returns the lead's JSON-able message in every process."""
    from jax.experimental import multihost_utils

    text = json.dumps(message).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(-(-length // MESSAGE_BYTES) * MESSAGE_BYTES, np.uint8)
    if is_lead():
        padded[:length] = np.frombuffer(text, np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)
    return json.loads(received[:length].tobytes())
