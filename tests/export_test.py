from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import tokenizers
from flax import nnx
from safetensors.numpy import load_file

from vixml_jax import XmcModel, cli, sharding
from vixml_jax import run as run_lib
from vixml_jax.checkpoint import Checkpointer
from vixml_jax.data import packing
from vixml_jax.errors import UserError
from vixml_jax.export import MARKER, Tensor, export, write_safetensors
from vixml_jax.models import hf_names, hub
from vixml_jax.models.hf_layouts import Same
from vixml_jax.prepare import prepare
from vixml_jax.train import train
from vixml_jax.train_state import create

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

pytestmark = pytest.mark.usefixtures("single_mesh")  # training has more devices than reading, as it should

FAMILIES = {
    "bert": ("random:bert-tiny", "mean"),
    "distilbert": ("random:distilbert", "mean"),
    "qwen2": ("random:qwen2-tiny", "last"),
    "qwen3": ("random:qwen3-tiny", "mean"),
    "llama": ("random:llama-tiny", "last"),
    "gemma3_text": ("random:gemma3-tiny", "last"),
}
TEXTS = [
    "kettle number 3",
    "LAMP",
    "",
    "a very long text about chairs, clocks, mugs and rugs " * 8,
    "Éclair zebra 42",
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    prepare(tiny.write_raw(root / "raw", seed=2), root / "dataset", "tiny")
    return root / "dataset"


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A trained run with pictures."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    config = tiny.config(dataset, images=2)
    config.train.epochs = 2
    train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def exported(trained):
    out = trained.parent / "hf"
    export(trained, out)
    return out


@pytest.fixture
def untrained(dataset, tmp_path, request):
    """A run of one family whose checkpoint holds its first weights, moved a little; its export beside it."""
    checkpoint, pooling = FAMILIES[request.param]
    config = tiny.config(dataset)
    config.text.checkpoint, config.text.pooling, config.text.layers = checkpoint, pooling, 1
    if request.param != "distilbert":
        config.text.layers = 2
    workdir = tmp_path / "run"
    with sharding.ensure() as mesh:
        run_lib.begin(config, workdir)
        if request.param == "qwen2":
            write_qwen_tokenizer(workdir / "tokenizer")
        run, params = run_lib.start(config, run_lib.open_dataset(config), workdir, mesh)
        keys = nnx.Rngs(3)
        params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(keys(), x.shape), params)
        tables = jax.tree.map(
            lambda table: jnp.zeros(table.shape, table.dtype, device=table.sharding),
            run_lib.tables_of(run.spec, mesh),
        )
        state = create(params, optax.sgd(0.1), tables, mesh)
        with Checkpointer(workdir) as checkpointer:
            checkpointer.save(state, 0)
    export(workdir, tmp_path / "hf")
    return workdir, tmp_path / "hf"


def write_qwen_tokenizer(directory):
    """A byte-level vocabulary as Qwen's: for its towers AutoTokenizer takes no other kind."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    learned = json.loads(backend.to_str())["model"]
    qwen = transformers.Qwen2Tokenizer(learned["vocab"], [tuple(pair) for pair in learned["merges"]])
    directory.mkdir()
    (directory / "tokenizer.json").write_text(qwen.backend_tokenizer.to_str())


def tower_of(workdir):
    """The run's text tower, as its checkpoint has it."""
    with sharding.ensure() as mesh:
        model = run_lib.load_model(workdir, mesh)
        return nnx.merge(model.graphdef, model.params, model.frozen).tower.text


def hf_hidden(out, tokens):
    model = transformers.AutoModel.from_pretrained(out).eval()
    with torch.no_grad():
        return model(**tokens).last_hidden_state.numpy()


def assert_same_model(workdir, out, pooling):
    """The export does what the run does: same tokens, same hidden states, same embeddings."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    tokens = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    ids, mask = tokens["input_ids"].numpy(), tokens["attention_mask"].numpy().astype(bool)
    with sharding.ensure() as mesh:
        run = run_lib.load_model(workdir, mesh)
    values, lengths = run.layout.tokenizer(run.tokenizer).encode_batch(TEXTS, run.config.text.max_tokens)
    read = packing.assemble(values, lengths, run.layout.query)
    assert mask.sum(1).tolist() == read.lengths.tolist()
    assert ids[mask].tolist() == read.token_ids.tolist()

    theirs = hf_hidden(out, tokens)
    hidden = np.asarray(tower_of(workdir)(ids, mask))
    scale = np.abs(hidden[mask]).max()
    np.testing.assert_allclose(theirs[mask] / scale, hidden[mask] / scale, atol=1e-5)

    if pooling == "mean":
        pooled = (theirs * mask[..., None]).sum(1) / np.maximum(mask.sum(1), 1)[:, None]
    else:
        pooled = theirs[np.arange(len(TEXTS)), np.maximum(mask.sum(1) - 1, 0)]
    pooled[mask.sum(1) == 0] = 0
    pooled /= np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
    np.testing.assert_allclose(pooled, XmcModel.load(workdir).encode_queries(TEXTS), atol=1e-5)


def test_transformers_reads_a_trained_run(trained, exported):
    assert_same_model(trained, exported, "mean")


@pytest.mark.parametrize("untrained", FAMILIES, indirect=True)
def test_every_family_goes_both_ways(untrained, request):
    workdir, out = untrained
    assert json.loads((out / "config.json").read_text())["model_type"] in request.node.name
    pooling = json.loads((workdir / "config.json").read_text())["text"]["pooling"]
    assert_same_model(workdir, out, pooling)
    assert_bit_exact(out, tower_of(workdir))


def assert_bit_exact(out, tower):
    read = hub.load_text_tower(str(out))
    write_config = hf_names.TEXT_FAMILIES[tower.config.family].write_config
    assert write_config(read.config) == write_config(tower.config)
    mine, its = (nnx.to_flat_state(nnx.split(t)[1]) for t in (tower, read))
    assert [path for path, _ in mine] == [path for path, _ in its]
    for (path, a), (_, b) in zip(mine, its, strict=True):
        a, b = np.asarray(a[...]), np.asarray(b[...])
        if path[0] == "word_embeddings":  # what fills the table up to its padded size is not exported
            a, b = a[: tower.config.vocab_size], b[: tower.config.vocab_size]
        np.testing.assert_array_equal(a, b, err_msg=str(path))


def test_what_is_exported_is_read_back_bit_by_bit(trained, exported):
    assert_bit_exact(exported, tower_of(trained))


def test_many_small_files_of_many_devices_are_one_large_one(trained, exported, tmp_path):
    with sharding.use(sharding.make_mesh(2, 2, 2)):
        export(trained, tmp_path / "hf", max_shard_gb=2e-5)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    one = load_file(exported / "model.safetensors")
    many = {}
    for name in names:
        part = load_file(tmp_path / "hf" / name)
        assert {key for key, place in index["weight_map"].items() if place == name} == part.keys()
        assert len(part) == 1 or sum(value.nbytes for value in part.values()) <= 20_000
        many |= part
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in one.values())
    assert one.keys() == many.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, many[name])
    assert_bit_exact(tmp_path / "hf", tower_of(trained))


def test_bfloat16_rounds(trained, exported, tmp_path):
    export(trained, tmp_path / "hf", dtype="bfloat16")
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    full = transformers.AutoModel.from_pretrained(exported).state_dict()
    for name, value in model.state_dict().items():
        if not name.startswith("pooler"):  # not in the files, and so random
            assert torch.equal(value, full[name].to(value.dtype)), name


def test_pictures_projection_lies_beside_it(trained, exported):
    with sharding.ensure() as mesh:
        model = run_lib.load_model(trained, mesh)
    projection = nnx.merge(model.graphdef, model.params, model.frozen).tower.image_projection
    read = load_file(exported / "image_projection.safetensors")
    images = np.random.default_rng(0).normal(size=(3, model.spec.image_dim)).astype(np.float32)
    np.testing.assert_allclose(
        images @ read["weight"].T + read["bias"], np.asarray(projection(images)), rtol=1e-4, atol=1e-5
    )
    readme = (exported / "README.md").read_text()
    assert "`image_projection.safetensors` holds" in readme
    assert f"[{model.spec.dim}, {model.spec.image_dim}]" in readme
    assert "{" not in readme


def test_files_of_sentence_transformers(trained, exported):
    def read(name):
        return json.loads((exported / name).read_text())

    modules = read("modules.json")
    assert [module["type"].rsplit(".")[-1] for module in modules] == ["Transformer", "Pooling", "Normalize"]
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]
    for module in modules:
        assert (exported / module["path"]).is_dir()
    pooling = read("1_Pooling/config.json")
    assert pooling["word_embedding_dimension"] == XmcModel.load(trained).dim
    chosen = [name for name, value in pooling.items() if name.startswith("pooling_mode") and value]
    assert chosen == ["pooling_mode_mean_tokens"]
    assert read("sentence_bert_config.json") == {"max_seq_length": 16, "do_lower_case": False}
    tokens = read("tokenizer_config.json")
    assert (tokens["pad_token"], tokens["unk_token"], tokens["model_max_length"]) == ("[PAD]", "[UNK]", 16)


def test_sentence_transformers_embeds_as_the_run(trained, exported):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(exported), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(theirs, XmcModel.load(trained).encode_queries(TEXTS), atol=1e-5)


def test_a_new_export_replaces_an_old_one_only(trained, tmp_path):
    out = tmp_path / "hf"
    out.mkdir()
    export(trained, out)  # an empty directory is free
    (out / "stale").touch()
    export(trained, out)
    assert not (out / "stale").exists()
    (out / MARKER).unlink()
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(UserError, match="something else than an export"):
        export(trained, out)
    with pytest.raises(UserError, match="a file"):
        export(trained, out / "README.md")
    assert sorted(path.name for path in out.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]  # nothing half-written is left
    with pytest.raises(UserError, match="something else"):
        export(trained, trained)


def test_command(trained, tmp_path, capsys):
    out = tmp_path / "hf"
    assert cli.run(["export", f"--workdir={trained}", f"--out={out}"]) == 0
    assert str(out) in capsys.readouterr().out
    assert (out / "model.safetensors").is_file()
    for arguments, said in (
        ([f"--workdir={tmp_path}", f"--out={tmp_path / 'new'}"], "not a run's directory"),
        ([f"--workdir={tmp_path / 'nowhere'}", f"--out={tmp_path / 'new'}"], "not a run's directory"),
        ([f"--workdir={trained}", f"--out={tmp_path}"], "something else than an export"),
        ([f"--workdir={trained}"], "needs --out"),
        ([f"--workdir={trained}", f"--out={out}", "--dtype=int8"], "int8"),
    ):
        assert cli.run(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert said in error
    assert not (tmp_path / "new").exists()


def test_a_file_is_written_tensor_by_tensor(tmp_path):
    """Never more than one of its tensors is in this process's memory at a time."""
    import tracemalloc

    values = [jax.numpy.full((256, 1024), float(i)) for i in range(16)]  # 1 MB each
    tensors = [Tensor(f"t{i}", value, None, Same()) for i, value in enumerate(values)]
    tracemalloc.start()
    write_safetensors(tmp_path / "model.safetensors", tensors, "bfloat16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 2**20
    with sharding.ensure():
        read = load_file(tmp_path / "model.safetensors")
    assert all((read[f"t{i}"].astype(np.float32) == i).all() for i in range(16))
