"""Label prototypes: PRIME's network that joins a label's text, its free vector and its centroid.

Source: PRIME (Prototypical Extreme Multi-label Classification, NAACL 2025), used by ViXML unchanged.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from vixml_jax.models.layers import param
from vixml_jax.models.set_layer import SetLayer


class PrimeHead(SetLayer):
    """One transformer layer over the three tokens (u, w, c) of a label, then their mean.

    The sequence has no positions and its inputs are not normalised.
    """

    def __call__(
        self, u_LD: jax.Array, w_LD: jax.Array, c_LD: jax.Array, *, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Computes prototypes.

        Args:
          u_LD: raw label embeddings, [L, D].
          w_LD: the labels' free vectors, [L, D].
          c_LD: centroids of the labels' queries, [L, D].
          dropout_key: turns dropout on.

        Returns:
          z_LD, float32 [L, D], not normalised.
        """
        x_LSD = self.attend_within(jnp.stack([u_LD, w_LD, c_LD], axis=1), dropout_key=dropout_key)
        return jnp.mean(x_LSD.astype(jnp.float32), axis=1)


def free_vectors(
    num: int, dim: int, *, rngs: nnx.Rngs, init: str = "xavier_uniform", param_dtype: DTypeLike = jnp.float32
) -> nnx.Param:
    """Makes the [C, D] table of vectors that labels share, split by rows over the mesh.

    Args:
      num: C.
      dim: D.
      rngs: source of the initial values.
      init: "xavier_uniform" (encoders), or "zeros" for a table that is filled afterwards (decoders: the mean
        label embedding of each cluster).
      param_dtype: of the stored table.
    """
    initializers = {
        "xavier_uniform": nnx.initializers.xavier_uniform(),
        "zeros": nnx.initializers.zeros,
    }
    return param(rngs, initializers[init], (num, dim), ("cluster", "embedding"), param_dtype)
