"""A trained run in use: it embeds queries and labels, and predicts, also labels that came after training."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from vixml_jax import banks as banks_lib
from vixml_jax import classifier_stage, classifiers, data, evaluate, retrieval, sharding
from vixml_jax import run as run_lib
from vixml_jax.added_labels import AddedLabels, Lenders
from vixml_jax.centroids import BORROWED_FROM, borrowed_centroids, lending_shares
from vixml_jax.data import pictures
from vixml_jax.data.items import ItemBank
from vixml_jax.data.packing import Template
from vixml_jax.data.pictures import Picture
from vixml_jax.data.ragged import Ragged
from vixml_jax.embedding import normalized
from vixml_jax.errors import UserError
from vixml_jax.label_changes import Change, LabelChanges
from vixml_jax.run import TrainedModel
from vixml_jax.search import Searcher

# Queries embedded and searched together: bounds memory whatever the input's length.
QUERIES_PER_CHUNK = 4096


class XmcModel:
    """A trained run, ready to embed and predict.

    Embeddings are L2-normalised float32 [N, D]; D is `model.dim`.
    """

    def __init__(self, model: TrainedModel, workdir: Path, mesh: Any):
        self._model, self._workdir, self._mesh = model, workdir, mesh
        self._embedder = run_lib.make_embedder(model.config, model.graphdef, mesh)
        self._searcher: Searcher | None = None
        self._dataset: data.dataset.XmcDataset | None = None
        self._changes: LabelChanges | None = None
        self._added = AddedLabels()
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
    def name(self) -> str:
        """Name of the run's directory."""
        return self._workdir.resolve().name

    @property
    def uses_images(self) -> bool:
        """Whether the run was trained with pictures."""
        return self._model.spec.image_dim > 0

    @property
    def dataset(self) -> data.dataset.XmcDataset:
        """The dataset that the run was trained on."""
        if self._dataset is None:
            self._dataset = run_lib.open_dataset(self._model.config)
            run_lib.check_dataset(self._dataset, self._model.spec, self._model.config)
        return self._dataset

    @property
    def labels(self) -> data.dataset.Split:
        """The labels of the run's dataset: `.uids`, `.texts`; those that changed since are in `changes`."""
        return self.dataset.labels

    @property
    def changes(self) -> LabelChanges:
        """Labels that came, changed or went after training; see `vixml index --help`."""
        if self._changes is None:
            self._changes = LabelChanges.load(self._workdir, self._model.spec.num_labels)
        return self._changes

    def label_names(self, numbers: np.ndarray) -> list[tuple[str, str]]:
        """Returns (uid, title) of labels by their numbers, int [n], as `predict` returns them."""
        known = np.where(np.asarray(numbers) < self.changes.num_known, numbers, 0)
        names = list(zip(self.labels.uids[known], self.labels.titles[known], strict=True))
        for place, number in enumerate(np.asarray(numbers).tolist()):
            change = self.changes.by_number.get(number)
            if change is not None and not change.removed:
                names[place] = (change.uid, change.title)
        return names

    @property
    def searcher(self) -> Searcher:
        """What is searched: the saved indexes, and labels that changed since they were built.

        Where there are no indexes, or they are of another checkpoint, they are built anew, and not saved.
        """
        if self._searcher is None:
            settings, step = self._model.config.retrieval, self._model.step
            saved = Searcher.load(self._workdir, self.dataset.train_targets, settings, step)
            if saved is None:
                return self.build_searcher()
            self._searcher = self._with_changes(saved)
        return self._searcher

    def _with_changes(self, saved: Searcher) -> Searcher:
        """Adds to a saved index the labels that changed since it was built."""
        if not self.changes:
            return saved
        return saved.with_changes(self.changes, self._added_labels(saved.pending(self.changes)))

    def build_searcher(self, settings: ConfigDict | None = None) -> Searcher:
        """Builds indexes over all labels that there are, later ones included, and searches them from now on.

        Args:
          settings: as `config.retrieval`, which they replace; None for that of the run.
        """
        model, dataset, changes = self._model, self.dataset, self.changes
        model.config.retrieval = settings or model.config.retrieval
        with sharding.use(self._mesh):
            run = run_lib.with_banks(model, model.config, dataset, self._workdir, self._mesh)
            labels_LD = evaluate.embed_labels(run, model.params, model.tables)
            queries_ND = evaluate.embed_train_queries(run, model.params, model.tables)
            vectors_LD = classifier_stage.load(
                model.config, self._workdir, model.spec, model.step, self._mesh
            )
        labels_LD = classifiers.mixed(labels_LD, vectors_LD, model.config.retrieval.classifier_weight)
        if changes:
            rows_LD = np.zeros((changes.total, self.dim), np.float32)
            rows_LD[: len(labels_LD)] = labels_LD
            added_AD = self._added_labels(changes.there).embeddings_of(changes.there, self.dim)
            rows_LD[[change.number for change in changes.there]] = added_AD
            labels_LD = np.delete(rows_LD, changes.removed, axis=0)
        self._searcher = Searcher.build(
            labels_LD,
            queries_ND,
            dataset.train_targets,
            model.config.retrieval,
            changes.fingerprints(),
        )
        self._searcher = self._with_changes(self._searcher)
        return self._searcher

    def save_searcher(self) -> None:
        """Writes the indexes into the workdir."""
        self.searcher.save(self._workdir, self._model.step)

    def update_labels(self) -> int:
        """Takes in `changes`, which must be saved already: embeds what is new, and keeps the embeddings.

        Where there is no index of this checkpoint it is built, and saved.

        Returns:
          How many changes are searched beside the index.
        """
        settings, step = self._model.config.retrieval, self._model.step
        saved = Searcher.load(self._workdir, self.dataset.train_targets, settings, step)
        if saved is None:
            self.build_searcher()
            self.save_searcher()
        else:
            self._searcher = self._with_changes(saved)
        pending = self.searcher.pending(self.changes)
        there = [change for change in pending if not change.removed]
        self._added_labels(there).save(self._workdir, step, self.changes.new, there)
        return len(pending)

    def encode_queries(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Picture]] | None = None,
        progress: bool = True,
    ) -> np.ndarray:
        """Embeds queries, float32 [N, D]; those with pictures as `config.retrieval.modalities` says.

        Args:
          texts: N texts.
          images: for each text a list of pictures (paths, bytes or PIL images), or None for none at all.
            Pictures that cannot be read count as missing.
          progress: whether it is shown.
        """
        model = self._model
        bank = self._item_bank(texts, images, model.layout.query)
        if not len(bank):
            return np.zeros((0, self.dim), np.float32)
        with sharding.use(self._mesh):
            return self._embedder.new_queries(
                model.params,
                model.frozen,
                bank,
                "embed queries" if progress else None,
                modalities=model.config.retrieval.modalities,
            )

    def encode_labels(
        self, texts: Sequence[str], images: Sequence[Sequence[Picture]] | None = None
    ) -> np.ndarray:
        """Embeds labels as they are searched, float32 [N, D].

        A text that is exactly that of a label of the run's dataset gets that label's free vector and
        centroid. Any other is a new label without training queries: it shares the free vector of the known
        label whose text is nearest, and borrows its centroid from the ten nearest (`borrowed_centroids`).
        """
        rows = np.array([self._known_labels().get(text, -1) for text in texts], np.int64)
        return self._encode_labels(texts, images, rows, self._borrows_centroids)[0]

    @property
    def _borrows_centroids(self) -> bool:
        return self._model.spec.prototype != "none"

    def _encode_labels(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Picture]] | None,
        rows: np.ndarray,
        borrow: bool,
    ) -> tuple[np.ndarray, dict[int, Lenders]]:
        """Embeds labels.

        Args:
          texts: N texts.
          images: pictures of each, or None.
          rows: int [N], the numbers of known labels, -1 for a new one.
          borrow: whether lenders of new ones are looked up, which needs embeddings of all known texts.

        Returns:
          float32 [N, D], and for each new label by its place among the N the lenders, if they are looked up.
        """
        model, tables = self._model, self._model.tables
        texts_ND = self._label_texts_pooled(texts, images, "embed labels")
        if not len(texts_ND):
            return texts_ND, {}
        new = np.flatnonzero(rows < 0)
        donors = np.maximum(rows, 0)
        known_LD = np.asarray(tables.centroids)
        centroids_ND = known_LD[donors].astype(np.float32)
        lenders = {}
        if len(new) and borrow:
            near, cosines = self._known_label_texts().search(normalized(texts_ND[new]), BORROWED_FROM)
            shares = lending_shares(known_LD, near, cosines)
            donors[new] = near[:, 0]
            centroids_ND[new] = borrowed_centroids(known_LD, near, shares)
            lenders = dict(zip(new.tolist(), map(Lenders, near, shares), strict=True))
        clusters_N = np.asarray(tables.label_clusters)[donors]
        with sharding.use(self._mesh):
            labels_ND = self._embedder.prototypes(
                model.params, model.frozen, texts_ND, clusters_N, centroids_ND
            )
        return labels_ND, lenders

    def _encode_changed(self, changes: Sequence[Change]) -> AddedLabels:
        """Embeds changed labels; one of the dataset keeps its free vector and centroid, whatever its text."""
        records = [dataclasses.asdict(change) for change in changes]
        rows = [change.number if change.number < self.changes.num_known else -1 for change in changes]
        images = [self.changes.pictures(change) for change in changes]
        borrow = self._borrows_centroids or self._hands_on
        labels_ND, lenders = self._encode_labels(
            self.texts_of(records), images, np.array(rows, np.int64), borrow
        )
        keys = [change.key for change in changes]
        return AddedLabels(
            dict(zip(keys, labels_ND, strict=True)),
            {keys[place]: found for place, found in lenders.items()},
        )

    @property
    def _hands_on(self) -> bool:
        """Whether training queries are searched too, so that new labels need lenders."""
        return self._model.config.retrieval.query_weight > 0

    def _added_labels(self, embedded: Sequence[Change]) -> AddedLabels:
        """What a searcher needs of changed labels; computed where it is not kept.

        Args:
          embedded: changes whose embeddings are needed; those of removed labels are not.
        """
        embedded = [change for change in embedded if not change.removed]
        borrowing = self.changes.new if self._hands_on else []
        added = AddedLabels.load(self._workdir, self._model.step, self.changes.num_known) | self._added
        self._added = added | self._encode_changed(added.missing(embedded, borrowing))
        return self._added

    def fitted_picture(self, picture: Picture) -> Image.Image | None:
        """Unpacks a picture and makes it as small as the run will read it; None if it cannot be read."""
        image = pictures.decode(picture)
        if image is None:
            return None
        preprocessing = banks_lib.vision_tower(self._model.config).preprocessing
        return pictures.fitted(image, preprocessing["size"], preprocessing.get("resampling", "bicubic"))

    def encode_records(self, queries: Sequence[dict[str, Any]]) -> np.ndarray:
        """Embeds records as `query_lines.read_queries` yields them, float32 [N, D]."""
        return self.encode_queries(self.texts_of(queries), [query["images"] for query in queries])

    def predict(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Picture]] | None = None,
        k: int = 10,
        progress: bool = True,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the k best labels of each query: int32 [N, k] and float32 [N, k] scores, best first.

        -1 and -inf where there are fewer than k labels.
        """
        if not len(texts):
            return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
        found = self.searcher.search(self.encode_queries(texts, images, progress), k)
        return found.ids, found.scores

    def predict_records(self, queries: Iterator[dict[str, Any]], k: int) -> Iterator[dict[str, Any]]:
        """Yields an output record for each of `query_lines.read_queries`, in order, a chunk at a time."""
        for chunk in chunks(queries):
            images = [query["images"] for query in chunk]
            answers = self.predict_named(self.texts_of(chunk), images, k)
            for query, labels in zip(chunk, answers, strict=True):
                yield {"uid": query["uid"], "labels": labels}

    def predict_named(
        self, texts: Sequence[str], images: Sequence[Sequence[Picture]] | None, k: int
    ) -> list[list[dict[str, Any]]]:
        """Returns the k best labels of each query, best first: "index", "uid", "title" and "score"."""
        ids_QK, scores_QK = self.predict(texts, images, k, progress=False)
        there = np.unique(ids_QK[ids_QK >= 0])
        names = dict(zip(there.tolist(), self.label_names(there), strict=True))
        return [
            [
                {"index": i, "uid": names[i][0], "title": names[i][1], "score": round(score, 6)}
                for i, score in zip(ids_K, scores_K, strict=True)
                if i >= 0
            ]
            for ids_K, scores_K in zip(ids_QK.tolist(), scores_QK.tolist(), strict=True)
        ]

    def texts_of(self, queries: Sequence[dict[str, Any]]) -> list[str]:
        """Returns the texts that the run reads of records with "title" and "content"."""
        fields = self._model.config.dataset.fields
        return [" ".join(filter(None, (query[field] for field in fields))) for query in queries]

    def _label_texts_pooled(
        self, texts: Sequence[str], images: Sequence[Sequence[Picture]] | None, title: str
    ) -> np.ndarray:
        """Returns the pooled embeddings of labels' texts and pictures, float32 [N, D], not normalised."""
        model = self._model
        bank = self._item_bank(texts, images, model.layout.label)
        if not len(bank):
            return np.zeros((0, self.dim), np.float32)
        with sharding.use(self._mesh):
            return self._embedder.pooled(model.params, model.frozen, bank, title)

    def _item_bank(
        self, texts: Sequence[str], images: Sequence[Sequence[Picture]] | None, template: Template
    ) -> ItemBank:
        """Returns new items as the tower reads them."""
        if isinstance(texts, str):
            raise UserError("texts is one string", fix="give a list of texts")
        if images is not None and len(images) != len(texts):
            raise UserError(
                f"{len(texts)} texts, but {len(images)} lists of pictures", fix="give one list a text"
            )
        model = self._model
        tokenizer = model.layout.tokenizer(model.tokenizer)
        values, lengths = tokenizer.encode_batch(list(texts), model.config.text.max_tokens)
        tokens = Ragged(values, np.concatenate([[0], np.cumsum(lengths)]))
        image_bank = None
        if self.uses_images and images is not None and len(images):
            image_bank = banks_lib.pictures_in_memory(model.config, images, model.spec.image_dim)
        vision = model.config.vision
        no_text, _ = tokenizer.encode_batch([""], model.config.text.max_tokens)
        num_images = vision.images if image_bank else 0
        return ItemBank(tokens, template, image_bank, num_images, vision.tokens, no_text)

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
            texts_LD = normalized(self._label_texts_pooled(list(texts), None, "embed known labels"))
            self._label_texts = retrieval.build(texts_LD, kind="exact")
        return self._label_texts


def chunks(queries: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yields QUERIES_PER_CHUNK queries at a time, fewer at the end."""
    while chunk := list(itertools.islice(queries, QUERIES_PER_CHUNK)):
        yield chunk
