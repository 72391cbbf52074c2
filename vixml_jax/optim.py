"""The optimizer: AdamW with three groups of parameters, each with its own learning rate.

ViXML's recipe: the text tower learns at `lr`; what stands on top of it (image projection, free vectors,
prototype net) at `head_lr`; a vision tower that trains, as ViXML's does not, at `vision_lr`. Decay falls on
matrices and embeddings only, decided by what a parameter is and not by a pattern in its name that a norm
could match.
"""

from __future__ import annotations

from typing import Any

import jax
import optax

# Leaves that decay. Biases, norm scales and free vectors do not.
DECAYED = ("kernel", "embedding", "position_embeddings", "token_type_embeddings", "lora_a", "lora_b")


def make(
    *,
    lr: float,
    vision_lr: float,
    head_lr: float,
    weight_decay: float,
    warmup_steps: int,
    total_steps: int,
    clip_norm: float,
    eps: float,
) -> optax.GradientTransformation:
    """Builds the transformation of gradients; learning rates are peaks, `clip_norm` 0 is off."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.scale_by_adam(eps=eps),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
        optax.partition(
            {
                "tower": optax.scale_by_learning_rate(schedule(lr, warmup_steps, total_steps)),
                "vision": optax.scale_by_learning_rate(schedule(vision_lr, warmup_steps, total_steps)),
                "head": optax.scale_by_learning_rate(schedule(head_lr, warmup_steps, total_steps)),
            },
            groups,
        ),
    )


def schedule(peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then linear decay to 0 at `total_steps`.

    A run shorter than ten warm-ups warms up for a tenth of it.
    """
    warmup = min(warmup_steps, max(total_steps // 10, 1))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.linear_schedule(peak, 0.0, max(total_steps - warmup, 1)),
        ],
        [warmup],
    )


def groups(params: Any) -> Any:
    """Returns "tower", "vision" or "head" for every leaf of `params`."""
    names: dict[tuple[str, ...], str] = {("tower", "text"): "tower", ("tower", "vision"): "vision"}
    return jax.tree_util.tree_map_with_path(lambda path, _: names.get(path_names(path)[:2], "head"), params)


def decay_mask(params: Any) -> Any:
    """Returns for every leaf of `params` whether weight decay falls on it."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_names(path)[-1] in DECAYED, params)


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Names along a tree path, without the wrapper that holds an array."""
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return tuple(name for name in names if name != "value")
