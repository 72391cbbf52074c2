"""Predicts labels of new queries: `vixml predict --workdir=runs/demo --input=new.jsonl --output=out.jsonl`.

Input is one JSON object a line: {"title": ..., "content": ..., "images": [paths], "uid": ...}; all but the
title may be left out. Output, in the same order: {"uid", "labels": [{"index", "uid", "title", "score"}]}.

Examples:
  vixml predict --workdir=runs/demo/vixml --input=new.jsonl --output=predicted.jsonl --k=10
  echo '{"title": "kettle"}' | vixml predict --workdir=runs/demo/text --input=- --output=-
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from absl import flags

from vixml_jax import banks as banks_lib
from vixml_jax import data, evaluate, files, retrieval, sharding
from vixml_jax import run as run_lib
from vixml_jax.data import query_lines
from vixml_jax.data.items import ItemBank
from vixml_jax.data.packing import Template
from vixml_jax.data.pictures import Picture
from vixml_jax.data.ragged import Ragged
from vixml_jax.embedding import normalized
from vixml_jax.errors import UserError
from vixml_jax.run import TrainedModel
from vixml_jax.search import Searcher

# Queries embedded and searched together: bounds memory whatever the input's length.
QUERIES_PER_CHUNK = 4096


def define_flags() -> None:
    """Registers the command's flags."""
    flags.DEFINE_string("workdir", None, "Directory of the run")
    flags.DEFINE_string("input", None, "JSONL of queries, - for standard input")
    flags.DEFINE_string("output", None, "JSONL of predictions, - for standard output")
    flags.DEFINE_integer("k", 10, "Labels a query", lower_bound=1)


def main() -> int:
    """Runs the command."""
    for name in ("workdir", "input", "output"):
        if not flags.FLAGS[name].value:
            raise UserError(f"predict needs --{name}", fix="see `vixml predict --help`")
    source = flags.FLAGS.input
    queries = query_lines.read_queries(sys.stdin if source == "-" else source, source)
    model = XmcModel.load(flags.FLAGS.workdir)
    with ExitStack() as stack:
        if flags.FLAGS.output == "-":
            target: IO[str] = sys.stdout
        else:
            target = stack.enter_context(files.atomic_file(flags.FLAGS.output, "w"))
        for record in model.predict_records(queries, flags.FLAGS.k):
            target.write(json.dumps(record, ensure_ascii=False) + "\n")
    return 0


class XmcModel:
    """A trained run, ready to embed and predict.

    Embeddings are L2-normalised float32 [N, D]; D is `model.dim`.
    """

    def __init__(self, model: TrainedModel, workdir: Path, mesh: Any):
        self._model, self._workdir, self._mesh = model, workdir, mesh
        self._embedder = run_lib.make_embedder(model.config, model.graphdef, mesh)
        self._searcher: Searcher | None = None
        self._labels: data.dataset.Split | None = None
        self._label_texts: retrieval.index.Index | None = None
        self._known: dict[str, int] | None = None

    @classmethod
    def load(cls, workdir: str | os.PathLike[str]) -> XmcModel:
        """Loads the newest checkpoint of a run.

        Raises:
          UserError: if `workdir` is not a run's directory.
        """
        workdir = Path(workdir)
        with sharding.ensure() as mesh:
            return cls(run_lib.load_model(workdir, mesh), workdir, mesh)

    @property
    def dim(self) -> int:
        """Size of the embeddings."""
        return self._model.spec.dim

    @property
    def uses_images(self) -> bool:
        """Whether the run was trained with pictures."""
        return self._model.spec.image_dim > 0

    @property
    def labels(self) -> data.dataset.Split:
        """The labels of the run's dataset: `.uids`, `.texts`."""
        if self._labels is None:
            self._labels = data.load(self._model.config.dataset.dir).labels
        return self._labels

    @property
    def searcher(self) -> Searcher:
        """The saved indexes; built anew where there are none, or they are of another checkpoint."""
        if self._searcher is None:
            model = self._model
            dataset = run_lib.open_dataset(model.config)
            run_lib.check_dataset(dataset, model.spec, model.config)
            settings = model.config.retrieval
            self._searcher = Searcher.load(self._workdir, dataset.train_targets, settings, model.step)
            if self._searcher is None:
                with sharding.use(self._mesh):
                    run = run_lib.with_banks(model, model.config, dataset, self._workdir, self._mesh)
                    self._searcher, _ = evaluate.build_searcher(run, model.params, model.tables)
        return self._searcher

    def encode_queries(
        self, texts: Sequence[str], images: Sequence[Sequence[Picture]] | None = None
    ) -> np.ndarray:
        """Embeds queries, float32 [N, D].

        Args:
          texts: N texts.
          images: for each text a list of pictures (paths, bytes or PIL images), or None for none at all.
            Pictures that cannot be read count as missing.
        """
        return normalized(self._pooled(texts, images, self._model.layout.query, "embed queries"))

    def encode_labels(
        self, texts: Sequence[str], images: Sequence[Sequence[Picture]] | None = None
    ) -> np.ndarray:
        """Embeds labels as they are searched, float32 [N, D].

        A text that is exactly that of a label of the run's dataset gets that label's free vector and
        centroid. Any other is a new label: it has no training queries, so its centroid is zero, and it shares
        the free vector of the known label whose text is nearest.
        """
        model, tables = self._model, self._model.tables
        texts_ND = self._pooled(texts, images, model.layout.label, "embed labels")
        if not len(texts_ND):
            return texts_ND
        rows = np.array([self._known_labels().get(text, -1) for text in texts], np.int64)
        new = rows < 0
        donors = rows.copy()
        if new.any() and model.spec.prototype != "none":
            donors[new] = self._known_label_texts().search(normalized(texts_ND[new]), 1)[0][:, 0]
        donors = np.maximum(donors, 0)
        clusters_N = np.asarray(tables.label_clusters)[donors]
        centroids_ND = np.where(new[:, None], 0, np.asarray(tables.centroids)[donors]).astype(np.float32)
        with sharding.use(self._mesh):
            return self._embedder.prototypes(model.params, model.frozen, texts_ND, clusters_N, centroids_ND)

    def encode_records(self, queries: Sequence[dict[str, Any]]) -> np.ndarray:
        """Embeds records as `query_lines.read_queries` yields them, float32 [N, D]."""
        return self.encode_queries(self._texts(queries), [query["images"] for query in queries])

    def predict(
        self, texts: Sequence[str], images: Sequence[Sequence[Picture]] | None = None, k: int = 10
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the k best labels of each query: int32 [N, k] and float32 [N, k] scores, best first.

        -1 and -inf where there are fewer than k labels.
        """
        if not len(texts):
            return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
        found = self.searcher.search(self.encode_queries(texts, images), k)
        return found.ids, found.scores

    def predict_records(self, queries: Iterator[dict[str, Any]], k: int) -> Iterator[dict[str, Any]]:
        """Yields an output record for each of `query_lines.read_queries`, in order, a chunk at a time."""
        uids, titles = self.labels.uids, self.labels.titles
        for chunk in chunks(queries):
            ids, scores = self.predict(self._texts(chunk), [query["images"] for query in chunk], k)
            for query, row_ids, row_scores in zip(chunk, ids, scores, strict=True):
                yield {
                    "uid": query["uid"],
                    "labels": [
                        {"index": int(i), "uid": uids[i], "title": titles[i], "score": round(float(s), 6)}
                        for i, s in zip(row_ids, row_scores, strict=True)
                        if i >= 0
                    ],
                }

    def _texts(self, queries: Sequence[dict[str, Any]]) -> list[str]:
        fields = self._model.config.dataset.fields
        return [" ".join(filter(None, (query[field] for field in fields))) for query in queries]

    def _pooled(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Picture]] | None,
        template: Template,
        title: str,
    ) -> np.ndarray:
        if isinstance(texts, str):
            raise UserError("texts is one string", fix="give a list of texts")
        if images is not None and len(images) != len(texts):
            raise UserError(
                f"{len(texts)} texts, but {len(images)} lists of pictures", fix="give one list a text"
            )
        if not len(texts):
            return np.zeros((0, self.dim), np.float32)
        model = self._model
        tokenizer = model.layout.tokenizer(model.tokenizer)
        values, lengths = tokenizer.encode_batch(list(texts), model.config.text.max_tokens)
        tokens = Ragged(values, np.concatenate([[0], np.cumsum(lengths)]))
        pictures = None
        if self.uses_images and images is not None:
            pictures = banks_lib.pictures_in_memory(model.config, images)
        bank = ItemBank(tokens, template, pictures, model.config.vision.images if pictures else 0)
        with sharding.use(self._mesh):
            return self._embedder.pooled(model.params, model.frozen, bank, title)

    def _known_labels(self) -> dict[str, int]:
        if self._known is None:
            texts = self.labels.text_of(tuple(self._model.config.dataset.fields))
            # Of labels with equal texts the first one stands for all.
            self._known = {text: row for row, text in reversed(list(enumerate(texts)))}
        return self._known

    def _known_label_texts(self) -> retrieval.index.Index:
        """Exact search over the embeddings of the dataset's labels, by text alone; in blocks."""
        if self._label_texts is None:
            texts = self.labels.text_of(tuple(self._model.config.dataset.fields))
            texts_LD = normalized(
                self._pooled(list(texts), None, self._model.layout.label, "embed known labels")
            )
            self._label_texts = retrieval.build(texts_LD, kind="exact")
        return self._label_texts


def chunks(queries: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yields QUERIES_PER_CHUNK queries at a time, fewer at the end."""
    while chunk := list(itertools.islice(queries, QUERIES_PER_CHUNK)):
        yield chunk
