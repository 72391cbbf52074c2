"""Orbax checkpoints: the whole train state, written while training goes on, read back for any mesh.

A checkpoint has three parts, so that prediction reads no optimizer moments: "params" (what trains), "tables"
(see train_state.Tables) and "training" (step and optimizer state).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from vixml_jax.errors import UserError
from vixml_jax.train_state import TrainState

Tree = TypeVar("Tree")


class Checkpointer:
    """Saves and restores a run's state under `workdir/checkpoints`.

    Args:
      workdir: the run's directory.
      keep: number of newest checkpoints kept.
    """

    def __init__(self, workdir: Path, keep: int = 1):
        self._root = (workdir / "checkpoints").absolute()
        # Orbax's own policies do not fit its own protocols, as type checkers see it.
        policies: Any = ocp.training
        self._orbax = ocp.training.Checkpointer(
            os.fspath(self._root),
            save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.preservation_policies.LatestN(keep),
        )

    def save(self, state: TrainState, step: int) -> None:
        """Starts writing `state`, and returns before it is on disk. A step that is saved is left alone."""
        if self.latest_step() == step:
            return
        training = {"step": state.step, "opt_state": state.opt_state}
        self.save_parts({"params": state.params, "tables": state.tables, "training": training}, step)

    def save_parts(self, parts: dict[str, Any], step: int) -> None:
        """Starts writing trees of arrays by name, and returns before they are on disk."""
        # Orbax takes no empty trees: a tower of which nothing trains leaves one.
        self._orbax.save_checkpointables_async(step, {k: v for k, v in parts.items() if jax.tree.leaves(v)})

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, None where there is none."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def restore(self, like: TrainState) -> TrainState:
        """Reads the newest checkpoint into the shapes, dtypes and shardings of `like`.

        Raises:
          UserError: if it does not fit the config's model and dataset.
        """
        training = {"step": like.step, "opt_state": like.opt_state}
        parts = self.restore_parts({"params": like.params, "tables": like.tables, "training": training})
        training = parts["training"]
        return TrainState(training["step"], parts["params"], training["opt_state"], parts["tables"])

    def restore_model(self, params: Tree, tables: Any) -> tuple[Tree, Any]:
        """Reads only what prediction needs: parameters and tables, like those given."""
        parts = self.restore_parts({"params": params, "tables": tables})
        return parts["params"], parts["tables"]

    def restore_parts(self, like: dict[str, Any]) -> dict[str, Any]:
        """Reads those parts of the newest checkpoint that `like` names, into its shapes and shardings.

        Raises:
          UserError: if there is no checkpoint, or it does not fit.
        """
        step = self.latest_step()
        if step is None:
            raise UserError("no checkpoint", file=self._root, fix="train first: `vixml train`")
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        try:
            filled = {name: tree for name, tree in abstract.items() if jax.tree.leaves(tree)}
            return like | self._orbax.load_checkpointables(step, filled)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the checkpoint of step {step} does not fit the model: {str(error).splitlines()[0]}",
                file=self._root,
                fix="use the config and dataset that it was made with",
            ) from error

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._orbax.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
