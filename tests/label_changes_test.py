from __future__ import annotations

import json

import numpy as np
import pytest

from vixml_jax.errors import UserError
from vixml_jax.label_changes import GONE, LabelChanges, numbers_of

KNOWN = ["a", "b", "c", "b"]


def label(uid, title="t", images=()):
    return {"uid": uid, "title": title, "content": "", "images": list(images)}


def test_numbers_are_for_good(tmp_path):
    changes = LabelChanges.load(tmp_path, 4)
    assert not changes
    assert changes.add([label("x"), label("y"), label("a", "new text")], KNOWN) == (2, 1)
    assert changes.remove(["x", "c"], KNOWN) == 2
    assert changes.remove(["x"], KNOWN) == 0
    changes.save()
    changes = LabelChanges.load(tmp_path, 4)
    assert changes.add([label("z"), label("y", "again"), label("x", "back")], KNOWN) == (2, 1)
    assert {change.uid: change.number for change in changes.there} == {"a": 0, "x": 4, "y": 5, "z": 6}
    assert {change.uid: change.title for change in changes.there}["x"] == "back"
    np.testing.assert_array_equal(changes.removed, [2])
    assert changes.total == 7
    np.testing.assert_array_equal(numbers_of(4, changes.fingerprints()), [0, 1, 3, 4, 5, 6])
    np.testing.assert_array_equal(numbers_of(4, {}), [0, 1, 2, 3])


def test_a_uid_of_several_labels(tmp_path):
    changes = LabelChanges(tmp_path, 4)
    with pytest.raises(UserError, match="that of 2 labels"):
        changes.add([label("b")], KNOWN)
    assert changes.remove(["b"], KNOWN) == 2
    assert changes.fingerprints() == {"1": GONE, "3": GONE}


def test_pictures_are_kept_by_content(tmp_path):
    (tmp_path / "1.png").write_bytes(b"picture")
    changes = LabelChanges(tmp_path / "labels_changed", 4)
    changes.add([label("x", images=[tmp_path / "1.png", b"another"]), label("y", images=[b"picture"])], KNOWN)
    (tmp_path / "1.png").unlink()
    first, second = changes.there
    assert [path.read_bytes() for path in changes.pictures(first)] == [b"picture", b"another"]
    assert first.images[0] == second.images[0]
    assert len(list((tmp_path / "labels_changed" / "images").iterdir())) == 2
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"number": "5"},
        {"number": -1},
        {"number": 2**40},
        {"title": 3},
        {"removed": 1},
        {"images": ["../../x"]},
        {"images": [3]},
        {"images": 3},
        {"more": 1},
    ],
    ids=str,
)
def test_a_damaged_line_is_named(tmp_path, change):
    changes = LabelChanges(tmp_path / "labels_changed", 4)
    changes.add([label("x", "one\u2028line", images=[b"picture"]), label("y")], KNOWN)
    changes.save()
    assert [found.uid for found in LabelChanges.load(tmp_path, 4).there] == ["x", "y"]
    path = tmp_path / "labels_changed" / "changes.jsonl"
    first, second = path.read_text().split("\n")[:2]
    path.write_text(first + "\n" + json.dumps({**json.loads(second), **change}) + "\n")
    with pytest.raises(UserError, match=r"changes\.jsonl: row 2: not a changed label"):
        LabelChanges.load(tmp_path, 4)


def test_what_cannot_be(tmp_path):
    changes = LabelChanges(tmp_path, 4)
    with pytest.raises(UserError, match="no label has the uid 'q'"):
        changes.remove(["q"], KNOWN)
    with pytest.raises(UserError, match="no label would be left"):
        changes.remove(["a", "b", "c"], KNOWN)


@pytest.mark.parametrize("line", ["{", "[1]", "3", json.dumps({"number": 1}), '{"images": 3}'])
def test_a_damaged_file_is_named(tmp_path, line):
    (tmp_path / "labels_changed").mkdir()
    (tmp_path / "labels_changed" / "changes.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"changes\.jsonl: row 1: not a changed label"):
        LabelChanges.load(tmp_path, 4)
