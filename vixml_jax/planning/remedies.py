"""What would make a config fit: changes that cost speed or nothing, each tried by compiling it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from vixml_jax import config_rules, sharding

# Rows of a device that its tower computes at a time.
_CHUNKS = (32, 8)


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change of a config that was tried.

    Attributes:
      changes: field -> value.
      needed: bytes a device.
      fits: whether that is few enough.
    """

    changes: dict[str, Any]
    needed: float
    fits: bool

    @property
    def flags(self) -> str:
        """As flags of a command."""
        return " ".join(f"--config.{key}={value}" for key, value in self.changes.items())


def candidates(config: ConfigDict, devices: int) -> Iterator[dict[str, Any]]:
    """Yields single changes that may save memory: of the mesh, the chunks, what is kept, and the dtype.

    Args:
      config: that does not fit.
      devices: of the mesh.
    """
    fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
    for more in (devices // tensor, 4 * fsdp):
        if fsdp < more <= devices // tensor and sharding.TABLE_ROWS_MULTIPLE % (devices // tensor) == 0:
            yield {"mesh.data": -1, "mesh.fsdp": more}
    for rows in _CHUNKS:
        if not 0 < config.train.chunk_rows <= rows:
            yield {"train.chunk_rows": rows}
    if config.text.remat != "full":
        yield {"text.remat": "full"}
    if config.text.dtype != "bfloat16":
        yield {"text.dtype": "bfloat16"}


def find(
    config: ConfigDict, devices: int, limit: float, needed_by: Callable[[ConfigDict], float | None]
) -> list[Remedy]:
    """Tries the candidates and returns the three that help most, best first.

    Where none of them is enough, the best of each kind are tried together, and stand first.

    Args:
      config: that does not fit.
      devices: of the mesh.
      limit: bytes of a device.
      needed_by: compiles a config and returns what it needs; None where it does not compile.
    """
    tried = []
    for changes in candidates(config, devices):
        needed = needed_by(changed(config, changes))
        if needed is not None:
            tried.append(Remedy(changes, needed, needed <= limit))
    tried.sort(key=lambda remedy: remedy.needed)
    if not tried or tried[0].fits:
        return tried[:3]
    together: dict[str, Any] = {}
    for remedy in tried:
        if not remedy.changes.keys() & together.keys():
            together |= remedy.changes
    if len(together) > len(tried[0].changes):
        needed = needed_by(changed(config, together))
        if needed is not None:
            tried.insert(0, Remedy(together, needed, needed <= limit))
    return tried[:3]


def changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """Returns a copy of a config with other values."""
    result = config.copy_and_resolve_references()
    for key, value in changes.items():
        section, name = key.split(".")
        with result.unlocked():
            result[section][name] = value
    config_rules.validate(result)
    return result
