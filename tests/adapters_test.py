"""A decoder with LoRA from training to prediction and export: its base never changes and is never copied."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers
from export_test import assert_same_model, write_qwen_tokenizer
from flax import nnx
from orbax.checkpoint import v1 as ocp

from vixml_jax import XmcModel, cli, data, sharding
from vixml_jax import run as run_lib
from vixml_jax.errors import UserError
from vixml_jax.export import export
from vixml_jax.models import hub, lora
from vixml_jax.prepare import prepare
from vixml_jax.train import train

pytestmark = pytest.mark.usefixtures("single_mesh")
RANK = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Qwen2 in a Hugging Face directory, with a tokenizer as Qwen's."""
    directory = tmp_path_factory.mktemp("base") / "qwen2"
    torch.manual_seed(0)
    shape = transformers.Qwen2Config(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(shape).save_pretrained(directory)
    write_qwen_tokenizer(directory / "tokenizer")
    (directory / "tokenizer" / "tokenizer.json").rename(directory / "tokenizer.json")
    return directory


def lora_config(dataset, base):
    config = tiny.config(dataset, images=1)
    config.text.checkpoint, config.text.train = str(base), "lora"
    config.text.max_tokens = 24
    config.train.row_length = 64
    config.text.lora_rank, config.text.lora_alpha = RANK, 16.0
    config.optimizer.lr, config.optimizer.clip_norm = 5e-3, 1.0
    config.train.epochs = 8
    return config


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    prepare(tiny.write_raw(root / "raw", seed=3), root / "dataset", "tiny")
    return root / "dataset"


@pytest.fixture(scope="module")
def trained(dataset, base, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with tiny.only_devices(1):
        train(lora_config(dataset, base), workdir)
    return workdir


def load(workdir):
    with sharding.ensure() as mesh:
        return run_lib.load_model(workdir, mesh)


def flat(state):
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def test_it_learns(trained):
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert json.loads((trained / "metrics.json").read_text())["P@1"] > 3 * 100 * 2 / 30


def test_a_checkpoint_holds_adapters_and_no_base(trained):
    step = max(int(path.name) for path in (trained / "checkpoints").iterdir() if path.name.isdigit())
    held = ocp.checkpointables_metadata(trained / "checkpoints" / str(step)).metadata["params"]
    names = {".".join(str(getattr(k, "key", k)) for k in path) for path, _ in jax.tree.leaves_with_path(held)}
    tower = {name for name in names if name.startswith("tower.text.")}
    assert tower
    assert all("lora_a" in name or "lora_b" in name for name in tower)
    assert any(name.startswith("head.") for name in names)


def test_the_base_is_bit_identical(trained, base):
    with sharding.ensure():
        tower = hub.load_text_tower(str(base))
    before = {f"tower.text.{name}": value for name, value in flat(nnx.split(tower)[1]).items()}
    model = load(trained)
    kept = flat(model.frozen)
    assert before.keys() == {name for name in kept if name.startswith("tower.text.")}
    for name, value in before.items():
        np.testing.assert_array_equal(value, kept[name], err_msg=name)
    adapters = {name: value for name, value in flat(model.params).items() if "lora_b" in name}
    assert len(adapters) == len(lora.TARGETS)
    assert all(np.abs(value).max() > 0 for value in adapters.values())


def test_the_prompt_stands_around_every_item(trained):
    model = load(trained)
    shown = model.layout.label.parts
    decode = model.tokenizer._backend.decode
    words = [
        part.content if part.tokens is None else decode(part.tokens.tolist(), skip_special_tokens=False)
        for part in shown
    ]
    assert words == ["This product text", "text", "and its image", "images", "<|endoftext|>"]
    assert [part.with_images for part in shown] == [False, False, True, False, False]


def test_it_predicts_as_it_was_evaluated(trained, dataset):
    test = data.load(dataset).test
    queries = XmcModel.load(trained).encode_queries(test.texts, [list(pictures) for pictures in test.images])
    np.testing.assert_allclose(queries, np.load(trained / "embeddings" / "test.npy"), atol=2e-3)


def test_it_is_exported_in_one_and_alone(trained, base, tmp_path, capsys):
    export(trained, tmp_path / "hf")
    assert_same_model(trained, tmp_path / "hf", "mean")
    assert cli.run(["export", f"--workdir={trained}", f"--out={tmp_path / 'adapter'}", "--adapter"]) == 0
    settings = json.loads((tmp_path / "adapter" / lora.PEFT_CONFIG).read_text())
    assert (settings["r"], settings["base_model_name_or_path"]) == (RANK, str(base))
    model = load(trained)
    with sharding.ensure():
        tower = hub.load_text_tower(str(base))
        lora.attach_peft(tower, tmp_path / "adapter")
    read = {f"tower.text.{name}": value for name, value in flat(nnx.split(tower)[1]).items()}
    for name, value in flat(model.params).items():
        if name.startswith("tower.text."):
            np.testing.assert_array_equal(value, read[name], err_msg=name)


def test_a_run_starts_from_an_adapter(trained, dataset, base, tmp_path):
    export(trained, tmp_path / "adapter", part="adapter")
    config = lora_config(dataset, base)
    config.text.adapter = str(tmp_path / "adapter")
    config.train.epochs = 0
    for kind in ("lora", "none"):  # kept apart, merged
        config.text.train = kind
        with tiny.only_devices(1):
            train(config, tmp_path / kind)
    texts = ["kettle number 3", "rug"]
    expected = XmcModel.load(trained).encode_queries(texts)
    (tmp_path / "adapter").rename(tmp_path / "moved")
    got = XmcModel.load(tmp_path / "lora").encode_queries(texts)  # its adapters are in its checkpoint
    np.testing.assert_allclose(got, expected, atol=1e-5)
    (tmp_path / "moved").rename(tmp_path / "adapter")
    for kind in ("lora", "none"):
        got = XmcModel.load(tmp_path / kind).encode_queries(texts)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_another_base_under_the_adapters_is_refused(trained, dataset, base):
    file = base / "model.safetensors"
    weights = file.read_bytes()
    file.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    before = (trained / "model.json").read_text()
    try:
        with pytest.raises(UserError, match="have changed since"):
            load(trained)
        with pytest.raises(UserError, match="have changed since"), tiny.only_devices(1):
            train(lora_config(dataset, base), trained)
    finally:
        file.write_bytes(weights)
    assert (trained / "model.json").read_text() == before
