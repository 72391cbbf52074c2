"""The whole model of a run: the tower, and what turns a label's text into its embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vixml_jax import row_tables
from vixml_jax.models.prototypes import PrimeHead
from vixml_jax.models.two_tower import TwoTower, l2_normalize
from vixml_jax.types import PackedTokens


class DualEncoder(nnx.Module):
    """One tower for queries and labels, and the label's prototype (ViXML; PRIME, section on prototypes).

    Args:
      tower: embeds items.
      head: PRIME's combiner; None for DEXA and for plain label texts.
      free_vectors: float [C, D] parameter shared by clusters of labels; None for plain label texts.
      learned_logits: adds the sigmoid loss's scale and bias.
    """

    def __init__(
        self,
        tower: TwoTower,
        head: PrimeHead | None = None,
        free_vectors: nnx.Param | None = None,
        *,
        learned_logits: bool = False,
    ):
        self.tower = tower
        self.head = nnx.data(head)
        self.free_vectors = nnx.data(free_vectors)
        # SigLIP's start: most pairs are negatives, so the bias begins low.
        self.log_scale = nnx.data(nnx.Param(jnp.log(10.0)) if learned_logits else None)
        self.logit_bias = nnx.data(nnx.Param(jnp.array(-10.0)) if learned_logits else None)

    def pair_logits(self) -> tuple[jax.Array, jax.Array] | None:
        """Returns the sigmoid loss's learned scale and bias, float32 scalars; None where it has none."""
        if self.log_scale is None or self.logit_bias is None:
            return None
        return jnp.exp(self.log_scale[...]), self.logit_bias[...]

    def embed(self, tokens: PackedTokens, num_items: int, chunk_rows: int = 0) -> jax.Array:
        """Returns pooled embeddings of packed items, see TwoTower: float32 [num_items, D], not normalised."""
        return self.tower(tokens, num_items, chunk_rows)

    def label_embeddings(
        self,
        texts_LD: jax.Array,
        clusters_L: jax.Array,
        centroids_LD: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns what a label is searched by, L2-normalised float32 [L, D].

        Args:
          texts_LD: pooled embeddings of the labels' texts and pictures, not normalised.
          clusters_L: int32; the free vector of each label.
          centroids_LD: mean embedding of each label's training queries, zero for a label without.
          dropout_key: turns the head's dropout on.
        """
        if self.free_vectors is None:
            return l2_normalize(texts_LD)
        vectors_LD = row_tables.lookup(self.free_vectors[...], jnp.asarray(clusters_L))
        if self.head is None:
            return l2_normalize(texts_LD + vectors_LD)
        return l2_normalize(self.head(texts_LD, vectors_LD, centroids_LD, dropout_key=dropout_key))
