"""Causal text towers: Qwen2, Qwen3, Llama 3 and Gemma 3 are one class, told apart by fields."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from vixml_jax.models.attention import SelfAttention, segment_mask
from vixml_jax.models.layers import Embed, Mlp, RMSNorm, constrain, run_layers, stack_layers
from vixml_jax.models.rope import Rope, rotate
from vixml_jax.models.text_tower import encode_rows

_PLAIN = Rope()

# What slots see of each other, and the angles of their positions.
View = tuple[jax.Array, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. The defaults are what most families have in common.

    Attributes:
      vocab_size: tokens.
      dim: model dimension D.
      num_layers: transformer layers.
      num_heads: attention heads H.
      num_kv_heads: key and value heads G; they divide `num_heads`.
      head_dim: d; even.
      mlp_dim: hidden dimension of the feed-forward blocks.
      max_positions: longest sequence the checkpoint is meant for; nothing here depends on it.
      norm_eps: of all RMSNorms.
      activation: a key of `layers.ACTIVATIONS`, for the gate.
      qkv_bias: whether q, k and v have a bias (Qwen2).
      out_bias: whether attention's output has one.
      mlp_bias: whether the feed-forward blocks have.
      qk_norm: whether q and k are normalised, head by head (Qwen3, Gemma).
      post_norms: whether a block's output is normalised too before it is added (Gemma).
      norm_offset: added to the stored scale of every norm; 1 for Gemma.
      scale_embeddings: whether token embeddings are multiplied by sqrt(D) (Gemma).
      query_scalar: scores are divided by its square root; None for `head_dim`.
      rope: rotation.
      window: slots seen by a layer with a sliding window, itself included; None where no layer has one.
      window_layers: the layers that have one.
      window_rope: their rotation.
      tied: whether the LM head, which is not kept, is the token table: told to those who read our exports.
      family: "qwen2", "qwen3", "llama" or "gemma3_text"; names of the parameters in Hugging Face files.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int = 32_768
    norm_eps: float = 1e-6
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    scale_embeddings: bool = False
    query_scalar: float | None = None
    rope: Rope = _PLAIN
    window: int | None = None
    window_layers: tuple[int, ...] = ()
    window_rope: Rope = _PLAIN
    tied: bool = True
    family: str = "qwen2"

    def __post_init__(self):
        for name in ("rope", "window_rope"):  # they come as dicts from JSON
            value: Any = getattr(self, name)
            if isinstance(value, dict):
                object.__setattr__(self, name, Rope(**value))


class DecoderLayer(nnx.Module):
    """Norm, self-attention, add; norm, gated feed-forward, add; with Gemma, norms before the adds as well."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}

        def norm(dim: int = config.dim, **options: Any) -> RMSNorm:
            options = {**types, **options}
            return RMSNorm(dim, eps=config.norm_eps, offset=config.norm_offset, rngs=rngs, **options)

        # Not rounded before they are rotated.
        qk_norm = lambda: norm(config.head_dim, dtype=jnp.float32) if config.qk_norm else None  # noqa: E731
        self.attention_norm = norm()
        self.attention = SelfAttention(
            config.dim,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            scale=1.0 / math.sqrt(config.query_scalar or config.head_dim),
            rngs=rngs,
            **types,
        )
        self.q_norm, self.k_norm = qk_norm(), qk_norm()
        self.attention_post_norm = norm() if config.post_norms else None
        self.mlp_norm = norm()
        self.mlp = Mlp(
            config.dim,
            config.mlp_dim,
            activation=config.activation,
            bias=config.mlp_bias,
            gated=True,
            rngs=rngs,
            **types,
        )
        self.mlp_post_norm = norm() if config.post_norms else None

    def __call__(self, x_BTD: jax.Array, view: View) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        mask_B1TS, angles = view

        def turn(heads_BTHd: jax.Array, norm: RMSNorm | None) -> jax.Array:
            normed_BTHd = heads_BTHd if norm is None else norm(heads_BTHd)
            return rotate(normed_BTHd, angles).astype(heads_BTHd.dtype)

        out_BTD = self.attention(
            self.attention_norm(x_BTD),
            mask_B1TS,
            transform_qk=lambda q, k: (turn(q, self.q_norm), turn(k, self.k_norm)),
        )
        x_BTD += out_BTD if self.attention_post_norm is None else self.attention_post_norm(out_BTD)
        out_BTD = self.mlp(self.mlp_norm(x_BTD))
        return x_BTD + (out_BTD if self.mlp_post_norm is None else self.mlp_post_norm(out_BTD))


class Decoder(nnx.Module):
    """A text tower made from a language model: its hidden states, without the LM head.

    Args:
      config: its shape.
      rngs: source of the initial values.
      dtype: of the computation; norms, softmax and rotation are float32 in any case.
      param_dtype: of the stored parameters.
      remat: what the backward pass computes again: "none", "dots" (keeps the outputs of linear maps), "full".
    """

    def __init__(
        self,
        config: DecoderConfig,
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
        self.layers = stack_layers(
            lambda rngs: DecoderLayer(config, rngs=rngs, **types), config.num_layers, rngs
        )
        self.final_norm = RMSNorm(
            config.dim, eps=config.norm_eps, offset=config.norm_offset, rngs=rngs, **types
        )

    @property
    def dim(self) -> int:
        """Size D of a hidden state."""
        return self.config.dim

    def embed_tokens(self, token_ids_BT: jax.Array) -> jax.Array:
        """Word embeddings, scaled where the family scales them: the space into which images are projected."""
        words_BTD = self.word_embeddings(token_ids_BT)
        if not self.config.scale_embeddings:
            return words_BTD
        return words_BTD * jnp.asarray(math.sqrt(self.dim), words_BTD.dtype)  # rounded, as in pretraining

    def encode(self, inputs_BTD: jax.Array, segment_ids_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Runs the tower on input embeddings.

        Args:
          inputs_BTD: what `embed_tokens` returns, some slots perhaps replaced by images.
          segment_ids_BT: int32; 0 is padding, a slot sees those before it that have the same number.
          positions_BT: int32, counted within the segment.

        Returns:
          Hidden states after the last norm, [B, T, D]; those of padding slots mean nothing.
        """
        config = self.config

        def view(window: int | None, rope: Rope) -> View:
            mask = segment_mask(segment_ids_BT, causal=True, positions_BT=positions_BT, window=window)
            return mask, rope.angles(positions_BT, config.head_dim)

        whole = view(None, config.rope)
        near = view(config.window, config.window_rope) if config.window_layers else whole

        def apply(layer: DecoderLayer, x_BTD: jax.Array, is_near: jax.Array | None) -> jax.Array:
            if is_near is None:
                return layer(x_BTD, whole)
            return layer(x_BTD, jax.tree.map(lambda a, b: jnp.where(is_near, a, b), near, whole))

        kinds = np.isin(np.arange(config.num_layers), config.window_layers) if config.window_layers else None
        x_BTD = constrain(inputs_BTD, "batch", "length", None)
        x_BTD = run_layers(self.layers, x_BTD, apply, per_layer=kinds, remat=self.remat)
        return self.final_norm(x_BTD)

    def __call__(
        self,
        token_ids: jax.Array | np.ndarray,
        mask: jax.Array | np.ndarray,
        positions: jax.Array | np.ndarray | None = None,
    ) -> jax.Array:
        """Encodes one sequence a row; see `text_tower.encode_rows`."""
        return encode_rows(self, token_ids, mask, positions)
