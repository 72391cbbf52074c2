"""Pictures on disk, each content once: named by the SHA-256 of its bytes."""

from __future__ import annotations

import hashlib
import io
import os
import uuid
from pathlib import Path

from PIL import Image

from data_prep.transfers import Failed
from vixml_jax.data import pictures

JPEG_QUALITY = 90
TEMPORARY = ".part-"


class PictureStore:
    """A folder of pictures; several threads, processes and machines may write to it.

    Args:
      directory: made if it is not there.
      max_side: larger pictures are shrunk to this many pixels a side, as JPEG; 0 keeps every file as it is.
    """

    def __init__(self, directory: Path, max_side: int = 0):
        self._directory, self._max_side = directory, max_side
        directory.mkdir(parents=True, exist_ok=True)

    def sweep(self) -> None:
        """Removes what killed processes left unfinished; for when no other one is writing."""
        for path in self._directory.glob(f"{TEMPORARY}*"):
            path.unlink()

    def add(self, data: bytes) -> tuple[str, int]:
        """Stores a picture.

        Args:
          data: the bytes of its file.

        Returns:
          Its path within the folder, and its size there in bytes.

        Raises:
          Failed: if it is no picture.
        """
        name, data = checked(data, self._max_side)
        path = self._directory / name
        if not self.holds(name, len(data)):
            path.parent.mkdir(exist_ok=True)
            temporary = self._directory / f"{TEMPORARY}{uuid.uuid4().hex}"
            try:
                temporary.write_bytes(data)
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        return name, len(data)

    def holds(self, name: str, size: int) -> bool:
        """Whether a picture is there as a whole: after a power cut a file may be shorter than it was."""
        try:
            return (self._directory / name).stat().st_size == size
        except OSError:
            return False


def checked(data: bytes, max_side: int = 0) -> tuple[str, bytes]:
    """Looks at a picture's file, and shrinks it if it is too large.

    Args:
      data: the bytes of the file.
      max_side: of a picture in pixels, 0 for no limit.

    Returns:
      A name made from the content, and the bytes to keep.

    Raises:
      Failed: if it is no picture.
    """
    size, form = _opened(data)
    if max(size) <= 1:
        # What shops serve in place of a picture that is gone.
        raise Failed("a placeholder of one pixel", again=False)
    if max_side and max(size) > max_side:
        shrunk = pictures.decode(data)
        if shrunk is None:
            raise Failed("a picture that cannot be decoded", again=False)
        shrunk.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        shrunk.save(buffer, "JPEG", quality=JPEG_QUALITY)
        data, form = buffer.getvalue(), "jpeg"
    digest = hashlib.sha256(data).hexdigest()
    # 256 folders: a file system slows down where millions of files share one.
    return f"{digest[:2]}/{digest[2:]}.{'jpg' if form == 'jpeg' else form}", data


def _opened(data: bytes) -> tuple[tuple[int, int], str]:
    """Returns size and format of a picture; its pixels are not read."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size, (image.format or "").lower()
    except (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError,
            Image.DecompressionBombWarning):  # fmt: skip
        raise Failed("not a picture" if data else "an empty file", again=False) from None
