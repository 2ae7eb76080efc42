"""From rows to the numbers of charts: bounded, and nothing that cannot be true."""

from __future__ import annotations

import pytest
from told_runs import GB, START, failed, record

from ckptmgr.cli.report import figures
from ckptmgr.lifecycle import CheckpointState


@pytest.mark.parametrize("number", [0, 1, 79, 80, 81, 1000])
def test_bins_hold_every_checkpoint_once_and_are_no_more_than_asked_for(number: int) -> None:
    bins = figures.binned([record(n) for n in range(number)], lambda each: float(each.step), most=80)

    assert sum(each.count for each in bins) == number
    assert len(bins) <= 80
    assert all(each.low <= each.middle <= each.high for each in bins)
    assert [each.first_step for each in bins] == [int(each.low) for each in bins]


def test_a_bin_keeps_its_slowest_checkpoint() -> None:
    rows = [record(n, stage_s=30.0 if n == 500 else 1.0) for n in range(1000)]
    bins = figures.binned(rows, lambda each: each.stage_s, most=10)

    assert max(each.high for each in bins) == 30.0
    assert {each.middle for each in bins} == {1.0}


@pytest.mark.parametrize("at", [None, -1.0, 0.0, 1e300])
def test_times_that_cannot_be_true_are_left_out(at: float | None) -> None:
    assert figures.moment(at) is None
    within = figures.span([record(1), record(2, created_at=at or 0.0, committed_at=at, finished_at=at)])

    assert within == (START + 600.0, START + 650.0)


@pytest.mark.parametrize("took", [None, -1.0, 1e300])
def test_durations_that_cannot_be_true_are_left_out(took: float | None) -> None:
    assert figures.seconds(took) is None
    assert figures.seconds(0.0) == 0.0


def test_a_lane_tells_what_is_on_disk_from_what_has_gone_and_what_failed() -> None:
    gone = record(1, retire_started_at=START, retire_reason="old", retired_at=START)
    rows = [gone, record(2), failed(3), record(4, state=CheckpointState.WRITING)]
    lane = figures.lane("checkpoint", rows, (START, START + 3000.0), most=100)

    assert [count for _, count in lane.gone] == [1]
    assert lane.kept == [(START + 1250.0, 1)]
    assert lane.failed == [(START + 1820.0, 1)]
    assert lane.in_flight == [(START + 2400.0, 1)]


def test_moments_that_cannot_be_told_apart_are_one_and_are_counted() -> None:
    found = figures.thinned([START + n for n in range(1000)], (START, START + 999.0), most=50)

    assert len(found) == 50
    assert sum(count for _, count in found) == 1000
    assert [at for at, _ in found] == sorted(at for at, _ in found)


def test_space_goes_up_with_a_commit_and_down_with_a_deletion() -> None:
    gone = record(1, retire_started_at=START + 1300.0, retire_reason="old", retired_at=START + 1400.0)
    rows = [gone, record(2, series="hf", bytes=GB), failed(3)]

    assert figures.disk_use(rows, ["checkpoint", "hf"], START + 9000.0, most=100) == [
        (START + 650.0, (80 * GB, 0)),
        (START + 1250.0, (80 * GB, GB)),
        (START + 1400.0, (0, GB)),
        (START + 9000.0, (0, GB)),
    ]
    assert figures.disk_use([failed(1)], ["checkpoint"], START, most=100) == []


def test_the_most_that_was_ever_on_disk_is_shown_however_long_the_run() -> None:
    rows = [
        record(n, retire_started_at=START, retire_reason="old", retired_at=START + 600.0 * n + 60.0)
        for n in range(1, 2000)
    ]
    rows[700] = record(701, bytes=900 * GB, retired_at=rows[700].retired_at, retire_started_at=START, retire_reason="r")
    points = figures.disk_use(rows, ["checkpoint"], START + 1e7, most=50)

    assert len(points) <= 51
    assert max(sum(counts) for _, counts in points) == 900 * GB
    assert points[-1] == (START + 1e7, (0,))


def test_ten_thousand_ranks_are_a_few_stretches_with_their_least_and_most() -> None:
    found = figures.share([(rank, rank % 7) for rank in range(10_000)], most=64)

    assert len(found) <= 64
    assert (found[0][0], found[-1][1]) == (0, 9999)
    assert {stretch[2:] for stretch in found[:-1]} == {(0, 6)}
    assert figures.share([(0, 5), (1, 6)], most=64) == [(0, 0, 5, 5), (1, 1, 6, 6)]
