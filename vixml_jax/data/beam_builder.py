"""The dataset of a raw folder whose pictures are read by the workers of a Beam runner.

The launching process reads the texts, writes what lies beside the records, and stages the rows of each shard
in a scratch file. A worker takes a shard: it reads the pictures of its rows, writes the records where they
belong, and leaves beside the rows what it has seen of the pictures, which the launching process then adds up
in order. So no picture passes through Beam, and of several attempts at a shard any may win.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tensorflow_datasets.core import example_serializer, file_adapters, registered
from tensorflow_datasets.core import writer as writer_lib
from tensorflow_datasets.core.splits import SplitDict, SplitInfo

from vixml_jax import files
from vixml_jax.data import builder, staged_rows
from vixml_jax.data.beam_run import BeamRun
from vixml_jax.data.raw_images import ImageReader
from vixml_jax.data.report import Report
from vixml_jax.data.split_columns import PictureColumns, TextColumns
from vixml_jax.errors import UserError
from vixml_jax.progress import Progress

# A shard has at least so many rows, and a split at most so many shards: readers hold each of them open.
ROWS_PER_SHARD = 1_000
SHARDS_PER_SPLIT = 256


class Shard(NamedTuple):
    """One shard's files; plain texts, as Beam hands it on.

    Attributes:
      rows: its rows, staged.
      records: the file of the dataset that a worker writes.
      facts: what the worker says of the rows.
    """

    rows: str
    records: str
    facts: str


@dataclasses.dataclass(frozen=True)
class ShardWriter:
    """What a worker does with a shard.

    Attributes:
      raw: the raw folder.
      witness: a file in it that is there.
    """

    raw: str
    witness: str

    def __call__(self, shard: Shard) -> None:
        """Reads the pictures of a shard's rows and writes its records, then their facts.

        Raises:
          UserError: if the worker does not see the files of the launching process.
        """
        rows, records, facts = map(Path, shard)
        for path in (Path(self.witness), rows):
            if not path.is_file():  # else every picture would count as missing
                raise UserError(
                    "a worker does not see this file", file=path, fix="mount its file system on every worker"
                )
        with files.scratch_dir(rows) as scratch:
            written = scratch / "records"
            with files.atomic_file(facts, "w") as notes:
                writer_lib.ExampleWriter(file_format=file_adapters.FileFormat.ARRAY_RECORD).write(
                    written, self._serialized(rows, notes)
                )
                os.replace(written, records)

    def _serialized(self, rows: Path, notes: Any) -> Iterator[tuple[int, bytes]]:
        features: Any = builder.features()
        serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
        images = ImageReader(self.raw, Report(self.raw))
        found = builder.with_pictures(staged_rows.read_rows(rows), images, check=True)
        for row, (record, pictures) in enumerate(found):
            data = serializer.serialize_example(features.encode_example(builder.example(record, pictures)))
            staged_rows.write_facts(
                notes,
                staged_rows.RowFacts(
                    len(data),
                    [picture.facts for picture in pictures],
                    images.findings(record.images, record.file, pictures),
                ),
            )
            yield row, data


with registered.skip_registration():

    class BeamBuilder(builder.XmcBuilder):
        """Builds the TFDS dataset of a raw folder by Beam.

        Args:
          beam: the runner.
          **kwargs: those of `XmcBuilder`.
        """

        __module__ = builder.__name__  # which the dataset's card names: it is the same dataset

        def __init__(self, *, beam: BeamRun, **kwargs: Any):
            self._beam = beam
            super().__init__(**kwargs)

        def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
            del dl_manager, download_config
            folder = self._folder
            self._scratch = Path(os.path.abspath(self.data_dir_root)) / "staged"
            self._scratch.mkdir(parents=True)
            staged = {split: self._stage(split) for split in folder.splits}
            write = ShardWriter(os.path.abspath(folder.path), os.path.abspath(folder.files[0].path))
            shards = [shard for _, shards in staged.values() for shard in shards]
            self._beam.each(write, shards, "prepare pictures")
            infos = [self._collect(split, texts, shards) for split, (texts, shards) in staged.items()]
            self.info.set_splits(SplitDict(infos))

        def _stage(self, split: str) -> tuple[TextColumns, list[Shard]]:
            """Reads the texts of a split, and leaves the rows of each shard in a file."""
            size = self._folder.sizes[split]
            most = max(ROWS_PER_SHARD, -(-size // SHARDS_PER_SPLIT))
            staged: list[Path] = []
            with (
                TextColumns(self._columns, split) as texts,
                Progress(size, f"prepare {split}: texts") as progress,
            ):
                records = self._folder.records(split)
                while chunk := list(itertools.islice(records, most)):
                    for record in chunk:
                        texts.append(record)
                    staged.append(self._scratch / f"{split}-{len(staged)}.rows")
                    staged_rows.write_rows(staged[-1], chunk)
                    progress.update(len(chunk))
                texts.finish()
            template = self._get_filename_template(split_name=split)
            records_of = [
                os.path.abspath(template.sharded_filepath(shard_index=number, num_shards=len(staged)))
                for number in range(len(staged))
            ]
            return texts, [
                Shard(str(rows), records, str(rows.with_suffix(".facts")))
                for rows, records in zip(staged, records_of, strict=True)
            ]

        def _collect(self, split: str, texts: TextColumns, shards: list[Shard]) -> SplitInfo:
            """Adds up what the workers say of a split's rows, in their order."""
            lengths, num_bytes = [], 0
            with PictureColumns(self._columns, split) as columns:
                for shard in shards:
                    for path in (shard.facts, shard.records):
                        if not os.path.isfile(path):
                            raise UserError(
                                "the pipeline has ended without this file", file=path, fix="run it again"
                            )
                    length = 0
                    for row in staged_rows.read_facts(Path(shard.facts)):
                        self._add_pictures(columns, row.pictures, row.findings)
                        num_bytes += row.num_bytes
                        length += 1
                    lengths.append(length)
            self._end_split(split, texts, columns)
            template = self._get_filename_template(split_name=split)
            return SplitInfo(
                name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template
            )
