"""The blocks towers are made of: linear maps, embeddings, norms, GELU, and stacks of layers.

Every parameter carries logical axis names (`sharding.LOGICAL_RULES`). Kernels are 2-D and lie (in, out);
splitting into heads happens where attention needs it, so that adapters and export see plain matrices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from vixml_jax import sharding

Initializer = Callable[..., jax.Array]
Layer = TypeVar("Layer", bound=nnx.Module)

# Embedding tables are padded to a multiple of this many rows: any power of two up to it can shard them.
VOCAB_MULTIPLE = 128

# Up to so many layers the loop is unrolled: a step is up to a fifth faster on CPUs, and still compiles fast.
UNROLLED_LAYERS = 12

# Name under which rematerialisation may keep the output of a linear map.
LINEAR = "linear"

normal_init: Initializer = nnx.initializers.normal(0.02)  # BERT, Devlin et al. 2019, as released


def param(
    rngs: nnx.Rngs, init: Initializer, shape: tuple[int, ...], axes: tuple[str, ...], dtype: DTypeLike
) -> nnx.Param:
    """Makes a parameter with logical axis names, one for each dimension."""
    return nnx.Param(init(rngs.params(), shape, dtype), out_sharding=axes)


def einsum(subscripts: str, a: jax.Array, b: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """`jnp.einsum` of two operands in the dtype of `a`, accumulated in float32, forwards and backwards.

    Plain differentiation would multiply float32 cotangents with bfloat16 operands, and bfloat16 results are
    a slow path on CPUs: this way all three products of a linear map take the fast one.

    Args:
      subscripts: every letter stands in at least two of the three terms; no ellipsis.
      a: its dtype is that of the products.
      b: cast to it; its gradient comes in its own dtype, unrounded where that is float32.
      out_dtype: of the result; None for the dtype of `a`.
    """
    return _einsum(subscripts, a, b, out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _einsum(subscripts: str, a: jax.Array, b: jax.Array, out_dtype: DTypeLike | None) -> jax.Array:
    product = jnp.einsum(subscripts, a, b.astype(a.dtype), preferred_element_type=jnp.float32)
    return product.astype(out_dtype or a.dtype)


def _einsum_forward(
    subscripts: str, a: jax.Array, b: jax.Array, out_dtype: DTypeLike | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _einsum(subscripts, a, b, out_dtype), (a, b)


def _einsum_backward(
    subscripts: str, out_dtype: DTypeLike | None, operands: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del out_dtype
    a, b = operands
    terms, out = subscripts.split("->")
    first, second = terms.split(",")
    g = cotangent.astype(a.dtype)
    a_gradient = einsum(f"{out},{second}->{first}", g, b, None)
    if b.ndim == 2 and b.shape[0] > b.shape[1]:
        # A CPU's matrix product has one of these operands transposed: here the narrower one. Of an MLP's
        # second map the wide one is what GELU gives, which XLA would compute a second time to transpose it.
        # The barrier keeps it from turning the product over again.
        turned: Any = jax.lax.optimization_barrier(einsum(f"{out},{first}->{second[::-1]}", g, a, b.dtype))
        return a_gradient, turned.T
    return a_gradient, einsum(f"{first},{out}->{second}", a, g, b.dtype)


_einsum.defvjp(_einsum_forward, _einsum_backward)


class Adapter(nnx.Module):
    """Low-rank addition to a linear map: `x @ lora_a @ lora_b * scale` (LoRA, Hu et al. 2022).

    Args:
      lora_a: [..., in, rank]; leading axes where layers are stacked.
      lora_b: [..., rank, out].
      scale: alpha / rank, or alpha / sqrt(rank) when rank-stabilised.
    """

    def __init__(self, lora_a: nnx.LoRAParam, lora_b: nnx.LoRAParam, scale: float):
        self.lora_a, self.lora_b, self.scale = lora_a, lora_b, scale

    def __call__(self, x_Bi: jax.Array) -> jax.Array:
        """Maps [..., in] to [..., out] in the dtype of `x`."""
        leading = "abc"[: x_Bi.ndim - 1]
        x_Br = einsum(f"{leading}i,ir->{leading}r", x_Bi, self.lora_a[...])
        # Scaled where it is narrow.
        return einsum(f"{leading}r,ro->{leading}o", x_Br * self.scale, self.lora_b[...])


class Linear(nnx.Module):
    """`x @ kernel + bias`, and an adapter's addition where one is attached (`lora.attach`).

    Args:
      in_dim: size of the last axis of the input.
      out_dim: size of the last axis of the output.
      axes: logical axes of the kernel, (in, out).
      bias: whether there is one.
      dtype: of the computation.
      param_dtype: of the stored parameters.
      init: initialiser of the kernel.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        axes: tuple[str, str],
        rngs: nnx.Rngs,
        bias: bool = True,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        init: Initializer = normal_init,
    ):
        self.kernel = param(rngs, init, (in_dim, out_dim), axes, param_dtype)
        self.bias = param(rngs, nnx.initializers.zeros, (out_dim,), axes[1:], param_dtype) if bias else None
        self.adapter: Adapter | None = nnx.data(None)
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., in] to [..., out] in the compute dtype."""
        leading = "abc"[: x.ndim - 1]
        x = x.astype(self.dtype)
        y = einsum(f"{leading}i,io->{leading}o", x, self.kernel[...])
        if self.adapter is not None:
            y += self.adapter(x)
        y = checkpoint_name(y, LINEAR)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation (Ba et al. 2016); statistics in float32, output in `dtype`."""

    def __init__(
        self,
        dim: int,
        *,
        rngs: nnx.Rngs,
        eps: float,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.scale = param(rngs, nnx.initializers.ones, (dim,), ("norm",), param_dtype)
        self.bias = param(rngs, nnx.initializers.zeros, (dim,), ("norm",), param_dtype)
        self.eps = eps
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis."""
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        y = centred * inverse * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(self.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019), in float32.

    Args:
      dim: size of the last axis.
      eps: added to the mean square.
      offset: added to the stored scale; 1.0 for Gemma, whose stored scale is around zero.
    """

    def __init__(
        self,
        dim: int,
        *,
        rngs: nnx.Rngs,
        eps: float,
        offset: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        init = nnx.initializers.constant(1.0 - offset)
        self.scale = param(rngs, init, (dim,), ("norm",), param_dtype)
        self.eps = eps
        self.offset = offset
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis."""
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * inverse * (self.scale[...].astype(jnp.float32) + self.offset)).astype(self.dtype)


class Embed(nnx.Module):
    """A token table, sharded over vocabulary and model dimension.

    The table is padded to a multiple of VOCAB_MULTIPLE rows; nothing looks the padding up.
    """

    def __init__(
        self,
        num: int,
        dim: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        init: Initializer = normal_init,
    ):
        rows = sharding.round_up(num, VOCAB_MULTIPLE)
        self.embedding = param(rngs, init, (rows, dim), ("vocab", "embed"), param_dtype)
        self.num = num
        self.dtype = jnp.dtype(dtype)

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        """Looks up int32 [B, T]; returns [B, T, D] in the compute dtype."""
        return lookup(self.embedding[...].astype(self.dtype), ids_BT)


def lookup(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Looks ids, split over the batch axes, up in a table that lies ("vocab", "embed") on the mesh.

    Left to automatic partitioning, the lookup all-reduces the whole global activation. Here each device looks
    the ids of its whole fsdp group up in its own columns and trades columns for rows: the traffic is the
    size of the local activation.

    Args:
      table_VD: [V, D].
      ids_BT: int32 [B, T], in [0, V).

    Returns:
      [B, T, D].
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else math.prod(mesh.shape.get(axis, 1) for axis in sharding.ROWS)
    fsdp, tensor = (1, 1) if mesh.empty else (mesh.shape.get("fsdp", 1), mesh.shape.get("tensor", 1))
    fits = table_VD.shape[0] % tensor == 0 and table_VD.shape[1] % fsdp == 0
    if shards * tensor == 1 or ids_BT.shape[0] % shards or not fits:
        return jnp.take(table_VD, ids_BT, axis=0, mode="clip")

    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        ids = jax.lax.all_gather(ids, "fsdp", axis=0, tiled=True)
        ids = ids - jax.lax.axis_index("tensor") * table.shape[0]
        found = (ids >= 0) & (ids < table.shape[0])
        rows = jnp.where(found[..., None], jnp.take(table, ids, axis=0, mode="clip"), 0)
        rows = jax.lax.all_to_all(rows, "fsdp", split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(rows, "tensor")

    return jax.shard_map(
        local, in_specs=(P("tensor", "fsdp"), P(sharding.ROWS, None)), out_specs=P(sharding.ROWS, None, None)
    )(table_VD, ids_BT)


def small_lookup(table_ND: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table small enough for every device to hold whole while it is read."""
    return jnp.take(constrain(table_ND, None, None), ids, axis=0, mode="clip")


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Pins an activation's sharding; leaves it alone where no mesh is set or a dimension does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or math.prod(mesh.shape.values()) == 1:
        return x
    spec = sharding.spec(*logical_axes)
    for size, axes in zip(x.shape, spec, strict=True):
        names = (axes,) if isinstance(axes, str) else axes or ()
        if size % math.prod(mesh.shape[name] for name in names):
            return x
    return jax.lax.with_sharding_constraint(x, spec)


def _gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """GELU and its derivative from one exponential.

    erf by Abramowitz & Stegun 7.1.26, whose error is below 1.5e-7; its exponential is also the density's.
    """
    z = jnp.abs(x) * math.sqrt(0.5)
    t = 1.0 / (1.0 + 0.3275911 * z)
    bell = jnp.exp(-z * z)
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    upper = 0.5 * tail * bell  # 1 - Phi(|x|)
    cdf = jnp.where(x < 0, upper, 1.0 - upper)
    return x * cdf, cdf + x * bell * (1.0 / math.sqrt(2.0 * math.pi))


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """GELU x * Phi(x) (Hendrycks & Gimpel 2016), within 1e-6 of the one with erf; float32 inside.

    Its derivative is saved by the forward pass instead of being computed again from x.
    """
    return _gelu_and_slope(x.astype(jnp.float32))[0].astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (x_dot,) = primals, tangents
    y, slope = _gelu_and_slope(x.astype(jnp.float32))
    return y.astype(x.dtype), slope.astype(x.dtype) * x_dot


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Mlp(nnx.Module):
    """Two linear maps with an activation between them.

    Args:
      dim: model dimension D.
      hidden_dim: F.
      activation: a key of ACTIVATIONS.
      gated: whether the activation goes to a third map, which multiplies the first (Shazeer 2020).
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: str,
        rngs: nnx.Rngs,
        bias: bool = True,
        gated: bool = False,
        **options: Any,
    ):
        options.update(bias=bias, rngs=rngs)
        self.up_proj = Linear(dim, hidden_dim, axes=("embed", "mlp"), **options)
        self.gate_proj = Linear(dim, hidden_dim, axes=("embed", "mlp"), **options) if gated else None
        self.down_proj = Linear(hidden_dim, dim, axes=("mlp", "embed"), **options)
        self.activation = activation

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps [..., D] to [..., D]."""
        activate = ACTIVATIONS[self.activation]
        up_BTF = self.up_proj(x_BTD)
        if self.gate_proj is None:
            return self.down_proj(activate(up_BTF))
        return self.down_proj(activate(self.gate_proj(x_BTD)) * up_BTF)


def stack_layers(make: Callable[[nnx.Rngs], Layer], num: int, rngs: nnx.Rngs) -> Layer:
    """Makes `num` layers as one module whose parameters have a leading axis "layers"."""
    layers = nnx.vmap(make, in_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})(
        rngs.split(num) if hasattr(rngs, "split") else rngs
    )
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    for variable in jax.tree.leaves(layers, is_leaf=is_variable):
        axes = variable.get_metadata().get("out_sharding")
        if axes and len(axes) == variable.get_value().ndim - 1:  # tree mode leaves metadata as it was
            variable.set_metadata("out_sharding", ("layers", *axes))
    return layers


# What the backward pass keeps of a layer; None keeps everything.
_REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR),
}


def run_layers(
    layers: nnx.Module,
    x_BTD: jax.Array,
    apply: Callable[..., jax.Array],
    *,
    per_layer: Any = None,
    remat: str = "none",
) -> jax.Array:
    """Runs stacked layers one after the other with `jax.lax.scan`, unrolled where there are few.

    Args:
      layers: what `stack_layers` made.
      x_BTD: input of the first layer.
      apply: (layer, x_BTD, extra) -> x_BTD.
      per_layer: pytree of arrays with a leading axis "layers", handed to `apply` a layer at a time.
      remat: what the backward pass computes again: "none", "dots" (keeps the outputs of linear maps), "full".

    Returns:
      Output of the last layer, [B, T, D].
    """

    def body(x: jax.Array, layer_and_extra: tuple[nnx.Module, Any]) -> tuple[jax.Array, None]:
        layer, extra = layer_and_extra
        return constrain(apply(layer, x, extra), "batch", "length", None), None

    if remat != "none":
        body = jax.checkpoint(body, policy=_REMAT_POLICIES[remat], prevent_cse=False)
    # Unrolled, the compiler would recognise what is computed twice, and keep it after all.
    unroll = remat == "none" and jax.tree.leaves(layers)[0].shape[0] <= UNROLLED_LAYERS
    return jax.lax.scan(body, x_BTD, (layers, per_layer), unroll=unroll)[0]
