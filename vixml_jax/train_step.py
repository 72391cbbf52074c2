"""One training step, as a pure function: (state, frozen, batch) -> (state, figures)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from vixml_jax import losses
from vixml_jax.models.dual_encoder import DualEncoder
from vixml_jax.models.two_tower import l2_normalize
from vixml_jax.train_state import TrainState, shardings_of
from vixml_jax.types import Batch

# (model, query x label embedding, query x label text, targets, key) -> scalar
Loss = Callable[[DualEncoder, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
Step = Callable[[TrainState, nnx.State, Batch], tuple[TrainState, dict[str, jax.Array]]]


def make_loss(
    name: str,
    *,
    negatives: int,
    margin_min: float,
    margin_max: float,
    temperature: float,
    reg_weight: float,
    reg_margin: float,
) -> Loss:
    """Chooses the loss of a run.

    "prime" is PRIME's sum of terms. Any other loss is taken on the label embedding that inference uses (the
    prototype, DEXA's sum, or the label's text alone).
    """

    triplet = {
        "k": negatives,
        "margin_min": margin_min,
        "margin_max": margin_max,
        "temperature": temperature,
    }

    def prime_loss(
        _: DualEncoder, labels_QL: jax.Array, texts_QL: jax.Array, targets_QL: jax.Array, key: jax.Array
    ) -> jax.Array:
        return losses.prime(
            texts_QL,
            targets_QL,
            prototype_similarities_QL=labels_QL,
            key=key,
            reg_weight=reg_weight,
            reg_margin=reg_margin,
            **triplet,
        )

    table: dict[str, Loss] = {
        "prime": prime_loss,
        "triplet": lambda _, labels_QL, __, targets_QL, key: losses.triplet(
            labels_QL, targets_QL, key=key, **triplet
        ),
        "info_nce": lambda _, labels_QL, __, targets_QL, ___: losses.info_nce(
            labels_QL, targets_QL, temperature=temperature
        ),
        "decoupled_softmax": lambda _, labels_QL, __, targets_QL, ___: losses.decoupled_softmax(
            labels_QL, targets_QL, temperature=temperature
        ),
        "sigmoid": lambda model, labels_QL, __, targets_QL, ___: losses.sigmoid(
            labels_QL, targets_QL, *model.pair_logits()
        ),
    }
    return table[name]


def compile_step(
    graphdef: nnx.GraphDef[DualEncoder],
    optimizer: optax.GradientTransformation,
    loss: Loss,
    state: TrainState,
    seed: int,
    dims: Sequence[int] = (),
) -> Step:
    """Jits the step: the state is donated and comes back with the shardings that it has now.

    Args:
      graphdef: structure of the model.
      optimizer: makes updates of gradients.
      loss: of a batch, as `make_loss` gives it.
      state: the first state.
      seed: of dropout and of drawn positives.
      dims: the loss is the mean of that on the first d dimensions of all embeddings, for each d of these, so
        that prefixes can be searched (Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022,
        equation 1 with equal weights); () for all dimensions alone.
    """

    def step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        dropout_key, loss_key = jax.random.split(key)
        tables = state.tables
        batch_size = batch.query_rows.shape[0]
        targets_QL = jnp.asarray(batch.targets)

        def objective(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            model = nnx.merge(graphdef, params, frozen)
            pooled = model.embed(batch.tokens, 2 * batch_size)
            queries_QE = l2_normalize(pooled[:batch_size])
            texts_LE = pooled[batch_size:]
            labels_LE = model.label_embeddings(
                texts_LE,
                tables.label_clusters[batch.label_ids],
                tables.centroids[batch.label_ids],
                dropout_key=dropout_key,
            )
            labels_QL = queries_QE @ labels_LE.T

            def at(dim: int) -> jax.Array:
                queries_QD, labels_LD, texts_LD = (
                    l2_normalize(x[:, :dim]) for x in (queries_QE, labels_LE, texts_LE)
                )
                return loss(model, queries_QD @ labels_LD.T, queries_QD @ texts_LD.T, targets_QL, loss_key)

            if dims:
                value = jnp.mean(jnp.stack([at(dim) for dim in dims]))
            else:
                texts_QL = queries_QE @ l2_normalize(texts_LE).T
                value = loss(model, labels_QL, texts_QL, targets_QL, loss_key)
            return value, (queries_QE, labels_QL)

        (value, (queries_QE, similarities_QL)), grads = jax.value_and_grad(objective, has_aux=True)(
            state.params
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        # A query may stand twice in a batch that was filled up: both rows hold its embedding.
        gathered = tables.query_embeddings.at[batch.query_rows].set(queries_QE.astype(jnp.float32))
        figures = {
            "train/loss": value,
            "train/grad_norm": optax.tree.norm(grads),
            "train/violators": losses.violation_rate(similarities_QL, targets_QL),
        }
        state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            tables=dataclasses.replace(tables, query_embeddings=gathered),
        )
        return state, figures

    return jax.jit(step, donate_argnames="state", out_shardings=(shardings_of(state), None))
