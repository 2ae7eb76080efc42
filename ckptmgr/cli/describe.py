"""What is said about one checkpoint, transition or finding, in words for people and as JSON for programs."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Painted, age, timestamp
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, TransitionRecord
from ckptmgr.resume import Level, Verdict

if TYPE_CHECKING:
    from ckptmgr.journal import Questions, Verification

#: The journal's newest decision about each checkpoint: keep or drop, and why.
Decisions = Mapping[int, tuple[str, Sequence[str]]]

#: The exit status that a verdict means.
STATUS_OF = {
    Verdict.SAFE: Exit.OK,
    Verdict.OLDER: Exit.OLDER_IS_SAFE,
    Verdict.NONE: Exit.NOT_SAFE,
    Verdict.UNSAFE: Exit.NOT_SAFE,
    Verdict.CORRUPT: Exit.CORRUPT,
}
#: The colour of a finding.
COLOUR_OF = {Level.ERROR: "red", Level.WARNING: "yellow", Level.INFO: "dim"}
_COLOURS = {CheckpointState.COMMITTED: "green", CheckpointState.FAILED: "red"}


def state(record: CheckpointRecord) -> Painted:
    """The state, or how far its deletion is."""
    if word := retirement(record):
        return Painted(word, "dim")
    return painted(record.state)


def painted(word: CheckpointState) -> Painted:
    """A state in its colour: green to resume from, red for failed, yellow while in flight."""
    return Painted(word.value, _COLOURS.get(word, "yellow"))


def retirement(record: CheckpointRecord) -> str | None:
    """``retiring`` while it is being deleted, ``retired`` when it is gone, else None."""
    if record.retired_at is not None:
        return "retired"
    return "retiring" if record.retire_started_at is not None else None


def decisions(journal: Questions, records: Iterable[CheckpointRecord]) -> Decisions:
    """
    The last word of the keep rules on each live one of *records*, and which are the newest of all now.

    A commit by recovery, or one that was adopted or rebuilt, has asked no keep rule.
    """
    from ckptmgr.retention import NEWEST  # slow to import, and seldom needed

    found = {
        id: (verdict, tuple(reason for reason in reasons if reason != NEWEST))
        for id, (verdict, reasons) in journal.decisions(record.id for record in records if record.is_live).items()
    }
    for name in journal.series():
        for newest in (record for record in journal.newest(name, 1) if record.is_live):
            verdict, reasons = found.get(newest.id, ("keep", ()))
            found[newest.id] = ("keep", (*(reasons if verdict == "keep" else ()), NEWEST))
    return found


def kept_because(record: CheckpointRecord, decisions: Decisions) -> list[str]:
    """Why a live checkpoint is kept: the reasons of the newest retention decision, and its pin."""
    if not record.is_live:
        return []
    verdict, reasons = decisions.get(record.id, ("", ()))
    kept = list(reasons) if verdict == "keep" else []
    return ["pinned", *kept] if record.pinned and "pinned" not in kept else kept


def next_to_go(records: Iterable[CheckpointRecord], decisions: Decisions) -> list[CheckpointRecord]:
    """
    Which of *records*, the newest of every series among them, the next commit lets go, the keep rules being the same.

    Only where that is certain: what is kept for its metric or its age as well may stay.
    """
    from ckptmgr.retention import newer_that_end_it

    newer: collections.Counter[str] = collections.Counter()
    going = []
    live = (record for record in records if record.is_live)
    for record in sorted(live, key=lambda record: record.commit_seq or 0, reverse=True):
        newer[record.series] += 1
        count = newer_that_end_it(kept_because(record, decisions))
        if count is not None and newer[record.series] >= count:
            going.append(record)
    return sorted(going, key=lambda record: (record.series, record.commit_seq or 0))


def why(record: CheckpointRecord, decisions: Decisions, origins: Mapping[int, str], *, live_epoch: int | None) -> str:
    """
    One phrase: why it is kept, why it goes, why it failed, or that it is being written by *live_epoch*.

    *origins* has how those have come into the journal that no manager saved.
    """
    if record.is_in_flight:
        if record.epoch != live_epoch:
            return f"left unfinished by epoch {record.epoch}"
        return f"in flight, epoch {record.epoch}"
    if record.state is CheckpointState.FAILED:
        return failed_because(record.reason, [f"rank {failure.get('rank')}" for failure in record.failures])
    if record.retire_started_at is not None:
        return record.retire_reason or ""
    origin = origins.get(record.id, "").partition(" ")[0]
    return ", ".join(filter(None, (origin, *kept_because(record, decisions))))


def failed_because(reason: str | None, ranks: Sequence[str]) -> str:
    """Why it failed, and on which *ranks*; a manager names them in the reason."""
    said = reason or "no reason recorded"
    missing = [rank for rank in ranks if not re.search(rf"{re.escape(rank)}\b", said)]
    return said + (f" ({', '.join(missing)})" if missing else "")


def trust(row: Verification, now: float) -> str:
    """When its bytes were last compared with what was committed, and whether they were those."""
    return f"verified {age(now - row.at)} ago" if row.ok else f"DAMAGED when verified {age(now - row.at)} ago"


def last_of(verifications: Sequence[Verification]) -> Verification | None:
    """The last time that its bytes were compared with what was committed."""
    return next((row for row in reversed(verifications) if row.level == "digest"), None)


def document(
    record: CheckpointRecord, decisions: Decisions, verified: Verification | None, run_directory: Path
) -> dict[str, Any]:
    """The checkpoint object of the JSON contract. Only a checkpoint one may resume from has a ``path``."""
    return {
        "checkpoint_id": record.id,
        "series": record.series,
        "step": record.step,
        "format": record.format.value,
        "state": record.state.value,
        "retirement": retirement(record),
        "path": str(run_directory / record.directory) if record.is_live else None,
        "directory": record.directory,
        "staging_directory": record.staging_directory,
        "epoch": record.epoch,
        "world_size": record.world_size,
        "bytes": record.bytes,
        "created_at": timestamp(record.created_at),
        "committed_at": timestamp(record.committed_at),
        "finished_at": timestamp(record.finished_at),
        "stage_s": record.stage_s,
        "write_s": record.write_s,
        "gather_s": record.gather_s,
        "commit_s": record.commit_s,
        "pinned": record.pinned,
        "kept_because": kept_because(record, decisions),
        "verified_at": timestamp(verified.at) if verified is not None else None,
        "verified_ok": verified.ok if verified is not None else None,
        "reason": record.reason,
        "failures": [
            {
                "rank": failure.get("rank"),
                "host": failure.get("host"),
                "cause": failure.get("cause"),
                "silent": failure.get("silent", False),
            }
            for failure in record.failures
        ],
        "metrics": dict(record.metrics),
        "per_rank": list(record.per_rank),
        "overwrites": record.overwrites,
        "manifest_digest": record.manifest_digest,
        "retire_started_at": timestamp(record.retire_started_at),
        "retired_at": timestamp(record.retired_at),
        "retire_reason": record.retire_reason,
    }


def transition(row: TransitionRecord) -> dict[str, Any]:
    """The transition object of the JSON contract."""
    return {
        "id": row.id,
        "checkpoint_id": row.checkpoint_id,
        "series": row.series,
        "step": row.step,
        "from": row.source.value if row.source is not None else None,
        "to": row.dest.value,
        "at": timestamp(row.at),
        "epoch": row.epoch,
        "host": row.host,
        "pid": row.pid,
        "note": row.note,
    }


def verification(row: Verification) -> dict[str, Any]:
    """The verification object of the JSON contract."""
    return {"at": timestamp(row.at), "level": row.level, "ok": row.ok, "mismatches": list(row.mismatches)}


def by(row: TransitionRecord) -> str:
    """Who made a transition and why, in one phrase."""
    left = f"from {row.source.value}" if row.dest is CheckpointState.FAILED and row.source is not None else ""
    said = ", ".join(part for part in (left, row.note) if part)
    return f"{row.host} pid {row.pid}" + (f": {said}" if said else "")
