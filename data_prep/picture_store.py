"""Pictures on disk, each content once: named by the SHA-256 of its bytes."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from pathlib import Path

from PIL import Image

from data_prep.transfers import Failed
from vixml_jax.data import pictures
from vixml_jax.data.raw_images import is_picture

JPEG_QUALITY = 90
TEMPORARY = ".part-"


class PictureStore:
    """A folder of pictures, written by several threads of one process.

    Args:
      directory: made if it is not there; what a killed process left unfinished is removed.
      max_side: larger pictures are shrunk to this many pixels a side, as JPEG; 0 keeps every file as it is.
    """

    def __init__(self, directory: Path, max_side: int = 0):
        self._directory, self._max_side = directory, max_side
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob(f"{TEMPORARY}*"):
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
        data, suffix = self._checked(data)
        digest = hashlib.sha256(data).hexdigest()
        # 256 folders: a file system slows down where millions of files share one.
        name = f"{digest[:2]}/{digest[2:]}.{suffix}"
        path = self._directory / name
        if not self.holds(name, len(data)):
            path.parent.mkdir(exist_ok=True)
            temporary = self._directory / f"{TEMPORARY}{threading.get_ident()}"
            temporary.write_bytes(data)
            os.replace(temporary, path)
        return name, len(data)

    def holds(self, name: str, size: int) -> bool:
        """Whether a picture is there as a whole: after a power cut a file may be shorter than it was."""
        try:
            return (self._directory / name).stat().st_size == size
        except OSError:
            return False

    def _checked(self, data: bytes) -> tuple[bytes, str]:
        """Returns the bytes to store, and the suffix that names their format."""
        if not is_picture(data):
            raise Failed("not a picture" if data else "an empty file", again=False)
        with Image.open(io.BytesIO(data)) as image:
            form, (width, height) = (image.format or "").lower(), image.size
        if max(width, height) <= 1:
            # What shops serve in place of a picture that is gone.
            raise Failed("a placeholder of one pixel", again=False)
        if self._max_side and max(width, height) > self._max_side:
            shrunk = pictures.decode(data)
            if shrunk is None:
                raise Failed("a picture that cannot be decoded", again=False)
            shrunk.thumbnail((self._max_side, self._max_side), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            shrunk.save(buffer, "JPEG", quality=JPEG_QUALITY)
            data, form = buffer.getvalue(), "jpeg"
        return data, "jpg" if form == "jpeg" else form
