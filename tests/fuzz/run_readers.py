"""Readers of what a run is made of and leaves: configs, indexes, changed labels, records, checkpoints."""

from __future__ import annotations

import io
import json
import shutil
import socket
from pathlib import Path

import numpy as np
from reader import Reader, Seeds, json_lines, write


def _config_seeds() -> Seeds:
    from vixml_jax import config

    return {"config.json": [config.base().to_json().encode()]}


def _read_config(folder: Path, name: str) -> None:
    from vixml_jax import config as config_lib
    from vixml_jax import config_rules

    config = config_lib.load(folder / name)
    config.dataset.dir = config.dataset.dir or "somewhere"
    config_rules.validate(config)


def _override_seeds() -> Seeds:
    return {
        "overrides": [
            b"images=2\noptimizer.lr=1e-3\ntrain.epochs=3\ntext.dims=(8,16)\nretrieval.modalities=('text','image')",
            b"smoke\nprototype.kind=dexa\nloss.name=triplet\ndataset.fields=('title','content')",
            b"\nmesh.data=2\nvision.images=1\neval.ks=(1,5)\ndataset.dir=x",
        ]
    }


def _read_overrides(folder: Path, name: str) -> None:
    """Through the command line, as a user gives them; the config is validated as by training."""
    import types

    from absl import flags

    from vixml_jax import cli, config_rules
    from vixml_jax import config as config_lib
    from vixml_jax.errors import UserError

    argument, *overrides = (folder / name).read_bytes().decode("utf-8", "replace").split("\n")
    seen: list[BaseException | None] = []

    def main() -> int:
        config = flags.FLAGS.config
        config.dataset.dir = "somewhere"
        config_rules.validate(config)
        seen.append(None)
        return 0

    job = types.ModuleType("job", "A job.")
    job.define_flags, job.main = config_lib.define_config_flag, main
    argv = [f"--config=configs/picto_tags.py:{argument}", *(f"--config.{text}" for text in overrides)]
    code = cli.run_job(job, "job", argv)
    assert code in (0, 2)
    assert (code == 0) == bool(seen)
    if code:
        raise UserError("refused, in one line")


def _label_index_seeds() -> Seeds:
    import tempfile

    from vixml_jax import retrieval

    labels = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    seeds: Seeds = {"index.json": [], "labels.npy": []}
    with tempfile.TemporaryDirectory() as folder:
        retrieval.build(labels, kind="exact").save(Path(folder) / "index")
        for name, found in seeds.items():
            found.append((Path(folder) / "index" / name).read_bytes())
    return seeds


def _prepare_label_index(folder: Path) -> None:
    write(folder, _label_index_seeds())


def _read_label_index(folder: Path, name: str) -> None:
    from vixml_jax import files, retrieval

    header = folder / "index.json"
    before = header.read_bytes()
    if name != "index.json":  # as somebody who wants to harm would do it, the sums fit what was changed
        record = json.loads(before)
        record["sha256"][name] = files.sha256(folder / name)
        header.write_text(json.dumps(record))
    try:
        retrieval.load(folder).search(np.ones((1, 4), np.float32), 3)
    finally:
        header.write_bytes(before)


def _change_seeds() -> Seeds:
    record = {"number": 5, "uid": "n", "title": "new", "content": "", "images": ["0" * 32], "removed": False}
    return {"labels_changed_changes.jsonl": [json_lines(record, {**record, "number": 1, "removed": True})]}


def _read_changes(folder: Path, name: str) -> None:
    from vixml_jax.label_changes import CHANGES, DIRECTORY, LabelChanges

    (folder / DIRECTORY).mkdir(exist_ok=True)
    shutil.copy(folder / name, folder / DIRECTORY / CHANGES)
    changes = LabelChanges.load(folder, 3)
    changes.fingerprints()
    for change in changes.there:
        assert all(path.parent.parent == folder / DIRECTORY for path in changes.pictures(change))


def _added_seeds() -> Seeds:
    buffer = io.BytesIO()
    np.savez(
        buffer, step=np.int64(3), numbers=np.array([5]), fingerprints=np.array(["ab"]),
        embeddings=np.ones((1, 4), np.float32),
    )  # fmt: skip
    return {"index_added.npz": [buffer.getvalue()]}


def _read_added(folder: Path, name: str) -> None:
    from vixml_jax.added_labels import AddedLabels

    AddedLabels.load(folder, 3, num_known=5)


def _record_seeds() -> Seeds:
    return {
        "metrics.jsonl": [json_lines(*({"step": step, "train/loss": 0.5, "perf/x": 3} for step in range(4)))]
    }


def _read_records(folder: Path, name: str) -> None:
    from vixml_jax.report_runs import RunFiles
    from vixml_jax.tracking import drop_after

    RunFiles(folder, "run", 0).curve("train/loss")
    drop_after(folder / name, 2)


def _sums_seeds() -> Seeds:
    return {"3.json": [json.dumps({"params/a": [3, 0x352441C2], "tables/b": [0, 0]}).encode()]}


def _prepare_sums(folder: Path) -> None:
    for name, data in (("params/a", b"abc"), ("tables/b", b"")):
        (folder / "3" / name).parent.mkdir(parents=True)
        (folder / "3" / name).write_bytes(data)


def _read_sums(folder: Path, name: str) -> None:
    from vixml_jax import checkpoint

    checkpoint.damage(folder / "3", folder / name)


def _owner_seeds() -> Seeds:
    gone = {"host": socket.gethostname(), "process": 2**30, "started": "1", "since": "y"}
    return {"owner.json": [json.dumps(gone).encode()]}


def _prepare_owner(folder: Path) -> None:
    (folder / "config.json").write_text("{}")  # an empty workdir would be removed


def _read_owner(folder: Path, name: str) -> None:
    from vixml_jax import ownership

    ownership.take(folder)
    ownership.release(folder)


READERS = [
    Reader("overrides", _override_seeds, _read_overrides, cheap=False),
    Reader("config_json", _config_seeds, _read_config),
    Reader("label_index", _label_index_seeds, _read_label_index, _prepare_label_index, cheap=False),
    Reader("label_changes", _change_seeds, _read_changes),
    Reader("added_labels", _added_seeds, _read_added),
    Reader("metrics_jsonl", _record_seeds, _read_records, cheap=False),
    Reader("checkpoint_sums", _sums_seeds, _read_sums, _prepare_sums),
    Reader("owner", _owner_seeds, _read_owner, _prepare_owner, cheap=False),
]
