"""``ckptmgr log``: every transition of every checkpoint, oldest first."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from ckptmgr.cli import describe, target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output, Span, timestamp
from ckptmgr.lifecycle import TransitionRecord

DESCRIPTION = """\
Print every transition the journal has recorded, oldest first: when (UTC),
which checkpoint, its new state, the epoch, and who made it and why. With
--follow, go on printing as they happen until interrupted; then --json prints
one transition object per line."""
EXAMPLES = """\
  ckptmgr log runs/alpha
  ckptmgr log runs/alpha --series hf --follow
  ckptmgr log runs/alpha --json | jq '.transitions[] | select(.to == "FAILED")'"""

#: Seconds between two looks at the journal with --follow.
FOLLOW_EVERY_S = 0.5


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--series", metavar="NAME", help="only this series")
    parser.add_argument("--follow", "-f", action="store_true", help="go on as transitions happen")


def run(args: argparse.Namespace, out: Output) -> int:
    """Print the history."""
    with target.reading(args) as (journal, rundir):
        if not args.follow:
            target.require_series(journal, args.series)
        table = out.table("TIME", "SERIES", "STEP", "STATE", "EPOCH", "BY", right=("STEP", "EPOCH"))
        seen = 0
        while True:
            rows = journal.transitions(after_id=seen)
            seen = rows[-1].id if rows else seen
            chosen = [row for row in rows if args.series in (None, row.series)]
            if not args.follow and out.as_json:
                transitions = [describe.transition(row) for row in chosen]
                out.document({"run": target.document(rundir, journal.run_id), "transitions": transitions})
            elif out.as_json:
                for row in chosen:
                    out.document(describe.transition(row))
            elif chosen:
                table.add(_cells(chosen))
            elif not args.follow:
                out.note("no transitions yet")
            if not args.follow or out.reader_left:
                return Exit.OK
            time.sleep(FOLLOW_EVERY_S)


def _cells(rows: Sequence[TransitionRecord]) -> list[list[Span]]:
    return [
        [
            timestamp(row.at, timespec="seconds") or "",
            row.series,
            str(row.step),
            describe.painted(row.dest),
            str(row.epoch),
            describe.by(row),
        ]
        for row in rows
    ]
