"""Label prototypes against PyTorch's encoder layer and a plain NumPy reading of the formula."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from comparison import relative_error
from flax import nnx

from vixml_jax.errors import UserError
from vixml_jax.models.dual_encoder import DualEncoder
from vixml_jax.models.prototypes import PrimeHead, free_vectors

DIM, HEADS, HIDDEN, NUM_LABELS, NUM_VECTORS = 64, 8, 96, 16, 8


_call = jax.jit(PrimeHead.__call__)


def _inputs(rng: np.random.Generator):
    """u, w and c, far from normalised."""
    return [(scale * rng.normal(size=(NUM_LABELS, DIM))).astype(np.float32) for scale in (2.0, 0.3, 0.8)]


def _lively_head(rng: np.random.Generator, **options) -> PrimeHead:
    """A head whose norms and biases are away from their starts."""
    make = lambda: PrimeHead(DIM, heads=HEADS, feed_forward=HIDDEN, rngs=nnx.Rngs(0), **options)  # noqa: E731
    head = jax.jit(make)()
    for parameter in _parameters(head):
        noise = 0.2 * rng.normal(size=parameter.get_value().shape)
        value = np.asarray(parameter.get_value()) + noise.astype(np.float32)
        parameter[...] = jax.device_put(value, parameter.get_value().sharding)
    return head


def _parameters(module):
    return jax.tree.leaves(module, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _torch_layer(head: PrimeHead) -> torch.nn.TransformerEncoderLayer:
    layer = torch.nn.TransformerEncoderLayer(
        DIM, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=False, activation="gelu"
    )
    projections = (head.q_proj, head.k_proj, head.v_proj)
    values = {
        "self_attn.in_proj_weight": np.concatenate([np.asarray(p.kernel[...]).T for p in projections]),
        "self_attn.in_proj_bias": np.concatenate([np.asarray(p.bias[...]) for p in projections]),
    }
    for name, linear in [
        ("self_attn.out_proj", head.o_proj),
        ("linear1", head.mlp.up_proj),
        ("linear2", head.mlp.down_proj),
    ]:
        values[f"{name}.weight"] = np.asarray(linear.kernel[...]).T
        values[f"{name}.bias"] = np.asarray(linear.bias[...])
    for name, norm in [("norm1", head.attention_norm), ("norm2", head.mlp_norm)]:
        values[f"{name}.weight"] = np.asarray(norm.scale[...])
        values[f"{name}.bias"] = np.asarray(norm.bias[...])
    layer.load_state_dict({name: torch.tensor(value) for name, value in values.items()})  # strict
    return layer


def slow_prototype(head: PrimeHead, u, w, c) -> np.ndarray:
    """One label and one head at a time, in float64."""

    def linear(x, layer):
        return x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)

    def norm(x, layer):
        centred = x - x.mean(1, keepdims=True)
        y = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        return y * np.asarray(layer.scale[...], np.float64) + np.asarray(layer.bias[...], np.float64)

    size = DIM // HEADS
    out = np.empty((len(u), DIM))
    for label in range(len(u)):
        x = np.stack([u[label], w[label], c[label]]).astype(np.float64)
        q, k, v = linear(x, head.q_proj), linear(x, head.k_proj), linear(x, head.v_proj)
        attended = np.empty((3, DIM))
        for h in range(HEADS):
            part = slice(h * size, (h + 1) * size)
            for token in range(3):
                weights = np.exp([q[token, part] @ k[other, part] / math.sqrt(size) for other in range(3)])
                attended[token, part] = weights / weights.sum() @ v[:, part]
        x = norm(x + linear(attended, head.o_proj), head.attention_norm)
        hidden = linear(x, head.mlp.up_proj)
        hidden *= np.vectorize(lambda value: 0.5 * (1 + math.erf(value / math.sqrt(2))))(hidden)
        out[label] = norm(x + linear(hidden, head.mlp.down_proj), head.mlp_norm).mean(0)
    return out


def normalised(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_equals_pytorch_with_gradients(single_mesh, seed):
    rng = np.random.default_rng(seed)
    head = _lively_head(rng)
    inputs, weights = _inputs(rng), rng.normal(size=(NUM_LABELS, DIM)).astype(np.float32)
    tensors = [torch.tensor(value, requires_grad=True) for value in inputs]
    expected = _torch_layer(head)(torch.stack(tensors, 1)).mean(1)
    (expected * torch.tensor(weights)).sum().backward()

    def weighted(inputs):
        z = head(*inputs)
        return jnp.sum(z * weights), z

    gradients, z = jax.jit(jax.grad(weighted, has_aux=True))(inputs)
    assert z.dtype == jnp.float32
    assert relative_error(z, expected.detach().numpy()) < 1e-5
    for got, tensor in zip(gradients, tensors, strict=True):
        assert relative_error(got, tensor.grad.numpy()) < 1e-4


def test_equals_the_slow_reading(single_mesh, seed):
    rng = np.random.default_rng(seed)
    head = _lively_head(rng)
    u, w, c = _inputs(rng)
    assert relative_error(_call(head, u, w, c), slow_prototype(head, u, w, c)) < 1e-5


@pytest.mark.parametrize("kind", ["prime", "dexa", "none"])
def test_label_embeddings_on_every_mesh(mesh, kind, seed):
    rng = np.random.default_rng(seed)
    texts, _, centroids = _inputs(rng)
    centroids[3] = 0  # a label that training has no query of
    clusters = rng.integers(0, NUM_VECTORS, NUM_LABELS).astype(np.int32)
    head = _lively_head(rng) if kind == "prime" else None
    vectors = None if kind == "none" else free_vectors(NUM_VECTORS, DIM, rngs=nnx.Rngs(seed))
    model = DualEncoder(None, head, vectors)  # labels come here embedded: no tower is asked
    got = np.asarray(jax.jit(DualEncoder.label_embeddings)(model, texts, clusters, centroids))
    expected = texts
    if vectors is not None:
        chosen = np.asarray(vectors[...])[clusters]
        expected = texts + chosen if head is None else slow_prototype(head, texts, chosen, centroids)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, normalised(expected), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


def test_each_input_matters_to_its_own_label_only(single_mesh, seed):
    rng = np.random.default_rng(seed)
    head, inputs = _lively_head(rng), _inputs(rng)
    before = np.asarray(_call(head, *inputs))
    for place in range(3):
        changed = [value.copy() for value in inputs]
        changed[place][5] += 1
        moved = np.abs(np.asarray(_call(head, *changed)) - before).max(1)
        assert moved[5] > 1e-3
        assert np.delete(moved, 5).max() < 1e-6


def test_dropout_needs_a_key(single_mesh, seed):
    rng = np.random.default_rng(seed)
    inputs, key = _inputs(rng), jax.random.key(seed)
    head = _lively_head(rng, dropout=0.5)
    call = jax.jit(lambda head, key: head(*inputs, dropout_key=key))
    without = np.asarray(call(head, None))
    np.testing.assert_array_equal(without, call(head, None))
    dropped = np.asarray(call(head, key))
    assert (np.abs(dropped - without).max(1) > 1e-3).all()
    np.testing.assert_array_equal(dropped, call(head, key))
    assert np.abs(dropped - np.asarray(call(head, jax.random.fold_in(key, 1)))).max() > 1e-3


def test_free_vectors_start_as_asked(single_mesh):
    bound = math.sqrt(6 / (NUM_VECTORS + DIM))
    table = np.asarray(free_vectors(NUM_VECTORS, DIM, rngs=nnx.Rngs(0))[...])
    assert table.shape == (NUM_VECTORS, DIM)
    assert 0.9 * bound < np.abs(table).max() <= bound
    assert not np.asarray(free_vectors(NUM_VECTORS, DIM, rngs=nnx.Rngs(0), init="zeros")[...]).any()


def test_heads_must_divide_the_dimensions(single_mesh):
    with pytest.raises(UserError, match=r"config\.prototype\.heads=7 .*give 4"):
        PrimeHead(DIM, heads=7, rngs=nnx.Rngs(0))
