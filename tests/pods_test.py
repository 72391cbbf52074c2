"""Steps of the paper's towers compiled for whole TPU pods, none of which is needed: `make test-pods`.

1.3 million labels, three pictures an item; the cases of docs/scaling.md.
"""

from __future__ import annotations

import compiled_bars
import pytest

from vixml_jax import recipes, sharding
from vixml_jax.planning import capacity
from vixml_jax.planning.abstract_run import Workload, abstract_run
from vixml_jax.planning.topology import topology

pytestmark = pytest.mark.pods
SLICES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:16x16")
BACKBONES = ("distilbert", "qwen2.5-0.5b", "qwen2.5-3b", "qwen2.5-7b")
BATCHES = (2048, 16_384)


@pytest.mark.parametrize("batch_size", BATCHES)
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", SLICES)
def test_a_step_fits_and_holds_nothing_forbidden(name, backbone, batch_size):
    pytest.importorskip("libtpu")
    devices = topology(name)
    config = recipes.get_config("lf_amazontitles_1p3m", f"backbone={backbone},images=3")
    config.train.batch_size = batch_size
    if backbone != "distilbert" and (name, batch_size) == ("v5e:4x4", 16_384):
        config.train.chunk_rows = 16  # a thousand queries a chip
    # A small model wants none, where it fits: docs/scaling.md.
    is_whole = backbone == "distilbert" or (backbone == "qwen2.5-0.5b" and name == "v5p:4x4x4")
    mesh = sharding.make_mesh(-1, 1 if is_whole else 16, 1, list(devices.devices))
    run = abstract_run(config, Workload(1_305_265, 2_248_619, 0, 16.0, 3.0), mesh)
    step = capacity.plan_step(run, devices)
    assert step.memory.total < devices.chip.memory
    assert not compiled_bars.forbidden_collectives(run, step)
    assert not compiled_bars.slow_matmuls(run, step)
    # What is turned once a step, as docs/scaling.md says: the token table for its lookup, where a chip's
    # columns are no multiple of 128, and on v5p what a chip has of the free vectors.
    known = ("word_embeddings", "(152064,", f"({run.spec.num_vectors // mesh.devices.size},")
    moved = compiled_bars.moved_weights(run, step)
    assert not [line for line in moved if not any(name in line for name in known)]
    # Useful operations and what remat repeats, and what the rows of a batch have room for.
    assert 0.98 <= compiled_bars.waste(run, step) < 1.15
