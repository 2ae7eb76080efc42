"""Migrations: one line of them, all or nothing, agreed on by everybody who starts at once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from journal_steps import CRASHED, FILES, S, Steps, contents, in_child
from sqlalchemy import create_engine

from ckptmgr.errors import JournalCorrupt, JournalError, JournalNotFound, JournalSchemaMismatch
from ckptmgr.journal import Journal, database, declared, schema, seal, upgrade

RELEASED = sorted((Path(__file__).parent / "released").glob("*.db"))
NOW, NEXT = declared.REVISION, f"{int(declared.REVISION) + 1:04}"
ADD_COLUMN = "op.add_column('checkpoint', sa.Column('colour', sa.Text))"


def objects(path: Path) -> dict[str, str]:
    """The SQL of every table, index and trigger, white space aside."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return {name: re.sub(r"\s+", " ", sql).strip() for name, sql in rows}


def columns(path: Path, table: str = "checkpoint") -> list[str]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]


def write_next(scripts: Path, body: str) -> None:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    (scripts / "versions" / f"{NEXT}_next.py").write_text(
        "import os\nimport sqlalchemy as sa\nfrom alembic import op\n"
        f"revision = '{NEXT}'\ndown_revision = '{NOW}'\n\n\ndef upgrade():\n{lines}\n"
    )


@pytest.fixture
def next_version(tmp_path, monkeypatch):
    """A later ckptmgr that has one more migration; call it with what the migration does."""
    scripts = tmp_path / "next version"
    shutil.copytree(upgrade.script_location(), scripts, ignore=shutil.ignore_patterns("__pycache__"))

    def become(body: str = ADD_COLUMN) -> Path:
        write_next(scripts, body)
        monkeypatch.setattr(upgrade, "script_location", lambda: str(scripts))
        monkeypatch.setattr(declared, "REVISION", NEXT)
        # The models of that version are not there to compare with.
        monkeypatch.setattr(database, "_require_ours", lambda *_: None)
        return scripts

    return become


@pytest.fixture
def older(steps) -> Path:
    """A journal with contents, as this version leaves it; older once `next_version` is there."""
    steps.commit(1)
    steps.to(S.WRITING, 2)
    steps.journal.close()
    return steps.journal.path


def test_models_match_migrations(fresh_journal):
    engine = create_engine(f"sqlite:///{fresh_journal}")
    with engine.connect() as connection:
        difference = compare_metadata(MigrationContext.configure(connection), schema.metadata)
    engine.dispose()

    assert difference == []


def test_models_and_migrations_give_the_same_sql(fresh_journal, tmp_path):
    """Alembic compares neither CHECKs nor conditions of indexes nor triggers; the text of the schema does."""
    engine = create_engine(f"sqlite:///{tmp_path / 'models.db'}")
    with engine.begin() as connection:
        schema.metadata.create_all(connection)
        for trigger in schema.TRIGGERS.values():
            connection.exec_driver_sql(trigger)
    engine.dispose()
    migrated = objects(fresh_journal)
    del migrated["alembic_version"]

    assert migrated == objects(tmp_path / "models.db")


def test_a_journal_is_known_by_its_header(fresh_journal):
    with contextlib.closing(sqlite3.connect(fresh_journal)) as connection:
        assert connection.execute("PRAGMA application_id").fetchone() == (declared.APPLICATION_ID,)
        assert declared.APPLICATION_ID.to_bytes(4, "big") == b"ckpt"


def test_revisions_form_one_line():
    config = Config()
    config.set_main_option("script_location", upgrade.script_location())
    scripts = ScriptDirectory.from_config(config)
    line = [script.revision for script in scripts.walk_revisions()][::-1]

    assert line == [f"{n:04}" for n in range(1, len(line) + 1)]
    assert scripts.get_heads() == [line[-1]] == [declared.REVISION]
    for script in scripts.walk_revisions():
        assert re.fullmatch(rf"{script.revision}_[a-z0-9_]+\.py", Path(script.path).name)
        with pytest.raises(NotImplementedError):
            script.module.downgrade()


def test_alembic_itself_is_turned_away(tmp_path):
    config = Config()
    config.set_main_option("script_location", upgrade.script_location())
    from alembic import command

    with pytest.raises(SystemExit, match="ckptmgr upgrade"):
        command.upgrade(config, "head")


def test_the_current_schema_needs_nothing(older):
    before = older.read_bytes()

    assert upgrade.upgrade(older) == (NOW, NOW)
    assert older.read_bytes() == before
    assert not upgrade.backup_path(older).exists()


def test_a_new_journal_is_upgraded_from_nothing_and_not_backed_up(journal_path):
    assert upgrade.upgrade(journal_path, create=True) == (None, NOW)
    assert not upgrade.backup_path(journal_path).exists()


def test_an_older_journal_is_not_read_but_says_what_to_do(older, next_version):
    before = older.read_bytes()
    next_version()
    with pytest.raises(JournalSchemaMismatch) as caught:
        Journal.open_read_only(older)

    assert (caught.value.path, caught.value.found, caught.value.expected) == (str(older), NOW, NEXT)
    assert "ckptmgr upgrade RUN" in caught.value.hint
    assert older.read_bytes() == before
    assert not upgrade.backup_path(older).exists()


def test_an_older_journal_is_copied_and_then_upgraded(older, next_version, monkeypatch):
    before = contents(older)
    next_version()
    with Journal.open(older) as journal:
        assert [record.step for record in journal.checkpoints()] == [1, 2]
    backup = older.with_name(older.name + f".before-{NEXT}")

    assert "colour" in columns(older)
    assert contents(backup) == before
    assert "colour" not in columns(backup)
    assert [path.name for path in older.parent.glob(f"*.before-{NEXT}*")] == [backup.name]
    # The copy is a journal that the version before can open again.
    monkeypatch.setattr(declared, "REVISION", NOW)
    with Journal.open_read_only(backup) as journal:
        assert [record.step for record in journal.checkpoints()] == [1, 2]


def test_upgrade_says_from_where_to_where(older, next_version):
    next_version()

    assert upgrade.upgrade(older) == (NOW, NEXT)
    assert upgrade.upgrade(older) == (NEXT, NEXT)


def test_a_backup_of_an_earlier_try_is_replaced(older, next_version):
    before = contents(older)
    next_version()
    upgrade.backup_path(older).write_bytes(older.read_bytes()[:4096])
    os.truncate(upgrade.backup_path(older), 0)
    upgrade.upgrade(older)

    assert contents(upgrade.backup_path(older)) == before


def test_without_a_backup_there_is_no_upgrade(older, next_version):
    before = older.read_bytes()
    next_version()
    upgrade.backup_path(older).mkdir()
    with pytest.raises(JournalError):
        upgrade.upgrade(older)

    assert older.read_bytes() == before


@pytest.mark.parametrize("found", [NEXT, "0010", "9999", "main_7"])
def test_a_newer_schema_is_refused_with_a_hint(older, found):
    with contextlib.closing(sqlite3.connect(older)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (found,))
        seal.renew(connection)
        connection.commit()
    before = older.read_bytes()
    for opening in (Journal.open, Journal.open_read_only, upgrade.upgrade):
        with pytest.raises(JournalSchemaMismatch) as caught:
            opening(older)
        assert (caught.value.found, caught.value.expected) == (found, NOW)
        assert "pip install -U ckptmgr" in caught.value.hint

    assert older.read_bytes() == before
    assert not upgrade.backup_path(older).exists()


def test_what_a_newer_schema_has_under_other_names_is_no_damage(older):
    with contextlib.closing(sqlite3.connect(older)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0009'")
        connection.execute("ALTER TABLE pin RENAME TO tag")
        seal.renew(connection)
        connection.commit()
    for opening in (Journal.open, Journal.open_read_only):
        with pytest.raises(JournalSchemaMismatch):
            opening(older)


def test_an_upgrade_that_raises_changes_nothing(older, next_version):
    before, tables = contents(older), objects(older)
    next_version(ADD_COLUMN + "\nop.execute('UPDATE epoch SET host = NULL')")
    with pytest.raises(JournalError):
        Journal.open(older)

    assert objects(older) == tables
    assert contents(older) == before
    next_version()
    assert upgrade.upgrade(older) == (NOW, NEXT)


def test_an_upgrade_that_dies_changes_nothing(older, next_version):
    before, tables = contents(older), objects(older)
    next_version(f"{ADD_COLUMN}\nop.execute('UPDATE epoch SET pid = 0')\nos._exit({CRASHED})")

    assert in_child(lambda: Journal.open(older)) == CRASHED
    assert objects(older) == tables
    assert contents(older) == before
    next_version()
    assert upgrade.upgrade(older) == (NOW, NEXT)


def test_creation_that_dies_leaves_nothing_in_the_way(journal_path, next_version):
    next_version(f"{ADD_COLUMN}\nos._exit({CRASHED})")
    assert in_child(lambda: Journal.open(journal_path)) == CRASHED
    assert objects(journal_path) == {}
    with pytest.raises(JournalNotFound):
        Journal.open_read_only(journal_path)
    next_version()
    with Journal.open(journal_path) as journal:
        assert journal.checkpoints() == []


def test_a_migration_that_breaks_references_is_not_committed(older, next_version):
    before = contents(older)
    next_version("op.execute('DELETE FROM epoch')")
    with pytest.raises(JournalCorrupt, match="refers to a row of epoch that is gone"):
        upgrade.upgrade(older)

    assert contents(older) == before


def test_batch_migration_keeps_child_rows(older, next_version):
    """With foreign keys on, dropping the old table would delete every row first, and with them the history."""
    before = contents(older)
    next_version(
        "with op.batch_alter_table('checkpoint', recreate='always') as batch:\n"
        "    batch.add_column(sa.Column('colour', sa.Text))\n"
        "with op.batch_alter_table('epoch', recreate='always') as batch:\n"
        "    batch.add_column(sa.Column('colour', sa.Text))"
    )
    upgrade.upgrade(older)
    after = contents(older)

    for table in ("file", "transition", "retirement_decision", "run"):
        assert after[table] == before[table]
    assert [(*row, None) for row in before["checkpoint"]] == after["checkpoint"]
    with Journal.open(older) as journal:
        assert journal.files(1) == list(FILES)
        assert len(journal.transitions()) == 6


@pytest.mark.parametrize("journal_is", ["new", "older"])
def test_concurrent_upgrades_agree(journal_is, journal_path, fresh_journal, tmp_path):
    """Four processes open one journal at the same moment; each works, and one migration was run."""
    scripts = tmp_path / "scripts"
    shutil.copytree(upgrade.script_location(), scripts, ignore=shutil.ignore_patterns("__pycache__"))
    write_next(scripts, ADD_COLUMN)
    if journal_is == "older":
        shutil.copyfile(fresh_journal, journal_path)
    script = """
import sys, time, alembic.command
from pathlib import Path
from ckptmgr.journal import Journal, database, declared, upgrade
database._require_ours = lambda *_: None
path, scripts, go = map(Path, sys.argv[1:4])
declared.REVISION, upgrade.script_location = sys.argv[4], lambda: str(scripts)
import ckptmgr.journal.store
go.with_name(f"ready-{sys.argv[0]}-{id(path)}-{time.monotonic_ns()}").touch()
while not go.exists():
    time.sleep(0.001)
with Journal.open(path) as journal:
    print(journal.run_id)
"""
    go = tmp_path / "barrier" / "go"
    go.parent.mkdir()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(journal_path), str(scripts), str(go), NEXT],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    try:
        while len(list(go.parent.iterdir())) < 4:
            assert all(child.poll() is None for child in children)
        go.touch()
        answers = [child.communicate(timeout=60) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()

    assert [child.returncode for child in children] == [0] * 4, answers
    assert len({out for out, _ in answers}) == 1
    assert columns(journal_path).count("colour") == 1
    assert len(contents(journal_path)["run"]) == 1


@pytest.mark.parametrize("released", RELEASED, ids=lambda path: path.stem)
def test_upgrade_from_each_release(released, journal_path):
    shutil.copyfile(released, journal_path)
    facts = json.loads(released.with_suffix(".json").read_text())
    with Journal.open(journal_path) as journal:
        assert journal.run_id == facts["run_id"]
        assert [f"{r.series} {r.step} {r.state}" for r in journal.checkpoints()] == facts["checkpoints"]
        assert len(journal.transitions()) == facts["transitions"]
        assert [[f.path, f.size, f.rank] for f in journal.files(facts["files_of"])] == facts["files"]
        assert journal.current_epoch() == facts["epoch"]
        assert Steps(journal).commit(10_000).is_live
    assert objects(journal_path).keys() == objects(released).keys() or released.stem != declared.REVISION


def test_the_current_schema_has_been_frozen():
    """Written by tools/freeze_journal.py when a schema is released, and never edited."""
    assert RELEASED
    assert RELEASED[-1].stem == declared.REVISION
    assert [path.stem for path in RELEASED] == [f"{n:04}" for n in range(1, len(RELEASED) + 1)]
