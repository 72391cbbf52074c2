"""One transformer layer over a small set of vectors: PRIME's prototype network, and late fusion."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from vixml_jax.errors import UserError
from vixml_jax.models.attention import attend
from vixml_jax.models.layers import Initializer, LayerNorm, Linear, Mlp, constrain, gelu

# PyTorch's default for a linear layer, U(-1/sqrt(in), 1/sqrt(in)): PRIME's network starts from it.
_linear_init: Initializer = nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def _fused_xavier(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Xavier uniform of the (D, 3 D) matrix of which q, k and v are thirds, as PyTorch's attention starts."""
    bound = math.sqrt(6.0 / (shape[0] + 3 * shape[1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


class SetLayer(nnx.Module):
    """A post-norm transformer layer over the S vectors of each of L sets; the vectors have no order.

    Equal to PyTorch's `TransformerEncoderLayer(batch_first=True, norm_first=False, activation="gelu")`.

    Args:
      dim: D of the vectors.
      heads: attention heads; must divide `dim`.
      feed_forward: hidden dimension of the feed-forward block.
      dropout: rate at its four places: attention weights, attention output, hidden and output of the
        feed-forward block.
      rngs: source of the initial values.
      dtype: of the computation.
      param_dtype: of the stored parameters.

    Raises:
      UserError: if `heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        feed_forward: int = 1024,
        dropout: float = 0.1,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        if dim % heads:
            divisors = [n for n in range(1, heads + 1) if dim % n == 0]
            raise UserError(
                f"config.prototype.heads={heads} does not divide the tower's {dim} dimensions",
                fix=f"give {divisors[-1]}",
            )
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.q_proj = Linear(dim, dim, axes=("embed", "heads"), init=_fused_xavier, **types)
        self.k_proj = Linear(dim, dim, axes=("embed", "heads"), init=_fused_xavier, **types)
        self.v_proj = Linear(dim, dim, axes=("embed", "heads"), init=_fused_xavier, **types)
        self.o_proj = Linear(dim, dim, axes=("heads", "embed"), init=_linear_init, **types)
        self.attention_norm = LayerNorm(dim, eps=1e-5, **types)
        self.mlp = Mlp(dim, feed_forward, activation="gelu", init=_linear_init, **types)
        self.mlp_norm = LayerNorm(dim, eps=1e-5, **types)
        self.heads = heads
        self.dropout = dropout
        self.dim = dim

    def attend_within(
        self,
        x_LSD: jax.Array,
        present_LS: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Maps [L, S, D] to [L, S, D].

        Args:
          x_LSD: the sets.
          present_LS: bool; which vectors there are, at least one a set; None for all. Of those that are not
            there the result means nothing.
          dropout_key: turns dropout on.
        """
        keys = (None,) * 4 if dropout_key is None else tuple(jax.random.split(dropout_key, 4))
        x_LSD = constrain(x_LSD.astype(self.q_proj.dtype), "label", None, None)
        L, S, D = x_LSD.shape
        mask_L11S = None if present_LS is None else present_LS[:, None, None, :]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x_LSD).reshape(L, S, self.heads, -1) for project in projections)
        scale = 1.0 / math.sqrt(D // self.heads)
        attended = attend(q, k, v, mask_L11S, scale=scale, drop=lambda p: _drop(p, self.dropout, keys[0]))
        x_LSD = self.attention_norm(
            x_LSD + _drop(self.o_proj(attended.reshape(L, S, D)), self.dropout, keys[1])
        )
        hidden = _drop(gelu(self.mlp.up_proj(x_LSD)), self.dropout, keys[2])
        return self.mlp_norm(x_LSD + _drop(self.mlp.down_proj(hidden), self.dropout, keys[3]))
