"""``ckptmgr show``: everything the journal knows of one checkpoint."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptmgr.cli import describe, target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output, age, duration, size, timestamp
from ckptmgr.errors import CheckpointNotFound

if TYPE_CHECKING:
    from ckptmgr.journal import Questions, Verification
    from ckptmgr.lifecycle import CheckpointRecord, TransitionRecord
    from ckptmgr.manifest import FileEntry

DESCRIPTION = """\
Show everything the journal knows of one checkpoint. If the step was saved more
than once, this is the committed one, or else the newest attempt; the others
are listed."""
EXAMPLES = """\
  ckptmgr show runs/alpha 12000
  ckptmgr show runs/alpha 12000 --series hf
  ckptmgr show runs/alpha 12000 --json | jq '.ranks'"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("step", metavar="STEP", type=target.step, help="the step of the checkpoint")
    parser.add_argument("--series", metavar="NAME", help="its series (default: checkpoint, or the only one)")


def run(args: argparse.Namespace, out: Output) -> int:
    """Print one checkpoint."""
    with target.reading(args) as (journal, rundir):
        record = find(journal, target.choose_series(journal, args.series), args.step)
        files = journal.files(record.id)
        history = journal.transitions(record.id)
        verifications = journal.verifications(record.id)
        others = [other for other in journal.of_step(record.series, record.step) if other.id != record.id]
        both = [record, *others]
        decisions, origins = describe.decisions(journal, both), journal.origins(one.id for one in both)
        live_epoch = target.live_epoch(journal)
        about = target.document(rundir, journal.run_id)
    if out.as_json:
        out.document(
            {
                "run": about,
                "checkpoint": describe.document(record, decisions, describe.last_of(verifications), rundir.path),
                "ranks": by_rank(files),
                "files": [
                    {"path": file.path, "bytes": file.size, "digest": file.digest, "rank": file.rank} for file in files
                ],
                "history": [describe.transition(row) for row in history],
                "verifications": [describe.verification(row) for row in verifications],
                "other_attempts": [
                    {
                        "checkpoint_id": other.id,
                        "state": other.state.value,
                        "retirement": describe.retirement(other),
                        "reason": other.reason or other.retire_reason,
                    }
                    for other in others
                ],
            }
        )
        return Exit.OK
    print_facts(out, record, decisions, rundir.path, files, verified=describe.last_of(verifications))
    print_failures(out, record)
    print_history(out, history)
    if verifications:
        out.line()
        out.table("VERIFIED", "BY", "RESULT").add(
            [timestamp(row.at, timespec="seconds") or "", row.level, "intact" if row.ok else "; ".join(row.mismatches)]
            for row in verifications
        )
    if others:
        out.line()
        out.table("OTHER ATTEMPT", "STATE", "WHY", right=("OTHER ATTEMPT",)).add(
            [str(other.id), describe.state(other), describe.why(other, decisions, origins, live_epoch=live_epoch)]
            for other in others
        )
    if files:
        out.line()
        out.table("RANK", "FILES", "SIZE", right=("RANK", "FILES", "SIZE")).add(
            [str(row["rank"]), str(row["files"]), size(row["bytes"])] for row in by_rank(files)
        )
        out.line()
        out.table("RANK", "SIZE", "FILE", right=("RANK", "SIZE")).add(
            [str(file.rank), size(file.size), file.path] for file in files
        )
    return Exit.OK


def find(journal: Questions, series: str, step: int) -> CheckpointRecord:
    """
    The checkpoint of *step*: the live one, else its newest attempt.

    Raises:
        CheckpointNotFound: There is none in *series*; the hint names the series that have this step.
    """
    try:
        return journal.find(series, step)
    except CheckpointNotFound as error:
        elsewhere = sorted(name for name in journal.series() if journal.of_step(name, step))
        hint = f"step {step} is in --series {' and '.join(elsewhere)}" if elsewhere else error.hint
        raise CheckpointNotFound(
            f"series {series!r} has no checkpoint of step {step}", hint=hint, series=series, step=step
        ) from error


def by_rank(files: Sequence[FileEntry]) -> list[dict[str, Any]]:
    """How many files and bytes each rank wrote."""
    ranks: dict[int, dict[str, Any]] = {}
    for file in files:
        row = ranks.setdefault(file.rank, {"rank": file.rank, "files": 0, "bytes": 0})
        row["files"] += 1
        row["bytes"] += file.size
    return [ranks[rank] for rank in sorted(ranks)]


def print_facts(
    out: Output,
    record: CheckpointRecord,
    decisions: describe.Decisions,
    directory: Path,
    files: Sequence[FileEntry],
    *,
    verified: Verification | None,
) -> None:
    """Print the head: one fact a line, without those that do not apply."""
    now = time.time()

    def when(at: float | None) -> str:
        return "" if at is None else f"{timestamp(at, timespec='seconds')} ({age(now - at)} ago)"

    durations = (
        ("stage", record.stage_s),
        ("write", record.write_s),
        ("gather", record.gather_s),
        ("commit", record.commit_s),
    )
    facts = (
        ("path", str(directory / record.directory) if record.is_live else ""),
        ("staging", str(directory / record.staging_directory) if record.is_in_flight else ""),
        ("format", record.format.value),
        ("size", f"{size(record.bytes)} in {len(files)} files" if files else ""),
        ("saved by", f"{record.world_size} ranks, epoch {record.epoch}"),
        ("begun", when(record.created_at)),
        ("committed", when(record.committed_at)),
        ("durations", ", ".join(f"{name} {duration(took)}" for name, took in durations if took is not None)),
        ("kept", ", ".join(describe.kept_because(record, decisions))),
        ("trust", describe.trust(verified, now) if verified is not None else ""),
        ("retired", f"{when(record.retire_started_at)}: {record.retire_reason}" if record.retire_started_at else ""),
        ("reason", record.reason or ""),
        ("metrics", ", ".join(f"{name} {value:g}" for name, value in record.metrics.items())),
        ("per rank", ", ".join(record.per_rank)),
        ("overwrites", f"attempt {record.overwrites}" if record.overwrites is not None else ""),
        ("manifest", record.manifest_digest or ""),
    )
    out.line(f"{record.series} step {record.step}, attempt {record.id}: ", describe.state(record))
    for name, fact in facts:
        if fact:
            out.labelled(f"  {name}", fact, indent=14)


def print_failures(out: Output, record: CheckpointRecord) -> None:
    """Print which ranks failed, and why."""
    if record.failures:
        out.line()
        out.table("FAILED RANK", "HOST", "CAUSE", right=("FAILED RANK",)).add(
            [str(row.get("rank")), str(row.get("host") or ""), str(row.get("cause") or "")] for row in record.failures
        )


def print_history(out: Output, history: Sequence[TransitionRecord]) -> None:
    """Print each transition, oldest first."""
    out.line()
    out.table("TIME", "STATE", "EPOCH", "BY", right=("EPOCH",)).add(
        [timestamp(row.at, timespec="seconds") or "", describe.painted(row.dest), str(row.epoch), describe.by(row)]
        for row in history
    )
