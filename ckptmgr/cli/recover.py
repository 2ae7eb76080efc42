"""``ckptmgr recover``: what a crash left and what would be done; ``--apply``; ``--rebuild`` for a lost journal."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ckptmgr import durable, recovery
from ckptmgr import rebuild as rebuilding
from ckptmgr.cli import target
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output, Painted, size
from ckptmgr.errors import InvalidArgument, JournalCorrupt, JournalNotFound

if TYPE_CHECKING:
    from ckptmgr.rundir import RunDirectory

DESCRIPTION = """\
Say what a crash left in the run directory and the journal, and what would be
done about it. A manager does the same when it starts. Nothing is changed
without --apply, which takes the run lock.

With --rebuild, reconstruct a lost or damaged journal from the manifests on
disk. A damaged journal is moved aside, never deleted. Sizes are compared on
the way; run `ckptmgr check --deep` afterwards."""
EXAMPLES = """\
  ckptmgr recover runs/alpha
  ckptmgr recover runs/alpha --apply
  ckptmgr recover runs/alpha --rebuild --apply"""

COMMAND = "ckptmgr recover"
REBUILD_COMMAND = "ckptmgr recover --rebuild"

#: Why a journal is rebuilt.
MISSING, DAMAGED, UNFINISHED = "missing", "damaged", "unfinished"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--apply", action="store_true", help="do it")
    parser.add_argument("--rebuild", action="store_true", help="reconstruct a lost or damaged journal")


def run(args: argparse.Namespace, out: Output) -> int:
    """Print the plan, or carry it out."""
    if args.rebuild:
        return rebuild(args, out)
    return apply(args, out) if args.apply else preview(args, out)


def preview(args: argparse.Namespace, out: Output) -> int:
    """Say what would be done; takes no lock."""
    with target.reading(args, directory=True) as (journal, rundir):
        report = recovery.preview(journal, rundir)
        live_epoch = target.live_epoch(journal)
        about = target.document(rundir, journal.run_id)
    if out.as_json:
        out.document({"run": about, "live_epoch": live_epoch, **report.to_dict()})
        return Exit.OK
    if live_epoch is not None and report.changes:
        out.note(f"epoch {live_epoch} may still be running; what it has in flight was not left by a crash")
    print_actions(out, report, todo="would")
    if report.changes:
        todo = "`ckptmgr recover RUN --apply` does it"
        if live_epoch is not None:
            todo += " once that has ended, and is refused before; `ckptmgr watch RUN` shows whether it goes on"
        out.note("nothing was changed", todo)
    return Exit.OK


def apply(args: argparse.Namespace, out: Output) -> int:
    """Do it, under the run lock and in an epoch of its own."""
    rundir = target.locate(args)
    with target.changing(rundir, COMMAND) as journal:
        with target.epoch(journal, COMMAND) as who:
            report = recovery.recover(journal, rundir, **who)
            recovery.project(journal.run_id, journal.checkpoints(live_only=True), rundir, series=journal.series())
        about = target.document(rundir, journal.run_id)
    if out.as_json:
        out.document({"run": about, "live_epoch": None, **report.to_dict()})
        return Exit.OK
    print_actions(out, report, todo="did")
    for before, now in report.set_aside.items():
        out.line(f"set aside for inspection: {before} is now {now}")
    return Exit.OK


def print_actions(out: Output, report: recovery.RecoveryReport, *, todo: str) -> None:
    """Print what is done and what is only reported, one line each."""
    for action in report.changes:
        out.labelled(Painted(todo, "yellow"), action.text, indent=len(todo) + 2)
    for action in report.reports:
        out.labelled(Painted("note", "dim"), action.text, indent=6)
    if not report.changes:
        out.line(Painted("nothing to recover", "green"))


def rebuild(args: argparse.Namespace, out: Output) -> int:
    """Reconstruct the journal from the manifests, or say what it would hold."""
    from ckptmgr.journal import Journal

    rundir = target.locate(args)
    report = rebuilding.preview_rebuild(rundir)
    if rundir.run_id() is None and not report.checkpoints:
        raise JournalNotFound(
            f"{rundir.path} holds no checkpoint of a ckptmgr run to rebuild a journal from",
            path=str(rundir.journal_path),
        )
    state, reason = judge_journal(rundir)
    moved: Path | None = None
    if args.apply:
        with target.locked(rundir, REBUILD_COMMAND):
            # Again, now that nobody else can change it.
            state, reason = judge_journal(rundir)
            if state is not UNFINISHED:
                moved = move_aside(rundir.journal_path)
            # Crash here: no journal; rebuilding again starts anew.
            newest = rebuilding.preview_rebuild(rundir).newest_epoch
            with (
                Journal.open(rundir.journal_path, file_mode=rundir.permissions.file_mode) as journal,
                target.epoch(journal, REBUILD_COMMAND, after=newest) as who,
            ):
                report = rebuilding.rebuild(journal, rundir, **who)
                recovery.project(journal.run_id, journal.checkpoints(live_only=True), rundir, series=journal.series())
    if out.as_json:
        document = report.to_dict()
        about = target.document(rundir, document.pop("run_id"))
        rest = {"journal_was": state, "reason": reason, "moved_aside": str(moved) if moved else None, **document}
        out.document({"run": about, **rest})
        return Exit.OK
    out.line(f"journal {rundir.journal_path} {'was' if args.apply else 'is'} {state}: {reason}")
    if moved:
        out.line(f"moved aside to {moved}")
    for candidate in report.checkpoints:
        out.line(
            Painted("took in" if args.apply else "would take in", "green"),
            f"  {candidate.path} ({size(candidate.manifest.bytes)})",
        )
    for skipped in report.skipped:
        out.line(Painted("note", "dim"), f"  {skipped.text}")
    if args.apply:
        out.note("only sizes were compared", "`ckptmgr check RUN --deep` compares every byte")
    else:
        out.note("nothing was changed", "`ckptmgr recover RUN --rebuild --apply` does it")
    return Exit.OK


def judge_journal(rundir: RunDirectory) -> tuple[str, str]:
    """
    Why the journal has to be rebuilt: MISSING, DAMAGED or UNFINISHED, and more of it in words.

    Raises:
        InvalidArgument: It does not have to be: the journal can be read.
        JournalSchemaMismatch: It has another schema, which is no damage.
    """
    from ckptmgr.journal import Questions

    if not os.path.lexists(rundir.journal_path):
        return MISSING, "there is none"
    try:
        # All of it, or a damaged page that nobody asked for would pass for a healthy journal.
        with Questions.open_read_only(rundir.journal_path, whole=True) as journal:
            epochs = journal.epochs()
            rows = journal.checkpoints()
    except JournalCorrupt as error:
        return DAMAGED, error.reason
    except JournalNotFound:
        return UNFINISHED, "it was created and never filled"
    if rows and not (epochs[-1].command == REBUILD_COMMAND and epochs[-1].ended_at is None):
        raise InvalidArgument(
            f"{rundir.journal_path} can be read and has {len(rows)} checkpoints, so there is nothing to rebuild",
            hint="run `ckptmgr recover RUN`; to rebuild all the same, move it and its -journal file away together",
        )
    return UNFINISHED, "it can be read, but its rebuilding or its first use was cut short"


def move_aside(journal: Path) -> Path | None:
    """
    Give a damaged journal, and SQLite's rollback journal of it, a name nobody opens. Durable on return.

    Returns:
        The new name of the journal; None if there was only a rollback journal, or nothing.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    stem = f"{journal.name}.corrupt-{stamp}"
    # Not what an earlier one, or somebody else, has put there.
    names = (journal.with_name(stem if n == 1 else f"{stem}.{n}") for n in itertools.count(1))
    aside = next(name for name in names if not any(os.path.lexists(f"{name}{end}") for end in ("", "-journal")))
    # The database first: a rollback journal without one is harmless, while a database without its
    # rollback journal could pass for a whole one.
    with contextlib.suppress(FileNotFoundError):
        durable.rename_new(journal, aside)
    # Crash here: a rollback journal without its database; the next rebuild moves it too.
    with contextlib.suppress(FileNotFoundError):
        durable.rename_new(Path(f"{journal}-journal"), Path(f"{aside}-journal"))
    durable.sync_directory(journal.parent)
    return aside if os.path.lexists(aside) else None
