"""A run without weights, data or devices: shapes of its state and batches on any mesh, and its programs.

The programs are the very ones that a run executes, `train_step.compile_step` and `Embedder`, traced on shapes
and compiled ahead of time for the mesh's devices. Nothing is allocated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vixml_jax import model_factory, optim, run, sharding, train, train_state, train_step
from vixml_jax.data import packing, prompt
from vixml_jax.data.pipeline import block_multiples, expected_size, num_batches
from vixml_jax.embedding import Embedder
from vixml_jax.errors import UserError
from vixml_jax.model_factory import ModelSpec
from vixml_jax.models import hub, presets
from vixml_jax.models.dual_encoder import DualEncoder
from vixml_jax.models.encoder import EncoderConfig
from vixml_jax.models.vision import VisionConfig
from vixml_jax.types import Batch, PackedTokens

# Families whose tokenizers put a token before every text.
_BEGIN = ("llama", "gemma3_text")


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a run works on, in numbers.

    Attributes:
      labels: L.
      queries: N, of the training split.
      test_queries: those that are embedded and searched at the end.
      tokens: text tokens of an item, mean, special tokens counted in.
      images: pictures of an item, mean over all items.
    """

    labels: int
    queries: int
    test_queries: int
    tokens: float
    images: float


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """A run on a mesh, as shapes.

    Attributes:
      config: its config.
      mesh: where it would run.
      workload: what it would work on.
      spec: its model.
      graphdef: the model's structure.
      state: shapes, dtypes and shardings of the training state.
      frozen: the same of the parameters that never train.
      optimizer: of the run.
      item_slots: int64 [n]; slots of the items of a made-up sample.
      item_images: int64 [n]; embeddings of pictures among them.
      image_shape: of one picture as the model takes it, and its dtype; None for text only.
    """

    config: ConfigDict
    mesh: Mesh
    workload: Workload
    spec: ModelSpec
    graphdef: nnx.GraphDef[DualEncoder]
    state: train_state.TrainState
    frozen: nnx.State
    optimizer: Any
    item_slots: np.ndarray
    item_images: np.ndarray
    image_shape: jax.ShapeDtypeStruct | None

    @property
    def steps_per_epoch(self) -> int:
        """Training steps of an epoch."""
        return num_batches(self.workload.queries, self.config.train.batch_size)

    @property
    def is_chunked(self) -> bool:
        """Whether the tower computes a device's rows in several chunks."""
        rows = self.train_batch().tokens.token_ids.shape[0] // sharding.num_row_shards(self.mesh)
        return 0 < self.config.train.chunk_rows < rows

    def train_batch(self) -> Batch:
        """Returns the shapes of a usual training batch."""
        size = self.config.train.batch_size
        return Batch(
            tokens=self._tokens(2 * size, chunk_rows=self.config.train.chunk_rows),
            query_rows=self._rows((size,), np.int32),
            label_ids=self._rows((size,), np.int32),
            targets=self._rows((size, size), np.uint8),
            label_targets=self._rows((size, size), np.uint8),
        )

    def trace_step(self) -> jax.stages.Traced:
        """Traces the training step."""
        config = self.config
        with sharding.use(self.mesh):
            step = train_step.compile_step(
                self.graphdef,
                self.optimizer,
                train_step.make_loss(**train.loss_settings(config)),
                self.state,
                config.train.seed,
                tuple(config.text.dims),
                config.train.chunk_rows,
            )
            return step.trace(self.state, self.frozen, self.train_batch())

    def trace_encoding(self) -> jax.stages.Traced:
        """Traces one call of the encoder."""
        with sharding.use(self.mesh):
            embedder: Embedder = run.make_embedder(self.config, self.graphdef, self.mesh)
            assert embedder.items_per_call == self.items_per_call
            return embedder.trace(self.state.params, self.frozen, self.encoding_tokens())

    def encoding_tokens(self) -> PackedTokens:
        """Returns the shapes of what one call of the encoder takes."""
        return self._tokens(self.items_per_call, powers_of_two=True)

    @property
    def items_per_call(self) -> int:
        """Items that one call of the encoder takes."""
        return sharding.round_up(self.config.eval.items_per_call, sharding.num_row_shards(self.mesh))

    def useful_slots(self, num_items: int) -> float:
        """Slots of so many items without padding, mean."""
        return float(self.item_slots.mean()) * num_items

    def _rows(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(self.mesh, len(shape)))

    def _tokens(self, num_items: int, *, chunk_rows: int = 0, powers_of_two: bool = False) -> PackedTokens:
        """Shapes of items as the pipeline packs them."""
        shards, length = sharding.num_row_shards(self.mesh), self.config.train.row_length
        expected = expected_size([(self.item_slots, self.item_images)], num_items, length)
        multiples = block_multiples(*expected, shards, chunk_rows)
        if powers_of_two:
            multiples = {name: sharding.power_of_two(value) for name, value in multiples.items()}
        plan = packing.plan_rows(
            np.resize(self.item_slots, num_items),
            np.resize(self.item_images, num_items) if self.image_shape is not None else None,
            length,
            shards=shards,
            **multiples,
        )
        rows = self._rows((plan.num_rows, length), np.int32)
        tokens = PackedTokens(rows, rows, rows, rows)
        if self.image_shape is None:
            return tokens
        pictures = (plan.num_images, *self.image_shape.shape)
        return dataclasses.replace(
            tokens,
            image_index=rows,
            images=self._rows(pictures, self.image_shape.dtype),
            image_shards=shards,
        )


def abstract_run(config: ConfigDict, workload: Workload, mesh: Mesh) -> AbstractRun:
    """Makes the run of a config on a mesh, whose devices need not be there.

    Raises:
      UserError: if the config asks for something that its towers or the mesh cannot do.
    """
    train.check_batch_size(config, "train", mesh)
    text = _text_config(config)
    vision = _vision_config(config.vision.checkpoint) if config.vision.images else None
    with sharding.use(mesh):
        spec, graphdef, params, frozen = model_factory.abstract(
            config, text, vision, num_labels=workload.labels, num_queries=workload.queries
        )
        steps = config.train.epochs * num_batches(workload.queries, config.train.batch_size)
        optimizer = optim.make(**config.optimizer, total_steps=steps)
        tables = run.tables_of(spec, mesh)
        state = train_state.abstract(params, optimizer, tables, mesh)
    slots, images = _sample(config, text, workload)
    image_shape = None
    if vision is not None:
        size = vision.dim if config.vision.train == "none" else vision.image_size**2 * 3
        image_shape = jax.ShapeDtypeStruct((size,), ml_dtypes.bfloat16)
    return AbstractRun(
        config, mesh, workload, spec, graphdef, state, train_state.shapes_of(frozen), optimizer, slots,
        images, image_shape,
    )  # fmt: skip


def _text_config(config: ConfigDict) -> Any:
    """The shape of the text tower; published ones are known without the hub."""
    name = config.text.checkpoint
    vocab_size = None
    if name.startswith(presets.RANDOM):
        vocab_size = config.text.vocab_size
    elif name in presets.published():
        name = presets.RANDOM + name
    return hub.text_config(name, vocab_size, config.text.layers or None)


def _vision_config(name: str) -> VisionConfig:
    return hub.vision_config(presets.RANDOM + name if name in presets.published_vision() else name)


def _sample(config: ConfigDict, text: Any, workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Slots and pictures of made-up items: lengths of texts are spread around their mean as titles' are."""
    rng = np.random.default_rng(0)
    count, most = 8192, config.text.max_tokens
    if not 1 <= workload.tokens <= most:
        raise UserError(
            f"--tokens={workload.tokens:g} with config.text.max_tokens={most}",
            fix=f"give the mean length of a text, from 1 to {most}",
        )
    # Gamma with a deviation of two fifths of the mean, cut at the limit, brought back to the mean.
    lengths = np.clip(np.rint(rng.gamma(6.0, workload.tokens / 6.0, count)), 1, most).astype(np.int64)
    while (missing := round(workload.tokens * count) - int(lengths.sum())) != 0:
        step = 1 if missing > 0 else -1
        able = np.flatnonzero(lengths < most if step > 0 else lengths > 1)
        lengths[rng.choice(able, min(abs(missing), len(able)), replace=False)] += step
    whole, rest = divmod(workload.images, 1.0)
    images = (whole + (rng.random(count) < rest)).astype(np.int64)
    images *= config.vision.tokens
    slots = lengths + images
    template = config.text.prompt
    if template == "auto":
        template = prompt.ENCODER if isinstance(text, EncoderConfig) else prompt.DECODER
    for piece, with_images in prompt.parse(template):
        if piece in ("{text}", "{images}") or (piece == "{bos}" and text.family not in _BEGIN):
            continue
        words = 1 if piece.startswith("{") else len(piece.split())
        slots += words * (images > 0 if with_images else 1)
    return slots, images
