"""The drawn catalogue: always the same, shaped like the field's sets, not to be solved by titles alone."""

from __future__ import annotations

import collections
import csv
import gzip
import hashlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from vixml_jax.demo_catalogue import drawing, products, words, write_raw
from vixml_jax.demo_catalogue.icons import ICONS
from vixml_jax.errors import UserError
from vixml_jax.prepare import prepare

SMALL = 200
SPLITS = ("trn", "tst", "lbl")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_raw(tmp_path_factory.mktemp("raw") / "catalogue", SMALL)


@pytest.fixture(scope="module")
def full():
    """The demo's catalogue without its pictures."""
    return products.make(3000, 750, seed=0)


def rows(raw, short):
    return [
        json.loads(line) for line in gzip.decompress((raw / f"{short}.json.gz").read_bytes()).splitlines()
    ]


def image_list(raw, short):
    with open(raw / f"img_paths.{short}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def digests(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_same_arguments_give_the_same_bytes(raw, tmp_path):
    again = digests(write_raw(tmp_path / "again", SMALL))
    assert again == digests(raw)
    assert (raw / "trn.json.gz").read_bytes()[4:8] == bytes(4)  # no time in it
    other = digests(write_raw(tmp_path / "other", 20, seed=1))
    assert not set(other.values()) & {again[name] for name in again if name.endswith((".png", ".gz"))}


def test_files(raw):
    names = {path.name for path in raw.iterdir()}
    assert names == {
        *(f"{short}.json.gz" for short in SPLITS),
        *(f"img_paths.{short}.csv" for short in SPLITS),
        *("filter_labels_trn.txt", "filter_labels_tst.txt", "images"),
    }
    assert len(rows(raw, "trn")) == SMALL
    assert len(rows(raw, "tst")) == SMALL // 4
    for short in SPLITS:
        uids = [row["uid"] for row in rows(raw, short)]
        assert len(set(uids)) == len(uids)
        paths = image_list(raw, short)
        assert {line["uid"] for line in paths} <= set(uids)
        assert all((raw / line["path"]).is_file() for line in paths)


def test_prepare_takes_it_as_it_is(raw, tmp_path):
    report = prepare(raw, tmp_path / "prepared", "demo_catalogue")
    assert report["problems"] == {}
    assert report["notes"] == []
    assert report["layout"] == "json"
    for split, short in zip(("train", "test", "labels"), SPLITS, strict=True):
        counts = report["splits"][split]
        assert counts["rows"] == len(rows(raw, short))
        assert counts["images"] == len(image_list(raw, short))
        assert counts["images_missing"] == 0
    assert report["splits"]["train"]["rows_without_labels"] == 0


def test_no_picture_lies_in_two_places(raw):
    pictures = [path.read_bytes() for path in (raw / "images").iterdir()]
    assert len(set(pictures)) == len(pictures) == sum(len(image_list(raw, short)) for short in SPLITS)
    with Image.open(io.BytesIO(pictures[0])) as picture:
        assert (picture.size, picture.mode) == ((drawing.SIZE, drawing.SIZE), "RGB")


def test_counts(full):
    assert 1000 <= len(full.labels) <= 1500
    for queries in (full.train, full.test):
        sizes = [len(query.targets) for query in queries]
        assert min(sizes) >= 1
        assert max(sizes) <= 8
        assert 3 <= np.mean(sizes) <= 5
        assert set(sizes) >= set(range(1, 7))


def test_labels_are_in_range_and_known(full):
    seen = {target for query in full.train for target in query.targets}
    assert seen == set(range(len(full.labels)))  # also: no test query has a label without training queries
    for query in full.train + full.test:
        assert query.targets == sorted(set(query.targets))
        assert 0 <= query.targets[0] <= query.targets[-1] < len(full.labels)


def test_long_tail(full):
    counts = collections.Counter(target for query in full.train for target in query.targets)
    ordered = sorted(counts.values(), reverse=True)
    total, size = sum(ordered), len(ordered)
    assert sum(ordered[: size // 10]) > 0.3 * total
    assert sum(ordered[size // 2 :]) < 0.2 * total
    assert np.mean([count <= 3 for count in ordered]) > 0.2
    assert ordered[0] > 10 * ordered[size // 2]


def test_titles_do_not_leak(full):
    """No test title is a training title, and no title says what the picture shows."""
    train, test = ({item.title for item in items} for items in (full.train, full.test))
    assert len(train) == len(full.train)
    assert len(test) == len(full.test)
    assert not train & test
    hidden = {*drawing.COLOURS, *drawing.PATTERNS, "gray"}
    hidden |= {name.removesuffix("s") for name in drawing.PATTERNS} | {"striped", "dotted", "checked", "wavy"}
    for item in full.train + full.test + full.labels:
        assert not hidden & set(re.findall(r"[a-z]+", item.title.lower())), item.title


def test_who_has_pictures(full):
    for queries in (full.train, full.test):
        assert 0.07 <= np.mean([query.images == 0 for query in queries]) <= 0.14
    assert {item.images for item in full.train} == {0, 1, 2, 3}
    assert 0.1 <= np.mean([label.images == 0 for label in full.labels]) <= 0.3
    assert all(label.images == 0 for label in full.labels if label.finish is None)


def test_filter_pairs_are_queries_that_are_labels(full):
    for queries, pairs in ((full.train, full.filter_train), (full.test, full.filter_test)):
        assert len(pairs) > 0.03 * len(queries)
        for row, label in pairs:
            query, itself = queries[row], full.labels[label]
            assert (query.uid, query.title) == (itself.uid, itself.title)
            assert label not in query.targets
        others = {label.uid for label in full.labels} & {query.uid for query in queries}
        assert len(others) == len(pairs)


def test_titles_alone_get_part_of_the_way(full):
    """What goes most often with a query's series, against the same with the finish that its picture shows."""

    def precision(key):
        counts = collections.defaultdict(collections.Counter)
        for query in full.train:
            counts[key(query)].update(query.targets)
        filtered, hits = set(full.filter_test), []
        for row, query in enumerate(full.test):
            ranked = (label for label, _ in counts[key(query)].most_common() if (row, label) not in filtered)
            hits.append(next(ranked, -1) in query.targets)
        return float(np.mean(hits))

    by_title = precision(lambda query: query.series)
    by_both = precision(lambda query: (query.series, query.finish if query.images else None))
    assert 0.25 < by_title < 0.5
    assert by_both > by_title + 0.25


def test_an_untrained_tower_tells_colours_apart():
    """A linear probe on means of random features of patches finds the colour, and mostly the pattern."""
    rng = np.random.default_rng(0)
    things, colours = list(ICONS), list(drawing.COLOURS)
    number, known = 600, 480
    colour, pattern = (
        rng.integers(len(colours), size=number),
        rng.integers(len(drawing.PATTERNS), size=number),
    )
    pixels = np.zeros((number, 64, 64, 3), np.float32)
    for row in range(number):
        look = colours[colour[row]], drawing.PATTERNS[pattern[row]]
        data = drawing.draw(things[row % len(things)], *look, row % 3, rng)
        with Image.open(io.BytesIO(data)) as picture:
            pixels[row] = np.asarray(picture) / 127.5 - 1
    patches = pixels.reshape(number, 8, 8, 8, 8, 3).swapaxes(2, 3).reshape(number, 64, 192)
    weights, bias = rng.normal(size=(192, 96)) / 8, rng.normal(size=96) / 4
    features = np.ones((number, 97))
    # Not by matmul: its threads wait in a busy loop, which takes seconds where the cores are shared.
    projected = np.einsum("npi,ij->npj", patches, weights.astype(np.float32))
    features[:, 1:] = np.maximum(projected + bias, 0).mean(1)
    features[:, 1:] -= features[:, 1:].mean(0)
    features[:, 1:] /= features[:, 1:].std(0)

    def accuracy(truth, kinds):
        x, y = features[:known], np.eye(kinds)[truth[:known]]
        scores = features[known:] @ np.linalg.solve(x.T @ x + 5 * np.eye(97), x.T @ y)
        return np.mean(scores.argmax(1) == truth[known:])

    assert accuracy(colour, len(colours)) > 0.9
    assert accuracy(pattern, len(drawing.PATTERNS)) > 0.35


def test_every_thing_can_be_drawn():
    assert set(ICONS) == set(words.THINGS)
    rng = np.random.default_rng(0)
    for thing in ICONS:
        picture = Image.open(io.BytesIO(drawing.draw(thing, "blue", "plain", 0, rng)))
        main = np.abs(np.asarray(picture).astype(int) - drawing.COLOURS["blue"]).max(-1) < 32
        assert main.mean() > 0.12, thing


def test_names_are_new_for_every_number():
    for name in (words.brand_name, words.series_name):
        assert len({name(number) for number in range(500)}) == 500


@pytest.mark.parametrize("num_train", [1, 7])
def test_tiny_catalogues(num_train, tmp_path):
    raw = write_raw(tmp_path / "raw", num_train, seed=3)
    assert prepare(raw, tmp_path / "out", "tiny")["problems"] == {}


def test_replaces_only_a_raw_folder(tmp_path):
    write_raw(tmp_path / "raw", 3)
    first = digests(tmp_path / "raw")
    assert digests(write_raw(tmp_path / "raw", 3)) == first
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    for place in ("photos", "file"):
        with pytest.raises(UserError, match="something else"):
            write_raw(tmp_path / place, 3)
    assert (tmp_path / "photos" / "holiday.txt").read_text() == "keep me"
    with pytest.raises(UserError, match="0 training queries"):
        write_raw(tmp_path / "none", 0)
