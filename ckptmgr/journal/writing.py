"""
The connection that writes, by SQLAlchemy: one durable transaction at a time, followed by the seal.

The rules stand in `database`.
"""

from __future__ import annotations

import contextlib
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Connection, Engine, ExceptionContext, create_engine, event, select, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from ckptmgr.errors import JournalError
from ckptmgr.journal import database, schema, seal


def create_journal_engine(path: Path, mode: database.Mode, *, foreign_keys: bool = True) -> Engine:
    """An engine whose every connection is `database.connect`'s, and whose transactions take the write lock at once."""
    engine = create_engine(
        "sqlite://", creator=lambda: database.connect(path, mode, foreign_keys=foreign_keys), poolclass=NullPool
    )

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    @event.listens_for(engine, "handle_error")
    def keep(context: ExceptionContext) -> None:
        # An interrupt counts as a lost connection, and SQLAlchemy would make another one by itself: no seal follows it.
        context.is_disconnect = False

    return engine


def driver(connection: Connection) -> sqlite3.Connection:
    """The driver's own connection below SQLAlchemy's."""
    below = connection.connection.driver_connection
    assert isinstance(below, sqlite3.Connection)
    return below


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Like `database.translated`, also for what SQLAlchemy raises."""
    with database.translated(path):
        try:
            yield
        except DBAPIError as error:
            if isinstance(error.orig, sqlite3.Error):
                raise database.translate(error.orig, path) from error
            raise JournalError(f"{path}: {error}") from error
        except SQLAlchemyError as error:
            raise JournalError(f"{path}: {error}") from error


class WritableDatabase(database.Database):
    """A `Database` that also writes."""

    read_only = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._engine = create_journal_engine(path, "rw")
        self._connection: Connection | None = None
        self._seal: seal.Seal | None = None

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """
        One durable transaction: when the block has been left without an error, it is on disk, synced.

        Raises:
            JournalError: It is not; nothing has changed, unless the message says that this is not known.
        """
        with self.lock, translated(self.path):
            connection = self._connect()
            last_change = schema.run.c.last_change
            mine = uuid.uuid4().hex
            followed = self._seal
            assert followed is not None
            try:
                transaction = connection.begin()
                followed.begin()
                before = connection.execute(select(last_change)).scalar_one_or_none()
                yield connection
                connection.execute(update(schema.run).values(last_change=mine))
                followed.record()
            except Exception as error:
                try:
                    connection.rollback()
                except SQLAlchemyError:
                    # What failed first is the news; closing the connection rolls back as well.
                    error.add_note("the connection to the journal had to be closed to roll back")
                    self._discard()
                if lost := followed.lost(error):
                    self._discard()
                    raise lost from error
                raise
            except BaseException:
                # An interrupt may have come anywhere, and the next transaction must not depend on where.
                self._discard()
                raise
            try:
                transaction.commit()
            except Exception as error:
                self._discard()
                now = self._last_change_after(error)
                if now != mine:
                    outcome = (
                        "nothing was changed"
                        if now == before
                        else "another process wrote since; look at the journal before trying again"
                    )
                    raise JournalError(f"{self.path} did not take a transaction, {outcome}: {error}") from error
            except BaseException:
                self._discard()
                raise

    def _below(self) -> sqlite3.Connection:
        with translated(self.path):
            return driver(self._connect())

    def _connect(self) -> Connection:
        self._require_usable()
        if self._connection is None:
            self._connection = self._engine.connect()
            try:
                self._seal = seal.Seal(driver(self._connection))
            except BaseException:
                self._discard()
                raise
        return self._connection

    def _discard(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # A connection that failed may fail to close as well; the next one does not depend on it.
            with contextlib.suppress(SQLAlchemyError, sqlite3.Error):
                database.abandon(driver(connection))
            with contextlib.suppress(SQLAlchemyError, sqlite3.Error):
                connection.close()

    def _last_change_after(self, failure: Exception) -> str | None:
        try:
            with self.reading() as connection:
                return str(connection.execute("SELECT last_change FROM run").fetchone()[0])
        except JournalError as error:
            raise JournalError(
                f"{self.path} failed at a COMMIT ({failure}) and cannot be read now ({error.message});"
                " whether the transaction counts is not known",
                hint="open the journal again and look",
            ) from failure
