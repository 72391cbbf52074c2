"""Text encoders with post-norm layers: BERT, MiniLM and DistilBERT are one class, told apart by fields."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from vixml_jax.models.attention import SelfAttention, segment_mask
from vixml_jax.models.layers import (
    Embed,
    LayerNorm,
    Mlp,
    constrain,
    normal_init,
    param,
    run_layers,
    small_lookup,
    stack_layers,
)
from vixml_jax.models.text_tower import encode_rows


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder.

    Attributes:
      vocab_size: tokens.
      dim: model dimension D.
      num_layers: transformer layers.
      num_heads: attention heads; they divide `dim`.
      mlp_dim: hidden dimension of the feed-forward blocks.
      max_positions: longest sequence, in slots.
      token_types: rows of the token-type table; 0 where there is none (DistilBERT). Type 0 is always added.
      norm_eps: of all LayerNorms.
      activation: a key of `layers.ACTIVATIONS`.
      family: "bert" or "distilbert"; names of the parameters in Hugging Face files.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    max_positions: int = 512
    token_types: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"
    family: str = "bert"


class EncoderLayer(nnx.Module):
    """Self-attention and feed-forward block, each followed by add and norm (Vaswani et al. 2017)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.attention = SelfAttention(config.dim, config.num_heads, rngs=rngs, **types)
        self.attention_norm = LayerNorm(config.dim, eps=config.norm_eps, rngs=rngs, **types)
        self.mlp = Mlp(config.dim, config.mlp_dim, activation=config.activation, rngs=rngs, **types)
        self.mlp_norm = LayerNorm(config.dim, eps=config.norm_eps, rngs=rngs, **types)

    def __call__(self, x_BTD: jax.Array, mask_B1TS: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        x_BTD = self.attention_norm(x_BTD + self.attention(x_BTD, mask_B1TS))
        return self.mlp_norm(x_BTD + self.mlp(x_BTD))


class Encoder(nnx.Module):
    """A text tower of the BERT kind. It has no dropout: the towers of ViXML are trained without.

    Args:
      config: its shape.
      rngs: source of the initial values.
      dtype: of the computation; norms and softmax are float32 in any case.
      param_dtype: of the stored parameters.
      remat: what the backward pass computes again: "none", "dots" (keeps the outputs of linear maps), "full".
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: str = "none",
    ):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.remat = remat
        self.word_embeddings = Embed(config.vocab_size, config.dim, rngs=rngs, **types)
        self.position_embeddings = param(
            rngs, normal_init, (config.max_positions, config.dim), ("position", "embed"), param_dtype
        )
        self.token_type_embeddings = (
            param(rngs, normal_init, (config.token_types, config.dim), ("position", "embed"), param_dtype)
            if config.token_types
            else None
        )
        self.embedding_norm = LayerNorm(config.dim, eps=config.norm_eps, rngs=rngs, **types)
        self.layers = stack_layers(
            lambda rngs: EncoderLayer(config, rngs=rngs, **types), config.num_layers, rngs
        )

    @property
    def dim(self) -> int:
        """Size D of a hidden state."""
        return self.config.dim

    def embed_tokens(self, token_ids_BT: jax.Array) -> jax.Array:
        """Word embeddings alone, [B, T, D]: the space into which images are projected."""
        return self.word_embeddings(token_ids_BT)

    def encode(self, inputs_BTD: jax.Array, segment_ids_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Runs the tower on input embeddings.

        Args:
          inputs_BTD: what `embed_tokens` returns, some slots perhaps replaced by images.
          segment_ids_BT: int32; 0 is padding, equal numbers in a row see each other.
          positions_BT: int32, in [0, max_positions), counted within the segment.

        Returns:
          Hidden states after the last norm, [B, T, D]; those of padding slots mean nothing.
        """
        places_BTD = small_lookup(self.position_embeddings[...], positions_BT)
        if self.token_type_embeddings is not None:
            places_BTD += self.token_type_embeddings[0]
        x_BTD = inputs_BTD + places_BTD.astype(inputs_BTD.dtype)
        x_BTD = constrain(self.embedding_norm(x_BTD), "batch", "length", None)
        mask_B1TS = segment_mask(segment_ids_BT)
        return run_layers(self.layers, x_BTD, lambda layer, x, _: layer(x, mask_B1TS), remat=self.remat)

    def __call__(
        self,
        token_ids: jax.Array | np.ndarray,
        mask: jax.Array | np.ndarray,
        positions: jax.Array | np.ndarray | None = None,
    ) -> jax.Array:
        """Encodes one sequence a row; see `text_tower.encode_rows`."""
        return encode_rows(self, token_ids, mask, positions)
