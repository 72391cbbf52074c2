"""Prompts: what stands around an item's text and pictures (ViXML, early fusion and Tables 6 and 11).

A prompt is written as it is read: literal words, and the placeholders {text} (the item's text, for encoders
with its special tokens), {images} (a slot for each picture), {bos} (what the tokenizer puts before a text, if
anything) and {eos} (the family's end token). A part in brackets is only for items with a picture:

  This product text {text}[ and its image {images}]{eos}

Without {text} an item is its pictures alone. Every literal part is tokenized by itself, without spaces at its
ends, so that the tokens of a prompt do not depend on the text beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from vixml_jax.data.packing import IMAGES, TEXT, Part, Template
from vixml_jax.data.tokenizer import Tokenizer
from vixml_jax.errors import UserError

ENCODER = "{images}{text}"
# METHOD: T + E [+ I + V] + EOS. Families whose tokenizer begins every text with a token keep it in front.
DECODER = "{bos}This product text {text}[ and its image {images}]{eos}"

_PIECES = re.compile(r"(\{[^{}]*\}|\[|\])")


def parse(prompt: str) -> list[tuple[str, bool]]:
    """Splits a prompt into its pieces.

    Returns:
      (piece, whether it is only for items with pictures); a piece is a placeholder or a literal.

    Raises:
      UserError: if a placeholder is unknown, brackets do not match, {text} or {images} is there twice, {text}
        within brackets, or neither {text} nor, where something is for items with pictures, {images}.
    """
    pieces: list[tuple[str, bool]] = []
    inside = False
    for piece in _PIECES.split(prompt):
        if piece in ("[", "]"):
            if inside == (piece == "["):
                raise _wrong(prompt, f"has an unmatched {piece!r}")
            inside = not inside
        elif piece.startswith("{") and piece not in ("{text}", "{images}", "{bos}", "{eos}"):
            raise _wrong(prompt, f"has an unknown placeholder {piece}")
        elif not piece.startswith("{") and ("{" in piece or "}" in piece):
            raise _wrong(prompt, "has a stray brace")
        elif piece.strip():
            pieces.append((piece.strip(), inside))
    names = [piece for piece, _ in pieces]
    if inside:
        raise _wrong(prompt, "has an unmatched '['")
    if names.count("{text}") > 1 or ("{text}", True) in pieces:
        raise _wrong(prompt, "must have {text} once, outside of brackets")
    if names.count("{images}") > 1:
        raise _wrong(prompt, "has {images} more than once")
    if "{text}" not in names and "{images}" not in names:
        raise _wrong(prompt, "has neither {text} nor {images}")
    if "{images}" not in names and any(inside for _, inside in pieces):
        raise _wrong(prompt, "has a part in brackets, for items with pictures, but no {images}")
    return pieces


def pictures_last(prompt: str) -> str:
    """Returns the prompt without what it says of pictures, and these at its end: late fusion's order."""
    parse(prompt)  # before what may be wrong with it is cut out
    return re.sub(r"\[[^\]]*\]", "", prompt).replace("{images}", "") + "{images}"


def has_words(prompt: str) -> bool:
    """Whether a prompt has literal words, which stand inside the special tokens of a text."""
    return any(not piece.startswith("{") for piece, _ in parse(prompt))


def template(
    prompt: str,
    tokenizer: Tokenizer,
    end_tokens: Sequence[str] = (),
    around: tuple[np.ndarray, np.ndarray] | None = None,
) -> Template:
    """Returns the order of an item's parts that a prompt stands for.

    Args:
      prompt: as the module describes it.
      tokenizer: of the run.
      end_tokens: names of the end token; the first that the tokenizer knows is taken.
      around: special tokens to stand before and after the text and the words, as in [CLS] query: text [SEP].

    Raises:
      UserError: if the prompt is wrong, or asks for an end token that the tokenizer does not have.
    """

    def parts() -> Iterator[Part]:
        for piece, with_images in parse(prompt):
            if piece == "{text}":
                yield Part(TEXT)
            elif piece == "{images}":
                yield Part(IMAGES)
            else:
                ids = _tokens(piece, tokenizer, end_tokens)
                if len(ids):
                    yield Part(ids, with_images)

    found = list(parts())
    if around is not None:
        is_text = [part.tokens is not None or part.content == TEXT for part in found]
        first, last = is_text.index(True), len(found) - is_text[::-1].index(True)
        found[last:last] = [Part(around[1])]
        found[first:first] = [Part(around[0])]
    return Template(tuple(found))


def _tokens(piece: str, tokenizer: Tokenizer, end_tokens: Sequence[str]) -> np.ndarray:
    """Token ids of a piece other than text and images, int32."""
    if piece == "{bos}":
        return tokenizer.leading_tokens
    if piece == "{eos}":
        ids = [found for name in end_tokens if (found := tokenizer.token_id(name)) is not None]
        if not ids:
            raise UserError(
                f"the tokenizer has no end token: looked for {', '.join(end_tokens)}",
                fix="give --config.text.prompt without {eos}",
            )
        return np.array(ids[:1], np.int32)
    return tokenizer.bare().encode_batch([piece], 1 << 20)[0]


def _wrong(prompt: str, problem: str) -> UserError:
    return UserError(
        f"config.text.prompt={prompt!r} {problem}",
        fix="write it as in 'This product text {text}[ and its image {images}]{eos}'",
    )
