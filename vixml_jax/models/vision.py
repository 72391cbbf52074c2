"""Vision towers: pre-norm transformers over image patches, one embedding per image.

Which state of the network is the embedding goes by the family, as its checkpoints' `pooler_output` does:
SigLIP and SigLIP 2, their attention-pooling head; ViT, the class token after the final norm; CLIP, the class
token after `post_layernorm`, before the projection into the space it shares with texts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from vixml_jax.models.attention import SelfAttention, attend
from vixml_jax.models.layers import (
    LayerNorm,
    Linear,
    Mlp,
    constrain,
    normal_init,
    param,
    run_layers,
    stack_layers,
)

# A frozen tower with random weights should let differences between images through: variance-preserving
# matrices do, the customary 0.02 would leave a nearly linear and nearly constant map.
_kernel_init = nnx.initializers.lecun_normal()

# How pictures may be resized; Pillow's names.
RESAMPLING = ("bilinear", "bicubic", "lanczos")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Shape of a vision tower, and what pictures it expects.

    Attributes:
      image_size: side of the square input, in pixels; what is left over of the last patch is not looked at.
      patch_size: side of a patch, in pixels.
      dim: model dimension D, and size of the embedding.
      num_layers: transformer layers.
      num_heads: attention heads; they divide `dim`.
      mlp_dim: hidden dimension of the feed-forward blocks.
      pool: "cls" (a class token's state), "mean" (over patches) or "map" (SigLIP's attention-pooling head).
      norm_eps: of all LayerNorms.
      activation: a key of `layers.ACTIVATIONS`.
      qkv_bias: whether q, k and v have a bias.
      patch_bias: whether the patch embedding has one.
      class_token: whether a class token stands before the patches.
      first_norm: whether a LayerNorm precedes the layers (CLIP).
      mean: subtracted from pixels in [0, 1], per channel.
      std: pixels are then divided by it.
      resampling: how pictures are resized, one of RESAMPLING.
      family: names of the parameters in Hugging Face files.
    """

    image_size: int
    patch_size: int
    dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    pool: str = "cls"
    norm_eps: float = 1e-12
    activation: str = "gelu"
    qkv_bias: bool = True
    patch_bias: bool = True
    class_token: bool = True
    first_norm: bool = False
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resampling: str = "bicubic"
    family: str = "vit"

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done to a picture first: `size` in pixels, `resampling`, `mean` and `std` of [0, 1]."""
        return {
            "size": self.image_size,
            "resampling": self.resampling,
            "mean": self.mean,
            "std": self.std,
        }


class VisionLayer(nnx.Module):
    """Norm, self-attention, add; norm, feed-forward, add (Dosovitskiy et al. 2021)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, **types: Any):
        self.attention_norm = LayerNorm(config.dim, eps=config.norm_eps, rngs=rngs, **types)
        self.attention = SelfAttention(
            config.dim, config.num_heads, qkv_bias=config.qkv_bias, init=_kernel_init, rngs=rngs, **types
        )
        self.mlp_norm = LayerNorm(config.dim, eps=config.norm_eps, rngs=rngs, **types)
        self.mlp = Mlp(
            config.dim,
            config.mlp_dim,
            activation=config.activation,
            init=_kernel_init,
            rngs=rngs,
            **types,
        )

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        x_BTD += self.attention(self.attention_norm(x_BTD), None)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class AttentionPool(nnx.Module):
    """SigLIP's pooling head: a learned probe attends to all patches, then a residual feed-forward block."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, **types: Any):
        self.probe = param(rngs, _kernel_init, (1, config.dim), ("position", "embed"), types["param_dtype"])
        self.attention = SelfAttention(config.dim, config.num_heads, init=_kernel_init, rngs=rngs, **types)
        self.norm = LayerNorm(config.dim, eps=config.norm_eps, rngs=rngs, **types)
        self.mlp = Mlp(
            config.dim,
            config.mlp_dim,
            activation=config.activation,
            init=_kernel_init,
            rngs=rngs,
            **types,
        )

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, D]."""
        B, T, D = x_BTD.shape
        heads = (self.attention.num_heads, self.attention.head_dim)
        probe_BD = jnp.broadcast_to(self.probe[...].astype(x_BTD.dtype), (B, D))
        out_B1Hd = attend(
            self.attention.q_proj(probe_BD).reshape(B, 1, *heads),
            self.attention.k_proj(x_BTD).reshape(B, T, *heads),
            self.attention.v_proj(x_BTD).reshape(B, T, *heads),
            None,
            scale=self.attention.scale,
        )
        pooled_BD = self.attention.o_proj(out_B1Hd.reshape(B, D))
        return pooled_BD + self.mlp(self.norm(pooled_BD))


class VisionTower(nnx.Module):
    """A tower of the ViT kind; without dropout, as it is used frozen.

    Args:
      config: its shape.
      rngs: source of the initial values.
      dtype: of the computation; norms and softmax are float32 in any case.
      param_dtype: of the stored parameters.
      remat: what the backward pass computes again: "none", "dots", "full".
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: str = "none",
    ):
        if config.pool not in ("cls", "mean", "map") or (config.pool == "cls" and not config.class_token):
            raise ValueError(f"pool={config.pool!r} with class_token={config.class_token}")
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.config = config
        self.remat = remat
        self.dtype = jnp.dtype(dtype)
        self.patch_embedding = Linear(
            config.patch_size**2 * 3,
            config.dim,
            axes=("image", "embed"),
            bias=config.patch_bias,
            init=_kernel_init,
            rngs=rngs,
            **types,
        )
        self.class_token = (
            param(rngs, normal_init, (config.dim,), ("embed",), param_dtype) if config.class_token else None
        )
        self.position_embeddings = param(
            rngs,
            normal_init,
            (config.num_patches + config.class_token, config.dim),
            ("position", "embed"),
            param_dtype,
        )
        norm = {"eps": config.norm_eps, "rngs": rngs, **types}
        self.first_norm = LayerNorm(config.dim, **norm) if config.first_norm else None
        self.layers = stack_layers(
            lambda rngs: VisionLayer(config, rngs=rngs, **types), config.num_layers, rngs
        )
        self.final_norm = LayerNorm(config.dim, **norm)
        self.head = AttentionPool(config, rngs=rngs, **types) if config.pool == "map" else None

    @property
    def dim(self) -> int:
        """Size V of an embedding."""
        return self.config.dim

    def __call__(self, pixels: jax.Array | np.ndarray) -> jax.Array:
        """Embeds images.

        Args:
          pixels: float32 [B, H, W, 3], normalised as the checkpoint's processor does.

        Returns:
          float32 [B, V], not normalised.

        Raises:
          ValueError: if the images have another size.
        """
        size = self.config.image_size
        pixels = jnp.asarray(pixels)
        if pixels.shape[1:] != (size, size, 3):
            raise ValueError(f"pixels of shape {pixels.shape}, but the tower takes [B, {size}, {size}, 3]")
        return _embed_pixels(self, pixels)

    def embed(self, pixels_BHWC: jax.Array) -> jax.Array:
        """Embeds images of the right size: [B, H, W, 3] -> float32 [B, V]."""
        x_BTD = self._encode(pixels_BHWC)
        if self.config.pool == "cls":
            x_BD = self.final_norm(x_BTD[:, 0])
        else:
            x_BTD = self.final_norm(x_BTD)
            start = int(self.config.class_token)
            x_BD = jnp.mean(x_BTD[:, start:], axis=1) if self.head is None else self.head(x_BTD)
        return x_BD.astype(jnp.float32)

    def embed_tokens(self, pixels_BHWC: jax.Array, tokens: int) -> jax.Array:
        """Embeds images by several tokens, each the mean of the patches in one cell of a square grid.

        Where the patches do not divide, cells overlap by one row or column, as in adaptive average pooling.

        Args:
          pixels_BHWC: images of the right size.
          tokens: K, a square number; 1 is `embed`, the tower's own pooling.

        Returns:
          float32 [B, K, V], cells row by row.
        """
        if tokens == 1:
            return self.embed(pixels_BHWC)[:, None]
        config = self.config
        x_BTD = self.final_norm(self._encode(pixels_BHWC))[:, int(config.class_token) :]
        side = config.image_size // config.patch_size
        cells_gs = jnp.asarray(cell_weights(side, math.isqrt(tokens)))
        grid_BssD = x_BTD.astype(jnp.float32).reshape(-1, side, side, self.dim)
        pooled = jnp.einsum("gs,ht,bstd->bghd", cells_gs, cells_gs, grid_BssD)
        return pooled.reshape(-1, tokens, self.dim)

    def _encode(self, pixels_BHWC: jax.Array) -> jax.Array:
        """Hidden states of the class token, where there is one, and the patches, before the final norm."""
        x_BTD = self.patch_embedding(patches(pixels_BHWC, self.config.patch_size))
        if self.class_token is not None:
            token_B1D = jnp.broadcast_to(
                self.class_token[...].astype(self.dtype), (x_BTD.shape[0], 1, self.dim)
            )
            x_BTD = jnp.concatenate([token_B1D, x_BTD], axis=1)
        x_BTD += self.position_embeddings[...].astype(self.dtype)
        if self.first_norm is not None:
            x_BTD = self.first_norm(x_BTD)
        x_BTD = constrain(x_BTD, "batch", "length", None)
        return run_layers(self.layers, x_BTD, lambda layer, x, _: layer(x), remat=self.remat)


@jax.jit
def _embed_pixels(tower: VisionTower, pixels_BHWC: jax.Array) -> jax.Array:
    """Compiled for callers that are not: without it every call would trace the layers again."""
    return tower.embed(pixels_BHWC)


def cell_weights(side: int, cells: int) -> np.ndarray:
    """The share that each of `cells` stretches of a line takes of `side` patches, float32 [cells, side]."""
    weights = np.zeros((cells, side), np.float32)
    for cell in range(cells):
        start, end = cell * side // cells, -(-(cell + 1) * side // cells)
        weights[cell, start:end] = 1 / (end - start)
    return weights


def patches(pixels_BHWC: jax.Array, size: int) -> jax.Array:
    """Cuts images into flattened square patches, row by row: [B, patches, size * size * C].

    As by a convolution without padding, what is left over on the right and at the bottom is dropped.
    """
    B, H, W, C = pixels_BHWC.shape
    rows, columns = H // size, W // size
    grid = pixels_BHWC[:, : rows * size, : columns * size].reshape(B, rows, size, columns, size, C)
    return jnp.swapaxes(grid, 2, 3).reshape(B, rows * columns, size * size * C)
