"""Attention over packed rows.

Shape suffixes: B rows, T query slots, S key slots, D model, H heads, G key/value heads, d head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vixml_jax.models.layers import Linear, einsum

# Finite, so that a slot that may attend to nothing (padding) yields numbers instead of NaN.
MASKED = -1e30


def segment_mask(
    segment_ids_BT: jax.Array,
    *,
    causal: bool = False,
    positions_BT: jax.Array | None = None,
    window: int | None = None,
) -> jax.Array:
    """Says which slot may attend to which: those of its own segment, and no padding.

    Args:
      segment_ids_BT: int32 [B, T]; 0 is padding, equal numbers in a row are one segment.
      causal: whether a slot sees only itself and the slots before it.
      positions_BT: int32 [B, T]; needed with `window`.
      window: a slot sees only slots fewer than this many positions away.

    Returns:
      bool [B, 1, T, T].
    """
    mask_BTS = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]) & (segment_ids_BT > 0)[:, None, :]
    if causal:
        slots = jnp.arange(segment_ids_BT.shape[1])
        mask_BTS &= slots[:, None] >= slots[None, :]
    if window is not None:
        if positions_BT is None:
            raise ValueError("a window needs positions_BT")
        mask_BTS &= jnp.abs(positions_BT[:, :, None] - positions_BT[:, None, :]) < window
    return mask_BTS[:, None]


def attend(
    q_BTHd: jax.Array,
    k_BSGd: jax.Array,
    v_BSGd: jax.Array,
    mask_B1TS: jax.Array | None,
    *,
    scale: float,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017) with grouped key/value heads; softmax in float32.

    Args:
      q_BTHd: queries; H is a multiple of G.
      k_BSGd: keys.
      v_BSGd: values.
      mask_B1TS: bool, broadcastable to [B, H, T, S]; None lets all attend to all.
      scale: factor on the scores.
      drop: applied to the attention weights, float32 [B, H, T, S].

    Returns:
      [B, T, H, d].
    """
    B, T, H, d = q_BTHd.shape
    G = k_BSGd.shape[2]
    q_BHTd = jnp.swapaxes(q_BTHd * scale, 1, 2)
    k_BGSd, v_BGSd = jnp.swapaxes(k_BSGd, 1, 2), jnp.swapaxes(v_BSGd, 1, 2)
    if G != H:  # the heads that share a key become more query slots: still one batched matmul
        q_BHTd = q_BHTd.reshape(B, G, (H // G) * T, d)
    scores = einsum("bhtd,bhsd->bhts", q_BHTd, k_BGSd, jnp.float32)
    scores_BHTS = scores.reshape(B, H, T, -1)
    if mask_B1TS is not None:
        scores_BHTS = jnp.where(mask_B1TS, scores_BHTS, MASKED)
    weights_BHTS = jax.nn.softmax(scores_BHTS, axis=-1)
    if drop is not None:
        weights_BHTS = drop(weights_BHTS)
    weights = weights_BHTS.astype(v_BSGd.dtype).reshape(scores.shape)
    out = einsum("bhts,bhsd->bhtd", weights, v_BGSd)
    return jnp.swapaxes(out.reshape(B, H, T, d), 1, 2)


class SelfAttention(nnx.Module):
    """Multi-head self-attention.

    Args:
      dim: model dimension D.
      num_heads: H.
      num_kv_heads: G; None for H.
      head_dim: d; None for D / H.
      qkv_bias: whether q, k and v have a bias.
      out_bias: whether the output has one.
      scale: factor on the scores; None for 1 / sqrt(d).
      options: dtype, param_dtype and init of the linear maps.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        rngs: nnx.Rngs,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        scale: float | None = None,
        **options: Any,
    ):
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or dim // num_heads
        self.scale = scale or 1.0 / math.sqrt(self.head_dim)
        q_dim, kv_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        options["rngs"] = rngs
        self.q_proj = Linear(dim, q_dim, axes=("embed", "heads"), bias=qkv_bias, **options)
        self.k_proj = Linear(dim, kv_dim, axes=("embed", "kv_heads"), bias=qkv_bias, **options)
        self.v_proj = Linear(dim, kv_dim, axes=("embed", "kv_heads"), bias=qkv_bias, **options)
        self.o_proj = Linear(q_dim, dim, axes=("heads", "embed"), bias=out_bias, **options)

    def __call__(
        self,
        x_BTD: jax.Array,
        mask_B1TS: jax.Array | None,
        *,
        transform_qk: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
    ) -> jax.Array:
        """Attends within [B, T, D].

        Args:
          x_BTD: input.
          mask_B1TS: as `segment_mask` returns it, or None.
          transform_qk: applied to q [B, T, H, d] and k [B, T, G, d] before the scores: norms, rotation.

        Returns:
          [B, T, D].
        """
        B, T, _ = x_BTD.shape
        q_BTHd = self.q_proj(x_BTD).reshape(B, T, self.num_heads, self.head_dim)
        k_BTGd = self.k_proj(x_BTD).reshape(B, T, self.num_kv_heads, self.head_dim)
        v_BTGd = self.v_proj(x_BTD).reshape(B, T, self.num_kv_heads, self.head_dim)
        if transform_qk is not None:
            q_BTHd, k_BTGd = transform_qk(q_BTHd, k_BTGd)
        out_BTHd = attend(q_BTHd, k_BTGd, v_BTGd, mask_B1TS, scale=self.scale)
        return self.o_proj(out_BTHd.reshape(B, T, -1))
