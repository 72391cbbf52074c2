"""A split as the tower reads it: token bank, image bank and the order of an item's parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

from vixml_jax.data import packing
from vixml_jax.data.image_bank import ImageBank
from vixml_jax.data.ragged import Ragged


@dataclasses.dataclass(frozen=True)
class ItemBank:
    """N items, each read by row number.

    Attributes:
      tokens: int32 token ids, ragged [N].
      template: the order of prompt, text and pictures.
      images: embeddings of the pictures, or None for text only.
      max_images: pictures used of an item.
      image_tokens: slots that a picture takes; a row of `images` is so many embeddings one after the other.
      no_text: int32 token ids of an empty text: an encoder's special tokens, or nothing.
    """

    tokens: Ragged
    template: packing.Template = dataclasses.field(default_factory=packing.Template)
    images: ImageBank | None = None
    max_images: int = 0
    image_tokens: int = 1
    no_text: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))

    def __len__(self) -> int:
        return len(self.tokens)

    def text_only(self) -> ItemBank:
        """Returns the same items without their pictures."""
        return dataclasses.replace(self, images=None)

    def pictures_only(self) -> ItemBank:
        """Returns the same items as if their text were empty."""
        offsets = np.arange(len(self) + 1) * len(self.no_text)
        return dataclasses.replace(self, tokens=Ragged(np.tile(self.no_text, len(self)), offsets))

    def seen_as(self, modality: str) -> ItemBank:
        """Returns the same items as "text", as "image" or as both: "text+image"."""
        guises = {"text": self.text_only, "image": self.pictures_only, "text+image": lambda: self}
        return guises[modality]()

    def views(self, modalities: Collection[str]) -> list[tuple[ItemBank, np.ndarray]]:
        """Returns what items are embedded as, to be averaged: banks, and the rows of each, int [n].

        Items that have both text and pictures are seen as each of `modalities`; all others once, as they are.
        """
        has_text_N = self.text_lengths() > (len(self.no_text) if self.template.has_text else 0)
        has_both_N = has_text_N & (self.image_counts() > 0)
        both = np.flatnonzero(has_both_N)
        as_it_is = np.arange(len(self)) if "text+image" in modalities else np.flatnonzero(~has_both_N)
        views = [(self, as_it_is)]
        views += [(self.seen_as(name), both) for name in ("text", "image") if name in modalities]
        return [(bank, rows) for bank, rows in views if len(rows)]

    def take(
        self, rows: np.ndarray, keep_images: np.ndarray | None = None, keep_text: np.ndarray | None = None
    ) -> packing.Sequences:
        """Assembles the sequences of `rows`.

        Args:
          rows: int [n].
          keep_images: bool [n]; which items come with their pictures. None: all.
          keep_text: bool [n]; which items come with their text, and not as if it were empty. None: all.
        """
        values, lengths = self.tokens.take(rows)
        if keep_text is not None and not keep_text.all():
            offsets = np.concatenate([[0], np.cumsum([*lengths, len(self.no_text)])])
            texts = Ragged(np.concatenate([values, self.no_text]), offsets)  # the empty one is the last
            values, lengths = texts.take(np.where(keep_text, np.arange(len(rows)), len(rows)))
        if self.images is None:
            return packing.assemble(values, lengths, self.template)
        features, present = self.images.take(rows, self.max_images)
        if keep_images is not None:
            present = present & keep_images[:, None]
        present = present & self.template.has_images  # else the prompt has no place for them
        if (k := self.image_tokens) > 1:
            num_items, num_images, dim = features.shape
            features = features.reshape(num_items, num_images * k, dim // k)
            present = np.repeat(present, k, axis=1)
        return packing.assemble(values, lengths, self.template, features, present)

    def slots(self) -> np.ndarray:
        """Returns the number of slots of every item, int64 [N]."""
        counts = self.image_counts()
        overhead, with_images = (self.template.overhead(with_images=there) for there in (False, True))
        lengths = counts + np.where(counts > 0, with_images, overhead)
        return lengths + self.text_lengths()

    def text_lengths(self) -> np.ndarray:
        """Returns how many slots of every item are its text's, int64 [N]."""
        return self.tokens.lengths() if self.template.has_text else np.zeros(len(self), np.int64)

    def image_counts(self) -> np.ndarray:
        """Returns how many image embeddings, that is slots, the pictures of every item are, int64 [N]."""
        if self.images is None or not self.template.has_images:
            return np.zeros(len(self), np.int64)
        pictures = (self.images.slots[:, : self.max_images] >= 0).sum(1).astype(np.int64)
        return pictures * self.image_tokens
