"""What the database itself refuses, whoever asks; and what it can find without reading everything."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3

import pytest
from journal_steps import S

from ckptmgr.journal import schema
from ckptmgr.lifecycle import TRANSITIONS, Format, RetirementMark


@pytest.fixture
def zoo(steps):
    """One row in every state, with files, a retiring one, a pin, a decision and a verification."""
    rows = {state: steps.to(state, 1, f"series-{state}") for state in S}
    rows["retiring"] = steps.retired(1)
    kept = steps.to(S.GATHERED, 2)
    steps.move(kept, S.GATHERED, S.COMMITTED, decisions=[(rows["retiring"].id, "drop", ("not kept",))])
    steps.journal.pin("checkpoint", 2)
    steps.journal.record_verification(kept.id, level="size", ok=True, mismatches=())
    return {name: record.id for name, record in rows.items()}


@pytest.mark.parametrize(
    ("rule", "row", "change"),
    [
        ("format_is_known", S.WRITING, "format = 'zip'"),
        ("series_is_named", S.WRITING, "series = ''"),
        ("step_is_not_negative", S.WRITING, "step = -1"),
        ("step_is_not_negative", S.WRITING, "step = 'many'"),
        ("step_is_not_negative", S.WRITING, "step = 1.5"),
        ("world_size_is_positive", S.WRITING, "world_size = 0"),
        ("world_size_is_positive", S.WRITING, "world_size = 'all'"),
        ("bytes_are_not_negative", S.WRITING, "bytes = -1"),
        ("bytes_are_not_negative", S.WRITING, "bytes = 'big'"),
        ("committed_has_time", S.COMMITTED, "committed_at = NULL"),
        ("committed_has_time", S.WRITING, "committed_at = 1.0"),
        ("committed_has_sequence", S.COMMITTED, "commit_seq = NULL"),
        ("committed_has_sequence", S.FAILED, "commit_seq = 99"),
        ("final_has_finish_time", S.COMMITTED, "finished_at = NULL"),
        ("final_has_finish_time", S.FAILED, "finished_at = NULL"),
        ("final_has_finish_time", S.GATHERED, "finished_at = 1.0"),
        ("gathered_has_manifest_digest", S.GATHERED, "manifest_digest = NULL"),
        ("gathered_has_manifest_digest", S.COMMITTED, "manifest_digest = NULL"),
        ("failed_has_reason", S.FAILED, "reason = NULL"),
        ("retiring_is_committed", S.FAILED, "retire_started_at = 1.0, retire_reason = 'x'"),
        ("retiring_is_committed", S.GATHERED, "retire_started_at = 1.0, retire_reason = 'x'"),
        ("retiring_has_reason", S.COMMITTED, "retire_started_at = 1.0"),
        ("retiring_has_reason", S.COMMITTED, "retire_reason = 'x'"),
        ("retired_was_retiring", S.COMMITTED, "retired_at = 1.0"),
        ("state_moves_legally", S.COMMITTED, "state = 'WRITING'"),
        ("state_moves_legally", S.FAILED, "state = 'PREWRITTEN'"),
        ("state_moves_legally", S.PREWRITTEN, "state = 'COMMITTED', committed_at = 1.0, finished_at = 1.0"),
        ("state_moves_legally", S.PREWRITTEN, "state = 'LOST'"),
        ("checkpoint.commit_seq", S.COMMITTED, "commit_seq = 2"),
        ("FOREIGN KEY", S.WRITING, "epoch = 99"),
        ("FOREIGN KEY", S.WRITING, "overwrites = 99"),
    ],
)
def test_a_checkpoint_row_cannot_be_made_nonsense(zoo, raw, rule, row, change):
    before = raw.execute("SELECT * FROM checkpoint").fetchall()
    with pytest.raises(sqlite3.IntegrityError, match=rule):
        raw.execute(f"UPDATE checkpoint SET {change} WHERE id = {zoo[row]}")

    assert raw.execute("SELECT * FROM checkpoint").fetchall() == before


@pytest.mark.parametrize(
    ("rule", "statement"),
    [
        ("state_is_known", "INSERT INTO checkpoint SELECT 99, 'new', 1, 'dcp', 'LOST', {rest}"),
        ("one_run_per_journal", "INSERT INTO run VALUES (2, 'f', 1.0, 'x')"),
        ("epoch_is_positive", "INSERT INTO epoch VALUES (0, 1.0, NULL, 'h', 1, 'c', '{{}}')"),
        ("size_is_not_negative", "UPDATE file SET size = -1"),
        ("size_is_not_negative", "UPDATE file SET size = 'big'"),
        ("rank_is_not_negative", "UPDATE file SET rank = -1"),
        ("verdict_is_known", "UPDATE retirement_decision SET verdict = 'maybe'"),
        ("level_is_known", "UPDATE verification SET level = 'glance'"),
        ("ok_is_yes_or_no", "UPDATE verification SET ok = 2"),
        ("transition_is_not_changed", "UPDATE transition SET note = 'it was not so'"),
        ("transition_is_not_deleted", "DELETE FROM transition"),
        ("transition_is_not_deleted", "DELETE FROM transition WHERE id = 1"),
        ("transition_is_not_replaced", "INSERT OR REPLACE INTO transition SELECT * FROM transition WHERE id = 1"),
        ("checkpoint_is_not_deleted", "DELETE FROM checkpoint"),
        ("FOREIGN KEY", "INSERT INTO transition VALUES (999, 99, NULL, 'PREWRITTEN', 1.0, 1, 'h', 1, '')"),
        ("FOREIGN KEY", "INSERT INTO file VALUES (99, 'a', 0, 1, 'd')"),
        ("FOREIGN KEY", "DELETE FROM epoch"),
        ("UNIQUE", "INSERT INTO file SELECT * FROM file LIMIT 1"),
    ],
)
def test_the_other_tables_cannot_be_made_nonsense(zoo, raw, rule, statement):
    rest = "1, 1, 'd', 'unique', 1.0, 0, NULL, NULL, NULL, NULL" + ", NULL" * 5 + ", '[]', '{}', '[]'" + ", NULL" * 4
    with pytest.raises(sqlite3.IntegrityError, match=rule):
        raw.execute(statement.format(rest=rest))


@pytest.mark.parametrize("first", [S.PREWRITTEN, S.WRITING, S.GATHERED])
def test_two_rows_in_flight_cannot_be_forced_in(steps, raw, first):
    record = steps.to(first, 1)
    with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE constraint failed: checkpoint\.series"):
        raw.execute(
            "INSERT INTO checkpoint (id, series, step, format, state, epoch, world_size, directory,"
            " staging_directory, created_at) SELECT 99, series, 77, format, 'PREWRITTEN', epoch, world_size,"
            " directory, 'unique', created_at FROM checkpoint WHERE id = ?",
            (record.id,),
        )


def test_two_live_rows_of_a_step_cannot_be_forced_in(steps, raw):
    steps.commit(1)
    steps.commit(1, overwrite=True)
    with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE constraint failed: checkpoint\.series, checkpoint\.step"):
        raw.execute("UPDATE checkpoint SET retire_started_at = NULL, retire_reason = NULL WHERE id = 1")


def test_a_staging_directory_is_never_used_twice(steps, raw):
    steps.commit(1)
    steps.commit(2)
    with pytest.raises(sqlite3.IntegrityError, match="staging_directory"):
        raw.execute("UPDATE checkpoint SET staging_directory = (SELECT staging_directory FROM checkpoint WHERE id = 1)")


def test_the_database_and_the_state_machine_know_the_same_transitions(steps, raw):
    record = steps.begin(1)
    legal = {(None, S.PREWRITTEN), (None, S.COMMITTED)}
    for row in TRANSITIONS:
        sources = row["source"] if isinstance(row["source"], list) else [row["source"]]
        legal |= {(source, row["dest"]) for source in sources}
    taken = set()
    for source, dest in itertools.product([None, *S, "", "LOST"], [*S, "LOST"]):
        raw.execute("BEGIN")
        with contextlib.suppress(sqlite3.IntegrityError):
            raw.execute(
                "INSERT INTO transition (checkpoint_id, source, dest, at, epoch, host, pid, note)"
                " VALUES (?, ?, ?, 1.0, 1, 'h', 1, '')",
                (record.id, source, dest),
            )
            taken.add((source or None, dest))
        raw.execute("ROLLBACK")

    assert taken == legal


def test_the_database_knows_every_state_and_format(journal, raw):
    (text,) = raw.execute("SELECT sql FROM sqlite_master WHERE name = 'checkpoint'").fetchone()

    assert f"state IN ({', '.join(repr(str(state)) for state in S)})" in text
    assert f"format IN ({', '.join(repr(str(layout)) for layout in Format)})" in text


def statements_of(journal, work):
    """What SQLite was asked while *work* ran, with values filled in."""
    seen = []
    with journal._database.reading() as driver:
        pass
    driver.set_trace_callback(seen.append)
    work()
    driver.set_trace_callback(None)
    return seen


def many(steps, count):
    """*count* committed checkpoints of one series, each with two files, without walking every one."""
    first = steps.commit(0)
    with steps.journal._database.writing() as connection:
        driver = connection.connection.dbapi_connection
        cursor = driver.execute("SELECT * FROM checkpoint WHERE id = ?", (first.id,))
        names = [column[0] for column in cursor.description]
        row = dict(zip(names, cursor.fetchone(), strict=True))
        rows = [
            row
            | {"id": n, "step": n, "commit_seq": n, "directory": f"checkpoint/step-{n}"}
            | {"staging_directory": f"checkpoint/.step-{n}.e1.a{n}.incomplete"}
            for n in range(2, count + 1)
        ]
        marks = ", ".join(f":{name}" for name in names)
        driver.executemany(f"INSERT INTO checkpoint VALUES ({marks})", rows)
        driver.executemany(
            "INSERT INTO transition (checkpoint_id, source, dest, at, epoch, host, pid, note)"
            " VALUES (:id, NULL, 'PREWRITTEN', 1.0, 1, 'h', 1, '')",
            rows,
        )
        driver.executemany(
            "INSERT INTO file SELECT :id, path, rank, size, digest FROM file WHERE checkpoint_id = 1", rows
        )


def test_reading_many_checkpoints_takes_one_query_and_what_grows_is_compared_with_its_seal(steps):
    many(steps, 300)
    for question, compared in (
        (steps.journal.checkpoints, 0),
        (lambda: steps.journal.checkpoints(series="checkpoint", live_only=True), 0),
        (steps.journal.transitions, 2),
        (steps.journal.decisions, 0),
        (steps.journal.series, 0),
        (lambda: steps.journal.files(7), 2),
        (lambda: steps.journal.find("checkpoint", 7), 0),
    ):
        seen = statements_of(steps.journal, question)
        assert [statement.split()[0] for statement in seen] == ["BEGIN", *["SELECT"] * (1 + compared), "COMMIT"]


def test_a_save_reads_no_table_in_full(steps, raw):
    many(steps, 300)
    record = steps.begin(1000)

    def save():
        moved = steps.move(record, S.PREWRITTEN, S.WRITING)
        moved = steps.move(moved, S.WRITING, S.GATHERED)
        mark = [RetirementMark(7, "not kept")]
        steps.move(moved, S.GATHERED, S.COMMITTED, retire=mark, decisions=[(7, "drop", ("not kept",))])
        steps.begin(1001)
        steps.journal.find("checkpoint", 7)
        steps.journal.files(7)
        steps.journal.transitions(7)
        steps.journal.transitions(after_id=300)

    seen = statements_of(steps.journal, save)
    asked = [statement for statement in seen if statement.startswith(("SELECT", "UPDATE", "INSERT"))]
    assert len(asked) > 20
    for statement in asked:
        for *_, step in raw.execute(f"EXPLAIN QUERY PLAN {statement}").fetchall():
            assert not step.startswith("SCAN") or step == "SCAN run", (step, statement)


def test_file_rows_are_written_in_one_statement_each_way(steps):
    """Sixty-four ranks with many files each: SQLAlchemy must use executemany, not one big or many small statements."""
    from ckptmgr.manifest import FileEntry

    record = steps.to(S.WRITING, 1)
    files = [FileEntry(f"f{n}", n, "d", n % 64) for n in range(640)]
    calls = []
    engine = steps.journal._database._engine
    from sqlalchemy import event

    event.listen(engine, "before_cursor_execute", lambda *call: calls.append((call[2], call[5])))
    steps.move(record, S.WRITING, S.GATHERED, files=files)

    assert [many for statement, many in calls if statement.startswith("INSERT INTO file")] == [True]


def test_models_carry_every_trigger(journal, raw):
    stored = dict(raw.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall())

    assert stored == {name: text.strip() for name, text in schema.TRIGGERS.items()}
