"""Towers: text encoders and decoders, vision towers, fusion and label prototypes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vixml_jax.models import hub

__all__ = ["hub"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # lazy: `vixml_jax.models.hub` without an import of its own
        return importlib.import_module(f"vixml_jax.models.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
