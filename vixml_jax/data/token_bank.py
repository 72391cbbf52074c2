"""The token bank: the token ids of every text of a split, computed once and memory-mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vixml_jax import files
from vixml_jax.data.dataset import TextColumn
from vixml_jax.data.ragged import Ragged, RaggedWriter
from vixml_jax.data.tokenizer import Tokenizer
from vixml_jax.progress import Progress

TEXTS_AT_ONCE = 8192


def build_or_load(
    texts: TextColumn, tokenizer: Tokenizer, max_tokens: int, cache_dir: Path, key_parts: list[Any]
) -> Ragged:
    """Tokenizes texts, or opens what an earlier call with the same key wrote.

    Args:
      texts: N texts.
      tokenizer: its fingerprint is part of the key.
      max_tokens: longest sequence, special tokens counted in.
      cache_dir: where banks lie.
      key_parts: JSON-able; what names the texts.

    Returns:
      int32 token ids, ragged [N].
    """
    directory = cache_dir / f"tokens-{files.fingerprint(*key_parts, tokenizer.fingerprint, max_tokens)}"
    if not directory.is_dir():
        with (
            files.atomic_dir(directory) as temporary,
            RaggedWriter(temporary, "int32") as writer,
            Progress(len(texts), "tokenize", "texts") as progress,
        ):
            for start in range(0, len(texts), TEXTS_AT_ONCE):
                chunk = texts[start : start + TEXTS_AT_ONCE]
                values, lengths = tokenizer.encode_batch(chunk, max_tokens)
                ends = lengths.cumsum()
                for begin, end in zip(ends - lengths, ends, strict=True):
                    writer.append(values[begin:end])
                progress.update(len(chunk))
    return Ragged.load(directory)
