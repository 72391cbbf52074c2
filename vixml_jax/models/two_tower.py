"""The embedder of queries and labels: text and images fused at the input, one tower, pooling."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from vixml_jax import sharding
from vixml_jax.models import chunks, pooling
from vixml_jax.models.layers import Linear, constrain
from vixml_jax.models.text_tower import TextTower
from vixml_jax.models.vision import VisionTower
from vixml_jax.types import PackedTokens


def l2_normalize(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Scales the last axis to length 1; a vector shorter than `eps` becomes zero, without gradient."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    long_enough = square > eps * eps
    return x * jnp.where(long_enough, jax.lax.rsqrt(jnp.where(long_enough, square, 1.0)), 0.0)


def image_projection(
    vision_dim: int,
    dim: int,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> Linear:
    """Makes the linear map (with bias) from image embeddings [V] into the input-embedding space [D]."""
    init = nnx.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")
    projection = Linear(
        vision_dim, dim, axes=("image", "embed"), rngs=rngs, dtype=dtype, param_dtype=param_dtype, init=init
    )
    return projection


def standardised_projection(
    images_sample_NV: np.ndarray | jax.Array, dim: int, key: jax.Array, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Initial values for the image projection under which images look like words.

    On the sample the projected images have zero mean and standard deviation `scale`. Frozen vision
    towers, random ones above all, vary little around a large mean; without this the images start out as
    one and the same vector.

    Args:
      images_sample_NV: embeddings of some images, N of them at least 2.
      dim: D.
      key: of the random weights.
      scale: standard deviation of the word embeddings.

    Returns:
      (kernel [V, D], bias [D]), float32.
    """
    sample_NV = np.asarray(images_sample_NV, np.float64)
    mean_V, std_V = sample_NV.mean(axis=0), sample_NV.std(axis=0)
    # A feature that is constant on the sample says nothing here; divided by its spread it would drown the
    # others in the first picture where it is not.
    varies_V = std_V > 1e-6 * max(float(np.abs(sample_NV).max(initial=0.0)), 1e-30)
    inverse_V = np.where(varies_V, 1 / np.where(varies_V, std_V, 1), 0)
    kernel_VD = np.asarray(jax.random.normal(key, (sample_NV.shape[1], dim)), np.float64)
    spread = float((((sample_NV - mean_V) * inverse_V) @ kernel_VD).std())
    kernel_VD *= (scale / spread if spread else 0.0) * inverse_V[:, None]
    return kernel_VD.astype(np.float32), (-mean_V @ kernel_VD).astype(np.float32)


def into_slots(images_MD: jax.Array, index_RT: jax.Array, image_shards: int) -> jax.Array:
    """Looks up the image of each slot, [R, T, D]; a slot of index -1 gets some image.

    Where images are split over devices as rows are, a device's slots take images of its own only
    (data.packing.RowPlan): nothing travels.
    """

    def take(images: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.take(images, jnp.maximum(index, 0), axis=0, mode="clip")

    if image_shards == 1:
        return take(images_MD, index_RT)
    if image_shards != sharding.row_shards():
        raise ValueError(f"images packed for {image_shards} devices, rows split over {sharding.row_shards()}")

    def local(images: jax.Array, index: jax.Array) -> jax.Array:
        return take(images, index - jax.lax.axis_index(sharding.ROWS) * images.shape[0])

    rows = P(sharding.ROWS)
    return jax.shard_map(local, in_specs=(rows, rows), out_specs=rows)(images_MD, index_RT)


class TwoTower(nnx.Module):
    """Embeds items, queries and labels with the same parameters (ViXML, early fusion).

    Args:
      text: the text tower.
      image_projection: maps image embeddings into the tower's input space; None without images.
      pooling: "mean" over all unmasked slots, prompt and images included, or "last".
      vision: the vision tower, where it trains too: images then come as pixels, [M, H * W * 3]. None where
        they come as the embeddings of a frozen one.
    """

    def __init__(
        self,
        text: TextTower,
        image_projection: Linear | None = None,
        pooling: str = "mean",
        vision: VisionTower | None = None,
    ):
        if pooling not in ("mean", "last"):
            raise ValueError(f"pooling={pooling!r}: give 'mean' or 'last'")
        self.text = text
        self.image_projection = image_projection
        self.pooling = pooling
        self.vision = nnx.data(vision)

    @property
    def dim(self) -> int:
        """Size of an embedding."""
        return self.text.dim

    def __call__(self, tokens: PackedTokens, num_items: int, chunk_rows: int = 0) -> jax.Array:
        """Embeds packed items.

        Args:
          tokens: rows of slots.
          num_items: N; a static number.
          chunk_rows: rows of a device that are computed at a time, and again on the way back, so that memory
            is for the activations of so many; 0 for all at once. Pixels go through a vision tower that trains
            so many pictures at a time.

        Returns:
          float32 [N, D], not normalised; zero for an item without slots.

        Raises:
          ValueError: if there are images and no projection, or if a device's rows are no multiple of
            `chunk_rows`.
        """
        images_MD = None
        if tokens.images is not None and tokens.image_index is not None and tokens.images.shape[0]:
            # Projected once per image: there are far fewer images than slots.
            images_MD = self._projected(tokens.images, chunk_rows)

        def hidden(rows: PackedTokens) -> jax.Array:
            return self._hidden(dataclasses.replace(rows, images=images_MD))

        rows = dataclasses.replace(tokens, images=None)
        sums = pooling.zeros(num_items, self.dim, rows.token_ids.shape[0])
        parts = chunks.cut(rows, chunk_rows)
        if parts is None:
            return pooling.means(pooling.add(sums, hidden(rows), rows.item_index, self.pooling))
        again = jax.checkpoint(hidden, prevent_cse=False)

        def add(sums: pooling.Sums, rows: PackedTokens) -> tuple[pooling.Sums, None]:
            return pooling.add(sums, again(rows), rows.item_index, self.pooling), None

        return pooling.means(jax.lax.scan(add, sums, parts)[0])

    def _hidden(self, tokens: PackedTokens) -> jax.Array:
        """Hidden states of rows, whose images are projected already, [R, T, D]."""
        inputs_RTD = self.text.embed_tokens(jnp.asarray(tokens.token_ids))
        if tokens.images is not None:
            index_RT = jnp.asarray(tokens.image_index)
            slots_RTD = into_slots(jnp.asarray(tokens.images), index_RT, tokens.image_shards)
            inputs_RTD = jnp.where(index_RT[..., None] >= 0, slots_RTD.astype(inputs_RTD.dtype), inputs_RTD)
        inputs_RTD = constrain(inputs_RTD, "batch", "length", None)
        return self.text.encode(inputs_RTD, jnp.asarray(tokens.segment_ids), jnp.asarray(tokens.positions))

    def _projected(self, images: jax.Array | np.ndarray, chunk_rows: int) -> jax.Array:
        """Images in the text tower's input space, [M, D]."""
        if self.image_projection is None:
            raise ValueError("the items have images, but the model has no image projection")
        return self.image_projection(self._features(images, chunk_rows))

    def _features(self, images: jax.Array | np.ndarray, chunk_rows: int) -> jax.Array:
        """The embeddings of images by the vision tower, [M, V]."""
        if (vision := self.vision) is None:
            return jnp.asarray(images)
        size = vision.config.image_size

        def embed(images: jax.Array) -> jax.Array:
            return vision.embed(images.reshape(-1, size, size, 3))

        parts = chunks.cut(jnp.asarray(images), chunk_rows)
        if parts is None:
            return embed(jnp.asarray(images))
        return chunks.join(jax.lax.map(jax.checkpoint(embed, prevent_cse=False), parts))
