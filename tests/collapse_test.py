"""The warning of a collapse comes once, after a row of steps without a gap."""

import logging

import pytest

from vixml_jax.collapse import SHARE, STEPS, CollapseWatch


def steps(count, share):
    return [{"train/violators": share, "train/loss": 0.31}] * count


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING)
    return caplog


def test_it_warns_once(warnings):
    watch = CollapseWatch()
    for step in range(10, 10 * STEPS, 10):
        watch.update(step, steps(10, 1.0))
    assert [record.getMessage().split(":")[0] for record in warnings.records] == [f"step {STEPS}"]


@pytest.mark.parametrize("share", [0.0, 0.7, SHARE - 1e-3])
def test_a_run_that_learns_is_left_alone(warnings, share):
    watch = CollapseWatch()
    for step in range(1, 5 * STEPS):
        watch.update(step, steps(1, share))
    assert not warnings.records


def test_a_single_step_apart_begins_the_count_anew(warnings):
    watch = CollapseWatch()
    watch.update(STEPS, [*steps(STEPS - 1, 1.0), *steps(1, 0.9)])
    watch.update(2 * STEPS - 1, steps(STEPS - 1, 1.0))
    assert not warnings.records
    watch.update(2 * STEPS, steps(1, 1.0))
    assert len(warnings.records) == 1
