"""LoRA adapters of text towers: attached to linear maps by name, merged, read and written as PEFT does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vixml_jax import files
from vixml_jax.errors import UserError
from vixml_jax.models import hf_names
from vixml_jax.models.layers import Adapter, Linear

# All linear maps of a decoder's layers (ViXML); those of an encoder have the same names, but for the gate.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MULTIMODAL_PREFIX = "language_model."
# What PEFT puts before a tensor's name; "model." more where the base had a head.
_PEFT_PREFIXES = ("base_model.model.model.", "base_model.model.")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Shape and strength of the adapters.

    Attributes:
      rank: r.
      alpha: the addition is multiplied by alpha / r, or alpha / sqrt(r).
      rank_stabilised: whether it is the root (Kalajdzievski 2023; ViXML: rank 256, alpha 256, factor 16).
      targets: names of the linear maps, of TARGETS.
    """

    rank: int = 256
    alpha: float = 256.0
    rank_stabilised: bool = True
    targets: tuple[str, ...] = TARGETS

    @property
    def scale(self) -> float:
        """Factor on the addition."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def attach(tower: Any, config: LoraConfig, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32) -> None:
    """Gives the tower's linear maps adapters that add nothing yet: `lora_b` is zero.

    Args:
      tower: a text tower without adapters; changed in place. Must be called inside the mesh it lies on.
      config: which maps, and how.
      rngs: source of `lora_a`, uniform in +-1/sqrt(in) as PEFT's.
      param_dtype: of the adapters.

    Raises:
      UserError: if a target is none of the tower's linear maps.
    """
    found = set()
    for path, linear in linears(tower):
        if path[-1] not in config.targets:
            continue
        found.add(path[-1])
        kernel, axes = linear.kernel.get_value(), linear.kernel.get_metadata()["out_sharding"]
        *layers, in_dim, out_dim = kernel.shape
        bound = 1.0 / math.sqrt(in_dim)
        a = jax.random.uniform(
            rngs.params(), (*layers, in_dim, config.rank), param_dtype, minval=-bound, maxval=bound
        )
        b = jnp.zeros((*layers, config.rank, out_dim), param_dtype)
        linear.adapter = Adapter(
            nnx.LoRAParam(a, out_sharding=(*axes[:-2], axes[-2], _rank_axis(axes[-2], config.rank))),
            nnx.LoRAParam(b, out_sharding=(*axes[:-2], _rank_axis(axes[-1], config.rank), axes[-1])),
            config.scale,
        )
    if unknown := set(config.targets) - found - set(TARGETS):
        names = sorted({path[-1] for path, _ in linears(tower)})
        raise UserError(
            f"config.text.lora_targets names {', '.join(sorted(unknown))}",
            fix="there are " + ", ".join(names),
        )
    if not found:
        raise UserError(
            "config.text.lora_targets names no linear map of the tower", fix="give q_proj, v_proj"
        )


def _rank_axis(other: str, rank: int) -> str:
    """Names the rank's axis beside another: it is split where the other one is not, if it can be.

    Otherwise half of the adapters' matrices, with moments and gradients, would lie whole on every device:
    5 GB of Qwen2.5-3B's at rank 256.
    """
    places = jax.sharding.get_abstract_mesh().shape.get("fsdp", 1)
    return "lora" if other == "embed" or rank % places else "lora_split"


def merge(tower: Any, dtype: DTypeLike = jnp.float32) -> None:
    """Adds every adapter to its kernel, in float32, and takes it off; those kernels come out in `dtype`."""
    for _, linear in linears(tower):
        adapter = linear.adapter
        if adapter is None:
            continue
        linear.kernel.set_value(
            merged(
                linear.kernel.get_value(),
                adapter.lora_a.get_value(),
                adapter.lora_b.get_value(),
                adapter.scale,
            ).astype(dtype)
        )
        linear.adapter = nnx.data(None)


@jax.jit
def merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Returns a kernel and its adapter's addition in one, float32 [..., in, out]."""
    addition = jnp.einsum("...ir,...ro->...io", a, b, precision="highest", preferred_element_type=jnp.float32)
    return kernel.astype(jnp.float32) + addition * scale


def write_peft(
    tower: Any, config: LoraConfig, directory: Path, base: str, *, multimodal: bool = False
) -> None:
    """Writes the adapters as a PEFT directory: adapter_config.json and adapter_model.safetensors.

    Args:
      tower: with adapters.
      config: theirs.
      directory: exists.
      base: name or directory of the checkpoint that they belong to.
      multimodal: whether the tower is the text part of a model that sees (Gemma 3).
    """
    inside = MULTIMODAL_PREFIX if multimodal else ""
    names = _hf_names(tower)
    tensors, modules = {}, set()
    for path, linear in linears(tower):
        if linear.adapter is None:
            continue
        hf = names[".".join(path)]
        modules.add(hf.rsplit(".", 1)[-1])
        for letter, value in (("A", linear.adapter.lora_a), ("B", linear.adapter.lora_b)):
            array = np.asarray(value.get_value(), np.float32)
            layers = enumerate(array) if array.ndim == 3 else [(0, array)]
            for i, matrix in layers:
                name = f"{_PEFT_PREFIXES[-1]}{inside}{hf.format(i=i)}.lora_{letter}.weight"
                tensors[name] = np.ascontiguousarray(matrix.T)
    save_file(tensors, directory / PEFT_WEIGHTS, metadata={"format": "pt"})
    files.write_json(
        directory / PEFT_CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "FEATURE_EXTRACTION",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": 0.0,
            "use_rslora": config.rank_stabilised,
            # Names alone would also hit the vision tower's maps.
            "target_modules": rf".*language_model\..*\.({'|'.join(sorted(modules))})"
            if multimodal
            else sorted(modules),
            "bias": "none",
            "fan_in_fan_out": False,
        },
    )


def attach_peft(tower: Any, directory: Path, *, param_dtype: DTypeLike = jnp.float32) -> LoraConfig:
    """Gives the tower the adapters of a PEFT directory. Must be called inside the mesh it lies on.

    Returns:
      Their config.

    Raises:
      UserError: if it is no LoRA adapter of this tower, or asks for something that is not supported.
    """
    raw = files.read_json(directory / PEFT_CONFIG)
    if not isinstance(raw, dict) or not {"peft_type", "r", "lora_alpha"} <= raw.keys():
        raise UserError(
            "lacks peft_type, r or lora_alpha", file=directory / PEFT_CONFIG, fix="give a LoRA adapter"
        )
    if isinstance(raw.get("init_lora_weights"), str) and raw["init_lora_weights"] != "gaussian":
        raise UserError(
            f"init_lora_weights={raw['init_lora_weights']!r} has changed the base weights too",
            file=directory / PEFT_CONFIG,
            fix="give an adapter that was converted to plain LoRA",
        )
    if raw.get("peft_type") != "LORA":
        raise UserError(
            f"peft_type {raw.get('peft_type')!r} is not supported",
            file=directory / PEFT_CONFIG,
            fix="give a LoRA adapter",
        )
    for field, plain in (("use_dora", False), ("bias", "none"), ("fan_in_fan_out", False),
                         ("rank_pattern", {}), ("alpha_pattern", {}), ("modules_to_save", None)):  # fmt: skip
        if raw.get(field) not in (plain, None, [], {}):
            raise UserError(
                f"{field}={raw[field]!r} is not supported",
                file=directory / PEFT_CONFIG,
                fix="give an adapter without it",
            )
    rank, alpha = raw["r"], raw["lora_alpha"]
    if type(rank) is not int or not 0 < rank < 2**20:
        raise UserError(f"r={rank!r}", file=directory / PEFT_CONFIG, fix="give a whole number above 0")
    if type(alpha) not in (int, float) or not abs(alpha) < 2**100:  # which NaN is not either
        raise UserError(f"lora_alpha={alpha!r}", file=directory / PEFT_CONFIG, fix="give a number")
    tensors = _read_tensors(directory / PEFT_WEIGHTS)
    names, values = _hf_names(tower), {}
    for path, linear in linears(tower):
        hf, stacked = names[".".join(path)], linear.kernel.get_value().ndim == 3
        wanted = [hf.format(i=i) for i in range(linear.kernel.get_value().shape[0] if stacked else 1)]
        there = [name for name in wanted if f"{name}.lora_A.weight" in tensors]
        if there and there != wanted:
            missing = sorted(set(wanted) - set(there))
            raise UserError(
                f"{len(missing)} layers have no adapter, such as {missing[0]}",
                file=directory / PEFT_WEIGHTS,
                fix="give an adapter of all layers",
            )
        shapes = {
            (letter, tensors[name].shape if (name := f"{module}.lora_{letter}.weight") in tensors else None)
            for module in there
            for letter in "AB"
        }
        if there and (len(shapes) != 2 or None in {shape for _, shape in shapes}):
            raise UserError(
                f"{hf} has adapters of several shapes, or halves of them",
                file=directory / PEFT_WEIGHTS,
                fix="give an adapter of one rank",
            )
        if there:
            values[path] = [
                np.stack([tensors.pop(f"{name}.lora_{letter}.weight").T for name in wanted])
                if stacked
                else tensors.pop(f"{wanted[0]}.lora_{letter}.weight").T
                for letter in "AB"
            ]
    if tensors:
        raise UserError(
            f"the tower has no place for {sorted(tensors)[0]}",
            file=directory / PEFT_WEIGHTS,
            fix="give an adapter of this architecture's linear maps",
        )
    if not values:
        raise UserError(
            "holds no adapter", file=directory / PEFT_WEIGHTS, fix="give a LoRA adapter of this tower"
        )
    config = LoraConfig(
        rank, float(alpha), bool(raw.get("use_rslora")),
        tuple(sorted({path[-1] for path in values})),
    )  # fmt: skip
    attach(tower, config, rngs=nnx.Rngs(0), param_dtype=param_dtype)
    for path, linear in linears(tower):
        if linear.adapter is None:
            continue
        for variable, value in zip((linear.adapter.lora_a, linear.adapter.lora_b), values[path], strict=True):
            old = variable.get_value()
            if old.shape != value.shape:
                raise UserError(
                    f"{'.'.join(path)} has adapters of shape {value.shape}, should be {old.shape}",
                    file=directory / PEFT_WEIGHTS,
                    fix="give an adapter of this checkpoint",
                )
            variable.set_value(jax.device_put(value.astype(old.dtype), old.sharding))
    return config


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors by plain Hugging Face name, float32."""
    if not path.is_file():
        raise UserError("no such file", file=path, fix="adapters are read from safetensors only")
    try:
        with safe_open(path, framework="numpy") as file:
            found = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot be read: {error}", file=path) from None
    plain = {}
    for name, value in found.items():
        prefix = next((prefix for prefix in _PEFT_PREFIXES if name.startswith(prefix)), "")
        name = name.removeprefix(prefix).removeprefix("model.")
        plain[name.removeprefix(MULTIMODAL_PREFIX)] = value
    return plain


def _hf_names(tower: Any) -> dict[str, str]:
    """Path of a linear map -> name of the module in Hugging Face's models, "{i}" for the layer."""
    entries = hf_names.TEXT_FAMILIES[tower.config.family].entries(tower.config)
    return {
        entry.path.removesuffix(".kernel"): entry.hf.removesuffix(".weight")
        for entry in entries
        if entry.path.endswith(".kernel")
    }


def linears(tower: Any) -> Iterator[tuple[tuple[str, ...], Linear]]:
    """(path, module) of every linear map, in a fixed order."""
    found = [
        (tuple(map(str, path)), module)
        for path, module in nnx.iter_modules(tower)
        if isinstance(module, Linear)
    ]
    return iter(sorted(found, key=lambda item: item[0]))
