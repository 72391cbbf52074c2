"""The operations that a model needs, counted from its shapes: what a program's own are held against."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from vixml_jax.optim import path_names
from vixml_jax.planning.abstract_run import AbstractRun

# Parameters that multiply every slot.
_MATRICES = ("kernel", "lora_a", "lora_b")


def step_flops(run: AbstractRun) -> tuple[float, float]:
    """Counts the training step of a usual batch, padding left out.

    A matrix product counts once forwards, once for the gradient of its input, and once for that of its
    weights where they train. Norms, activations and the optimizer are left out, as is usual for model FLOPs.

    Returns:
      Operations of the model, and those that rematerialisation computes once more.
    """
    size = run.config.train.batch_size
    forward, weights = _tower(run, 2 * size)
    # A chunk is computed again on the way back, and then each of its layers, where these are too.
    repeated = forward * (run.is_chunked + (run.spec.remat == "full"))
    projection, head, similarities = _rest(run, size)
    # Pictures come from a frozen tower: nothing flows back into them.
    return 2 * forward + weights + 2 * projection + 3 * head + 3 * similarities, repeated


def encoding_flops(run: AbstractRun, num_items: int) -> float:
    """Counts one call that embeds so many items, padding left out."""
    return _tower(run, num_items)[0] + _rest(run, num_items // 2)[0]


def _tower(run: AbstractRun, num_items: int) -> tuple[float, float]:
    """Operations of the text tower forwards, and those of its trained weights' gradients."""
    slots = run.useful_slots(num_items)
    trained, frozen = (_matrix_sizes(tree, ("tower", "text")) for tree in (run.state.params, run.frozen))
    text = run.spec.text
    heads = text["num_heads"] * text.get("head_dim", text["dim"] // text["num_heads"])
    squares = float(np.square(run.item_slots.astype(np.float64)).mean()) * num_items
    attention = 4.0 * squares * heads * text["num_layers"]
    # In attention's two products both factors want a gradient, so it counts twice backwards.
    return 2.0 * slots * (trained + frozen) + attention, 2.0 * slots * trained + attention


def _rest(run: AbstractRun, size: int) -> tuple[float, float, float]:
    """Operations forwards of the image projection, the prototype net and the similarities of a batch."""
    images = float(run.item_images.mean()) * 2 * size
    projection = 2.0 * images * _matrix_sizes(run.state.params, ("tower", "image_projection"))
    head = 2.0 * 3 * size * _matrix_sizes(run.state.params, ("head",))  # over (text, vector, centroid)
    sides = 2 if run.config.loss.name == "prime" else 1
    return projection, head, 2.0 * sides * size * size * run.spec.dim


def _matrix_sizes(tree: Any, prefix: tuple[str, ...]) -> float:
    """Elements of all matrices below a path."""
    return float(
        sum(
            math.prod(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if path_names(path)[: len(prefix)] == prefix and path_names(path)[-1] in _MATRICES
        )
    )
