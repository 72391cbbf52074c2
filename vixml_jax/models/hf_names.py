"""How towers lie in Hugging Face directories: per family, which tensor is which parameter, in what layout.

A table is read in both directions: by the loader, and by the export.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from vixml_jax.errors import UserError
from vixml_jax.models.encoder import EncoderConfig

Index = tuple[slice, ...]

_OLD_NAMES = {"gamma": "weight", "beta": "bias"}


class Layout(Protocol):
    """How the tensor of a file relates to a parameter (of one layer, where layers are stacked)."""

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor for a parameter of this shape."""
        ...

    def read(self, tensor: Any, index: Index) -> np.ndarray:
        """Reads the part `index` of the parameter from a tensor that can be sliced."""
        ...

    def write(self, array: np.ndarray) -> np.ndarray:
        """Turns the whole parameter into the tensor."""
        ...


@dataclasses.dataclass(frozen=True)
class Same:
    """The tensor as it is, but for `leading` axes of size 1 in front."""

    leading: int = 0

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See Layout."""
        return (1,) * self.leading + shape

    def read(self, tensor: Any, index: Index) -> np.ndarray:
        """See Layout."""
        part = tensor[(slice(0, 1),) * self.leading + index]
        return part.reshape(part.shape[self.leading :])

    def write(self, array: np.ndarray) -> np.ndarray:
        """See Layout."""
        return array.reshape(self.hf_shape(array.shape))


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A linear map: (out, in) in the file, (in, out) here."""

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See Layout."""
        return shape[::-1]

    def read(self, tensor: Any, index: Index) -> np.ndarray:
        """See Layout."""
        return tensor[index[::-1]].T

    def write(self, array: np.ndarray) -> np.ndarray:
        """See Layout."""
        return array.T


@dataclasses.dataclass(frozen=True)
class Table:
    """A token table of `rows` rows, which is padded with zeros here."""

    rows: int

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See Layout."""
        return (self.rows, *shape[1:])

    def read(self, tensor: Any, index: Index) -> np.ndarray:
        """See Layout."""
        wanted, columns = index
        start, stop = wanted.start, min(wanted.stop, self.rows)
        part = tensor[min(start, stop) : stop, columns]
        return np.pad(part, ((0, wanted.stop - start - part.shape[0]), (0, 0)))

    def write(self, array: np.ndarray) -> np.ndarray:
        """See Layout."""
        return array[: self.rows]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter.

    Attributes:
      path: dotted path of the parameter; "layers." in front where it is stacked.
      hf: name of the tensor; "{i}" stands for the layer.
      layout: how the tensor becomes the parameter.
    """

    path: str
    hf: str
    layout: Layout

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading axis of layers."""
        return "{i}" in self.hf


@dataclasses.dataclass(frozen=True)
class Family:
    """What is special to one `model_type`.

    Attributes:
      read_config: config.json -> config of the tower.
      write_config: config of the tower -> config.json.
      entries: config of the tower -> its parameters' entries.
      prefixes: what may stand before all names of a file.
      ignored: patterns of names (without prefix) that the tower has no use for.
    """

    read_config: Callable[[dict[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    entries: Callable[[Any], list[Entry]]
    prefixes: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ()

    def plain_name(self, name: str) -> str:
        """Strips the prefix, and the norms' names of old TensorFlow conversions."""
        for prefix in self.prefixes:
            if prefix and name.startswith(prefix):
                name = name.removeprefix(prefix)
                break
        return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: "LayerNorm." + _OLD_NAMES[m[1]], name)

    def is_ignored(self, plain_name: str) -> bool:
        """Whether the tower has no use for a tensor, and that is known to be right."""
        return any(re.fullmatch(pattern, plain_name) for pattern in self.ignored)


def linear(path: str, hf: str, bias: bool = True) -> list[Entry]:
    """Entries of a Linear."""
    entries = [Entry(f"{path}.kernel", f"{hf}.weight", Transposed())]
    return [*entries, Entry(f"{path}.bias", f"{hf}.bias", Same())] if bias else entries


def layer_norm(path: str, hf: str) -> list[Entry]:
    """Entries of a LayerNorm."""
    return [Entry(f"{path}.scale", f"{hf}.weight", Same()), Entry(f"{path}.bias", f"{hf}.bias", Same())]


def joined(*groups: Sequence[Entry]) -> list[Entry]:
    """All entries of all groups."""
    return [entry for group in groups for entry in group]


_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
_HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu",
                   "relu": "relu", "silu": "silu"}  # fmt: skip


def activation(name: str) -> str:
    """Our name of a Hugging Face activation.

    Raises:
      UserError: if we do not have it.
    """
    if name not in _ACTIVATIONS:
        raise UserError(f"activation {name!r} is not supported", fix="there are " + ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[name]


def hf_activation(name: str) -> str:
    """Hugging Face's name of one of our activations."""
    return _HF_ACTIVATIONS[name]


def _read_bert(raw: dict[str, Any]) -> EncoderConfig:
    kind = raw.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise UserError(f"position_embedding_type {kind!r} is not supported", fix="only 'absolute' is")
    return EncoderConfig(
        vocab_size=raw["vocab_size"],
        dim=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        mlp_dim=raw["intermediate_size"],
        max_positions=raw["max_position_embeddings"],
        token_types=raw.get("type_vocab_size", 2),
        norm_eps=raw.get("layer_norm_eps", 1e-12),
        activation=activation(raw.get("hidden_act", "gelu")),
        family="bert",
    )


def _write_bert(config: EncoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": hf_activation(config.activation),
        "pad_token_id": 0,
    }


def _bert_entries(config: EncoderConfig) -> list[Entry]:
    types = [Entry("token_type_embeddings", "embeddings.token_type_embeddings.weight", Same())]
    layer = "encoder.layer.{i}."
    return joined(
        [Entry("word_embeddings.embedding", "embeddings.word_embeddings.weight", Table(config.vocab_size))],
        [Entry("position_embeddings", "embeddings.position_embeddings.weight", Same())],
        types if config.token_types else [],
        layer_norm("embedding_norm", "embeddings.LayerNorm"),
        linear("layers.attention.q_proj", layer + "attention.self.query"),
        linear("layers.attention.k_proj", layer + "attention.self.key"),
        linear("layers.attention.v_proj", layer + "attention.self.value"),
        linear("layers.attention.o_proj", layer + "attention.output.dense"),
        layer_norm("layers.attention_norm", layer + "attention.output.LayerNorm"),
        linear("layers.mlp.up_proj", layer + "intermediate.dense"),
        linear("layers.mlp.down_proj", layer + "output.dense"),
        layer_norm("layers.mlp_norm", layer + "output.LayerNorm"),
    )


def _read_distilbert(raw: dict[str, Any]) -> EncoderConfig:
    return EncoderConfig(
        vocab_size=raw["vocab_size"],
        dim=raw["dim"],
        num_layers=raw["n_layers"],
        num_heads=raw["n_heads"],
        mlp_dim=raw["hidden_dim"],
        max_positions=raw["max_position_embeddings"],
        token_types=0,
        norm_eps=1e-12,  # written into the PyTorch model, not its config
        activation=activation(raw.get("activation", "gelu")),
        family="distilbert",
    )


def _write_distilbert(config: EncoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["DistilBertModel"],
        "model_type": "distilbert",
        "vocab_size": config.vocab_size,
        "dim": config.dim,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "hidden_dim": config.mlp_dim,
        "max_position_embeddings": config.max_positions,
        "activation": hf_activation(config.activation),
        "pad_token_id": 0,
    }


def _distilbert_entries(config: EncoderConfig) -> list[Entry]:
    layer = "transformer.layer.{i}."
    return joined(
        [Entry("word_embeddings.embedding", "embeddings.word_embeddings.weight", Table(config.vocab_size))],
        [Entry("position_embeddings", "embeddings.position_embeddings.weight", Same())],
        layer_norm("embedding_norm", "embeddings.LayerNorm"),
        linear("layers.attention.q_proj", layer + "attention.q_lin"),
        linear("layers.attention.k_proj", layer + "attention.k_lin"),
        linear("layers.attention.v_proj", layer + "attention.v_lin"),
        linear("layers.attention.o_proj", layer + "attention.out_lin"),
        layer_norm("layers.attention_norm", layer + "sa_layer_norm"),
        linear("layers.mlp.up_proj", layer + "ffn.lin1"),
        linear("layers.mlp.down_proj", layer + "ffn.lin2"),
        layer_norm("layers.mlp_norm", layer + "output_layer_norm"),
    )


# config.json's model_type -> family.
TEXT_FAMILIES: dict[str, Family] = {
    "bert": Family(
        _read_bert,
        _write_bert,
        _bert_entries,
        prefixes=("", "bert."),
        ignored=(
            r"pooler\..*",
            r"cls\..*",
            r"classifier\..*",
            r"qa_outputs\..*",
            r"embeddings\.position_ids",
        ),
    ),
    "distilbert": Family(
        _read_distilbert,
        _write_distilbert,
        _distilbert_entries,
        prefixes=("", "distilbert."),
        ignored=(
            r"vocab_(transform|layer_norm|projector)\..*",
            r"(pre_)?classifier\..*",
            r"qa_outputs\..*",
            r"embeddings\.position_ids",
        ),
    ),
}
