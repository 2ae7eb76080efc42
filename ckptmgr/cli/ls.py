"""``ckptmgr ls``: the checkpoints of a run, one line each."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from ckptmgr.cli import describe, target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output, Painted, Span, age, size
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState

if TYPE_CHECKING:
    from ckptmgr.journal import Verification

DESCRIPTION = """\
List the checkpoints of a run, series by series, oldest first. Retired
checkpoints, and failed attempts from before the newest commit of their series,
are hidden unless --all is given."""
EXAMPLES = """\
  ckptmgr ls runs/alpha
  ckptmgr ls runs/alpha --series hf --all
  ckptmgr ls runs/alpha --json | jq -r '.checkpoints[].path | values'"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--series", metavar="NAME", help="only this series")
    parser.add_argument("--all", action="store_true", help="retired checkpoints and old failed attempts too")


def run(args: argparse.Namespace, out: Output) -> int:
    """Print the list."""
    with target.reading(args) as (journal, rundir):
        target.require_series(journal, args.series)
        records = journal.checkpoints(series=args.series)
        decisions = journal.decisions()
        verified = journal.newest_verifications()
        live_epoch = target.live_epoch(journal)
        about = target.document(rundir, journal.run_id)
    order = {name: place for place, name in enumerate(dict.fromkeys(record.series for record in records))}
    records.sort(key=lambda record: (order[record.series], record.id))
    shown = records if args.all else without_history(records)
    hidden = len(records) - len(shown)
    if out.as_json:
        documents = [describe.document(record, decisions, verified.get(record.id), rundir.path) for record in shown]
        out.document({"run": about, "checkpoints": documents, "hidden": hidden})
        return Exit.OK
    now = time.time()
    if shown:
        out.table("SERIES", "STEP", "STATE", "AGE", "SIZE", "WHY", right=("STEP", "AGE", "SIZE")).add(
            [
                record.series,
                str(record.step),
                describe.state(record),
                age(now - (record.committed_at or record.created_at)),
                size(record.bytes) if record.bytes else "",
                why(record, decisions, verified.get(record.id), now, live_epoch),
            ]
            for record in shown
        )
    else:
        out.note("no checkpoints yet" if not records else "no checkpoints to resume from")
    if hidden:
        out.note(f"{hidden} retired or failed before the newest commit: --all shows them")
    return Exit.OK


def why(
    record: CheckpointRecord,
    decisions: describe.Decisions,
    verified: Verification | None,
    now: float,
    live_epoch: int | None,
) -> Span:
    """Why it is kept, goes or failed, and of one that may be resumed from how far its bytes can be trusted."""
    text = describe.why(record, decisions, live_epoch=live_epoch)
    if verified is None or not record.is_live:
        return text
    both = "; ".join(part for part in (text, describe.trust(verified, now)) if part)
    return both if verified.ok else Painted(both, "red")


def without_history(records: list[CheckpointRecord]) -> list[CheckpointRecord]:
    """Leave out what has been retired, and what failed before the newest commit of its series."""
    newest: dict[str, CheckpointRecord] = {}
    for record in records:
        best = newest.get(record.series)
        if record.is_live and (best is None or (record.commit_seq or 0) > (best.commit_seq or 0)):
            newest[record.series] = record

    def is_history(record: CheckpointRecord) -> bool:
        if record.state is CheckpointState.FAILED:
            return record.series in newest and record.id < newest[record.series].id
        return record.retired_at is not None

    return [record for record in records if not is_history(record)]
