"""Late fusion: text and pictures meet after the text tower, in one layer of self-attention (after MUFIN).

The baseline that ViXML's early fusion is held against (its Table 4): an item is a small set, the embedding of
its text and the projected embedding of each picture, over which MUFIN (CVPR 2022) runs self-attention.

Shape suffixes: R rows, T slots of a row, N items, I pictures of an item, S = 1 + I, D model dimension.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vixml_jax.models.pooling import pool
from vixml_jax.models.set_layer import SetLayer
from vixml_jax.models.two_tower import TwoTower, into_slots
from vixml_jax.types import PackedTokens


class LateFusion(SetLayer):
    """Self-attention over an item's text and pictures, then their mean.

    It starts as the mean of the normalised vectors, so that training begins from what the text tower knows.
    It has no dropout: the towers of ViXML are trained without.

    Args:
      dim: D.
      rngs: source of the initial values.
      options: `heads`, `feed_forward`, `dtype` and `param_dtype` of SetLayer.
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(dim, dropout=0.0, rngs=rngs, **options)
        for last in (self.o_proj, self.mlp.down_proj):
            last.kernel[...] = jnp.zeros_like(last.kernel[...])

    def __call__(self, text_ND: jax.Array, images_NID: jax.Array, present_NI: jax.Array) -> jax.Array:
        """Joins items.

        Args:
          text_ND: pooled text embeddings.
          images_NID: projected pictures; any number where there is none.
          present_NI: bool; which pictures there are.

        Returns:
          float32 [N, D], not normalised.
        """
        x_NSD = jnp.concatenate([text_ND[:, None], images_NID.astype(text_ND.dtype)], axis=1)
        present_NS = jnp.pad(present_NI, ((0, 0), (1, 0)), constant_values=True)
        joined_NSD = self.attend_within(x_NSD, present_NS).astype(jnp.float32)
        there_NS1 = present_NS[..., None]
        return jnp.where(there_NS1, joined_NSD, 0).sum(axis=1) / there_NS1.sum(axis=1)


class LateFusionTower(TwoTower):
    """A TwoTower whose text tower reads text alone; pictures join its embedding afterwards.

    Pictures stand in an item's slots all the same, after its text: they travel with the rows, and the text
    tower takes their slots for padding.

    Args:
      fusion: joins text and pictures.
      max_images: I; an item has at most so many pictures.
      others: as of TwoTower.
    """

    def __init__(self, *others: Any, fusion: LateFusion, max_images: int):
        super().__init__(*others)
        self.fusion = fusion
        self.max_images = max_images

    def __call__(self, tokens: PackedTokens, num_items: int, chunk_rows: int = 0) -> jax.Array:
        """Embeds packed items; see TwoTower."""
        item_index_RT = jnp.asarray(tokens.item_index)
        if tokens.image_index is None or tokens.images is None:
            text_ND = super().__call__(tokens, num_items, chunk_rows)
            nothing_NID = jnp.zeros((num_items, 0, self.dim), text_ND.dtype)
            return self.fusion(text_ND, nothing_NID, jnp.zeros((num_items, 0), bool))
        image_index_RT = jnp.asarray(tokens.image_index)
        is_image_RT = image_index_RT >= 0
        text = dataclasses.replace(
            tokens,
            segment_ids=jnp.where(is_image_RT, 0, jnp.asarray(tokens.segment_ids)),
            item_index=jnp.where(is_image_RT, num_items, item_index_RT),
            image_index=None,
            images=None,
        )
        text_ND = super().__call__(text, num_items, chunk_rows)
        images_MD = self._projected(tokens.images, chunk_rows)
        slots_RTD = into_slots(images_MD, image_index_RT, tokens.image_shards)
        places_RT = image_places(image_index_RT, item_index_RT, num_items, self.max_images)
        # Of a place that one slot fills at most the mean is that slot.
        gather = lambda x: pool(x, places_RT, num_items * self.max_images, "mean")  # noqa: E731
        shape = (num_items, self.max_images, -1)
        present_NI = gather(is_image_RT[..., None]).reshape(shape)[..., 0] > 0
        return self.fusion(text_ND, gather(slots_RTD).reshape(shape), present_NI)


def image_places(
    image_index_RT: jax.Array, item_index_RT: jax.Array, num_items: int, max_images: int
) -> jax.Array:
    """Numbers the slots of pictures by item and by place within the item.

    Args:
      image_index_RT: int32; -1 for a slot without a picture.
      item_index_RT: int32; an item's pictures follow each other.
      num_items: N.
      max_images: I; an item has at most so many.

    Returns:
      int32 [R, T], item * I + place; N * I for every other slot.
    """
    is_image_RT = image_index_RT >= 0
    owner_RT = jnp.where(is_image_RT, item_index_RT, -1)
    before_RT = jnp.pad(owner_RT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    slots_T = jnp.arange(owner_RT.shape[1], dtype=jnp.int32)
    first_RT = jax.lax.cummax(jnp.where(owner_RT != before_RT, slots_T, 0), axis=1)
    return jnp.where(is_image_RT, item_index_RT * max_images + slots_T - first_RT, num_items * max_images)
