"""The optimizer: who learns at which rate, what decays, and steps against a plain NumPy AdamW."""

from __future__ import annotations

import fresh
import jax
import numpy as np
import optax
import pytest
from flax import nnx

from vixml_jax import model_factory, optim
from vixml_jax.models import hub, lora
from vixml_jax.models.dual_encoder import DualEncoder
from vixml_jax.models.prototypes import PrimeHead, free_vectors
from vixml_jax.models.two_tower import TwoTower, image_projection

SEEDS = fresh.seeds(2)  # they stand in the ids
SETTINGS = {
    "lr": 2e-3,
    "vision_lr": 2e-3,
    "head_lr": 5e-3,
    "weight_decay": 0.1,
    "warmup_steps": 4,
    "total_steps": 100,
    "clip_norm": 0.0,
    "eps": 1e-6,
}


def _by_name(tree) -> dict[str, object]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(optim.path_names(path)): leaf for path, leaf in leaves}


@pytest.fixture(params=["bert-tiny", "gemma3-tiny"])
def params(request, single_mesh):
    """What trains in a whole model."""
    text = hub.load_text_tower(f"random:{request.param}", vocab_size=99)
    rngs = nnx.Rngs(0)
    model = DualEncoder(
        TwoTower(text, image_projection(12, text.dim, rngs=rngs)),
        PrimeHead(text.dim, feed_forward=32, rngs=rngs),
        free_vectors(16, text.dim, rngs=rngs),
        learned_logits=True,
    )
    lora.attach(text, lora.LoraConfig(rank=2), rngs=rngs)
    return model_factory.split(model, "full")[1]


def test_groups_and_decay_of_a_whole_model(params):
    groups, decays, leaves = map(_by_name, (optim.groups(params), optim.decay_mask(params), params))
    assert groups.keys() == decays.keys() == leaves.keys()
    assert set(groups.values()) == {"tower", "head"}
    for name, leaf in leaves.items():
        assert groups[name] == ("tower" if name.startswith("tower.text.") else "head"), name
        # Stacked layers have an axis in front; but for the free vectors, what decays is a matrix.
        is_matrix = leaf.ndim - (".layers." in name) == 2
        assert decays[name] == (is_matrix and name != "free_vectors"), name
    for name, group, decay in [
        ("tower.text.layers.mlp.up_proj.kernel", "tower", True),
        ("tower.text.layers.mlp.up_proj.adapter.lora_a", "tower", True),
        ("tower.image_projection.kernel", "head", True),
        ("tower.image_projection.bias", "head", False),
        ("head.q_proj.kernel", "head", True),
        ("head.mlp_norm.scale", "head", False),
        ("free_vectors", "head", False),
        ("log_scale", "head", False),
    ]:
        assert (groups[name], decays[name]) == (group, decay), name


def slow_schedule(step: int, peak: float, warmup: int, total: int) -> float:
    if step < warmup:
        return peak * step / warmup
    return peak * max(total - step, 0) / (total - warmup)


@pytest.mark.parametrize(
    ("asked", "total", "warmup"), [(100, 2000, 100), (100, 500, 50), (0, 30, 0), (9, 5, 1)]
)
def test_schedule(asked, total, warmup):
    schedule = optim.schedule(3e-4, asked, total)
    for step in {0, warmup // 2, warmup, warmup + 1, (warmup + total) // 2, total - 1, total, total + 7}:
        expected = slow_schedule(step, 3e-4, warmup, total)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5, abs=1e-10), step
    assert float(schedule(warmup)) == pytest.approx(3e-4)
    assert float(schedule(total)) == 0
    if warmup:
        assert float(schedule(0)) == 0


def _tree(rng: np.random.Generator, size: float):
    draw = lambda *shape: (size * rng.normal(size=shape)).astype(np.float32)  # noqa: E731
    return {
        "tower": {
            "text": {"kernel": draw(4, 3), "bias": draw(3)},
            "image_projection": {"kernel": draw(5, 4), "bias": draw(4)},
        },
        "free_vectors": draw(6, 4),
    }


class SlowAdamW:
    """Loshchilov & Hutter 2019, one array, float64; the decay is scaled by the learning rate."""

    def __init__(self, value: np.ndarray, peak: float, decay: float):
        self.value, self.peak, self.decay = value.astype(np.float64), peak, decay
        self.first, self.second, self.step = 0.0, 0.0, 0

    def update(self, gradient: np.ndarray) -> None:
        gradient = gradient.astype(np.float64)
        rate = slow_schedule(self.step, self.peak, SETTINGS["warmup_steps"], SETTINGS["total_steps"])
        self.step += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        first, second = self.first / (1 - 0.9**self.step), self.second / (1 - 0.999**self.step)
        direction = first / (np.sqrt(second) + SETTINGS["eps"])
        self.value = self.value - rate * (direction + self.decay * self.value)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_steps_equal_plain_adamw(seed, clip_norm):
    rng = np.random.default_rng(seed)
    params = _tree(rng, 1.0)
    slow = {}
    for name, value in _by_name(params).items():
        peak = SETTINGS["lr"] if ".text." in name else SETTINGS["head_lr"]
        slow[name] = SlowAdamW(value, peak, SETTINGS["weight_decay"] if "kernel" in name else 0.0)
    optimizer = optim.make(**(SETTINGS | {"clip_norm": clip_norm}))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(7):
        gradients = _tree(rng, 10.0 ** (step % 3 - 2))  # some beyond the norm, some within
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        flat = _by_name(gradients)
        norm = np.sqrt(sum((value.astype(np.float64) ** 2).sum() for value in flat.values()))
        factor = min(1.0, clip_norm / norm) if clip_norm else 1.0
        for name, value in flat.items():
            slow[name].update(factor * value)
    for name, value in _by_name(params).items():
        np.testing.assert_allclose(value, slow[name].value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_first_step_of_a_warm_up_moves_nothing():
    params = _tree(np.random.default_rng(0), 1.0)
    optimizer = optim.make(**SETTINGS)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(updates))
