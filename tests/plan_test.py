"""`vixml plan`: what it knows without compiling; a small run, and one on a small TPU slice, compiled."""

from __future__ import annotations

import importlib.util
import json

import compiled_bars
import jax
import pytest
import tiny

from vixml_jax import cli, plan, sharding
from vixml_jax.errors import UserError
from vixml_jax.planning import capacity, remedies
from vixml_jax.planning.abstract_run import Workload, abstract_run
from vixml_jax.planning.chips import CHIPS
from vixml_jax.planning.topology import topology

# ml_collections loads config files in a way that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def small_config():
    """128 wide, as a TPU fills narrower rows up; sizes that are no others of the model."""
    config = tiny.config("nowhere", images=1)
    config.text.checkpoint, config.text.train, config.text.remat = "random:minilm-tiny", "lora", "full"
    config.text.dtype, config.text.lora_rank = "bfloat16", 4
    config.prototype.free_vectors = 4096
    config.train.batch_size = 96
    return config


@pytest.fixture(scope="module")
def figures():
    config = small_config()
    config.mesh.fsdp = 2
    return plan.plan(config, Workload(100_000, 5000, 300, 8.0, 1.0), topology("cpu:4"))


def test_parts_of_the_memory(figures):
    step, encoding = figures["train"], figures["encode"]
    for program in (step, encoding):
        parts = dict(program["bytes_per_device"])
        assert parts.pop("total") == sum(parts.values())
    # Two tables of width 128, numbers beside them, four shards.
    rows = sharding.table_rows(100_000) + sharding.table_rows(5000)
    assert step["bytes_per_device"]["tables"] == rows * (128 + 1) * 4 // 4
    assert step["bytes_per_device"]["optimizer"] > 0 == encoding["bytes_per_device"]["optimizer"]
    assert figures["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}


def test_floors_and_hours(figures):
    step = figures["train"]
    assert figures["steps"] == step["calls"] == 3 * 53
    assert step["flops"] >= step["useful_flops"] + step["repeated_flops"] > 0
    sent = step["collective_bytes_per_device"]
    assert {"all-to-all", "reduce-scatter"} <= set(sent)  # token lookup and pooling
    for name in ("H100 SXM", "H200 SXM"):
        floor = step["floors"][name]
        chip = next(chip for chip in CHIPS.values() if chip.name == name)
        assert floor["matrix"] == pytest.approx(step["flops"] / 4 / chip.flops)
        assert floor["links"] == pytest.approx(sum(sent.values()) / chip.link_bandwidth)
        assert floor["seconds"] == max(floor["matrix"], floor["memory"], floor["links"])
        assert floor["hours"] == pytest.approx(floor["seconds"] * 159 / 3600)
        assert floor["fits"]
    assert figures["encode"]["calls"] == 2 * 3125 + 157 + 10


def test_what_is_known_without_compiling(figures):
    config = small_config()
    config.mesh.fsdp = 2
    workload = Workload(100_000, 5000, 300, 8.0, 1.0)
    known = plan.plan(config, workload, topology("cpu:4"), compiled=False)
    assert "not compiled" in plan.shown(known)
    for name in ("train", "encode"):
        compiled, sketch = figures[name], known[name]
        for part in ("parameters", "optimizer", "tables", "batch"):
            assert sketch["bytes_per_device"][part] == compiled["bytes_per_device"][part]
        assert sketch["useful_flops"] == compiled["useful_flops"]
        assert sketch["flops"] == pytest.approx(sketch["useful_flops"] + sketch["repeated_flops"])
        assert sketch["flops"] <= compiled["flops"]
        assert sketch["calls"] == compiled["calls"]


def test_what_a_person_reads(figures):
    lines = plan.shown(figures).splitlines()
    assert lines[0] == "random:minilm-tiny on cpu:4: 4 devices (data 2, fsdp 2, tensor 1)"
    assert lines[1] == "100,000 labels, 5,000 queries, batches of 96"
    assert any(line.split()[:2] == ["tables", "0.0136"] for line in lines)
    assert sum("4 x H" in line for line in lines) == 2
    assert json.loads(json.dumps(figures)) == figures


def test_the_command(figures, monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr(plan, "plan", lambda *arguments, compiled: seen.append(arguments) or figures)
    command = ["plan", "--config=configs/lf_amazontitles_1p3m.py:images=3", "--topology=cpu:4"]
    assert not cli.run([*command, f"--json={tmp_path / 'plan.json'}"])
    assert json.loads((tmp_path / "plan.json").read_text()) == figures
    assert "training step" in capsys.readouterr().out
    assert not cli.run([*command, "--json=-", "--labels=7", "--images=1.5"])
    assert json.loads(capsys.readouterr().out) == figures
    assert [workload for _, workload, _ in seen] == [
        Workload(1_305_265, 2_248_619, 970_237, 16.0, 3.0),
        Workload(7, 2_248_619, 970_237, 16.0, 1.5),
    ]


def test_sizes_of_a_prepared_dataset(tmp_path):
    from vixml_jax.prepare import prepare

    prepare(tiny.write_raw(tmp_path / "raw", seed=1, images=False), tmp_path / "own", "tiny")
    config = tiny.config(tmp_path / "own")
    assert plan.workload_of(config, None, None, None, None) == Workload(30, 96, 24, 8.0, 0.0)
    config.dataset.dir = str(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="give --labels=NUMBER --queries=NUMBER"):
        plan.workload_of(config, 30, None, None, None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "--topology=v5e; give v5e:4x4"),
        ("v9:4x4", "give v5e:4x4"),
        ("cpu:0", "give v5e:4x4"),
        ("gpu", "there is none here"),
    ],
)
def test_devices_that_are_not_there(name, message):
    with pytest.raises(UserError, match=message):
        topology(name)


def test_devices_are_counted_once_a_process():
    assert len(jax.devices()) == 8
    assert len(topology("cpu:4").devices) == 4
    with pytest.raises(UserError, match="cpu:64, but this process has 8 devices"):
        topology("cpu:64")


def test_without_the_tpu_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the TPU compiler; pip install 'vixml-jax\[plan\]'"):
        topology("v5e:4x4")


@pytest.mark.parametrize(
    "said",
    [
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 30.87G of 15.75G hbm. "
        "Exceeded hbm capacity by 15.12G.",
        "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(30.87G) exceeds available HBM (15.75G). HLO module: jit_step.",
    ],
)
def test_what_the_compiler_says_about_memory(said):
    found = capacity._does_not_fit(RuntimeError(f"RESOURCE_EXHAUSTED: {said}"))
    assert found is not None
    assert (found.needed, found.limit) == (30.87 * 2**30, 15.75 * 2**30)
    assert capacity._does_not_fit(RuntimeError(f"INTERNAL: {said}")) is None


def test_what_the_compiler_fails_of_keeps_its_cause(single_mesh, monkeypatch):
    """Who follows an error's causes to their end must come to one."""

    def fail(self, *_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: not implemented") from KeyError("deep inside")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    run = abstract_run(tiny.config("nowhere"), Workload(100, 200, 0, 8.0, 0.0), single_mesh)
    with pytest.raises(jax.errors.JaxRuntimeError, match="not implemented") as raised:
        capacity.plan_encoding(run, topology("cpu:1"))
    assert isinstance(raised.value.__cause__, KeyError)


def test_a_program_that_cannot_be_read(single_mesh, monkeypatch):
    """As when the TPU compiler is newer than jax."""

    def fail(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure proto.operand_ids_size() == *arity")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", fail)
    run = abstract_run(tiny.config("nowhere"), Workload(100, 200, 0, 8.0, 0.0), single_mesh)
    with pytest.raises(UserError, match="are not of one version; pip install"):
        capacity.plan_encoding(run, topology("cpu:1"))


def test_what_helps_is_tried():
    """Three changes, best first; together where none is enough."""
    config = small_config()
    config.text.remat, config.text.dtype = "none", "float32"
    saved = {
        "mesh.fsdp": {1: 0, 4: 6, 8: 10},
        "text.remat": {"none": 0, "full": 20},
        "train.chunk_rows": {0: 0, 32: 1, 8: 2},
    }

    def needed(changed):
        return 50.0 - sum(
            table[changed[key.split(".")[0]][key.split(".")[1]]] for key, table in saved.items()
        ) + (100 if changed.text.dtype == "bfloat16" else 0)  # fmt: skip

    first, second, third = remedies.find(config, 8, 32.0, needed)
    assert (first.changes, first.needed, first.fits) == ({"text.remat": "full"}, 30.0, True)
    assert second.changes == {"mesh.data": -1, "mesh.fsdp": 8}
    assert not second.fits
    assert third.changes == {"mesh.data": -1, "mesh.fsdp": 4}
    together = remedies.find(config, 8, 19.0, lambda c: needed(c) if c.text.dtype == "float32" else None)[0]
    assert together.changes == {
        **{"text.remat": "full", "mesh.data": -1, "mesh.fsdp": 8},
        **{"train.chunk_rows": 8},
    }
    assert together.fits
    assert together.flags.startswith("--config.text.remat=full --config.mesh.data=-1 --config.mesh.fsdp=8 ")
    assert config.text.remat == "none"


def test_a_config_that_does_not_fit_says_by_how_much(monkeypatch, capsys):
    config = small_config()

    def no_room(run, devices):
        raise capacity.DoesNotFit(20e9, 16e9)

    monkeypatch.setattr(capacity, "plan_step", no_room)
    with pytest.raises(UserError, match=r"needs 20\.00 GB a device, 4\.00 more than the 16\.00") as raised:
        plan.plan(config, Workload(3000, 5000, 300, 8.0, 1.0), topology("cpu:4"))
    assert "--config.mesh.data=-1 --config.mesh.fsdp=4: 20.00 GB, not enough alone" in str(raised.value)
    assert "trying --config.mesh.fsdp=4" in capsys.readouterr().err


@pytest.mark.slow
def test_labels_cost_memory_alone():
    steps = []
    for labels in (100_000, 100_000_000):
        config = small_config()
        config.mesh.fsdp = 2
        mesh = sharding.make_mesh(2, 2, 1, list(topology("cpu:4").devices))
        run = abstract_run(config, Workload(labels, 5000, 0, 8.0, 1.0), mesh)
        steps.append(capacity.plan_step(run, topology("cpu:4")))
    few, many = steps
    assert many.costs.flops == few.costs.flops
    assert many.costs.sent_by_kind() == few.costs.sent_by_kind()
    assert many.memory.total - many.memory.tables == few.memory.total - few.memory.tables


@pytest.mark.parametrize("fsdp", [1, 2, 8, 16, 64])
def test_any_mesh_lies_on_a_slice(fsdp):
    """Also one whose axes are not those of the slice."""
    pytest.importorskip("libtpu")
    devices = topology("v5p:4x4x4").devices
    mesh = sharding.make_mesh(-1, fsdp, 1, list(devices))
    assert dict(mesh.shape) == {"data": 64 // fsdp, "fsdp": fsdp, "tensor": 1}
    assert {device.id for device in mesh.devices.ravel()} == {device.id for device in devices}


def test_a_small_step_for_a_tpu_slice():
    """The compiler of TPUs takes the whole step, and its text holds no collective that must not be there."""
    pytest.importorskip("libtpu")
    devices = topology("v5e:2x2")
    config = small_config()
    mesh = sharding.make_mesh(-1, 2, 1, list(devices.devices))
    run = abstract_run(config, Workload(1_000_000, 2_000_000, 0, 8.0, 1.0), mesh)
    step = capacity.plan_step(run, devices)
    assert not compiled_bars.forbidden_collectives(run, step)
    assert step.costs.flops * 4 >= step.useful + step.repeated
    assert not compiled_bars.slow_matmuls(run, step)
    assert not compiled_bars.moved_weights(run, step)
    assert step.memory.activations < step.memory.tables / 2  # of no table is there a second one
    tables = jax.tree.leaves(run.state.tables)
    assert step.memory.tables == sum(table.size * 4 for table in tables) // 4


def test_why_there_is_no_gpu_is_said(monkeypatch):
    def none(_):
        raise RuntimeError("cuInit failed: the driver is too old\nand more")

    monkeypatch.setattr(jax, "devices", none)
    with pytest.raises(UserError, match=r"there is none here \(cuInit failed: the driver is too old\); give"):
        topology("gpu")
