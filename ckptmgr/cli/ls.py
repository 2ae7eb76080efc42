"""``ckptmgr ls``: the checkpoints of a run, one line each."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ckptmgr.cli import describe, target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output, Painted, Span, age, size
from ckptmgr.lifecycle import CheckpointRecord

if TYPE_CHECKING:
    from ckptmgr.journal import Questions, Verification

DESCRIPTION = """\
List the checkpoints of a run, series by series, oldest first. Retired
checkpoints, and failed attempts from before the newest commit of their series,
are hidden unless --all is given. The table has the 1000 of each series that
began last, unless --limit or --all says otherwise."""
EXAMPLES = """\
  ckptmgr ls runs/alpha
  ckptmgr ls runs/alpha --series hf --all
  ckptmgr ls runs/alpha --limit 10
  ckptmgr ls runs/alpha --json | jq -r '.checkpoints[].path | values'"""

#: Checkpoints that are named in a note.
_NAMED = 8
#: How many rows of a series a table has, where nothing else is asked for.
_MOST = 1000


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--series", metavar="NAME", help="only this series")
    parser.add_argument("--limit", metavar="N", type=target.count, help="only the N of each series that began last")
    parser.add_argument("--all", action="store_true", help="retired checkpoints and old failed attempts too")


def run(args: argparse.Namespace, out: Output) -> int:
    """Print the list."""
    with target.reading(args) as (journal, rundir):
        target.require_series(journal, args.series)
        names = journal.series() if args.series is None else [args.series]
        shown = [record for name in names for record in chosen(journal, name, args)]
        hidden = sum(journal.count(name) for name in names) - len(shown)
        live = [record for record in shown if record.is_live]
        decisions, origins = describe.decisions(journal, live), journal.origins(record.id for record in live)
        verified = journal.newest_verifications(record.id for record in shown)
        live_epoch = target.live_epoch(journal)
        about = target.document(rundir, journal.run_id)
    going = describe.next_to_go(shown, decisions)
    if out.as_json:
        documents = [describe.document(record, decisions, verified.get(record.id), rundir.path) for record in shown]
        leaving = [{"checkpoint_id": one.id, "series": one.series, "step": one.step} for one in going]
        out.document({"run": about, "checkpoints": documents, "next_to_go": leaving, "hidden": hidden})
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
                why(record, decisions, origins, verified.get(record.id), now=now, live_epoch=live_epoch, out=out),
            ]
            for record in shown
        )
    else:
        out.note("no checkpoints to resume from" if hidden else "no checkpoints yet")
    if going:
        which = ", ".join(f"{record.series} {record.step}" for record in going[:_NAMED])
        more = f" and {len(going) - _NAMED} more" if len(going) > _NAMED else ""
        out.note(f"the next commit of each series lets go of {which}{more}")
    if hidden:
        because = "retired or failed before the newest commit"
        if not args.all and any(sum(record.series == name for record in shown) == _MOST for name in names):
            because = f"older, or {because}"
        if args.limit is not None:
            out.note(f"{hidden} older: a larger --limit shows them")
        else:
            out.note(f"{hidden} {because}: --all shows them")
    return Exit.OK


def why(
    record: CheckpointRecord,
    decisions: describe.Decisions,
    origins: Mapping[int, str],
    verified: Verification | None,
    *,
    now: float,
    live_epoch: int | None,
    out: Output,
) -> Span:
    """Why it is kept, goes or failed, and of one that may be resumed from how far its bytes can be trusted."""
    text = describe.why(record, decisions, origins, live_epoch=live_epoch)
    if record.is_in_flight and record.epoch != live_epoch:
        return f"{text}; see {out.hint('`ckptmgr recover RUN`')}"
    if verified is None or not record.is_live:
        return text
    both = "; ".join(part for part in (text, describe.trust(verified, now)) if part)
    return both if verified.ok else Painted(both, "red")


def chosen(journal: Questions, series: str, args: argparse.Namespace) -> list[CheckpointRecord]:
    """The attempts of one series to list, oldest first."""
    if not args.all:
        return journal.present(series, args.limit if args.limit is not None or args.json else _MOST)
    records = journal.checkpoints(series=series)
    return records if args.limit is None else records[-args.limit :]
