"""Packing: many short items share rows of fixed length, so that almost no slot is padding.

An item is the sequence that the tower reads: prompt, text tokens and image slots. `assemble` writes the
sequences one after the other into flat arrays, `plan_rows` decides which row and column each goes to, and
`lay_out` puts them there. Padding to one item a row would waste more than half of the work on titles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vixml_jax import sharding
from vixml_jax.types import PackedTokens

# What stands for an item's own text or pictures in a template.
TEXT, IMAGES = "text", "images"


@dataclasses.dataclass(frozen=True)
class Part:
    """One stretch of an item's sequence.

    Attributes:
      content: int32 token ids of a prompt, or TEXT, or IMAGES.
      with_images: the part is there only when the item has a picture.
    """

    content: np.ndarray | str
    with_images: bool = False

    @property
    def tokens(self) -> np.ndarray | None:
        """The prompt's tokens; None for an item's own text or pictures."""
        return None if isinstance(self.content, str) else self.content


@dataclasses.dataclass(frozen=True)
class Template:
    """How an item's parts follow each other (ViXML, early fusion).

    Attributes:
      parts: in order. The default is the encoders': pictures, then the text with its special tokens. In a
        decoder pictures never come first: its first position is the attention sink.
    """

    parts: tuple[Part, ...] = (Part(IMAGES), Part(TEXT))

    @property
    def has_text(self) -> bool:
        """Whether an item's own text is part of it."""
        return any(part.tokens is None and part.content == TEXT for part in self.parts)

    @property
    def has_images(self) -> bool:
        """Whether an item's own pictures are part of it."""
        return any(part.tokens is None and part.content == IMAGES for part in self.parts)

    def overhead(self, *, with_images: bool) -> int:
        """Returns the number of prompt tokens of an item, with pictures or without."""
        prompts = [part for part in self.parts if part.tokens is not None]
        return sum(len(part.content) for part in prompts if with_images or not part.with_images)

    def to_json(self) -> list[dict[str, Any]]:
        """Returns what `from_json` reads."""
        return [
            {
                "content": part.content if part.tokens is None else part.tokens.tolist(),
                "with_images": part.with_images,
            }
            for part in self.parts
        ]

    @classmethod
    def from_json(cls, parts: Sequence[dict[str, Any]]) -> Template:
        """Reads what `to_json` returned."""
        content = lambda value: value if isinstance(value, str) else np.array(value, np.int32)  # noqa: E731
        return cls(tuple(Part(content(part["content"]), part["with_images"]) for part in parts))


@dataclasses.dataclass(frozen=True)
class Sequences:
    """N assembled items, one after the other.

    Attributes:
      lengths: int64 [N]; slots of each item.
      token_ids: int32 [S]; S = sum of lengths; 0 in image slots.
      image_index: int32 [S]; row of `images`, -1 in text slots.
      images: float [M, V], or None when there is no image tower.
    """

    lengths: np.ndarray
    token_ids: np.ndarray
    image_index: np.ndarray
    images: np.ndarray | None = None


def assemble(
    tokens: np.ndarray,
    text_lengths: np.ndarray,
    template: Template,
    images: np.ndarray | None = None,
    present: np.ndarray | None = None,
) -> Sequences:
    """Joins prompt, text and image slots of N items.

    Args:
      tokens: int32 [sum(text_lengths)]; the items' text tokens, one after the other.
      text_lengths: int [N].
      template: the order of the parts.
      images: float [N, I, V] image embeddings, or None for text only.
      present: bool [N, I]; which of them exist. Required with `images`.
    """
    num_items = len(text_lengths)
    text_lengths = np.asarray(text_lengths, np.int64)
    counts = np.zeros(num_items, np.int64) if present is None else present.sum(1)
    part_lengths = [_part_lengths(part, text_lengths, counts) for part in template.parts]
    lengths = np.stack(part_lengths).sum(axis=0)
    token_ids = np.zeros(lengths.sum(), np.int32)
    image_index = np.full(lengths.sum(), -1, np.int32)

    at = np.cumsum(lengths) - lengths
    for part, taken in zip(template.parts, part_lengths, strict=True):
        slots = _spans(at, taken)
        if part.tokens is not None:
            token_ids[slots] = np.tile(part.tokens, int((taken > 0).sum()))
        elif part.content == TEXT:
            token_ids[slots] = tokens
        else:
            image_index[slots] = np.arange(len(slots))
        at = at + taken
    return Sequences(lengths, token_ids, image_index, None if images is None else images[present])


def concatenate(first: Sequences, second: Sequences) -> Sequences:
    """Appends the items of `second` to those of `first`."""
    shift = 0 if first.images is None else len(first.images)
    shifted = np.where(second.image_index >= 0, second.image_index + shift, -1).astype(np.int32)
    images = None
    if first.images is not None and second.images is not None:
        images = np.concatenate([first.images, second.images])
    return Sequences(
        np.concatenate([first.lengths, second.lengths]),
        np.concatenate([first.token_ids, second.token_ids]),
        np.concatenate([first.image_index, shifted]),
        images,
    )


def assign_rows(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Decides the row and the first column of each item, filling rows with the longest item that still fits.

    Items of equal length are interchangeable, so the search runs over the at most `row_length` lengths and
    not over the items.

    Args:
      lengths: int [N]; at most `row_length` each. An item of length 0 takes no slot.
      row_length: slots of a row.

    Returns:
      rows int64 [N], columns int64 [N], and the number of rows used.

    Raises:
      ValueError: if an item is longer than a row.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > row_length:
        raise ValueError(f"an item of {lengths.max()} slots does not fit a row of {row_length}")
    remaining = np.bincount(lengths, minlength=row_length + 1).tolist()
    remaining[0] = 0
    below = [length - 1 for length in range(row_length + 1)]  # the next shorter length worth a look

    def longest_fitting(space: int) -> int:
        length = space
        while length > 0 and not remaining[length]:
            length = below[length]
        if length != space:
            below[space] = max(length, 0)  # lengths that ran out never come back
        return max(length, 0)

    filled_lengths: list[int] = []
    filled_rows: list[int] = []
    filled_columns: list[int] = []
    row = 0
    while length := longest_fitting(row_length):
        column = 0
        while length:
            remaining[length] -= 1
            filled_lengths.append(length)
            filled_rows.append(row)
            filled_columns.append(column)
            column += length
            length = longest_fitting(row_length - column)
        row += 1

    # Slots of one length go to the items of that length in order.
    rows = np.zeros(len(lengths), np.int64)
    columns = np.zeros(len(lengths), np.int64)
    items = np.argsort(lengths, kind="stable")[int((lengths == 0).sum()) :]
    slots = np.argsort(np.array(filled_lengths, np.int64), kind="stable")
    rows[items] = np.array(filled_rows, np.int64)[slots]
    columns[items] = np.array(filled_columns, np.int64)[slots]
    return rows, columns, row


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Where N items go: R rows of T slots and M image embeddings, both in S equal blocks.

    A block is what one of S row shards of a mesh holds. An item's slots and its images lie in the same block,
    so that no device needs another's images, and a process reads the items of its own blocks only. The plan
    follows from lengths and counts alone: every process works out the same one.

    Attributes:
      row_length: T.
      shards: S.
      num_rows: R; a multiple of S.
      num_images: M; a multiple of S, 0 where there is no image tower.
      rows: int64 [N]; the row of each item.
      columns: int64 [N]; its first slot.
      first_images: int64 [N]; the row of its first image.
      segments: int64 [N]; its number within the row, from 1 on.
    """

    row_length: int
    shards: int
    num_rows: int
    num_images: int
    rows: np.ndarray
    columns: np.ndarray
    first_images: np.ndarray
    segments: np.ndarray

    def blocks(self) -> np.ndarray:
        """Returns the block of each item, int64 [N]."""
        return self.rows // (self.num_rows // self.shards)


def plan_rows(
    lengths: np.ndarray,
    image_counts: np.ndarray | None,
    row_length: int,
    *,
    shards: int = 1,
    row_multiple: int = 1,
    image_multiple: int = 1,
) -> RowPlan:
    """Decides where N items go.

    Args:
      lengths: int [N]; slots of each item.
      image_counts: int [N]; images among them; None where there is no image tower.
      row_length: T.
      shards: S.
      row_multiple: rows of a block are rounded up to a multiple of it, so that few shapes occur.
      image_multiple: the same for the image embeddings of a block.
    """
    lengths = np.asarray(lengths)
    filled, columns, used = assign_rows(lengths, row_length)
    # Filled rows are dealt out: long items come first, and images would crowd in the last block.
    block_rows = sharding.round_up(max(-(-used // shards), 1), row_multiple)
    rows = filled % shards * block_rows + filled // shards
    first_images, num_images = np.zeros(len(lengths), np.int64), 0
    if image_counts is not None:
        order = np.argsort(rows, kind="stable")
        counts = np.asarray(image_counts, np.int64)[order]
        block = rows[order] // block_rows
        in_block = np.bincount(block, weights=counts, minlength=shards).astype(np.int64)
        block_images = sharding.round_up(max(int(in_block.max(initial=0)), 1), image_multiple)
        before = np.cumsum(counts) - counts - (np.cumsum(in_block) - in_block)[block]
        first_images[order] = block * block_images + before
        num_images = shards * block_images
    # Segments of a row are numbered by their column.
    order = np.lexsort((columns, rows))
    order = order[lengths[order] > 0]
    sorted_rows = rows[order]
    segments = np.zeros(len(lengths), np.int64)
    segments[order] = np.arange(len(order)) - np.searchsorted(sorted_rows, sorted_rows, side="left") + 1
    return RowPlan(row_length, shards, shards * block_rows, num_images, rows, columns, first_images, segments)


def lay_out(sequences: Sequences, items: np.ndarray, plan: RowPlan, blocks: Sequence[int]) -> PackedTokens:
    """Lays the items of some blocks into their rows.

    Args:
      sequences: n of the plan's items.
      items: int [n]; their numbers, which are all those of `blocks`.
      plan: where they go.
      blocks: the blocks that are wanted, in this order.

    Returns:
      A PackedTokens of NumPy arrays, the blocks one after the other. `item_index` and `image_index` number
      the items and images of the whole plan; `item_index` of padding is N.
    """
    lengths, num_items = sequences.lengths, len(plan.rows)
    place = np.zeros(plan.shards, np.int64)
    place[list(blocks)] = np.arange(len(blocks))

    def local(rows: np.ndarray, total: int) -> np.ndarray:
        """Rows of the whole plan's `total` as rows of the result."""
        size = total // plan.shards
        return place[rows // size] * size + rows % size

    shape = (len(blocks) * plan.num_rows // plan.shards, plan.row_length)
    starts = local(plan.rows[items], plan.num_rows) * plan.row_length + plan.columns[items]
    within = _within(lengths)
    target = np.repeat(starts, lengths) + within

    def spread(values: np.ndarray, fill: int = 0) -> np.ndarray:
        flat = np.full(shape[0] * shape[1], fill, np.int32)
        flat[target] = values
        return flat.reshape(shape)

    packed = PackedTokens(
        token_ids=spread(sequences.token_ids),
        segment_ids=spread(np.repeat(plan.segments[items], lengths)),
        positions=spread(within),
        item_index=spread(np.repeat(items, lengths), fill=num_items),
    )
    if sequences.images is None:
        return packed
    is_image = sequences.image_index >= 0
    owners = np.repeat(np.arange(len(lengths)), lengths)[is_image]
    rows = _spans(plan.first_images[items], np.bincount(owners, minlength=len(lengths)))
    image_index = np.full(len(is_image), -1, np.int64)
    image_index[is_image] = rows
    images = np.zeros(
        (len(blocks) * plan.num_images // plan.shards, *sequences.images.shape[1:]), sequences.images.dtype
    )
    images[local(rows, plan.num_images)] = sequences.images[sequences.image_index[is_image]]
    return dataclasses.replace(
        packed, image_index=spread(image_index, fill=-1), images=images, image_shards=plan.shards
    )


def pack(
    sequences: Sequences,
    row_length: int,
    *,
    shards: int = 1,
    row_multiple: int = 1,
    image_multiple: int = 1,
) -> PackedTokens:
    """Lays items into rows; arguments are those of `plan_rows`, the result is that of `lay_out`."""
    counts = None
    if sequences.images is not None:
        ends = np.concatenate([[0], np.cumsum(sequences.lengths)])
        before = np.concatenate([[0], np.cumsum(sequences.image_index >= 0)])
        counts = np.diff(before[ends])
    plan = plan_rows(
        sequences.lengths,
        counts,
        row_length,
        shards=shards,
        row_multiple=row_multiple,
        image_multiple=image_multiple,
    )
    return lay_out(sequences, np.arange(len(sequences.lengths)), plan, range(shards))


def _within(lengths: np.ndarray) -> np.ndarray:
    """0..length-1 for each span, one after the other."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)


def _spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices start..start+length-1 of each span, one after the other."""
    return np.repeat(starts, lengths) + _within(lengths)


def _part_lengths(part: Part, text_lengths: np.ndarray, image_counts: np.ndarray) -> np.ndarray:
    """Slots that a part takes in each item, int64 [N]."""
    if part.tokens is not None:
        there = image_counts > 0 if part.with_images else np.ones(len(image_counts), bool)
        return np.where(there, len(part.tokens), 0)
    return text_lengths if part.content == TEXT else image_counts
