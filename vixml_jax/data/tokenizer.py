"""Tokenizers: a checkpoint's own, or a WordPiece vocabulary trained on a dataset for a tower without one."""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from vixml_jax import files
from vixml_jax.errors import UserError

FILE = "tokenizer.json"
# Of a trained vocabulary; a token's place is its id.
SPECIAL = PAD, UNKNOWN, CLS, SEP = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
# Rarer characters of a dataset than so many are unknown to its vocabulary.
MOST_CHARACTERS = 1000
NORMALIZER = normalizers.BertNormalizer(lowercase=True)


class Tokenizer:
    """Turns texts into token ids, special tokens included, without padding.

    Args:
      backend: of the `tokenizers` library. Its own padding and truncation are turned off: checkpoints are
        published with all kinds of both.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Reads a directory with `tokenizer.json`, or with the older files of a Hugging Face tokenizer.

        Raises:
          UserError: if there is none, or it cannot be read.
        """
        directory = Path(directory)
        if (directory / FILE).is_file():
            try:
                return cls(tokenizers.Tokenizer.from_file(os.fspath(directory / FILE)))
            except Exception as error:  # the library raises plain exceptions
                raise UserError(f"cannot be read ({error})", file=directory / FILE) from None
        import transformers  # takes seconds; nearly all directories have a tokenizer.json

        try:
            fast = transformers.AutoTokenizer.from_pretrained(os.fspath(directory), trust_remote_code=False)
            return cls(fast.backend_tokenizer)
        except (OSError, ValueError, AttributeError, ImportError) as error:
            raise UserError(
                f"no tokenizer ({str(error).splitlines()[0]})",
                file=directory,
                fix="give a Hugging Face directory with tokenizer.json or vocab.txt",
            ) from None

    @classmethod
    def train(cls, texts: Sequence[str], vocab_size: int) -> Tokenizer:
        """Learns a lower-casing WordPiece vocabulary, as BERT's, of at most `vocab_size` tokens.

        The same texts give the same tokenizer in every process: ids choose rows of the embedding table, and
        every run of one config is to start from the same weights.
        """
        # The trainer numbers the pieces "##x" in the order of a hash table, which differs between processes,
        # and numbers decide ties. Given as special tokens they are numbered in the order that stands here.
        alphabet = _alphabet(texts, min(MOST_CHARACTERS, max(vocab_size // 4, 1)))
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=[*SPECIAL, *("##" + character for character in alphabet)],
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        scratch = _word_piece({})
        scratch.train_from_iterator(texts, trainer)
        learned = set(scratch.get_vocab()) - set(SPECIAL)
        ordered = [*SPECIAL, *sorted(learned, key=lambda token: (len(token), token))]
        backend = _word_piece({token: number for number, token in enumerate(ordered)})
        backend.add_special_tokens(list(SPECIAL))
        ends = processors.BertProcessing((SEP, SPECIAL.index(SEP)), (CLS, SPECIAL.index(CLS)))
        backend.post_processor = ends  # pyright: ignore[reportAttributeAccessIssue]
        return cls(backend)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json` into a directory, which appears only when it is whole."""
        with files.atomic_dir(directory) as temporary:
            (temporary / FILE).write_text(self._backend.to_str(), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included: ids are below it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes token ids."""
        return files.fingerprint(self._backend.to_str())

    def encode_batch(self, texts: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokenizes texts.

        Args:
          texts: N texts.
          max_tokens: longest sequence, special tokens counted in; what is longer is cut before its last
            special token.

        Returns:
          int32 [S], the texts' token ids end to end, and int64 [N], how many each has.
        """
        self._backend.enable_truncation(max_tokens)
        encodings = self._backend.encode_batch_fast(list(texts))
        self._backend.no_truncation()  # not of the tokenizer, and so not in its fingerprint
        rows = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        values = np.fromiter((token for row in rows for token in row), np.int32, int(lengths.sum()))
        return values, lengths


def _word_piece(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """A WordPiece tokenizer with BERT's normaliser and splitting; without a vocabulary, one to be trained."""
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))  # pyright: ignore[reportCallIssue]
    backend.normalizer = NORMALIZER  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.WordPiece()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _alphabet(texts: Sequence[str], most: int) -> list[str]:
    """The most frequent characters of the normalised texts, in a fixed order."""
    counts = collections.Counter[str]()
    for text in texts:
        counts.update(NORMALIZER.normalize_str(text))
    del counts[" "]
    frequent = sorted(counts, key=lambda character: (-counts[character], character))[:most]
    return sorted(frequent)
