"""What the tests of several ranks do again and again: a manager with short timeouts, hearing of a failure."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from rank_processes import Here

from ckptmgr import DCP, CheckpointManager, HuggingFace, SaveFailed, Series, Timeouts, WriterOptions
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState
from ckptmgr.writers.process import WriterProcess


def timeouts(**changes: float) -> Timeouts:
    """Timeouts of a test: long enough for a busy machine, short enough to see one pass."""
    usual: dict[str, float] = {
        "setup_s": 30, "write_s": 20, "gather_s": 5, "collective_s": 20, "close_s": 20, "close_on_error_s": 10,
    }  # fmt: skip
    return Timeouts(**{**usual, **changes})


def manager_on(here: Here, *, wait: Timeouts | None = None, **options: Any) -> CheckpointManager:
    """The manager of the test's run on this rank, with a DCP and a Hugging Face series unless told otherwise."""
    options.setdefault("series", [Series("checkpoint", DCP()), Series("hf", HuggingFace())])
    options.setdefault("writers", WriterOptions(nice=0))
    return CheckpointManager(here.run_dir, timeouts=wait or timeouts(), **options)


def save_two(here: Here, state_of: Callable[[Here, int], dict[str, Any]]) -> None:
    """Commit steps 1 and 2 of the run and close; called on all ranks."""
    with manager_on(here) as manager:
        for step in (1, 2):
            pending = manager.save(step, state_of(here, step))
            assert pending is not None
            pending.wait()


def poll_until_failure(here: Here, manager: CheckpointManager, limit_s: float = 20.0) -> tuple[int, SaveFailed]:
    """Train on, polling at a pace that differs by rank; returns at which poll the failure was heard, and it."""
    deadline = time.monotonic() + limit_s
    for count in itertools.count(1):
        try:
            manager.poll()
        except SaveFailed as failure:
            return count, failure
        assert time.monotonic() < deadline, f"rank {here.rank} never heard of the failed save"
        time.sleep(0.01 + 0.004 * here.rank)
    raise AssertionError


def waits_for_its_writer() -> threading.Event:
    """
    Is set once this rank has been told to write and is giving its writer process something to do.

    Asked for when the writer is idle, before the save. A rank that is stopped earlier only begins late.
    """
    waits = threading.Event()
    real = WriterProcess._within

    def within(writer: WriterProcess, timeout_s: float) -> AbstractContextManager[None]:
        waits.set()
        return real(writer, timeout_s)

    WriterProcess._within = within
    return waits


def hear_alike(here: Here, manager: CheckpointManager) -> SaveFailed:
    """Every rank hears of the same failure, at the same poll."""
    count, failure = poll_until_failure(here, manager)
    told = here.everyone(f"failure-{next(_number)}", [
        count, failure.series, failure.step, [[f.rank, f.host, f.cause, f.silent] for f in failure.failures]
    ])  # fmt: skip
    assert all(row[1:] == told[0][1:] for row in told), f"the ranks heard different failures: {told}"
    assert all(row[0] == told[0][0] for row in told), f"the ranks heard at different polls: {told}"
    return failure


_number = itertools.count()


def journal_records(here: Here) -> list[CheckpointRecord]:
    """Every row of the journal, read as the command line reads it."""
    with Journal.open_read_only(here.run_dir.with_name("run.journal.db")) as journal:
        return journal.checkpoints()


def rows(here: Here) -> dict[int, CheckpointRecord]:
    """The newest row of each step in the journal."""
    return {record.step: record for record in journal_records(here)}


def assert_failed(record: CheckpointRecord, rank: int, cause: str, host: str) -> None:
    """The row says FAILED, and which rank on which host, and why."""
    assert record.state is CheckpointState.FAILED
    assert record.failures, "the row names no rank"
    (failure,) = record.failures
    assert (failure["rank"], failure["host"]) == (rank, host)
    assert cause in failure["cause"]
    assert record.reason is not None
    assert f"rank {rank} on {host}" in record.reason
