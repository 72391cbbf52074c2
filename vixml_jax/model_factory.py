"""From a config to a DualEncoder with its starting weights, and from a run's `model.json` back to one."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from vixml_jax import sharding
from vixml_jax.errors import UserError
from vixml_jax.models import hub, lora
from vixml_jax.models.dual_encoder import DualEncoder
from vixml_jax.models.late_fusion import LateFusion, LateFusionTower
from vixml_jax.models.lora import LoraConfig
from vixml_jax.models.prototypes import PrimeHead, free_vectors
from vixml_jax.models.two_tower import TwoTower, image_projection, standardised_projection
from vixml_jax.models.vision import VisionConfig, VisionTower
from vixml_jax.train_state import shapes_of


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What a run's model is, without its weights: `workdir/model.json`.

    Attributes:
      text: the text tower's config, as JSON.
      train: what of the text tower trains: "full", "lora" or "none".
      lora: the adapters' LoraConfig, as JSON; None without.
      base: where the weights that do not train come from; None where all train.
      vision: the vision tower that is part of the model, and what of it trains; None where images come as the
        embeddings of a frozen one.
      layout: how texts become sequences, as `banks.Layout` writes it.
      dim: D, size of the embeddings.
      image_dim: V, size of the vision tower's embeddings; 0 for text only.
      pooling: "mean" or "last".
      prototype: "prime", "dexa" or "none".
      num_vectors: C, free vectors; a multiple of TABLE_ROWS_MULTIPLE.
      heads, feed_forward, dropout: of the prototype net; the former two of late fusion as well.
      learned_logits: whether the sigmoid loss's scale and bias are there.
      num_labels, num_queries: L and N of the dataset it is trained on.
      dataset: fingerprint of that dataset.
      dtype, remat: of the tower's computation.
      late_images: pictures of an item that join the text tower's output; 0 where they are in its input.
    """

    text: dict[str, Any]
    train: str
    lora: dict[str, Any] | None
    base: dict[str, Any] | None
    vision: dict[str, Any] | None
    layout: dict[str, Any]
    dim: int
    image_dim: int
    pooling: str
    prototype: str
    num_vectors: int
    heads: int
    feed_forward: int
    dropout: float
    learned_logits: bool
    num_labels: int
    num_queries: int
    dataset: str
    dtype: str
    remat: str
    late_images: int = 0

    @property
    def lora_config(self) -> LoraConfig | None:
        """The adapters' config; None without."""
        return _lora_from_json(self.lora)

    @property
    def vision_train(self) -> str:
        """What of the vision tower trains: "none", "lora" or "full"."""
        return self.vision["train"] if self.vision else "none"


def create(
    config: ConfigDict,
    *,
    vocab_size: int,
    num_labels: int,
    num_queries: int,
    dataset: str,
    base_fingerprint: str,
    vision_fingerprint: str,
    layout: dict[str, Any],
    longest: int,
    image_features: np.ndarray | None,
) -> tuple[DualEncoder, ModelSpec]:
    """Builds the model that a run starts from, in the mesh that is set.

    Args:
      config: the run's config.
      vocab_size: of the tokenizer; random presets are built for it.
      num_labels: L.
      num_queries: N.
      dataset: its fingerprint.
      base_fingerprint: names the content of the text tower's checkpoint; "" where all of it trains.
      vision_fingerprint: the same of the vision tower, where adapters of it train; "" elsewhere.
      layout: how texts become sequences, as JSON.
      longest: slots of the longest item there can be.
      image_features: float [n, V] sample of the image bank (pixels, where the vision tower trains), or None
        for text only. The projection starts so that its outputs on it have the mean and spread of word
        embeddings: features of a frozen tower may vary little around a large mean.
    """
    settings = config.text
    base = {
        "checkpoint": settings.checkpoint,
        "adapter": settings.adapter,
        "fingerprint": base_fingerprint,
        "vocab_size": vocab_size,
        "seed": config.train.seed,
        "layers": settings.layers,
    }
    text, lora_config = _text_tower(
        base, settings.train, _wanted_adapters(settings), settings.dtype, settings.remat
    )
    if vocab_size > text.config.vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} tokens, the tower {text.config.vocab_size}",
            file=config.text.checkpoint,
            fix="give a checkpoint whose tokenizer and config.json belong together",
        )
    if longest > text.config.max_positions:
        raise UserError(
            f"items of up to {longest} slots, but the tower has {text.config.max_positions} positions",
            fix="give a lower --config.text.max_tokens",
        )
    vision = vision_json = None
    if image_features is not None and config.vision.train != "none":
        vision, vision_json = _start_vision(config, vision_fingerprint)
        image_features = _embed_sample(vision, image_features)
    spec = _spec(
        config,
        text.config,
        lora_config,
        base=None if settings.train == "full" else base,
        vision=vision_json,
        layout=layout,
        image_dim=0 if image_features is None else image_features.shape[1],
        num_labels=num_labels,
        num_queries=num_queries,
        dataset=dataset,
    )
    model = _assemble(spec, text, config.train.seed, vision)
    if image_features is not None:
        word_std = float(jnp.std(text.embed_tokens(jnp.arange(min(vocab_size, 1024), dtype=jnp.int32)[None])))
        kernel, bias = standardised_projection(
            image_features.astype(np.float32),
            text.dim,
            jax.random.key(config.train.seed),
            word_std,
        )
        projection = model.tower.image_projection
        assert projection is not None  # it was made for these features
        for parameter, start in ((projection.kernel, kernel), (projection.bias, bias)):
            assert parameter is not None
            parameter[...] = jax.device_put(start, parameter[...].sharding)
    return model, spec


def abstract(
    config: ConfigDict,
    text_config: Any,
    vision_config: VisionConfig | None,
    *,
    num_labels: int,
    num_queries: int,
) -> tuple[ModelSpec, nnx.GraphDef[DualEncoder], nnx.State, nnx.State]:
    """Returns the spec of the model that `create` would build, and what `split` returns of it, as shapes.

    Nothing is read or allocated: neither weights nor data need be there, nor the mesh's devices. Must be
    called inside the mesh. An adapter that is merged into a tower leaves no trace in shapes.

    Args:
      config: the run's config.
      text_config: of the text tower, as `hub.text_config` gives it.
      vision_config: of the vision tower, whether it trains or not; None for text only.
      num_labels: L.
      num_queries: N.
    """
    text_train, vision_train = config.text.train, config.vision.train
    lora_config = _wanted_adapters(config.text)
    spec = _spec(
        config,
        text_config,
        lora_config,
        base=None,
        vision=None,
        layout={},
        image_dim=vision_config.dim if vision_config else 0,
        num_labels=num_labels,
        num_queries=num_queries,
        dataset="",
    )

    def tower(shape: Any, train: str, adapters: LoraConfig | None) -> Any:
        dtype, remat = config.text.dtype, config.text.remat
        made = hub.make_tower(
            shape, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=_param_dtype(train, dtype), remat=remat
        )
        if adapters is not None:
            lora.attach(made, adapters, rngs=nnx.Rngs(0))
        return made

    def make() -> DualEncoder:
        vision = None
        if vision_config is not None and vision_train != "none":
            vision = tower(vision_config, vision_train, _wanted_vision_adapters(config.vision))
        return _assemble(spec, tower(text_config, text_train, lora_config), 0, vision)

    with sharding.ensure() as mesh:
        graphdef, state = nnx.get_abstract_model(make, mesh)
    params, frozen = nnx.split_state(state, _trains(text_train, vision_train), ...)
    return spec, graphdef, params, frozen


def rebuild(spec: ModelSpec) -> DualEncoder:
    """Builds the model of a `model.json`; the weights that train are to be restored from a checkpoint.

    Raises:
      UserError: if the checkpoint of the weights that never train is not to be had.
    """
    if spec.base is None:
        text = hub.random_tower(hub.tower_config_from_json(spec.text), dtype=spec.dtype, remat=spec.remat)
    else:
        # LoRA's adapters come from the checkpoint, also where they began as another's.
        base = {**spec.base, "adapter": ""} if spec.train == "lora" else spec.base
        text, _ = _text_tower(base, spec.train, spec.lora_config, spec.dtype, spec.remat)
    return _assemble(spec, text, 0, _rebuild_vision(spec))


def skeleton(spec: ModelSpec) -> tuple[nnx.GraphDef[DualEncoder], nnx.State, nnx.State]:
    """Returns what `split` returns of a `rebuild`, but of what trains only the shapes.

    Nothing is read or allocated where there is no vision tower and all of the model trains.

    Raises:
      UserError: as of `rebuild`.
    """
    if spec.base is not None or spec.vision is not None:
        graphdef, params, frozen = split(rebuild(spec), spec.train, spec.vision_train)
        return graphdef, shapes_of(params), frozen

    def make() -> DualEncoder:
        config = hub.tower_config_from_json(spec.text)
        text = hub.make_tower(config, rngs=nnx.Rngs(0), dtype=spec.dtype, remat=spec.remat)
        return _assemble(spec, text, 0, None)

    with sharding.ensure() as mesh:
        graphdef, state = nnx.get_abstract_model(make, mesh)
    params, frozen = nnx.split_state(state, nnx.Param, ...)
    assert not jax.tree.leaves(frozen), "all trains"
    return graphdef, params, frozen


def split(
    model: DualEncoder, text_train: str, vision_train: str = "none"
) -> tuple[nnx.GraphDef[DualEncoder], nnx.State, nnx.State]:
    """Returns (structure, parameters that train, everything else).

    Args:
      model: the model.
      text_train: what of its text tower trains: "full", "lora" or "none".
      vision_train: what of its vision tower does.
    """
    graphdef, params, frozen = nnx.split(model, _trains(text_train, vision_train), ...)
    return graphdef, params, frozen


def _trains(text_train: str, vision_train: str = "none") -> Any:
    """The filter of the parameters that train; arguments are those of `split`."""
    kinds = {("tower", "text"): text_train, ("tower", "vision"): vision_train}

    def trains(path: tuple[Any, ...], value: Any) -> bool:
        kind = kinds.get(path[:2], "full")
        return kind == "full" or (kind == "lora" and isinstance(value, nnx.LoRAParam))

    return nnx.All(nnx.Param, trains)


def _wanted_adapters(settings: ConfigDict) -> LoraConfig | None:
    """The adapters that `config.text` asks for; None without."""
    if settings.train != "lora":
        return None
    return LoraConfig(
        settings.lora_rank, settings.lora_alpha, settings.lora_rank_stabilised, tuple(settings.lora_targets)
    )


def _wanted_vision_adapters(settings: ConfigDict) -> LoraConfig | None:
    """The adapters that `config.vision` asks for; None without."""
    return LoraConfig(settings.lora_rank, settings.lora_alpha) if settings.train == "lora" else None


def _spec(
    config: ConfigDict,
    text_config: Any,
    lora_config: LoraConfig | None,
    *,
    base: dict[str, Any] | None,
    vision: dict[str, Any] | None,
    layout: dict[str, Any],
    image_dim: int,
    num_labels: int,
    num_queries: int,
    dataset: str,
) -> ModelSpec:
    """What a config's model is; arguments are fields of ModelSpec."""
    return ModelSpec(
        text=hub.tower_config_to_json(text_config),
        train=config.text.train,
        lora=dataclasses.asdict(lora_config) if lora_config else None,
        base=base,
        vision=vision,
        layout=layout,
        dim=text_config.dim,
        image_dim=image_dim,
        pooling=config.text.pooling,
        # Off the shelf a label is its text: a prototype net that never trains would only add noise.
        prototype=config.prototype.kind if config.train.epochs else "none",
        num_vectors=sharding.table_rows(min(config.prototype.free_vectors, num_labels)),
        heads=config.prototype.heads,
        feed_forward=config.prototype.feed_forward,
        dropout=config.prototype.dropout,
        learned_logits=config.loss.name == "sigmoid",
        num_labels=num_labels,
        num_queries=num_queries,
        dataset=dataset,
        dtype=config.text.dtype,
        remat=config.text.remat,
        late_images=config.vision.images * config.vision.tokens if config.vision.fusion == "late" else 0,
    )


def _text_tower(
    base: dict[str, Any], train: str, lora_config: LoraConfig | None, dtype: str, remat: str
) -> tuple[Any, LoraConfig | None]:
    """Loads the text tower of a run and gives it its adapters; returns their config too."""
    text = hub.load_text_tower(
        base["checkpoint"],
        dtype=dtype,
        param_dtype=_param_dtype(train, dtype),
        vocab_size=base["vocab_size"],
        seed=base["seed"],
        layers=base["layers"] or None,
        remat=remat,
    )
    if base["adapter"]:
        directory = Path(os.path.expanduser(base["adapter"]))
        if not directory.is_dir():
            raise UserError(
                "no such directory", file=directory, fix="give --config.text.adapter a PEFT directory"
            )
        given = lora.attach_peft(text, directory)
        if train == "lora":
            return text, given
        lora.merge(text, dtype=_param_dtype(train, dtype))
    if lora_config is not None:
        lora.attach(text, lora_config, rngs=nnx.Rngs(base["seed"] + 2))
    return text, lora_config


def _param_dtype(train: str, dtype: str) -> str:
    """Of a tower's stored weights: what never trains is stored as it is computed with, to save casts."""
    return "float32" if train == "full" else dtype


def _lora_from_json(value: dict[str, Any] | None) -> LoraConfig | None:
    return LoraConfig(**{**value, "targets": tuple(value["targets"])}) if value else None


def _start_vision(config: ConfigDict, fingerprint: str) -> tuple[VisionTower, dict[str, Any]]:
    """Loads the vision tower that a model starts from; returns it and `ModelSpec.vision`."""
    settings = config.vision
    base = {"checkpoint": settings.checkpoint, "fingerprint": fingerprint, "seed": config.train.seed}
    wanted = _wanted_vision_adapters(settings)
    tower = _vision_tower(base, settings.train, wanted, config.text.dtype, config.text.remat)
    return tower, {
        "tower": hub.tower_config_to_json(tower.config),
        "train": settings.train,
        "lora": dataclasses.asdict(wanted) if wanted else None,
        "base": None if settings.train == "full" else base,
    }


def _rebuild_vision(spec: ModelSpec) -> VisionTower | None:
    """The vision tower of a `model.json`, as `_start_vision` made it but for the weights that train."""
    if spec.vision is None:
        return None
    if spec.vision["base"] is None:
        config = hub.tower_config_from_json(spec.vision["tower"])
        return hub.random_tower(config, dtype=spec.dtype, remat=spec.remat)
    wanted = _lora_from_json(spec.vision["lora"])
    return _vision_tower(spec.vision["base"], spec.vision["train"], wanted, spec.dtype, spec.remat)


def _vision_tower(
    base: dict[str, Any], train: str, lora_config: LoraConfig | None, dtype: str, remat: str
) -> VisionTower:
    tower = hub.load_vision_tower(
        base["checkpoint"], dtype, param_dtype=_param_dtype(train, dtype), seed=base["seed"], remat=remat
    )
    if lora_config is not None:
        lora.attach(tower, lora_config, rngs=nnx.Rngs(base["seed"] + 3))
    return tower


def _embed_sample(vision: VisionTower, pixels_NP: np.ndarray) -> np.ndarray:
    """Embeddings of flat pixels [n, H * W * 3], float32 [n, V], some at a time."""
    size, at_once = vision.config.image_size, 64
    pixels = pixels_NP.astype(np.float32).reshape(-1, size, size, 3)
    parts = []
    for start in range(0, len(pixels), at_once):
        part = pixels[start : start + at_once]
        parts.append(np.asarray(vision(np.resize(part, (at_once, size, size, 3))))[: len(part)])
    return np.concatenate(parts)


def _assemble(spec: ModelSpec, text: Any, seed: int, vision: VisionTower | None) -> DualEncoder:
    rngs = nnx.Rngs(seed + 1)  # apart from the tower's own stream
    projection = (
        image_projection(spec.image_dim, text.dim, rngs=rngs, dtype=spec.dtype) if spec.image_dim else None
    )
    parts = (text, projection, spec.pooling, vision)
    if spec.late_images:
        shape = {"heads": spec.heads, "feed_forward": spec.feed_forward}
        fusion = LateFusion(text.dim, rngs=rngs, **shape)
        tower = LateFusionTower(*parts, fusion=fusion, max_images=spec.late_images)
    else:
        tower = TwoTower(*parts)
    head = vectors = None
    if spec.prototype != "none":
        vectors = free_vectors(spec.num_vectors, text.dim, rngs=rngs)
    if spec.prototype == "prime":
        head = PrimeHead(
            text.dim, heads=spec.heads, feed_forward=spec.feed_forward, dropout=spec.dropout, rngs=rngs
        )
    return DualEncoder(tower, head, vectors, learned_logits=spec.learned_logits)
