"""The banks of a run: what every query and label of a dataset looks like to the tower."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vixml_jax import config as config_lib
from vixml_jax import files, sharding
from vixml_jax.data import image_bank, prompt, token_bank
from vixml_jax.data.augmentation import Augmentation
from vixml_jax.data.dataset import Split, XmcDataset
from vixml_jax.data.items import ItemBank
from vixml_jax.data.packing import Template
from vixml_jax.data.pictures import Picture
from vixml_jax.data.tokenizer import SEP, Tokenizer
from vixml_jax.errors import UserError
from vixml_jax.models import hub
from vixml_jax.models.encoder import EncoderConfig
from vixml_jax.models.vision import VisionTower

SPLITS = ("train", "test", "labels")


@dataclasses.dataclass(frozen=True)
class Banks:
    """One ItemBank a split."""

    train: ItemBank
    test: ItemBank
    labels: ItemBank


@dataclasses.dataclass(frozen=True)
class Layout:
    """How texts become the sequences that the tower reads.

    Attributes:
      query, label: the order of an item's parts.
      special_tokens: whether the tokenizer's special tokens stand around a text.
    """

    query: Template
    label: Template
    special_tokens: bool

    def longest(self, config: ConfigDict) -> int:
        """Returns the slots of the longest item there can be."""
        images = config.vision.images > 0
        prompts = max(template.overhead(with_images=images) for template in (self.query, self.label))
        return config_lib.longest_item(config) + prompts

    def tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        """Returns the tokenizer as texts want it."""
        return tokenizer if self.special_tokens else tokenizer.bare()

    def to_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads."""
        return {
            "query": self.query.to_json(),
            "label": self.label.to_json(),
            "special_tokens": self.special_tokens,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Layout:
        """Reads what `to_json` returned."""
        query, label = (Template.from_json(value[name]) for name in ("query", "label"))
        return cls(query, label, value["special_tokens"])


def layout_for(config: ConfigDict, tokenizer: Tokenizer) -> Layout:
    """Returns the layout that `config.text.prompt` and `query_prompt` ask for.

    Raises:
      UserError: if a prompt is wrong, or the tokenizer has no end token where one is asked for.
    """
    name = config.text.checkpoint
    tower = hub.text_config(name)
    is_encoder = isinstance(tower, EncoderConfig)
    ends = [hub.end_token(tower), *_own_end_token(name), SEP]

    prompts = [config.text.prompt, config.text.query_prompt or config.text.prompt]
    # An encoder's special tokens stand around its words too: [CLS] query: red shoe [SEP].
    worded = is_encoder and any(text != "auto" and prompt.has_words(text) for text in prompts)
    around = tokenizer.special_ends if worded else None

    def template(text: str) -> Template:
        if text == "auto":
            text = prompt.ENCODER if is_encoder else prompt.DECODER
        if config.vision.fusion == "late":
            text = prompt.pictures_last(text)
        return prompt.template(text, tokenizer, [*filter(None, ends)], around)

    label = template(config.text.prompt)
    query = template(config.text.query_prompt) if config.text.query_prompt else label
    if config.vision.images and not (query.has_images or label.has_images):
        raise UserError(
            f"config.vision.images={config.vision.images}, but the prompts have no {{images}}",
            fix="give --config.vision.images=0, or a prompt with them",
        )
    return Layout(query, label, special_tokens=is_encoder and not worded)


def _own_end_token(checkpoint: str) -> list[str]:
    """What a checkpoint's tokenizer calls its end token."""
    directory = hub.tokenizer_dir(checkpoint)
    if directory is None or not (directory / "tokenizer_config.json").is_file():
        return []
    token = files.read_json(directory / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return [token] if isinstance(token, str) else []


def tokenizer_for(config: ConfigDict, dataset: XmcDataset, workdir: Path) -> Tokenizer:
    """Returns the run's tokenizer: the one kept in the workdir, the checkpoint's, or one trained on the data.

    A tower with random weights comes without a vocabulary; it gets one learned from the training and label
    texts (never from the test split).
    """
    kept = workdir / "tokenizer"
    if kept.is_dir():
        return Tokenizer.load(kept)
    if config.text.checkpoint.startswith("random:"):
        fields = tuple(config.dataset.fields)
        texts = [*dataset.labels.text_of(fields), *dataset.train.text_of(fields)]
        tokenizer = Tokenizer.train(texts, config.text.vocab_size)
    else:
        directory = hub.tokenizer_dir(config.text.checkpoint)
        assert directory is not None  # only random presets have none
        tokenizer = Tokenizer.load(directory)
    tokenizer.save(kept)
    return tokenizer


def build(config: ConfigDict, dataset: XmcDataset, tokenizer: Tokenizer, layout: Layout) -> Banks:
    """Reads the banks of all three splits from the cache, or makes them."""
    cache = Path(config.dataset.cache_dir or Path(dataset.dir) / "derived")
    tokenizer = layout.tokenizer(tokenizer)
    templates = {"train": layout.query, "test": layout.query, "labels": layout.label}
    banks = {
        name: item_bank(config, dataset, name, getattr(dataset, name), tokenizer, templates[name], cache)
        for name in SPLITS
    }
    longest = max(int(bank.slots().max(initial=1)) for bank in banks.values())
    if longest > config.train.row_length:
        raise UserError(
            f"an item has {longest} slots, more than config.train.row_length={config.train.row_length}",
            fix=f"give --config.train.row_length={sharding.round_up(longest, 32)}",
        )
    return Banks(**banks)


def item_bank(
    config: ConfigDict,
    dataset: XmcDataset,
    name: str,
    split: Split,
    tokenizer: Tokenizer,
    template: Template,
    cache: Path,
) -> ItemBank:
    """Reads the bank of one split from `cache`, or makes it."""
    fields = tuple(config.dataset.fields)
    # A view of a split (held-out rows) has banks of its own.
    key = [dataset.fingerprint, name, config.dataset.holdout]
    tokens = token_bank.build_or_load(
        split.text_of(fields), tokenizer, config.text.max_tokens, cache, [*key, *fields]
    )
    images = picture_bank(config, split, cache, name) if config.vision.images else None
    no_text, _ = tokenizer.encode_batch([""], config.text.max_tokens)
    return ItemBank(tokens, template, images, config.vision.images, config.vision.tokens, no_text)


def picture_bank(config: ConfigDict, split: Split, cache: Path, name: str) -> image_bank.ImageBank:
    """Reads the frozen vision tower's embeddings of a split from `cache`; computes those that it lacks.

    With `config.vision.precomputed` they are those that the dataset was prepared with.

    Raises:
      UserError: if it was prepared without any.
    """
    if not config.vision.precomputed:
        return image_bank.build_or_load(split.images, vision_tower(config), cache, name)
    ready = split.image_embeddings()
    if ready is None:
        raise UserError(
            "config.vision.precomputed, but the dataset has no embeddings of pictures",
            file=config.dataset.dir,
            fix="prepare a raw folder that has {trn,tst,lbl}_embs_imgs_*.npy, or give "
            "--noconfig.vision.precomputed",
        )
    return ready


def pictures_in_memory(
    config: ConfigDict, images: Sequence[Sequence[Picture]], dim: int
) -> image_bank.ImageBank:
    """Embeds the pictures of new items: paths, bytes or PIL images; what cannot be read counts as missing.

    Args:
      config: the run's config.
      images: the pictures of every item.
      dim: size of an embedding that the run was trained on.

    Raises:
      UserError: if these came with the dataset, and the config's tower gives others.
    """
    used = [item[: config.vision.images] for item in images]
    tower, count = vision_tower(config), sum(map(len, used))
    if config.vision.precomputed and tower.dim != dim:
        raise UserError(
            f"the run was trained on ready embeddings of {dim} numbers, {config.vision.checkpoint} gives "
            f"{tower.dim} for a new picture",
            fix="train with --config.vision.checkpoint=the tower that made them, or leave the pictures out",
        )
    # A service asks for one picture at a time: a power of two of them makes few shapes.
    size = min(sharding.power_of_two(count), tower.batch_size)
    return image_bank.build(used, dataclasses.replace(tower, batch_size=size))


def augmentation(config: ConfigDict) -> Augmentation | None:
    """Returns how pictures are changed while the vision tower trains, or None where they are not."""
    vision = config.vision
    if not (vision.augment and vision.images):
        return None
    preprocessing = hub.vision_config(vision.checkpoint).preprocessing
    mean, std = (np.asarray(preprocessing[name]) for name in ("mean", "std"))
    return Augmentation(vision.augment, preprocessing["size"], tuple((1 - mean) / std))


def vision_tower(config: ConfigDict) -> image_bank.FrozenTower:
    """Returns what fills an image bank: the config's vision tower, loaded when the first picture comes.

    Batches are split over the devices of the mesh that is set, or of one over all devices; weights lie as the
    table says. Of a tower that trains, the model itself turns pixels into embeddings: the bank holds the
    pixels, as they are after preprocessing.
    """
    name, dtype = config.vision.checkpoint, config.vision.dtype
    if config.vision.train != "none":
        vision = hub.vision_config(name)
        flat = lambda pixels: pixels.reshape(len(pixels), -1)  # noqa: E731
        dim = vision.image_size**2 * 3
        size = config.vision.batch_size
        return image_bank.FrozenTower(flat, vision.preprocessing, dim, size, {"pixels": True})
    with sharding.ensure() as mesh:
        return _vision_tower(name, dtype, config.vision.tokens, config.vision.batch_size, mesh)


@functools.lru_cache(maxsize=1)
def _vision_tower(name: str, dtype: str, tokens: int, batch_size: int, mesh: Mesh) -> image_bank.FrozenTower:
    vision = hub.vision_config(name)
    if (most := (vision.image_size // vision.patch_size) ** 2) < tokens:
        raise UserError(
            f"config.vision.tokens={tokens}, but {name} cuts a picture into {most} patches", fix="give fewer"
        )

    @functools.cache
    def load() -> Callable[[np.ndarray], jax.Array]:
        tower = hub.load_vision_tower(name, dtype, param_dtype=dtype)

        def embed(tower: VisionTower, pixels: jax.Array) -> jax.Array:
            return tower.embed_tokens(pixels, tokens).reshape(len(pixels), -1)

        return functools.partial(jax.jit(embed, out_shardings=sharding.replicated(mesh)), tower)

    def embed(pixels: np.ndarray) -> jax.Array:
        # A few new pictures need not divide by the number of devices.
        is_split = len(pixels) % sharding.num_row_shards(mesh) == 0
        with sharding.use(mesh):
            where = sharding.rows(mesh, 4) if is_split else sharding.replicated(mesh)
            return load()(jax.device_put(pixels, where))

    shape = hub.tower_config_to_json(vision)
    made_from = {"weights": tower_fingerprint(name), "shape": shape, "dtype": dtype}
    if tokens > 1:
        made_from["tokens"] = tokens
    return image_bank.FrozenTower(
        embed,
        vision.preprocessing,
        vision.dim * tokens,
        sharding.round_up(batch_size, sharding.num_row_shards(mesh)),
        made_from,
    )


def tower_fingerprint(name: str) -> str:
    """Names a checkpoint by its content: a changed file is another tower."""
    if name.startswith("random:"):
        return name
    digest = hashlib.sha256()
    for file in sorted(Path(hub.resolve(name)).glob("*")):
        if file.name in ("config.json", "adapter_config.json") or file.suffix == ".safetensors":
            status = file.stat()
            digest.update(_file_digest(file, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=256)
def _file_digest(file: Path, size: int, mtime_ns: int) -> bytes:
    """SHA-256 of a file, read again when it looks changed."""
    del size, mtime_ns
    return bytes.fromhex(files.sha256(file))
