"""
A manager, whatever is done with it and to it, does what its model does.

Saves of both formats, waited for or not; faults that the kernel itself makes; processes that die in the
middle of a save or of a recovery; pins, policies, damage. ``CKPTMGR_FULL_SWEEP=1`` tries many more.
"""

from __future__ import annotations

import copy
import os
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crash_run
import manager_model
import pytest
import rot
from child_process import CRASHED, KILLED, AtEffect, ForkServer
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from manager_model import FOLDER, KEEP, Attempt, Model

from ckptmgr.answers import PendingSave
from ckptmgr.commit import Committed
from ckptmgr.errors import SaveFailed, StepAlreadySaved, UnsafeResume
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import CheckpointState
from ckptmgr.manifest import MANIFEST_NAME
from ckptmgr.recovery import FoundKind
from ckptmgr.rundir import RunDirectory

FULL = os.environ.get("CKPTMGR_FULL_SWEEP") == "1"
SERIES = st.sampled_from(["dcp", "hf"])
STEPS = st.integers(0, 4)
LOSSES = st.sampled_from([None, 0.25, 0.5, 1.0])
POLICIES = st.fixed_dictionaries({series: st.sampled_from(list(KEEP)) for series in ("dcp", "hf")})
#: Mostly, or little would happen.
OVERWRITE = st.sampled_from([True, True, False])
Saving = tuple[str, int, float | None, bool]
SAVES = st.lists(st.tuples(SERIES, STEPS, LOSSES, OVERWRITE), min_size=1, max_size=7)
#: How a disk that refuses, or a writer that dies, is had without mocking either.
FAULTS = st.sampled_from(["writer is killed at work", "writer may write no file", "writer was killed"])
#: In the trainer, from opening the run to the last deletion; or in its writer, which takes the trainer along.
DEATHS = st.builds(AtEffect, st.integers(1, 75)) | st.builds(AtEffect, st.integers(1, 12), in_writer=st.just(True))
DAMAGES = st.sampled_from(["flip", "flip", "flip", "truncate", "extend", "missing"])


class Managing(RuleBasedStateMachine):
    """One run; *forks* and *folder* are set by the test."""

    forks: ForkServer
    folder: Path
    _runs = 0

    def __init__(self) -> None:
        super().__init__()
        Managing._runs += 1
        self.run = self.folder / str(Managing._runs) / "alpha"
        self.run.parent.mkdir()
        self.rundir = RunDirectory(self.run)
        self.model = Model()
        self.gens = iter(range(1, 1000))
        self.pending: dict[str, tuple[Attempt, PendingSave]] = {}
        self.heard: list[Committed] = []

    # -- opening and closing ----------------------------------------------------------------------

    @initialize(keep=POLICIES)
    def open(self, keep: dict[str, str]) -> None:
        self.keep = keep
        self.manager = manager_model.opened(self.run, keep, on_commit=self.heard.append)

    @rule(keep=POLICIES)
    def close_and_reopen(self, keep: dict[str, str]) -> None:
        self.close()
        self.open(keep)

    def close(self) -> None:
        self.manager.close()
        for series in list(self.pending):
            self.settle(series)

    def settle(self, series: str) -> None:
        """What is on its way there is COMMITTED, and what it lets go is gone."""
        if series in self.pending:
            attempt, pending = self.pending.pop(series)
            pending.wait()
            self.committed(attempt)

    def settle_all(self) -> None:
        for series in list(self.pending):
            self.settle(series)

    def committed(self, attempt: Attempt) -> None:
        self.model.commit(attempt, self.keep[attempt.series])
        mine = [event for event in self.heard if event.record.metrics["gen"] == attempt.gen]
        assert [(event.series, event.step) for event in mine] == [(attempt.series, attempt.step)]

    # -- saving -----------------------------------------------------------------------------------

    @rule(saves=SAVES, wait=st.booleans())
    def train(self, saves: list[Saving], wait: bool) -> None:
        for series, step, loss, overwrite in saves:
            attempt = Attempt(series, step, next(self.gens), loss)
            pending = self.begin(attempt, overwrite)
            if pending is not None:
                self.pending[series] = (attempt, pending)
        if wait:
            self.settle_all()

    @rule(series=SERIES, step=STEPS, overwrite=OVERWRITE, fault=FAULTS)
    def save_in_trouble(self, series: str, step: int, overwrite: bool, fault: str) -> None:
        self.settle_all()
        pid = self.manager.writer_pid
        if pid is None:
            return  # the one that was killed is replaced by the next save
        attempt = Attempt(series, step, next(self.gens), None)
        if fault == "writer is killed at work":
            os.kill(pid, signal.SIGSTOP)
        elif fault == "writer may write no file":
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
        else:
            os.kill(pid, signal.SIGKILL)
        try:
            pending = self.begin(attempt, overwrite)
        finally:
            if fault == "writer is killed at work":
                os.kill(pid, signal.SIGKILL)
        if pending is not None:
            try:
                pending.wait()
            except SaveFailed:
                self.model.fail(attempt)
            else:
                # One that is gone before it was given anything is replaced.
                assert fault != "writer may write no file", "it was saved all the same"
                self.committed(attempt)
        if fault == "writer may write no file":
            if self.manager.writer_pid == pid:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return
        # A save that is given to it while it dies fails, and that is another rule's business.
        deadline = time.monotonic() + 20
        while self.manager.writer_pid == pid:
            assert time.monotonic() < deadline, "the writer that was killed goes on"
            time.sleep(0.01)

    def begin(self, attempt: Attempt, overwrite: bool) -> PendingSave | None:
        """Call save; None if it refuses a step that is saved, as it must."""
        state = crash_run.state(attempt.series, attempt.step, attempt.gen)
        on_its_way = self.pending.get(attempt.series)
        try:
            pending = self.manager.save(
                attempt.step, state, attempt.series, metrics=attempt.metrics, overwrite=overwrite
            )
        except StepAlreadySaved:
            self.settle(attempt.series)
            assert not overwrite
            assert self.model.at(attempt.series, attempt.step)
            return None
        if on_its_way is not None:
            # Only one at a time, so that is over; what it lets go may still be on the disk.
            del self.pending[attempt.series]
            assert on_its_way[1].state is CheckpointState.COMMITTED
            on_its_way[1].wait()
            self.committed(on_its_way[0])
        assert overwrite or not self.model.at(attempt.series, attempt.step)
        assert pending is not None
        return pending

    # -- dying ------------------------------------------------------------------------------------

    @rule(series=SERIES, step=STEPS, loss=LOSSES, at=DEATHS, again=st.none() | st.integers(1, 25))
    def die_while_saving(self, series: str, step: int, loss: float | None, at: AtEffect, again: int | None) -> None:
        self.close()
        attempt = Attempt(series, step, next(self.gens), loss)
        ended = self.forks.run(manager_model.save_and_die, self.run, self.keep, attempt, at)
        assert ended.status in (0, CRASHED, KILLED), ended.output
        if again is not None:
            died = self.forks.run(manager_model.recover_and_die, self.run, self.keep, AtEffect(again))
            assert died.status in (0, CRASHED), died.output
        self.open(self.keep)
        mine = [row for row in self.rows() if row.metrics.get("gen") == attempt.gen]
        if "acknowledged" in ended.output:
            assert [row.state for row in mine] == [CheckpointState.COMMITTED], "acknowledged, and not COMMITTED"
        for row in mine:
            if row.state is CheckpointState.COMMITTED:
                # Recovery knows no keep rule: what such a commit would let go goes with the next one.
                self.model.commit(attempt, "all" if self.committed_by_recovery(row.id) else self.keep[series])
            else:
                self.model.fail(attempt)

    def committed_by_recovery(self, attempt: int) -> bool:
        with Journal.open_read_only(self.rundir.journal_path) as journal:
            return journal.transitions(attempt)[-1].note == "recovery"

    # -- what is asked of it ----------------------------------------------------------------------

    @rule(series=SERIES, which=st.integers(0, 2), then=SAVES)
    def pin(self, series: str, which: int, then: list[Saving]) -> None:
        self.settle_all()
        if live := self.model.live(series):
            step = live[which % len(live)].step
            self.manager._journal.pin(series, step)
            self.model.pins.add((series, step))
        self.train(then, True)

    @precondition(lambda self: self.model.pins)
    @rule(which=st.integers(0, 2))
    def unpin(self, which: int) -> None:
        self.settle_all()
        series, step = sorted(self.model.pins)[which % len(self.model.pins)]
        self.manager._journal.unpin(series, step)
        self.model.pins.remove((series, step))

    @precondition(lambda self: self.model.of("dcp") or self.pending)
    @rule(older=st.booleans(), step=st.none() | STEPS)
    def resume(self, older: bool, step: int | None) -> None:
        state = manager_model.empty_state()
        before = manager_model.loaded(state)
        try:
            resumed = self.manager.resume(state, step, series="dcp", allow_older=older)
        except UnsafeResume:
            resumed = None
        self.settle("dcp")
        expected = self.model.resumes("dcp", step=step, older=older)
        if expected is None:
            assert resumed is None
            assert manager_model.loaded(state) == before, "nothing was resumed, and the state has changed"
        else:
            assert resumed is not None
            assert (resumed.step, resumed.metrics["gen"]) == (expected.step, expected.gen)
            assert manager_model.loaded(state) == manager_model.loaded(
                crash_run.state("dcp", expected.step, expected.gen)
            )

    @precondition(lambda self: self.model.attempts)
    @rule(series=SERIES)
    def check(self, series: str) -> None:
        self.settle_all()
        status, document = rot._asked("check", str(self.run), "--series", series, "--deep")
        (report,) = document["reports"]
        live = self.model.live(series)
        found = [(candidate["step"], candidate["safe"]) for candidate in report["candidates"]]
        assert found == [(one.step, not one.damaged) for one in reversed(live)]
        chosen = self.model.resumes(series, older=True)
        assert document["step"] == (chosen.step if chosen else None)
        assert document["damaged"] == any(one.damaged for one in live)
        assert (status == 0) == (bool(live) and not document["damaged"])

    # -- what happens to it -----------------------------------------------------------------------

    @rule(first=SAVES, series=SERIES, which=st.integers(0, 2), file=st.integers(0, 20), how=DAMAGES)
    def damage(self, first: list[Saving], series: str, which: int, file: int, how: str) -> None:
        self.train(first, True)
        live = self.model.live(series)
        if not live:
            return
        attempt = live[-1 - which % len(live)]
        folder = self.run / attempt.directory
        names = sorted(path for path in folder.rglob("*") if path.is_file())
        path = names[file % len(names)]
        size = path.stat().st_size
        if path.name == MANIFEST_NAME:
            # Not away: a directory that nothing says is ours is neither deleted nor moved.
            os.truncate(path, size // 2)
        elif how == "missing":
            path.unlink()
        elif how == "extend" or not size:
            path.write_bytes(path.read_bytes() + b"\0")
        elif how == "truncate":
            os.truncate(path, size - 1)
        else:
            rot.flip(path, size // 2, 3)
        attempt.damaged = True
        self.check(series)
        for older in (False, True):
            self.resume(older, None)

    # -- what always holds ------------------------------------------------------------------------

    def rows(self) -> list[Any]:
        with Journal.open_read_only(self.rundir.journal_path) as journal:
            return journal.checkpoints()

    def possible(self, series: str) -> Iterator[Model]:
        """The model; and what it is once the save on its way there is over."""
        yield self.model
        if series in self.pending:
            after = copy.deepcopy(self.model)
            after.commit(copy.copy(self.pending[series][0]), self.keep[series])
            yield after

    @invariant()
    def journal_disk_and_meta_are_the_models(self) -> None:
        rows, meta = self.rows(), self.rundir.read_meta()
        assert meta is not None
        for series in FOLDER:
            possible = list(self.possible(series))
            listed = [[one.directory for one in model.live(series)] for model in possible]
            assert meta[f"{series}_list"] in listed
            if series in self.pending:
                continue
            mine = [
                (row.step, row.metrics["gen"], row.state.value, row.is_live, row.pinned)
                for row in rows
                if row.series == series
            ]
            assert mine == [
                (
                    one.step,
                    one.gen,
                    "COMMITTED" if one.committed else "FAILED",
                    one.live,
                    one.live and (series, one.step) in self.model.pins,
                )
                for one in self.model.of(series)
            ]
            listing = self.rundir.listing([series])
            there = {item.path for item in listing if item.kind not in (FoundKind.LINK, FoundKind.QUARANTINED)}
            assert there == set(listed[0])
        if "hf" not in self.pending:
            link = self.run / "hf" / "hf-latest"
            live = self.model.live("hf")
            assert link.is_symlink() == bool(live)
            assert not live or f"hf/{link.readlink()}" == live[-1].directory

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        try:
            self.close()
            self.journal_disk_and_meta_are_the_models()
            whole = {one.gen for series in FOLDER for one in self.model.live(series) if not one.damaged}
            for row in self.rows():
                if row.is_live and row.metrics["gen"] in whole:
                    crash_run.content(self.run, row)
        finally:
            self.manager.close(5)
            shutil.rmtree(self.run.parent)


@pytest.mark.slow
@pytest.mark.timeout(7200 if FULL else 240)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_manager_does_what_its_model_does(forks: ForkServer, tmp_path: Path):
    Managing.forks, Managing.folder = forks, tmp_path
    run_state_machine_as_test(
        Managing,
        settings=settings(
            max_examples=200 if FULL else 4,
            stateful_step_count=30 if FULL else 18,
            derandomize=not FULL,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink] if FULL else [Phase.generate],
            report_multiple_bugs=False,
        ),
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_order_in_which_everything_happens(forks: ForkServer, tmp_path: Path):
    Managing.forks, Managing.folder = forks, tmp_path
    one = Managing()
    fresh = [("dcp", 1, 1.0, False), ("hf", 1, 0.5, False), ("dcp", 2, 0.5, False), ("hf", 2, None, False)]
    more = [("dcp", 3, 1.0, False), ("hf", 3, 1.0, False), ("dcp", 4, None, False), ("hf", 4, 0.25, False)]
    try:
        one.open({"dcp": "all", "hf": "best"})
        for happens in (
            lambda: one.train(fresh, False),
            lambda: one.damage(more, "dcp", 0, 1, "flip"),
            lambda: one.resume(True, 3),
            lambda: one.damage([("hf", 4, 0.5, True)], "hf", 0, 0, "missing"),
            lambda: one.close_and_reopen({"dcp": "last two", "hf": "last"}),
            lambda: one.pin("dcp", 0, [("dcp", 5, None, False), ("dcp", 0, None, False)]),
            lambda: one.save_in_trouble("dcp", 1, True, "writer may write no file"),
            lambda: one.save_in_trouble("hf", 4, True, "writer is killed at work"),
            lambda: one.die_while_saving("dcp", 6, None, AtEffect(20), None),
            lambda: one.die_while_saving("dcp", 1, None, AtEffect(45), 12),
            lambda: one.die_while_saving("hf", 6, None, AtEffect(3, in_writer=True), None),
            lambda: one.unpin(0),
            lambda: one.train([("dcp", 8, None, False), ("hf", 8, None, False), ("dcp", 9, None, False)], False),
            lambda: one.resume(False, None),
            lambda: one.check("dcp"),
            lambda: one.check("hf"),
        ):
            happens()
            one.journal_disk_and_meta_are_the_models()
    finally:
        one.teardown()
