"""Readers of data: raw folders, matrices, pictures and their lists, queries, predictions, archives."""

from __future__ import annotations

import gzip
import io
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import scipy.sparse
from PIL import Image
from reader import Reader, Seeds, json_lines, npy, write

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
            raw.images.findings(record.images, record.file, raw.images.read(record.images, check=False))
    for split in ("train", "test"):
        raw.filter_pairs(split)
    raw.about()
    raw.digest()


def _json_seeds() -> Seeds:
    return {
        "trn.json.gz": [gzip.compress(json_lines(*TRAIN)), json_lines(*TRAIN)],
        "tst.json.gz": [gzip.compress(json_lines(*TEST))],
        "lbl.json.gz": [gzip.compress(json_lines(*LABELS))],
    }


def _prepare_json(folder: Path) -> None:
    write(folder, {name: data[:1] for name, data in _json_seeds().items()})


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
    lines = json_lines(
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
            json_lines({"uid": 3, "title": "kettle", "content": "steel", "images": ["a.png"]}, {"title": ""}),
            gzip.compress(json_lines({"title": "naïve 👢 \u202eabc"})),
        ],
        "labels.jsonl": [json_lines({"uid": "n1", "title": "new"}, {"uid": 2, "title": "", "content": "c"})],
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
        "train.jsonl": [json_lines({"uid": "a", "title": "shoe", "labels": ["red"], "images": ["x.png"]})],
        "labels.jsonl": [json_lines({"uid": "l", "title": "red"}, {"uid": "m", "title": "shoe"})],
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
    seeds = [npy(array, allow_pickle=True), npy(np.array([[1, -1], [0, 2]]))]
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
        "embeddings.npy": [npy(np.ones((3, 4), np.float32)), npy(np.zeros((0, 2), np.float16))],
        "values.npy": [npy(np.arange(5, dtype=np.int32))],
        "offsets.npy": [npy(np.array([0, 2, 2, 5]))],
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


READERS = [
    Reader("json_folder", _json_only, _whole_folder, _prepare_json),
    Reader("text_folder", _text_seeds, _whole_folder, lambda folder: write(folder, _text_seeds())),
    Reader("sparse", _sparse_seeds, _read_sparse),
    Reader("image_list", _image_list_seeds, _whole_folder, _prepare_json),
    Reader("own_jsonl", _own_seeds, _whole_folder, lambda folder: write(folder, _own_seeds())),
    Reader("own_csv", _table_seeds, _whole_folder, lambda folder: write(folder, _table_seeds())),
    Reader("picture_map", _map_seeds, _read_map),
    Reader("arrays", _array_seeds, _read_array, lambda folder: write(folder, _array_seeds())),
    Reader("predictions", _prediction_seeds, _read_predictions),
    Reader("queries", _query_seeds, _read_queries),
    # A picture may have 64 million pixels of four bytes, and is copied while it is made upright and RGB.
    Reader("pictures", _picture_seeds, _read_picture, memory=2 << 30),
    Reader("archives", _zip_seeds, _unzip, cheap=False),
    Reader("url_lists", _url_list_seeds, _read_url_list),
]
