"""``ckptmgr unpin``: leave a checkpoint to the keep rules again."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ckptmgr import requests
from ckptmgr.cli import asking, show, target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output
from ckptmgr.requests import Answer

if TYPE_CHECKING:
    from ckptmgr.journal import Journal

DESCRIPTION = """\
Leave a pinned checkpoint to the keep rules again: the next commit of its series
may let it go. There is no --apply; a step that is not pinned stays as it is. A
live run is asked to do it; otherwise the run lock is taken."""
EXAMPLES = """\
  ckptmgr unpin runs/alpha 12000
  ckptmgr unpin runs/alpha 12000 --series hf
  ckptmgr unpin runs/alpha 12000 --json | jq .changed"""

COMMAND = "ckptmgr unpin"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("step", metavar="STEP", type=target.step, help="the step of the checkpoint")
    parser.add_argument("--series", metavar="NAME", help="its series (default: checkpoint, or the only one)")
    asking.configure(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Unpin it, if it is pinned."""
    with target.reading(args, directory=True) as (journal, rundir):
        series = target.choose_series(journal, args.series)
        pin = journal.pin_of(series, args.step)
        record = show.find(journal, series, args.step)
        about = target.document(rundir, journal.run_id)
    by = None
    if pin is not None:

        def here(journal: Journal) -> Answer:
            if journal.pin_of(series, args.step) is not None:
                with target.epoch(journal, COMMAND):
                    journal.unpin(series, args.step)
            return Answer(requests.DONE)

        _, by = asking.carry_out(
            rundir, out, command=COMMAND, here=here, timeout_s=args.timeout,
            kind=requests.UNPIN, series=series, step=args.step,
        )  # fmt: skip
    if out.as_json:
        out.document(
            {
                "run": about,
                "series": series,
                "step": args.step,
                "checkpoint_id": record.id,
                "pinned": False,
                "changed": pin is not None,
                "note": pin.note if pin is not None else "",
                "by": by,
            }
        )
        return Exit.OK
    said = "is not pinned any more" if pin is not None else "was not pinned"
    out.line(f"{series} step {args.step} {said}" + (f": {pin.note}" if pin is not None and pin.note else ""))
    return Exit.OK
