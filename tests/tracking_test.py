"""The records of a run: what a killed run leaves behind, and figures that are no numbers."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from vixml_jax import tracking
from vixml_jax.errors import NotFinite, UserError
from vixml_jax.tracking import Tracker


def _records(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _events(workdir) -> list[tuple[int, object]]:
    """Step and figures of the records of the event file, without its first, the format's version."""
    (path,) = (workdir / "events").iterdir()
    data, found = path.read_bytes(), []
    while data:  # length, its sum, the record, its sum
        end = 12 + struct.unpack("<Q", data[:8])[0]
        event = Event.FromString(data[12:end])
        figures = {value.tag: value.simple_value for value in event.summary.value}
        found.append((event.step, "start" if event.HasField("session_log") else figures))
        data = data[end + 4 :]
    return found[1:]


def _write(workdir, steps, tail: str = "") -> None:
    workdir.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"step": step, "train/loss": step / 8}) + "\n" for step in steps)
    (workdir / "metrics.jsonl").write_text(lines + tail)


def test_records_and_events_are_written(tmp_path):
    with Tracker(tmp_path / "run") as tracker:
        assert tracker.log(1, {"train/loss": jnp.float32(0.5), "perf/speed": 3}) == {
            "train/loss": 0.5,
            "perf/speed": 3.0,
        }
        assert _records(tmp_path / "run") == [{"step": 1, "train/loss": 0.5, "perf/speed": 3.0}]  # at once
        tracker.log(2, {"train/loss": 0.25})
    assert [record["step"] for record in _records(tmp_path / "run")] == [1, 2]
    assert _events(tmp_path / "run") == [
        (1, {"perf/speed": 3.0}),
        (1, {"train/loss": 0.5}),
        (2, {"train/loss": 0.25}),
    ]


def test_events_are_on_disk_at_once_and_those_after_the_resumed_step_do_not_count(tmp_path):
    with Tracker(tmp_path, resumed_at=4) as tracker:
        tracker.log(5, {"train/loss": 7.0})
        assert _events(tmp_path) == [(5, "start"), (5, {"train/loss": 7.0})]


FILLED = """
import resource, sys
from pathlib import Path
from vixml_jax import cli
from vixml_jax.tracking import Tracker

def fill():
    figures = {f"f{i}": 0.5 for i in range(100)}  # of these, events take more room than lines
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    with Tracker(Path(sys.argv[1])) as tracker:
        for step in range(100):
            tracker.log(step, figures)

sys.exit(cli._exit_code("vixml", fill))
"""


def test_events_that_find_no_room_end_the_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FILLED, tmp_path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("vixml: error: file too large; ")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "metrics.jsonl").stat().st_size < 6000  # it was the events that found none


@pytest.mark.parametrize(
    "tail",
    ["", '{"step": 4, "train/lo', '{"ste', "{", '{"step": 9, "train/loss": 1.0}', "\x00\x00\x00"],
    ids=["whole", "half", "start", "brace", "no newline", "zeros"],
)
def test_records_after_the_resumed_step_are_dropped(tmp_path, tail):
    _write(tmp_path, [1, 2, 3, 4, 5, 6], tail)
    with Tracker(tmp_path, resumed_at=4) as tracker:
        tracker.log(5, {"train/loss": 7.0})
    records = _records(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert records[-1]["train/loss"] == 7


def test_a_kept_record_without_its_newline_stays_a_line(tmp_path):
    _write(tmp_path, [1, 2], '{"step": 3, "train/loss": 0.5}')  # the kill took only the newline
    with Tracker(tmp_path, resumed_at=3) as tracker:
        tracker.log(4, {"train/loss": 0.25})
    assert [record["step"] for record in _records(tmp_path)] == [1, 2, 3, 4]


def test_the_last_evaluation_is_written_once_however_often_a_run_is_continued(tmp_path):
    for resumed_at in (None, 4, 4, 4):
        with Tracker(tmp_path, resumed_at=resumed_at, last_step=4) as tracker:
            if resumed_at is None:
                tracker.log(2, {"train/loss": 2.0})
                tracker.log_evaluation(2, {"P@1": 50.0})
                tracker.log(4, {"train/loss": 1.0})
            tracker.log_evaluation(4, {"P@1": 60.0})
    assert [sorted(record) for record in _records(tmp_path)] == [
        *(["step", "train/loss"], ["eval/P@1", "step"]),
        *(["step", "train/loss"], ["eval/P@1", "step"]),
    ]


def test_a_run_that_starts_anew_keeps_nothing(tmp_path):
    _write(tmp_path, [1, 2, 3])
    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"train/loss": 2.0})
    assert _records(tmp_path) == [{"step": 1, "train/loss": 2.0}]


def test_a_resumed_run_may_have_no_records_yet(tmp_path):
    with Tracker(tmp_path, resumed_at=3) as tracker:
        tracker.log(4, {"train/loss": 2.0})
    assert [record["step"] for record in _records(tmp_path)] == [4]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_figure_that_is_not_finite_raises(tmp_path, value, enabled):
    with Tracker(tmp_path / "run", enabled=enabled) as tracker:
        tracker.log(1, {"train/loss": 1.0})
        with pytest.raises(NotFinite, match=r"train/grad_norm is -?(nan|inf) at step 2"):
            tracker.log(2, {"train/loss": 1.0, "train/grad_norm": jnp.float32(value)})
    if enabled:
        assert [record["step"] for record in _records(tmp_path / "run")] == [1]


def test_a_process_that_does_not_write_leaves_no_files(tmp_path):
    with Tracker(tmp_path / "run", enabled=False) as tracker:
        assert tracker.log(1, {"train/loss": 1.0}) == {"train/loss": 1.0}
    assert not (tmp_path / "run").exists()


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package; `started` has the runs, each with what was logged and how it ended."""

    class Error(Exception):
        pass

    def init(**settings):
        module.started.append(run := SimpleNamespace(settings=settings, logged=[], step=0, exit_code=None))

        def log(values, step):
            if step >= run.step:  # what goes back is dropped
                run.logged.append((step, values))
                run.step = step

        run.log = log
        run.finish = lambda exit_code: setattr(run, "exit_code", exit_code)
        return run

    module = SimpleNamespace(started=[], init=init, Error=Error)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_figures_go_to_wandb_too(tmp_path, wandb):
    with Tracker(tmp_path / "run", wandb_project="mine", config={"train": {"seed": 3}}) as tracker:
        tracker.log(1, {"train/loss": jnp.float32(0.5)})
        tracker.log_evaluation(2, {"P@1": 50.0})
    (run,) = wandb.started
    assert run.logged == [(1, {"train/loss": 0.5}), (2, {"eval/P@1": 50.0})]
    assert run.exit_code == 0
    assert run.settings["project"] == "mine"
    assert run.settings["name"] == "run"
    assert run.settings["config"] == {"train": {"seed": 3}}


def test_the_last_evaluation_follows_the_classifiers_at_wandb(tmp_path, wandb):
    with Tracker(tmp_path, wandb_project="mine", last_step=4) as tracker:
        tracker.log(4, {"train/loss": 0.5})
        tracker.log(9, {"classifier/loss": 0.25})
        tracker.log_evaluation(2, {"P@1": 10.0})  # of a step that was seen before a kill
        tracker.log_evaluation(4, {"P@1": 75.0})
    assert wandb.started[0].logged[2:] == [(9, {"eval/P@1": 75.0})]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[-1] == {"step": 4, "eval/P@1": 75.0}


def test_a_continued_run_goes_on_at_wandb(tmp_path, wandb):
    for resumed_at in (None, 4, None):
        with Tracker(tmp_path, wandb_project="mine", resumed_at=resumed_at):
            pass
    first, continued, anew = (run.settings["id"] for run in wandb.started)
    assert first == continued != anew
    with pytest.raises(RuntimeError, match="stop"), Tracker(tmp_path, wandb_project="mine"):
        raise RuntimeError("stop")
    assert wandb.started[-1].exit_code == 1


def test_wandb_is_left_alone_unless_asked(tmp_path, wandb):
    for options in ({}, {"enabled": False, "wandb_project": "mine"}):
        with Tracker(tmp_path / "run", **options) as tracker:
            tracker.log(1, {"train/loss": 1.0})
    assert not wandb.started


def test_wandb_that_cannot_be_used_is_a_users_mistake(tmp_path, wandb, monkeypatch):
    def init(**settings):
        raise wandb.Error("api_key not configured")

    wandb.init = init
    with pytest.raises(UserError, match="api_key not configured; run `wandb login`"):
        Tracker(tmp_path, wandb_project="mine")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'vixml-jax\[wandb\]'"):
        Tracker(tmp_path, wandb_project="mine")


def test_where_one_place_fails_the_others_are_closed(tmp_path, wandb, monkeypatch):
    opened = []

    def full(*_):
        raise OSError("no room")

    def noted(*arguments, **options):
        opened.append(open(*arguments, **options))  # noqa: SIM115 - closed by what is tested
        return opened[-1]

    monkeypatch.setattr(tracking, "Events", full)
    monkeypatch.setattr(tracking, "open", noted, raising=False)
    with pytest.raises(OSError, match="no room"):
        Tracker(tmp_path, wandb_project="mine")
    assert wandb.started[-1].exit_code == 1
    assert all(file.closed for file in opened)
    assert len(opened) == 2
