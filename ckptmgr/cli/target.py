"""
Which run a command is about: its journal and its run directory, opened for reading or for a change.

Reading takes no lock and changes nothing. A change takes the run lock first, so that it can never
happen beside a training run; what a manager can do itself, it is asked for instead (`asking`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptmgr.errors import InvalidArgument, JournalCorrupt, JournalError, JournalNotFound, JournalSchemaMismatch
from ckptmgr.manifest import MAX_NUMBER
from ckptmgr.options import parse_size

if TYPE_CHECKING:
    from ckptmgr.journal import Journal, Questions
    from ckptmgr.rundir import RunDirectory

JOURNAL_SUFFIX = ".journal.db"
DEFAULT_SERIES = "checkpoint"


def locate(args: argparse.Namespace) -> RunDirectory:
    """
    The run that RUN and ``--journal`` name. Nothing is opened or created.

    Raises:
        InvalidArgument: RUN is a journal file and ``--journal`` names another one, or its path is too long for SQLite.
    """
    from ckptmgr.rundir import RunDirectory

    given = Path(args.run)
    if args.journal is not None and given.name.endswith(JOURNAL_SUFFIX) and not given.is_dir():
        raise InvalidArgument(
            f"RUN {args.run!r} is a journal and --journal names one too",
            hint="give the run directory together with --journal",
        )
    rundir = RunDirectory(args.run, args.journal)
    rundir.check_journal_path()
    return rundir


@contextlib.contextmanager
def reading(args: argparse.Namespace, *, directory: bool = False) -> Iterator[tuple[Questions, RunDirectory]]:
    """
    The run's journal, opened read-only, and its directory.

    Args:
        args: The parsed command line.
        directory: Whether what stands in the run directory will be judged.

    Raises:
        JournalNotFound: There is none.
        JournalSchemaMismatch: It was written by another version.
        JournalCorrupt: It is damaged.
        ForeignJournal: It belongs to another run directory.
    """
    from ckptmgr.journal import Questions

    rundir = locate(args)
    require_journal(rundir)
    with Questions.open_read_only(rundir.journal_path) as journal:
        judged = directory and rundir.path.is_dir()
        rundir.require_pair(journal.run_id, managed=judged and bool(journal.series()))
        yield journal, rundir


def require_journal(rundir: RunDirectory) -> None:
    """
    Check that something stands at the journal's place, without opening it.

    Raises:
        JournalNotFound: Nothing does; the hint says more if the run directory had a journal once.
    """
    rundir.require_journal()
    if not os.path.lexists(rundir.journal_path):
        raise JournalNotFound(f"there is no journal at {rundir.journal_path}", path=str(rundir.journal_path))


@contextlib.contextmanager
def locked(rundir: RunDirectory, command: str) -> Iterator[None]:
    """
    Hold the run lock for *command*, or fail at once.

    Raises:
        RunLocked: Another process holds it.
        LockUnsupported: The file system cannot lock, or cannot make the lock's file.
    """
    rundir.acquire(command)
    try:
        yield
    finally:
        rundir.release()


@contextlib.contextmanager
def changing(rundir: RunDirectory, command: str, *, create: bool = False) -> Iterator[Journal]:
    """
    The run's journal, opened for writing under the run lock; for a change, `epoch` comes next.

    Args:
        rundir: The run.
        command: Who holds the lock.
        create: Begin a new run where there was none.

    Raises:
        RunLocked: Another process holds the run lock.
        InvalidArgument: There is no run directory: an unmounted file system must not cost a checkpoint.
        CheckpointError: As of `reading`, or of `locked`.
    """
    from ckptmgr.journal import Journal

    if create:
        rundir.require_journal()
    else:
        require_journal(rundir)
    needed = rundir.path.parent if create else rundir.path
    if not needed.is_dir():
        what = "directory" if create else "run directory"
        raise InvalidArgument(f"there is no {what} {needed}", hint="put it back, or mount it, first")
    with locked(rundir, command):
        # A crash can leave a new one empty.
        with contextlib.suppress(*(JournalNotFound,) if create else ()):
            _refuse_to_migrate(rundir)
        with Journal.open(rundir.journal_path, file_mode=rundir.permissions.file_mode) as journal:
            # What is not there would be given up.
            (rundir.pair if create else rundir.require_pair)(journal.run_id, managed=bool(journal.series()))
            yield journal


def _refuse_to_migrate(rundir: RunDirectory) -> None:
    """
    Refuse a journal that opening it for writing would create or upgrade.

    Raises:
        JournalNotFound: It is empty.
        JournalSchemaMismatch: It has another schema.
        JournalCorrupt: It is damaged.
    """
    from ckptmgr.journal import Questions

    try:
        Questions.open_read_only(rundir.journal_path).close()
    except (JournalNotFound, JournalSchemaMismatch, JournalCorrupt):
        raise
    except JournalError:
        # A transaction that a crash cut short keeps readers out; opening it for writing undoes it.
        pass


@contextlib.contextmanager
def epoch(journal: Journal, command: str, *, after: int = 0) -> Iterator[dict[str, Any]]:
    """
    An epoch of its own for *command*, newer than *after*; the caller holds the run lock.

    Gives the keyword arguments that name it: ``epoch``, ``host``, ``pid``. An epoch that a crash
    cut short stays open in the journal, as a training run's would.
    """
    # Slow to import, and most commands change nothing.
    import importlib.metadata
    import platform
    import socket

    who: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    versions = {"ckptmgr": importlib.metadata.version("ckptmgr"), "python": platform.python_version()}
    number = journal.begin_epoch(**who, command=command, versions=versions, after=after)
    yield {"epoch": number, **who}
    journal.end_epoch(number)


def step(text: str) -> int:
    """The argparse type of a step: a whole number from 0 that a journal can hold."""
    if not (text.isascii() and text.isdigit()) or int(text) > MAX_NUMBER:
        raise argparse.ArgumentTypeError(f"{text!r} is not a step: give a whole number, 0 or more")
    return int(text)


def count(text: str) -> int:
    """The argparse type of a number of things: a whole one from 1."""
    number = step(text)
    if number < 1:
        raise argparse.ArgumentTypeError("give a number of at least 1")
    return number


def size(text: str) -> int:
    """The argparse type of a size in bytes."""
    try:
        return parse_size(text)
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(error.message) from error


def seconds(text: str) -> float:
    """The argparse type of a wait: above 0, and an hour at most."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from above 0 to 3600")
    return number


def period(text: str) -> float:
    """The argparse type of a length of time in seconds: ``90s``, ``30m``, ``12h``, ``7d``, ``2w``."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhdw])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no age: give a number and s, m, h, d or w, as in 7d")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}[match[2]]


def choose_series(journal: Questions, asked: str | None) -> str:
    """
    The series a command about one series means: the one asked for, ``checkpoint``, or the only one.

    A series without any row is fine: it has nothing to resume from, which the command will say.

    Raises:
        InvalidArgument: There are several and none of them is called ``checkpoint``.
    """
    if asked is not None:
        from ckptmgr.rundir import check_series_name

        return check_series_name(asked)
    known = journal.series()
    if DEFAULT_SERIES in known or not known:
        return DEFAULT_SERIES
    if len(known) > 1:
        raise InvalidArgument(f"this run has the series {', '.join(known)}", hint="choose one with --series NAME")
    return known[0]


def require_series(journal: Questions, asked: str | None) -> None:
    """
    Check a ``--series`` that filters.

    Raises:
        InvalidArgument: The journal has no row of that series.
    """
    known = journal.series()
    if asked is not None and asked not in known:
        raise InvalidArgument(
            f"no series {asked!r} in this run; it has {', '.join(known) or 'none yet'}",
            hint="`ckptmgr ls RUN` shows what there is",
        )


def live_epoch(journal: Questions) -> int | None:
    """
    The newest epoch if its process may still be running, else None.

    Told from its row, since a reader takes no lock: on this host by its process, on another host
    by the epoch not having been ended.
    """
    epochs = journal.epochs()
    if not epochs or epochs[-1].ended_at is not None:
        return None
    from ckptmgr.requests import may_run

    newest = epochs[-1]
    return newest.epoch if may_run(newest.host, newest.pid) else None


def document(rundir: RunDirectory, run_id: str | None) -> dict[str, Any]:
    """The ``run`` object of every JSON document."""
    return {"run_id": run_id, "directory": str(rundir.path), "journal": str(rundir.journal_path)}
