"""Packing: many short items share rows of fixed length, so that almost no slot is padding.

An item is the sequence that the tower reads: prompt, text tokens and image slots. `assemble` writes the
sequences one after the other into flat arrays, `assign_rows` decides which row and column each goes to, and
`pack` lays them out. Padding to one item a row would waste more than half of the work on titles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

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


def pack(
    sequences: Sequences, row_length: int, *, row_multiple: int = 1, image_multiple: int = 1
) -> PackedTokens:
    """Lays items into rows.

    Args:
      sequences: the items.
      row_length: T, slots of a row.
      row_multiple: the number of rows R is rounded up to a multiple of it, so that few shapes occur.
      image_multiple: the same for the number of image embeddings M.

    Returns:
      A PackedTokens of NumPy arrays; `item_index` of padding is N.
    """
    lengths = sequences.lengths
    rows, columns, num_rows = assign_rows(lengths, row_length)
    num_rows = max(-(-num_rows // row_multiple), 1) * row_multiple
    shape = (num_rows, row_length)

    within = _within(lengths)
    target = np.repeat(rows * row_length + columns, lengths) + within
    items = np.repeat(np.arange(len(lengths)), lengths)
    # Segments of a row are numbered by their column.
    order = np.lexsort((columns, rows))
    order = order[lengths[order] > 0]
    sorted_rows = rows[order]
    first_of_row = np.searchsorted(sorted_rows, sorted_rows, side="left")
    segments = np.zeros(len(lengths), np.int64)
    segments[order] = np.arange(len(order)) - first_of_row + 1

    def spread(values: np.ndarray, fill: int = 0) -> np.ndarray:
        flat = np.full(num_rows * row_length, fill, np.int32)
        flat[target] = values
        return flat.reshape(shape)

    packed = PackedTokens(
        token_ids=spread(sequences.token_ids),
        segment_ids=spread(np.repeat(segments, lengths)),
        positions=spread(within),
        item_index=spread(items, fill=len(lengths)),
    )
    if sequences.images is None:
        return packed
    num_images = max(-(-len(sequences.images) // image_multiple), 1) * image_multiple
    images = np.zeros((num_images, *sequences.images.shape[1:]), sequences.images.dtype)
    images[: len(sequences.images)] = sequences.images
    return dataclasses.replace(packed, image_index=spread(sequences.image_index, fill=-1), images=images)


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
