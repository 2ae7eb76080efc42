"""``ckptmgr check``: may we resume, from where, and if not, why not."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import stat
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckptmgr import recovery, resume
from ckptmgr.cli import describe, foreign, target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output, Painted, Progress
from ckptmgr.errors import InvalidArgument, JournalError
from ckptmgr.resume import ResumeReport, Verdict

if TYPE_CHECKING:
    from ckptmgr.journal import Questions
    from ckptmgr.lifecycle import CheckpointRecord
    from ckptmgr.recovery import Found
    from ckptmgr.rundir import RunDirectory

DESCRIPTION = """\
Say whether the run may be resumed and from which path, with every finding that
speaks against it. Sizes are always compared with what was committed, of the
20 newest checkpoints and of older ones until one is safe; --all looks at every
one. --deep does too, reads every byte and compares the digests, of all series
unless --series or --step is given.

As a gate in a launch script it can ask for more: other series that must be
safe too (--require), how far the run must have come (--min-step) and how long
ago that may have been (--max-age). With --allow-empty a run that has never
committed anything passes, as the first start must.

A directory without a journal is judged by its files, if it has checkpoints of
xtuner, Megatron, DeepSpeed, Hugging Face, Lightning, Orbax,
torch_checkpointing, or torch.distributed.checkpoint (torchtitan)."""
EXAMPLES = """\
  ckptmgr check runs/alpha
  ckptmgr check runs/alpha --world-size 16 --allow-empty
  ckptmgr check runs/alpha --require hf --min-step 10000 --max-age 12h
  ckptmgr check work_dirs/somebody-elses
  ckptmgr check runs/alpha --deep --json | jq '.reports[].candidates'"""

#: How many of the newest are always looked at; with thousands of ranks each costs thousands of calls.
_NEWEST = 20
#: How often a series is looked at before it is said to change too fast.
_LOOKS = 20


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--series", metavar="NAME", help="its series (default: checkpoint, or the only one)")
    parser.add_argument("--step", metavar="N", type=target.step, help="judge only the checkpoint of this step")
    parser.add_argument("--world-size", metavar="N", type=world_size, help="how many ranks will resume")
    parser.add_argument("--deep", action="store_true", help="read every byte and verify the digests")
    parser.add_argument("--all", action="store_true", help="look at every checkpoint, however many are kept")
    parser.add_argument("--require", metavar="NAME,...", type=names, default=(), help="series that must be safe too")
    parser.add_argument("--min-step", metavar="N", type=target.step, help="an earlier step is not safe")
    parser.add_argument(
        "--max-age", metavar="AGE", type=target.period, help="one committed longer ago is not safe, such as 12h"
    )
    parser.add_argument("--allow-empty", action="store_true", help="0 if nothing was ever committed: a first start")


def names(text: str) -> tuple[str, ...]:
    """The argparse type of series, separated by commas."""
    from ckptmgr.rundir import check_series_name

    try:
        return tuple(dict.fromkeys(check_series_name(name) for name in text.split(",")))
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(error.message) from error


def world_size(text: str) -> int:
    """The argparse type of a world size: a whole number from 1."""
    number = target.step(text)
    if number < 1:
        raise argparse.ArgumentTypeError("a world size is at least 1")
    return number


def run(args: argparse.Namespace, out: Output) -> int:
    """Print the findings and the verdict."""
    if (elsewhere := foreign.directory(args)) is not None and (code := foreign.run(args, out, elsewhere)) is not None:
        return code
    if args.allow_empty and _has_never_been(args):
        return _say_empty(out, target.document(target.locate(args), None), args.series or target.DEFAULT_SERIES)
    with target.reading(args, directory=True) as (journal, rundir):
        series = _main_series(journal, args)
        asked = tuple(dict.fromkeys((series, *args.require)))
        everything = args.deep and args.series is None and args.step is None
        others = [name for name in journal.series() if name not in asked] if everything else []
        reports = [
            judge(
                journal, rundir, name, step=args.step, world_size=args.world_size, deep_for=out if args.deep else None,
                first=None if args.all or args.deep or args.step is not None else _NEWEST,
            )
            for name in (*asked, *others)
        ]  # fmt: skip
        wanted = [
            resume.demand(one, min_step=args.min_step, max_age_s=args.max_age, now=time.time())
            for one in reports[: len(asked)]
        ]
        beside = reports[len(asked) :]
        if rundir.path.is_dir() and target.live_epoch(journal) is None:
            # While a manager runs they may lag behind for a moment.
            stale = rundir.stale_projections(journal.run_id, journal.live_lists())
            projections = resume.of_projections(stale, series)
            wanted[0] = dataclasses.replace(wanted[0], findings=(*wanted[0].findings, *projections))
        about = target.document(rundir, journal.run_id)
        if args.allow_empty and _is_empty(journal, wanted):
            return _say_empty(out, about, series)
    worst = resume.worst([one.verdict for one in wanted])
    damaged = args.deep and any(candidate.damaged for one in (*wanted, *beside) for candidate in one.candidates)
    code = Exit.CORRUPT if damaged and worst is Verdict.SAFE else describe.STATUS_OF[worst]
    report = wanted[0]
    # A path is to be used: there is none unless everything that was asked for can be.
    usable = worst in (Verdict.SAFE, Verdict.OLDER)
    if out.as_json:
        chosen = report.chosen if usable else None
        out.document(
            {
                "run": about,
                "exit_code": int(code),
                "series": series,
                "verdict": worst.value,
                "path": str(rundir.absolute(chosen.directory)) if chosen is not None else None,
                "step": chosen.step if chosen is not None else None,
                "deep": args.deep,
                "damaged": damaged,
                "reports": [one.to_dict() for one in (*wanted, *beside)],
            }
        )
        return code
    findings = [finding for one in (*wanted, *beside) for finding in one.all_findings]
    if findings:
        out.table("LEVEL", "ID", "SERIES", "STEP", "FINDING", right=("STEP",)).add(
            [
                Painted(finding.level.value, describe.COLOUR_OF[finding.level]),
                finding.id,
                finding.series,
                str(finding.step) if finding.step is not None else "",
                f"{finding.text}; hint: {out.hint(finding.hint)}" if finding.hint else finding.text,
            ]
            for finding in findings
        )
    for one in wanted:
        out.line(verdict_line(one, rundir))
    if any(one.verdict is Verdict.OLDER for one in wanted):
        out.note("`resume` takes no older one by itself", "restore the newest, or pass allow_older=True to `resume`")
    if any(one.chosen is not None for one in wanted) and not args.deep:
        out.note("only names and sizes were compared", "`ckptmgr check RUN --deep` compares every byte")
    if args.step is None and (older := sum(one.not_looked_at for one in wanted)):
        out.note(f"{older} older ones were not looked at", "`ckptmgr check RUN --all` looks at each")
    if code is Exit.CORRUPT and worst is Verdict.SAFE:
        out.line(Painted("but damage was found: see the errors above", "red"))
    return code


def _main_series(journal: Questions, args: argparse.Namespace) -> str:
    """What the path is of; where that would be any of several, the first that is required."""
    known = journal.series()
    if args.series is None and args.require and target.DEFAULT_SERIES not in known and len(known) > 1:
        return str(args.require[0])
    return target.choose_series(journal, args.series)


def _has_never_been(args: argparse.Namespace) -> bool:
    """
    Whether nothing at all says that there was a run: no journal, and no directory with the mark of one.

    Raises:
        InvalidArgument: A directory that it would be in is not there; a file system may not be mounted.
    """
    rundir = target.locate(args)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        found = os.lstat(rundir.journal_path)
        # A crash can leave an empty one before anything is in it.
        if found.st_size or not stat.S_ISREG(found.st_mode):
            return False
    if rundir.run_id() is not None:
        return False
    for what, place in (("run", rundir.path), ("journal", rundir.journal_path)):
        if not place.parent.is_dir():
            raise InvalidArgument(
                f"there is no directory {place.parent} in which the {what} could be",
                hint="mount it or make it first: a run that is elsewhere would be started anew",
            )
    return True


def _is_empty(journal: Questions, reports: Sequence[ResumeReport]) -> bool:
    """Whether nothing was ever committed, of other series neither, and nothing is there that the journal misses."""
    return all(report.verdict is Verdict.NONE for report in reports) and not any(
        journal.has_committed(series) for series in journal.series()
    )


def _say_empty(out: Output, about: dict[str, Any], series: str) -> int:
    if out.as_json:
        out.document(
            {
                "run": about, "exit_code": 0, "series": series, "verdict": Verdict.NONE.value, "path": None,
                "step": None, "deep": False, "damaged": False, "reports": [],
            }
        )  # fmt: skip
    else:
        out.line("nothing was ever committed here: a first start")
    return Exit.OK


def judge(
    journal: Questions,
    rundir: RunDirectory,
    series: str,
    *,
    step: int | None = None,
    world_size: int | None = None,
    deep_for: Output | None = None,
    first: int | None = None,
) -> ResumeReport:
    """
    What the resume checker says of one series, with every file's size compared.

    Args:
        journal: Opened for reading.
        rundir: Its run directory.
        series: The series to judge.
        step: Judge only this step.
        world_size: How many ranks will resume, if known.
        deep_for: Also verify the digests, showing the progress here.
        first: Look at so many of the newest, and at older ones only as far as it takes to find a safe one.

    Raises:
        JournalError: A running manager changes the series all the time.
    """
    verified: dict[int, tuple[str, ...]] = {}
    for _ in range(_LOOKS):
        known = journal.live_directories(series)
        for newest in [len(known)] if first is None else resume.looks(len(known), first):
            records = resume.asked_of(journal, series, step, newest)
            looked = [record for record in records if record.is_live and step in (None, record.step)]
            near = {record.directory for record in looked}
            besides = known - near
            found = rundir.listing([series], sizes_for=near, besides=besides)
            if deep_for is not None:
                found = verify_digests(journal, rundir, looked, found, verified=verified, out=deep_for)
            there = {item.path for item in found}
            report = resume.check(
                recovery.with_traces(journal, records, found),
                found,
                series=series,
                step=step,
                world_size=world_size,
                live_epoch=target.live_epoch(journal) is not None,
                files={record.id: journal.files(record.id) for record in looked if record.directory in there},
                besides=besides,
            )
            if deep_for is None:
                report = resume.recall(report, journal.newest_verifications(record.id for record in looked))
            if report.chosen is not None:
                break
        # A manager that commits and retires meanwhile would make a checkpoint look lost that it has let go.
        if resume.asked_of(journal, series, step, newest) == records:
            return report
    raise JournalError(f"series {series!r} changes faster than it can be looked at", hint="try again")


def verify_digests(
    journal: Questions,
    rundir: RunDirectory,
    live: Sequence[CheckpointRecord],
    found: Sequence[Found],
    *,
    verified: dict[int, tuple[str, ...]],
    out: Output,
) -> list[Found]:
    """
    Compare every byte of each live checkpoint that is there with what the journal recorded.

    Args:
        journal: Knows what was committed.
        rundir: Reads the files.
        live: The checkpoints to verify.
        found: What stands in their series.
        verified: What is known by attempt already; added to, so that nothing is read twice.
        out: Shows the progress.

    Returns:
        *found*, with the mismatches of those checkpoints.
    """
    owner = {record.directory: record for record in live}
    progress = Progress(out, sum(record.bytes for record in live if record.id not in verified))
    looked = []
    for item in found:
        record = owner.get(item.path)
        if record is None or item.holds != record.id:
            looked.append(item)
            continue

        def read(count: int, path: str = item.path) -> None:
            progress.add(count, f"verifying {path}")

        if record.id not in verified:
            verified[record.id] = rundir.verify(
                item.path, journal.files(record.id), digests=True, progress=read, from_disk=True
            )
        looked.append(dataclasses.replace(item, mismatches=verified[record.id]))
    out.progress(None)
    return looked


def verdict_line(report: ResumeReport, rundir: RunDirectory) -> Painted:
    """The answer in one line, naming the path to resume from."""
    if report.chosen is None:
        if report.unmet:
            return Painted(f"not what was asked for: {'; '.join(finding.text for finding in report.unmet)}", "red")
        reason = {
            Verdict.NONE: f"nothing to resume from: series {report.series!r} has no committed checkpoint",
            Verdict.CORRUPT: f"not safe to resume: no checkpoint of series {report.series!r} is intact",
        }.get(report.verdict, f"not safe to resume from series {report.series!r}")
        return Painted(reason, "red")
    path = rundir.absolute(report.chosen.directory)
    if report.verdict is Verdict.OLDER:
        return Painted(f"the newest is not safe to resume from; an older one is: {path}", "yellow")
    return Painted(f"safe to resume from {path}", "green")
