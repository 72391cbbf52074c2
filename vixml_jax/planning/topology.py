"""Devices by name: TPU slices that need not be there, fake CPU devices, or the GPUs at hand."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from vixml_jax.errors import UserError
from vixml_jax.planning.chips import CHIPS, Chip

# Without them the TPU compiler looks for a TPU's host on the network, and complains that there is none.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as it was asked for.
      platform: "tpu", "cpu" or "cuda".
      devices: of JAX.
      chip: what each of them can do; None where it is not known.
    """

    name: str
    platform: str
    devices: tuple[Any, ...]
    chip: Chip | None


def topology(name: str) -> Topology:
    """Returns the devices of "v5e:4x4" (v5p, v6e), "cpu:8", or "gpu" for those at hand.

    Raises:
      UserError: if there are no such devices, or the TPU compiler is not installed.
    """
    kind, _, size = name.partition(":")
    if kind in ("v5e", "v5p", "v6e") and re.fullmatch(r"\d+(x\d+){1,2}", size):
        return Topology(name, "tpu", _tpu(name), CHIPS[kind])
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", size):
        return Topology(name, "cpu", _cpu(int(size)), None)
    if name == "gpu":
        return _gpu()
    raise UserError(
        f"--topology={name}", fix="give v5e:4x4, v5p:4x4x4, v6e:16x16 or their like, cpu:8, or gpu"
    )


def _tpu(name: str) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs the TPU compiler",
            fix="pip install 'vixml-jax[plan]' (no TPU is needed)",
        )
    for variable, value in _NO_TPU.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # nothing runs: leave the machine's accelerators alone
    try:
        return tuple(topologies.get_topology_desc(name, platform="tpu").devices)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology={name}: {reason}", fix="give chips as the slice has them, such as v5e:4x4"
        ) from error


def _cpu(count: int) -> tuple[Any, ...]:
    jax.config.update("jax_platforms", "cpu")
    if jax.config.jax_num_cpu_devices < count:  # pyright: ignore[reportAttributeAccessIssue]
        with contextlib.suppress(RuntimeError):  # devices are counted once a process
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"--topology=cpu:{count}, but this process has {len(devices)} devices")
    return tuple(devices[:count])


def _gpu() -> Topology:
    try:
        devices = tuple(jax.devices("gpu"))
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["JAX does not say why"])[0]
        raise UserError(
            f"--topology=gpu, but there is none here ({reason})",
            fix="give cpu:8 for eight devices of any kind",
        ) from None
    kind = devices[0].device_kind.lower()
    chip = next((chip for name, chip in CHIPS.items() if name in kind), None)
    return Topology("gpu", "cuda", devices, chip)
