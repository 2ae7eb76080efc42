"""``ckptmgr stats``: space, growth, time per phase, failures, and when the disk will be full."""

from __future__ import annotations

import argparse
import bisect
import collections
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptmgr import durability, retention
from ckptmgr.cli import target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output, Painted, age, duration, size, timestamp
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState

if TYPE_CHECKING:
    from ckptmgr.cli.describe import Decisions
    from ckptmgr.journal import Questions
    from ckptmgr.rundir import RunDirectory

DESCRIPTION = """\
Say what a run's checkpoints take and cost: space by series (committed, being
deleted, in flight, left over), how it grows, the time of each phase (median,
95th percentile, worst and at which step), throughput, failures by cause and by
rank, and when the disk will be full if the run goes on as it does."""
EXAMPLES = """\
  ckptmgr stats runs/alpha
  ckptmgr stats runs/alpha --series hf
  ckptmgr stats runs/alpha --json | jq '.forecast.full_at'"""

PHASES: Mapping[str, Callable[[CheckpointRecord], float | None]] = {
    "stage": lambda record: record.stage_s,
    "write": lambda record: record.write_s,
    "gather": lambda record: record.gather_s,
    "commit": lambda record: record.commit_s,
    #: From the beginning of a save to its commit: for so long the step before is what one would resume from.
    "lag": durability.commit_lag,
}
#: The pace of a run is that of its last saves.
_RECENT = 20
#: What is printed of causes and ranks; JSON has all.
_SHOWN = 10
_DAY_S = 86400.0
#: A disk that is full after so long is not worth a date.
_NEVER_S = 100 * 365 * _DAY_S

NEVER, GROWS, FULL, UNKNOWN = "never", "grows", "full", "unknown"
ASSUMED = (
    "saves go on at the median interval and size of the last ones",
    "the keep rules are those that the journal names as reasons, and pins stay as they are",
    "nothing else uses or frees space on this file system",
    "a new checkpoint is written before an old one goes, so each series needs room for one more",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--series", metavar="NAME", help="only this series; the forecast is about all")


def run(args: argparse.Namespace, out: Output) -> int:
    """Print the numbers."""
    with target.reading(args, directory=True) as (journal, rundir):
        target.require_series(journal, args.series)
        records = journal.checkpoints()
        decisions = journal.decisions(record.id for record in records if record.is_live)
        alive = target.live_epoch(journal)
        names = journal.series()
        by_series = {name: [record for record in records if record.series == name] for name in names}
        spaces = {name: space(journal, rundir, name, by_series[name], alive) for name in names}
        growths = {name: growth(by_series[name], decisions) for name in names}
        free, total = rundir.space() if rundir.path.is_dir() else (None, None)
        about = target.document(rundir, journal.run_id)
    full = forecast(growths, free, total, now=time.time())
    shown = names if args.series is None else [args.series]
    failures = {name: failed(by_series[name]) for name in shown}
    phases = {name: {phase: measured(by_series[name], of) for phase, of in PHASES.items()} for name in shown}
    rates = {name: throughput(by_series[name]) for name in shown}
    if out.as_json:
        out.document(
            {
                "run": about,
                "series": [
                    {
                        "series": name,
                        "space": spaces[name],
                        "growth": dataclasses.asdict(growths[name]),
                        "phases": [{"phase": phase, **summary} for phase, summary in phases[name].items()],
                        "throughput": rates[name],
                        **failures[name],
                    }
                    for name in shown
                ],
                "forecast": full,
            }
        )
        return Exit.OK
    if not records:
        out.note("no checkpoints yet")
    print_space(out, {name: spaces[name] for name in shown})
    print_growth(out, {name: growths[name] for name in shown})
    print_phases(out, phases, rates)
    print_failures(out, failures)
    out.line(forecast_line(full))
    if full["verdict"] == FULL or (full["full_in_s"] or math.inf) < 2 * _DAY_S:
        most = max(spaces, key=lambda name: spaces[name]["live"]["bytes"])
        if spaces[most]["live"]["count"] > 2:
            out.note("room can be made", f"`ckptmgr prune RUN --series {most} --keep-last 2` says what would go")
    out.note("assumed: " + "; ".join(ASSUMED))
    return Exit.OK


def space(
    journal: Questions, rundir: RunDirectory, series: str, records: Sequence[CheckpointRecord], alive: int | None
) -> dict[str, dict[str, int]]:
    """How many checkpoints and bytes of *series* are live, being deleted, in flight, and left over by a crash."""
    from ckptmgr.recovery import FoundKind

    retiring = [record for record in records if record.retire_started_at is not None and record.retired_at is None]
    in_flight = {r.staging_directory for r in records if r.is_in_flight and r.epoch == alive}
    going = {record.retired_directory for record in retiring}
    kinds = (FoundKind.STAGING, FoundKind.RETIRED, FoundKind.QUARANTINED)
    found = rundir.listing([series], besides=journal.live_directories(series))
    hidden = {item.path for item in found if item.kind in kinds and item.is_directory}

    def on_disk(paths: Iterable[str]) -> dict[str, int]:
        sizes = [sum(rundir.written(path).values()) for path in paths]
        return {"count": len(sizes), "bytes": sum(sizes)}

    def of(rows: Iterable[CheckpointRecord]) -> dict[str, int]:
        sizes = [row.bytes for row in rows]
        return {"count": len(sizes), "bytes": sum(sizes)}

    return {
        "live": of(record for record in records if record.is_live),
        "retiring": of(retiring),
        "in_flight": on_disk(in_flight),
        "left_over": on_disk(hidden - in_flight - going),
    }


@dataclasses.dataclass(frozen=True)
class Growth:
    """How a series grows, by its last saves; None where there are too few to tell."""

    saves: int
    bytes_per_save: int | None
    seconds_between: float | None
    written_bytes_per_day: float | None
    #: Share of the saves that stays for ever under today's keep rules.
    stays_for_ever: float | None
    kept_bytes_per_day: float | None
    #: What the rules will keep besides, until they have something to let go.
    still_to_come_bytes: int | None


def growth(records: Sequence[CheckpointRecord], decisions: Decisions) -> Growth:
    """How the series of *records* grows."""
    committed = sorted(
        (record for record in records if record.commit_seq is not None), key=lambda record: record.commit_seq or 0
    )
    recent = committed[-_RECENT:]
    if not recent:
        return Growth(0, None, None, None, None, None, None)
    of_one = int(statistics.median(record.bytes for record in recent))
    pairs = list(itertools.pairwise(recent))
    between = statistics.median((b.committed_at or 0) - (a.committed_at or 0) for a, b in pairs) if pairs else 0.0
    if between <= 0:
        return Growth(len(committed), of_one, None, None, None, None, None)
    steps = int(statistics.median_low(abs(b.step - a.step) for a, b in pairs))
    live = [record for record in committed if record.is_live]
    reasons = named(committed, decisions)
    rules = retention.growth(reasons, steps_between=steps, seconds_between=between) if reasons else None
    if rules is None:
        share, to_come = kept_share(committed), 0
    else:
        share = rules.share
        to_come = 0 if share == 1 else max(0, math.ceil(rules.level) - len(live))
    saves_per_day = _DAY_S / between
    return Growth(
        saves=len(committed),
        bytes_per_save=of_one,
        seconds_between=between,
        written_bytes_per_day=of_one * saves_per_day,
        stays_for_ever=share,
        kept_bytes_per_day=of_one * saves_per_day * share,
        still_to_come_bytes=to_come * of_one,
    )


def named(committed: Sequence[CheckpointRecord], decisions: Decisions) -> set[str]:
    """What the journal says of today's keep rules: why each is kept, and why the last one that they let go was."""
    reasons = {
        reason
        for record in committed
        if record.is_live
        for verdict, why in [decisions.get(record.id, ("", ()))]
        if verdict == "keep"
        for reason in why
    }
    gone = [r for r in committed if r.retire_started_at is not None and (r.retire_reason or "").startswith("no rule")]
    last = max(gone, key=lambda record: record.retire_started_at or 0, default=None)
    return reasons | ({last.retire_reason or ""} if last is not None else set())


def kept_share(committed: Sequence[CheckpointRecord]) -> float:
    """
    Of all saves, the share by which the number of those that are kept has grown in the newer half.

    Args:
        committed: In the order of their commits.
    """
    gone = sorted(record.retire_started_at for record in committed if record.retire_started_at is not None)
    kept = [
        number - bisect.bisect_right(gone, record.committed_at or 0) for number, record in enumerate(committed, start=1)
    ]
    half = kept[len(kept) // 2 :] if len(kept) > 3 else kept
    return min(1.0, max(0.0, (half[-1] - half[0]) / (len(half) - 1))) if len(half) > 1 else 1.0


def measured(
    records: Sequence[CheckpointRecord], of: Callable[[CheckpointRecord], float | None]
) -> dict[str, float | int | None]:
    """The seconds of one phase: how often it was measured, median, 95th percentile, worst, and the step of that."""
    found = sorted((seconds, record.step) for record in records if (seconds := of(record)) is not None)
    if not found:
        return {"count": 0, "median_s": None, "p95_s": None, "worst_s": None, "worst_step": None}
    times = [seconds for seconds, _ in found]
    worst, step = found[-1]
    return {
        "count": len(found),
        "median_s": statistics.median(times),
        "p95_s": times[math.ceil(0.95 * len(times)) - 1],
        "worst_s": worst,
        "worst_step": step,
    }


def throughput(records: Sequence[CheckpointRecord]) -> dict[str, float | int | None]:
    """Bytes of all ranks per second of writing: median, slowest, and the step of that."""
    found = sorted((rate, record.step) for record in records if (rate := durability.throughput(record)) is not None)
    if not found:
        return {"median_bytes_per_s": None, "slowest_bytes_per_s": None, "slowest_step": None}
    slowest, step = found[0]
    return {
        "median_bytes_per_s": statistics.median(rate for rate, _ in found),
        "slowest_bytes_per_s": slowest,
        "slowest_step": step,
    }


def failed(records: Sequence[CheckpointRecord]) -> dict[str, Any]:
    """How many attempts failed, by cause and by rank and host, most first."""
    causes: collections.Counter[str] = collections.Counter()
    ranks: collections.Counter[tuple[int | None, str | None]] = collections.Counter()
    last: dict[str, CheckpointRecord] = {}
    failures = [record for record in records if record.state is CheckpointState.FAILED]
    for record in failures:
        said = {str(each["cause"]) for each in record.failures if each.get("cause")} or {record.reason or ""}
        causes.update(said)
        last |= dict.fromkeys(said, record)
        ranks.update((each.get("rank"), each.get("host")) for each in record.failures)
    return {
        "failures": len(failures),
        "causes": [
            {
                "cause": cause,
                "count": count,
                "last_step": last[cause].step,
                "last_at": timestamp(last[cause].finished_at),
            }
            for cause, count in causes.most_common()
        ],
        "failed_ranks": [{"rank": rank, "host": host, "count": count} for (rank, host), count in ranks.most_common()],
    }


def forecast(growths: Mapping[str, Growth], free: int | None, total: int | None, *, now: float) -> dict[str, Any]:
    """
    When the file system will be full, under what `ASSUMED` says.

    Args:
        growths: Of every series.
        free: Bytes that are free; None if the run directory is not there.
        total: Bytes of all.
        now: Unix seconds.
    """
    known = [each for each in growths.values() if each.bytes_per_save is not None]
    per_day: float | None = None
    full_in: float | None = None
    verdict = UNKNOWN
    if free is not None and known and all(each.kept_bytes_per_day is not None for each in known):
        per_day = sum(each.kept_bytes_per_day or 0.0 for each in known)
        room = free - sum((each.bytes_per_save or 0) + (each.still_to_come_bytes or 0) for each in known)
        seconds = room / per_day * _DAY_S if per_day else math.inf
        if room < 0:
            verdict, full_in = FULL, 0.0
        elif seconds > _NEVER_S:
            verdict = NEVER
        else:
            verdict, full_in = GROWS, seconds
    return {
        "verdict": verdict,
        "free_bytes": free,
        "total_bytes": total,
        "kept_bytes_per_day": per_day,
        "full_in_s": full_in,
        "full_at": timestamp(now + full_in) if full_in is not None else None,
        "assumed": list(ASSUMED),
    }


def forecast_line(full: Mapping[str, Any]) -> Painted:
    """The forecast in one line."""
    verdict = full["verdict"]
    if full["free_bytes"] is None:
        return Painted("disk: the run directory is not there", "yellow")
    disk = f"disk: {size(full['free_bytes'])} of {size(full['total_bytes'])} free"
    if verdict == UNKNOWN:
        return Painted(f"{disk}; too few saves to tell when it will be full", "dim")
    if verdict == FULL:
        return Painted(f"{disk}; too little for the next saves under today's keep rules", "red")
    grows = f"what is kept grows by {size(int(full['kept_bytes_per_day']))} a day"
    if verdict == NEVER:
        why = grows if full["kept_bytes_per_day"] else "the keep rules hold what is kept level"
        return Painted(f"{disk}; never full: {why}", "green")
    # To the minute where that is soon.
    soon = full["full_in_s"] < 2 * _DAY_S
    at = full["full_at"][: 16 if soon else 10].replace("T", " ")
    return Painted(f"{disk}; {grows}: full in {age(full['full_in_s'])}, {at}", "red" if soon else "yellow")


def print_space(out: Output, spaces: Mapping[str, Mapping[str, Mapping[str, int]]]) -> None:
    """Print what each series has on disk."""

    def cell(part: Mapping[str, int]) -> str:
        return f"{part['count']}: {size(part['bytes'])}" if part["count"] else ""

    titles = ("SERIES", "LIVE", "RETIRING", "IN FLIGHT", "LEFT OVER")
    rows = [[name, *(cell(part) for part in parts.values())] for name, parts in spaces.items()]
    if rows:
        out.table(*titles, right=titles[1:]).add(rows)
        out.line()


def print_growth(out: Output, growths: Mapping[str, Growth]) -> None:
    """Print how each series grows."""

    def amount(count: float | None) -> str:
        return "" if count is None else size(int(count))

    titles = ("SERIES", "SAVES", "EVERY", "PER SAVE", "WRITTEN A DAY", "KEPT A DAY")
    if growths:
        out.table(*titles, right=titles[1:]).add(
            [
                name,
                str(each.saves),
                duration(each.seconds_between),
                amount(each.bytes_per_save),
                amount(each.written_bytes_per_day),
                amount(each.kept_bytes_per_day),
            ]
            for name, each in growths.items()
        )
        out.line()


def print_phases(
    out: Output,
    phases: Mapping[str, Mapping[str, Mapping[str, float | int | None]]],
    rates: Mapping[str, Mapping[str, float | int | None]],
) -> None:
    """Print how long each phase takes, and how fast writing is."""
    rows = [
        [
            name,
            phase,
            duration(one["median_s"]),
            duration(one["p95_s"]),
            duration(one["worst_s"]),
            str(one["worst_step"]),
        ]
        for name, of_series in phases.items()
        for phase, one in of_series.items()
        if one["count"]
    ]
    if rows:
        titles = ("SERIES", "PHASE", "MEDIAN", "95%", "WORST", "AT STEP")
        out.table(*titles, right=titles[2:]).add(rows)
        out.line()
    for name, rate in rates.items():
        if rate["median_bytes_per_s"] is not None and rate["slowest_bytes_per_s"] is not None:
            median, slowest = (size(int(rate[key] or 0)) for key in ("median_bytes_per_s", "slowest_bytes_per_s"))
            out.line(f"{name}: written at {median}/s, at {slowest}/s where it was slowest, step {rate['slowest_step']}")


def print_failures(out: Output, failures: Mapping[str, Mapping[str, Any]]) -> None:
    """Print how often saves failed, where and why."""
    for name, one in failures.items():
        if not one["failures"]:
            continue
        out.line()
        out.line(Painted(f"{name}: {one['failures']} attempts failed", "red"))
        out.table("COUNT", "LAST STEP", "CAUSE", right=("COUNT", "LAST STEP")).add(
            [str(each["count"]), str(each["last_step"]), each["cause"]] for each in one["causes"][:_SHOWN]
        )
        if one["failed_ranks"]:
            out.table("COUNT", "RANK", "HOST", right=("COUNT", "RANK")).add(
                [str(each["count"]), str(each["rank"]), each["host"] or ""] for each in one["failed_ranks"][:_SHOWN]
            )
    if failures:
        out.line()
