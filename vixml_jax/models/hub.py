"""Towers from Hugging Face directories, hub names, or `"random:<preset>"`."""

from __future__ import annotations

import dataclasses
import errno
import functools
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (numpy learns bfloat16, in which files may be)
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from vixml_jax import files, sharding
from vixml_jax.errors import UserError
from vixml_jax.models import config_checks, hf_names, presets
from vixml_jax.models.decoder import Decoder, DecoderConfig
from vixml_jax.models.encoder import Encoder, EncoderConfig
from vixml_jax.models.hf_layouts import Entry, Family
from vixml_jax.models.hf_vision import VISION_FAMILIES
from vixml_jax.models.vision import VisionConfig, VisionTower

_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_DOWNLOADED = (
    "config.json", "*.safetensors", _WEIGHTS_INDEX, "tokenizer*", "vocab*", "merges.txt",
    "special_tokens_map.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip

# Config class -> tower class. A config's class name is its "kind" in JSON.
TOWERS: dict[type, type] = {EncoderConfig: Encoder, DecoderConfig: Decoder, VisionConfig: VisionTower}

# Of these it is this machine's disk that complains, whatever was asked of the hub.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES)


def make_tower(
    config: Any,
    *,
    rngs: nnx.Rngs,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: str = "none",
) -> Any:
    """Builds the tower of a config with random weights; for use inside a mesh, also under `jax.jit`."""
    return TOWERS[type(config)](
        config, rngs=rngs, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype), remat=remat
    )


def tower_config_to_json(config: Any) -> dict[str, Any]:
    """Returns the config as a JSON-able dict, from which a checkpoint's tower is built again."""
    return {"kind": type(config).__name__, **dataclasses.asdict(config)}


def tower_config_from_json(value: dict[str, Any]) -> Any:
    """Reads what `tower_config_to_json` returned, also after a trip through a JSON file.

    Raises:
      UserError: if the kind or a field is not known to this version.
    """
    fields = dict(value) if isinstance(value, dict) else {}
    kind = fields.pop("kind", None)
    classes = {cls.__name__: cls for cls in TOWERS}
    if not isinstance(kind, str) or kind not in classes:
        raise UserError(f"tower of unknown kind {kind!r}", fix="there are " + ", ".join(sorted(classes)))
    try:
        config = classes[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        return config_checks.check(config)
    except TypeError as error:
        raise UserError(f"the {kind} was written by another version: {error}") from None


def text_config(name_or_dir: str, vocab_size: int | None = None, layers: int | None = None) -> Any:
    """Reads the config of a text tower, without its weights.

    Args:
      name_or_dir: Hugging Face directory, hub name, or "random:<preset>".
      vocab_size: tokens of the tokenizer; for random presets only.
      layers: keep only the first so many; None or 0 keeps all.

    Raises:
      UserError: if there is no such tower, or it is of an unsupported architecture.
    """
    if name_or_dir.startswith(presets.RANDOM):
        config = presets.text_preset(name_or_dir, vocab_size)
    else:
        directory = resolve(name_or_dir, ("config.json",))
        config = _read_config(directory, hf_names.TEXT_FAMILIES)[1]
    return _keep_layers(config, layers, name_or_dir)


def load_text_tower(
    name_or_dir: str,
    dtype: DTypeLike = "float32",
    *,
    param_dtype: DTypeLike = "float32",
    vocab_size: int | None = None,
    seed: int = 0,
    layers: int | None = None,
    remat: str = "none",
) -> Any:
    """Loads a text tower, its parameters placed on the mesh that is set, or on one over all devices.

    Args:
      name_or_dir: Hugging Face directory (config.json and safetensors), hub name, or "random:<preset>".
      dtype: of the computation.
      param_dtype: of the parameters.
      vocab_size: tokens of the tokenizer; for random presets only.
      seed: of a random preset.
      layers: keep only the first so many; None or 0 keeps all.
      remat: what the backward pass computes again: "none", "dots", "full".

    Returns:
      A tower: `tower(token_ids, mask)` maps int32 [B, T] and right-padded bool [B, T] to [B, T, D].

    Raises:
      UserError: naming every tensor that is missing, unexpected or of another shape, or what else is wrong.
    """
    if name_or_dir.startswith(presets.RANDOM):
        return random_tower(
            text_config(name_or_dir, vocab_size, layers),
            seed=seed, dtype=dtype, param_dtype=param_dtype, remat=remat,
        )  # fmt: skip
    directory = resolve(name_or_dir)
    family, full = _read_config(directory, hf_names.TEXT_FAMILIES)
    config = _keep_layers(full, layers, name_or_dir)
    return load_weights(directory, family, config, full, dtype=dtype, param_dtype=param_dtype, remat=remat)


def is_multimodal(name_or_dir: str) -> bool:
    """Whether a text tower is a part of a checkpoint that has other parts beside it."""
    if name_or_dir.startswith(presets.RANDOM):
        return False
    raw = files.read_json(resolve(name_or_dir, ("config.json",)) / "config.json")
    return isinstance(raw, dict) and raw.get("model_type") == "gemma3"


def end_token(config: Any) -> str:
    """Returns the token that ends a text in a tower's pretraining; "" for encoders."""
    return hf_names.TEXT_FAMILIES[config.family].end_token


def vision_config(name_or_dir: str) -> VisionConfig:
    """Reads the config of a vision tower, and how its pictures are prepared, without its weights.

    Raises:
      UserError: if there is no such tower, or it is of an unsupported architecture.
    """
    if name_or_dir.startswith(presets.RANDOM):
        return presets.vision_preset(name_or_dir)
    directory = resolve(name_or_dir, ("config.json", "preprocessor_config.json", "processor_config.json"))
    return _read_config(directory, VISION_FAMILIES)[1]


def load_vision_tower(
    name_or_dir: str,
    dtype: DTypeLike = "float32",
    *,
    param_dtype: DTypeLike = "float32",
    seed: int = 0,
    remat: str = "none",
) -> VisionTower:
    """Loads a vision tower, its parameters placed on the mesh that is set, or on one over all devices.

    Args:
      name_or_dir: Hugging Face directory (config.json and safetensors), hub name, or "random:<preset>".
      dtype: of the computation.
      param_dtype: of the parameters.
      seed: of a random preset.
      remat: what the backward pass computes again: "none", "dots", "full".

    Returns:
      A tower: `tower(pixels)` maps float32 [B, H, W, 3] to float32 [B, V].

    Raises:
      UserError: naming every tensor that is missing, unexpected or of another shape, or what else is wrong.
    """
    if name_or_dir.startswith(presets.RANDOM):
        config = presets.vision_preset(name_or_dir)
        return random_tower(config, seed=seed, dtype=dtype, param_dtype=param_dtype, remat=remat)
    directory = resolve(name_or_dir)
    family, config = _read_config(directory, VISION_FAMILIES)
    options = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    return load_weights(directory, family, config, config, **options)


def tokenizer_dir(name_or_dir: str) -> Path | None:
    """Returns the directory with a tower's tokenizer; None for a random preset, which has none."""
    if name_or_dir.startswith(presets.RANDOM):
        return None
    return resolve(name_or_dir, tuple(name for name in _DOWNLOADED if "safetensors" not in name))


def random_tower(config: Any, *, seed: int = 0, **options: Any) -> Any:
    """Builds a tower with random weights, born sharded. Options as of `make_tower`."""
    with sharding.ensure() as mesh:
        make = functools.partial(make_tower, config, **options)
        graphdef, abstract = nnx.get_abstract_model(lambda: make(rngs=nnx.Rngs(0)), mesh)
        state = _random_state(jax.random.key(seed), config, jnp.dtype(options.get("param_dtype", "float32")))
        state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))
        return nnx.merge(graphdef, state)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_state(key: jax.Array, config: Any, param_dtype: jnp.dtype) -> nnx.State:
    """Parameters of a tower, placed by their axis names; compiled once a config, since that takes seconds."""
    return nnx.split(make_tower(config, rngs=nnx.Rngs(key), param_dtype=param_dtype))[1]


def resolve(name_or_dir: str, patterns: tuple[str, ...] = _DOWNLOADED) -> Path:
    """Returns a local directory: the one that is named, or the hub's snapshot of these files.

    Raises:
      UserError: if it is neither here nor to be had.
    """
    path = Path(os.path.expanduser(name_or_dir))  # Path's own fails for a user who is not there
    if path.is_dir():
        return path
    if not name_or_dir or name_or_dir[0] in "./~" or name_or_dir.count("/") > 1:
        raise UserError("no such directory", file=name_or_dir or "''", fix="give a Hugging Face directory")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(huggingface_hub.snapshot_download(name_or_dir, allow_patterns=list(patterns)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise  # it was given, and finds no place here
        reason = type(error).__name__
        raise UserError(
            f"{name_or_dir!r} is no directory here, and the hub did not give it ({reason})",
            fix=f"where there is a network: `hf download {name_or_dir} --local-dir DIR`, then give DIR; "
            "or take a 'random:<preset>'",
        ) from error


def _read_config(directory: Path, families: dict[str, Family]) -> tuple[Family, Any]:
    file = directory / "config.json"
    raw = files.read_json(file)
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(model_type, str) or model_type not in families:
        raise UserError(
            f"model_type {model_type!r} is not supported",
            file=file,
            fix="supported are " + ", ".join(families),
        )
    family = families[model_type]
    raw = {**raw, "preprocessor": _read_processor(directory)}
    try:
        return family, config_checks.check(family.read_config(raw))
    except KeyError as error:
        raise UserError(f"has no field {error.args[0]!r}", file=file) from None
    except UserError as error:
        raise UserError(error.problem, file=file, fix=error.fix) from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        # Its fields are computed with before they are checked: one is a text where a number belongs.
        raise UserError(f"has a field of the wrong kind ({error})", file=file) from error


def _read_processor(directory: Path) -> dict[str, Any]:
    """How pictures are prepared: a file of its own, or part of the one that newer checkpoints have."""
    for name, read in (
        ("preprocessor_config.json", lambda raw: raw),
        ("processor_config.json", lambda raw: raw.get("image_processor")),
    ):
        if (directory / name).is_file():
            raw = files.read_json(directory / name)
            found = read(raw) if isinstance(raw, dict) else None
            if isinstance(found, dict):
                return found
    return {}


def _keep_layers(config: Any, layers: int | None, name: str) -> Any:
    if not layers:
        return config
    if layers > config.num_layers:
        raise UserError(
            f"config.text.layers={layers}, but {name} has {config.num_layers}",
            fix=f"give at most {config.num_layers}",
        )
    return dataclasses.replace(config, num_layers=layers)


def _shards(index_file: Path) -> list[str]:
    """Names of the files that an index says the tensors are in, all of them beside it."""
    index = files.read_json(index_file)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError("has no weight_map", file=index_file, fix="give a complete checkpoint")
    names = set()
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]{0,200}\.safetensors", name):
            raise UserError(f"names a file {name!r}", file=index_file, fix="do not use it")
        names.add(name)
    return sorted(names)


class Tensors:
    """All tensors of a directory, by plain name. One file at a time is mapped into memory.

    Args:
      directory: with `model.safetensors`, or an index of several files beside it.
      family: names of the tensors.

    Raises:
      UserError: if a file is missing or broken, or two tensors have one name.
    """

    def __init__(self, directory: Path, family: Family):
        index_file = directory / _WEIGHTS_INDEX
        names = _shards(index_file) if index_file.is_file() else [_WEIGHTS]
        self._opened: tuple[Path | None, Any] = (None, None)
        self._places: dict[str, tuple[Path, str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            file = directory / name
            if not file.is_file():
                raise UserError("no such file", file=file, fix="towers are read from safetensors only")
            handle = self._open(file)
            for key in handle.keys():  # noqa: SIM118  (not a mapping)
                plain = family.plain_name(key)
                if plain in self._places and not family.is_ignored(plain):
                    raise UserError(f"holds {plain} twice, as {self._places[plain][1]} and {key}", file=file)
                self._places[plain] = (file, key)
                self._shapes[plain] = tuple(handle.get_slice(key).get_shape())

    def _open(self, file: Path) -> Any:
        if self._opened[0] != file:
            self._opened = (None, None)  # before the next one takes its place in memory
            try:
                self._opened = (file, safe_open(file, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"cannot be read: {error}", file=file) from None
        return self._opened[1]

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __getitem__(self, name: str) -> Any:
        file, key = self._places[name]
        return self._open(file).get_slice(key)

    def array(self, name: str) -> np.ndarray:
        """The whole of a tensor."""
        return self[name][:]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._shapes[name]


def load_weights(directory: Path, family: Family, config: Any, full_config: Any, **options: Any) -> Any:
    """Reads a tower's weights, each process only the slices that its devices hold.

    Args:
      directory: with safetensors.
      family: names of its tensors.
      config: of the tower to build.
      full_config: of the directory, which may have more layers.
      options: as of `make_tower`.

    Raises:
      UserError: naming every tensor that is missing, unexpected or of another shape.
    """
    with sharding.ensure() as mesh:
        tensors = Tensors(directory, family)
        graphdef, abstract = nnx.get_abstract_model(
            lambda: make_tower(config, rngs=nnx.Rngs(0), **options), mesh
        )
        flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(abstract)}
        entries = {entry.path: entry for entry in family.entries(config)}
        _check(directory, family, tensors, entries, flat, full_config)
        # The largest first: their copies in flight come and go while little else is there yet.
        largest_first = sorted(flat, key=lambda path: -math.prod(flat[path].get_value().shape))
        read = {path: _read(tensors, entries[path], flat[path].get_value()) for path in largest_first}
        state = nnx.from_flat_state(
            (path, leaf.replace(read[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(abstract)
        )
        return nnx.merge(graphdef, state)


def _check(
    directory: Path,
    family: Family,
    tensors: Tensors,
    entries: dict[str, Entry],
    flat: dict[str, Any],
    full_config: Any,
) -> None:
    missing, misshaped, expected = set(), set(), set()  # several parameters may lie in one tensor
    for path, leaf in flat.items():
        entry, shape = entries[path], leaf.get_value().shape
        names = [entry.hf.format(i=i) for i in range(shape[0])] if entry.stacked else [entry.hf]
        wanted = entry.layout.hf_shape(shape[1:] if entry.stacked else shape)
        for name in names:
            if name not in tensors:
                missing.add(name)
            elif tensors.shape(name) != wanted:
                misshaped.add(f"{name} is {tensors.shape(name)}, should be {wanted}")
    for entry in family.entries(full_config):
        expected |= {entry.hf.format(i=i) for i in range(full_config.num_layers)}
    unexpected = [name for name in tensors if name not in expected and not family.is_ignored(name)]
    problems = [
        f"{title}: {', '.join(sorted(found))}"
        for title, found in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
        if found
    ]
    if problems:
        raise UserError(
            "the tensors do not fit config.json; " + "; ".join(problems),
            file=directory,
            fix="give the directory of a complete checkpoint of this architecture",
        )


def _read(tensors: Tensors, entry: Entry, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Reads one parameter to its sharding, layer by layer where layers are stacked."""
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # devices that hold the same part share it

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # it is only for arrays that no device holds
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, leaf.shape, strict=True))
        if bounds not in parts:
            slices = tuple(slice(*bound) for bound in bounds)
            array = np.empty([stop - start for start, stop in bounds], leaf.dtype)
            if entry.stacked:
                for row, layer in enumerate(range(*bounds[0])):
                    array[row] = entry.layout.read(tensors[entry.hf.format(i=layer)], slices[1:])
            else:
                array[...] = entry.layout.read(tensors[entry.hf], slices)
            parts[bounds] = array
        return parts[bounds]

    array = jax.make_array_from_callback(leaf.shape, leaf.sharding, part, dtype=leaf.dtype)
    return array.block_until_ready()  # a copy under way would keep the parts in memory
