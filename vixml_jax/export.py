"""Exports a run's text tower: `vixml export --workdir=runs/demo/text --out=DIR`.

DIR becomes a Hugging Face directory that `transformers.AutoModel` and sentence-transformers load: the tower,
LoRA merged into it, its tokenizer, which puts the run's prompt around every text, pooling and normalisation.
Of a run with pictures the image projection lies beside it. Label embeddings are no part of it; `vixml embed
--of=labels` writes those. With --adapter DIR holds the adapters alone, in PEFT's format; with --vision the
vision tower that a run has trained, which other runs take as a frozen one.

Examples:
  vixml export --workdir=runs/demo/text --out=hf/demo
  vixml export --workdir=runs/131k --out=hf/131k --dtype=bfloat16
  vixml export --workdir=runs/qwen --out=hf/qwen_adapter --adapter
  vixml export --workdir=runs/pictures --out=hf/pictures --vision
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import flags
from flax import nnx

from vixml_jax import __version__, files, sharding
from vixml_jax import run as run_lib
from vixml_jax.data import packing
from vixml_jax.data import tokenizer as tokenizer_lib
from vixml_jax.data.packing import Template
from vixml_jax.data.tokenizer import Tokenizer
from vixml_jax.errors import UserError
from vixml_jax.models import hf_names, hub, lora, own_vision
from vixml_jax.models.dual_encoder import DualEncoder
from vixml_jax.models.hf_layouts import Entry, Same, Transposed
from vixml_jax.models.layers import Adapter
from vixml_jax.models.own_vision import OWN_VISION
from vixml_jax.run import TrainedModel

FORMAT = "vixml export 1"
MARKER = "vixml_export.json"  # a directory with it is an earlier export, which a new one may replace
WEIGHTS, PROJECTION = "model.safetensors", "image_projection.safetensors"
SHARD_GB = 5.0  # as in transformers

# Type of the file -> (its name in safetensors, NumPy's type).
DTYPES: dict[str, tuple[str, Any]] = {
    "float32": ("F32", np.float32),
    "bfloat16": ("BF16", ml_dtypes.bfloat16),
}
# How checkpoints spell their special tokens, those to be preferred first.
SPECIAL_TOKENS = {
    "pad_token": ("[PAD]", "<pad>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
    "bos_token": ("<bos>", "<|begin_of_text|>", "<s>"),
    "eos_token": ("<eos>", "<|end_of_text|>", "<|endoftext|>", "</s>"),
}
# Directory -> module of sentence-transformers, in the order in which they run.
MODULES = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
POOLING = {"mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens",
                 "lasttoken")  # fmt: skip

README = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction]
---
# {name}

The text tower of a model for extreme multi-label classification, trained and exported by vixml {version}.
It embeds queries and labels' texts: {dim} dimensions, {pooling} pooling, L2-normalised, at most {max_tokens}
tokens a text.

```python
from sentence_transformers import SentenceTransformer

embeddings = SentenceTransformer("this/directory").encode(["a title"])
```

The labels' embeddings are not in here: besides its text, each is made of a free vector and the centroid of
its training queries.
"""
README_IMAGES = """
`{file}` holds the image projection, a linear map (`weight` [{dim}, {image_dim}], `bias`) from
the embedding of a picture by the vision tower `{vision}` into the space of the text tower's input embeddings,
where pictures stand beside words. transformers and sentence-transformers do not read it: to them an item is
its text.
"""


def define_flags() -> None:
    """Registers the command's flags."""
    flags.DEFINE_string("workdir", None, "Directory of the run")
    flags.DEFINE_string("out", None, "Directory that becomes the export; replaces an earlier export")
    flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Type of the weights")
    flags.DEFINE_bool("adapter", False, "Write the LoRA adapters alone, in PEFT's format")
    flags.DEFINE_enum("side", "", ["", "query", "label"], "Whose prompt, where each has its own")
    flags.DEFINE_bool("vision", False, "Write the trained vision tower, for config.vision.checkpoint")
    flags.DEFINE_float("max_shard_gb", SHARD_GB, "Largest file of weights, in GB", lower_bound=1e-6)


def main() -> int:
    """Runs the command."""
    for name in ("workdir", "out"):
        if not flags.FLAGS[name].value:
            raise UserError(f"export needs --{name}", fix="as in --workdir=runs/demo/text --out=hf/demo")
    out = Path(flags.FLAGS.out)
    export(
        Path(flags.FLAGS.workdir),
        out,
        dtype=flags.FLAGS.dtype,
        max_shard_gb=flags.FLAGS.max_shard_gb,
        side=flags.FLAGS.side,
        part="adapter" if flags.FLAGS.adapter else "vision" if flags.FLAGS.vision else "tower",
    )
    if flags.FLAGS.vision:
        print(f"{out} is ready: --config.vision.checkpoint={out}")
        return 0
    call = (
        "peft.PeftModel.from_pretrained(base, "
        if flags.FLAGS.adapter
        else "transformers.AutoModel.from_pretrained("
    )
    print(f'{out} is ready: {call}"{out}")')
    return 0


def export(
    workdir: Path,
    out: Path,
    *,
    dtype: str = "float32",
    max_shard_gb: float = SHARD_GB,
    part: str = "tower",
    side: str = "",
) -> None:
    """Writes the newest checkpoint's text tower as a Hugging Face directory.

    Args:
      workdir: the run's directory.
      out: becomes the export; appears only once it is complete.
      dtype: of the weights, a key of DTYPES.
      max_shard_gb: weights above it are split into files of at most so many GB, where single tensors fit.
      side: "query" or "label": whose prompt stands in the tokenizer; needed where they differ.
      part: "tower", "adapter" (LoRA alone, in PEFT's format) or "vision" (a vision tower that was trained).

    Raises:
      UserError: if `workdir` is not a run's directory, or `out` holds something else than an export.
    """
    out = out.resolve()
    _check_replaceable(out)
    if jax.process_count() > 1:
        raise UserError("export runs in one process", fix="run it on one host; any mesh reads a checkpoint")
    with sharding.ensure() as mesh:
        model = run_lib.load_model(workdir, mesh)
        if part == "adapter" and model.spec.lora is None:
            raise UserError("the run has no adapters", file=workdir, fix="leave --adapter out")
        if part == "vision" and model.spec.vision is None:
            raise UserError("the run has trained no vision tower", file=workdir, fix="leave --vision out")
        if part == "tower" and model.spec.late_images:
            raise UserError(
                "late fusion ends in a layer of its own, which transformers does not know",
                file=workdir,
                fix="export a run of config.vision.fusion='early'",
            )
        if part == "tower" and not side and model.spec.layout["query"] != model.spec.layout["label"]:
            raise UserError(
                "queries and labels have prompts of their own",
                file=workdir,
                fix="give --side=query or --side=label: a directory holds one",
            )
        max_shard_bytes = round(max_shard_gb * 1e9)
        with files.atomic_dir(out) as directory:
            if part == "adapter":
                write_adapter(model, directory)
            elif part == "vision":
                write_vision(model, directory, dtype, max_shard_bytes)
            else:
                write(model, directory, out.name, dtype, max_shard_bytes, side or "label")


def write_adapter(model: TrainedModel, directory: Path) -> None:
    """Fills an empty directory with the adapters. Must be called inside the mesh."""
    dual: DualEncoder = nnx.merge(model.graphdef, model.params, model.frozen)
    base, config = model.spec.base, model.spec.lora_config
    assert base is not None  # `export` has checked
    assert config is not None
    multimodal = hub.is_multimodal(base["checkpoint"])
    lora.write_peft(dual.tower.text, config, directory, base["checkpoint"], multimodal=multimodal)
    files.write_json(directory / MARKER, {"format": FORMAT, "version": __version__, "adapter": True})


def write_vision(model: TrainedModel, directory: Path, dtype: str, max_shard_bytes: int) -> None:
    """Fills an empty directory with the trained vision tower. Must be called inside the mesh."""
    dual: DualEncoder = nnx.merge(model.graphdef, model.params, model.frozen)
    tower = dual.tower.vision
    assert tower is not None  # `export` has checked
    family = OWN_VISION[own_vision.MODEL_TYPE]
    files.write_json(directory / "config.json", family.write_config(tower.config))
    tensors = tower_tensors(tower, family.entries(tower.config))
    write_weights(directory, tensors, dtype, max_shard_bytes)
    files.write_json(directory / MARKER, {"format": FORMAT, "version": __version__, "vision": True})


def write(
    model: TrainedModel, directory: Path, name: str, dtype: str, max_shard_bytes: int, side: str
) -> None:
    """Fills an empty directory with the export. Must be called inside the mesh."""
    dual: DualEncoder = nnx.merge(model.graphdef, model.params, model.frozen)
    tower, projection, spec = dual.tower.text, dual.tower.image_projection, model.spec
    tower_config: Any = tower.config  # pyright: ignore[reportAttributeAccessIssue]
    family = hf_names.TEXT_FAMILIES[tower_config.family]
    max_tokens = model.config.text.max_tokens

    files.write_json(directory / "config.json", {**family.write_config(tower_config), "dtype": dtype})
    write_weights(directory, tower_tensors(tower, family.entries(tower_config)), dtype, max_shard_bytes)
    layout = model.layout
    template = getattr(layout, side)
    longest = max_tokens + template.overhead(with_images=False)
    write_tokenizer(directory, prompted(model.tokenizer, template, layout.special_tokens), longest)
    write_sentence_transformers(directory, spec.dim, spec.pooling, longest)
    readme = README.format(
        name=name, version=__version__, dim=spec.dim, pooling=spec.pooling, max_tokens=max_tokens
    )
    if projection is not None:
        parts: Any = nnx.split(projection)[1]
        tensors = [
            Tensor("weight", parts["kernel"].get_value(), None, Transposed()),
            Tensor("bias", parts["bias"].get_value(), None, Same()),
        ]
        write_safetensors(directory / PROJECTION, tensors, dtype)
        readme += README_IMAGES.format(
            file=PROJECTION,
            dim=spec.dim,
            image_dim=spec.image_dim,
            vision=model.config.vision.checkpoint,
        )
    with files.atomic_file(directory / "README.md", "w") as file:
        file.write(readme)
    marker = {"format": FORMAT, "version": __version__, "pooling": spec.pooling, "dim": spec.dim}
    files.write_json(directory / MARKER, marker)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a safetensors file, whose values are fetched only when it is written.

    Attributes:
      name: in the file.
      value: the parameter, on devices.
      layer: which of its stacked layers it is; None where it is not stacked.
      layout: how the parameter becomes the tensor.
      adapter: what is added to a kernel, stacked as it is.
    """

    name: str
    value: jax.Array
    layer: int | None
    layout: Any
    adapter: Adapter | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file."""
        return self.layout.hf_shape(self.value.shape if self.layer is None else self.value.shape[1:])

    def fetch(self, dtype: str) -> np.ndarray:
        """The values as they stand in the file."""
        part = lambda array: array if self.layer is None else _layer(array, self.layer)  # noqa: E731
        value = part(self.value)
        if self.adapter is not None:
            a, b = (part(variable.get_value()) for variable in (self.adapter.lora_a, self.adapter.lora_b))
            value = lora.merged(value, a, b, self.adapter.scale)
        return np.ascontiguousarray(self.layout.write(np.asarray(value)).astype(DTYPES[dtype][1], copy=False))


@jax.jit
def _layer(stacked: jax.Array, layer: int) -> jax.Array:
    """One layer's part of a stacked parameter, whatever its sharding."""
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def tower_tensors(tower: Any, entries: Sequence[Entry]) -> list[Tensor]:
    """Lists the tensors of a tower under the names of its family's table, in its order.

    Raises:
      ValueError: if the table does not name every parameter, which would be lost.
    """
    adapters = {
        f"{'.'.join(path)}.kernel": linear.adapter
        for path, linear in lora.linears(tower)
        if linear.adapter is not None
    }
    params = {
        ".".join(map(str, path)): leaf
        for path, leaf in nnx.to_flat_state(nnx.split(tower)[1])
        if not isinstance(leaf, nnx.LoRAParam)
    }
    if unknown := params.keys() ^ {entry.path for entry in entries}:
        raise ValueError(f"{tower.config.family}: parameters and table differ by {sorted(unknown)}")
    tensors = []
    for entry in entries:
        value: Any = params[entry.path].get_value()
        layers = range(value.shape[0]) if entry.stacked else [None]
        tensors += [
            Tensor(entry.hf.format(i=layer), value, layer, entry.layout, adapters.get(entry.path))
            for layer in layers
        ]
    return tensors


def write_weights(directory: Path, tensors: Sequence[Tensor], dtype: str, max_shard_bytes: int) -> None:
    """Writes model.safetensors, or numbered files with an index where that would be too large."""
    shards: list[list[Tensor]] = [[]]
    filled = total = 0
    for tensor in tensors:
        size = _num_bytes(tensor, dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
        total += size
    if len(shards) == 1:
        write_safetensors(directory / WEIGHTS, tensors, dtype)
        return
    places = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / name, shard, dtype)
        places |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    files.write_json(directory / f"{WEIGHTS}.index.json", index)


def write_safetensors(path: Path, tensors: Sequence[Tensor], dtype: str) -> None:
    """Writes a safetensors file one tensor after the other, so that never more than one is held here.

    The format: a JSON header with each tensor's place, its length in front (8 bytes, little-endian), the
    values behind.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + _num_bytes(tensor, dtype)
        place = {"dtype": DTYPES[dtype][0], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[tensor.name] = place
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the values are aligned
    with files.atomic_file(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            file.write(tensor.fetch(dtype).reshape(-1).view(np.uint8))


def _num_bytes(tensor: Tensor, dtype: str) -> int:
    return math.prod(tensor.shape) * np.dtype(DTYPES[dtype][1]).itemsize


def prompted(tokenizer: Tokenizer, template: Template, special_tokens: bool) -> Tokenizer:
    """Returns a tokenizer that puts the run's prompt for items without pictures around every text."""
    sides: tuple[list[int], list[int]] = ([], [])
    passed = 0  # 1 from the text on
    for part in template.parts:
        if part.tokens is None:
            passed += part.content == packing.TEXT
        elif not part.with_images:
            sides[passed].extend(part.tokens.tolist())
    before, after = sides
    if not before and not after and special_tokens:
        return tokenizer
    return tokenizer.surrounded(before, after, special_tokens=special_tokens)


def write_tokenizer(directory: Path, tokenizer: Tokenizer, max_tokens: int) -> None:
    """Writes the tokenizer, and what AutoTokenizer wants to know besides."""
    file = directory / tokenizer_lib.FILE
    file.write_text(tokenizer.to_json(), encoding="utf-8")
    known = {token["content"] for token in files.read_json(file).get("added_tokens", [])}
    special = {
        role: next(name for name in names if name in known)
        for role, names in SPECIAL_TOKENS.items()
        if known & set(names)
    }
    if "pad_token" not in special and special:
        special["pad_token"] = next(iter(special.values()))  # any will do: attention leaves padding out
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        # Towers without token types take no others, and those with them read zeros.
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    files.write_json(directory / "tokenizer_config.json", settings)
    files.write_json(directory / "special_tokens_map.json", special)


def write_sentence_transformers(directory: Path, dim: int, pooling: str, max_tokens: int) -> None:
    """Writes what sentence-transformers reads besides: tower, pooling, normalisation."""
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(MODULES.items())
    ]
    pooled: dict[str, Any] = {"word_embedding_dimension": dim}
    pooled |= {f"pooling_mode_{mode}": f"pooling_mode_{mode}" == POOLING[pooling] for mode in POOLING_MODES}
    files.write_json(directory / "modules.json", modules)
    files.write_json(directory / "1_Pooling" / "config.json", {**pooled, "include_prompt": True})
    files.write_json(directory / "2_Normalize" / "config.json", {})  # Git keeps no empty directories
    files.write_json(
        directory / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False}
    )
    files.write_json(
        directory / "config_sentence_transformers.json",
        {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def _check_replaceable(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError("a file", file=out, fix="give --out a directory")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise UserError("holds something else than an export", file=out, fix="give another --out")
