"""What a raw folder is, in about.json beside its files; `vixml prepare` hands it on to the TFDS dataset."""

from __future__ import annotations

from pathlib import Path

from vixml_jax import files
from vixml_jax.data.formats import ABOUT


def write(directory: Path, *, description: str, citation: str, homepage: str, license: str = "") -> None:
    """Writes about.json."""
    about = {"description": description, "citation": citation, "homepage": homepage, "license": license}
    files.write_json(directory / ABOUT, {name: text for name, text in about.items() if text})
