"""``ckptmgr latest``: the path to resume from, for scripts."""

from __future__ import annotations

import argparse

from ckptmgr.cli import check, describe, target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output
from ckptmgr.resume import Verdict

DESCRIPTION = """\
Print the absolute path of the newest checkpoint that `ckptmgr check` would
accept, and nothing else. If that is not the newest one, a note on stderr says
so, and the exit status is still 0."""
EXAMPLES = """\
  torchrun train.py --resume "$(ckptmgr latest runs/alpha)"
  ckptmgr latest runs/alpha --series hf
  ckptmgr latest runs/alpha --world-size 16 --json | jq -r .path"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--series", metavar="NAME", help="its series (default: checkpoint, or the only one)")
    parser.add_argument("--world-size", metavar="N", type=check.world_size, help="how many ranks will resume")


def run(args: argparse.Namespace, out: Output) -> int:
    """Print the path."""
    with target.reading(args, directory=True) as (journal, rundir):
        series = target.choose_series(journal, args.series)
        report = check.judge(journal, rundir, series, world_size=args.world_size, first=1)
        about = target.document(rundir, journal.run_id)
    chosen = report.chosen
    path = str(rundir.absolute(chosen.directory)) if chosen is not None else None
    status = Exit.OK if chosen is not None else describe.STATUS_OF[report.verdict]
    if out.as_json:
        out.document(
            {
                "run": about,
                "series": series,
                "verdict": report.verdict.value,
                "path": path,
                "step": chosen.step if chosen is not None else None,
                "checkpoint_id": chosen.id if chosen is not None else None,
                "newest_is_safe": report.newest_is_safe,
            }
        )
        return status
    if path is not None:
        out.exactly(path)
    if path is None or report.verdict is Verdict.OLDER:
        asked = f" --series {series}" + (f" --world-size {args.world_size}" if args.world_size is not None else "")
        out.note(check.verdict_line(report, rundir).text, f"run `ckptmgr check RUN{asked}` for the findings")
    return status
