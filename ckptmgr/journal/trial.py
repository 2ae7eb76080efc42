"""
A journal that nobody needs, to try on some storage what every journal relies on.

Two processes: one calls `create`, the other `hold` and then `spill`, the first `is_busy`; the other is
killed, and the first calls `take_over`. Every connection has the settings of a real journal, but that it
does not wait for another one's lock.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from ckptmgr.errors import JournalError
from ckptmgr.journal.database import connect, translated

_POLL_S = 0.05
#: More than a cache of one page can keep: SQLite must write uncommitted pages into the file.
_SPILLED_ROWS = 100


def create(path: Path) -> None:
    """
    Make the journal *path* with one committed row.

    Raises:
        JournalError: SQLite refused.
    """
    with _alone(path), contextlib.closing(connect(path, "rwc", busy_timeout_ms=0)) as connection:
        connection.execute("BEGIN IMMEDIATE").close()
        connection.execute("CREATE TABLE trial (writer TEXT, data BLOB)").close()
        connection.execute("INSERT INTO trial VALUES ('first', zeroblob(100))").close()
        connection.execute("COMMIT").close()


def hold(path: Path) -> sqlite3.Connection:
    """Begin a transaction in *path*, as every change does, and write a row; the caller keeps the connection."""
    with _alone(path):
        connection = connect(path, "rw", busy_timeout_ms=0)
        connection.execute("BEGIN IMMEDIATE").close()
        connection.execute("INSERT INTO trial VALUES ('killed', zeroblob(100))").close()
        return connection


def spill(path: Path, connection: sqlite3.Connection) -> None:
    """Let uncommitted pages of a transaction reach the file, so that whoever opens it next must undo them."""
    with _alone(path):
        connection.execute("PRAGMA cache_size=1").close()
        for _ in range(_SPILLED_ROWS):
            connection.execute("INSERT INTO trial VALUES ('killed', zeroblob(4000))").close()


def is_busy(path: Path) -> bool:
    """
    Whether another writer keeps this one out.

    Raises:
        JournalError: Something else does.
    """
    with translated(path):
        try:
            with contextlib.closing(connect(path, "rw", busy_timeout_ms=0)) as connection:
                connection.execute("BEGIN IMMEDIATE").close()
                connection.execute("ROLLBACK").close()
        except sqlite3.OperationalError as error:
            if _says_busy(error):
                return True
            raise
    return False


def take_over(path: Path, timeout_s: float) -> list[str]:
    """
    Write to *path* after the other writer was killed, within *timeout_s* seconds.

    Returns:
        The writers of the rows that are there then; nothing if the journal stayed locked.

    Raises:
        JournalError: SQLite refused for another reason, or finds the journal damaged.
    """
    deadline = time.monotonic() + timeout_s
    while is_busy(path):
        if time.monotonic() > deadline:
            return []
        time.sleep(_POLL_S)
    with _alone(path), contextlib.closing(connect(path, "rw", busy_timeout_ms=0)) as connection:
        connection.execute("BEGIN IMMEDIATE").close()
        connection.execute("INSERT INTO trial VALUES ('second', zeroblob(100))").close()
        connection.execute("COMMIT").close()
        (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise JournalError(f"SQLite finds its file damaged: {found}")
        return [writer for (writer,) in connection.execute("SELECT writer FROM trial ORDER BY rowid").fetchall()]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Of a journal that no other process has open: one that is busy has locks that do not work."""
    with translated(path):
        try:
            yield
        except sqlite3.OperationalError as error:
            if _says_busy(error):
                raise JournalError("SQLite finds its file locked, which no other process has open") from error
            raise


def _says_busy(error: sqlite3.Error) -> bool:
    return error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
