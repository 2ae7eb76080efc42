"""
Durability as numbers: how long a save takes to be safe, and what would be lost if the run died now.

Pure: the rows of the journal in, numbers out. Seconds, bytes, steps. What the numbers are called for Prometheus
and for a trainer's own log is decided here, once: `METRICS` and `COMMIT_NUMBERS`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from ckptmgr.lifecycle import CheckpointRecord, CheckpointState

#: What is known of one commit, for a trainer's own log: name → what it means.
COMMIT_NUMBERS: Mapping[str, str] = {
    "commit_lag_seconds": "from the call of save, as near as the journal knows it, until it was COMMITTED",
    "steps_since_commit": "steps since the checkpoint before: what a crash just before this commit would have lost",
    "stall_seconds": "copying the state to host memory, the slowest rank",
    "write_seconds": "writing, the slowest rank",
    "gather_seconds": "rank 0 waiting for the slowest rank after its own writing",
    "publish_seconds": "renaming and entering it as COMMITTED",
    "bytes": "size of all files",
    "write_bytes_per_second": "bytes by write_seconds, all ranks together",
}

#: Nobody writes anything in less, but a journal from elsewhere may say so.
_SHORTEST_S = 1e-6


@dataclasses.dataclass(frozen=True)
class Metric:
    """One number about a series: its name behind ``ckptmgr_``, whether it only grows, and what it means."""

    name: str
    grows: bool
    meaning: str


#: Every number of `of_series`, in order.
METRICS: tuple[Metric, ...] = (
    Metric("commits_total", True, "Checkpoints that were committed."),
    Metric("failures_total", True, "Attempts to save that failed."),
    Metric("committed_bytes_total", True, "Bytes of all checkpoints that were committed."),
    Metric("stall_seconds_total", True, "Seconds of copying state to host memory, of all checkpoints committed."),
    Metric("in_flight", False, "Attempts between save and COMMITTED or FAILED."),
    Metric("live_checkpoints", False, "Committed checkpoints that are not being deleted."),
    Metric("live_bytes", False, "Their bytes."),
    Metric("steps_at_risk", False, "Steps from the newest committed checkpoint to the newest attempt."),
    Metric("seconds_since_commit", False, "Seconds since the newest commit, when this was written."),
    Metric("last_commit_timestamp_seconds", False, "When the newest commit was, in Unix time."),
    Metric("last_committed_step", False, "Its step."),
    Metric("commit_lag_seconds", False, "How long it took from the call of save until it was COMMITTED."),
    Metric("stall_seconds", False, "How long its state was copied to host memory, the slowest rank."),
    Metric("write_seconds", False, "How long it was written, the slowest rank."),
    Metric("gather_seconds", False, "How long rank 0 then waited for the slowest rank."),
    Metric("committed_bytes", False, "Its bytes."),
)


def of_series(records: Iterable[CheckpointRecord], *, now: float) -> dict[str, float]:
    """
    The numbers of one series, by their names in `METRICS`; those of a newest commit only if there is one.

    Args:
        records: Every attempt of the series.
        now: Unix seconds.
    """
    rows = sorted(records, key=lambda record: record.id)
    committed = [record for record in rows if record.state is CheckpointState.COMMITTED]
    live = [record for record in committed if record.is_live]
    found: dict[str, float | None] = {
        "commits_total": len(committed),
        "failures_total": sum(record.state is CheckpointState.FAILED for record in rows),
        "committed_bytes_total": sum(record.bytes for record in committed),
        "stall_seconds_total": sum(record.stage_s or 0.0 for record in committed),
        "in_flight": sum(record.is_in_flight for record in rows),
        "live_checkpoints": len(live),
        "live_bytes": sum(record.bytes for record in live),
    }
    newest = max(committed, key=lambda record: record.commit_seq or 0, default=None)
    found["steps_at_risk"] = steps_between(newest, rows[-1]) if rows else 0
    if newest is None or newest.committed_at is None:
        return _known(found)
    about: dict[str, float | None] = {
        "seconds_since_commit": max(0.0, now - newest.committed_at),
        "last_commit_timestamp_seconds": newest.committed_at,
        "last_committed_step": newest.step,
        "commit_lag_seconds": commit_lag(newest),
        "stall_seconds": newest.stage_s,
        "write_seconds": newest.write_s,
        "gather_seconds": newest.gather_s,
        "committed_bytes": newest.bytes,
    }
    return _known(found | about)


def of_commit(record: CheckpointRecord, *, before: CheckpointRecord | None) -> dict[str, float]:
    """
    The numbers of one commit, by their names in `COMMIT_NUMBERS`; those that are not known are left out.

    Args:
        record: A committed checkpoint.
        before: The one of its series that was committed before it, if any.
    """
    about = {
        "commit_lag_seconds": commit_lag(record),
        "steps_since_commit": None if before is None else steps_between(before, record),
        "stall_seconds": record.stage_s,
        "write_seconds": record.write_s,
        "gather_seconds": record.gather_s,
        "publish_seconds": record.commit_s,
        "bytes": record.bytes,
        "write_bytes_per_second": throughput(record),
    }
    return _known(about)


def commit_lag(record: CheckpointRecord) -> float | None:
    """
    Seconds from the call of ``save`` until COMMITTED; None for one that is not, or was rebuilt from its manifest.

    The row is made when the state has been captured, so that the time of copying comes on top. Where the
    capture overlaps with training it is counted a little twice: never too short.
    """
    if record.committed_at is None or record.write_s is None:
        return None
    return max(0.0, record.committed_at - record.created_at) + (record.stage_s or 0.0)


def throughput(record: CheckpointRecord) -> float | None:
    """Bytes a second while it was written, all ranks together; None if that is not known."""
    took = record.write_s or 0.0
    return record.bytes / took if record.bytes and took > _SHORTEST_S else None


def steps_between(committed: CheckpointRecord | None, newest: CheckpointRecord) -> int:
    """Steps from what is committed, or from the beginning, to the newest attempt; 0 if the run was set back."""
    return max(0, newest.step - (committed.step if committed is not None else 0))


def _known(numbers: Mapping[str, float | None]) -> dict[str, float]:
    """Those that are known, and are numbers: two that a journal may hold can add up to what is none."""
    return {name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}
