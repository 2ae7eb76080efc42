"""Records as a journal gives them, of runs as long and as hostile as a test wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptmgr import durability
from ckptmgr.cli.report.facts import RunFacts, SeriesFacts
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, EpochRecord, Format
from ckptmgr.resume import Finding, Level, Verdict

START = 1_750_000_000.0
GB = 10**9


def record(number: int, **facts: Any) -> CheckpointRecord:
    """Attempt *number*, committed and on disk unless *facts* say otherwise; they follow each other by ten minutes."""
    at = START + 600.0 * number
    series = facts.get("series", "checkpoint")
    step = facts.get("step", 100 * number)
    given: dict[str, Any] = {
        "id": number, "series": series, "step": step, "format": Format.DCP, "state": CheckpointState.COMMITTED,
        "epoch": 1, "world_size": 8, "directory": f"{series}/step-{step}",
        "staging_directory": f"{series}/.step-{step}.e1.a{number}.incomplete", "created_at": at, "bytes": 80 * GB,
        "manifest_digest": "d", "committed_at": at + 50.0, "commit_seq": number, "finished_at": at + 50.0,
        "stage_s": 1.5, "write_s": 40.0, "gather_s": 0.5, "commit_s": 0.1,
    }  # fmt: skip
    if facts.get("state", CheckpointState.COMMITTED) is not CheckpointState.COMMITTED:
        given |= dict.fromkeys(("committed_at", "commit_seq", "finished_at"))
        given |= dict.fromkeys(("stage_s", "write_s", "gather_s", "commit_s"), None) | {"bytes": 0}
    return CheckpointRecord(**given | facts)


def failed(number: int, **facts: Any) -> CheckpointRecord:
    """Attempt *number*, FAILED on one rank."""
    given: dict[str, Any] = {
        "state": CheckpointState.FAILED,
        "finished_at": START + 600.0 * number + 20.0,
        "reason": "No space left on device",
        "failures": ({"rank": 3, "host": "node-1", "cause": "OSError: No space left on device", "silent": False},),
    }
    return record(number, **given | facts)


def run_facts(records: Sequence[CheckpointRecord], **facts: Any) -> RunFacts:
    """What `facts.gather` would say of them, without looking at a disk."""
    names = list(dict.fromkeys(each.series for each in records))
    seen_at = START + 600.0 * (len(records) + 1)
    series = tuple(
        SeriesFacts(
            name,
            durability.of_series([each for each in records if each.series == name], now=seen_at),
            verdict=Verdict.OLDER,
            step=100,
            path=f"/runs/alpha/{name}/step-100",
            against=(Finding("R004", Level.ERROR, "a file is missing", "restore it", name, 200),),
        )
        for name in names
    )
    given: dict[str, Any] = {
        "name": "alpha", "run_id": "0" * 32, "directory": "/runs/alpha", "journal": "/runs/alpha.journal.db",
        "seen_at": seen_at, "live_epoch": 1, "series": series, "records": records, "decisions": {},
        "epochs": [EpochRecord(1, START, "node-0", 7, "train.py", {}, None)],
        "newest": records[-1] if records else None,
        "rank_bytes": {rank: 10 * GB + rank for rank in range(8)},
    }  # fmt: skip
    return RunFacts(**given | facts)
