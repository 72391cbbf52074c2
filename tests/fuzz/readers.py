"""Every reader of files that may come from others, with inputs that it takes.

A reader is given the name and the bytes of one file, in a folder where the other files that it needs lie
whole. It returns, or raises UserError; anything else is a fault.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import io
import json
import pickle
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.sparse
from PIL import Image

Seeds = dict[str, list[bytes]]


def _nothing(folder: Path) -> None:
    """Needs nothing beside the file."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """What is tried.

    Attributes:
      name: of the reader.
      make_seeds: names of files -> contents that are read without complaint.
      use: reads the folder in which the file of that name lies.
      prepare: writes what must lie beside it.
      cheap: whether 100,000 inputs take minutes, not hours.
      memory: bytes that it may ask for beyond what the process has.
    """

    name: str
    make_seeds: Callable[[], Seeds]
    use: Callable[[Path, str], object]
    prepare: Callable[[Path], None] = _nothing
    cheap: bool = True
    memory: int = 1 << 30

    @functools.cached_property
    def seeds(self) -> Seeds:
        """What `make_seeds` makes, once."""
        return self.make_seeds()

    def read(self, folder: Path, name: str, data: bytes) -> None:
        """Reads one input; the folder is as it was afterwards."""
        path = folder / name
        before = path.read_bytes() if path.is_file() else None
        path.write_bytes(data)
        try:
            self.use(folder, name)
        finally:
            if before is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(before)

    def warm_up(self) -> None:
        """Imports what the first input would."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.prepare(Path(folder))
            for name, found in self.seeds.items():
                self.read(Path(folder), name, found[0])


def _lines(*records: object) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def _npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


LABELS = [{"uid": "l0", "title": "red", "content": ""}, {"uid": "l1", "title": "naïve 👢", "content": "worn"}]
TRAIN = [
    {"uid": "a", "title": "Red shoe", "content": "size 42", "target_ind": [0, 1], "target_rel": [1.0, 0.5]},
    {"uid": 7, "title": "", "content": None, "target_ind": []},
]
TEST = [{"uid": "e", "title": "clog", "content": "", "target_ind": [1]}]


def _whole_folder(folder: Path, _: str = "") -> None:
    from vixml_jax.data import formats

    raw = formats.open_raw(folder)
    for split in raw.splits:
        for record in raw.records(split):
            raw.images.report(record.images, record.file, raw.images.read(record.images, check=False))
    for split in ("train", "test"):
        raw.filter_pairs(split)
    raw.about()
    raw.digest()


def _write(folder: Path, seeds: Seeds) -> None:
    for name, (data, *_) in seeds.items():
        (folder / name).write_bytes(data)


def _json_seeds() -> Seeds:
    return {
        "trn.json.gz": [gzip.compress(_lines(*TRAIN)), _lines(*TRAIN)],
        "tst.json.gz": [gzip.compress(_lines(*TEST))],
        "lbl.json.gz": [gzip.compress(_lines(*LABELS))],
    }


def _prepare_json(folder: Path) -> None:
    _write(folder, {name: data[:1] for name, data in _json_seeds().items()})


def _json_only() -> Seeds:
    return {name: data[:1] for name, data in _json_seeds().items()}


def _text_seeds() -> Seeds:
    return {
        "trn.raw.txt": [b"Red shoe\tsize 42\nclog\n", "Öl\nx".encode("latin-1")],
        "tst.raw.txt": [b"boot\n"],
        "lbl.raw.txt": [b"red\nshoe\n"],
        "trn_X_Y.txt": [b"2 2\n0:1.00000 1:1\n1:0.5\n"],
        "tst_X_Y.txt": [b"1 2\n1:1\n"],
        "filter_labels_trn.txt": [b"0 1\n1 0\n"],
    }


def _sparse_seeds() -> Seeds:
    plain, packed = io.BytesIO(), io.BytesIO()
    matrix = scipy.sparse.csr_matrix(([1.0, 0.5, 3.0], ([0, 1, 1], [1, 0, 2])), (3, 4))
    scipy.sparse.save_npz(plain, matrix, compressed=False)
    scipy.sparse.save_npz(packed, matrix.tocsc(), compressed=True)
    return {
        "matrix.txt": [b"3 4\n0:1.00000 3:0.5\n\n2:1e-3\n", gzip.compress(b"1 2\n0:1 1:-2.5\n")],
        "matrix.npz": [plain.getvalue(), packed.getvalue()],
        "filter.txt": [b"0 1\n1 0\n"],
    }


def _read_sparse(folder: Path, name: str) -> None:
    from vixml_jax.data import sparse_text

    if name == "filter.txt":
        sparse_text.read_filter_pairs(folder / name)
        return
    matrix = sparse_text.read_sparse(folder / name)
    matrix.check_format(full_check=True)
    assert not np.isnan(matrix.data).any()


def _image_list_seeds() -> Seeds:
    return {"img_paths.trn.csv": [b"uid,path\na,images/1.png\na,images/2.png\n7,none.png\n", b"path,uid\n\n"]}


def _picture(form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3)).astype(np.uint8)
    Image.fromarray(noise).save(buffer, form, **options)
    return buffer.getvalue()


def _prediction_seeds() -> Seeds:
    lines = _lines(
        {"uid": "a", "labels": [{"index": 3, "uid": "l3", "score": 0.71}, {"index": 1, "score": 1}]},
        {"uid": "b", "labels": []},
    )
    return {"predictions.jsonl": [lines, gzip.compress(lines)], "predictions.txt": [b"2 5\n0:1 3:0.5\n\n"]}


def _read_predictions(folder: Path, name: str) -> None:
    from vixml_jax.data import predictions_file

    for num_labels in (None, 5):
        matrix = predictions_file.read(folder / name, num_labels)
        assert matrix.has_sorted_indices
        assert not np.isnan(matrix.data).any()


def _query_seeds() -> Seeds:
    return {
        "queries.jsonl": [
            _lines({"uid": 3, "title": "kettle", "content": "steel", "images": ["a.png"]}, {"title": ""}),
            gzip.compress(_lines({"title": "naïve 👢 \u202eabc"})),
        ],
        "labels.jsonl": [_lines({"uid": "n1", "title": "new"}, {"uid": 2, "title": "", "content": "c"})],
    }


def _read_queries(folder: Path, name: str) -> None:
    from vixml_jax.data import query_lines

    if name == "labels.jsonl":
        list(query_lines.read_labels(folder / name))
        return
    query_lines.count_queries(folder / name)
    list(query_lines.read_queries(folder / name, on_error=lambda error: None))
    with open(folder / name, "rb") as stream:
        list(query_lines.read_queries(stream, on_error=lambda error: None))
    list(query_lines.read_queries(folder / name))


def _own_seeds() -> Seeds:
    return {
        "train.jsonl": [_lines({"uid": "a", "title": "shoe", "labels": ["red"], "images": ["x.png"]})],
        "labels.jsonl": [_lines({"uid": "l", "title": "red"}, {"uid": "m", "title": "shoe"})],
    }


def _table_seeds() -> Seeds:
    return {
        "train.csv": [
            b'uid,title,labels,images\na,"red, shoe",red|shoe,a.png\nb,clog,shoe,\n',
            b"title;label\nx;y\n",
        ],
        "test.csv": [b"title,labels\nboot,shoe\n"],
    }


def _zip_seeds() -> Seeds:
    plain, packed = io.BytesIO(), io.BytesIO()
    for buffer, method in ((plain, zipfile.ZIP_STORED), (packed, zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.writestr("set/trn.raw.txt", b"red shoe\n" * 20)
            archive.writestr("set/readme.md", b"hello")
    return {"set.zip": [plain.getvalue(), packed.getvalue()]}


def _unzip(folder: Path, name: str) -> None:
    from data_prep import archives

    inside = folder / "out" / "inside"
    shutil.rmtree(folder / "out", ignore_errors=True)
    inside.mkdir(parents=True)
    try:
        archives.names(folder / name)
        archives.unpack(folder / name, {"trn.raw.txt": "trn.raw.txt"}, inside, 1e6)
    finally:
        assert {path.name for path in (folder / "out").iterdir()} == {"inside"}
        assert sum(path.stat().st_size for path in inside.rglob("*")) < 2e6


def _url_list_seeds() -> Seeds:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"uid": ["a", "b"], "url": ["https://example.org/1.jpg", None]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return {"urls.csv": [b"uid,url\na,https://example.org/1.jpg\n"], "urls.parquet": [buffer.getvalue()]}


def _read_url_list(folder: Path, name: str) -> None:
    from data_prep import url_lists

    url_lists.read(folder / name)


def _map_seeds() -> Seeds:
    array = np.empty(6, object)
    array[:] = [[1, 2], -1, None, np.array([3]), np.int64(4), (5,)]
    seeds = [_npy(array, allow_pickle=True), _npy(np.array([[1, -1], [0, 2]]))]
    for protocol in (2, 3, 4):
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(array))
        pickle.dump(array, buffer, protocol=protocol)
        seeds.append(buffer.getvalue())
    return {"lbl_imgs_map.npy": seeds}


def _read_map(folder: Path, name: str) -> None:
    from vixml_jax.data import inert_pickle

    values, lengths = inert_pickle.load_lists(folder / name)
    assert values.dtype == lengths.dtype == np.int64
    assert lengths.sum() == len(values)


def _array_seeds() -> Seeds:
    return {
        "embeddings.npy": [_npy(np.ones((3, 4), np.float32)), _npy(np.zeros((0, 2), np.float16))],
        "values.npy": [_npy(np.arange(5, dtype=np.int32))],
        "offsets.npy": [_npy(np.array([0, 2, 2, 5]))],
    }


def _read_array(folder: Path, name: str) -> None:
    from vixml_jax import npy
    from vixml_jax.data.ragged import Ragged

    if name == "embeddings.npy":
        npy.load(folder / name, fix="make it anew").sum()
        npy.load(folder / name, fix="make it anew", mmap_mode=None)
        return
    ragged = Ragged.load(folder)
    for row in range(min(len(ragged), 10)):
        ragged[row].tolist()


def _config_seeds() -> Seeds:
    from vixml_jax import config

    return {"config.json": [config.base().to_json().encode()]}


def _read_config(folder: Path, name: str) -> None:
    from vixml_jax import config as config_lib

    config = config_lib.load(folder / name)
    config.dataset.dir = config.dataset.dir or "somewhere"
    config_lib.validate(config)


def _override_seeds() -> Seeds:
    return {
        "overrides": [
            b"images=2\noptimizer.lr=1e-3\ntrain.epochs=3\ntext.dims=(8,16)",
            b"smoke\nprototype.kind=dexa\nloss.name=triplet\ndataset.fields=('title','content')",
            b"\nmesh.data=2\nvision.images=1\neval.ks=(1,5)\ndataset.dir=x",
        ]
    }


def _read_overrides(folder: Path, name: str) -> None:
    """Through the command line, as a user gives them; the config is validated as by training."""
    import types

    from absl import flags

    from vixml_jax import cli
    from vixml_jax import config as config_lib
    from vixml_jax.errors import UserError

    argument, *overrides = (folder / name).read_bytes().decode("utf-8", "replace").split("\n")
    seen: list[BaseException | None] = []

    def main() -> int:
        config = flags.FLAGS.config
        config.dataset.dir = "somewhere"
        config_lib.validate(config)
        seen.append(None)
        return 0

    job = types.ModuleType("job", "A job.")
    job.define_flags, job.main = config_lib.define_config_flag, main
    argv = [f"--config=configs/picto_tags.py:{argument}", *(f"--config.{text}" for text in overrides)]
    code = cli.run_job(job, "job", argv)
    assert code in (0, 2)
    assert (code == 0) == bool(seen)
    if code:
        raise UserError("refused, in one line")


TINY = {
    "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 32,
}  # fmt: skip
HF_CONFIGS = [
    {"model_type": "bert", **TINY, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    {"model_type": "distilbert", "vocab_size": 40, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16,
     "max_position_embeddings": 32, "activation": "gelu"},
    {"model_type": "qwen2", **TINY, "num_key_value_heads": 1, "rope_theta": 1e6, "sliding_window": 8,
     "use_sliding_window": True, "max_window_layers": 1},
    {"model_type": "qwen3", **TINY, "num_key_value_heads": 2, "head_dim": 4,
     "layer_types": ["full_attention", "sliding_attention"],
     "sliding_window": 4, "use_sliding_window": True},
    {"model_type": "llama", **TINY, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
     "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    {"model_type": "gemma3", "text_config": {**TINY, "model_type": "gemma3_text", "head_dim": 4,
     "num_key_value_heads": 1,
     "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}},
]  # fmt: skip
VISION_CONFIGS = [
    {"model_type": "vit", "hidden_size": 8, "num_attention_heads": 2, "image_size": 32, "patch_size": 16},
    {"model_type": "siglip", "vision_config": {"hidden_size": 8, "num_attention_heads": 2,
     "image_size": [32, 32], "patch_size": 16, "hidden_act": "gelu_pytorch_tanh"}},
    {"model_type": "siglip2_vision_model", "hidden_size": 8, "num_attention_heads": 2, "num_patches": 4},
    {"model_type": "clip_vision_model", "hidden_size": 8, "num_attention_heads": 2, "projection_dim": 4},
]  # fmt: skip
PROCESSOR = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3, "do_rescale": True,
             "rescale_factor": 1 / 255}  # fmt: skip


def _hf_config_seeds() -> Seeds:
    return {"config.json": [json.dumps(value).encode() for value in [*HF_CONFIGS, *VISION_CONFIGS]]}


def _read_hf_config(folder: Path, name: str) -> None:
    from vixml_jax.errors import UserError
    from vixml_jax.models import hub

    hub.is_multimodal(str(folder))
    errors = []
    for read in (hub.text_config, hub.vision_config):
        try:
            config = read(str(folder))
            again = json.loads(json.dumps(hub.tower_config_to_json(config)))
            assert hub.tower_config_from_json(again) == config
            return
        except UserError as error:
            errors.append(error)
    raise errors[0]


def _processor_seeds() -> Seeds:
    whole = json.dumps(PROCESSOR).encode()
    nested = json.dumps({"image_processor": PROCESSOR}).encode()
    return {"preprocessor_config.json": [whole], "processor_config.json": [nested]}


def _prepare_vision(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(VISION_CONFIGS[0]))


def _read_processor(folder: Path, name: str) -> None:
    from vixml_jax.models import hub

    assert hub.vision_config(str(folder)).preprocessing["size"] == 32


def _tower_config_seeds() -> Seeds:
    from vixml_jax.models import hub, presets

    names = ("random:bert-tiny", "random:qwen2-tiny")
    found = [hub.tower_config_to_json(presets.text_preset(name, 64)) for name in names]
    found.append(hub.tower_config_to_json(presets.vision_preset("random:vit-tiny")))
    return {"tower.json": [json.dumps(value).encode() for value in found]}


def _read_tower_config(folder: Path, name: str) -> None:
    from vixml_jax import files
    from vixml_jax.models import hub

    hub.tower_config_from_json(files.read_json(folder / name))


def _tensors() -> dict[str, np.ndarray]:
    """Of the first of HF_CONFIGS, one layer."""
    shapes = {
        "embeddings.word_embeddings.weight": (40, 8),
        "embeddings.position_embeddings.weight": (32, 8),
        "embeddings.token_type_embeddings.weight": (2, 8),
        **{f"embeddings.LayerNorm.{kind}": (8,) for kind in ("weight", "bias")},
    }
    layer = "encoder.layer.0."
    for name, shape in {
        "attention.self.query": (8, 8), "attention.self.key": (8, 8), "attention.self.value": (8, 8),
        "attention.output.dense": (8, 8), "intermediate.dense": (16, 8), "output.dense": (8, 16),
    }.items():  # fmt: skip
        shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        shapes |= {f"{layer}{name}.{kind}": (8,) for kind in ("weight", "bias")}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def _safetensors_seeds() -> Seeds:
    from safetensors.numpy import save

    return {"model.safetensors": [save(_tensors()), save({"bert." + k: v for k, v in _tensors().items()})]}


def _prepare_bert(folder: Path) -> None:
    config = {**HF_CONFIGS[0], "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))


def _read_tower(folder: Path, name: str) -> None:
    from vixml_jax.models import hub

    hub.load_text_tower(str(folder))


def _read_safetensors(folder: Path, name: str) -> None:
    """Names, shapes and values of all tensors, as loading a tower reads them."""
    from vixml_jax.models import hf_names, hub

    tensors = hub.Tensors(folder, hf_names.TEXT_FAMILIES["bert"])
    for tensor in tensors:
        assert tensors.shape(tensor) == tensors.array(tensor).shape


def _index_seeds() -> Seeds:
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    return {"model.safetensors.index.json": [json.dumps({"metadata": {}, "weight_map": weight_map}).encode()]}


def _prepare_shards(folder: Path) -> None:
    from safetensors.numpy import save_file

    for number, name in enumerate("ab", 1):
        tensors = {name: np.zeros(2, np.float32)}
        save_file(tensors, folder / f"model-{number:05d}-of-00002.safetensors")
    (folder / "sub").mkdir(exist_ok=True)


def _tokenizer_seeds() -> Seeds:
    from vixml_jax.data.tokenizer import Tokenizer

    return {"tokenizer.json": [Tokenizer.train(["red shoe", "blue kettle"] * 3, 60).to_json().encode()]}


def _read_tokenizer(folder: Path, name: str) -> None:
    from vixml_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    tokenizer.encode_batch(["red kettle", "", "日本"], 8)


def _label_index_seeds() -> Seeds:
    import tempfile

    from vixml_jax import retrieval

    labels = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    seeds: Seeds = {"index.json": [], "labels.npy": []}
    with tempfile.TemporaryDirectory() as folder:
        retrieval.build(labels, kind="exact").save(Path(folder) / "index")
        for name, found in seeds.items():
            found.append((Path(folder) / "index" / name).read_bytes())
    return seeds


def _prepare_label_index(folder: Path) -> None:
    _write(folder, _label_index_seeds())


def _read_label_index(folder: Path, name: str) -> None:
    from vixml_jax import files, retrieval

    header = folder / "index.json"
    before = header.read_bytes()
    if name != "index.json":  # as somebody who wants to harm would do it, the sums fit what was changed
        record = json.loads(before)
        record["sha256"][name] = files.sha256(folder / name)
        header.write_text(json.dumps(record))
    try:
        retrieval.load(folder).search(np.ones((1, 4), np.float32), 3)
    finally:
        header.write_bytes(before)


def _change_seeds() -> Seeds:
    record = {"number": 5, "uid": "n", "title": "new", "content": "", "images": ["0" * 32], "removed": False}
    return {"labels_changed_changes.jsonl": [_lines(record, {**record, "number": 1, "removed": True})]}


def _read_changes(folder: Path, name: str) -> None:
    from vixml_jax.label_changes import CHANGES, DIRECTORY, LabelChanges

    (folder / DIRECTORY).mkdir(exist_ok=True)
    shutil.copy(folder / name, folder / DIRECTORY / CHANGES)
    changes = LabelChanges.load(folder, 3)
    changes.fingerprints()
    for change in changes.there:
        assert all(path.parent.parent == folder / DIRECTORY for path in changes.pictures(change))


def _added_seeds() -> Seeds:
    buffer = io.BytesIO()
    np.savez(
        buffer, step=np.int64(3), numbers=np.array([5]), fingerprints=np.array(["ab"]),
        embeddings=np.ones((1, 4), np.float32),
    )  # fmt: skip
    return {"index_added.npz": [buffer.getvalue()]}


def _read_added(folder: Path, name: str) -> None:
    from vixml_jax import search

    search.load_added(folder, 3)


def _record_seeds() -> Seeds:
    return {"metrics.jsonl": [_lines(*({"step": step, "train/loss": 0.5, "perf/x": 3} for step in range(4)))]}


def _read_records(folder: Path, name: str) -> None:
    from vixml_jax.report_runs import RunFiles
    from vixml_jax.tracking import drop_after

    RunFiles(folder, "run", 0).curve("train/loss")
    drop_after(folder / name, 2)


def _sums_seeds() -> Seeds:
    return {"3.json": [json.dumps({"params/a": [3, 0x352441C2], "tables/b": [0, 0]}).encode()]}


def _prepare_sums(folder: Path) -> None:
    for name, data in (("params/a", b"abc"), ("tables/b", b"")):
        (folder / "3" / name).parent.mkdir(parents=True)
        (folder / "3" / name).write_bytes(data)


def _read_sums(folder: Path, name: str) -> None:
    from vixml_jax import checkpoint

    checkpoint.damage(folder / "3", folder / name)


def _owner_seeds() -> Seeds:
    gone = {"host": socket.gethostname(), "process": 2**30, "started": "1", "since": "y"}
    return {"owner.json": [json.dumps(gone).encode()]}


def _prepare_owner(folder: Path) -> None:
    (folder / "config.json").write_text("{}")  # an empty workdir would be removed


def _read_owner(folder: Path, name: str) -> None:
    from vixml_jax import ownership

    ownership.take(folder)
    ownership.release(folder)


def _picture_seeds() -> Seeds:
    forms = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
    found = [_picture(form) for form in forms]
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"picture": [*found, _picture("JPEG", exif=exif), _picture("PNG", optimize=True)]}


def _read_picture(folder: Path, name: str) -> None:
    from vixml_jax.data import pictures

    image = pictures.decode(folder / name)
    if image is not None:
        pictures.to_pixels(image, 8, (0.5,) * 3, (0.5,) * 3)


_READERS = [
    Reader("json_folder", _json_only, _whole_folder, _prepare_json),
    Reader("text_folder", _text_seeds, _whole_folder, lambda folder: _write(folder, _text_seeds())),
    Reader("sparse", _sparse_seeds, _read_sparse),
    Reader("image_list", _image_list_seeds, _whole_folder, _prepare_json),
    Reader("own_jsonl", _own_seeds, _whole_folder, lambda folder: _write(folder, _own_seeds())),
    Reader("own_csv", _table_seeds, _whole_folder, lambda folder: _write(folder, _table_seeds())),
    Reader("picture_map", _map_seeds, _read_map),
    Reader("arrays", _array_seeds, _read_array, lambda folder: _write(folder, _array_seeds())),
    Reader("predictions", _prediction_seeds, _read_predictions),
    Reader("queries", _query_seeds, _read_queries),
    Reader("overrides", _override_seeds, _read_overrides, cheap=False),
    Reader("config_json", _config_seeds, _read_config),
    Reader("hf_config", _hf_config_seeds, _read_hf_config),
    Reader("hf_processor", _processor_seeds, _read_processor, _prepare_vision),
    Reader("hf_safetensors", _safetensors_seeds, _read_safetensors, _prepare_bert),
    Reader("hf_shard_index", _index_seeds, _read_safetensors, _prepare_shards),
    Reader("hf_tower", _safetensors_seeds, _read_tower, _prepare_bert, cheap=False),
    Reader("tower_json", _tower_config_seeds, _read_tower_config),
    Reader("tokenizer", _tokenizer_seeds, _read_tokenizer),
    Reader("label_index", _label_index_seeds, _read_label_index, _prepare_label_index, cheap=False),
    Reader("label_changes", _change_seeds, _read_changes),
    Reader("added_labels", _added_seeds, _read_added),
    Reader("metrics_jsonl", _record_seeds, _read_records, cheap=False),
    Reader("checkpoint_sums", _sums_seeds, _read_sums, _prepare_sums),
    Reader("owner", _owner_seeds, _read_owner, _prepare_owner, cheap=False),
    # A picture may have 64 million pixels of four bytes, and is copied while it is made upright and RGB.
    Reader("pictures", _picture_seeds, _read_picture, memory=2 << 30),
    Reader("archives", _zip_seeds, _unzip, cheap=False),
    Reader("url_lists", _url_list_seeds, _read_url_list),
]
READERS = {reader.name: reader for reader in _READERS}
