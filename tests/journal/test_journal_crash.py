"""
The journal after a process died, or a COMMIT failed, at every point of a transaction: old or new, never between.

Nothing in the product knows of these tests. A child dies in one of two ways: it exits hard before
the n-th statement (SQLite's own trace callback), or the kernel kills it in the middle of a write
that would make a file longer than a limit (SIGXFSZ), which reaches into COMMIT itself.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from journal_steps import CRASHED, XFSZ, S, Steps, contents, in_child

from ckptmgr.errors import JournalError
from ckptmgr.journal import Journal, database
from ckptmgr.lifecycle import RetirementMark
from ckptmgr.manifest import FileEntry

#: Few statements, but more than one page each.
BIG_FILES = [FileEntry(f"{n}" * 3000, n, "xxh3_128:" + "0" * 32, n) for n in range(1, 9)]


def resumed(journal: Journal) -> Steps:
    """The same manager's hands on a journal that was opened again."""
    steps = object.__new__(Steps)
    steps.journal, steps.epoch, steps.who = journal, journal.current_epoch(), {"host": "node-1", "pid": 4242}
    return steps


def begin(steps: Steps) -> None:
    steps.begin(2, overwrite=True, note="n" * 9000)


def start_writing(steps: Steps) -> None:
    steps.move(steps.journal.find("a", 9), S.PREWRITTEN, S.WRITING, stage_s=1.0)


def gather(steps: Steps) -> None:
    steps.move(steps.journal.find("b", 9), S.WRITING, S.GATHERED, files=BIG_FILES, bytes=1)


def commit(steps: Steps) -> None:
    steps.move(
        steps.journal.checkpoints(series="c")[-1],
        S.GATHERED,
        S.COMMITTED,
        retire=[RetirementMark(steps.journal.find("checkpoint", 1).id, "not kept")],
        decisions=[(steps.journal.find("checkpoint", 1).id, "drop", ("not kept",) * 1000)],
    )


def fail(steps: Steps) -> None:
    steps.move(steps.journal.find("a", 9), S.PREWRITTEN, S.FAILED, reason="r" * 9000)


def begin_epoch(steps: Steps) -> None:
    steps.journal.begin_epoch(host="h" * 9000, pid=1, command="c", versions={})


def mark_retiring(steps: Steps) -> None:
    steps.journal.mark_retiring(
        [RetirementMark(steps.journal.find("checkpoint", step).id, "r" * 5000) for step in (1, 2)], epoch=steps.epoch
    )


def pin(steps: Steps) -> None:
    steps.journal.pin("checkpoint", 1, note="p" * 9000)


CHANGES = [begin, start_writing, gather, commit, fail, begin_epoch, mark_retiring, pin]


@pytest.fixture
def template(steps, tmp_path) -> Path:
    """A closed journal with a row in each state in flight, and two committed ones."""
    steps.commit(1)
    steps.commit(2)
    steps.commit(10, "c")
    steps.to(S.PREWRITTEN, 9, "a")
    steps.to(S.WRITING, 9, "b")
    record = steps.begin(10, "c", overwrite=True)
    for source, dest in ((S.PREWRITTEN, S.WRITING), (S.WRITING, S.GATHERED)):
        steps.move(record, source, dest)
    steps.journal.close()
    return steps.journal.path


def copy(template: Path, to: Path) -> Path:
    to.parent.mkdir()
    shutil.copyfile(template, to)
    # The rollback journal of an orderly end is empty, and persists.
    shutil.copyfile(f"{template}-journal", f"{to}-journal")
    return to


def done_in_full(template: Path, change: Callable[[Steps], None], folder: Path) -> dict:
    path = copy(template, folder / "whole" / "alpha.journal.db")
    with Journal.open(path) as journal:
        change(resumed(journal))
    return contents(path)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_death_before_any_statement_leaves_old_or_new(template, tmp_path, change):
    old, new = contents(template), done_in_full(template, change, tmp_path)
    assert old != new
    outcomes = []
    for n in range(1, 200):
        path = copy(template, tmp_path / f"{n}" / "alpha.journal.db")

        def work(path: Path = path, n: int = n) -> None:
            steps = resumed(Journal.open(path))
            asked = 0

            def count(_statement: str) -> None:
                nonlocal asked
                asked += 1
                if asked == n:
                    os._exit(CRASHED)

            steps.journal._database._connection.connection.dbapi_connection.set_trace_callback(count)
            change(steps)

        status = in_child(work)
        assert status in (CRASHED, 0)
        with Journal.open(path) as journal:
            assert journal.checkpoints()
        after = contents(path)
        assert after in (old, new)
        outcomes.append(after == new)
        if status == 0:
            break
        # What is not done can be done now.
        if after == old:
            with Journal.open(path) as journal:
                change(resumed(journal))
            assert contents(path) == new

    assert outcomes[-1], "the last child was never killed"
    assert outcomes == sorted(outcomes)
    assert outcomes.count(False) >= 5


def killed_at(limit: int, path: Path, change: Callable[[Steps], None]) -> int:
    def work() -> None:
        steps = resumed(Journal.open(path))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        change(steps)

    return in_child(work)


def left_unfinished(path: Path) -> bool:
    """Whether the rollback journal begins as SQLite's file format says of one that must be played back."""
    with Path(f"{path}-journal").open("rb") as stream:
        return stream.read(8) == bytes.fromhex("d9d505f920a163d7")


@pytest.mark.parametrize("change", [begin, gather, commit, fail], ids=lambda change: change.__name__)
def test_death_in_the_middle_of_a_commit_leaves_old_or_new(template, tmp_path, change):
    old, new = contents(template), done_in_full(template, change, tmp_path)
    killed = unfinished = 0
    for limit in range(0, template.stat().st_size + 20 * 4096, 4096):
        path = copy(template, tmp_path / f"{limit}" / "alpha.journal.db")
        status = killed_at(limit, path, change)
        assert status in (XFSZ, 0)
        killed += status == XFSZ
        if left_unfinished(path):
            unfinished += 1
            with pytest.raises(JournalError, match="unfinished transaction") as caught:
                Journal.open_read_only(path)
            assert "ckptmgr recover RUN --apply" in caught.value.hint
        else:
            Journal.open_read_only(path).close()
        with Journal.open(path) as journal:
            assert journal.checkpoints()
        with Journal.open_read_only(path) as reader:
            assert reader.checkpoints()
        assert contents(path) == (new if status == 0 else old)

    assert killed > 5
    assert unfinished > 0, "no child died with the database half written"


def test_reading_an_unfinished_transaction_changes_nothing(template, tmp_path):
    path = copy(template, tmp_path / "hot" / "alpha.journal.db")
    assert killed_at(template.stat().st_size, path, gather) == XFSZ
    before = {name: name.read_bytes() for name in path.parent.iterdir()}
    with pytest.raises(JournalError, match="unfinished transaction"):
        Journal.open_read_only(path)

    assert {name: name.read_bytes() for name in path.parent.iterdir()} == before


@pytest.mark.parametrize("change", [begin, gather, commit, fail], ids=lambda change: change.__name__)
def test_a_commit_that_fails_for_want_of_space_changes_nothing_and_the_next_one_works(template, tmp_path, change):
    old, new = contents(template), done_in_full(template, change, tmp_path)
    path = copy(template, tmp_path / "full" / "alpha.journal.db")

    def work() -> None:
        steps = resumed(Journal.open(path))
        before = (steps.journal.checkpoints(), steps.journal.transitions())
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, resource.RLIM_INFINITY))
        with pytest.raises(JournalError, match="nothing was changed") as caught:
            change(steps)
        assert caught.value.__cause__ is not None
        assert (steps.journal.checkpoints(), steps.journal.transitions()) == before
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        shutil.copyfile(path, path.with_name("between.db"))  # this child has no open transaction
        change(steps)
        steps.journal.close()

    assert in_child(work) == 0
    assert contents(path.with_name("between.db")) == old
    assert contents(path) == new


def test_a_reader_that_holds_up_a_commit_too_long_makes_it_fail_and_change_nothing(template, monkeypatch):
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 100)
    with (
        Journal.open(template) as journal,
        contextlib.closing(sqlite3.connect(template, isolation_level=None)) as reader,
    ):
        steps = resumed(journal)
        before = journal.checkpoints()
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM checkpoint").fetchall()
        with pytest.raises(JournalError, match="nothing was changed"):
            start_writing(steps)
        assert journal.checkpoints() == before
        reader.execute("ROLLBACK")
        start_writing(steps)

        assert journal.find("a", 9).state is S.WRITING


class Liar(sqlite3.Connection):
    """A real connection whose COMMIT says it failed, once, before or after it was done."""

    lie: str | None = None
    meanwhile: Callable[[], None] | None = None

    def commit(self) -> None:
        lie, Liar.lie = (Liar.lie, None) if self.in_transaction and self.total_changes else (None, Liar.lie)
        if lie == "before":
            raise sqlite3.OperationalError("disk I/O error")
        super().commit()
        if lie == "after":
            if Liar.meanwhile is not None:
                meanwhile, Liar.meanwhile = Liar.meanwhile, None
                meanwhile()
            raise sqlite3.OperationalError("disk I/O error")


@pytest.fixture
def lying_journal(template, monkeypatch):
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, **kwargs | {"factory": Liar}))
    monkeypatch.setattr(Liar, "lie", None)
    with Journal.open(template) as journal:
        yield journal


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_commit_that_reports_failure_but_was_done_counts(lying_journal, template, tmp_path, change):
    new = done_in_full(template, change, tmp_path)
    Liar.lie = "after"
    change(resumed(lying_journal))

    assert Liar.lie is None
    lying_journal.close()
    assert contents(template) == new


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_commit_that_reports_failure_and_was_not_done_is_an_error(lying_journal, template, tmp_path, change):
    old, new = contents(template), done_in_full(template, change, tmp_path)
    Liar.lie = "before"
    with pytest.raises(JournalError, match="nothing was changed"):
        change(resumed(lying_journal))

    assert contents(template) == old
    change(resumed(lying_journal))
    lying_journal.close()
    assert contents(template) == new


def test_a_commit_nobody_can_judge_says_so(lying_journal, template):
    """Between the failed COMMIT and the look at the journal, another process wrote."""

    def take_over() -> None:
        with contextlib.closing(sqlite3.connect(template)) as other:
            other.execute("UPDATE run SET last_change = 'somebody else'")
            other.commit()

    Liar.meanwhile = take_over
    Liar.lie = "after"
    with pytest.raises(JournalError, match="another process wrote since"):
        start_writing(resumed(lying_journal))


def test_a_journal_that_is_gone_after_a_failed_commit_is_not_known(lying_journal, template):
    Liar.meanwhile = template.unlink
    Liar.lie = "after"
    with pytest.raises(JournalError, match="is not known"):
        start_writing(resumed(lying_journal))


def test_an_error_inside_a_transaction_rolls_back(steps):
    before = steps.journal.run_id

    def interrupted() -> None:
        with steps.journal._database.writing() as connection:
            connection.exec_driver_sql("UPDATE run SET run_id = 'half'")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert steps.begin(1).id == 1
    with Journal.open_read_only(steps.journal.path) as reader:
        assert reader.run_id == before
