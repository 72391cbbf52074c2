"""Costs read from the text of programs that XLA compiled here, against what is plain to see."""

from __future__ import annotations

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vixml_jax import sharding
from vixml_jax.planning import costs
from vixml_jax.planning.compiled_text import Program
from vixml_jax.planning.costs import costs_of


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return costs_of(Program(jax.jit(function).lower(*arguments).compile().as_text()))


def test_products_of_matrices():
    assert compiled(lambda a, b: a @ b, (96, 80), (80, 112)).flops == 2 * 96 * 80 * 112
    batched = compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (5, 96, 80), (5, 80, 112))
    assert batched.flops == 5 * 2 * 96 * 80 * 112


def test_a_loop_counts_as_often_as_it_runs():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    loop = compiled(layers, (64, 128), (7, 128, 128))
    assert loop.flops == 7 * 2 * 64 * 128 * 128
    # Each turn reads one layer, not the stack of them.
    assert 7 * 128 * 128 * 4 <= loop.traffic < 7 * (7 * 128 * 128 * 4)
    gradient = compiled(jax.grad(lambda x, w: layers(x, w).sum(), (0, 1)), (64, 128), (7, 128, 128))
    assert gradient.flops == 3 * loop.flops


def valid_products(size, kernel, out, stride, low, input_dilation, kernel_dilation):
    """Slowly, on the dilated input as it is written out."""
    there = np.zeros((size - 1) * input_dilation + 1, bool)
    there[::input_dilation] = True
    return sum(
        0 <= place < len(there) and there[place]
        for output in range(out)
        for k in range(kernel)
        for place in [output * stride - low + k * kernel_dilation]
    )


def test_positions_of_a_window():
    rng = np.random.default_rng(fresh.SESSION)
    for _ in range(200):
        size, kernel, out = rng.integers(1, 9, 3)
        stride, input_dilation, kernel_dilation = rng.integers(1, 4, 3)
        low = int(rng.integers(-3, 6))
        options = {"input_dilation": int(input_dilation), "kernel_dilation": int(kernel_dilation)}
        found = costs._valid_positions(
            int(size), int(kernel), int(out), stride=int(stride), low=low, **options
        )
        assert found == valid_products(size, kernel, out, stride, low, input_dilation, kernel_dilation)


CONVOLUTIONS = """HloModule m

ENTRY %main (a: bf16[8,16,32], b: bf16[8,32,64]) -> bf16[8,16,64] {
  %a = bf16[8,16,32]{2,1,0} parameter(0)
  %b = bf16[8,32,64]{2,1,0} parameter(1)
  %as_dot = bf16[8,16,64]{2,1,0} convolution(%a, %b), WINDOW, dim_labels=0bf_0io->0bf
  %w = bf16[32,64]{1,0} constant({...})
  ROOT %plain = bf16[8,16,64]{2,1,0} convolution(%a, %w), window={size=1}, dim_labels=0bf_io0->0bf
}
"""


def test_batches_written_as_convolutions():
    """TPUs have no batched product: the batch is a window that meets one place of the input at a time."""
    text = CONVOLUTIONS.replace("WINDOW", "window={size=8 stride=7 pad=0_0 lhs_dilate=8}")
    text = text.replace("bf16[32,64]{1,0} constant", "bf16[32,64,1]{1,0,2} constant")
    first, second = costs_of(Program(text)).matmuls
    assert first.flops == second.flops == 8 * 2 * 16 * 32 * 64
    assert first.dtypes == ("bf16", "bf16")
    assert first.dims == ((8, 16, 32), (8, 32, 64), (8, 16, 64))


def test_collectives(mesh):
    """What a device sends for each kind, by the algorithm that sends the least."""
    shards = sharding.num_row_shards(mesh)
    x = jax.ShapeDtypeStruct((64, 48), jnp.float32, sharding=sharding.rows(mesh, 2))
    local, rows = 64 * 48 * 4 // shards, P(sharding.ROWS)

    def sent(function, out=rows):
        run = jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=out, check_vma=False)
        found = costs_of(Program(jax.jit(run).lower(x).compile().as_text()))
        assert not found.flops
        (one,) = found.collectives
        assert one.group == (2 if one.kind == "collective-permute" else shards)
        assert found.sent_by_kind() == {one.kind: one.sent}
        return one.kind, one.sent, one.nbytes

    axes = sharding.ROWS
    gathered = sent(lambda x: jax.lax.all_gather(x, axes, tiled=True), P())
    assert gathered == ("all-gather", local * (shards - 1), local * shards)
    added = sent(lambda x: jax.lax.psum(x, axes), P())
    assert added == ("all-reduce", 2 * local * (shards - 1) / shards, local)
    swapped = sent(lambda x: jax.lax.all_to_all(x, axes, 0, 1, tiled=True), P(None, axes))
    assert swapped[:2] == ("all-to-all", local * (shards - 1) / shards)
    shift = [(i, (i + 1) % shards) for i in range(shards)]
    moved = sent(lambda x: jax.lax.ppermute(x, axes, shift))
    assert moved[:2] == ("collective-permute", local)


TPU_COLLECTIVES = """HloModule m, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input: f32[64,128]) -> f32[16,128] {
  %input = f32[64,128]{1,0} parameter(0)
  %all-reduce.3 = f32[64,128]{1,0} all-reduce(%input), replica_groups=[2,4]<=[8], to_apply=%add
  %place = u32[] partition-id()
  ROOT %kept = f32[16,128]{1,0} dynamic-slice(%all-reduce.3, %place, %place), dynamic_slice_sizes={16,128}
}

ENTRY %main (x: f32[64,128]) -> f32[64,128] {
  %x = f32[64,128]{1,0} parameter(0)
  %part = f32[16,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %start = (f32[16,128], f32[64,128]) all-gather-start(%part), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %whole = f32[64,128]{1,0} all-gather-done(%start)
}
"""


def test_collectives_in_the_form_of_tpus():
    scatter, gather = costs_of(Program(TPU_COLLECTIVES)).collectives
    assert (scatter.kind, scatter.group, scatter.nbytes) == ("reduce-scatter", 4, 64 * 128 * 4)
    assert scatter.sent == 64 * 128 * 4 * 3 / 4
    assert (gather.kind, gather.nbytes, gather.sent) == ("all-gather", 64 * 128 * 4, 16 * 128 * 4 * 3)


MESH_GROUPS = """HloModule m, num_partitions=256

%first (a: bf16[8,4]) -> bf16[128,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  ROOT %g = bf16[128,4]{1,0} all-gather(%a), channel_id=7, replica_groups=GROUPS, dimensions={0}
}

%second (b: bf16[8,4]) -> bf16[128,4] {
  %b = bf16[8,4]{1,0} parameter(0)
  ROOT %h = bf16[128,4]{1,0} all-gather(%b), channel_id=7, replica_groups=GROUPS, dimensions={0}
}

ENTRY %main (x: bf16[8,4]) -> bf16[128,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %start = bf16[128,4]{1,0} fusion(%x), kind=kCustom, calls=%first
  ROOT %end = bf16[128,4]{1,0} fusion(%x), kind=kCustom, calls=%second
}
"""


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("mesh['axis_0'=16,'axis_1'=16] {'axis_1'}", 16),
        ("mesh['data'=4,'fsdp'=64] {'data','fsdp'}", 256),
        ("mesh['data'=256] {'data':(4)8}", 8),
        ("mesh['a'=4,'b'=1,'c'=64], device_ids=([16,16]T(1,0)) {'a'}", 4),
        ("[16,16]<=[16,16]T(1,0)", 16),
        ("{}", 256),
    ],
)
def test_groups_and_collectives_in_pieces(groups, size):
    """Groups may be named by axes of a mesh; a collective beside several fusions stands in each of them."""
    (gather,) = costs_of(Program(MESH_GROUPS.replace("GROUPS", groups))).collectives
    assert gather.group == size
    assert gather.sent == 8 * 4 * 2 * (size - 1)


def test_traffic_of_lookups_and_updates_is_their_rows():
    table, rows = (100_000, 64), 4 * 32 * 64
    found = compiled(lambda t, x: jnp.take(t, jnp.arange(32), axis=0) * x, table, (32, 64))
    assert found.traffic < 8 * rows
    donated = jax.jit(lambda t, x: t.at[jnp.arange(32) * 3].set(x), donate_argnums=0)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (table, (32, 64))]
    assert costs_of(Program(donated.lower(*shapes).compile().as_text())).traffic < 16 * rows
