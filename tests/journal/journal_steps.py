"""Walking a journal through the states by hand, looking at all of it, and processes that die."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sqlite3
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckptmgr.journal import Journal, seal
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, Format, RetirementMark
from ckptmgr.manifest import FileEntry

S = CheckpointState
WALK = (S.PREWRITTEN, S.WRITING, S.GATHERED, S.COMMITTED)
FILES = (
    FileEntry("__0_0.distcp", 100, "xxh3_128:" + "0" * 32, 0),
    FileEntry("__1_0.distcp", 200, "xxh3_128:" + "1" * 32, 1),
)


class Steps:
    """A manager's moves on a journal, without a manager."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.who = {"host": "node-1", "pid": 4242}
        self.epoch = journal.begin_epoch(**self.who, command="test", versions={"ckptmgr": "0"})

    def begin(self, step: int, series: str = "checkpoint", **facts: Any) -> CheckpointRecord:
        return self.journal.begin(
            series=series, step=step, **{"format": Format.DCP, "epoch": self.epoch, "world_size": 2} | self.who | facts
        )

    def move(self, record: CheckpointRecord, source: S, dest: S, **facts: Any) -> CheckpointRecord:
        if dest is S.GATHERED:
            facts = {"manifest_digest": f"digest of {record.id}", "files": FILES} | facts
        return self.journal.advance(record.id, source, dest, **{"epoch": self.epoch} | self.who | facts)

    def to(self, dest: S, step: int, series: str = "checkpoint", **facts: Any) -> CheckpointRecord:
        """A new attempt, taken from state to state up to *dest*."""
        record = self.begin(step, series, **facts)
        if dest is S.FAILED:
            return self.move(record, S.PREWRITTEN, S.FAILED, reason="it was to fail")
        for source, following in itertools.pairwise(WALK):
            if record.state is dest:
                break
            record = self.move(record, source, following)
        return record

    def commit(self, step: int, series: str = "checkpoint", **facts: Any) -> CheckpointRecord:
        return self.to(S.COMMITTED, step, series, **facts)

    def retired(self, step: int) -> CheckpointRecord:
        record = self.commit(step)
        self.journal.mark_retiring([RetirementMark(record.id, "no rule keeps it")], epoch=self.epoch)
        return self.journal.checkpoint(record.id)


def contents(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, without times, the name of the last transaction and what depends on them."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        if seal.is_there(connection):
            assert [why for table in seal.all_tables(connection) if (why := seal.broken(connection, table))] == []
        result = {}
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'").fetchall():
            cursor = connection.execute(f"SELECT * FROM {table}")
            names = [column[0] for column in cursor.description]
            volatile = {i for i, name in enumerate(names) if name == "at" or name.endswith("_at")} | {
                i for i, name in enumerate(names) if name == "last_change" or (table, name) == ("seal", "digest")
            }
            # That a time is set matters, which time it is does not.
            result[table] = sorted(
                (tuple((v is not None) if i in volatile else v for i, v in enumerate(row)) for row in cursor), key=repr
            )
        return result


def in_child(work: Callable[[], None]) -> int:
    """Run *work* in a forked child; returns its exit status: 0 fine, 1 it raised, -N killed by signal N."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on, about forks of processes with threads
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


CRASHED = 73
XFSZ = -signal.SIGXFSZ
