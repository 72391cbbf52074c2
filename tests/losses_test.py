"""The losses against slow readings of their formulas, one row and one pair at a time."""

from __future__ import annotations

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from vixml_jax import losses, sharding

SEEDS = fresh.seeds(3)  # each stands in its test's id


def draw(rng: np.random.Generator, num_queries: int = 23, num_labels: int = 31, density: float = 0.15):
    """Ordinary rows, and one row and one column each of positives only and of negatives only."""
    similarities = rng.uniform(-0.4, 0.9, (num_queries, num_labels)).astype(np.float32)
    targets = (rng.random((num_queries, num_labels)) < density).astype(np.uint8)
    targets[:, 1], targets[:, 0], targets[3], targets[5] = 0, 1, 0, 1
    return similarities, targets


def slow_triplet(s, g, positives, k=10, low=0.1, high=0.3, t=0.1) -> float:
    """`positives`: the positive of each row, as a test fixes or learns it."""
    total = 0.0
    for row, truth, p in zip(s, g, positives, strict=True):
        negatives = sorted(
            (float(value) for value, y in zip(row, truth, strict=True) if y == 0), reverse=True
        )[:k]
        if not truth.any():
            continue
        terms = []
        for n in negatives:
            violation = n - float(row[p]) + min(max(abs(float(row[p]) - n), low), high)
            if violation > 1e-12:  # exactly 0 but for rounding where the margin is the distance
                terms.append((np.exp(n / t), violation))
        norm = sum(weight for weight, _ in terms)
        total += sum(weight / norm * violation for weight, violation in terms)
    return total / len(s)


def first_positives(g: np.ndarray) -> list[int]:
    return [int(np.argmax(row)) for row in g]


def slow_mean_nonzero(values: list[float]) -> float:
    values = [value for value in values if value != 0]
    return sum(values) / len(values) if values else 0.0


def slow_prime(u, z, g, k=10) -> float:
    loss = slow_triplet(z, g, first_positives(g), k) + slow_triplet(u, g, first_positives(g), k)
    loss += slow_triplet(u.T, g.T, first_positives(g.T), k)
    good, bad = [], []
    for i, p in enumerate(first_positives(g)):
        if g[i].any():
            good.append(max(0.0, float(u[i, p]) - float(z[i, p]) + 0.1))
        order = sorted((j for j in range(g.shape[1]) if not g[i, j]), key=lambda j, i=i: -z[i, j])
        bad.extend(max(0.0, float(z[i, j]) - float(u[i, j]) + 0.1) for j in order[:k])
    return loss + 0.1 * (slow_mean_nonzero(good) + slow_mean_nonzero(bad)) / 2


def slow_softmax(s, g, t, decoupled: bool) -> float:
    total = 0.0
    for row, truth in zip(s.astype(np.float64), g, strict=True):
        terms = []
        for p in np.flatnonzero(truth):
            rest = [np.exp(v / t) for j, v in enumerate(row) if (not truth[j] if decoupled else j != p)]
            terms.append(-np.log(np.exp(row[p] / t) / (np.exp(row[p] / t) + sum(rest))))
        total += np.mean(terms) if terms else 0.0
    return total / len(s)


def slow_sigmoid(s, g, scale, bias) -> float:
    total = 0.0
    for row, truth in zip(s.astype(np.float64), g, strict=True):
        for value, y in zip(row, truth, strict=True):
            total -= np.log(1 / (1 + np.exp(-(1 if y else -1) * (scale * value + bias))))
    return total / len(s)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 10, 100])
def test_triplet(seed, k):
    s, g = draw(np.random.default_rng(seed))
    value = losses.triplet(s, g, k=k)
    assert value.dtype == jnp.float32
    assert value.shape == ()
    assert float(value) == pytest.approx(slow_triplet(s, g, first_positives(g), k), rel=1e-5)
    fixed = losses.triplet(s, g, k=k, margin_min=0.2, margin_max=0.2, temperature=0.5)
    assert float(fixed) == pytest.approx(slow_triplet(s, g, first_positives(g), k, 0.2, 0.2, 0.5), rel=1e-5)
    ngame = losses.ngame(s, g, k=k)
    assert float(ngame) == pytest.approx(slow_triplet(s, g, first_positives(g), k, 0.3, 0.3), rel=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_prime(seed):
    rng = np.random.default_rng(seed)
    u, g = draw(rng)
    z = u + rng.normal(0, 0.2, u.shape).astype(np.float32)
    assert float(losses.prime(u, g, z)) == pytest.approx(slow_prime(u, z, g), rel=1e-5)
    assert float(losses.prime(u, g, z, k=4)) == pytest.approx(slow_prime(u, z, g, k=4), rel=1e-5)
    without = losses.prime(u, g, z, reg_weight=0.0)
    parts = losses.triplet(z, g) + losses.triplet(u, g) + losses.triplet(u.T, g.T)
    assert float(without) == pytest.approx(float(parts), rel=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_softmax_losses(seed):
    s, g = draw(np.random.default_rng(seed))
    one_way = slow_softmax(s, g, 0.07, decoupled=False)
    both = (one_way + slow_softmax(s.T, g.T, 0.07, decoupled=False)) / 2
    assert float(losses.info_nce(s, g, 0.07, symmetric=False)) == pytest.approx(one_way, rel=1e-4)
    assert float(losses.info_nce(s, g, 0.07)) == pytest.approx(both, rel=1e-4)
    decoupled = slow_softmax(s, g, 0.07, decoupled=True)
    assert float(losses.decoupled_softmax(s, g, 0.07)) == pytest.approx(decoupled, rel=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_sigmoid(seed):
    s, g = draw(np.random.default_rng(seed))
    assert float(losses.sigmoid(s, g, 7.0, -2.5)) == pytest.approx(slow_sigmoid(s, g, 7.0, -2.5), rel=1e-4)


def test_worked_by_hand():
    s = np.array([[0.5, 0.45, 0.6, 0.1], [0.2, 0.9, 0.85, 0.3]], np.float32)
    g = np.array([[1, 0, 0, 0], [0, 1, 1, 0]])
    # Row 0: negatives .6 and .45 violate by .1 + .1 and -.05 + .1; .1 is .4 away, beyond the largest margin.
    # Row 1: the nearest negative, .3, is .6 below the first positive.
    weights = np.exp([6.0, 4.5]) / np.exp([6.0, 4.5]).sum()
    assert float(losses.triplet(s, g)) == pytest.approx((weights @ [0.2, 0.05]) / 2, rel=1e-5)
    assert float(losses.violation_rate(s, g)) == pytest.approx(2 / 5)


@pytest.mark.parametrize("seed", SEEDS)
def test_positive_is_drawn_uniformly(seed):
    s = np.tile(np.array([0.9, 0.7, 0.5, 0.3, 0.6], np.float32), (4000, 1))
    g = np.tile(np.array([1, 0, 1, 1, 0]), (4000, 1))
    with_each = [float(losses.triplet(s[:1], np.eye(5)[[p]] * 1 + 0 * g[:1], k=5)) for p in (0, 2, 3)]
    assert len(set(with_each)) == 3
    # Three positives of equal chance: the mean over many rows is the mean of the three row losses.
    expected = np.mean([slow_triplet(s[:1], g[:1], [p]) for p in (0, 2, 3)])
    spread = np.std([slow_triplet(s[:1], g[:1], [p]) for p in (0, 2, 3)]) / np.sqrt(4000)
    value = float(losses.triplet(s, g, key=jax.random.key(seed)))
    assert abs(value - expected) < 5 * spread
    again = float(losses.triplet(s, g, key=jax.random.key(seed)))
    assert value == again


@pytest.mark.parametrize("seed", SEEDS)
def test_keyed_value_is_some_choice_of_positives(seed):
    rng = np.random.default_rng(seed)
    s = rng.uniform(-0.4, 0.9, (1, 9)).astype(np.float32)
    g = np.array([[0, 1, 0, 1, 0, 0, 1, 0, 0]])
    possible = [slow_triplet(s, g, [p]) for p in (1, 3, 6)]
    for i in range(6):
        value = float(losses.triplet(s, g, key=jax.random.fold_in(jax.random.key(seed), i)))
        assert min(abs(value - choice) for choice in possible) < 1e-5


def all_losses(g, key=None):
    """Every loss as a function of similarities alone."""
    return {
        "triplet": lambda s: losses.triplet(s, g, key=key),
        "ngame": lambda s: losses.ngame(s, g, key=key),
        "prime": lambda s: losses.prime(s, g, 0.9 * s.astype(jnp.float32) + 0.03, key=key),
        "info_nce": lambda s: losses.info_nce(s, g),
        "decoupled_softmax": lambda s: losses.decoupled_softmax(s, g),
        "sigmoid": lambda s: losses.sigmoid(s, g, 10.0, -10.0),
        "violation_rate": lambda s: losses.violation_rate(s, g),
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_columns_may_be_permuted(seed):
    rng = np.random.default_rng(seed)
    s, _ = draw(rng)
    g = np.zeros(s.shape, np.uint8)
    g[np.arange(len(g)), rng.permutation(g.shape[1])[: len(g)]] = 1  # one positive a row: nothing to draw
    order = rng.permutation(g.shape[1])
    for name, loss in all_losses(g).items():
        permuted = all_losses(g[:, order])[name]
        assert float(permuted(s[:, order])) == pytest.approx(float(loss(s)), rel=1e-5), name


def sum_of(functions):
    """One function to compile instead of many; its weights keep errors from cancelling."""

    def total(s):
        values = {name: loss(s) for name, loss in functions.items()}
        return sum(weight * value for weight, value in enumerate(values.values(), start=1)), values

    return total


@pytest.mark.parametrize("seed", SEEDS)
def test_gradients_by_finite_differences(seed):
    rng = np.random.default_rng(seed)
    s, g = draw(rng, 6, 8, 0.3)
    # The dynamic margin is a constant to the gradient, so differences must not see it move; a fixed one
    # leaves the weights and the violations.
    with jax.enable_x64(True):
        s = jnp.asarray(s, jnp.float64)
        fixed = {"margin_min": 0.3, "margin_max": 0.3}
        functions = all_losses(g) | {"prime": lambda s: losses.prime(s, g, 0.9 * s + 0.03, **fixed)}
        del functions["triplet"], functions["violation_rate"]
        check_grads(
            jax.jit(lambda s: sum_of(functions)(s)[0]),
            (s,),
            order=1,
            modes=["rev"],
            atol=1e-4,
            rtol=1e-4,
            eps=1e-7,
        )


def test_gradient_flows_through_the_weights_and_not_the_margin():
    s = np.array([[0.5, 0.45, 0.62]])
    g = np.array([[1, 0, 0]])
    with jax.enable_x64(True):
        grads = jax.grad(lambda s: losses.triplet(s, g))(jnp.asarray(s))
    # w = softmax(n / .1), l = n - p + margin with margins .1 (|.05| clipped) and .12 (inside, a constant).
    violation = np.array([0.05, 0.24])
    w = np.exp([4.5, 6.2]) / np.exp([4.5, 6.2]).sum()
    through_weights = w * (violation - w @ violation) / 0.1
    np.testing.assert_allclose(np.asarray(grads)[0], [-1.0, *(w + through_weights)], rtol=1e-6)


@pytest.mark.parametrize(
    "shape_and_fill",
    [((1, 1), 0), ((1, 7), 1), ((4, 6), 0), ((4, 6), 1), ((3, 5), "identity")],
    ids=str,
)
def test_degenerate_batches_are_finite(shape_and_fill):
    shape, fill = shape_and_fill
    g = np.eye(*shape, dtype=bool) if fill == "identity" else np.full(shape, fill, np.float32)
    functions = all_losses(g, jax.random.key(0))
    del functions["ngame"]  # the triplet stands for it
    compiled = jax.jit(jax.grad(sum_of(functions), has_aux=True))
    for s in (np.zeros(shape, np.float32), np.ones(shape, np.float32), np.eye(*shape, dtype=np.float32)):
        grads, values = compiled(s)
        assert np.isfinite(grads).all()
        for name, value in values.items():
            assert np.isfinite(value), name
            if name in ("triplet", "decoupled_softmax", "violation_rate") and fill != "identity":
                assert value == 0, name


def test_positives_never_are_negatives():
    s = np.array([[0.1, 0.9, 0.8, -0.9]], np.float32)
    g = np.array([[1, 1, 1, 0]])
    assert float(losses.triplet(s, g, k=10)) == 0  # the only negative is 1.0 below the positive


def test_bfloat16_similarities_are_computed_in_float32():
    s, g = draw(np.random.default_rng(0))
    s = jnp.asarray(s, jnp.bfloat16)
    for name, loss in all_losses(g).items():
        assert loss(s).dtype == jnp.float32, name
        assert float(loss(s)) == float(loss(s.astype(jnp.float32))), name


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        losses.triplet(np.zeros((2, 3)), np.zeros((2, 2)))


def test_the_mesh_changes_nothing(mesh):
    s, g = draw(np.random.default_rng(7), 32, 64)
    split = NamedSharding(mesh, P(sharding.ROWS, "tensor"))
    key = jax.random.key(3)

    @jax.jit
    def grads_and_values(s, g):
        functions = all_losses(g, key)
        del functions["triplet"], functions["ngame"]  # PRIME's loss has three of them
        return jax.grad(sum_of(functions), has_aux=True)(s)

    grads, values = grads_and_values(jax.device_put(s, split), jax.device_put(g, split))
    with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])):
        expected_grads, expected = grads_and_values(s, g)
    for name, value in values.items():
        assert float(value) == pytest.approx(float(expected[name]), rel=1e-5), name
    np.testing.assert_allclose(grads, expected_grads, rtol=1e-4, atol=1e-6)
