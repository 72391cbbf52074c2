"""Data: raw folders, prepared datasets, banks, batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vixml_jax.data.dataset import holdout, load, subset

__all__ = ["holdout", "load", "subset"]


def __getattr__(name: str) -> Any:
    # Lazy, so that reading a sparse file does not import what datasets need.
    if name in __all__:
        from vixml_jax.data import dataset

        return getattr(dataset, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
