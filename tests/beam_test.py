"""`vixml prepare` by Beam: the same dataset as by threads. Most need the extra `beam`: `make test-beam`."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import pipeline
import pytest
import tensorflow_datasets as tfds
from raw_folders import image_list, json_folder, own_folder, picture, write_lines

from vixml_jax import cli, data
from vixml_jax.data import beam_builder, beam_run, pictures
from vixml_jax.data.beam_builder import Shard, ShardWriter
from vixml_jax.data.beam_run import BeamRun
from vixml_jax.errors import UserError
from vixml_jax.prepare import prepare

TWO_PROCESSES = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")


@pytest.fixture
def beam():
    """Beam, which the tests' own environment does not hold."""
    return pytest.importorskip("apache_beam")


def random_folder(path: Path, seed: int) -> Path:
    """A raw folder of either kind; of its pictures some are missing, some broken, some named by nobody."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 60))
    path.mkdir(parents=True)
    names = []
    for number in range(int(rng.integers(1, 40))):
        names.append(f"{number}.png")
        whole = picture(f"#{rng.integers(1 << 24):06x}", str(rng.choice(["PNG", "JPEG"])))
        kinds = [whole, whole, whole, whole[: len(whole) // 2], b"", b"no picture", None]
        if (content := kinds[rng.integers(len(kinds))]) is not None:
            (path / names[-1]).write_bytes(content)
    names += ["../outside.png", "nul\0l.png", "näme.png"]

    def some() -> list[str]:
        return [str(name) for name in rng.choice(names, rng.integers(4))]

    if rng.integers(2):
        rows = [{"uid": f"r{i}", "title": f" t {i}", "labels": ["a", f"b{i}"]} for i in range(count)]
        write_lines(path / "train.jsonl", [{**row, "images": some()} for row in rows])
        write_lines(path / "test.jsonl", rows)  # a split without pictures
        return path
    rows = [{"uid": f"r{i}", "title": f"t{i}", "content": "ü\n", "target_ind": [i % 3]} for i in range(count)]
    json_folder(path, trn=rows)
    uids = [f"r{i}" for i in range(count) for _ in range(rng.integers(4))]
    lines = [(uid, name.replace("\0", "")) for uid in uids for name in some()[:1]]
    image_list(path, "trn", [*lines, ("ghost", "0.png"), ("", "0.png")])
    image_list(path, "lbl", [("l1", "0.png")])
    return path


def read(out: Path, split: str) -> list[dict[str, Any]]:
    builder: Any = tfds.builder_from_directory(os.fspath(out))
    return [{**row, "targets": row["targets"].tolist()} for row in builder.as_data_source(split)]


def assert_same(out: Path, expected: Path) -> None:
    """Every file but the shards is the same, and the shards hold the same rows in the same order."""

    def found(root: Path) -> dict[str, object]:
        files: dict[str, object] = {}
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            if ".array_record-" in path.name:
                continue
            files[str(path.relative_to(root))] = path.read_bytes()
        card = json.loads((root / "dataset_info.json").read_text())
        for split in card["splits"]:
            split["shardLengths"] = sum(map(int, split["shardLengths"]))
        return {**files, "dataset_info.json": card}

    ours, theirs = found(out), found(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    for split in ("train", "test", "labels"):
        if f"columns/{split}/uid/values.npy" in ours:
            assert read(out, split) == read(expected, split)
    assert len(data.load(out).train) == len(data.load(expected).train)


def assert_left_alone(directory: Path, *names: str) -> None:
    assert sorted(os.listdir(directory)) == sorted(names)


@pytest.mark.parametrize("seed", fresh.seeds(4))
def test_the_dataset_is_the_same(beam, tmp_path, monkeypatch, seed):
    raw = random_folder(tmp_path / "raw", seed)
    expected = prepare(raw, tmp_path / "threads", "set")
    monkeypatch.setattr(beam_builder, "ROWS_PER_SHARD", 1 + seed % 20)
    found = prepare(raw, tmp_path / "beam", "set", beam_runner="DirectRunner")
    assert found == expected
    assert_same(tmp_path / "beam", tmp_path / "threads")
    assert_left_alone(tmp_path, "beam", "raw", "threads")
    assert prepare(raw, tmp_path / "beam", "set", beam_runner="DirectRunner")["unchanged"]


def test_several_processes_share_the_shards(beam, tmp_path, monkeypatch, capfd):
    raw = random_folder(tmp_path / "raw", 3)
    prepare(raw, tmp_path / "threads", "set")
    monkeypatch.setattr(beam_builder, "ROWS_PER_SHARD", 4)
    capfd.readouterr()
    prepare(raw, tmp_path / "beam", "set", beam_runner="DirectRunner", beam_options=TWO_PROCESSES)
    assert_same(tmp_path / "beam", tmp_path / "threads")
    assert len(list((tmp_path / "beam").glob("*train.array_record-*"))) > 1
    assert all(line.startswith("prepare ") for line in capfd.readouterr().err.splitlines())


def test_a_relative_path_means_the_launching_process_directory(beam, tmp_path, monkeypatch):
    random_folder(tmp_path / "raw", 3)
    prepare(tmp_path / "raw", tmp_path / "threads", "set")
    monkeypatch.chdir(tmp_path)
    each = BeamRun.each

    def elsewhere(self, function, items, title):
        with monkeypatch.context() as patch:
            patch.chdir("/")
            each(self, function, items, title)

    monkeypatch.setattr(BeamRun, "each", elsewhere)
    prepare("raw", "beam", "set", beam_runner="DirectRunner")
    assert_same(tmp_path / "beam", tmp_path / "threads")


def test_shards_are_few_however_many_rows(beam, tmp_path, monkeypatch):
    monkeypatch.setattr(beam_builder, "ROWS_PER_SHARD", 1)
    monkeypatch.setattr(beam_builder, "SHARDS_PER_SPLIT", 3)
    rows = [{"title": f"t{i}", "labels": ["a"]} for i in range(10)]
    (tmp_path / "raw").mkdir()
    write_lines(tmp_path / "raw/train.jsonl", rows)
    prepare(tmp_path / "raw", tmp_path / "out", beam_runner="DirectRunner")
    assert len(list((tmp_path / "out").glob("*train.array_record-*-of-00003"))) == 3
    assert [row["title"] for row in read(tmp_path / "out", "train")] == [f"t{i}".encode() for i in range(10)]


def test_a_machine_short_of_something_ends_the_pipeline(beam, tmp_path, monkeypatch, capfd):
    raw = random_folder(tmp_path / "raw", 3)

    def stale(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(pictures, "read_file", stale)
    command = ["prepare", f"--raw={raw}", f"--out={tmp_path / 'out'}", "--beam_runner=DirectRunner"]
    assert cli.run(command) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("prepare ")]
    assert (
        "vixml: error: the pipeline of DirectRunner failed (OSError: [Errno 116] Stale file handle)" in line
    )
    assert_left_alone(tmp_path, "raw")


def test_a_runner_that_fails_is_one_line(beam, tmp_path, capfd):
    raw = own_folder(tmp_path / "raw")
    command = ["prepare", f"--raw={raw}", f"--out={tmp_path / 'out'}", "--beam_runner=FlinkRunner"]
    assert cli.run([*command, "--beam_options=--flink_job_server_jar=gone.jar"]) == 2
    *_, line = capfd.readouterr().err.splitlines()
    assert line.startswith("vixml: error: the pipeline of FlinkRunner failed (")
    assert "gone.jar" in line
    assert_left_alone(tmp_path, "raw")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--direct_num_wrokers=2"], "unknown Beam option --direct_num_wrokers"),
        (["--direct_num_workers=two"], "invalid int value: 'two'"),
        (["--direct_running_mode=magic"], "invalid choice: 'magic'"),
        (["direct_num_workers=2"], "no Beam option: 'direct_num_workers=2'"),
        (["--direct_num_workers=2", "--runner=FlinkRunner"], "give --beam_runner"),
    ],
)
def test_a_wrong_option_is_one_line(beam, tmp_path, capfd, options, problem):
    raw = own_folder(tmp_path / "raw")
    command = ["prepare", f"--raw={raw}", f"--out={tmp_path / 'out'}", "--beam_runner=DirectRunner"]
    assert cli.run([*command, *(f"--beam_options={option}" for option in options)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert problem in line
    assert_left_alone(tmp_path, "raw")


def test_job_servers_know_options_of_their_own(beam):
    for runner in ("SparkRunner", "FlinkRunner"):
        BeamRun(runner, ["--known_to_the_job_server=1"])


def test_a_runner_that_lacks_an_option_says_so_at_once(beam, tmp_path):
    # Without the packages of Google Cloud, or without a project.
    with pytest.raises(UserError, match="DataflowRunner cannot be used"):
        prepare(tmp_path / "nothing is read", tmp_path / "out", beam_runner="DataflowRunner")


def test_an_interrupted_launcher_cancels_its_job(beam, monkeypatch):
    class Result:
        cancelled = False

        def wait_until_finish(self):
            raise KeyboardInterrupt

        def cancel(self):
            self.cancelled = True

    result = Result()
    monkeypatch.setattr(beam.Pipeline, "run", lambda self: result)
    with pytest.raises(KeyboardInterrupt):
        BeamRun("DirectRunner").each(print, [1], "title")
    assert result.cancelled


def test_a_job_that_is_cancelled_leaves_nothing(beam, tmp_path, monkeypatch):
    """Runners end without an error then."""
    monkeypatch.setattr(BeamRun, "each", lambda self, function, items, title: function(items[0]))
    with pytest.raises(UserError, match="ended without this file"):
        prepare(random_folder(tmp_path / "raw", 3), tmp_path / "out", beam_runner="DirectRunner")
    assert_left_alone(tmp_path, "raw")


def test_a_shard_may_be_written_twice(beam, tmp_path, monkeypatch):
    raw = random_folder(tmp_path / "raw", 3)
    prepare(raw, tmp_path / "threads", "set")

    def twice(self, function, items, title):
        for item in [*items, *items]:
            function(item)

    monkeypatch.setattr(BeamRun, "each", twice)
    prepare(raw, tmp_path / "beam", "set", beam_runner="DirectRunner")
    assert_same(tmp_path / "beam", tmp_path / "threads")


@pytest.mark.parametrize("seed", fresh.seeds(1))
def test_a_killed_run_leaves_nothing_under_the_name(beam, tmp_path, seed):
    raw = random_folder(tmp_path / "raw", 3)
    options = [f"--beam_options={option}" for option in TWO_PROCESSES]
    command = pipeline.vixml("prepare", f"--raw={raw}", f"--out={tmp_path / 'out'}", "--name=set")
    by_beam = [*command, "--beam_runner=DirectRunner", *options]
    if pipeline.killed_after(by_beam, seed % 2000 / 1000, pipeline.newest(tmp_path, ".out.*")):
        assert not (tmp_path / "out").exists()
    prepare(raw, tmp_path / "out", "set", beam_runner="DirectRunner")
    prepare(raw, tmp_path / "threads", "set")
    assert_same(tmp_path / "out", tmp_path / "threads")


@pytest.mark.parametrize("gone", ["raw", "rows"])
def test_a_worker_must_see_the_same_files(tmp_path, gone):
    """Else all its pictures would be missing."""
    for name in {"raw", "rows"} - {gone}:
        (tmp_path / name).write_text("")
    write = ShardWriter(str(tmp_path), str(tmp_path / "raw"))
    with pytest.raises(UserError, match=f"{gone}: a worker does not see this file; mount"):
        write(Shard(*(str(tmp_path / name) for name in ("rows", "records", "facts"))))


def test_beam_is_missing(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    raw = own_folder(tmp_path / "raw")
    command = ["prepare", f"--raw={raw}", f"--out={tmp_path / 'out'}", "--beam_runner=DirectRunner"]
    assert cli.run(command) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("; pip install 'vixml-jax[beam]'")
    assert_left_alone(tmp_path, "raw")


@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        ("--beam_options=--direct_num_workers=2", "--beam_options without a runner; give --beam_runner"),
        ("--beam_runner=Direct", "value should be one of"),
    ],
)
def test_flags_that_do_not_fit(tmp_path, capfd, flag, problem):
    raw = own_folder(tmp_path / "raw")
    assert cli.run(["prepare", f"--raw={raw}", f"--out={tmp_path / 'out'}", flag]) == 2
    assert problem in capfd.readouterr().err
    with pytest.raises(UserError, match="one of DirectRunner"):
        prepare(raw, tmp_path / "out", beam_runner="Direct")


def test_without_the_flag_beam_is_not_imported(tmp_path):
    raw = own_folder(tmp_path / "raw")
    code = f"import sys, vixml_jax.prepare as p; p.prepare({os.fspath(raw)!r}, {os.fspath(tmp_path / 'o')!r})"
    program = f"{code}; sys.exit('apache_beam' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("plain\ntwo lines", "RuntimeError: plain two lines"),
        (
            "Traceback (most recent call last):\n  File\nValueError: first\n\nDuring ...\n\n"
            "Traceback (most recent call last):\n  File\nvixml_jax.errors.UserError: a: b\nc "
            "[while running 'call-ptransform-7']\n",
            "vixml_jax.errors.UserError: a: b c",
        ),
        ("Traceback (most recent call last):\n  File\nKeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_the_reason_of_a_failure(text, reason):
    assert beam_run._reason(RuntimeError(text)) == reason


def test_loggers_and_the_error_stream_come_back(beam, tmp_path, capfd):
    logger = logging.getLogger("apache_beam")
    before = logger.level, logging.getLogger().level
    BeamRun("DirectRunner").each(_touch, [str(tmp_path / name) for name in "abc"], "touch")
    assert_left_alone(tmp_path, "a", "b", "c")
    assert (logger.level, logging.getLogger().level) == before
    os.write(2, b"heard")
    assert capfd.readouterr().err.endswith("heard")


def _touch(path: str) -> None:
    Path(path).write_text(str(time.time()))
