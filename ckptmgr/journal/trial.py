"""
A journal that nobody needs, to try on some storage what every journal relies on.

Two processes: one calls `create`, the other `hold` and then `spill`, the first `is_busy`; the other is
killed, and the first calls `take_over`. Every connection has the settings of a real journal.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from ckptmgr.journal.database import Mode, connect, translated

_POLL_S = 0.05
#: More than a cache of one page can keep: SQLite must write uncommitted pages into the file.
_SPILLED_ROWS = 100


def create(path: Path) -> None:
    """
    Make the journal *path* with one committed row, and read everything back.

    Raises:
        JournalError: SQLite refused, or what it gives back is not what was put in.
    """
    with _opened(path, "rwc") as connection:
        connection.execute("BEGIN IMMEDIATE").close()
        connection.execute("CREATE TABLE trial (writer TEXT, data BLOB)").close()
        connection.execute("INSERT INTO trial VALUES ('first', zeroblob(100))").close()
        connection.execute("COMMIT").close()


def hold(path: Path) -> sqlite3.Connection:
    """Begin a transaction in *path*, as every change does, and write a row; the caller keeps the connection."""
    with translated(path):
        connection = connect(path, "rw")
        connection.execute("BEGIN IMMEDIATE").close()
        connection.execute("INSERT INTO trial VALUES ('killed', zeroblob(100))").close()
        return connection


def spill(path: Path, connection: sqlite3.Connection) -> None:
    """Let uncommitted pages of a transaction reach the file, so that whoever opens it next must undo them."""
    with translated(path):
        connection.execute("PRAGMA cache_size=1").close()
        for _ in range(_SPILLED_ROWS):
            connection.execute("INSERT INTO trial VALUES ('killed', zeroblob(4000))").close()


def is_busy(path: Path) -> bool:
    """
    Whether a second writer is refused at once.

    Raises:
        JournalError: It is refused for another reason than that there is a first one.
    """
    with _opened(path, "rw") as connection:
        try:
            connection.execute("BEGIN IMMEDIATE").close()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                return True
            raise
        connection.execute("ROLLBACK").close()
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
    with _opened(path, "rw") as connection:
        connection.execute("BEGIN IMMEDIATE").close()
        connection.execute("INSERT INTO trial VALUES ('second', zeroblob(100))").close()
        connection.execute("COMMIT").close()
        (whole,) = connection.execute("PRAGMA integrity_check").fetchone()
        if whole != "ok":
            raise sqlite3.DatabaseError(whole)
        return [writer for (writer,) in connection.execute("SELECT writer FROM trial ORDER BY rowid").fetchall()]


@contextlib.contextmanager
def _opened(path: Path, mode: Mode) -> Iterator[sqlite3.Connection]:
    with translated(path):
        connection = connect(path, mode)
        try:
            # A trial asks how things are now; waiting is the caller's business.
            connection.execute("PRAGMA busy_timeout=0").close()
            yield connection
        finally:
            connection.close()
