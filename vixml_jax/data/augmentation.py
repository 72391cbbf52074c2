"""Pictures changed at random while a vision tower trains: stretched and moved.

A small tower soon knows its training pictures by heart, and what reads its embeddings learns to trust them
more than those of new pictures deserve.
"""

from __future__ import annotations

import dataclasses

import numpy as np

# Pictures changed together: so few that they stay in a processor's cache, where one of 384 pixels takes 25 ms
# and thirty-two together half as much again each.
AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How far pictures are changed, and what they look like as flat pixels.

    Attributes:
      strength: s. Width and height are stretched by factors between exp(-s) and exp(s), each by its own, and
        the picture is moved along both by up to s / 2 of its side. It is never mirrored: left and right may
        be what a picture is about.
      size: side of the square, in pixels.
      white: a white pixel after preprocessing, three numbers; it comes in from outside.
    """

    strength: float
    size: int
    white: tuple[float, float, float]

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Draws a change for each of some pictures.

        Returns:
          float32 [*shape, 2, 2]; for rows and for columns a slope a and an offset b: what the changed picture
          has at place x the given one has at a * x + b, both from -1 to 1 between the edges.
        """
        slopes, offsets = rng.uniform(-self.strength, self.strength, (2, *shape, 2))
        return np.stack([np.exp(slopes), offsets], axis=-1).astype(np.float32)

    def apply(self, pixels_MP: np.ndarray, changes_M22: np.ndarray) -> np.ndarray:
        """Changes M pictures; between pixels it goes in straight lines.

        Args:
          pixels_MP: float [M, size * size * 3], as after preprocessing.
          changes_M22: as drawn.

        Returns:
          The same shape and dtype.
        """
        changed_MP = np.empty_like(pixels_MP)
        for start in range(0, len(pixels_MP), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            changed_MP[some] = self._applied(pixels_MP[some], changes_M22[some])
        return changed_MP

    def _applied(self, pixels_MP: np.ndarray, changes_M22: np.ndarray) -> np.ndarray:
        """`apply` to a few pictures, float32."""
        count, size, white = len(pixels_MP), self.size, np.asarray(self.white, np.float32)
        # Less white, so that what comes in from outside is zero.
        x_MHWC = pixels_MP.reshape(count, size, size, 3).astype(np.float32) - white
        for axis in (0, 1):  # each time the next side comes first
            x_MHWC = self._read(x_MHWC, changes_M22[:, axis]).swapaxes(1, 2)
        return (x_MHWC + white).reshape(pixels_MP.shape)

    def _read(self, x_MHWC: np.ndarray, lines_M2: np.ndarray) -> np.ndarray:
        """Reads pictures along their first side at the places of a line, zero outside."""
        centers = (2 * np.arange(self.size, dtype=np.float32) + 1) / self.size - 1
        places_MR = ((lines_M2[:, :1] * centers + lines_M2[:, 1:] + 1) * self.size - 1) / 2
        before_MR = np.floor(places_MR).astype(np.int64)
        after_MR11 = (places_MR - before_MR)[:, :, None, None]
        padded = np.pad(x_MHWC, ((0, 0), (1, 1), (0, 0), (0, 0)))
        pictures = np.arange(len(x_MHWC))[:, None]
        first, second = (padded[pictures, np.clip(before_MR + i, 0, self.size + 1)] for i in (1, 2))
        return first + after_MR11 * (second - first)
