"""``ckptmgr watch``: a run live: what is in flight and how far, what committed last, what failed last."""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ckptmgr.cli import describe, target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output, Painted, Span, age, duration, size, timestamp
from ckptmgr.lifecycle import Format

if TYPE_CHECKING:
    from ckptmgr.journal import Questions
    from ckptmgr.lifecycle import CheckpointRecord
    from ckptmgr.rundir import RunDirectory

DESCRIPTION = """\
Show a run live, series by series: what is in flight, in which state and since
when, how many bytes each rank has written and which ranks are behind, what
committed last, and what failed last and why. It ends with the run, or with
Ctrl-C; without a manager that runs it looks once. It takes no lock, and the
journal is not held between two looks."""
EXAMPLES = """\
  ckptmgr watch runs/alpha
  ckptmgr watch runs/alpha --series checkpoint --interval 10
  ckptmgr watch runs/alpha --json | jq '.series[].in_flight'"""

INTERVAL_S = 2.0
#: A rank is behind that has written less than this part of what the median rank has, each of its own share.
_BEHIND = 0.5
#: Ranks that are counted before one of them has written anything.
_MOST_RANKS = 100_000
#: Ranks that are named in one line.
_SHOWN = 4
#: Who writes a file of a checkpoint, by its name, as torch.distributed.checkpoint names them.
_OF_RANK = re.compile(r"__([0-9]{1,9})_[0-9]+\.distcp")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--series", metavar="NAME", help="only this series")
    parser.add_argument(
        "--interval", metavar="S", type=target.seconds, default=INTERVAL_S, help="seconds between two looks (2)"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Look until the run has ended."""
    with target.reading(args) as (journal, rundir):
        target.require_series(journal, args.series)
        watcher = Watcher(journal, rundir, args.series)
        was_alive = False
        while True:
            # Before what it tells about: what is in flight after a manager has ended was left by it.
            alive = target.live_epoch(journal)
            seen = watcher.look(alive)
            if out.as_json:
                out.document(seen)
            else:
                out.redraw([line for one in seen["series"] for line in lines(one, out)] or [["no checkpoints yet"]])
            if alive is None:
                out.note("the manager has ended" if was_alive else "no manager is running")
            if alive is None or out.reader_left:
                return Exit.OK
            was_alive = True
            time.sleep(args.interval)


class Watcher:
    """
    Looks at a run again and again; what was seen last tells how fast it goes.

    Args:
        journal: Opened for reading.
        rundir: Its run directory.
        series: Only this one, or None for all.
    """

    def __init__(self, journal: Questions, rundir: RunDirectory, series: str | None) -> None:
        self._journal = journal
        self._rundir = rundir
        self._series = series
        #: Of each series the attempt that was in flight, when it was looked at, and how much had been written then.
        self._before: dict[str, tuple[int, float, int]] = {}
        #: And the checkpoint that had committed last, and how much each rank wrote of it.
        self._shares: dict[str, tuple[int, dict[int, int]]] = {}

    def look(self, alive: int | None) -> dict[str, Any]:
        """What there is to see now, as in the JSON contract; *alive* is the epoch of the manager that runs."""
        now = time.time()
        names = [name for name in self._journal.series() if self._series in (None, name)]
        return {
            "run": target.document(self._rundir, self._journal.run_id),
            "at": timestamp(now),
            "running": alive is not None,
            "epoch": alive,
            "series": [{"series": name, **self._see(name, alive, now)} for name in names],
        }

    def _see(self, series: str, alive: int | None, now: float) -> dict[str, Any]:
        rows = self._journal.newest(series, 1)
        last = next((row for row in rows if row.is_live), None)
        busy = next((row for row in rows if row.is_in_flight), None)
        failed = self._journal.last_failed(series)
        return {
            "in_flight": None if busy is None else self._in_flight(busy, last, alive, now),
            "last_committed": None
            if last is None
            else {
                "step": last.step,
                "committed_at": timestamp(last.committed_at),
                "age_s": now - (last.committed_at or now),
                "bytes": last.bytes,
                "path": str(self._rundir.path / last.directory),
            },
            "last_failure": None
            if failed is None
            else {
                "step": failed.step,
                "failed_at": timestamp(failed.finished_at),
                "age_s": now - (failed.finished_at or now),
                "reason": failed.reason,
                "ranks": [
                    {"rank": each.get("rank"), "host": each.get("host"), "cause": each.get("cause")}
                    for each in failed.failures
                ],
            },
        }

    def _in_flight(
        self, busy: CheckpointRecord, last: CheckpointRecord | None, alive: int | None, now: float
    ) -> dict[str, Any]:
        written = self._rundir.written(busy.staging_directory)
        # Once it is gathered it may be published any moment, and nothing stands there any more.
        total = sum(written.values()) or busy.bytes
        history = self._journal.transitions(busy.id)
        since = history[-1].at if history else busy.created_at
        attempt, then, before = self._before.get(busy.series, (busy.id, since, 0))
        if attempt != busy.id:
            then, before = since, 0
        self._before[busy.series] = busy.id, now, total
        alike = last is not None and last.world_size == busy.world_size
        return {
            "checkpoint_id": busy.id,
            "step": busy.step,
            "state": busy.state.value,
            "left_unfinished": busy.epoch != alive,
            "since": timestamp(since),
            "for_s": now - since,
            "written_bytes": total,
            "expected_bytes": last.bytes if last is not None else None,
            "bytes_per_s": max(0, total - before) / (now - then) if now > then else None,
            "ranks": by_rank(busy, written, self._shares_of(last) if last is not None and alike else {}),
        }

    def _shares_of(self, last: CheckpointRecord) -> dict[int, int]:
        known, shares = self._shares.get(last.series, (0, {}))
        if known != last.id:
            shares = {}
            for entry in self._journal.files(last.id):
                if (rank := rank_of(entry.path)) is not None:
                    shares[rank] = shares.get(rank, 0) + entry.size
            self._shares[last.series] = last.id, shares
        return shares


def rank_of(path: str) -> int | None:
    """The rank that writes a file, where its name says so."""
    match = _OF_RANK.fullmatch(path)
    return int(match[1]) if match else None


def by_rank(busy: CheckpointRecord, written: Mapping[str, int], shares: Mapping[int, int]) -> list[dict[str, Any]]:
    """
    How much each rank has written, and whether it is behind; nothing where the names of the files do not say whose.

    Args:
        busy: The attempt that is in flight.
        written: Bytes by file.
        shares: Bytes that each rank wrote for the checkpoint before, as far as that says anything about this one.
    """
    if busy.format is not Format.DCP:
        return []
    so_far = dict.fromkeys(shares or range(min(busy.world_size, _MOST_RANKS)), 0)
    for path, count in written.items():
        if (rank := rank_of(path)) is not None:
            so_far[rank] = so_far.get(rank, 0) + count
    # Without the checkpoint before, all are taken to have the same share.
    done = {
        rank: count / (shares.get(rank) or count or 1) if shares else float(count) for rank, count in so_far.items()
    }
    middle = statistics.median(done.values()) if done else 0.0
    return [
        {
            "rank": rank,
            "written_bytes": so_far[rank],
            "expected_bytes": shares.get(rank),
            "behind": done[rank] < _BEHIND * middle,
        }
        for rank in sorted(so_far)
    ]


def lines(one: Mapping[str, Any], out: Output) -> list[list[Span]]:
    """One series for people: what is in flight, who is behind, what committed last, what failed last."""
    name = one["series"]
    found: list[list[Span]] = []
    busy, last, failed = one["in_flight"], one["last_committed"], one["last_failure"]
    if busy is not None:
        found.append([f"{name}  ", Painted(busy["state"], "yellow"), f" step {busy['step']} {amount(busy, out)}"])
        if late := [rank for rank in busy["ranks"] if rank["behind"]]:
            some = ", ".join(f"rank {rank['rank']} ({size(rank['written_bytes'])})" for rank in late[:_SHOWN])
            more = f" and {len(late) - _SHOWN} more" if len(late) > _SHOWN else ""
            found.append([f"{name}  ", Painted(f"behind: {some}{more}", "red")])
    if last is not None:
        ago = f"{age(last['age_s'])} ago"
        found.append([f"{name}  ", Painted("committed", "green"), f" step {last['step']} {ago}, {size(last['bytes'])}"])
    if failed is not None:
        who = [f"rank {each['rank']} on {each['host']}" for each in failed["ranks"][:_SHOWN]]
        why = describe.failed_because(failed["reason"], who)
        found.append(
            [f"{name}  ", Painted("failed", "red"), f" step {failed['step']} {age(failed['age_s'])} ago: {why}"]
        )
    return found


def amount(busy: Mapping[str, Any], out: Output) -> str:
    """How long and how far it is."""
    if busy["left_unfinished"]:
        return f"left unfinished; see {out.hint('`ckptmgr recover RUN`')}"
    text = f"for {duration(busy['for_s'])}: {size(busy['written_bytes'])}"
    expected, rate = busy["expected_bytes"], busy["bytes_per_s"]
    if expected:
        text += f" of about {size(expected)}"
    if rate:
        text += f", {size(int(rate))}/s"
        if expected and expected > busy["written_bytes"]:
            text += f", {duration((expected - busy['written_bytes']) / rate)} left"
    return text
