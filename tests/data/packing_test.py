import json

import numpy as np
import pytest

from vixml_jax.data import packing


def slow_sequence(text, images, template):
    """One item's slots as the paper writes them: ("t", token) or ("i", image)."""
    words = []
    for part in template.parts:
        if isinstance(part.content, np.ndarray):
            if len(images) or not part.with_images:
                words += [("t", t) for t in part.content]
        elif part.content == packing.TEXT:
            words += [("t", t) for t in text]
        else:
            words += [("i", i) for i in images]
    return words


def prompt(*tokens, with_images=False):
    return packing.Part(np.array(tokens, np.int32), with_images)


TEXT, IMAGES = packing.Part(packing.TEXT), packing.Part(packing.IMAGES)


TEMPLATES = {
    "encoder": packing.Template(),
    "decoder": packing.Template(
        (prompt(91, 92), TEXT, prompt(93, 94, 95, with_images=True), IMAGES, prompt(96))
    ),
    "images first": packing.Template((prompt(91, with_images=True), IMAGES, prompt(92), TEXT)),
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("with_images", [False, True])
def test_packed_slots_are_the_items_slots(template, with_images):
    rng = np.random.default_rng()
    texts = [rng.integers(1, 90, rng.integers(0, 12)).astype(np.int32) for _ in range(50)]
    present = rng.random((50, 3)) < 0.5
    images = rng.normal(size=(50, 3, 4)).astype(np.float32)
    sequences = packing.assemble(
        np.concatenate(texts),
        np.array([len(t) for t in texts]),
        template,
        images if with_images else None,
        present if with_images else None,
    )
    counts = present.sum(1) if with_images else np.zeros(50, int)
    for there in (False, True):
        lengths = np.array([len(t) for t in texts]) + counts + template.overhead(with_images=there)
        np.testing.assert_array_equal(
            sequences.lengths[(counts > 0) == there], lengths[(counts > 0) == there]
        )
    packed = packing.pack(sequences, 24, row_multiple=4, image_multiple=16)
    assert packed.token_ids.shape[0] % 4 == 0
    for item, text in enumerate(texts):
        pictures = list(images[item][present[item]]) if with_images else []
        expected = slow_sequence(text, pictures, template)
        rows, columns = np.nonzero(packed.item_index == item)
        assert len(rows) == len(expected)
        if not expected:
            continue
        assert len(set(rows)) == 1
        assert (np.diff(columns) == 1).all()
        assert (packed.positions[rows, columns] == np.arange(len(expected))).all()
        assert len(set(packed.segment_ids[rows, columns])) == 1
        for row, column, (kind, value) in zip(rows, columns, expected, strict=True):
            if kind == "t":
                assert packed.token_ids[row, column] == value
                assert packed.image_index is None or packed.image_index[row, column] == -1
            else:
                np.testing.assert_array_equal(packed.images[packed.image_index[row, column]], value)
    padding = packed.item_index == len(texts)
    assert (packed.segment_ids[padding] == 0).all()
    assert (packed.segment_ids[~padding] > 0).all()


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_survives_json(template):
    again = packing.Template.from_json(json.loads(json.dumps(template.to_json())))
    assert again.to_json() == template.to_json()
    assert [part.with_images for part in again.parts] == [part.with_images for part in template.parts]
    for old, new in zip(template.parts, again.parts, strict=True):
        np.testing.assert_array_equal(old.content, new.content)


@pytest.mark.parametrize("shards", [1, 4, 8])
def test_blocks_are_equal_and_little_is_padding(shards):
    rng = np.random.default_rng()
    lengths, counts = rng.integers(3, 33, 4096), rng.integers(0, 4, 4096)
    plan = packing.plan_rows(lengths, counts, 64, shards=shards)
    block_rows, block_images = plan.num_rows // shards, plan.num_images // shards
    taken = set()
    for item, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        row, column = plan.rows[item], plan.columns[item]
        slots = {(row, c) for c in range(column, column + length)}
        images = set(range(plan.first_images[item], plan.first_images[item] + count))
        assert column + length <= 64
        assert not taken & (slots | images)
        taken |= slots | images
        assert {row // block_rows} >= {image // block_images for image in images}
    assert 1 - lengths.sum() / (64 * plan.num_rows) < 0.02 + shards / plan.num_rows
    assert plan.num_images < 1.15 * counts.sum()
    assert plan.blocks().max() == shards - 1


def test_segments_of_a_row_differ():
    lengths = np.random.default_rng().integers(1, 20, 200)
    sequences = packing.Sequences(
        lengths, np.ones(lengths.sum(), np.int32), np.full(lengths.sum(), -1, np.int32)
    )
    packed = packing.pack(sequences, 32)
    for row in range(len(packed.item_index)):
        pairs = {
            (i, s)
            for i, s in zip(packed.item_index[row], packed.segment_ids[row], strict=True)
            if i < len(lengths)
        }
        assert len({i for i, _ in pairs}) == len({s for _, s in pairs}) == len(pairs)


def test_little_is_padding_and_no_row_overflows():
    lengths = np.random.default_rng().integers(3, 33, 4096)
    rows, columns, num_rows = packing.assign_rows(lengths, 64)
    used = np.bincount(rows, weights=lengths, minlength=num_rows)
    assert used.max() <= 64
    assert (columns + lengths <= 64).all()
    assert 1 - lengths.sum() / (64 * num_rows) < 0.02


def test_an_item_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        packing.assign_rows(np.array([3, 65]), 64)


def test_concatenate_shifts_the_images():
    rng = np.random.default_rng()
    parts = []
    for n in (3, 4):
        present = np.ones((n, 2), bool)
        images = rng.normal(size=(n, 2, 5)).astype(np.float32)
        parts.append(
            packing.assemble(np.ones(n, np.int32), np.ones(n, int), packing.Template(), images, present)
        )
    joined = packing.concatenate(*parts)
    np.testing.assert_array_equal(
        joined.images[joined.image_index[joined.image_index >= 0]],
        np.concatenate([part.images for part in parts]),
    )
