"""What a save costs does not depend on how many there were before it, and a start and a resume read no history."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from long_history import add_live, add_past, counted

from ckptmgr import (
    DCP,
    CheckpointManager,
    HuggingFace,
    JournalCorrupt,
    KeepAll,
    KeepLast,
    SaveFailed,
    Series,
    Timeouts,
    UnsafeResume,
    WriterOptions,
    commit,
    durable,
    retention,
)
from ckptmgr.cli import main
from ckptmgr.cli.check import judge
from ckptmgr.journal import Journal, questions
from ckptmgr.lifecycle import CheckpointRecord, Format
from ckptmgr.manifest import MANIFEST_NAME
from ckptmgr.recovery import plan, preview, with_traces
from ckptmgr.resume import Verdict, asked_of, check
from ckptmgr.retention import KeepRule
from ckptmgr.rundir import RunDirectory

PASTS = (10, 120)
LAST_TWO = KeepLast(2)
Work = Callable[[], tuple[int, int, int]]


def opened(run: Path, keep: KeepRule = LAST_TWO) -> CheckpointManager:
    return CheckpointManager(
        run,
        series=[Series("checkpoint", DCP(), keep=keep), Series("hf", HuggingFace(), keep=KeepLast(1))],
        timeouts=Timeouts(setup_s=30, write_s=20, gather_s=5, close_s=20, close_on_error_s=5),
        writers=WriterOptions(nice=0),
    )


def save(manager: CheckpointManager, step: int, series: str = "checkpoint", **options: Any) -> None:
    pending = manager.save(step, {"model": torch.nn.Linear(2, 2)}, series, **options)
    assert pending is not None
    pending.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two runs that differ only in the length of their past."""
    made = {}
    for past in PASTS:
        run = made[past] = tmp_path_factory.mktemp(f"past-{past}") / "run"
        opened(run).close()
        for series, layout in (("checkpoint", Format.DCP), ("hf", Format.HUGGINGFACE)):
            add_past(RunDirectory(run).journal_path, past, series, layout)
        with opened(run) as manager:
            for step in range(1000, 1004):
                save(manager, step)
                save(manager, step, "hf")
    return made


@pytest.fixture
def run_of(runs: dict[int, Path], tmp_path: Path) -> dict[int, Path]:
    """Copies of the two for one test."""
    copies = {past: shutil.copytree(run.parent, tmp_path / str(past), symlinks=True) for past, run in runs.items()}
    return {past: copy / "run" for past, copy in copies.items()}


def test_a_save_reads_no_more_of_a_journal_with_a_longer_past(run_of: dict[int, Path]) -> None:
    """Overwriting, letting others go, and a save after one that failed included."""
    costs = []
    with pytest.MonkeyPatch.context() as patch, counted() as steps:
        for run in run_of.values():
            with opened(run) as manager:
                steps()
                cost = []
                for step, series in itertools.product((2000, 2001), ("checkpoint", "hf")):
                    save(manager, step, series)
                    cost.append(steps())
                save(manager, 2001, overwrite=True)
                cost.append(steps())
                patch.setattr(durable, "make_directory", _full)
                with pytest.raises(SaveFailed):
                    save(manager, 2002, "hf")
                patch.undo()
                steps()
                save(manager, 2003, "hf")
                cost.append(steps())
            costs.append(cost)

    assert all(cost > 100 for cost in costs[0])
    assert costs[0] == costs[1]


def test_a_save_reads_and_writes_no_more_where_more_are_kept(tmp_path: Path) -> None:
    """But the first after a start, which tells the journal about each why it stays."""
    costs = []
    for kept in (4, 80):
        run = tmp_path / str(kept) / "run"
        opened(run, KeepAll()).close()
        add_live(RunDirectory(run).journal_path, kept, "checkpoint", Format.DCP)
        with counted() as steps, opened(run, KeepAll()) as manager:
            save(manager, 1000)
            steps()
            cost = []
            for step, overwrite in ((1001, False), (1000, True), (1002, False)):
                save(manager, step, overwrite=overwrite)
                cost.append(steps())
        costs.append(cost)
        with Journal.open_read_only(RunDirectory(run).journal_path) as journal:
            decisions = journal.decisions()
            why = {record.step: decisions[record.id] for record in journal.checkpoints() if record.is_live}
        assert [why[step] for step in (0, kept - 1, 1000, 1001)] == [("keep", ("all",))] * 4
        assert why[1002] == ("keep", ("all", "newest committed"))
        assert len(why) == kept + 3

    assert all(cost > 100 for cost in costs[0])
    assert [round(cost, -2) for cost in costs[0]] == [round(cost, -2) for cost in costs[1]]


@pytest.fixture(scope="module")
def kept_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two runs that keep few and many: the newest two are whole, of the others there are directories."""
    made = {}
    for kept in (4, 80):
        run = made[kept] = tmp_path_factory.mktemp(f"kept-{kept}") / "run"
        opened(run, KeepAll()).close()
        add_live(RunDirectory(run).journal_path, kept, "checkpoint", Format.DCP)
        for step in range(kept):
            (run / "checkpoint" / f"step-{step}").mkdir(parents=True)
        with opened(run, KeepAll()) as manager:
            save(manager, 999)
            save(manager, 1000)
    return made


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], tuple[int, int, int]]]:
    """A function: how many records and manifests were made since its last call, and how many steps SQLite took."""
    made = [0, 0]

    def count(owner: type, name: str, number: int) -> None:
        real = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            made[number] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(questions.Questions, "_record", 0)
    count(RunDirectory, "read_manifest", 1)
    with counted() as steps:

        def since() -> tuple[int, int, int]:
            found = (*made, steps())
            made[:] = 0, 0
            return found

        yield since


def test_finding_the_newest_reads_no_more_where_more_are_kept(kept_runs: dict[int, Path], work: Work) -> None:
    """Neither of the journal nor of manifests; a step that is asked for is found like that as well."""
    costs = []
    for run in kept_runs.values():
        with opened(run, KeepAll()) as manager:
            work()
            cost = []
            for step in (None, 1000):
                resumed = manager.resume({"model": torch.nn.Linear(2, 2)}, step=step)
                assert resumed is not None
                assert resumed.step == 1000
                cost.append(work())
        costs.append(cost)

    assert all(0 < records < 5 and manifests == 1 and steps > 100 for records, manifests, steps in costs[0])
    assert costs[0] == costs[1]


def test_a_start_and_latest_read_no_more_manifests_where_more_are_kept(
    kept_runs: dict[int, Path], work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    """Opening a journal reads all of it, and a manager remembers each that is live; their directories it lists."""
    counts = []
    for kept, run in kept_runs.items():
        work()
        opened(run, KeepAll()).close()
        records, started, _ = work()
        assert records == kept + 2
        assert main(["latest", str(run)]) == 0
        records, manifests, _ = work()
        counts.append((started, records, manifests))

    assert capsys.readouterr().out.split() == [str(run / "checkpoint" / "step-1000") for run in kept_runs.values()]
    assert counts[0] == counts[1]
    assert counts[0][0] == 0
    assert counts[0][2] == 1


def test_a_start_reads_what_stands_where_another_attempt_is_not_settled(
    kept_runs: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Say published over it, with what it replaced removed by hand, so that no name says so."""
    shutil.copytree(kept_runs[4].parent, tmp_path / "copy")
    rundir = RunDirectory(tmp_path / "copy" / "run")
    unread: list[frozenset[str]] = []
    real = rundir.listing
    monkeypatch.setattr(rundir, "listing", lambda *args, **how: unread.append(how["unread"]) or real(*args, **how))
    with Journal.open(rundir.journal_path) as journal:
        epoch = journal.begin_epoch(host="h", pid=1, command="c", versions={})
        assert len(preview(journal, rundir).actions) == 0
        journal.begin(
            series="checkpoint", step=999, format=Format.DCP, epoch=epoch, world_size=1, overwrite=True, host="h", pid=1
        )
        assert [type(action).__name__ for action in preview(journal, rundir).actions] == ["RollBack"]

    assert unread[0] - unread[1] == {"checkpoint/step-999"}
    assert len(unread[1]) == 5


DAMAGE = {
    "the newest is retired": "UPDATE checkpoint SET retire_started_at = 1.0, retire_reason = 'x' WHERE step = 1000",
    "the newest is another": "UPDATE checkpoint SET commit_seq = 1000 WHERE step = 999",
    "the newest is of a wrong step": "UPDATE checkpoint SET step = 998, directory = 'checkpoint/step-998',"
    " staging_directory = replace(staging_directory, '1000', '998') WHERE step = 1000",
    "the newest has other files": "UPDATE file SET size = 4711 WHERE checkpoint_id = (SELECT max(id) FROM checkpoint)",
}


@pytest.mark.parametrize(
    ("what", "step"), [*((what, None) for what in DAMAGE), *((what, 1000) for what in DAMAGE if "another" not in what)]
)
def test_a_journal_that_is_damaged_after_the_start_gives_no_other_answer(
    kept_runs: dict[int, Path], tmp_path: Path, what: str, step: int | None
) -> None:
    shutil.copytree(kept_runs[4].parent, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    with opened(run, KeepAll()) as manager:
        with contextlib.closing(sqlite3.connect(RunDirectory(run).journal_path, isolation_level=None)) as raw:
            assert raw.execute(DAMAGE[what]).rowcount > 0
        with pytest.raises(JournalCorrupt):
            manager.resume({"model": torch.nn.Linear(2, 2)}, step=step)


def test_a_newer_one_that_the_journal_does_not_know_is_found_among_many(
    kept_runs: dict[int, Path], tmp_path: Path
) -> None:
    """Also where it appears while the manager is open."""
    shutil.copytree(kept_runs[80].parent, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    with opened(run, KeepAll()) as manager:
        newer = shutil.copytree(run / "checkpoint" / "step-1000", run / "checkpoint" / "step-2000") / MANIFEST_NAME
        body = json.loads(newer.read_text(encoding="utf-8"))
        newer.write_text(json.dumps(body | {"step": 2000, "attempt": body["attempt"] + 1}), encoding="utf-8")
        with pytest.raises(UnsafeResume, match="R012"):
            manager.resume({"model": torch.nn.Linear(2, 2)})
        older = manager.resume({"model": torch.nn.Linear(2, 2)}, allow_older=True)
        assert older is not None
        assert older.step == 1000
    with Journal.open_read_only(RunDirectory(run).journal_path) as journal:
        report = judge(journal, RunDirectory(run), "checkpoint", first=1)
    assert (report.verdict, [finding.id for finding in report.findings]) == (Verdict.OLDER, ["R012"])


def test_a_pin_of_another_moment_counts_at_the_next_commit(tmp_path: Path) -> None:
    """What is live is kept in memory; who is pinned is asked anew."""
    run = tmp_path / "run"
    with opened(run, KeepLast(1)) as manager:
        save(manager, 0)
        manager._journal.pin("checkpoint", 0)
        save(manager, 1)
        save(manager, 2)
        manager._journal.unpin("checkpoint", 0)
        assert [record.step for record in manager._journal.checkpoints(live_only=True)] == [0, 2]
        save(manager, 3)
        assert [record.step for record in manager._journal.checkpoints(live_only=True)] == [3]


def test_the_keep_rule_is_asked_while_the_ranks_write_and_again_only_where_it_was_asked_too_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, publish, plan_ahead = retention.plan, RunDirectory.publish, commit.Leader.plan_ahead
    asked: list[str] = []
    monkeypatch.setattr(retention, "plan", lambda *args, **how: asked.append("plan") or plan(*args, **how))
    monkeypatch.setattr(RunDirectory, "publish", lambda *args: asked.append("publish") or publish(*args))

    def pinned_at_once(leader: commit.Leader, attempt: commit.Attempt, job: commit.Job) -> None:
        plan_ahead(leader, attempt, job)
        if job.step == 2:
            leader._journal.pin("checkpoint", 1)

    monkeypatch.setattr(commit.Leader, "plan_ahead", pinned_at_once)
    with opened(tmp_path / "run", KeepLast(1)) as manager:
        save(manager, 0)
        asked.clear()
        save(manager, 1)
        assert asked == ["plan", "publish"]
        save(manager, 2)
        assert asked[2:] == ["plan", "publish", "plan"]
        assert [record.step for record in manager._journal.checkpoints(live_only=True)] == [1, 2]


def _full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_nothing_is_made_of_rows_that_are_gone(run_of: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite looks at every row at a start and a resume, which takes no time; making records of them would."""
    made: list[CheckpointRecord] = []
    real = questions.Questions._record

    def record(self: questions.Questions, row: Any) -> CheckpointRecord:
        made.append(real(self, row))
        return made[-1]

    monkeypatch.setattr(questions.Questions, "_record", record)
    counts = []
    for run in run_of.values():
        count = []
        for doing in (
            lambda run=run: opened(run).close(),
            lambda run=run: resumed(run),
            lambda run=run: main(["latest", str(run)]),
            lambda run=run: main(["check", str(run)]),
            lambda run=run: main(["check", str(run), "--step", "1003"]),
            lambda run=run: main(["recover", str(run)]),
            lambda run=run: main(["show", str(run), "1003"]),
        ):
            made.clear()
            doing()
            count.append(len(made))
        counts.append(count)

    assert counts[0] == counts[1]
    assert all(0 < count < 20 for count in counts[0])


def resumed(run: Path) -> None:
    with opened(run) as manager:
        assert manager.resume({"model": torch.nn.Linear(2, 2)}) is not None


def test_what_is_left_out_changes_neither_recovery_nor_what_is_found(run_of: dict[int, Path]) -> None:
    """The disk has traces of everything: of attempts that failed, that are retired, and of none of the journal's."""
    run = run_of[PASTS[0]]
    rundir = RunDirectory(run)
    add_past(rundir.journal_path, 4, "checkpoint", Format.DCP)  # so that something failed since the newest commit
    with Journal.open(rundir.journal_path) as journal:
        rows = journal.checkpoints()
        failed = next(row for row in rows if row.reason is not None)
        gone = [row for row in rows if row.retired_at is not None or row.reason is not None]
        live = [row for row in rows if row.is_live and row.series == "checkpoint"]
        places = [place for row in gone[::3] for place in (row.directory, row.staging_directory, row.retired_directory)]
        for number, place in enumerate(place for place in places if not (run / place).exists()):
            if number % 2:
                shutil.copytree(run / live[0].directory, run / place)
            else:
                (run / place).mkdir()
        shutil.copytree(run / live[0].directory, run / "checkpoint" / ".step-1.e77.a4711.incomplete")
        found = rundir.listing(journal.series())

        assert preview(journal, rundir).actions == plan(rows, found)
        assert len(preview(journal, rundir).actions) > 10
        for step, newest in ((None, len(live)), (None, 1), (live[0].step, 1), (failed.step, 1), (4711, 1)):
            asked = asked_of(journal, "checkpoint", step, newest)
            besides = {row.directory for row in live if row not in asked}
            there = [item for item in found if item.path not in besides]
            needed = with_traces(journal, asked, there)
            few = check(needed, there, series="checkpoint", step=step, besides=besides)
            all_ = check(rows, found, series="checkpoint", step=step)

            assert few.findings == all_.findings
            assert few.candidates == all_.candidates[:newest]
            assert few.all_findings
            assert len(needed) < len(rows)
        assert {finding.id for finding in check(rows, found, series="checkpoint").findings} >= {"R007", "R008"}
