"""Rotary position embeddings (Su et al. 2021), with the scalings of long-context checkpoints."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
    """Frequencies of a rotation.

    Attributes:
      theta: base of the wavelengths.
      factor: positions are divided by it; 1 leaves them alone.
      low_freq_factor: Llama 3's scaling: only wavelengths above `original_positions / low_freq_factor` are
        stretched in full; None stretches all.
      high_freq_factor: wavelengths below `original_positions / high_freq_factor` stay as they are.
      original_positions: the sequence length of pretraining.
    """

    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float | None = None
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians a position, float32 [d / 2]."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        plain = (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)
        if self.low_freq_factor is None:
            return plain / np.float32(self.factor)
        turns = self.original_positions * plain / (2 * math.pi)  # within the pretraining length
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return ((1.0 - kept) * plain / self.factor + kept * plain).astype(np.float32)

    def angles(self, positions_BT: jax.Array, head_dim: int) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines of each slot's angles, float32 [B, T, 1, d / 2]."""
        angles = positions_BT[..., None, None].astype(jnp.float32) * self.frequencies(head_dim)
        return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTHd: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (x[i], x[i + d / 2]) by its angle, in float32; returns the dtype of the input."""
    cos, sin = angles
    a, b = jnp.split(x_BTHd.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHd.dtype)
