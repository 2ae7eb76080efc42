"""A run with a long past, and how much of it SQLite looks at: counted in steps of its virtual machine, not in time."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ckptmgr.journal import Journal, database
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, Format, RetirementMark
from ckptmgr.manifest import FileEntry, Manifest


def add_past(path: Path, number: int, series: str, layout: Format) -> None:
    """Enter *number* attempts that are gone, every other one FAILED, as a run that saved for long has them."""
    who: dict[str, Any] = {"host": "h", "pid": 1}
    with Journal.open(path) as journal:
        epoch = journal.begin_epoch(**who, command="the past", versions={})
        committed = []
        for step in range(number):
            if step % 2:
                record = journal.begin(series=series, step=step, format=layout, epoch=epoch, world_size=1, **who)
                states = CheckpointState.PREWRITTEN, CheckpointState.FAILED
                journal.advance(record.id, *states, epoch=epoch, **who, reason="it was to fail")
                continue
            committed.append(_committed(journal, series, step, layout, epoch))
        journal.mark_retiring([RetirementMark(record.id, "no rule keeps it") for record in committed], epoch=epoch)
        for record in committed:
            journal.finish_retirement(record.id, epoch=epoch)
        journal.end_epoch(epoch)


def add_live(path: Path, number: int, series: str, layout: Format) -> None:
    """Enter *number* checkpoints that are COMMITTED, and of which nothing is on disk."""
    with Journal.open(path) as journal:
        epoch = journal.begin_epoch(host="h", pid=1, command="the past", versions={})
        for step in range(number):
            _committed(journal, series, step, layout, epoch)
        journal.end_epoch(epoch)


def _committed(journal: Journal, series: str, step: int, layout: Format, epoch: int) -> CheckpointRecord:
    manifest = Manifest(
        run_id=journal.run_id, series=series, step=step, attempt=0, epoch=epoch, format=layout, world_size=1,
        created_at=0.0, files=(FileEntry("a", 1, "xxh3_128:" + "0" * 32, 0),), per_rank=(), metrics={}, versions={},
    )  # fmt: skip
    return journal.insert_rebuilt(manifest, epoch=epoch, manifest_digest="digest", committed_at=1.0, host="h", pid=1)


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """
    Journals opened in this block count their steps; gives a function: how many since it was last called.

    SQLite has one such counter for a connection, and the product's limit would take its place.
    """
    real, limit = database.connect, database.limit_steps
    steps = 0

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection = real(*args, **kwargs)

        def count() -> int:
            nonlocal steps
            steps += 1
            return 0

        connection.set_progress_handler(count, 1)
        return connection

    def since() -> int:
        nonlocal steps
        found, steps = steps, 0
        return found

    database.connect, database.limit_steps = connect, lambda *_: None
    try:
        yield since
    finally:
        database.connect, database.limit_steps = real, limit
