"""
What the command says to a script through its exit status, and the one place where errors become numbers.

A status that is not listed here is a failure too.
"""

from __future__ import annotations

import enum

from ckptmgr import errors


class Exit(enum.IntEnum):
    """The exit statuses of ``ckptmgr``."""

    OK = 0
    #: A bug in ckptmgr (with a traceback), or the operating system refused something (without one).
    FAILED = 1
    USAGE = 2
    #: Nothing to resume from, not safe to resume from, no such checkpoint, a journal that cannot be read now, or
    #: storage on which no run should be put.
    NOT_SAFE = 3
    #: The newest checkpoint cannot be used, an older one can.
    OLDER_IS_SAFE = 4
    #: None is safe because of damage; or damage beside a newest one that is safe; or a damaged journal.
    CORRUPT = 5
    #: No journal here, or not the one of this run directory.
    NO_JOURNAL = 10
    #: Another process holds the run lock, or took the run over, or the file system cannot lock.
    LOCKED = 11
    OTHER_SCHEMA = 12
    INTERRUPTED = 130


#: The first row that fits decides, so a subclass stands above its base.
_STATUS: tuple[tuple[type[BaseException], Exit], ...] = (
    (KeyboardInterrupt, Exit.INTERRUPTED),
    (errors.JournalNotFound, Exit.NO_JOURNAL),
    (errors.ForeignJournal, Exit.NO_JOURNAL),
    (errors.JournalSchemaMismatch, Exit.OTHER_SCHEMA),
    (errors.JournalCorrupt, Exit.CORRUPT),
    (errors.CorruptCheckpoint, Exit.CORRUPT),
    (errors.RunLocked, Exit.LOCKED),
    (errors.StaleWriter, Exit.LOCKED),
    (errors.LockUnsupported, Exit.LOCKED),
    (errors.JournalError, Exit.NOT_SAFE),
    (errors.CheckpointNotFound, Exit.NOT_SAFE),
    (errors.UnsafeResume, Exit.NOT_SAFE),
    (errors.UnsafePath, Exit.NOT_SAFE),
    (errors.InvalidArgument, Exit.USAGE),
)


def exit_code(error: BaseException) -> Exit:
    """The exit status of a command that ended with *error*."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), Exit.FAILED)


def is_our_bug(error: BaseException) -> bool:
    """Whether nobody foresaw *error*, so that a traceback says more than its message."""
    return not isinstance(error, errors.CheckpointError | OSError | KeyboardInterrupt)
