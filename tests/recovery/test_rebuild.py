"""A lost journal, written anew from the manifests on disk."""

from __future__ import annotations

import json
import shutil

import pytest

from ckptmgr.errors import InvalidArgument, JournalError
from ckptmgr.journal import Journal
from ckptmgr.rebuild import preview_rebuild, rebuild
from ckptmgr.rundir import RUN_ID_NAME


@pytest.fixture
def lost(run):
    """A run with four checkpoints, begun in another order than their steps, whose journal is gone."""
    run.saved = [run.committed(30), run.committed(10), run.committed(20, series="snapshot"), run.committed(20)]
    lose(run)
    return run


def lose(run) -> None:
    run.journal.close()
    for path in run.rundir.path.parent.glob("alpha.journal.db*"):
        path.unlink()
    run.journal = Journal.open(run.rundir.journal_path)
    run.epoch = run.journal.begin_epoch(host="h", pid=1, command="recover --rebuild", versions={})


def rebuilt(run):
    return rebuild(run.journal, run.rundir, epoch=run.epoch, host="h", pid=1)


def test_a_rebuilt_journal_knows_every_checkpoint_again_in_its_order(lost):
    report = rebuilt(lost)
    rows = sorted(lost.journal.checkpoints(), key=lambda row: row.commit_seq)

    assert report.applied
    assert report.skipped == ()
    assert [(r.series, r.step, r.id) for r in lost.saved] == [(r.series, r.step, r.id) for r in rows]
    for before, after in zip(lost.saved, rows, strict=True):
        same = ("directory", "staging_directory", "manifest_digest", "bytes", "world_size", "metrics", "per_rank")
        assert [getattr(before, name) for name in same] == [getattr(after, name) for name in same]
        assert after.is_live


def test_a_rebuilt_journal_agrees_with_the_disk_and_the_run_goes_on(lost):
    rebuilt(lost)
    lost.restart()

    assert lost.preview().actions == ()
    assert lost.is_intact(lost.committed(40))
    assert lost.recover().actions == ()


def test_the_epoch_after_a_rebuild_is_newer_than_any_that_the_disk_knows_of(lost):
    """A process of the lost journal that is still alive must not share an epoch, or a staging name, with a new one."""
    assert preview_rebuild(lost.rundir).newest_epoch == max(record.epoch for record in lost.saved)
    (lost.rundir.path / "checkpoint" / ".step-50.e41.a99.incomplete").mkdir()
    assert preview_rebuild(lost.rundir).newest_epoch == 41
    assert lost.journal.begin_epoch(host="h", pid=1, command="c", versions={}, after=41) == 42
    assert lost.journal.begin_epoch(host="h", pid=1, command="c", versions={}, after=41) == 43


def test_a_preview_of_a_rebuild_changes_nothing(lost):
    report = preview_rebuild(lost.rundir)

    assert not report.applied
    assert [record.directory for record in lost.saved] == [item.path for item in report.checkpoints]
    assert lost.journal.checkpoints() == []
    assert {
        "applied": False,
        "run_id": lost.rundir.run_id(),
        "checkpoints": [{"path": r.directory, "series": r.series, "step": r.step} for r in lost.saved],
        "skipped": [],
    } == json.loads(json.dumps(report.to_dict()))


def test_a_rebuild_that_was_interrupted_goes_on_where_it_stopped(lost):
    expected = [(record.series, record.step) for record in lost.saved]
    for kept in range(5):
        lose(lost)
        report = preview_rebuild(lost.rundir)
        lost.journal.set_run_id(report.run_id)
        for item in report.checkpoints[:kept]:
            lost.journal.insert_rebuilt(
                item.manifest, epoch=lost.epoch, manifest_digest=item.manifest_digest, committed_at=1.0, host="h", pid=1
            )
        rebuilt(lost)
        rows = sorted(lost.journal.checkpoints(), key=lambda row: row.commit_seq)

        assert expected == [(row.series, row.step) for row in rows]


def test_a_journal_with_checkpoints_of_its_own_is_not_rebuilt(run):
    run.committed(10)
    run.writing(20)

    with pytest.raises(JournalError, match="of its own"):
        rebuilt(run)
    assert len(run.journal.checkpoints()) == 2


def test_a_run_directory_without_checkpoints_rebuilds_to_an_empty_journal_of_the_same_run(run):
    run_id = run.rundir.run_id()
    lose(run)
    report = rebuilt(run)

    assert (report.checkpoints, report.skipped) == ((), ())
    assert run_id == run.journal.run_id


def test_a_run_directory_that_does_not_exist_rebuilds_to_nothing(run):
    shutil.rmtree(run.rundir.path)
    before = run.journal.run_id
    report = rebuilt(run)

    assert (report.run_id, report.checkpoints) == (None, ())
    assert before == run.journal.run_id


def test_the_run_id_comes_from_the_manifests_if_the_mark_is_lost_too(lost):
    run_id = lost.rundir.run_id()
    (lost.rundir.path / RUN_ID_NAME).unlink()
    report = rebuilt(lost)

    assert len(report.checkpoints) == 4
    assert run_id == report.run_id == lost.journal.run_id == lost.rundir.run_id()


def edit_manifest(run, directory: str, **changes) -> None:
    path = run.path(directory) / "ckptmgr.json"
    body = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(body))


def test_manifests_of_several_runs_without_a_mark_are_refused(lost):
    (lost.rundir.path / RUN_ID_NAME).unlink()
    edit_manifest(lost, "checkpoint/step-10", run_id="another")

    with pytest.raises(InvalidArgument, match="of 2 runs"):
        rebuilt(lost)
    assert lost.journal.checkpoints() == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"run_id": "another"}, "it belongs to run another"),
        ({"step": 11}, "its manifest says it is checkpoint step 11"),
        ({"series": "../checkpoint"}, "its manifest says it is ../checkpoint step 10"),
        ({"format": "hf"}, "its manifest says it is checkpoint step 10"),
        ({"attempt": 0}, "no attempt, epoch or world size"),
        ({"epoch": 0}, "no attempt, epoch or world size"),
        ({"world_size": 0}, "no attempt, epoch or world size"),
        ({"attempt": 1}, "another directory holds attempt 1 too"),
        ({"step": -1}, "its manifest cannot be used"),
    ],
)
def test_a_directory_whose_manifest_does_not_fit_is_skipped_with_the_reason(lost, changes, why):
    edit_manifest(lost, "checkpoint/step-10", **changes)
    report = rebuilt(lost)
    [skipped] = report.skipped

    assert skipped.path == "checkpoint/step-10"
    assert why in skipped.why
    assert len(lost.journal.checkpoints()) == 3
    assert lost.path("checkpoint/step-10").is_dir()


def test_a_damaged_directory_is_skipped(lost):
    (lost.path("checkpoint/step-10") / "a.bin").write_bytes(b"short")
    [skipped] = rebuilt(lost).skipped

    assert "it is damaged (size: a.bin" in skipped.why


def test_a_directory_without_a_manifest_is_skipped(lost):
    (lost.path("checkpoint/step-10") / "ckptmgr.json").unlink()
    [skipped] = rebuilt(lost).skipped

    assert "its manifest cannot be used" in skipped.why


def test_a_step_that_stands_there_in_two_formats_is_taken_in_once(lost):
    shutil.copytree(lost.path("checkpoint/step-10"), lost.path("checkpoint/hf-10"))
    edit_manifest(lost, "checkpoint/hf-10", format="hf", attempt=77, created_at=9e9)
    [skipped] = rebuilt(lost).skipped

    assert skipped.path == "checkpoint/hf-10"
    assert "another directory holds step 10 of checkpoint too" in skipped.why


def test_what_is_no_published_checkpoint_is_not_looked_at(lost, tmp_path):
    root = lost.rundir.path
    (root / "not a series!").mkdir()
    (root / "logs").mkdir()
    (root / "logs" / "today.txt").write_text("x")
    (root / "linked").symlink_to(root / "checkpoint")
    shutil.copytree(root / "checkpoint/step-10", root / "checkpoint/.step-10.e1.a9.incomplete")
    (root / "checkpoint/step-99").write_text("a file")
    report = rebuilt(lost)

    assert len(report.checkpoints) == 4
    assert report.skipped == ()
