"""What a journal says is what was written: a row that was changed behind our back, or is gone, is damage."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from journal_steps import FILES, S, Steps, contents

from ckptmgr.errors import JournalCorrupt, JournalError, JournalSchemaMismatch
from ckptmgr.journal import Journal, database, declared, schema, seal, upgrade
from ckptmgr.lifecycle import RetirementMark

TABLES = sorted(set(schema.metadata.tables) - {"seal"})
COLUMNS = [f"{table.name}.{column.name}" for table in schema.metadata.sorted_tables for column in table.columns]


@pytest.fixture(scope="module")
def template(fresh_journal: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full") / "alpha.journal.db"
    shutil.copyfile(fresh_journal, path)
    steps = Steps(Journal.open(path))
    first = steps.commit(1, metrics={"loss": 0.5}, per_rank=["loader"])
    second = steps.commit(2)
    steps.to(S.FAILED, 3)
    third = steps.to(S.GATHERED, 4)
    steps.move(third, S.GATHERED, S.COMMITTED, decisions=[(first.id, "keep", ("last 3",))])
    steps.journal.pin("checkpoint", 1, note="mine")
    steps.journal.record_verification(first.id, level="digest", ok=True, mismatches=())
    steps.journal.mark_retiring([RetirementMark(second.id, "no rule keeps it")], epoch=steps.epoch)
    steps.journal.close()
    return path


@pytest.fixture
def full(template: Path, journal_path: Path) -> Path:
    """A closed journal with rows in every table."""
    for path in template.parent.iterdir():
        shutil.copyfile(path, journal_path.with_name(path.name))
    return journal_path


@contextlib.contextmanager
def without_rules(path: Path) -> Iterator[sqlite3.Connection]:
    """The file as a flipped bit has it: no CHECK, no trigger, no reference is asked."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("PRAGMA journal_mode=MEMORY")
        connection.execute("PRAGMA ignore_check_constraints=ON")
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        yield connection
        for _, text in triggers:
            connection.execute(text)


def everything(path: Path) -> None:
    """Ask a journal for all that it has."""
    with Journal.open_read_only(path) as journal:
        journal.epochs()
        journal.transitions()
        journal.decisions()
        for record in journal.checkpoints():
            journal.files(record.id)
            journal.verifications(record.id)
            journal.transitions(record.id)


def test_an_untouched_journal_says_everything(full):
    everything(full)
    Journal.open(full).close()


@pytest.mark.parametrize("text", ['], ["checkpoint", ', '"], ["checkpoint", "', '\\], ["checkpoint", ', "]]", "\n", ""])
def test_rows_are_told_apart_whatever_stands_in_them(journal_path, text):
    """They are made JSON together, and divided at what no text in them can look like."""
    with Journal.open(journal_path) as journal:
        steps = Steps(journal)
        for step in (1, 2, 3):
            steps.move(steps.to(S.WRITING, step), S.WRITING, S.FAILED, reason=text)

    everything(journal_path)
    with Journal.open_read_only(journal_path) as journal:
        assert [record.reason for record in journal.checkpoints()] == [text] * 3


@pytest.mark.parametrize("where", COLUMNS)
def test_another_value_in_any_column_is_found(full, where):
    table, _, column = where.partition(".")
    with without_rules(full) as raw:
        key = "rowid" if table not in ("file", "pin", "seal") else column
        among = f" WHERE name <> '{seal.OUTLINE}'" if table == "seal" else ""  # which decides nothing: see below
        row = f"{key} = (SELECT max({key}) FROM {table}{among})"
        if where == "file.checkpoint_id":
            row += " AND path = '__0_0.distcp'"
        other = f"CASE WHEN typeof({column}) = 'text' THEN {column} || '~' ELSE coalesce({column}, 0) + 1000 END"
        raw.execute(f"UPDATE {table} SET {column} = {other} WHERE {row}")
        assert raw.execute("SELECT changes()").fetchone() > (0,)
    with pytest.raises(JournalCorrupt) as caught:
        everything(full)

    assert str(full) in str(caught.value)
    assert "--rebuild" in caught.value.hint


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("change", ["one row gone", "all rows gone", "one row more"])
def test_rows_that_come_or_go_are_found(full, table, change):
    with without_rules(full) as raw:
        names = [row[1] for row in raw.execute(f"PRAGMA table_info({table})")]
        if change == "one row gone":
            key = "rowid" if table not in ("file", "pin") else "series" if table == "pin" else "path"
            raw.execute(f"DELETE FROM {table} WHERE {key} = (SELECT max({key}) FROM {table})")
        elif change == "all rows gone":
            raw.execute(f"DELETE FROM {table}")
        else:
            new = {"id": 1000, "path": "'more'", "step": 1000, "commit_seq": 1000, "staging_directory": "'more'"}
            new |= {"epoch": {"epoch": 1000}, "retirement_decision": {"checkpoint_id": 1000}}.get(table, {})
            values = [str(new.get(name, name)) for name in names]
            raw.execute(f"INSERT INTO {table} SELECT {', '.join(values)} FROM {table} LIMIT 1")
    with pytest.raises(JournalCorrupt):
        everything(full)


@pytest.mark.parametrize(
    "change",
    [
        "DROP TRIGGER checkpoint_is_not_deleted",
        "DROP INDEX one_live_per_step",
        "CREATE TRIGGER mine AFTER INSERT ON pin BEGIN SELECT 1; END",
        "CREATE TABLE mine (name)",
    ],
)
def test_a_changed_schema_is_found(full, change):
    with contextlib.closing(sqlite3.connect(full, isolation_level=None)) as raw:
        raw.execute(change)
    with pytest.raises(JournalCorrupt, match="the schema"):
        everything(full)


def lose_row_of_index(path: Path, name: str, where: str) -> None:
    with without_rules(path) as raw:
        raw.execute("PRAGMA writable_schema=ON")
        (index,) = raw.execute("SELECT sql FROM sqlite_master WHERE name = ?", (name,)).fetchone()
        raw.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (f"{index} WHERE {where}", name))
    with without_rules(path) as raw:
        raw.execute(f"REINDEX {name}")
        raw.execute("PRAGMA writable_schema=ON")
        raw.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (index, name))


def test_an_index_that_has_lost_a_row_is_found_by_readers_too(full):
    lose_row_of_index(full, "checkpoint_by_step", "step > 1")
    with pytest.raises(JournalCorrupt, match="checkpoint_by_step"):
        Journal.open_read_only(full)


def test_what_does_not_decide_is_looked_through_only_if_the_whole_is_asked_for(full, tmp_path):
    Journal.open_read_only(full, whole=True).close()
    index = shutil.copyfile(full, tmp_path / "index.journal.db")
    lose_row_of_index(index, "verification_by_checkpoint", "checkpoint_id > 1")
    with without_rules(full) as raw:
        raw.execute("UPDATE verification SET ok = 0")
    for path in (full, index):
        Journal.open_read_only(path).close()
        with pytest.raises(JournalCorrupt, match="verification"):
            Journal.open_read_only(path, whole=True)


#: By what questions choose among attempts.
CHOSEN_BY = {
    "id": "99", "series": "'hf'", "step": "99", "format": "'hf'", "state": "'FAILED'", "directory": "'x/step-1'",
    "staging_directory": "'x'", "commit_seq": "99", "retire_started_at": "1.5", "retired_at": "1.5",
}  # fmt: skip


@pytest.mark.parametrize("column", CHOSEN_BY)
def test_a_reader_finds_at_once_what_makes_it_choose_another_attempt(full, column):
    with without_rules(full) as raw:
        raw.execute("PRAGMA foreign_keys=OFF")
        raw.execute(f"UPDATE checkpoint SET {column} = {CHOSEN_BY[column]} WHERE id = 4")
    with pytest.raises(JournalCorrupt, match="table checkpoint, checkpoint"):
        Journal.open_read_only(full)


def test_what_else_an_attempt_says_a_reader_compares_when_it_reads_it(full):
    with without_rules(full) as raw:
        raw.execute("UPDATE checkpoint SET world_size = world_size + 1 WHERE id = 1")
        raw.execute("UPDATE retirement_decision SET reasons = '[]'")
    with Journal.open_read_only(full) as journal:
        assert [record.id for record in journal.newest("checkpoint", 1)] == [4]
        assert journal.find("checkpoint", 4).world_size == journal.checkpoint(4).world_size
        for read in (
            lambda: journal.checkpoint(1),
            journal.checkpoints,
            lambda: journal.newest("checkpoint", 2),
            lambda: journal.present("checkpoint"),
            journal.standing,
            lambda: journal.of_step("checkpoint", 1),
            lambda: journal.find("checkpoint", 1),
            lambda: journal.traced([1], [], []),
        ):
            with pytest.raises(JournalCorrupt, match="table checkpoint, checkpoint 1,"):
                read()
        for read in (journal.decisions, lambda: journal.decisions([4]), lambda: journal.decision_on(4)):
            with pytest.raises(JournalCorrupt, match="table retirement_decision"):
                read()
    for opening in (Journal.open, lambda path: Journal.open_read_only(path, whole=True)):
        with pytest.raises(JournalCorrupt, match="table checkpoint, checkpoint 1,"):
            opening(full)


@pytest.mark.parametrize("change", ["digest = '0' || substr(digest, 2, 30) || 'x'", "rows = rows + 1", "gone"])
def test_where_the_outline_is_damaged_or_not_there_everything_is_compared(full, change):
    with without_rules(full) as raw:
        outline = f"WHERE name = '{seal.OUTLINE}'"
        raw.execute(f"DELETE FROM seal {outline}" if change == "gone" else f"UPDATE seal SET {change} {outline}")
        assert raw.execute("SELECT changes()").fetchone() == (1,)
    everything(full)
    before = shutil.copyfile(full, full.with_name("before.journal.db"))
    Journal.open(full).close()
    for path in (before, full):
        with without_rules(path) as raw:
            raw.execute("UPDATE checkpoint SET world_size = world_size + 1 WHERE id = 1")

    # Drawn again by whoever could, and had compared it all.
    Journal.open_read_only(full).close()
    with pytest.raises(JournalCorrupt, match="table checkpoint, checkpoint 1,"):
        Journal.open_read_only(before)


def test_a_journal_opens_also_where_its_outline_cannot_be_drawn(full, monkeypatch):
    with without_rules(full) as raw:
        raw.execute(f"DELETE FROM seal WHERE name = '{seal.OUTLINE}'")

    def full_disk(_: sqlite3.Connection) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(seal, "draw", full_disk)
    with Journal.open(full) as journal:
        Steps(journal).commit(20)
    everything(full)


def test_damage_is_not_laundered_by_the_next_change(full):
    with Journal.open(full) as journal:
        with without_rules(full) as raw:
            raw.execute("UPDATE checkpoint SET created_at = created_at + 1 WHERE id = 4")
        journal.mark_retiring([RetirementMark(4, "no rule keeps it")], epoch=journal.current_epoch())
        journal.finish_retirement(4, epoch=journal.current_epoch())
        with pytest.raises(JournalCorrupt, match="table checkpoint, checkpoint 4,"):
            journal.require_intact()
        with pytest.raises(JournalCorrupt, match="table checkpoint, checkpoint 4,"):
            journal.require_intact([1, 4])
        journal.require_intact([1, 2, 3])
    with pytest.raises(JournalCorrupt, match="table checkpoint"):
        Journal.open(full)


@pytest.mark.parametrize("found", ["0000", "0003", "0006", "1002", "00"])
def test_a_damaged_revision_is_no_other_version(full, found):
    with without_rules(full) as raw:
        raw.execute("UPDATE alembic_version SET version_num = ?", (found,))
    for opening in (Journal.open, Journal.open_read_only, upgrade.upgrade):
        with pytest.raises(JournalCorrupt, match="alembic_version"):
            opening(full)


def test_a_damaged_mark_in_the_header_is_no_other_program(full):
    with full.open("r+b") as stream:
        stream.seek(68)
        stream.write(b"cjpt")
    for opening in (Journal.open, Journal.open_read_only):
        with pytest.raises(JournalCorrupt, match="header"):
            opening(full)


def test_a_lost_seal_is_damage(full):
    with without_rules(full) as raw:
        raw.execute("DROP TABLE seal")
    with pytest.raises(JournalCorrupt, match="no seal"):
        Journal.open_read_only(full)


def test_a_damaged_journal_is_not_upgraded(full, monkeypatch):
    with without_rules(full) as raw:
        raw.execute("UPDATE file SET size = 7 WHERE path = '__1_0.distcp'")
    before = full.read_bytes()
    monkeypatch.setattr(declared, "REVISION", "0009")
    with pytest.raises(JournalCorrupt, match="table file, checkpoint 1,"):
        upgrade.upgrade(full)

    assert full.read_bytes() == before


def test_a_journal_without_a_seal_is_sealed_as_it_is_when_it_is_upgraded(journal_path):
    shutil.copyfile(Path(__file__).parent / "released" / "0001.db", journal_path)
    with pytest.raises(JournalSchemaMismatch):
        Journal.open_read_only(journal_path)
    Journal.open(journal_path).close()

    everything(journal_path)
    with contextlib.closing(sqlite3.connect(journal_path)) as connection:
        assert seal.is_there(connection)
    contents(journal_path)


def changes(steps: Steps) -> list[Callable[[], object]]:
    """One of every change that a journal knows."""
    journal, epoch = steps.journal, steps.epoch
    return [
        lambda: steps.commit(10),
        lambda: steps.commit(10, overwrite=True),
        lambda: steps.to(S.FAILED, 11),
        lambda: journal.pin("checkpoint", 1, note="again"),
        lambda: journal.unpin("checkpoint", 1),
        lambda: journal.record_verification(1, level="size", ok=False, mismatches=["size: x"]),
        lambda: journal.mark_retiring([RetirementMark(1, "x")], epoch=epoch),
        lambda: journal.finish_retirement(1, epoch=epoch),
        lambda: steps.move(
            steps.to(S.GATHERED, 12), S.GATHERED, S.COMMITTED, decisions=[(4, "keep", ("a",)), (4, "drop", ("b",))]
        ),
        lambda: steps.to(S.WRITING, 13),
        lambda: journal.end_epoch(epoch),
        lambda: Steps(journal),
        lambda: journal.adopt(journal.find("checkpoint", 13).id, epoch=journal.current_epoch()),
    ]


def test_the_seal_follows_every_change(full):
    with Journal.open(full) as journal:
        for change in changes(Steps(journal)):
            change()
            everything(full)
            assert journal.files(1) == list(FILES)
            with contextlib.closing(sqlite3.connect(full)) as connection:
                assert seal.broken(connection, seal.OUTLINE) is None


@pytest.mark.parametrize("opening", [Journal.open, Journal.open_read_only])
def test_an_interrupt_in_the_middle_of_a_question_keeps_nothing_locked_while_it_is_handled(full, monkeypatch, opening):
    def struck(*_, **__):
        raise KeyboardInterrupt

    with opening(full) as asked:
        monkeypatch.setattr("ckptmgr.journal.questions.zip", struck, raising=False)
        try:
            asked.checkpoints()
        except KeyboardInterrupt:
            with contextlib.closing(database.connect(full, "rw", busy_timeout_ms=100)) as other:
                other.execute("BEGIN IMMEDIATE").close()
                other.execute("UPDATE run SET last_change = 'mine'").close()
                other.execute("COMMIT").close()
        else:
            pytest.fail("it was not interrupted")


# One that comes while Python calls back about an object that is gone is lost, and pytest says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_at_any_moment_neither_damage_the_journal_nor_keep_it_locked(full):
    """Ctrl-C, or SIGTERM where it raises: it may come in the middle of a statement, a commit or an opening."""
    chance = random.Random(7)
    main, interrupted = threading.main_thread().ident, 0
    assert main is not None

    def strike() -> None:
        time.sleep(chance.uniform(0.0005, 0.01))
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with Journal.open(full) as journal:
            for _ in range(100):
                striker = threading.Thread(target=strike)
                try:
                    striker.start()
                    try:
                        journal.end_epoch(journal.begin_epoch(host="h", pid=1, command="c", versions={}))
                    finally:
                        striker.join()
                        time.sleep(0)
                except KeyboardInterrupt:
                    interrupted += 1
            assert interrupted > 10
            journal.begin_epoch(host="h", pid=1, command="c", versions={})
    finally:
        signal.signal(signal.SIGUSR1, before)
    everything(full)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, KeyError])
def test_what_is_raised_while_sqlite_calls_us_is_told_and_changes_nothing(full, monkeypatch, raised):
    """SQLite drops it, and says only that something was raised."""

    def struck(*_):
        raise raised("now")

    with Journal.open(full) as journal, monkeypatch.context() as patch:
        patch.setattr(seal, "_digest", struck)
        with pytest.raises(raised):
            journal.pin("checkpoint", 1, note="again")
    everything(full)


def test_an_interrupt_before_our_first_line_is_one_too(full, monkeypatch):
    def struck(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(seal.Seal, "_follow", struck)
    with Journal.open(full) as journal, pytest.raises(KeyboardInterrupt):
        journal.pin("checkpoint", 1, note="again")
    everything(full)


def test_a_change_that_was_rolled_back_is_not_sealed(full):
    with Journal.open(full) as journal:
        steps = Steps(journal)
        with pytest.raises(JournalError):
            journal.mark_retiring([RetirementMark(4, "a"), RetirementMark(1, "pinned")], epoch=steps.epoch)
        steps.commit(20)
    everything(full)


@pytest.mark.parametrize("opening", [Journal.open, Journal.open_read_only])
@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_rollback_journal_that_is_no_file_is_refused_and_not_waited_for(full, opening, kind):
    rollback = full.with_name(f"{full.name}-journal")
    rollback.unlink()
    if kind == "pipe":
        os.mkfifo(rollback)
    elif kind == "link":
        rollback.symlink_to(full)
    else:
        rollback.mkdir()
    with pytest.raises(JournalError, match="-journal is not a file"):
        opening(full)
