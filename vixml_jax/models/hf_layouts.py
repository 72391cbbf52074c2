"""How one tensor of a Hugging Face file relates to one parameter, and what a family of architectures is.

Read in both directions: by the loader, and by the export.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from vixml_jax.errors import UserError

Index = tuple[slice, ...]

_OLD_NAMES = {"gamma": "weight", "beta": "bias"}

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
        padding = wanted.stop - start - part.shape[0]
        return np.pad(part, ((0, padding), (0, 0))) if padding else part

    def write(self, array: np.ndarray) -> np.ndarray:
        """See Layout."""
        return array[: self.rows]


@dataclasses.dataclass(frozen=True)
class Patch:
    """A patch embedding: the convolution (out, channel, row, column) in the file, a 2-D kernel here."""

    size: int

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See Layout."""
        return (shape[1], 3, self.size, self.size)

    def read(self, tensor: Any, index: Index) -> np.ndarray:
        """See Layout."""
        rows, columns = index
        part = tensor[columns]
        return part.transpose(2, 3, 1, 0).reshape(-1, part.shape[0])[rows]

    def write(self, array: np.ndarray) -> np.ndarray:
        """See Layout."""
        return array.reshape(self.size, self.size, 3, -1).transpose(3, 2, 0, 1)


@dataclasses.dataclass(frozen=True)
class Part:
    """One of several parameters that lie end to end in one tensor, along its first axis.

    Attributes:
      number: which part, from zero.
      count: parts in the tensor.
      size: of a part, along the tensor's first axis.
      layout: Same or Transposed; that of a part.
    """

    number: int
    count: int
    size: int
    layout: Layout

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """See Layout."""
        first, *rest = self.layout.hf_shape(shape)
        return (first * self.count, *rest)

    def read(self, tensor: Any, index: Index) -> np.ndarray:
        """See Layout."""
        *others, last = index  # the tensor's first axis is the parameter's last
        start = self.number * self.size
        return self.layout.read(tensor, (*others, slice(start + last.start, start + last.stop)))

    def write(self, array: np.ndarray) -> np.ndarray:
        """The tensor with zeros in the places of the other parts: the sum over all parts is the whole."""
        tensor = np.zeros(self.hf_shape(array.shape), array.dtype)
        tensor[self.number * self.size :][: self.size] = self.layout.write(array)
        return tensor


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
      read_config: config.json -> config of the tower; a vision tower's preprocessor is under "preprocessor".
      write_config: config of the tower -> config.json.
      entries: config of the tower -> its parameters' entries.
      prefixes: what may stand before all names of a file.
      ignored: patterns of names (without prefix) that the tower has no use for.
      end_token: what ends a text in pretraining; decoders only.
    """

    read_config: Callable[[dict[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    entries: Callable[[Any], list[Entry]]
    prefixes: tuple[str, ...] = ("",)
    ignored: tuple[str, ...] = ()
    end_token: str = ""

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


def scale(path: str, hf: str) -> list[Entry]:
    """Entries of an RMSNorm."""
    return [Entry(f"{path}.scale", f"{hf}.weight", Same())]


def layer_norm(path: str, hf: str) -> list[Entry]:
    """Entries of a LayerNorm."""
    return [Entry(f"{path}.scale", f"{hf}.weight", Same()), Entry(f"{path}.bias", f"{hf}.bias", Same())]


def joined(*groups: Sequence[Entry]) -> list[Entry]:
    """All entries of all groups."""
    return [entry for group in groups for entry in group]


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
