"""The face of text towers."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np


class TextTower(Protocol):
    """What a text tower offers: encoders and decoders alike."""

    @property
    def dim(self) -> int:
        """Size of a hidden state."""
        ...

    def embed_tokens(self, token_ids_BT: jax.Array) -> jax.Array:
        """[B, T] -> [B, T, D]: input embeddings."""
        ...

    def encode(self, inputs_BTD: jax.Array, segment_ids_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]: hidden states after the last norm."""
        ...


def encode_rows(
    tower: TextTower,
    token_ids: jax.Array | np.ndarray,
    mask: jax.Array | np.ndarray,
    positions: jax.Array | np.ndarray | None = None,
) -> jax.Array:
    """Encodes one sequence a row.

    Args:
      tower: the tower.
      token_ids: int32 [B, T].
      mask: bool [B, T], padded on the right.
      positions: int32 [B, T]; by default 0.. in every row.

    Returns:
      Hidden states after the last norm, [B, T, D].
    """
    token_ids = jnp.asarray(token_ids, jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(token_ids.shape[1], dtype=jnp.int32), token_ids.shape)
    segment_ids = jnp.asarray(mask).astype(jnp.int32)
    return _encode(tower, token_ids, segment_ids, jnp.asarray(positions))


@jax.jit
def _encode(
    tower: TextTower, token_ids: jax.Array, segment_ids: jax.Array, positions: jax.Array
) -> jax.Array:
    """Compiled for callers that are not: without it every call would trace the layers again."""
    return tower.encode(tower.embed_tokens(token_ids), segment_ids, positions)
