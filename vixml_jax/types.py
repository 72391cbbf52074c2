"""The values that pass between parts which do not know each other."""

from __future__ import annotations

from typing import NamedTuple

import flax.struct
import jax
import numpy as np


@flax.struct.dataclass
class PackedTokens:
    """Items (queries or labels) laid into R rows of T slots, several items to a row.

    A slot holds a text token or an image; its item's slots are contiguous in the row. Padded batches are
    the special case of one item a row.

    Attributes:
      token_ids: int32 [R, T]; the token of a text slot, anything elsewhere.
      segment_ids: int32 [R, T]; 0 marks padding, else 1.. within the row: slots attend within their segment.
      positions: int32 [R, T]; 0.. within the item, images counted like tokens.
      item_index: int32 [R, T]; the item a slot belongs to, `num_items` for padding.
      image_index: int32 [R, T]; the row of `images` that fills the slot, -1 for a text slot.
      images: float [M, V]; vision embeddings, or None when no item has one.
      image_shards: devices over which rows and images are split together: those of one part of the rows stand
        in the same part of the images. 1 where every device holds all images.
    """

    token_ids: jax.Array | np.ndarray
    segment_ids: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray
    item_index: jax.Array | np.ndarray
    image_index: jax.Array | np.ndarray | None = None
    images: jax.Array | np.ndarray | None = None
    image_shards: int = flax.struct.field(pytree_node=False, default=1)


class Predictions(NamedTuple):
    """The k best labels of each query, best first.

    Attributes:
      ids: int32 [N, k]; label numbers, -1 where a query has fewer than k.
      scores: float32 [N, k]; -inf where the id is -1.
    """

    ids: np.ndarray
    scores: np.ndarray


@flax.struct.dataclass
class Batch:
    """One training batch: B queries, and one label slot for each.

    Attributes:
      tokens: the 2B items, queries first, packed into rows.
      query_rows: int32 [B]; rows of the training split.
      label_ids: int32 [B]; the sampled positive of each query, 0 where the query has none.
      targets: uint8 [B, B]; 1 where the label of slot j is relevant to query i.
      label_targets: uint8 [B, B]; the same with a row for each slot: split by rows, either is at hand whole.
    """

    tokens: PackedTokens
    query_rows: jax.Array | np.ndarray
    label_ids: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray
    label_targets: jax.Array | np.ndarray
