"""Extreme multi-label classification with text and pictures, in JAX and Flax.

    import vixml_jax as vx
    model = vx.XmcModel.load("runs/demo/vixml")
    ids, scores = model.predict(["red kettle"], k=10)

Everything here is imported on first use, so that scoring a file does not wait for JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vixml_jax import data, losses, metrics, mining, models, retrieval
    from vixml_jax.xmc_model import XmcModel

__version__ = "0.1.0"
__all__ = ["XmcModel", "data", "losses", "metrics", "mining", "models", "retrieval"]


def __getattr__(name: str) -> Any:
    if name == "XmcModel":
        return importlib.import_module("vixml_jax.xmc_model").XmcModel
    if name in __all__:
        return importlib.import_module(f"vixml_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
