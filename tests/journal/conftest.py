"""Real journals in temporary folders."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from journal_steps import Steps

from ckptmgr.journal import Journal


@pytest.fixture
def journal_path(tmp_path: Path) -> Path:
    return tmp_path / "alpha.journal.db"


@pytest.fixture(scope="session")
def fresh_journal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One journal made by the migrations; tests work on copies, because loading Alembic takes a second."""
    path = tmp_path_factory.mktemp("fresh") / "fresh.journal.db"
    Journal.open(path).close()
    return path


@pytest.fixture
def journal(fresh_journal: Path, journal_path: Path) -> Iterator[Journal]:
    shutil.copyfile(fresh_journal, journal_path)
    with Journal.open(journal_path) as opened:
        yield opened


@pytest.fixture
def steps(journal: Journal) -> Steps:
    return Steps(journal)


@pytest.fixture
def raw(journal: Journal) -> Iterator[sqlite3.Connection]:
    """The same file without our code, as a person with the sqlite3 shell has it."""
    with contextlib.closing(sqlite3.connect(journal.path, isolation_level=None, timeout=0.2)) as connection:
        connection.execute("PRAGMA foreign_keys=ON")
        yield connection
