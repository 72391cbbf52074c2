"""LoRA against the formula on plain matrices, in torch, and against PEFT's file format."""

import json
import math

import jax
import numpy as np
import pytest
import torch
from comparison import relative_error
from flax import nnx
from safetensors.numpy import load_file, save_file

from vixml_jax import sharding
from vixml_jax.errors import UserError
from vixml_jax.models import hub, lora


@pytest.fixture(autouse=True)
def mesh():
    with sharding.use(sharding.make_mesh(devices=jax.devices()[:1])):
        yield


def hidden_states(tower, model, seed):
    """Ours and torch's, of the same tokens."""
    ids = np.random.default_rng(seed).integers(1, 99, (4, 9)).astype(np.int32)
    with torch.no_grad():
        theirs = model(torch.tensor(ids).long()).last_hidden_state.numpy()
    return np.asarray(tower(ids, np.ones(ids.shape, bool))), theirs


def shake(tower, seed):
    """Adapters that do something."""
    rng = np.random.default_rng(seed)
    for _, linear in lora.linears(tower):
        if linear.adapter is not None:
            b = linear.adapter.lora_b
            b.set_value(jax.numpy.asarray(rng.normal(size=b.get_value().shape) * 0.1, b.get_value().dtype))


def add_to_torch(model, directory):
    """Reads PEFT's files by hand and adds every product to its module's weight."""
    settings = json.loads((directory / lora.PEFT_CONFIG).read_text())
    r, alpha = settings["r"], settings["lora_alpha"]
    scale = alpha / r**0.5 if settings["use_rslora"] else alpha / r
    tensors = load_file(directory / lora.PEFT_WEIGHTS)
    modules = dict(model.named_modules())
    used = 0
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        module = modules[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")]
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        with torch.no_grad():
            module.weight += torch.tensor(b @ a) * scale
        used += 2
    assert used == len(tensors) > 0
    return set(settings["target_modules"])


@pytest.mark.parametrize(("rank", "least"), [(8, 4), (6, 1)])  # 6 does not divide by four places
def test_no_adapter_lies_whole_on_every_device(torch_model, rank, least):
    _, directory = torch_model("qwen2")
    with sharding.use(sharding.make_mesh(2, 4, 1)):
        tower = hub.load_text_tower(str(directory))
        lora.attach(tower, lora.LoraConfig(rank=rank, alpha=8.0), rngs=nnx.Rngs(0))
        parts = {}
        for path, linear in lora.linears(tower):
            for name in ("lora_a", "lora_b"):
                value = getattr(linear.adapter, name).get_value()
                whole, part = value.size, np.prod(value.sharding.shard_shape(value.shape))
                parts[path[-1], name] = whole // part
    assert len(parts) == 14
    assert min(parts.values()) == least
    assert parts["down_proj", "lora_a"] == parts["gate_proj", "lora_b"] == least
    assert parts["gate_proj", "lora_a"] == 4


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("qwen2", lora.LoraConfig(rank=4, alpha=8.0)),
        ("distilbert", lora.LoraConfig(3, 6.0, rank_stabilised=False, targets=("q_proj", "v_proj"))),
    ],
)
def test_an_adapted_tower_is_torch_with_the_product_added(torch_model, seed, tmp_path, name, config):
    model, directory = torch_model(name)
    tower = hub.load_text_tower(str(directory))
    plain = hidden_states(tower, model, seed)[0]
    lora.attach(tower, config, rngs=nnx.Rngs(seed))
    np.testing.assert_array_equal(plain, hidden_states(tower, model, seed)[0])  # it adds nothing yet
    shake(tower, seed)
    lora.write_peft(tower, config, tmp_path, str(directory))
    modules = add_to_torch(model, tmp_path)
    assert len(modules) == len({path[-1] for path, linear in lora.linears(tower) if linear.adapter})
    ours, theirs = hidden_states(tower, model, seed)
    assert relative_error(ours, plain) > 1e-2
    assert relative_error(ours, theirs) < 1e-5

    again = hub.load_text_tower(str(directory))
    read = lora.attach_peft(again, tmp_path)
    assert (read.rank, read.scale, set(read.targets) - set(config.targets)) == (
        config.rank,
        config.scale,
        set(),
    )
    np.testing.assert_array_equal(ours, hidden_states(again, model, seed)[0])
    lora.merge(tower)
    assert not any(linear.adapter for _, linear in lora.linears(tower))
    assert relative_error(hidden_states(tower, model, seed)[0], theirs) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        *({"r": rank} for rank in ("x", None, [4], 0, -1, 2.5, True, 10**400)),
        *({"lora_alpha": alpha} for alpha in ("x", None, [8], True, math.nan, math.inf, 10**400)),
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_field_of_an_adapter_that_cannot_be_meant_is_said(changes, tmp_path):
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0, **changes}
    (tmp_path / lora.PEFT_CONFIG).write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rf"adapter_config\.json: {next(iter(changes))}=.*give a "):
        lora.attach_peft(None, tmp_path)


def test_an_adapter_of_nothing_is_refused(tmp_path):
    (tmp_path / lora.PEFT_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4.0}))
    save_file({}, tmp_path / lora.PEFT_WEIGHTS)
    with pytest.raises(UserError, match="holds no adapter"):
        lora.attach_peft(hub.load_text_tower("random:bert-tiny", vocab_size=99), tmp_path)


def test_what_does_not_fit_is_refused(tmp_path):
    tower = hub.load_text_tower("random:qwen2-tiny", vocab_size=99)
    with pytest.raises(UserError, match="names query"):
        lora.attach(tower, lora.LoraConfig(targets=("query", "q_proj")), rngs=nnx.Rngs(0))
    config = lora.LoraConfig(rank=2, targets=("gate_proj",))
    tower = hub.load_text_tower("random:qwen2-tiny", vocab_size=99)
    lora.attach(tower, config, rngs=nnx.Rngs(0))
    lora.write_peft(tower, config, tmp_path, "base")
    encoder = hub.load_text_tower("random:bert-tiny", vocab_size=99)
    with pytest.raises(UserError, match=r"no place for layers\.0\.mlp\.gate_proj"):
        lora.attach_peft(encoder, tmp_path)
    settings = json.loads((tmp_path / lora.PEFT_CONFIG).read_text())
    (tmp_path / lora.PEFT_CONFIG).write_text(json.dumps({**settings, "use_dora": True}))
    with pytest.raises(UserError, match="use_dora=True is not supported"):
        lora.attach_peft(hub.load_text_tower("random:qwen2-tiny", vocab_size=99), tmp_path)
