"""
Bring a journal to the schema of this version of ckptmgr, with Alembic at run time.

A fresh journal is a journal at base: it gets the same migrations as an old one, so there is one
path and every test walks it. All migrations run in one transaction that takes the write lock
before it reads the revision; so a death in the middle changes nothing, and processes that start
at once agree. There is no way back but the backup.
"""

from __future__ import annotations

import contextlib
import sqlite3
import stat
from importlib import resources
from pathlib import Path
from typing import Any

from ckptmgr import durable
from ckptmgr.errors import JournalCorrupt, JournalError, JournalNotFound
from ckptmgr.journal import database, declared, seal, writing
from ckptmgr.journal.questions import schema_mismatch


def script_location() -> str:
    """Where the migrations lie: in the wheel, or live in the checkout of an editable installation."""
    return str(resources.files("ckptmgr.migrations"))


def backup_path(path: Path) -> Path:
    """Where the journal *path* is copied to before it is upgraded: ``NAME.before-0002``."""
    return path.with_name(f"{path.name}.before-{declared.REVISION}")


def upgrade(path: Path, *, create: bool = False, file_mode: int | None = None) -> tuple[str | None, str]:
    """
    Run every migration the journal has not had yet. The caller holds the run lock. Rank 0 only.

    An existing journal is first copied to `backup_path`. When this returns, the migrated journal
    is on disk, synced; if it raises, the journal is what it was.

    Args:
        path: The journal.
        create: Create it if there is none.
        file_mode: Its mode then; None leaves it to the umask.

    Returns:
        The revision before (None: created now, or still empty) and after.

    Raises:
        JournalNotFound: There is no journal and *create* is false.
        JournalSchemaMismatch: The journal is newer than this version of ckptmgr.
        JournalCorrupt: The journal is damaged, or a migration would have broken references between tables.
        JournalError: A migration died, or the backup could not be written.
    """
    path = database.plain_path(path)
    if not create and not path.exists():
        raise JournalNotFound(f"there is no journal at {path}", path=str(path))
    if create:
        try:
            durable.ensure_file(path, mode=file_mode)
            durable.sync_directory(path.parent)
        except OSError as error:
            raise JournalError(f"{path} cannot be created: {error}") from error
    with writing.translated(path):
        engine = writing.create_journal_engine(path, "rw", foreign_keys=False)
        with engine.begin() as connection:
            # A second connection, because the revision has to be read before Alembic is known to be needed.
            with contextlib.closing(database.connect(path, "ro")) as reader:
                reader.execute("BEGIN")
                found = database.revision(reader, path)
                if found == declared.REVISION:
                    return found, found
                if found is not None and found > declared.REVISION:
                    raise schema_mismatch(path, found)
                if found is not None:
                    database.require_sound(reader, path, whole=True)
                    if database.is_sealed(found):
                        # What is damaged now would be sealed as it is.
                        database.require_intact(reader, path, seal.all_tables(reader))
                    reader.execute("ROLLBACK")
                    _back_up(reader, path, backup_path(path))
            _run_migrations(path, connection)
            seal.renew(writing.driver(connection))
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
            if broken is not None:
                raise JournalCorrupt(
                    f"{path} cannot be upgraded: a row of {broken[0]} refers to a row of {broken[2]} that is gone",
                    path=str(path),
                    reason="foreign_key_check",
                )
    return found, declared.REVISION


def _run_migrations(path: Path, connection: Any) -> None:
    from alembic import command  # slow to import, and needed only when there is work to do
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()  # no alembic.ini: nothing to ship, nothing to edit
    config.set_main_option("script_location", script_location().replace("%", "%%"))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, declared.REVISION)
    except CommandError as error:
        raise JournalError(f"{path} cannot be upgraded: {error}") from error


def _back_up(source: sqlite3.Connection, path: Path, target: Path) -> None:
    """Copy the journal with SQLite's own backup, in one transaction, synced, for the same users; an older one goes."""
    target = database.plain_path(target)
    try:
        durable.ensure_file(target, mode=stat.S_IMODE(path.stat().st_mode) & 0o666)
        durable.sync_directory(target.parent)
    except OSError as error:
        raise JournalError(f"{target} cannot be created: {error}") from error
    with database.translated(target), contextlib.closing(database.connect(target, "rw", foreign_keys=False)) as copy:
        copy.execute("PRAGMA journal_mode=DELETE").close()
        copy.execute("PRAGMA synchronous=EXTRA").close()
        source.backup(copy)
