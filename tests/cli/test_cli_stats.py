"""``ckptmgr stats``: space, growth, phases, failures, and the forecast, each from a run of which it is known."""

from __future__ import annotations

import dataclasses
import os
import shutil

import pytest
from run_on_disk import NO_PROCESS, Call, Run, S

from ckptmgr import durability
from ckptmgr.cli import stats
from ckptmgr.cli.stats import FULL, GROWS, NEVER, UNKNOWN, Growth, forecast, forecast_line, growth, measured, throughput
from ckptmgr.lifecycle import CheckpointRecord, Format, RetirementMark
from ckptmgr.retention import KeepAll, KeepBest, KeepEvery, KeepFor, KeepLast, KeepRule, plan

HOUR, DAY = 3600.0, 86400.0
GB = 10**9


def saved(number: int, *, every: int = 500, seconds: float = HOUR, of: int = GB, **more: object) -> CheckpointRecord:
    """The checkpoint that is committed as the one of this *number*."""
    at = 1e9 + number * seconds
    return CheckpointRecord(
        id=number + 1, series="checkpoint", step=number * every, format=Format.DCP, state=S.COMMITTED, epoch=1,
        world_size=1, directory="", staging_directory="", created_at=at - 60, committed_at=at, commit_seq=number + 1,
        bytes=of, **more,
    )  # fmt: skip


def history(rule: KeepRule, saves: int, first: int = 0, **how: object) -> tuple[list[CheckpointRecord], dict]:
    """What the journal has after so many saves under *rule*, from the one of number *first* on."""
    records: dict[int, CheckpointRecord] = {}
    decisions: dict = {}
    for number in range(first, saves):
        record = saved(number, **how)
        records[record.id] = record
        now = record.committed_at
        done = plan([each for each in records.values() if each.is_live], rule, now=now)
        for id, verdict, reasons in done.decisions:
            decisions[id] = (verdict, reasons)
        for mark in done.marks:
            records[mark.checkpoint_id] = dataclasses.replace(
                records[mark.checkpoint_id], retire_started_at=now, retire_reason=mark.reason, retired_at=now
            )
    return list(records.values()), decisions


@pytest.mark.parametrize(
    ("rule", "share", "to_come"),
    [
        (KeepAll(), 1.0, 0),
        (KeepLast(3), 0.0, 0),
        (KeepLast(3) | KeepEvery(5000), 0.1, 0),
        (KeepEvery(300), 1 / 3, 0),  # 1500 is the first step that is a multiple of both
        (KeepBest(2, "loss"), 0.0, 0),
        (KeepFor(10), 0.0, 0),
        (KeepLast(100), 0.0, 60),
        (KeepFor(50), 0.0, 10),
        (KeepLast(3) | KeepAll(), 1.0, 0),
    ],
    ids=lambda value: getattr(value, "text", None),
)
def test_growth_is_what_the_keep_rules_come_to(rule: KeepRule, share: float, to_come: int) -> None:
    records, decisions = history(rule, 40)
    found = growth(records, decisions)

    assert found.stays_for_ever == pytest.approx(share)
    assert found.still_to_come_bytes == pytest.approx(to_come * GB, abs=2 * GB)
    assert found.written_bytes_per_day == 24 * GB
    assert found.kept_bytes_per_day == pytest.approx(24 * GB * share)
    assert (found.saves, found.bytes_per_save, found.seconds_between) == (40, GB, HOUR)


@dataclasses.dataclass(frozen=True)
class EveryOther(KeepRule):
    """A rule of somebody's own."""

    @property
    def text(self) -> str:
        return "as I like it"

    def keeps(self, newest_first, *, now):
        return frozenset(record.id for record in newest_first if record.step % 1000 == 0)


def test_a_rule_that_is_none_of_ours_is_measured() -> None:
    assert growth(*history(EveryOther(), 40)).stays_for_ever == pytest.approx(0.5, abs=0.06)


def test_a_rule_that_keeps_nothing_yet_is_known_from_what_it_let_go() -> None:
    assert growth(*history(KeepLast(3) | KeepEvery(50_000), 40, first=1)).stays_for_ever == 0.01


def test_without_any_reason_growth_is_measured() -> None:
    records, _ = history(KeepAll(), 10)

    assert growth(records, {}).stays_for_ever == 1.0


def test_a_pause_between_two_saves_does_not_change_the_pace() -> None:
    records, decisions = history(KeepAll(), 10)
    late = [dataclasses.replace(each, committed_at=each.committed_at + 30 * DAY * (each.id > 5)) for each in records]

    assert growth(late, decisions).seconds_between == HOUR


def test_one_save_is_too_few_to_tell() -> None:
    one = growth(*history(KeepAll(), 1))

    assert (one.saves, one.kept_bytes_per_day) == (1, None)
    assert forecast({"checkpoint": one}, 100 * GB, 200 * GB, now=0.0)["verdict"] == UNKNOWN
    assert forecast({}, 100 * GB, 200 * GB, now=0.0)["verdict"] == UNKNOWN


GROWING = Growth(40, GB, HOUR, 24 * GB, 0.1, 2.4 * GB, 0)
LEVEL = Growth(40, GB, HOUR, 24 * GB, 0.0, 0.0, 3 * GB)


@pytest.mark.parametrize(
    ("growths", "free", "verdict", "days"),
    [
        ([GROWING], 25 * GB, GROWS, 10.0),  # 1 GB is for the save in flight
        ([GROWING, LEVEL], 29 * GB, GROWS, 10.0),  # and 1 GB for the other's, and 3 that are still to come
        ([LEVEL], 5 * GB, NEVER, None),
        ([LEVEL], 3 * GB, FULL, 0.0),
        ([GROWING], GB // 2, FULL, 0.0),
        ([dataclasses.replace(GROWING, kept_bytes_per_day=1.0)], 25 * GB, NEVER, None),
        ([GROWING], None, UNKNOWN, None),
        ([GROWING, dataclasses.replace(LEVEL, kept_bytes_per_day=None)], 25 * GB, UNKNOWN, None),
    ],
)
def test_forecast(growths: list[Growth], free: int | None, verdict: str, days: float | None) -> None:
    found = forecast(dict(enumerate(growths)), free, 100 * GB, now=0.0)

    assert found["verdict"] == verdict
    assert found["full_in_s"] == (None if days is None else pytest.approx(days * DAY))
    assert (found["full_at"] == "1970-01-11T00:00:00.000Z") == (days == 10.0)


def test_a_phase_has_its_median_its_95th_percentile_and_its_worst_step() -> None:
    records = [saved(number, write_s=float(number), every=1) for number in range(1, 101)]

    assert measured(records, stats.PHASES["write"]) == {
        "count": 100, "median_s": 50.5, "p95_s": 95.0, "worst_s": 100.0, "worst_step": 100,
    }  # fmt: skip
    assert measured(records, stats.PHASES["lag"])["median_s"] == 60.0
    assert measured(records, stats.PHASES["gather"])["count"] == 0
    assert throughput(records) == {
        "median_bytes_per_s": pytest.approx((GB / 50 + GB / 51) / 2), "slowest_bytes_per_s": GB / 100,
        "slowest_step": 100,
    }  # fmt: skip


def test_space_is_told_apart_by_what_becomes_of_it(run: Run, ckptmgr: Call) -> None:
    first = run.save(500)
    run.save(1000, until=S.FAILED)
    shutil.copytree(run.directory / first.directory, run.directory / "checkpoint/.step-7.e1.a77.quarantined")
    run.save(1500, retire=[RetirementMark(first.id, "no rule keeps it (last 1)")])
    run.save(2000, until=S.WRITING)
    (run.directory / first.directory).rename(run.directory / first.retired_directory)

    (one,) = ckptmgr("stats", run.directory, "--json").json["series"]
    kept = {name: (part["count"], part["bytes"]) for name, part in one["space"].items()}

    aside = run.directory / "checkpoint/.step-7.e1.a77.quarantined"
    left_over = sum(file.stat().st_size for file in aside.rglob("*") if file.is_file())
    assert kept["live"] == kept["retiring"] == (1, 1050)
    assert kept["in_flight"][0] == 1
    assert kept["left_over"][0] == 2
    assert kept["in_flight"][1] >= 1050
    assert kept["left_over"][1] >= left_over + 1050

    run.start(pid=NO_PROCESS)
    (one,) = ckptmgr("stats", run.directory, "--json").json["series"]
    assert [one["space"][name]["count"] for name in ("in_flight", "left_over")] == [0, 3]


def test_failures_are_counted_by_cause_and_by_rank(run: Run, ckptmgr: Call) -> None:
    full = {"rank": 3, "host": "n1", "cause": "No space left on device"}
    run.save(1, until=S.FAILED, failures=[full, {**full, "rank": 4}])
    run.save(2, until=S.FAILED, failures=[full])
    run.save(3, until=S.FAILED, reason="interrupted")
    run.save(4)

    (one,) = ckptmgr("stats", run.directory, "--json").json["series"]
    text = ckptmgr("stats", run.directory).out

    assert one["failures"] == 3
    assert [(each["cause"], each["count"], each["last_step"]) for each in one["causes"]] == [
        ("No space left on device", 2, 2), ("interrupted", 1, 3),
    ]  # fmt: skip
    assert one["failed_ranks"] == [{"rank": 3, "host": "n1", "count": 2}, {"rank": 4, "host": "n1", "count": 1}]
    assert "3 attempts failed" in text
    assert "2          2  No space left on device" in text


def test_the_text_has_every_part_and_says_what_is_assumed(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(1000)
    done = ckptmgr("stats", run.directory)

    assert done.code == 0
    for part in ("2: 2.1 kB", "WRITTEN A DAY", "write   12.0 s", "lag", "written at 87 B/s", "disk: "):
        assert part in done.out
    assert "assumed: saves go on" in done.err


def test_the_free_space_is_that_of_the_runs_file_system(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    space = os.statvfs(run.directory)
    full = ckptmgr("stats", run.directory, "--json").json["forecast"]

    assert full["total_bytes"] == space.f_blocks * space.f_frsize
    assert 0 <= full["free_bytes"] <= space.f_bfree * space.f_frsize * 2


def test_an_empty_run_and_one_whose_directory_is_gone_have_no_forecast(run: Run, ckptmgr: Call) -> None:
    empty = ckptmgr("stats", run.directory)
    run.save(500)
    run.directory.rename(f"{run.directory}.away")
    gone = ckptmgr("stats", run.directory)

    assert (empty.code, gone.code) == (0, 0)
    assert "no checkpoints yet" in empty.err
    assert "too few saves to tell" in empty.out
    assert "the run directory is not there" in gone.out


def test_series_filters_and_the_forecast_is_about_all(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(500, series="hf", layout=Format.HUGGINGFACE)

    document = ckptmgr("stats", run.directory, "--series", "hf", "--json").json

    assert [each["series"] for each in document["series"]] == ["hf"]
    assert document["forecast"] | {"free_bytes": 0, "kept_bytes_per_day": 0} == (
        ckptmgr("stats", run.directory, "--json").json["forecast"] | {"free_bytes": 0, "kept_bytes_per_day": 0}
    )
    assert ckptmgr("stats", run.directory, "--series", "nope").code == 2


def test_a_disk_that_is_full_soon_says_when_and_what_would_make_room() -> None:
    full = {"verdict": GROWS, "free_bytes": 10, "total_bytes": 100, "kept_bytes_per_day": 9.0,
            "full_in_s": 7300.0, "full_at": "2026-01-02T03:04:05.000Z"}  # fmt: skip
    assert forecast_line(full) == (
        "disk: 10 B of 100 B free; what is kept grows by 9 B a day: full in 2 h, 2026-01-02 03:04",
        "red",
    )
    later = forecast_line({**full, "full_in_s": 5 * DAY})
    assert later == ("disk: 10 B of 100 B free; what is kept grows by 9 B a day: full in 5 d, 2026-01-02", "yellow")


def test_the_lag_is_that_of_the_report_and_never_negative() -> None:
    lag = stats.PHASES["lag"]
    record = saved(1, stage_s=2.0, write_s=50.0)

    assert lag(record) == durability.commit_lag(record) == 62.0
    assert lag(dataclasses.replace(record, committed_at=record.created_at - 7200)) == 2.0  # the clock was set back
    assert lag(dataclasses.replace(record, write_s=None)) is None  # rebuilt: nobody measured it
