"""One training step, as a pure function: (state, frozen, batch) -> (state, figures)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from vixml_jax import global_batch, loss_terms, row_tables
from vixml_jax.loss_terms import Loss
from vixml_jax.models.dual_encoder import DualEncoder
from vixml_jax.models.two_tower import l2_normalize
from vixml_jax.train_state import TrainState, shardings_of
from vixml_jax.types import Batch

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
    triplets = loss_terms.Triplets(negatives, margin_min, margin_max, temperature)
    table: dict[str, Callable[[], Loss]] = {
        "prime": lambda: loss_terms.prime(triplets, reg_weight, reg_margin),
        "triplet": lambda: loss_terms.triplet(triplets),
        "info_nce": lambda: loss_terms.info_nce(temperature, symmetric=True),
        "decoupled_softmax": lambda: loss_terms.decoupled_softmax(temperature),
        "sigmoid": loss_terms.sigmoid,
    }
    return table[name]()


def compile_step(
    graphdef: nnx.GraphDef[DualEncoder],
    optimizer: optax.GradientTransformation,
    loss: Loss,
    state: TrainState,
    seed: int,
    dims: Sequence[int] = (),
    chunk_rows: int = 0,
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
      chunk_rows: packed rows of a device that the tower computes at a time, see TwoTower; 0 for all.
    """

    def step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        dropout_key, loss_key = jax.random.split(key)
        tables = state.tables
        batch_size = batch.query_rows.shape[0]
        query_rows, label_ids = jnp.asarray(batch.query_rows), jnp.asarray(batch.label_ids)
        targets_QL, targets_LQ = jnp.asarray(batch.targets), jnp.asarray(batch.label_targets)

        def objective(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            model = nnx.merge(graphdef, params, frozen)
            pooled = model.embed(batch.tokens, 2 * batch_size, chunk_rows)
            queries_QE = l2_normalize(pooled[:batch_size])
            texts_LE = pooled[batch_size:]
            labels_LE = model.label_embeddings(
                texts_LE,
                row_tables.lookup(tables.label_clusters, label_ids),
                row_tables.lookup(tables.centroids, label_ids),
                dropout_key=dropout_key,
            )

            def at(dim: int) -> tuple[jax.Array, jax.Array]:
                queries_QD, labels_LD, texts_LD = (
                    l2_normalize(x[:, :dim]) for x in (queries_QE, labels_LE, texts_LE)
                )
                return global_batch.value(
                    loss,
                    queries_QD,
                    labels_LD,
                    texts_LD,
                    targets_QL,
                    targets_LQ,
                    loss_key,
                    model.pair_logits(),
                )

            values, violators = zip(*map(at, dims or (queries_QE.shape[1],)), strict=True)
            return jnp.mean(jnp.stack(values)), (queries_QE, violators[-1])

        (value, (queries_QE, violators)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        # A query may stand twice in a batch that was filled up: both rows hold its embedding.
        gathered = row_tables.write(tables.query_embeddings, query_rows, queries_QE.astype(jnp.float32))
        figures = {
            "train/loss": value,
            "train/grad_norm": optax.tree.norm(grads),
            "train/violators": violators,
        }
        state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            tables=dataclasses.replace(tables, query_embeddings=gathered),
        )
        return state, figures

    return jax.jit(step, donate_argnames="state", out_shardings=(shardings_of(state), None))
