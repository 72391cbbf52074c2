"""Maps of pictures: what NumPy wrote is read, what somebody else wrote is not run."""

import io
import pickle

import numpy as np
import pytest

from vixml_jax.data.inert_pickle import load_lists
from vixml_jax.errors import UserError


def objects(*elements):
    array = np.empty(len(elements), object)
    for number, element in enumerate(elements):
        array[number] = element
    return array


def lists_of(path):
    values, lengths = load_lists(path)
    assert values.dtype == lengths.dtype == np.int64
    return [part.tolist() for part in np.split(values, np.cumsum(lengths)[:-1])] if len(lengths) else []


def save(path, array, protocol=None):
    """Writes an array as NumPy does, also as its older versions did."""
    if protocol is None:
        np.save(path, array, allow_pickle=True)
        return
    with open(path, "wb") as file:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        pickle.dump(array, file, protocol=protocol)


@pytest.mark.parametrize("protocol", [None, 2, 3, 4])
def test_lists_of_every_form_are_read(tmp_path, protocol):
    again = [4, 5]
    array = objects(
        [0, 1, 2], -1, None, [], [300, 70_000, -1], (7,), 2**40, again, again, np.array([3, 1]), np.int64(9),
        np.array([2], np.uint8), np.array([1, 2], ">i4"), [np.int32(6), 8], np.array([], int),
        np.array([5, 6], object), list(range(2000)),
    )  # fmt: skip
    save(tmp_path / "map.npy", array, protocol)
    assert lists_of(tmp_path / "map.npy") == [
        [0, 1, 2], [-1], [], [], [300, 70_000, -1], [7], [2**40], [4, 5], [4, 5], [3, 1], [9],
        [2], [1, 2], [6, 8], [], [5, 6], list(range(2000)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("array", "lists"),
    [
        (np.array([3, -1, 2]), [[3], [-1], [2]]),
        (np.array([[3, 1], [0, -1]], np.int32), [[3, 1], [0, -1]]),
        (np.array([[3, 1], [0, -1]], object), [[3, 1], [0, -1]]),
        (np.zeros((0, 2), object), []),
        (objects(), []),
    ],
    ids=str,
)
def test_arrays_of_numbers_are_maps_too(tmp_path, array, lists):
    save(tmp_path / "map.npy", array)
    assert lists_of(tmp_path / "map.npy") == lists


def test_random_maps_equal_what_numpy_loads(tmp_path):
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    array = objects(
        *(rng.integers(0, 10 ** rng.integers(1, 9), rng.integers(0, 5)).tolist() for _ in range(3000))
    )
    save(tmp_path / "map.npy", array)
    assert lists_of(tmp_path / "map.npy") == np.load(tmp_path / "map.npy", allow_pickle=True).tolist()


class Runs:
    """Pickled, it asks for a function to be called."""

    def __init__(self, function, *arguments):
        self._what = function, arguments

    def __reduce__(self):
        return self._what


def with_pickle(path, data, shape=(1,)):
    with open(path, "wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(data)


HOSTILE = {
    "a call": lambda mark: Runs(open, mark, "w"),
    "a call within a list": lambda mark: [1, Runs(open, mark, "w")],
    "a call within an array": lambda mark: np.array([1, Runs(open, mark, "w")], object),
    "evaluation": lambda mark: Runs(eval, f"open({mark!r}, 'w')"),
    "a large array": lambda mark: Runs(np.zeros, 10**12),
    "text": lambda mark: "words",
    "a mapping": lambda mark: {1: 2},
    "a set": lambda mark: {1},
    "numbers with fractions": lambda mark: [1.5],
    "an array of fractions": lambda mark: np.array([1.5]),
    "truth": lambda mark: [True],
    "lists within lists": lambda mark: [[1]],
    "a huge number": lambda mark: [2**70],
    "an enormous number": lambda mark: [2**4000],
}


@pytest.mark.parametrize("protocol", [None, 2, 3, 4, 5, 0, 1])
@pytest.mark.parametrize("what", HOSTILE)
def test_nothing_is_run_and_nothing_else_is_read(tmp_path, what, protocol):
    mark = tmp_path / "mark"
    save(tmp_path / "map.npy", objects([1], HOSTILE[what](str(mark)), [2]), protocol)
    with pytest.raises(UserError, match="not a map of pictures") as raised:
        load_lists(tmp_path / "map.npy")
    assert "map.npy" in str(raised.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    "data",
    {
        "nothing": b"",
        "a stop": b".",
        "no mark": b"\x80\x04e.",
        "a mark only": b"\x80\x04(.",
        "marks": b"(" * 9999 + b".",
        "a memo that is not there": b"\x80\x04h\x05.",
        "a far memo": b"\x80\x04]r\xff\xff\xff\xff.",
        "a long text": b"\x80\x04X\xff\xff\xff\x7fa.",
        "long bytes": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
        "a list in itself": b"\x80\x04]\x94h\x00h\x00ae.",
        "itself appended": b"\x80\x04]\x94(h\x00h\x00e.",
        "deep tuples": b"\x80\x04)" + b"\x85" * 100_000 + b".",
        "an old integer": b"I1\n.",
        "a global": b"cos\nsystem\n(S'ls'\ntR.",
        "an instance": b"(ios\nsystem\n.",
        "a persistent id": b"Pid\n.",
        "an extension": b"\x80\x04\x82\x01.",
        "a frozen set": b"\x80\x04(\x91.",
        "state of a list": b"\x80\x04]]b.",
    }.items(),
    ids=lambda item: item[0],
)
def test_broken_pickles_are_refused(tmp_path, data):
    with_pickle(tmp_path / "map.npy", data[1])
    with pytest.raises(UserError, match="not a map of pictures"):
        load_lists(tmp_path / "map.npy")


def test_a_small_file_does_not_unfold_to_a_large_one(tmp_path):
    numbers = list(range(20_000))
    array = objects(*[numbers] * 20_000)
    save(tmp_path / "map.npy", array)
    with pytest.raises(UserError, match="far more numbers than bytes"):
        load_lists(tmp_path / "map.npy")


def test_shapes_must_agree(tmp_path):
    buffer = io.BytesIO()
    pickle.dump(objects([1], [2]), buffer, protocol=4)
    for shape in ((1,), (3,), (2, 1, 1), (), (10**12,), (0,)):
        with_pickle(tmp_path / "map.npy", buffer.getvalue(), shape)
        with pytest.raises(UserError, match="not a map of pictures"):
            load_lists(tmp_path / "map.npy")
    with_pickle(tmp_path / "map.npy", buffer.getvalue(), (2,))
    assert lists_of(tmp_path / "map.npy") == [[1], [2]]


@pytest.mark.parametrize(
    "data", [b"", b"\x93NUMPY", b"\x93NUMPY\x09\x00", b"PK\x03\x04" + bytes(30), b"[1, 2]"]
)
def test_what_is_no_array_is_refused(tmp_path, data):
    (tmp_path / "map.npy").write_bytes(data)
    with pytest.raises(UserError, match=r"map\.npy"):
        load_lists(tmp_path / "map.npy")
    for other in (np.array([1.0]), np.zeros((1, 1, 1), int), np.array(["a"]), np.array(1)):
        save(tmp_path / "map.npy", other)
        with pytest.raises(UserError, match="not a map of pictures"):
            load_lists(tmp_path / "map.npy")
    with pytest.raises(UserError, match="cannot be read"):
        load_lists(tmp_path / "none.npy")


def test_whatever_is_changed_in_a_file_it_is_read_or_refused(tmp_path):
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    save(tmp_path / "map.npy", objects([1, 2], -1, None, np.array([3]), np.int64(4), (5,), [70_000]))
    whole = np.frombuffer((tmp_path / "map.npy").read_bytes(), np.uint8)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(600):
        data = whole.copy()
        where = rng.integers(0 if rng.random() < 0.1 else 128, len(data), rng.integers(1, 4))
        data[where] = rng.integers(0, 256, len(where))
        (tmp_path / "changed.npy").write_bytes(
            data[: len(data) if rng.random() < 0.8 else rng.integers(len(data))]
        )
        try:
            load_lists(tmp_path / "changed.npy")
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0, outcomes
