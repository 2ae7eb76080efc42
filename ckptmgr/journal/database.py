"""
Opening SQLite the one right way.

Every connection to a journal, Alembic's included, comes from `connect`; every transaction runs in
a `Database`, or in one for `writing`. The rules (see docs/explanation/commit-order.md):

- ``journal_mode=PERSIST``, ``synchronous=EXTRA``, ``mmap_size=0``, set and read back each time.
  PERSIST can still record a failure on a full disk; EXTRA also syncs the directory; WAL needs
  shared memory and kills its readers on a full disk.
- Writers take the write lock at BEGIN, so that a transaction never finds out half-way that it
  was too late.
- An exception from COMMIT means *unknown*. The connection is thrown away, the journal opened
  again, and the row that names the last transaction decides.
- The file is opened by SQLite alone, under one path: closing any other descriptor of it drops
  this process's locks, and a second name would have a rollback journal of its own.
- A connection is never carried over a fork.

The file may come from anybody, and SQL is a language: a view in the place of a table can run for ever, a
trigger can change what we did not touch, a rollback journal can name a file for SQLite to delete, and a
page that is its own child can have any number of rows. So before anything is asked of it, `revision` looks
whether it is made of exactly what we make; a writer has every page looked at as well, and a reader gets no
more rows than the file has room for.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sqlite3
import stat
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from ckptmgr import reach
from ckptmgr.errors import InvalidArgument, JournalCorrupt, JournalError, JournalNotFound
from ckptmgr.journal import declared, seal

#: How long a connection waits for another one's lock, in milliseconds.
BUSY_TIMEOUT_MS = 10_000

#: The longest text in a row, in bytes: what failed on each of ten thousand ranks fits.
MAX_VALUE_BYTES = 64 << 20
#: A hundred million files of checkpoints.
MAX_JOURNAL_BYTES = 16 << 30
#: Steps of SQLite's machine that reading may take for each byte of the file, and to begin with. A row that is
#: read takes 70, and at least 20 bytes.
_STEPS_PER_BYTE = 30
_FIRST_STEPS = 1_000_000
_STEPS_AT_ONCE = 10_000
#: Tables, indexes and triggers in any schema that we ever had, and some.
_MOST_OBJECTS = 200
#: The end of a rollback journal that belongs to a transaction over several databases (sqlite.org/fileformat2.html).
_SUPER_JOURNAL = bytes.fromhex("d9d505f920a163d7")

_REVISION = re.compile(r"[0-9A-Za-z_]{1,32}")

Mode = Literal["ro", "rw", "rwc"]


def plain_path(path: Path) -> Path:
    """
    The one name of the journal *path*: absolute, its folder free of links.

    Raises:
        JournalError: It, or what SQLite keeps beside it, is a link, has a second name, or is no regular file.
    """
    folder = Path(os.path.abspath(path)).parent.resolve()  # noqa: PTH100  (Path.absolute keeps "..")
    plain = folder / Path(path).name
    found = _require_plain_file(plain)
    if found is not None and found.st_size > MAX_JOURNAL_BYTES:
        raise JournalError(f"{plain} has {found.st_size} bytes, more than {MAX_JOURNAL_BYTES}")
    _refuse_companions(plain)
    return plain


def _require_plain_file(plain: Path) -> os.stat_result | None:
    """What stands there; None if nothing does."""
    try:
        found = plain.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalError(f"{plain} cannot be looked at: {error.strerror}") from error
    if stat.S_ISLNK(found.st_mode):
        raise JournalError(f"{plain} is a symbolic link", hint="give the path the link points to")
    if not stat.S_ISREG(found.st_mode):
        raise JournalError(f"{plain} is not a file", hint="give the .journal.db file beside the run directory")
    if found.st_nlink > 1:
        # Under its other name SQLite would look for another rollback journal and miss an unfinished transaction.
        raise JournalError(
            f"{plain} has {found.st_nlink} names (hard links)",
            hint="replace it by a real copy while no manager runs: cp --reflink=auto J J.copy && mv J.copy J",
        )
    return found


def _refuse_companions(plain: Path) -> None:
    """
    Refuse what SQLite would take for its own, and is not.

    It writes into a rollback journal that is there, whatever other names that file has, waits for ever on
    a pipe, and on a roll-back deletes the file that the rollback journal names as its super-journal. Our
    transactions are never over several databases and never in WAL mode.
    """
    for suffix in ("-wal", "-shm"):
        if os.path.lexists(f"{plain}{suffix}"):
            raise JournalError(
                f"{plain}{suffix} exists, and ckptmgr never uses WAL mode",
                hint="if SQLite's own tools made it, end them, then: sqlite3 JOURNAL 'PRAGMA journal_mode=DELETE'",
            )
    rollback = plain.with_name(f"{plain.name}-journal")
    try:
        kind = rollback.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(kind):
        raise JournalError(f"{rollback} is not a file", hint="SQLite keeps a file there; move away what is there")
    _require_plain_file(rollback)
    try:
        with reach.parent(rollback) as (folder, name), reach.regular(folder, name) as descriptor:
            # Closing it drops no lock: SQLite locks the database file alone.
            end = os.pread(descriptor, 8, max(0, os.fstat(descriptor).st_size - 8))
    except FileNotFoundError:
        return
    except OSError as error:
        raise JournalError(f"{rollback} cannot be read: {error.strerror}") from error
    if end == _SUPER_JOURNAL:
        raise JournalError(
            f"{rollback} is of a transaction over several databases, which ckptmgr never makes",
            hint="it is not this journal's: move it away, then run `ckptmgr check RUN --deep`",
        )


class _Connection(sqlite3.Connection):
    """One that knows its cursors: what is left of a query keeps the journal locked until its cursor is closed."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._cursors: weakref.WeakSet[sqlite3.Cursor] = weakref.WeakSet()

    def cursor(self, *arguments: Any, **options: Any) -> Any:
        cursor = super().cursor(*arguments, **options)
        self._cursors.add(cursor)
        return cursor

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        cursor: sqlite3.Cursor = self.cursor().execute(*arguments)
        return cursor

    def close_cursors(self) -> None:
        """Also those that a traceback holds."""
        for cursor in list(self._cursors):
            cursor.close()


def connect(
    path: Path, mode: Mode, *, foreign_keys: bool = True, busy_timeout_ms: int = BUSY_TIMEOUT_MS
) -> sqlite3.Connection:
    """
    Open the journal *path* (from `plain_path`) and set what must hold on every connection.

    Args:
        path: The one name of the journal.
        mode: ``ro`` reads, ``rw`` also writes, ``rwc`` also creates.
        foreign_keys: Off only for migrations, which drop tables that others refer to.
        busy_timeout_ms: Less only for trials, which ask how things are now.

    Raises:
        sqlite3.Error: SQLite refused.
        JournalError: SQLite did not take a setting.
    """
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode={mode}",
        uri=True,
        timeout=busy_timeout_ms / 1000,
        isolation_level=None,  # BEGIN and COMMIT are ours; the driver's own guesses break transactional DDL
        check_same_thread=False,  # Database serialises its users
        factory=_Connection,
    )
    try:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        for name, value, taken in (
            ("busy_timeout", str(busy_timeout_ms), busy_timeout_ms),
            ("journal_mode", "PERSIST", "persist"),
            ("synchronous", "EXTRA", 3),
            ("mmap_size", "0", 0),
            # No temporary files elsewhere; no function of a schema that could do more than compute.
            ("temp_store", "MEMORY", 2),
            ("trusted_schema", "OFF", 0),
            ("cell_size_check", "ON", 1),
            ("foreign_keys", "ON" if foreign_keys else "OFF", int(foreign_keys)),
        ):
            connection.execute(f"PRAGMA {name}={value}").close()
            row = connection.execute(f"PRAGMA {name}").fetchone()
            # A SQLite built without memory mapping answers mmap_size with no row at all.
            if row != (taken,) and not (row is None and name == "mmap_size"):
                raise JournalError(f"SQLite did not take {name}={value} on {path}: {row}")
    except BaseException:
        connection.close()
        raise
    return connection


def limit_steps(connection: sqlite3.Connection, path: Path | None) -> None:
    """
    Interrupt SQLite when it takes more steps from now on than the file *path* can be the reason of; None ends that.

    Steps and not seconds: a disk may be as slow as it likes.
    """
    if path is None:
        connection.set_progress_handler(None, 0)
        return
    try:
        size = path.lstat().st_size
    except OSError:
        size = 0
    left = (_FIRST_STEPS + _STEPS_PER_BYTE * size) // _STEPS_AT_ONCE
    # No function of ours: Ctrl-C that comes within one would stop the query and pass for damage.
    may_stop = itertools.chain(itertools.repeat(False, left), itertools.repeat(True)).__next__
    connection.set_progress_handler(may_stop, _STEPS_AT_ONCE)


def revision(connection: sqlite3.Connection, path: Path) -> str | None:
    """
    The schema revision of an open journal, in a transaction; None for one that is still empty.

    With `declared.REVISION` it is made of exactly what we make.

    Raises:
        JournalCorrupt: A journal of no revision, of several, with something in it that we did not make, or
            damaged.
        JournalError: A database that is no journal.
    """
    limit_steps(connection, path)
    try:
        query = "SELECT type, name, tbl_name, sql FROM sqlite_master"
        objects = connection.execute(query).fetchmany(_MOST_OBJECTS + 1)
        if not objects:
            return None
        if len(objects) > _MOST_OBJECTS:
            raise damaged(path, "the schema has more in it than that of any journal")
        if connection.execute("PRAGMA application_id").fetchone() != (declared.APPLICATION_ID,):
            if declared.COLUMNS.keys() <= {name for _, name, *_ in objects}:
                raise damaged(path, "its header does not say that it is a journal")
            raise JournalError(f"{path} is a SQLite database, but no ckptmgr journal", hint="give the .journal.db file")
        _require_known([row for row in objects if row[1] in ("alembic_version", "seal")], path)
        rows = connection.execute("SELECT version_num FROM alembic_version LIMIT 2").fetchall()
        if len(rows) != 1:
            raise damaged(path, f"it names {len(rows)} schema revisions")
        found = rows[0][0]
        if not isinstance(found, str) or not _REVISION.fullmatch(found):
            raise damaged(path, "it names no schema revision")
        # Before anything is made of it: a damaged number would look like another version of ckptmgr.
        if seal.is_there(connection):
            require_intact(connection, path, ["alembic_version"])
        elif is_sealed(found):
            raise damaged(path, "it has no seal")
        if found <= declared.REVISION:
            _require_known(objects, path)
        if found == declared.REVISION:
            _require_ours(objects, path)
    finally:
        limit_steps(connection, None)
    return found


def is_sealed(found: str) -> bool:
    """Whether a journal of schema *found* has a seal."""
    return found >= "0002"


def require_intact(
    connection: sqlite3.Connection, path: Path, tables: Iterable[str], *, of: Iterable[int] | None = None
) -> None:
    """
    Compare *tables* of a journal that is sealed with the seal, in a transaction.

    Args:
        connection: What to read.
        path: The journal, for the message.
        tables: Which tables; the empty name stands for the schema.
        of: Of tables that are sealed by checkpoint: whose rows; None for all.

    Raises:
        JournalCorrupt: A row is not what was written, or is gone.
    """
    for table in tables:
        if why := seal.broken(connection, table, of):
            raise damaged(path, why)


def require_sound(connection: sqlite3.Connection, path: Path, *, whole: bool) -> None:
    """
    Have SQLite look for damage in its own structures: pages, order, and that indexes agree with their tables.

    Args:
        connection: In a transaction.
        path: The journal, for the message.
        whole: The whole file, or the tables that decide (and before SQLite 3.33 the whole file as well).

    Raises:
        JournalCorrupt: There is some.
    """
    tables = [*seal.DECISIVE, *(["seal"] if seal.is_there(connection) else [])]
    for what in ["1"] if whole else [table for table in tables if table]:
        (answer,) = connection.execute(f"PRAGMA integrity_check({what})").fetchone()
        if answer != "ok":
            raise damaged(path, answer)


def damaged(path: Path, reason: str) -> JournalCorrupt:
    """The error for a journal that cannot be trusted."""
    return JournalCorrupt(f"{path} is damaged: {reason[:300]}", path=str(path), reason=reason[:300])


_Object = tuple[str, str, str, str | None]


def _require_known(objects: list[_Object], path: Path) -> None:
    """Of this revision and those before: tables, their indexes, and triggers that we know; nothing that computes."""
    for kind, name, table, text in objects:
        known = declared.plain_sql(text) if isinstance(text, str) else ""
        fine = isinstance(text, str | None) and (
            (kind == "table" and known.startswith("CREATETABLE"))
            or (kind == "index" and (text is None or known.startswith(("CREATEINDEX", "CREATEUNIQUEINDEX"))))
            or (kind == "trigger" and known == declared.objects().get(name))
        )
        if not fine:
            raise damaged(path, f"the schema has something that ckptmgr did not make, the {kind} {name} of {table}")


def _require_ours(objects: list[_Object], path: Path) -> None:
    """Of this revision: exactly what `schema` says."""
    ours = declared.objects()
    there = {name: declared.plain_sql(text) for _, name, _, text in objects if text is not None}
    # An index without SQL is one that SQLite makes for a constraint of the table.
    made = [name for _, name, _, text in objects if text is None]
    extra = [name for name in made if not name.startswith("sqlite_autoindex_")]
    if lost := sorted(ours.keys() - there.keys()):
        raise damaged(path, f"the schema has lost {lost[0]}")
    if extra := sorted({*extra, *(name for name in there if ours.get(name) != there[name])}):
        raise damaged(path, f"the schema has something that ckptmgr did not make, {extra[0]}")
    if len(there) + len(made) != len(objects):
        raise damaged(path, "the schema has something twice")


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn what SQLite raises about *path* into ckptmgr's errors; the original is ``__cause__``."""
    try:
        yield
    except sqlite3.Error as error:
        raise translate(error, path) from error
    except UnicodeDecodeError as error:
        # Where a name in the schema is damaged, the driver stumbles over SQLite's own message about it.
        raise damaged(path, f"text in it is no UTF-8: {error}") from error
    except (OverflowError, UnicodeEncodeError) as error:
        raise InvalidArgument(f"the journal cannot hold this value: {error}") from error


#: What SQLite says of a journal whose revision was right, so something in it has been lost or was never ours.
_DAMAGED = ("no such table", "no such column", "Could not decode", "string or blob too big", "unsafe use of")


def translate(error: sqlite3.Error, path: Path) -> JournalError:
    """The error of ours for one of SQLite's."""
    code = getattr(error, "sqlite_errorcode", None) or 0
    text = str(error)
    if code & 0xFF == sqlite3.SQLITE_INTERRUPT:
        text = "it has more rows than bytes for them"
    no_journal = code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_INTERRUPT)
    if no_journal or text.startswith(_DAMAGED):
        return damaged(path, text)
    if code == sqlite3.SQLITE_READONLY_ROLLBACK:
        # A reader must not roll back: where locks do not reach other hosts, the writer may be alive.
        return JournalError(
            f"{path} holds an unfinished transaction of a process that died; it must be undone before reading",
            hint="run `ckptmgr recover RUN --apply`, or start the manager again: both undo it under the run lock",
        )
    if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return JournalError(
            f"{path} was locked by another process for more than {BUSY_TIMEOUT_MS / 1000:g} s",
            hint="end the process that holds the journal open (fuser names it), then try again",
        )
    if code & 0xFF == sqlite3.SQLITE_FULL:
        return JournalError(f"{path} cannot grow: {text}", hint="free space on that file system; nothing was changed")
    if code & 0xFF == sqlite3.SQLITE_CANTOPEN and not path.exists():
        return JournalNotFound(f"there is no journal at {path}", path=str(path))
    return JournalError(f"{path}: {text} ({getattr(error, 'sqlite_errorname', type(error).__name__)})")


def look_through(
    path: Path, mode: Mode, *, every_page: bool = False, every_row: bool = False, outlined: bool = False
) -> str | None:
    """
    The schema revision of the journal *path*, which has been looked through; None if there is none yet.

    Pages and rows of what decides, or *every_page* and *every_row*; where it is *outlined*, the outline of the
    attempts may stand for `seal.COMPARED_WHEN_READ`. A newer schema is not looked into.
    """
    if not path.exists():
        return None
    with translated(path), contextlib.closing(connect(path, mode)) as connection:
        connection.execute("BEGIN")
        found = revision(connection, path)
        if found is not None and found <= declared.REVISION:
            require_sound(connection, path, whole=every_page)
            if is_sealed(found):
                tables = seal.all_tables(connection) if every_row else seal.DECISIVE
                if outlined and not every_row and seal.broken(connection, seal.OUTLINE) is None:
                    tables = [table for table in tables if table not in seal.COMPARED_WHEN_READ]
                require_intact(connection, path, tables)
    return found


class Database:
    """
    One journal file, one connection, one transaction at a time; this one only reads.

    Threads may share it. A forked child may not: its first use raises JournalError and leaves the
    parent's connection alone. A fork waits for a running transaction to end, because a child that
    inherits half of one would roll it back under the parent when it exits.

    Args:
        path: From `plain_path`.
    """

    read_only = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.RLock()
        self._reader: sqlite3.Connection | None = None
        self._pid = os.getpid()
        self._closed = False
        _databases.add(self)

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One consistent view; holds off a writer's COMMIT, so fetch and leave."""
        with self.lock, translated(self.path):
            connection = self._below()
            try:
                limit_steps(connection, self.path)
                connection.execute("BEGIN").close()
                yield connection
                connection.execute("COMMIT").close()
            except BaseException as error:
                if isinstance(error, sqlite3.Error) or not isinstance(error, Exception):
                    self._discard()
                else:
                    connection.rollback()
                raise
            finally:
                with contextlib.suppress(sqlite3.Error):
                    limit_steps(connection, None)

    def writing(self) -> contextlib.AbstractContextManager[Any]:
        """
        No transaction of this one writes.

        Raises:
            JournalError: Always.
        """
        raise JournalError(f"{self.path} was opened for reading only")

    def close(self) -> None:
        """Close the connection. Idempotent; in a forked child it only forgets it."""
        with self.lock:
            self._closed = True
            if self._pid == os.getpid():
                self._discard()

    def _below(self) -> sqlite3.Connection:
        """The driver's connection, opened where it is not yet."""
        self._require_usable()
        if self._reader is None:
            self._reader = connect(self.path, "ro")
        return self._reader

    def _require_usable(self) -> None:
        if self._pid != os.getpid():
            raise JournalError(
                f"{self.path} was opened by process {self._pid} and cannot be used by its forked child {os.getpid()}",
                hint="open the journal in the process that uses it, and only in one of rank 0",
            )
        if self._closed:
            raise JournalError(f"{self.path} is closed")

    def _discard(self) -> None:
        connection, self._reader = self._reader, None
        if connection is not None:
            abandon(connection)
            connection.close()


def abandon(connection: sqlite3.Connection) -> None:
    """Roll back: closing alone would keep its locks as long as a traceback holds a statement of it."""
    with contextlib.suppress(sqlite3.Error):
        if isinstance(connection, _Connection):
            connection.close_cursors()
        connection.rollback()


_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_forking = threading.Lock()
_paused: list[Database] = []


def _before_fork() -> None:
    _forking.acquire()
    for database in list(_databases):
        database.lock.acquire()
        _paused.append(database)


def _after_fork() -> None:
    while _paused:
        _paused.pop().lock.release()
    _forking.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
