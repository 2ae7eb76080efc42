"""Recovery carried out on real directories and a real journal, interrupted at every durable call."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptmgr import durable
from ckptmgr.errors import StaleWriter
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState
from ckptmgr.recovery import FinishRetirement, ReportMissing, ReportStranger, RollForward, preview, recover

S = CheckpointState


# --- what a crash leaves: each builds it, and says how it must end -----------------------------


def interrupted_before_writing(run):
    record = run.prewritten(10)
    (run.path(record.staging_directory) / "config.json").write_text("{}")
    return {record.id: "FAILED"}, []


def interrupted_while_writing(run):
    return {run.writing(10).id: "FAILED"}, []


def staging_directory_never_became_durable(run):
    record = run.prewritten(10)
    run.path(record.staging_directory).rmdir()
    return {record.id: "FAILED"}, []


def gathered(run):
    return {run.gathered(10).id: "live"}, [10]


def published(run):
    record = run.gathered(10)
    run.rundir.publish(record, None)
    return {record.id: "live"}, [10]


def gathered_and_then_damaged(run):
    record = run.gathered(10)
    damage(run.path(record.staging_directory) / "b.bin")
    return {record.id: "FAILED"}, []


def overwriting_gathered(run):
    old, new = run.committed(10), run.gathered(10, overwrite=True)
    return {old.id: "retired", new.id: "live"}, [10]


def overwriting_exchanged(run):
    old, new = run.committed(10), run.gathered(10, overwrite=True)
    assert durable.exchange(run.path(new.staging_directory), run.path(new.directory))
    return {old.id: "retired", new.id: "live"}, [10]


def overwriting_moved_aside(run):
    old, new = run.committed(10), run.gathered(10, overwrite=True)
    run.path(old.directory).rename(run.path(old.retired_directory))
    return {old.id: "retired", new.id: "live"}, [10]


def overwriting_published(run):
    old, new = run.committed(10), run.gathered(10, overwrite=True)
    run.rundir.publish(new, old)
    return {old.id: "retired", new.id: "live"}, [10]


def overwriting_committed(run):
    old, new = run.committed(10), run.gathered(10, overwrite=True)
    run.rundir.publish(new, old)
    run.advance(new, S.GATHERED, S.COMMITTED)
    return {old.id: "retired", new.id: "live"}, [10]


def overwriting_exchanged_and_then_damaged(run):
    old, new = run.committed(10), run.gathered(10, overwrite=True)
    assert durable.exchange(run.path(new.staging_directory), run.path(new.directory))
    damage(run.path(new.directory) / "a.bin")
    return {old.id: "live", new.id: "FAILED"}, [10]


def overwriting_moved_aside_and_then_damaged(run):
    old, new = run.committed(10), run.gathered(10, overwrite=True)
    run.path(old.directory).rename(run.path(old.retired_directory))
    damage(run.path(new.staging_directory) / "a.bin")
    return {old.id: "live", new.id: "FAILED"}, [10]


def overwriting_interrupted_while_writing(run):
    old, new = run.committed(10), run.writing(10, overwrite=True)
    return {old.id: "live", new.id: "FAILED"}, [10]


def retiring_not_begun(run):
    return {run.retiring(10).id: "retired"}, []


def retiring_and_then_rotten(run):
    record = run.retiring(10)
    (run.path(record.directory) / "ckptmgr.json").write_text("{")
    return {record.id: "retired"}, []


def retiring_half_removed(run):
    record = run.retiring(10)
    run.path(record.directory).rename(run.path(record.retired_directory))
    (run.path(record.retired_directory) / "ckptmgr.json").unlink()
    return {record.id: "retired"}, []


def retiring_removed(run):
    record = run.retiring(10)
    run.rundir.retire(record)
    return {record.id: "retired"}, []


def failed_with_its_directory_still_there(run):
    record = run.writing(10)
    run.advance(record, S.WRITING, S.FAILED, reason="rank 1 died")
    return {record.id: "FAILED"}, []


CRASHES = [
    interrupted_before_writing,
    interrupted_while_writing,
    staging_directory_never_became_durable,
    gathered,
    published,
    gathered_and_then_damaged,
    overwriting_gathered,
    overwriting_exchanged,
    overwriting_moved_aside,
    overwriting_published,
    overwriting_committed,
    overwriting_exchanged_and_then_damaged,
    overwriting_moved_aside_and_then_damaged,
    overwriting_interrupted_while_writing,
    retiring_not_begun,
    retiring_and_then_rotten,
    retiring_half_removed,
    retiring_removed,
    failed_with_its_directory_still_there,
]


def damage(path: Path) -> None:
    """Flip one bit; the size stays."""
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def outcome(record: CheckpointRecord) -> str:
    if record.state is not S.COMMITTED:
        return record.state.value
    return "live" if record.is_live else "retiring" if record.retired_at is None else "retired"


def assert_as_it_must_be(run, ends, steps):
    """Every row is decided as expected, and on disk stands exactly what is live, and what was set aside."""
    run.restart()
    rows = run.journal.checkpoints()

    assert ends == {row.id: outcome(row) for row in rows if row.id in ends}
    assert run.preview().changes == ()
    assert not [action for action in run.preview().reports if isinstance(action, ReportMissing)]
    live = [row for row in rows if row.is_live]
    assert sorted(steps) == sorted(row.step for row in live if row.id in ends)
    assert all(run.is_intact(row) for row in live)
    expected = {row.directory.rpartition("/")[2] for row in live}
    assert expected == {name for name in run.names() if "quarantined" not in name}


@pytest.mark.parametrize("leave", CRASHES)
def test_recovery_decides_what_a_crash_left(run, leave):
    bystander = run.committed(1)
    ends, steps = leave(run)
    run.restart()
    report = run.recover()

    assert report.applied
    assert report.changes
    assert_as_it_must_be(run, ends, steps)
    assert outcome(run.row(bystander)) == "live"


@pytest.mark.parametrize("leave", CRASHES)
def test_recovering_again_does_nothing(run, leave):
    run.committed(1)
    leave(run)
    run.restart()
    run.recover()
    before = (run.journal.checkpoints(), run.journal.transitions(), run.names())
    again = run.recover()

    assert again.changes == ()
    assert again.set_aside == {}
    assert before == (run.journal.checkpoints(), run.journal.transitions(), run.names())


@pytest.mark.parametrize("leave", CRASHES)
def test_a_preview_changes_nothing_and_says_what_recovery_will_do(run, leave):
    run.committed(1)
    leave(run)
    before = (run.journal.checkpoints(), run.journal.transitions(), run.names())
    with Journal.open_read_only(run.rundir.journal_path) as reader:
        foreseen = preview(reader, run.rundir)

    assert not foreseen.applied
    assert before == (run.journal.checkpoints(), run.journal.transitions(), run.names())
    assert [action.text for action in foreseen.actions] == [action.text for action in run.recover().actions]


class Crash(BaseException):
    """The process is gone."""


DURABLE = ("rename_new", "exchange", "sync_directory", "remove_tree")
JOURNALLED = ("adopt", "advance", "finish_retirement")


class Interrupter:
    """Lets the process die before, in the middle of, or after the n-th durable call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.calls = 0
        self.at = at
        for name in DURABLE:
            monkeypatch.setattr(durable, name, self.wrapped(getattr(durable, name)))
        for name in JOURNALLED:
            monkeypatch.setattr(Journal, name, self.wrapped(getattr(Journal, name)))

    def wrapped(self, function: Callable):
        @functools.wraps(function)
        def call(*args, **kwargs):
            self.tick()
            if function.__name__ == "remove_tree" and args[0].is_dir():
                next(args[0].iterdir(), args[0] / "nothing").unlink(missing_ok=True)
                self.tick()
            result = function(*args, **kwargs)
            self.tick()
            return result

        return call

    def tick(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise Crash


@pytest.mark.parametrize("leave", CRASHES)
def test_recovery_that_dies_at_any_call_is_finished_by_the_next(tmp_path, leave, new_run):
    prepared = new_run(tmp_path / "prepared" / "alpha")
    prepared.committed(1)
    ends, steps = leave(prepared)
    prepared.journal.close()
    at = died = 0
    while died == at:
        at += 1
        place = tmp_path / str(at)
        shutil.copytree(tmp_path / "prepared", place, symlinks=True)
        run = new_run(place / "alpha")
        with pytest.MonkeyPatch.context() as monkeypatch:
            Interrupter(monkeypatch, at)
            try:
                run.recover()
            except Crash:
                died = at
        run.restart()
        run.recover()
        assert_as_it_must_be(run, ends, steps)
        run.journal.close()

    assert at > 2


@pytest.fixture
def new_run(run):
    return type(run)


# --- single promises -------------------------------------------------------------------------


def test_a_step_that_was_rolled_back_can_be_saved_again(run):
    run.writing(10)
    run.restart()
    run.recover()

    assert run.is_intact(run.committed(10))


def test_a_damaged_gathered_checkpoint_is_kept_for_inspection_and_the_older_one_stays(run):
    older = run.committed(9)
    record = run.gathered(10)
    damage(run.path(record.staging_directory) / "b.bin")
    run.restart()
    report = run.recover()
    [kept] = report.set_aside.values()

    assert report.set_aside == {record.staging_directory: kept}
    assert (run.path(kept) / "a.bin").exists()
    assert "b.bin" in run.row(record).reason
    assert run.is_intact(older)
    [told] = report.reports or run.preview().reports
    assert told == ReportStranger(kept, told.why)


def test_both_damaged_copies_of_a_gathered_checkpoint_are_kept(run):
    record = run.gathered(10)
    staging, final = run.path(record.staging_directory), run.path(record.directory)
    shutil.copytree(staging, final)
    damage(staging / "a.bin")
    damage(final / "a.bin")
    run.restart()
    report = run.recover()

    assert {record.staging_directory, record.directory} == set(report.set_aside)
    assert len(set(report.set_aside.values())) == 2
    assert all((run.path(kept) / "b.bin").exists() for kept in report.set_aside.values())
    assert run.recover().changes == ()


def test_what_stands_at_the_final_name_is_set_aside_with_all_its_bytes(run):
    record = run.gathered(10)
    foreign = run.path(record.directory)
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    run.restart()
    report = run.recover()

    assert run.is_intact(run.row(record))
    kept = run.path(report.set_aside[record.directory])
    assert (kept / "thesis.tex").read_text() == "years of work"


def test_unknown_names_survive_recovery(run):
    run.committed(1)
    run.writing(10)
    series = run.path("checkpoint")
    (series / "notes").mkdir()
    (series / "notes" / "n.txt").write_text("n")
    (series / "step-77").mkdir()
    (series / ".step-77.e9.a99.incomplete").mkdir()
    (series / ".step-77.e9.a98.retired").mkdir()
    (series / "step-78").symlink_to("step-1")
    run.restart()
    report = run.recover()
    strangers = {action.path for action in report.reports}

    assert {
        "checkpoint/notes",
        "checkpoint/step-77",
        "checkpoint/.step-77.e9.a99.incomplete",
        "checkpoint/.step-77.e9.a98.retired",
        "checkpoint/step-78",
    } == strangers
    assert strangers <= {f"checkpoint/{name}" for name in run.names()}
    assert (series / "notes" / "n.txt").read_text() == "n"


def test_a_link_at_a_staging_name_is_neither_followed_nor_removed(run, tmp_path):
    record = run.prewritten(10)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("p")
    staging = run.path(record.staging_directory)
    staging.rmdir()
    staging.symlink_to(elsewhere)
    run.restart()
    run.recover()

    assert run.row(record).state is S.FAILED
    assert staging.is_symlink()
    assert (elsewhere / "precious").read_text() == "p"


def test_recovery_of_an_older_epoch_changes_nothing(run):
    record = run.writing(10)
    run.restart()
    run.journal.begin_epoch(host="h", pid=2, command="another start", versions={})

    with pytest.raises(StaleWriter):
        run.recover()
    assert run.row(record).state is S.WRITING
    assert run.path(record.staging_directory).is_dir()


def test_recovery_is_in_the_history_with_its_own_epoch(run):
    record = run.gathered(10)
    run.restart()
    recover(run.journal, run.rundir, epoch=run.epoch, host="node-7", pid=4711)
    last = run.journal.transitions(record.id)[-1]

    assert (last.source, last.dest) == (S.GATHERED, S.COMMITTED)
    assert (last.epoch, last.host, last.pid, last.note) == (run.epoch, "node-7", 4711, "recovery")


def test_a_failed_attempt_says_why_recovery_failed_it(run):
    record = run.writing(10)
    run.restart()
    run.recover()

    assert "interrupted while WRITING" in run.row(record).reason


def test_every_series_is_recovered(run):
    records = [run.gathered(10, series=name) for name in ("checkpoint", "snapshot")]
    run.restart()
    report = run.recover()

    assert [RollForward, RollForward] == [type(action) for action in report.changes]
    assert all(run.is_intact(run.row(record)) for record in records)


def test_a_retirement_is_finished_although_its_step_is_being_saved_again(run):
    old = run.retiring(10)
    run.path(old.directory).rename(run.path(old.retired_directory))
    new = run.gathered(10)
    run.restart()
    report = run.recover()

    assert [FinishRetirement, RollForward] == [type(action) for action in report.changes]
    assert run.is_intact(run.row(new))
    assert not run.path(old.retired_directory).exists()


def test_a_missing_checkpoint_is_reported_and_its_row_stays(run):
    record = run.committed(10)
    shutil.rmtree(run.path(record.directory))
    run.restart()
    [told] = run.recover().actions

    assert told == ReportMissing(run.row(record), told.why)
    assert run.row(record).is_live


# --- the order of durable steps, which no crash of the process alone can show ------------------


def watch(monkeypatch) -> list[str]:
    """What happens in which order, seen from outside: which names stand there when, and what is synced."""
    seen: list[str] = []

    def spy(owner, name: str, describe: Callable[..., str]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args, **kwargs):
            result = original(*args, **kwargs)
            seen.append(describe(*args, **kwargs))
            return result

        monkeypatch.setattr(owner, name, call)

    spy(durable, "sync_directory", lambda path: f"synced {path.name}")
    spy(durable, "remove_tree", lambda path: f"removed {path.name}")
    spy(durable, "rename_new", lambda source, target: f"renamed {source.name}")
    spy(Journal, "advance", lambda journal, id, source, dest, **facts: f"journal {dest}")
    spy(Journal, "finish_retirement", lambda journal, id, **facts: "journal retired")
    return seen


def test_a_rolled_back_directory_is_durably_gone_before_its_row_is_failed(run, monkeypatch):
    """Rule D2: otherwise a power cut may bring back the directory of a FAILED row."""
    record = run.writing(10)
    run.restart()
    seen = watch(monkeypatch)
    run.recover()

    # The first sync is for a rename to this name that a dead process may not have synced.
    gone = ["synced checkpoint", f"removed {name_of(record.staging_directory)}"]
    assert seen == ["synced checkpoint", *gone, "journal FAILED"]


def test_a_published_checkpoint_is_synced_before_it_is_committed(run, monkeypatch):
    """Rule R2: the rename may be visible and still not be on disk."""
    record = run.gathered(10)
    run.rundir.publish(record, None)
    run.restart()
    seen = watch(monkeypatch)
    run.recover()

    assert seen == ["synced checkpoint", "journal COMMITTED"]


def test_a_gathered_checkpoint_is_renamed_and_synced_before_it_is_committed(run, monkeypatch):
    record = run.gathered(10)
    run.restart()
    seen = watch(monkeypatch)
    run.recover()

    assert seen == [f"renamed {name_of(record.staging_directory)}", "synced checkpoint", "journal COMMITTED"]


def test_a_retired_checkpoint_loses_its_final_name_first_and_its_row_last(run, monkeypatch):
    """Rule D1: no published name ever holds half a checkpoint."""
    record = run.retiring(10)
    run.restart()
    seen = watch(monkeypatch)
    run.recover()

    assert seen == [
        "renamed step-10",
        "synced checkpoint",
        "synced checkpoint",
        f"removed {name_of(record.retired_directory)}",
        "journal retired",
    ]


def test_a_given_up_checkpoint_is_durably_set_aside_before_its_row_is_failed(run, monkeypatch):
    record = run.gathered(10)
    damage(run.path(record.staging_directory) / "a.bin")
    run.restart()
    seen = watch(monkeypatch)
    run.recover()

    assert seen == [f"renamed {name_of(record.staging_directory)}", "synced checkpoint", "journal FAILED"]


def test_an_overwritten_checkpoint_is_removed_only_after_the_new_one_is_committed(run, monkeypatch):
    old = run.committed(10)
    run.gathered(10, overwrite=True)
    run.restart()
    seen = watch(monkeypatch)
    run.recover()

    assert seen.index("journal COMMITTED") < seen.index(f"removed {name_of(old.retired_directory)}")


def name_of(path: str) -> str:
    return path.rpartition("/")[2]
