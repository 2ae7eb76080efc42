"""``ckptmgr pin``: keep a checkpoint whatever the keep rules say."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ckptmgr import requests
from ckptmgr.cli import asking, describe, show, target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output
from ckptmgr.errors import CheckpointNotFound
from ckptmgr.requests import Answer

if TYPE_CHECKING:
    from ckptmgr.journal import Journal, Questions
    from ckptmgr.lifecycle import CheckpointRecord

DESCRIPTION = """\
Keep a committed checkpoint until it is unpinned, whatever the keep rules say.
The pin holds the step: a checkpoint that overwrites it is pinned as well.
Pinning is the change itself, so there is no --apply; to pin again changes
nothing, or the note. A live run is asked to do it; otherwise the run lock is
taken."""
EXAMPLES = """\
  ckptmgr pin runs/alpha 12000
  ckptmgr pin runs/alpha 12000 --series hf --note shipped
  ckptmgr pin runs/alpha 12000 --json | jq .changed"""

COMMAND = "ckptmgr pin"
_LONGEST_NOTE = 1000


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("step", metavar="STEP", type=target.step, help="the step of the checkpoint")
    parser.add_argument("--series", metavar="NAME", help="its series (default: checkpoint, or the only one)")
    parser.add_argument("--note", metavar="TEXT", type=note, help="why, for those who look later")
    asking.configure(parser)


def note(text: str) -> str:
    """The argparse type of a note: some text, and not a book."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the note is no text") from None
    if len(text) > _LONGEST_NOTE:
        raise argparse.ArgumentTypeError(f"a note has no more than {_LONGEST_NOTE} characters, not {len(text)}")
    return text


def run(args: argparse.Namespace, out: Output) -> int:
    """Pin it, unless it is."""
    with target.reading(args, directory=True) as (journal, rundir):
        series = target.choose_series(journal, args.series)
        record = pinnable(journal, series, args.step)
        pin = journal.pin_of(series, args.step)
        about = target.document(rundir, journal.run_id)
    text = args.note if args.note is not None else pin.note if pin is not None else ""
    changed = pin is None or pin.note != text
    by = None
    if changed:

        def here(journal: Journal) -> Answer:
            pinnable(journal, series, args.step)
            with target.epoch(journal, COMMAND):
                journal.pin(series, args.step, note=text)
            return Answer(requests.DONE)

        _, by = asking.carry_out(
            rundir, out, command=COMMAND, here=here, timeout_s=args.timeout,
            kind=requests.PIN, series=series, step=args.step, note=text,
        )  # fmt: skip
    if out.as_json:
        out.document(
            {
                "run": about,
                "series": series,
                "step": args.step,
                "checkpoint_id": record.id,
                "pinned": True,
                "changed": changed,
                "note": text,
                "by": by,
            }
        )
        return Exit.OK
    said = "pinned" if pin is None else "pinned already" + (", and has another note now" if changed else "")
    out.line(f"{series} step {args.step} is {said}" + (f": {text}" if text else ""))
    return Exit.OK


def pinnable(journal: Questions, series: str, step: int) -> CheckpointRecord:
    """
    The live checkpoint of a step.

    Raises:
        CheckpointNotFound: There is none; the message says what there is instead.
    """
    record = show.find(journal, series, step)
    if not record.is_live:
        raise CheckpointNotFound(
            f"step {step} of series {series!r} is {describe.state(record).text}, and only a checkpoint that is "
            "COMMITTED and not being retired can be pinned",
            hint=f"run `ckptmgr why RUN {step} --series {series}`",
            series=series,
            step=step,
        )
    return record
