from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from vixml_jax import retrieval
from vixml_jax.errors import UserError
from vixml_jax.retrieval import scann_index
from vixml_jax.retrieval.index import Index

needs_scann = pytest.mark.skipif(scann_index.library() is None, reason="ScaNN is for Linux on x86-64")
EXACT = ("exact", {})
BRUTE_FORCE = pytest.param("scann", {}, marks=needs_scann, id="scann-brute-force")
HASHING = pytest.param("scann", {"num_leaves": 10}, marks=needs_scann, id="scann-hashing")
MESH = [
    pytest.param("mesh", {"dtype": dtype}, id=f"mesh-{dtype}") for dtype in ("float32", "bfloat16", "int8")
]
HALF = [pytest.param("exact", {"dtype": dtype}, id=f"exact-{dtype}") for dtype in ("bfloat16", "int8")]
KINDS = pytest.mark.parametrize(
    ("kind", "options"), [pytest.param(*EXACT, id="exact"), *HALF, *MESH, BRUTE_FORCE, HASHING]
)


@pytest.fixture(scope="module")
def labels():
    centres = np.random.default_rng(0).standard_normal((40, 16))
    return np.repeat(centres, 20, axis=0) + 0.3 * np.random.default_rng(1).standard_normal((800, 16))


@pytest.fixture(scope="module")
def queries(labels):
    return labels[::50] + 0.1


@KINDS
def test_face(kind, options, labels, queries):
    index = retrieval.build(labels, kind=kind, target_recall=0.9, k=10, **options)
    assert isinstance(index, Index)
    assert (index.kind, index.num_labels, index.dim) == (kind, 800, 16)
    ids, scores = index.search(queries, 10)
    assert ids.shape == scores.shape == (16, 10)
    assert (ids.dtype, scores.dtype) == (np.int32, np.float32)
    assert (np.diff(scores, axis=1) <= 0).all()
    precision = {"bfloat16": 2e-2, "int8": 2e-2}.get(options.get("dtype"), 1e-4)
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ labels.T, ids, axis=1), rtol=precision)
    for k in (3, 1000):
        ids, scores = index.search(queries[:0], k)
        assert ids.shape == scores.shape == (0, k)


@KINDS
def test_more_than_there_are(kind, options, labels, queries):
    ids, scores = retrieval.build(labels, kind=kind, k=10, **options).search(queries, 900)
    np.testing.assert_array_equal(np.sort(ids[:, :800], axis=1), np.tile(np.arange(800), (16, 1)))
    assert (ids[:, 800:] == -1).all()
    assert (scores[:, 800:] == -np.inf).all()
    assert np.isfinite(scores[:, :800]).all()


@KINDS
def test_saved_index_is_the_same_after_it_moved(kind, options, labels, queries, tmp_path, monkeypatch):
    built = retrieval.build(labels, kind=kind, target_recall=0.9, k=10, **options)
    built.save(tmp_path / "runs" / "index")
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for directory in ("index", tmp_path / "elsewhere" / "index"):
        loaded = retrieval.load(directory)
        assert type(loaded) is type(built)
        assert (loaded.num_labels, loaded.dim, loaded.measured) == (800, 16, built.measured)
        for k in (10, 50):
            for got, wanted in zip(loaded.search(queries, k), built.search(queries, k), strict=True):
                np.testing.assert_array_equal(got, wanted)
    # Over the directory that it was loaded from, and once more.
    loaded.save("index")
    np.testing.assert_array_equal(loaded.search(queries, 5)[0], retrieval.load("index").search(queries, 5)[0])
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["index"]


@KINDS
def test_damaged_files_are_refused_by_name(kind, options, labels, tmp_path):
    retrieval.build(labels, kind=kind, k=10, **options).save(tmp_path / "good")
    names = sorted(path.name for path in (tmp_path / "good").iterdir())
    assert len(names) >= 2
    for name in names:
        for damage in ("truncated", "changed", "missing"):
            directory = tmp_path / f"{damage}-{name}"
            shutil.copytree(tmp_path / "good", directory)
            data = bytearray((directory / name).read_bytes())
            if damage == "missing":
                (directory / name).unlink()
            elif damage == "truncated":
                (directory / name).write_bytes(data[:-1] if name != "index.json" else data[:-20])
            else:
                data[len(data) // 2 if name != "index.json" else 0] ^= 1
                (directory / name).write_bytes(data)
            with pytest.raises(UserError, match=r"build the index again|not valid JSON") as caught:
                retrieval.load(directory)
            assert "\n" not in str(caught.value)
            assert name in str(caught.value) or damage == "missing"


def test_headers_that_do_not_fit_are_refused(labels, tmp_path):
    retrieval.build(labels, kind="exact").save(tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    header = json.loads(path.read_text())
    for change, message in (
        ({"version": 2}, "format version 1"),
        ({"kind": "quantum"}, "unknown kind"),
        ({"kind": None}, "'kind' is missing"),
        ({"dim": 8}, "shape"),
        ({"num_labels": 0}, "no labels"),
        ({"sha256": {}}, "not of the index"),
    ):
        path.write_text(json.dumps({**header, **change}))
        with pytest.raises(UserError, match=message):
            retrieval.load(tmp_path / "index")
    path.write_text("[]")
    with pytest.raises(UserError, match="format version"):
        retrieval.load(tmp_path / "index")
    with pytest.raises(UserError, match="no index here"):
        retrieval.load(tmp_path / "nothing")


@KINDS
def test_no_pickle_is_read(kind, options, labels, tmp_path):
    """ScaNN's loader would unpickle this file."""
    retrieval.build(labels, kind=kind, k=10, **options).save(tmp_path / "index")
    (tmp_path / "index" / "scann_docids.pkl").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(UserError, match=r"scann_docids\.pkl"):
        retrieval.load(tmp_path / "index")


def test_nothing_is_left_of_a_save_that_fails(labels, tmp_path, monkeypatch):
    index = retrieval.build(labels, kind="exact")
    index.save(tmp_path / "index")

    def fail(directory):
        raise OSError("disk full")

    monkeypatch.setattr(index, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        index.save(tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert retrieval.load(tmp_path / "index").num_labels == 800


NAN, INF, HUGE = np.full((4, 3), np.nan), np.full((4, 3), -np.inf), np.full((4, 3), 1e30)


@pytest.mark.parametrize("kind", ["exact", pytest.param("scann", marks=needs_scann)])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (NAN, "row 0 holds NaN"),
        (INF, "row 0 holds NaN, inf"),
        (HUGE, "beyond 1e"),
        (np.float64(1e300) * np.ones((4, 3)), "beyond 1e"),
        (np.ones(3), r"shape \(3,\)"),
        (np.ones((2, 3, 3)), "matrix"),
        (3.0, r"shape \(\)"),
        ([["a", "b", "c"]], "not numbers"),
        ([[1, 2, 3], [1, 2]], "not numbers"),
        (np.ones((4, 3)) * 1j, "not numbers"),
    ],
    ids=["nan", "inf", "huge", "overflow", "vector", "cube", "scalar", "text", "ragged", "complex"],
)
def test_wrong_values_are_one_line(kind, wrong, message):
    good = np.eye(3)
    for search in (
        lambda: retrieval.build(wrong, kind=kind),
        lambda: retrieval.build(good, kind=kind).search(wrong, 1),
    ):
        with pytest.raises(UserError, match=message) as caught:
            search()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "best"}, "'best'; use scann or exact or mesh"),
        ({"kind": "exact", "dtype": "int4"}, "dtype is 'int4'; give float32, bfloat16 or int8"),
        ({"kind": "exact", "num_leaves": 3}, "unknown option 'num_leaves' of exact index"),
        ({"kind": "scann", "trees": 3}, "unknown option 'trees' of scann index"),
        ({"target_recall": 0.0}, "target_recall is 0"),
        ({"target_recall": 98}, "target_recall is 98"),
        ({"k": 0}, "k is 0"),
        ({"k": 1.5}, "k is 1.5"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        retrieval.build(np.eye(3), **arguments)


def test_wrong_searches():
    index = retrieval.build(np.eye(3), kind="exact")
    with pytest.raises(UserError, match="4 columns, the index 3"):
        index.search(np.ones((2, 4)), 1)
    for k in (0, -1, 2.0, None):
        with pytest.raises(UserError, match="k is"):
            index.search(np.ones((2, 3)), k)
    for empty in (np.ones((0, 3)), np.ones((3, 0))):
        with pytest.raises(UserError, match="at least one label"):
            retrieval.build(empty, kind="exact")


def test_other_float_types():
    import jax.numpy as jnp

    labels = np.arange(12.0).reshape(4, 3)
    for array in (
        labels.astype(np.float16),
        np.asfortranarray(labels),
        labels.astype(int),
        jnp.bfloat16(labels),
    ):
        ids, scores = retrieval.build(array, kind="exact").search(array, 1)
        np.testing.assert_array_equal(ids[:, 0], [3, 3, 3, 3])
        assert scores.dtype == np.float32


def test_importing_is_cheap():
    program = (
        "import sys; from vixml_jax import retrieval; from vixml_jax.retrieval.index import Index\n"
        "assert not {'scann', 'jax', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
