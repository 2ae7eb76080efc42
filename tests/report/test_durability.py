"""Durability as numbers: what each one is of which checkpoint, and that they are names of the contract."""

from __future__ import annotations

import pytest
from told_runs import START, failed, record

from ckptmgr import durability
from ckptmgr.lifecycle import CheckpointState


def test_the_numbers_of_a_series_are_those_of_its_newest_commit() -> None:
    rows = [record(1), record(2, retire_started_at=START, retire_reason="r", retired_at=START), record(3), failed(4)]
    rows.append(record(5, state=CheckpointState.WRITING))
    found = durability.of_series(rows, now=START + 1850.0 + 120.0)

    assert found == {
        "commits_total": 3,
        "failures_total": 1,
        "committed_bytes_total": 240e9,
        "stall_seconds_total": 4.5,
        "in_flight": 1,
        "live_checkpoints": 2,
        "live_bytes": 160e9,
        "steps_at_risk": 200,
        "seconds_since_commit": 120.0,
        "last_commit_timestamp_seconds": START + 1850.0,
        "last_committed_step": 300,
        "commit_lag_seconds": 51.5,
        "stall_seconds": 1.5,
        "write_seconds": 40.0,
        "gather_seconds": 0.5,
        "committed_bytes": 80e9,
    }
    assert list(found) == [metric.name for metric in durability.METRICS]


def test_newest_is_what_committed_last_and_not_the_highest_step() -> None:
    set_back = record(3, step=150)
    found = durability.of_series([record(1), record(2), set_back], now=START)

    assert found["last_committed_step"] == 150
    assert found["steps_at_risk"] == 0
    assert found["seconds_since_commit"] == 0.0


def test_everything_is_at_risk_before_the_first_commit() -> None:
    found = durability.of_series([failed(4), failed(5)], now=START)

    assert found["steps_at_risk"] == 500
    assert "seconds_since_commit" not in found
    assert durability.of_series([], now=START)["steps_at_risk"] == 0


def test_the_numbers_of_a_commit_are_those_of_the_contract() -> None:
    found = durability.of_commit(record(7), before=record(4))

    assert list(found) == list(durability.COMMIT_NUMBERS)
    assert found["steps_since_commit"] == 300
    assert found["write_bytes_per_second"] == 2e9
    assert "steps_since_commit" not in durability.of_commit(record(7), before=None)


@pytest.mark.parametrize("facts", [{"write_s": None}, {"state": CheckpointState.WRITING}])
def test_a_lag_that_nobody_measured_is_not_made_up(facts: dict[str, object]) -> None:
    """A row that was rebuilt from its manifest has no durations, and its times are those of files."""
    assert durability.commit_lag(record(1, **facts)) is None


def test_what_is_no_number_is_not_told() -> None:
    huge = record(1, created_at=-1.7e308, committed_at=1.7e308, stage_s=1e308, write_s=1e-300)
    found = durability.of_series([huge, record(2, stage_s=1.7e308), record(3)], now=START)

    assert "stall_seconds_total" not in found
    assert "commit_lag_seconds" not in durability.of_commit(huge, before=None)
    assert "write_bytes_per_second" not in durability.of_commit(huge, before=None)
