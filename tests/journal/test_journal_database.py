"""How the file is opened: settings, paths, errors, threads and forks."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from journal_steps import S, Steps, in_child
from sqlalchemy.exc import DBAPIError

from ckptmgr.errors import JournalCorrupt, JournalError, JournalNotFound
from ckptmgr.journal import Journal, database, upgrade

SETTINGS = {"journal_mode": "persist", "synchronous": 3, "mmap_size": 0, "busy_timeout": 10_000}


def settings(connection: sqlite3.Connection) -> dict[str, object]:
    return {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in (*SETTINGS, "foreign_keys")}


@pytest.fixture
def every_connection(monkeypatch):
    """The settings of each connection that ckptmgr opens, as they are at its first real statement."""
    seen = []

    class Watched(sqlite3.Connection):
        def execute(self, statement, *args):
            if not statement.startswith("PRAGMA"):
                seen.append(settings(super()))
            return super().execute(statement, *args)

        def cursor(self, *args, **kwargs):
            seen.append(settings(super()))
            return super().cursor(*args, **kwargs)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, **kwargs | {"factory": Watched}))
    return seen


def test_settings_hold_on_every_connection_of_reading_and_writing(every_connection, fresh_journal, journal_path):
    shutil.copyfile(fresh_journal, journal_path)
    with Journal.open(journal_path) as journal, Journal.open_read_only(journal_path) as reader:
        Steps(journal).commit(1)
        reader.checkpoints()

    assert len(every_connection) > 10
    assert all(found == SETTINGS | {"foreign_keys": 1} for found in every_connection)


def test_settings_hold_on_alembics_connection_except_foreign_keys(every_connection, journal_path):
    upgrade.upgrade(journal_path, create=True)

    assert {found["foreign_keys"] for found in every_connection} == {0, 1}
    assert all(SETTINGS.items() <= found.items() for found in every_connection)


def test_a_setting_that_is_not_taken_is_an_error(journal_path, fresh_journal):
    """A journal somebody put into WAL mode while another process reads it cannot leave that mode."""
    shutil.copyfile(fresh_journal, journal_path)
    with contextlib.closing(sqlite3.connect(journal_path)) as other:
        other.execute("PRAGMA journal_mode=WAL")
        other.execute("BEGIN")
        other.execute("SELECT * FROM run").fetchall()
        with pytest.raises(JournalError):
            Journal.open_read_only(journal_path)


def test_a_reader_waits_no_lock_and_takes_no_write_lock(journal):
    with Journal.open_read_only(journal.path) as reader, journal._database.writing():
        assert reader.epochs() == []


def test_a_locked_journal_is_a_journal_error_and_usable_afterwards(monkeypatch, journal, raw):
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 100)
    with Journal.open(journal.path) as impatient:
        raw.execute("BEGIN IMMEDIATE")
        with pytest.raises(JournalError, match="locked by another process") as caught:
            impatient.begin_epoch(host="h", pid=1, command="c", versions={})
        raw.execute("ROLLBACK")

        assert isinstance(caught.value.__cause__, DBAPIError)
        assert impatient.begin_epoch(host="h", pid=1, command="c", versions={}) == 1


def test_a_missing_journal_is_not_found_and_not_created(tmp_path):
    with pytest.raises(JournalNotFound) as caught:
        Journal.open_read_only(tmp_path / "none.journal.db")
    with pytest.raises(JournalNotFound):
        upgrade.upgrade(tmp_path / "none.journal.db")

    assert caught.value.path == str(tmp_path / "none.journal.db")
    assert list(tmp_path.iterdir()) == []


def test_a_journal_nobody_finished_creating_is_not_found_and_then_created(journal_path):
    journal_path.touch()
    with pytest.raises(JournalNotFound, match="empty"):
        Journal.open_read_only(journal_path)
    assert journal_path.stat().st_size == 0

    with Journal.open(journal_path) as journal:
        assert journal.checkpoints() == []


def test_a_journal_in_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(JournalError):
        Journal.open(tmp_path / "no" / "a.journal.db")


@pytest.mark.parametrize("opening", [Journal.open, Journal.open_read_only])
@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "folder", "pipe"])
def test_a_journal_that_is_no_plain_file_is_refused(opening, kind, journal, tmp_path):
    journal.close()
    path = tmp_path / "other.journal.db"
    if kind == "link":
        path.symlink_to(journal.path)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nothing")
    elif kind == "hard link":
        path.hardlink_to(journal.path)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(JournalError) as caught:
        opening(path)

    assert type(caught.value) is JournalError
    assert not (tmp_path / "nothing").exists()


def test_a_linked_folder_is_resolved_once(journal, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with Journal.open_read_only(tmp_path / "link" / journal.path.name) as reader:
        assert reader.path == journal.path


def test_names_that_mean_something_in_a_uri_are_only_names(fresh_journal, tmp_path):
    for name in ("a?mode=memory.db", "a#b.db", "50%41.db", "über run.db"):
        shutil.copyfile(fresh_journal, tmp_path / name)
        with Journal.open(tmp_path / name) as journal:
            journal.begin_epoch(host="h", pid=1, command="c", versions={})
        with Journal.open_read_only(tmp_path / name) as reader:
            assert reader.current_epoch() == 1


def test_another_programs_database_is_refused_and_left_alone(journal_path):
    with contextlib.closing(sqlite3.connect(journal_path)) as other:
        other.execute("CREATE TABLE cats (name)")
    before = journal_path.read_bytes()
    for opening in (Journal.open, Journal.open_read_only, upgrade.upgrade):
        with pytest.raises(JournalError, match="no ckptmgr journal"):
            opening(journal_path)

    assert journal_path.read_bytes() == before


def damaged_header(path: Path) -> None:
    path.write_bytes(b"this is not a database" + path.read_bytes()[22:])


def text_file(path: Path) -> None:
    path.write_text("loss: 0.5\n" * 1000)


def torn(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


def torn_within_a_page(path: Path) -> None:
    os.truncate(path, 4096 + 100)


def zeroed_pages(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4096] + bytes(len(content) - 4096))


def random_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for i in range(4096, len(content)):
        content[i] = (i * 2654435761 >> 7) & 0xFF
    path.write_bytes(content)


def lost_table(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DROP TABLE run")


def lost_run(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DELETE FROM run")


def lost_revision(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DELETE FROM alembic_version")


def two_revisions(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("INSERT INTO alembic_version VALUES ('0000')")


DAMAGE = [
    damaged_header,
    text_file,
    torn,
    torn_within_a_page,
    zeroed_pages,
    random_pages,
    lost_table,
    lost_run,
    lost_revision,
    two_revisions,
]


def look(opening, path: Path) -> None:
    """A reader does not search for damage when it opens: then the first look must find it."""
    with opening(path) as journal:
        if journal.read_only:
            journal.checkpoints()
            journal.transitions()


@pytest.mark.parametrize("opening", [Journal.open, Journal.open_read_only])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_journal_is_corrupt_and_says_how_to_rebuild(steps, damage, opening):
    for step in range(30):
        steps.commit(step)
    path = steps.journal.path
    steps.journal.close()
    damage(path)
    before = path.read_bytes()
    with pytest.raises(JournalCorrupt, match=re.escape(str(path))) as caught:
        look(opening, path)

    assert caught.value.path == str(path)
    assert caught.value.reason
    assert "--rebuild" in caught.value.hint
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("column", "value"),
    [("metrics", "{not json"), ("failures", "[1,"), ("per_rank", ""), ("metrics", b"\xff\xfe")],
)
def test_a_row_nobody_can_read_is_corruption(steps, raw, column, value):
    steps.begin(1)
    raw.execute(f"UPDATE checkpoint SET {column} = CAST(? AS TEXT)", (value,))
    with pytest.raises(JournalCorrupt):
        steps.journal.checkpoints()


def test_errors_keep_their_cause_and_no_foreign_type_crosses_the_door(steps, raw):
    raw.execute("CREATE TRIGGER stop BEFORE INSERT ON epoch BEGIN SELECT RAISE(ABORT, 'not today'); END")
    with pytest.raises(JournalError, match="not today") as caught:
        Steps(steps.journal)

    assert isinstance(caught.value.__cause__, DBAPIError)
    assert isinstance(caught.value.__cause__.orig, sqlite3.IntegrityError)


def run_script(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_forked_child_cannot_use_the_journal_and_the_parent_is_unharmed(journal):
    """The child even ends the orderly way, closing every connection it inherited."""
    journal.close()
    script = """
import gc, os, sys
from ckptmgr.errors import JournalError
from ckptmgr.journal import Journal
from pathlib import Path
journal = Journal.open(Path(sys.argv[1]))
def epoch():
    return journal.begin_epoch(host="h", pid=os.getpid(), command="c", versions={})
assert epoch() == 1
pid = os.fork()
if pid == 0:
    for use in (epoch, journal.checkpoints, journal.current_epoch):
        try:
            use()
        except JournalError as error:
            assert "forked child" in str(error), error
        else:
            raise SystemExit("the child could use it")
    journal.close()
    del journal
    gc.collect()
    sys.exit(42)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
assert epoch() == 2
assert [record.epoch for record in journal.epochs()] == [1, 2]
print("unharmed")
"""
    done = run_script(script, journal.path)

    assert (done.returncode, done.stdout) == (0, "unharmed\n"), done.stderr
    with Journal.open(journal.path) as again:
        assert again.current_epoch() == 2


def test_a_fork_waits_for_the_end_of_a_transaction(steps):
    """A data loader forks while the manager's thread commits: the child must not inherit half a transaction."""
    entered, leave = threading.Event(), threading.Event()

    def slowly() -> None:
        with steps.journal._database.writing() as connection:
            connection.exec_driver_sql("UPDATE run SET run_id = 'slow'")
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=slowly)
    thread.start()
    assert entered.wait(10)
    threading.Timer(0.3, leave.set).start()
    started = time.monotonic()

    def look() -> None:
        # SQLite's own view, from the inherited connection, which the child may otherwise not touch.
        connection = steps.journal._database._connection
        assert not connection.connection.dbapi_connection.in_transaction

    status = in_child(look)
    waited = time.monotonic() - started
    thread.join(10)

    assert status == 0
    assert waited >= 0.25
    assert steps.begin(1).id == 1


def test_forking_from_many_threads_while_committing_does_not_deadlock(steps):
    done = []

    def fork() -> None:
        for _ in range(5):
            done.append(in_child(lambda: None))

    threads = [threading.Thread(target=fork) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(20):
        steps.commit(step)
    for thread in threads:
        thread.join(30)

    assert done == [0] * 15
    assert len(steps.journal.checkpoints()) == 20


def test_a_second_process_reads_while_this_one_writes(steps):
    script = """
import sys
from pathlib import Path
from ckptmgr.journal import Journal
with Journal.open_read_only(Path(sys.argv[1])) as reader:
    for _ in range(200):
        records = reader.checkpoints()
        lines = reader.transitions()
        assert [r.id for r in records] == list(range(1, len(records) + 1))
    print(len(records))
"""
    reader = subprocess.Popen(
        [sys.executable, "-c", script, str(steps.journal.path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for step in range(40):
        steps.commit(step)
    out, err = reader.communicate(timeout=60)

    assert reader.returncode == 0, err.decode()
    assert int(out) <= 40


def test_opening_a_journal_loads_neither_alembic_nor_torch(journal):
    script = """
import sys
import ckptmgr.journal
assert "sqlalchemy" not in sys.modules, "the package itself is lazy"
from ckptmgr.journal import Journal
from pathlib import Path
with Journal.open_read_only(Path(sys.argv[1])) as journal:
    journal.checkpoints()
with Journal.open(Path(sys.argv[1])) as journal:
    journal.begin_epoch(host="h", pid=1, command="c", versions={})
loaded = {"alembic", "mako", "torch", "numpy", "transitions"} & set(sys.modules)
assert not loaded, loaded
"""
    journal.close()
    done = run_script(script, journal.path)

    assert done.returncode == 0, done.stderr


def test_damage_in_a_page_nobody_reads_is_found_when_a_manager_opens(steps):
    """Half a year of training later is too late."""
    for step in range(30):
        steps.commit(step)
    path = steps.journal.path
    steps.journal.close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'verification'").fetchone()
    with path.open("r+b") as stream:
        stream.seek((page - 1) * 4096)
        stream.write(b"\xff" * 4096)
    with pytest.raises(JournalCorrupt):
        Journal.open(path)


def test_two_processes_that_write_at_once_take_different_epochs(journal, tmp_path):
    """The run lock should prevent it; where locks do not work, the write lock taken at BEGIN still counts."""
    script = """
import os, sys, time
from pathlib import Path
from ckptmgr.journal import Journal
path, here, other = map(Path, sys.argv[1:])
with Journal.open(path) as journal:
    here.touch()
    while not other.exists():
        time.sleep(0.001)
    for _ in range(100):
        print(journal.begin_epoch(host="h", pid=os.getpid(), command="c", versions={}))
"""
    journal.close()
    a, b = tmp_path / "a", tmp_path / "b"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(journal.path), str(here), str(other)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for here, other in ((a, b), (b, a))
    ]
    answers = [child.communicate(timeout=60) for child in children]

    assert [child.returncode for child in children] == [0, 0], answers
    assert sorted(int(number) for out, _ in answers for number in out.split()) == list(range(1, 201))


def test_the_package_names_only_its_doors():
    import ckptmgr.journal

    assert set(ckptmgr.journal.__all__) == {"REVISION", "Decision", "Journal", "Pin", "Questions", "Verification"}
    with pytest.raises(AttributeError):
        _ = ckptmgr.journal.Nothing


def test_reads_see_one_moment(steps):
    """A read that spans several statements must not mix two moments; the reader's transaction gives that."""
    steps.commit(1)
    with Journal.open_read_only(steps.journal.path) as reader, reader._database.reading() as view:
        before = view.execute("SELECT count(*) FROM checkpoint").fetchone()[0]
        # The writer can prepare, but not finish, while a reader looks: it waits for the reader at COMMIT.
        thread = threading.Thread(target=steps.begin, args=(2,))
        thread.start()
        time.sleep(0.2)
        after = view.execute("SELECT count(*) FROM checkpoint").fetchone()[0]
    thread.join(30)

    assert (before, after) == (1, 1)
    assert steps.journal.find("checkpoint", 2).state is S.PREWRITTEN
