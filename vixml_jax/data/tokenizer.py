"""Tokenizers: a checkpoint's own, or a WordPiece vocabulary trained on a dataset for a tower without one."""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Iterable, Sequence
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
    """Turns texts into token ids, without padding.

    Args:
      backend: of the `tokenizers` library. Its own padding and truncation are turned off: checkpoints are
        published with all kinds of both.
      special_tokens: whether texts get the special tokens that the tokenizer puts around them, as encoders
        want it; decoders have a prompt instead.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: bool = True):
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._special_tokens = special_tokens

    def bare(self) -> Tokenizer:
        """Returns the same tokenizer without special tokens around texts."""
        return Tokenizer(self._backend, special_tokens=False)

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
            if len(fast) <= len(fast.all_special_tokens):  # what it makes of a directory without any words
                raise ValueError("no vocabulary")
            return cls(fast.backend_tokenizer)
        except Exception as error:  # of what is broken it raises anything
            raise UserError(
                f"no tokenizer ({(str(error).splitlines() or [type(error).__name__])[0]})",
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
            (temporary / FILE).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """Returns the content of a `tokenizer.json`."""
        return self._backend.to_str()

    def surrounded(self, before: Sequence[int], after: Sequence[int], *, special_tokens: bool) -> Tokenizer:
        """Returns a tokenizer that puts these ids around every text.

        Args:
          before, after: token ids.
          special_tokens: whether the special tokens that it puts there now stay, inside of them.
        """
        leading, trailing = self._ends if special_tokens else ([], [])
        backend = tokenizers.Tokenizer.from_str(self.to_json())
        around = {"before": [*before, *leading], "after": [*trailing, *after]}
        pieces = [
            {"id": name, "ids": ids, "tokens": [backend.id_to_token(i) for i in ids]}
            for name, ids in around.items()
            if ids
        ]
        order = [piece for piece in ("before", "$A", "after") if around.get(piece, "text")]
        backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=" ".join(order),
            special_tokens=pieces,  # pyright: ignore[reportArgumentType]
        )
        return Tokenizer(backend)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included: ids are below it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes token ids."""
        return files.fingerprint(self.to_json(), self._special_tokens)

    @property
    def leading_tokens(self) -> np.ndarray:
        """Ids of the special tokens that the tokenizer puts before every text, int32."""
        return self.special_ends[0]

    @property
    def special_ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the special tokens before and after every text, int32.

        Raises:
          UserError: if an id is beyond int32.
        """
        before, after = self._ends
        return _token_ids(before), _token_ids(after)

    @property
    def _ends(self) -> tuple[list[int], list[int]]:
        """Special tokens before and after every text."""
        whole = self._backend.encode("a").ids
        inner = self._backend.encode("a", add_special_tokens=False).ids
        starts = (i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
        start = next(starts, 0)
        return whole[:start], whole[start + len(inner) :]

    def token_id(self, name: str) -> int | None:
        """Returns the id of a token, None where there is none of that name."""
        return self._backend.token_to_id(name)

    def encode_batch(self, texts: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokenizes texts.

        Args:
          texts: N texts.
          max_tokens: longest sequence, special tokens counted in where texts get them; what is longer is cut
            before its last special token.

        Returns:
          int32 [S], the texts' token ids end to end, and int64 [N], how many each has.

        Raises:
          UserError: if special tokens alone fill `max_tokens`, a text cannot be read, or an id is no int32.
        """
        try:
            special = sum(map(len, self._ends)) if self._special_tokens else 0
            self._backend.enable_truncation(max_tokens)
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=self._special_tokens)
        except Exception as error:  # plain ones again: a vocabulary without its own unknown token, say
            problem = f"the tokenizer cannot read a text ({error})"
            raise UserError(problem, fix="give the tokenizer.json of a complete checkpoint") from None
        finally:
            self._backend.no_truncation()  # not of the tokenizer, and so not in its fingerprint
        if max_tokens <= special:  # the library has not cut at all
            raise UserError(
                f"config.text.max_tokens={max_tokens} has no room for a text beside {special} special tokens",
                fix=f"give {special + 1} or more",
            )
        rows = [encoding.ids for encoding in encodings]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return _token_ids(itertools.chain.from_iterable(rows), int(lengths.sum())), lengths


def _token_ids(ids: Iterable[int], count: int = -1) -> np.ndarray:
    """Token ids as int32; a tokenizer's file may hold any."""
    try:
        return np.fromiter(ids, np.int32, count)
    except OverflowError:
        raise UserError(
            "the tokenizer gives a token an id beyond 2,147,483,647",
            fix="give the tokenizer.json of a complete checkpoint",
        ) from None


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
