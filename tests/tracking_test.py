"""The records of a run: what a killed run leaves behind, and figures that are no numbers."""

from __future__ import annotations

import json

import jax.numpy as jnp
import pytest

from vixml_jax.tracking import Tracker


def _records(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


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
    assert any((tmp_path / "run" / "events").iterdir())


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
        with pytest.raises(FloatingPointError, match=r"train/grad_norm is -?(nan|inf) at step 2"):
            tracker.log(2, {"train/loss": 1.0, "train/grad_norm": jnp.float32(value)})
    if enabled:
        assert [record["step"] for record in _records(tmp_path / "run")] == [1]


def test_a_process_that_does_not_write_leaves_no_files(tmp_path):
    with Tracker(tmp_path / "run", enabled=False) as tracker:
        assert tracker.log(1, {"train/loss": 1.0}) == {"train/loss": 1.0}
    assert not (tmp_path / "run").exists()
