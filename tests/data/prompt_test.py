"""Prompts against what the paper writes: T + E + I + V + EOS."""

import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from vixml_jax.data import packing, prompt
from vixml_jax.data.tokenizer import Tokenizer
from vixml_jax.errors import UserError

WORDS = ["<s>", "<end>", "[UNK]", "this", "product", "text", "and", "its", "image", "red", "kettle"]


def tokenizer(begins: bool) -> Tokenizer:
    """Words by whitespace; with `begins` every text starts with <s>."""
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if begins:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(backend)


def read(template: packing.Template, tokens: Tokenizer, text: str, pictures: int) -> list[str]:
    """The words of an item's sequence, V for a picture."""
    values, lengths = tokens.bare().encode_batch([text], 99)
    images = np.zeros((1, max(pictures, 1), 2), np.float32)
    present = np.arange(max(pictures, 1))[None] < pictures
    sequences = packing.assemble(values, lengths, template, images, present)
    packed = packing.pack(sequences, 32)
    taken = packed.item_index[0] == 0
    assert (packed.positions[0][taken] == np.arange(taken.sum())).all()  # no hole
    pairs = zip(packed.token_ids[0][taken], packed.image_index[0][taken], strict=True)
    return ["V" if image >= 0 else WORDS[token] for token, image in pairs]


@pytest.mark.parametrize("begins", [False, True])
def test_the_decoders_prompt(begins):
    words = tokenizer(begins)
    template = prompt.template(prompt.DECODER, words, ["<|endoftext|>", "<end>"])
    front = ["<s>"] * begins
    text = [*front, "this", "product", "text", "red", "kettle"]
    assert read(template, words, "red kettle", 0) == [*text, "<end>"]
    assert read(template, words, "red kettle", 2) == [*text, "and", "its", "image", "V", "V", "<end>"]


def test_other_orders():
    words = tokenizer(False)

    def order(text, pictures=1):
        return " ".join(read(prompt.template(text, words, ["<end>"]), words, "red kettle", pictures))

    assert order("{images}{text}") == "V red kettle"
    assert order("{text}{images}{eos}", 2) == "red kettle V V <end>"
    first = "[This product image {images} and its text ]{text}{eos}"
    assert order(first) == "this product image V and its text red kettle <end>"
    assert order(first, 0) == "red kettle <end>"
    assert order("{images}", 2) == "V V"
    assert order("{images}", 0) == ""


def test_words_stand_inside_an_encoders_special_tokens():
    words = tokenizer(False)
    ends = (np.array([0], np.int32), np.array([1], np.int32))
    template = prompt.template("{images}product {text}", words, around=ends)
    assert read(template, words, "red kettle", 1) == ["V", "<s>", "product", "red", "kettle", "<end>"]
    assert prompt.has_words("product {text}")
    assert not prompt.has_words(prompt.ENCODER)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("words", "neither {text} nor {images}"),
        ("{text}{text}", "{text} once"),
        ("[{text}]", "{text} once"),
        ("{text}{images}{images}", "more than once"),
        ("{text}{picture}", "placeholder {picture}"),
        ("{text}[{images}", "unmatched '['"),
        ("{text}]", "unmatched ']'"),
        ("{text}[ with its picture]", "in brackets, for items with pictures, but no {images}"),
        ("{text}[ with {Images}]", "placeholder {Images}"),
        ("{text} {", "stray brace"),
        ("[[{images}]]{text}", "unmatched '['"),
    ],
)
def test_a_wrong_prompt_is_refused(text, problem):
    with pytest.raises(UserError) as caught:
        prompt.parse(text)
    assert problem in str(caught.value)


def test_an_end_token_that_is_not_there_is_named():
    with pytest.raises(UserError, match="looked for <eos>"):
        prompt.template("{text}{eos}", tokenizer(False), ["<eos>"])
