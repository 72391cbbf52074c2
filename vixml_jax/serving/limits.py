"""What the service takes from a client, so that no request can harm the others."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of a request and of all of them together.

    Attributes:
      body_bytes: of a request.
      held_bytes: of all bodies that are in memory at a time.
      text_chars: of all texts of a query.
      images: pictures of a query.
      image_pixels: of a picture, known before it is unpacked.
      k: labels that a query may ask for.
      queue: queries that may wait.
      batch: queries computed together.
      wait_seconds: for company, while nothing is computed.
      body_seconds: in which a request's body must have come.
      answer_seconds: in which a query must be answered.
    """

    body_bytes: int = 16_000_000
    held_bytes: int = 400_000_000
    text_chars: int = 20_000
    images: int = 8
    image_pixels: int = 50_000_000
    k: int = 1000
    queue: int = 256
    batch: int = 64
    wait_seconds: float = 0.002
    body_seconds: float = 30.0
    answer_seconds: float = 60.0
