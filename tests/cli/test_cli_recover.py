"""``ckptmgr recover`` and ``ckptmgr upgrade``: the commands that may change a run."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from run_on_disk import Call, Run, S

from ckptmgr.errors import JournalCorrupt
from ckptmgr.journal import Journal, seal
from ckptmgr.lifecycle import Format, RetirementMark


def epochs(run: Run) -> list[tuple[str, bool]]:
    """(command, whether it was ended) of each epoch."""
    with Journal.open_read_only(run.journal_path) as journal:
        return [(epoch.command, epoch.ended_at is not None) for epoch in journal.epochs()]


def crashed(run: Run) -> Run:
    """A run that died with one checkpoint half-written, one gathered, one being retired."""
    first = run.save(500)
    run.save(1000, retire=[RetirementMark(first.id, "no rule keeps it")])
    run.save(1500, until=S.WRITING)
    run.save(1500, series="hf", layout=Format.HUGGINGFACE, until=S.GATHERED)
    run.crash()
    return run


def test_recover_says_what_would_be_done_and_does_nothing(run: Run, ckptmgr: Call) -> None:
    crashed(run)

    done = ckptmgr("recover", run.directory)
    document = ckptmgr("recover", run.directory, "--json").json

    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == ["would"] * 3
    assert "--apply` does it" in done.err
    assert f"recover {run.directory} --apply" in done.err
    assert {action["action"] for action in document["actions"]} == {"finish_retirement", "roll_back", "roll_forward"}
    assert document["applied"] is False
    assert (run.directory / "checkpoint/step-500").is_dir()
    assert ckptmgr("ls", run.directory, "--json").json["checkpoints"][2]["state"] == "WRITING"


def test_recover_apply_does_it_in_an_epoch_of_its_own_and_again_finds_nothing(run: Run, ckptmgr: Call) -> None:
    crashed(run)

    done = ckptmgr("recover", run.directory, "--apply")

    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()] == ["did"] * 3
    states = {
        (row["series"], row["step"]): (row["state"], row["retirement"])
        for row in ckptmgr("ls", run.directory, "--all", "--json").json["checkpoints"]
    }
    assert states == {
        ("checkpoint", 500): ("COMMITTED", "retired"),
        ("checkpoint", 1000): ("COMMITTED", None),
        ("checkpoint", 1500): ("FAILED", None),
        ("hf", 1500): ("COMMITTED", None),
    }
    assert not (run.directory / "checkpoint/step-500").exists()
    assert ckptmgr("latest", run.directory, "--series", "hf").out == f"{run.directory}/hf/hf-1500\n"
    assert epochs(run)[-1] == ("ckptmgr recover", True)
    assert ckptmgr("recover", run.directory, "--apply").out == "nothing to recover\n"


def test_recover_keeps_damaged_bytes_for_inspection_and_says_where(run: Run, ckptmgr: Call) -> None:
    record = run.save(500, until=S.GATHERED)
    (run.directory / record.staging_directory / "model.bin").write_bytes(b"other")
    run.crash()

    done = ckptmgr("recover", run.directory, "--apply")

    (where,) = [line.split(" is now ")[1] for line in done.out.splitlines() if " is now " in line]
    assert (run.directory / where / "model.bin").read_bytes() == b"other"
    assert ckptmgr("latest", run.directory).code == 3


def test_recover_notes_a_manager_that_may_be_running(run: Run, ckptmgr: Call) -> None:
    run.save(500, until=S.WRITING)

    done = ckptmgr("recover", run.directory)

    assert "may still be running" in done.err
    assert "does it once that has ended, and is refused before; `ckptmgr watch" in done.err
    assert ckptmgr("recover", run.directory, "--json").json["live_epoch"] == run.epoch

    run.crash()

    assert "may still be running" not in ckptmgr("recover", run.directory).err


@pytest.mark.parametrize("words", [["recover", "--apply"], ["recover", "--rebuild", "--apply"], ["upgrade"]])
def test_a_locked_run_ends_with_11_and_says_by_whom(run: Run, ckptmgr: Call, words: list[str]) -> None:
    run.save(500)
    run.journal.close()
    if "--rebuild" in words:
        run.journal_path.unlink()
    run.rundir.acquire("python train.py")
    try:
        text = ckptmgr(words[0], run.directory, *words[1:])
        document = ckptmgr(words[0], run.directory, *words[1:], "--json").json
    finally:
        run.rundir.release()

    assert text.code == 11
    for part in (f"pid {os.getpid()}", "python train.py", os.uname().nodename, "since 20"):
        assert part in text.err
    assert (document["error"]["type"], document["error"]["exit_code"]) == ("RunLocked", 11)
    assert ckptmgr(words[0], run.directory, *words[1:]).code == 0


def test_looking_needs_no_lock(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.rundir.acquire("python train.py")
    try:
        codes = [ckptmgr(command, run.directory).code for command in ("ls", "log", "latest", "check", "recover")]
    finally:
        run.rundir.release()

    assert codes == [0] * 5


def test_recover_apply_refuses_a_run_directory_that_is_not_there(run: Run, ckptmgr: Call) -> None:
    run.save(500, until=S.GATHERED)
    run.crash()
    away = run.directory.rename(run.directory.parent / "unmounted")

    assert ckptmgr("recover", run.directory, "--apply").code == 2

    run.directory.mkdir()

    assert ckptmgr("recover", run.directory, "--apply").code == 10
    run.directory.rmdir()
    away.rename(run.directory)
    assert ckptmgr("recover", run.directory, "--apply").code == 0
    assert ckptmgr("latest", run.directory).code == 0


def test_recover_apply_undoes_a_transaction_that_keeps_readers_out(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.journal.close()
    journal, rollback = run.journal_path, Path(f"{run.journal_path}-journal")
    # What a crash in the middle of a transaction leaves: pages written, and a rollback journal to undo them.
    connection = sqlite3.connect(journal, isolation_level=None)
    connection.execute("PRAGMA journal_mode=PERSIST").close()
    connection.execute("PRAGMA cache_size=1").close()
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("UPDATE epoch SET command = ?", ("x" * 200_000,))
    files = {path: path.read_bytes() for path in (journal, rollback)}
    connection.execute("ROLLBACK")
    connection.close()
    for path, data in files.items():
        path.write_bytes(data)

    kept_out = ckptmgr("ls", run.directory)

    assert kept_out.code == 3
    assert f"ckptmgr recover {run.directory} --apply" in kept_out.err
    assert ckptmgr("recover", run.directory, "--apply").code == 0
    assert ckptmgr("ls", run.directory).code == 0
    assert epochs(run)[0][0] == "train.py"


# --rebuild


def test_a_lost_journal_is_rebuilt_from_the_manifests(run: Run, ckptmgr: Call) -> None:
    run.save(1000, metrics={"loss": 2.5}, per_rank=["data"])
    run.save(500)
    run.save(500, series="hf", layout=Format.HUGGINGFACE)
    run.save(1500, until=S.GATHERED)
    run.journal.close()
    run.journal_path.unlink()

    lost = ckptmgr("ls", run.directory)
    plan = ckptmgr("recover", run.directory, "--rebuild")

    assert lost.code == 10
    assert "--rebuild --apply" in lost.err
    assert plan.code == 0
    assert plan.out.count("would take in") == 3
    assert not run.journal_path.exists()

    done = ckptmgr("recover", run.directory, "--rebuild", "--apply")

    assert done.code == 0
    assert done.out.count("took in") == 3
    assert ckptmgr("check", run.directory, "--deep").code == 0
    assert ckptmgr("latest", run.directory).out.endswith("/step-500\n")
    shown = ckptmgr("show", run.directory, 1000, "--json").json
    assert (shown["checkpoint"]["metrics"], shown["checkpoint"]["per_rank"]) == ({"loss": 2.5}, ["data"])
    assert shown["run"]["run_id"] == run.journal.run_id
    assert epochs(run) == [("ckptmgr recover --rebuild", True)]
    with Journal.open_read_only(run.journal_path) as journal:
        assert [epoch.epoch for epoch in journal.epochs()] == [run.epoch + 1], "epoch numbers go on"


def test_a_damaged_journal_is_moved_aside_and_never_deleted(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.journal.close()
    garbage = b"not a database " * 1000
    run.journal_path.write_bytes(garbage)

    assert ckptmgr("check", run.directory).code == 5
    assert ckptmgr("recover", run.directory, "--apply").code == 5
    assert ckptmgr("recover", run.directory, "--rebuild", "--json").json["journal_was"] == "damaged"
    assert run.journal_path.read_bytes() == garbage

    document = ckptmgr("recover", run.directory, "--rebuild", "--apply", "--json").json

    assert Path(document["moved_aside"]).read_bytes() == garbage
    assert Path(document["moved_aside"] + "-journal").exists()
    assert [row["path"] for row in document["checkpoints"]] == ["checkpoint/step-500"]
    assert ckptmgr("latest", run.directory).code == 0


def test_a_page_that_only_show_would_read_counts_as_damage(run: Run, ckptmgr: Call) -> None:
    run.save(500, files={f"shard-{n:03}.bin": b"x" for n in range(200)})
    run.journal.close()
    connection = sqlite3.connect(run.journal_path)
    root, size = (
        connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'file'").fetchone()[0],
        connection.execute("PRAGMA page_size").fetchone()[0],
    )
    connection.close()
    with run.journal_path.open("r+b") as file:
        file.seek((root - 1) * size)
        file.write(b"\xff" * size)

    assert ckptmgr("ls", run.directory).code == 0
    assert ckptmgr("show", run.directory, 500).code == 5
    assert ckptmgr("recover", run.directory, "--rebuild", "--apply").code == 0
    assert ckptmgr("show", run.directory, 500).code == 0


def test_what_only_a_manager_finds_in_a_journal_is_damage_that_can_be_rebuilt(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.journal.close()
    with contextlib.closing(sqlite3.connect(run.journal_path)) as connection:
        where = "SELECT rootpage FROM sqlite_master WHERE name = 'transition_by_checkpoint'"
        (root,) = connection.execute(where).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    with run.journal_path.open("r+b") as file:
        file.seek(root * size - 8)
        file.write(b"\x07" * 8)

    with pytest.raises(JournalCorrupt, match="--rebuild"):
        Journal.open(run.journal_path)
    assert ckptmgr("recover", run.directory, "--rebuild", "--apply").code == 0
    Journal.open(run.journal_path).close()


def test_a_journal_that_can_be_read_is_not_rebuilt(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    before = run.journal_path.read_bytes()

    for words in (["--rebuild"], ["--rebuild", "--apply"]):
        done = ckptmgr("recover", run.directory, *words)

        assert (done.code, done.out) == (2, "")
        assert "nothing to rebuild" in done.err
    assert run.journal_path.read_bytes() == before


@pytest.mark.parametrize("left", ["nothing", "an empty file", "some rows"])
def test_a_rebuild_that_was_cut_short_goes_on(run: Run, ckptmgr: Call, left: str) -> None:
    run.save(500)
    run.save(1000)
    run.journal.close()
    run.journal_path.unlink()
    if left == "an empty file":
        run.journal_path.touch()
    elif left == "some rows":
        manifest, digest = run.rundir.read_manifest("checkpoint/step-500")
        with Journal.open(run.journal_path) as journal:
            journal.set_run_id(manifest.run_id)
            who = {"host": "node-1", "pid": 1}
            epoch = journal.begin_epoch(**who, command="ckptmgr recover --rebuild", versions={})
            journal.insert_rebuilt(
                manifest, epoch=epoch, manifest_digest=digest, committed_at=manifest.created_at, **who
            )

    assert ckptmgr("recover", run.directory, "--rebuild", "--apply").code == 0
    assert [row["step"] for row in ckptmgr("ls", run.directory, "--json").json["checkpoints"]] == [500, 1000]
    assert ckptmgr("recover", run.directory, "--rebuild").code == 2


def test_rebuilding_skips_what_is_damaged_or_foreign_and_says_why(run: Run, ckptmgr: Call, tmp_path: Path) -> None:
    run.save(500)
    run.save(1000)
    other = Run(tmp_path / "runs" / "beta")
    other.save(700)
    other.journal.close()
    shutil.copytree(other.directory / "checkpoint/step-700", run.directory / "checkpoint/step-700")
    (run.directory / "checkpoint/step-1000/model.bin").unlink()
    run.journal.close()
    run.journal_path.unlink()

    done = ckptmgr("recover", run.directory, "--rebuild", "--apply")

    assert done.code == 0
    notes = [line for line in done.out.splitlines() if line.startswith("note")]
    assert len(notes) == 2
    assert "missing: model.bin" in notes[0]
    assert other.journal.run_id in notes[1]
    assert ckptmgr("latest", run.directory).out.endswith("/step-500\n")


def test_rebuilding_where_there_never_was_a_run_creates_nothing(ckptmgr: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    for directory in (tmp_path / "empty", tmp_path / "missing"):
        done = ckptmgr("recover", directory, "--rebuild", "--apply")

        assert done.code == 10
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


# upgrade


def set_revision(path: Path, revision: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    seal.renew(connection)
    connection.commit()
    connection.close()


def test_upgrade_of_a_current_journal_changes_nothing(run: Run, ckptmgr: Call) -> None:
    run.journal.close()
    before = epochs(run)

    done = ckptmgr("upgrade", run.directory)

    assert done.code == 0
    assert "already" in done.out
    assert epochs(run) == before
    assert ckptmgr("upgrade", run.directory, "--json").json["backup"] is None


@pytest.mark.parametrize("words", [["ls"], ["check"], ["latest"], ["log"], ["recover"], ["upgrade"]])
def test_a_newer_journal_ends_with_12_and_names_the_way_out(run: Run, ckptmgr: Call, words: list[str]) -> None:
    run.journal.close()
    set_revision(run.journal_path, "9999")

    done = ckptmgr(words[0], run.directory)

    assert (done.code, done.out) == (12, "")
    assert "pip install -U ckptmgr" in done.err


def test_recover_apply_does_not_migrate(run: Run, ckptmgr: Call) -> None:
    run.journal.close()
    set_revision(run.journal_path, "0000")
    before = run.journal_path.read_bytes()

    done = ckptmgr("recover", run.directory, "--apply")

    assert done.code == 12
    assert f"ckptmgr upgrade {run.directory}" in done.err
    assert run.journal_path.read_bytes() == before


def test_recover_apply_does_not_fill_an_empty_journal(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.journal.close()
    run.journal_path.write_bytes(b"")

    assert ckptmgr("recover", run.directory, "--apply").code == 10
    assert run.journal_path.read_bytes() == b""


def test_upgrade_creates_no_journal(ckptmgr: Call, tmp_path: Path) -> None:
    assert ckptmgr("upgrade", tmp_path / "alpha").code == 10
    assert list(tmp_path.iterdir()) == []


def test_upgrade_of_a_journal_that_nobody_finished_creating_fills_it(run: Run, ckptmgr: Call) -> None:
    run.journal.close()
    run.journal_path.write_bytes(b"")
    (run.directory / ".ckptmgr-run-id").unlink()

    assert ckptmgr("ls", run.directory).code == 10

    document = ckptmgr("upgrade", run.directory, "--json").json

    assert (document["from"], document["backup"]) == (None, None)
    assert epochs(run) == [("ckptmgr upgrade", True)]
    assert ckptmgr("ls", run.directory).code == 0
