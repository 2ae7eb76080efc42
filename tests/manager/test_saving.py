"""Saving: one in flight, overwriting, what is refused, hooks, retention, and what else stands in the run directory."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from opened_managers import Open, Pause
from tiny_models import mixture_of_experts, perceptron, same, whole_state

from ckptmgr import (
    DCP,
    CheckpointError,
    CheckpointManager,
    CheckpointState,
    Committed,
    HuggingFace,
    KeepAll,
    KeepBest,
    KeepEvery,
    KeepFor,
    KeepLast,
    PerRank,
    SaveFailed,
    Series,
    StepAlreadySaved,
    UnsafeResume,
)
from ckptmgr import manager as manager_module
from ckptmgr.errors import (
    ForeignJournal,
    InvalidArgument,
    JournalNotFound,
    ManagerClosed,
    SaveInFlight,
    SetupFailed,
    UnsafePath,
    WaitTimeout,
)
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import CheckpointRecord
from ckptmgr.writers import arena


def _save(manager: CheckpointManager, step: int, state: dict[str, Any] | None = None, **options: Any) -> None:
    pending = manager.save(step, state or {"value": step}, **options)
    assert pending is not None
    pending.wait()


def _records(run_dir: Path) -> list[CheckpointRecord]:
    with Journal.open_read_only(run_dir.with_name("run.journal.db")) as journal:
        return journal.checkpoints()


def _live(run_dir: Path, series: str = "checkpoint") -> list[int]:
    return [record.step for record in _records(run_dir) if record.is_live and record.series == series]


def _steps_on_disk(run_dir: Path, series: str = "checkpoint") -> list[str]:
    return sorted(path.name for path in (run_dir / series).iterdir())


# -- one in flight ---------------------------------------------------------------------------------


def test_a_save_is_in_flight_until_it_has_committed(open_manager: Open, paused_writer: Pause, run_dir: Path) -> None:
    with open_manager() as manager:
        with paused_writer(manager):
            pending = manager.save(1, {"t": torch.zeros(4)})
            assert pending is not None
            assert (pending.step, pending.series, pending.state, pending.done()) == (1, "checkpoint", None, False)
            assert [one.step for one in manager.poll()] == [1]
            with pytest.raises(WaitTimeout, match="not committed after"):
                pending.wait(0.1)
            assert "in flight" in repr(pending)
            assert not (run_dir / "checkpoint" / "step-1").exists()
        pending.wait()
        assert (pending.state, pending.done(), manager.poll()) == (CheckpointState.COMMITTED, True, [])


def test_a_busy_series_can_be_skipped_refused_or_waited_for(open_manager: Open, paused_writer: Pause) -> None:
    with open_manager(when_busy="skip") as manager:
        with paused_writer(manager):
            first = manager.save(1, {"t": torch.zeros(4)})
            assert first is not None
            assert manager.save(2, {"t": torch.zeros(4)}) is None
            with pytest.raises(SaveInFlight) as caught:
                manager.save(3, {"t": torch.zeros(4)}, when_busy="raise")
            assert (caught.value.step, caught.value.in_flight_step) == (3, 1)
            assert not first.done(), "neither may wait for the save in flight"
            threading.Timer(0.3, os.kill, (manager.writer_pid, 18)).start()
            second = manager.save(4, {"t": torch.ones(4)}, when_busy="wait")
            assert first.done()
        assert second is not None
        second.wait()


def test_resuming_while_a_save_is_in_flight_waits_for_it_and_loads_it(
    open_manager: Open, paused_writer: Pause, run_dir: Path
) -> None:
    """What the save retires when it commits must not be what resume has just chosen to read."""
    with open_manager(series=[Series("checkpoint", DCP(), keep=KeepLast(1))]) as manager:
        _save(manager, 1, {"t": torch.zeros(100_000)})
        with paused_writer(manager) as pid:
            pending = manager.save(2, {"t": torch.ones(100_000)})
            assert pending is not None
            threading.Timer(0.5, os.kill, (pid, signal.SIGCONT)).start()
            state = {"t": torch.full((100_000,), 5.0)}
            resumed = manager.resume(state)
        assert resumed is not None
        assert (resumed.step, pending.state) == (2, CheckpointState.COMMITTED)
        assert torch.equal(state["t"], torch.ones(100_000))


def test_an_export_has_the_config_of_the_moment_it_was_saved(open_manager: Open, run_dir: Path) -> None:
    """The export waits behind a slow one; meanwhile the model goes on, and changes its size."""
    from transformers import AutoModelForCausalLM

    model = mixture_of_experts()
    gate = threading.Event()

    class Late:
        def save_pretrained(self, directory: str) -> None:
            assert gate.wait(30)
            Path(directory, "late.txt").touch()

    series = [Series("slow", HuggingFace(assets=Late())), Series("hf", HuggingFace())]
    with open_manager(series=series) as manager:
        manager.save(1, {"t": torch.zeros(4)}, "slow")
        pending = manager.save(1, {"model": model}, "hf")
        model.resize_token_embeddings(80)
        model.generation_config.max_new_tokens = 99
        gate.set()
        assert pending is not None
        pending.wait()
    path = run_dir / "hf" / "hf-1"
    assert json.loads((path / "config.json").read_text())["vocab_size"] == 64
    assert "max_new_tokens" not in json.loads((path / "generation_config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(path).config.vocab_size == 64


def test_another_series_is_not_busy(open_manager: Open, paused_writer: Pause) -> None:
    series = [Series("checkpoint", DCP()), Series("snapshot", DCP())]
    with open_manager(series=series, when_busy="raise") as manager:
        with paused_writer(manager):
            pendings = [manager.save(1, {"t": torch.zeros(4)}, name) for name in ("checkpoint", "snapshot")]
        for pending in pendings:
            assert pending is not None
            pending.wait()


def test_warming_up_while_a_save_is_in_flight_does_not_touch_its_bytes(
    open_manager: Open, paused_writer: Pause
) -> None:
    good = {"a": torch.full((3000,), 1.0), "b": torch.full((3000,), 2.0)}
    with open_manager() as manager:
        _save(manager, 1, good)
        with paused_writer(manager) as pid:
            pending = manager.save(2, good)
            assert pending is not None
            threading.Timer(0.5, os.kill, (pid, 18)).start()
            manager.warm_up({"c": torch.zeros(17), "b": torch.zeros(2900), "d": torch.zeros(100)})
        pending.wait()
        target = {key: torch.zeros_like(value) for key, value in good.items()}
        manager.resume(target)
        assert same(good, target)


def test_a_warmed_up_first_save_needs_no_new_memory_or_writer(open_manager: Open) -> None:
    state = {"model": perceptron(0), "t": torch.zeros(100_000)}
    with open_manager() as manager:
        manager.warm_up(state)
        pid = manager.writer_pid
        maps = Path("/proc/self/maps").read_text().count("memfd:ckptmgr")
        assert maps == 1
        assert "memfd:ckptmgr" in Path(f"/proc/{pid}/maps").read_text(), "the writer has mapped it too"
        _save(manager, 1, state)
        assert (manager.writer_pid, Path("/proc/self/maps").read_text().count("memfd:ckptmgr")) == (pid, 1)


class Stepped:
    """A part of a trainer that counts how often it is asked for its state."""

    def __init__(self) -> None:
        self.asked = 0

    def state_dict(self) -> dict[str, Any]:
        self.asked += 1
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


def test_the_first_save_after_resuming_finds_its_memory_made(open_manager: Open) -> None:
    state = {"model": perceptron(0), "t": torch.zeros(100_000), "loader": Stepped(), "own": PerRank(Stepped())}
    with open_manager() as manager:
        assert manager.resume(state) is None
        assert not manager._captures["checkpoint"].arena.size
        _save(manager, 1, state)
        size = manager._captures["checkpoint"].arena.size
    asked = state["own"].value.asked
    with open_manager() as manager:
        manager.resume(state)
        capture = manager._captures["checkpoint"]
        assert (capture.arena.size, capture.arena.generation) == (size, 1)
        assert capture.arena._warming is not None
        capture.arena._warming.join(20)
        assert os.fstat(capture.arena.descriptor).st_blocks * 512 >= size
        assert state["own"].value.asked == asked, "nobody has asked for it to be saved"
        _save(manager, 2, state)
        assert (capture.arena.size, capture.arena.generation) == (size, 1)


@pytest.mark.parametrize("what", ["too large", "an error"])
def test_resuming_does_without_a_warm_up_where_there_is_no_memory_for_one(
    open_manager: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    state = {"t": torch.arange(10_000.0)}
    with open_manager() as manager:
        _save(manager, 1, state)
    caplog.set_level(logging.INFO)
    with open_manager() as manager:
        with monkeypatch.context() as machine:
            if what == "an error":
                machine.setattr(
                    os, "memfd_create", lambda *_: (_ for _ in ()).throw(OSError(24, "Too many open files"))
                )
            else:
                machine.setattr(manager_module, "available_bytes", lambda: 79_000)
            target = {"t": torch.zeros(10_000)}
            assert manager.resume(target) is not None
        assert same(target, state)
        assert "the first save makes its memory" in caplog.text
        assert not manager._captures["checkpoint"].arena.size
        _save(manager, 2, state)


def test_an_arena_that_memory_cannot_hold_is_a_typed_error_and_a_smaller_one_works(
    open_manager: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_manager() as manager:
        with monkeypatch.context() as machine:
            machine.setattr(arena, "available_bytes", lambda: 1000)
            with pytest.raises(SetupFailed, match="no memory for an arena") as caught:
                manager.warm_up({"t": torch.zeros(10_000)})
            assert [failure.rank for failure in caught.value.failures] == [0]
        manager.warm_up({"t": torch.zeros(10_000)})
        _save(manager, 1, {"t": torch.zeros(10_000)})


# -- the same step again -----------------------------------------------------------------------------


def test_a_step_that_is_saved_is_refused_and_the_next_is_fine(open_manager: Open, run_dir: Path) -> None:
    with open_manager() as manager:
        _save(manager, 1)
        with pytest.raises(StepAlreadySaved) as caught:
            manager.save(1, {"value": 9})
        assert Path(caught.value.path) == run_dir / "checkpoint" / "step-1"
        _save(manager, 2)
    with open_manager() as manager, pytest.raises(StepAlreadySaved):
        manager.save(2, {"value": 9})
    assert _live(run_dir) == [1, 2]


def test_overwriting_keeps_the_old_until_the_new_has_committed(
    open_manager: Open, paused_writer: Pause, run_dir: Path
) -> None:
    final = run_dir / "checkpoint" / "step-1"
    with open_manager() as manager:
        _save(manager, 1, {"t": torch.zeros(8)})
        inode = final.stat().st_ino
        with paused_writer(manager):
            pending = manager.save(1, {"t": torch.ones(8)}, overwrite=True)
            assert pending is not None
            deadline = time.monotonic() + 5
            while not list(final.parent.glob(".*.incomplete")) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert final.stat().st_ino == inode
        state = {"t": torch.full((8,), 5.0)}
        pending.wait()
        assert final.stat().st_ino != inode
        manager.resume(state)
        assert torch.equal(state["t"], torch.ones(8))
    old, new = _records(run_dir)
    assert old.retire_started_at is not None
    assert old.retired_at is not None
    assert "overwritten" in str(old.retire_reason)
    assert (new.overwrites, new.is_live) == (old.id, True)
    assert _steps_on_disk(run_dir) == ["step-1"]


def test_an_overwrite_that_fails_leaves_the_old_one_as_it_was(
    open_manager: Open, paused_writer: Pause, run_dir: Path
) -> None:
    with open_manager() as manager:
        _save(manager, 1, {"t": torch.zeros(8)})
        before = {path.name: path.read_bytes() for path in (run_dir / "checkpoint" / "step-1").iterdir()}
        with paused_writer(manager) as pid:
            pending = manager.save(1, {"t": torch.ones(8)}, overwrite=True)
            assert pending is not None
            time.sleep(0.5)
            os.kill(pid, 9)
            with pytest.raises(SaveFailed):
                pending.wait()
        after = {path.name: path.read_bytes() for path in (run_dir / "checkpoint" / "step-1").iterdir()}
        assert before == after
        state = {"t": torch.full((8,), 5.0)}
        manager.resume(state)
        assert torch.equal(state["t"], torch.zeros(8))
        _save(manager, 1, {"t": torch.full((8,), 2.0)}, overwrite=True)
    assert _steps_on_disk(run_dir) == ["step-1"]


def test_overwriting_a_step_that_was_never_saved_just_saves_it(open_manager: Open, run_dir: Path) -> None:
    with open_manager() as manager:
        _save(manager, 1, overwrite=True)
    assert _live(run_dir) == [1]


def test_a_step_that_retention_took_can_be_saved_again_at_once(open_manager: Open, run_dir: Path) -> None:
    gate = threading.Event()

    def slow_upload(event: Committed) -> None:
        if event.step == 2:
            gate.wait(10)

    with open_manager(series=[Series("checkpoint", DCP(), keep=KeepLast(1))], on_commit=slow_upload) as manager:
        _save(manager, 1, {"value": "old"})
        manager.save(2, {"value": 2})
        # Step 1 is on its way out, behind the slow hook; a run that was set back saves it again.
        again = manager.save(1, {"value": "new"})
        assert again is not None
        threading.Timer(0.5, gate.set).start()
        again.wait()
        state = {"value": None}
        manager.resume(state)
        assert state["value"] == "new"
    assert _live(run_dir) == [1]
    assert _steps_on_disk(run_dir) == ["step-1"]


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [-1, True, 1.0, "1", None, 10**15])
def test_a_step_that_is_no_whole_number_is_refused(open_manager: Open, step: Any) -> None:
    with open_manager() as manager, pytest.raises(InvalidArgument, match="step"):
        manager.save(step, {"value": 1})


@pytest.mark.parametrize(
    "state",
    [{}, [], None, {"": 1}, {3: 1}, {"f": lambda: 0}, {"o": object()}, {"own": PerRank(object())}, {"p": Path()},
     {"sparse": torch.eye(3).to_sparse()}, {"meta": torch.zeros(3, device="meta")}],
)  # fmt: skip
def test_a_state_that_cannot_be_saved_is_refused_at_the_call_and_leaves_no_row(
    open_manager: Open, run_dir: Path, state: Any
) -> None:
    with open_manager() as manager:
        with pytest.raises(InvalidArgument):
            manager.save(1, state)
        _save(manager, 1)
    assert len(_records(run_dir)) == 1


def test_what_a_state_dict_raises_is_told_as_the_cause(open_manager: Open) -> None:
    class Broken:
        def state_dict(self) -> dict[str, Any]:
            raise ZeroDivisionError("no state today")

        def load_state_dict(self, state: Any) -> None: ...

    with open_manager() as manager:
        with pytest.raises(InvalidArgument, match="no state today") as caught:
            manager.save(1, {"broken": Broken()})
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    "metrics", [{"loss": float("nan")}, {"loss": "low"}, {1: 2.0}, {"loss": None}, {"loss": 10**400}, {"\udc80": 1.0}]
)
def test_metrics_that_are_no_numbers_are_refused(open_manager: Open, metrics: Any) -> None:
    with open_manager() as manager, pytest.raises(InvalidArgument, match="metric"):
        manager.save(1, {"value": 1}, metrics=metrics)


def test_a_name_that_a_manifest_cannot_hold_is_refused(open_manager: Open) -> None:
    with open_manager() as manager:
        with pytest.raises(InvalidArgument, match="non-empty text"):
            manager.save(1, {"value": 1, "half a character \udc80": PerRank(1)})
        _save(manager, 1)


def test_a_manifest_that_could_not_be_read_back_is_never_committed(
    open_manager: Open, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_manager(series=[Series("checkpoint", DCP(), keep=KeepLast(1))]) as manager:
        _save(manager, 1)
        monkeypatch.setattr(manager._leader, "_versions", {"torch": 2.13})
        with pytest.raises(SaveFailed, match="'versions' holds something other than text"):
            _save(manager, 2)
    assert _steps_on_disk(run_dir) == ["step-1"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"series": []},
        {"series": ["checkpoint"]},
        {"series": [Series("a", DCP()), Series("A", DCP())]},
        {"on_failure": "ignore"},
        {"when_busy": "queue"},
        {"timeouts": 30},
        {"writers": {"nice": 3}},
        {"path": 7},
        {"journal": 7},
        {"on_commit": 7},
        {"on_commit": [print, "hook"]},
        {"series": Series("a", DCP())},
    ],
)
def test_arguments_that_make_no_sense_are_refused_before_anything_is_touched(
    open_manager: Open, run_dir: Path, arguments: dict[str, Any]
) -> None:
    with pytest.raises(InvalidArgument):
        open_manager(**arguments)
    assert not list(run_dir.parent.iterdir())


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a b", ".hidden", "a" * 65, "ä", "-x", None, "a\n"])
def test_a_series_name_that_is_no_plain_name_is_refused(name: Any) -> None:
    with pytest.raises(InvalidArgument):
        Series(name, DCP())


def test_series_take_formats_and_keep_rules_only() -> None:
    with pytest.raises(InvalidArgument, match="format"):
        Series("a", "dcp")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="keep"):
        Series("a", DCP(), keep=3)  # type: ignore[arg-type]


def test_an_unknown_series_and_a_closed_manager_are_told(open_manager: Open) -> None:
    manager = open_manager()
    with pytest.raises(InvalidArgument, match="there are checkpoint"):
        manager.save(1, {"value": 1}, "hf")
    manager.close()
    manager.close()
    for call in (lambda: manager.save(1, {"value": 1}), manager.poll, lambda: manager.resume({"value": 1})):
        with pytest.raises(ManagerClosed):
            call()


def test_a_series_cannot_change_its_format(open_manager: Open) -> None:
    with open_manager() as manager:
        _save(manager, 1)
    with pytest.raises(InvalidArgument, match="holds dcp checkpoints"):
        open_manager(series=[Series("checkpoint", HuggingFace())])
    with open_manager() as manager:
        _save(manager, 2)


# -- hooks -------------------------------------------------------------------------------------------


def test_hooks_see_committed_checkpoints_and_a_failing_hook_undoes_nothing(
    open_manager: Open, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []

    def look(event: Committed) -> None:
        row = next(record for record in _records(run_dir) if record.id == event.record.id)
        complete = (event.path / "ckptmgr.json").is_file()
        listed = json.loads((run_dir / "meta.json").read_text())[f"{event.series}_list"]
        seen.append((event.series, event.step, event.path, row.state, complete, listed[-1]))

    def fail(event: Committed) -> None:
        raise RuntimeError("the upload failed")

    with open_manager(on_commit=[fail, look], series=[Series("checkpoint", DCP()), Series("hf", HuggingFace())]) as m:
        _save(m, 1)
        _save(m, 2, {"model": perceptron()}, series="hf")
        m.poll()
    assert seen == [
        ("checkpoint", 1, run_dir / "checkpoint" / "step-1", CheckpointState.COMMITTED, True, "checkpoint/step-1"),
        ("hf", 2, run_dir / "hf" / "hf-2", CheckpointState.COMMITTED, True, "hf/hf-2"),
    ]
    assert "failed for checkpoint step 1" in caplog.text
    assert "failed for hf step 2" in caplog.text
    assert _live(run_dir) == [1]


def test_a_hook_that_calls_exit_does_not_end_hooks_and_deletions(open_manager: Open, run_dir: Path) -> None:
    seen = []

    def leave(event: Committed) -> None:
        seen.append(event.step)
        raise SystemExit(3)

    with open_manager(on_commit=leave, series=[Series("checkpoint", DCP(), keep=KeepLast(1))]) as manager:
        for step in (1, 2, 3):
            pending = manager.save(step, {"value": step})
            assert pending is not None
            pending.wait(5)
    assert seen == [1, 2, 3]
    assert _steps_on_disk(run_dir) == ["step-3"]


@pytest.mark.parametrize("leave", [lambda: None, sys.exit], ids=["return", "exit"])
def test_the_child_of_a_hook_that_forks_does_nothing_more_and_ends(
    open_manager: Open, run_dir: Path, leave: Callable[[], None]
) -> None:
    children = []

    def fork(event: Committed) -> None:
        if (child := os.fork()) == 0:
            leave()
        else:
            children.append(child)

    series = [Series("checkpoint", DCP(), keep=KeepLast(1))]
    with open_manager(on_commit=[fork, lambda _: children.append(os.getpid())], series=series) as manager:
        _save(manager, 1)
        _save(manager, 2)
    first, own, second, again = children
    assert own == again == os.getpid()
    assert [_ended_within(child, 20) for child in (first, second)] == [0, 0]
    assert _steps_on_disk(run_dir) == ["step-2"]


def _ended_within(child: int, seconds: float) -> int:
    """The exit status of a child of ours, which is killed if it has none by then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def test_a_slow_hook_does_not_hold_up_the_next_commit(open_manager: Open) -> None:
    release = threading.Event()
    with open_manager(on_commit=lambda event: release.wait(10)) as manager:
        pendings = [manager.save(step, {"value": step}) for step in (1, 2, 3)]
        deadline = time.monotonic() + 8
        while not all(one is not None and one.done() for one in pendings) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [one.state for one in pendings if one is not None] == [CheckpointState.COMMITTED] * 3
        release.set()


def test_closing_waits_for_hooks_and_deletions(open_manager: Open, run_dir: Path) -> None:
    seen = []

    def slow(event: Committed) -> None:
        time.sleep(0.3)
        seen.append(event.step)

    with open_manager(on_commit=slow, series=[Series("checkpoint", DCP(), keep=KeepLast(1))]) as manager:
        for step in (1, 2):
            manager.save(step, {"value": step})
    assert seen == [1, 2]
    assert _steps_on_disk(run_dir) == ["step-2"]


# -- retention, meta.json and links ---------------------------------------------------------------------


def test_each_commit_keeps_what_the_rule_says_and_meta_and_link_follow(open_manager: Open, run_dir: Path) -> None:
    series = [
        Series("checkpoint", DCP(), keep=KeepLast(2) | KeepEvery(4)),
        Series("best", DCP(), keep=KeepBest(1, "loss")),
        Series("young", DCP(), keep=KeepFor(1)),
        Series("hf", HuggingFace(), keep=KeepLast(1)),
    ]
    module = perceptron()
    with open_manager(series=series) as manager:
        for step, loss in enumerate([0.5, 0.2, 0.9, 0.4, 0.8, 0.7], start=1):
            _save(manager, step)
            _save(manager, step, series="best", metrics={"loss": loss})
            _save(manager, step, series="young")
            _save(manager, step, {"model": module}, series="hf")
            meta = json.loads((run_dir / "meta.json").read_text())
            assert meta["checkpoint_list"] == [f"checkpoint/step-{s}" for s in _live(run_dir)]
            assert meta["hf_list"] == [f"hf/hf-{step}"]
            assert (run_dir / "hf" / "hf-latest").readlink() == Path(f"hf-{step}")
            for name in ("checkpoint", "best", "young"):
                assert all((run_dir / path).is_dir() for path in meta[f"{name}_list"])
    assert (_live(run_dir), _live(run_dir, "best")) == ([4, 5, 6], [2, 6])
    assert _live(run_dir, "young") == [1, 2, 3, 4, 5, 6]
    assert _steps_on_disk(run_dir) == ["step-4", "step-5", "step-6"]
    assert _steps_on_disk(run_dir, "hf") == ["hf-6", "hf-latest"]
    gone = [record for record in _records(run_dir) if record.series == "checkpoint" and not record.is_live]
    assert all(record.retire_reason and record.retired_at for record in gone)


def test_a_pinned_checkpoint_stays_whatever_the_rule(open_manager: Open, run_dir: Path) -> None:
    series = [Series("checkpoint", DCP(), keep=KeepLast(1))]
    with open_manager(series=series) as manager:
        _save(manager, 1)
    with Journal.open(run_dir.with_name("run.journal.db")) as journal:
        journal.pin("checkpoint", 1)
    with open_manager(series=series) as manager:
        _save(manager, 2)
        _save(manager, 3)
    assert _live(run_dir) == [1, 3]


def test_the_newest_committed_stays_while_the_next_one_fails(
    open_manager: Open, paused_writer: Pause, run_dir: Path
) -> None:
    with open_manager(series=[Series("checkpoint", DCP(), keep=KeepLast(1))], on_failure="warn") as manager:
        _save(manager, 1)
        with paused_writer(manager) as pid:
            pending = manager.save(2, {"t": torch.zeros(3)})
            assert pending is not None
            time.sleep(0.5)
            os.kill(pid, 9)
            with pytest.raises(SaveFailed):
                pending.wait()
    assert _steps_on_disk(run_dir) == ["step-1"]
    assert json.loads((run_dir / "meta.json").read_text())["checkpoint_list"] == ["checkpoint/step-1"]


@pytest.mark.parametrize(
    "meta",
    ["", "garbage", "[]", "[" * 100_000, '{"checkpoint_list": ["checkpoint/step-7", "../../etc"]}', None],
    ids=["empty", "garbage", "a list", "deeply nested", "lies", "missing"],
)
def test_whatever_meta_json_says_it_never_matters(open_manager: Open, run_dir: Path, meta: str | None) -> None:
    with open_manager() as manager:
        _save(manager, 1)
    file = run_dir / "meta.json"
    good = json.loads(file.read_text())
    file.unlink() if meta is None else file.write_text(meta)
    with open_manager() as manager:
        assert json.loads(file.read_text()) == good, "it is made anew at start"
        state = {"value": 0}
        resumed = manager.resume(state)
        assert resumed is not None
        assert (resumed.step, state["value"]) == (1, 1)
        file.unlink() if meta is None else file.write_text(meta)
        _save(manager, 2)
        assert json.loads(file.read_text())["checkpoint_list"] == ["checkpoint/step-1", "checkpoint/step-2"]


def test_a_directory_in_the_place_of_meta_json_stops_no_save(open_manager: Open, run_dir: Path) -> None:
    (run_dir / "meta.json").mkdir(parents=True)
    (run_dir / "meta.json" / "mine").touch()
    with open_manager() as manager:
        _save(manager, 1)
    assert (run_dir / "meta.json" / "mine").exists()
    assert _live(run_dir) == [1]


# -- what else may stand in a run directory -------------------------------------------------------------


def test_foreign_and_half_written_directories_never_matter_and_stay(
    open_manager: Open, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_manager() as manager:
        _save(manager, 5)
    series = run_dir / "checkpoint"
    shutil.copytree(series / "step-5", series / "step-99")
    (series / "step-99" / "ckptmgr.json").unlink()
    shutil.copytree(series / "step-5", series / "step-100")
    (series / "step-6").mkdir()
    (series / "step-7.incomplete").mkdir()
    (series / ".step-8.e99.a99.incomplete").mkdir()
    (series / ".step-9.e1.a77.retired").mkdir()
    (series / "notes.txt").write_text("mine")
    (series / "step-12").symlink_to("step-5")
    before = _steps_on_disk(run_dir)
    with caplog.at_level(logging.WARNING), open_manager() as manager:
        state = {"value": 0}
        resumed = manager.resume(state)
        assert resumed is not None
        assert (resumed.step, state["value"]) == (5, 5)
        _save(manager, 10)
        for taken in (6, 99, 12):
            with pytest.raises(SaveFailed, match="does not know it"):
                _save(manager, taken)
        _save(manager, 11)
    assert _steps_on_disk(run_dir) == sorted([*before, "step-10", "step-11"])
    assert (series / "notes.txt").read_text() == "mine"
    for name in ("step-99", "step-6", ".step-8.e99.a99.incomplete"):
        assert name in caplog.text, f"{name} is not reported"


def test_a_file_where_a_series_should_be_is_told_and_not_touched(open_manager: Open, run_dir: Path) -> None:
    run_dir.mkdir()
    (run_dir / "checkpoint").write_text("mine")
    with pytest.raises(CheckpointError), open_manager() as manager:
        _save(manager, 1)
    assert (run_dir / "checkpoint").read_text() == "mine"


def test_a_series_directory_that_is_a_link_is_refused(open_manager: Open, run_dir: Path, tmp_path: Path) -> None:
    run_dir.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (run_dir / "checkpoint").symlink_to(tmp_path / "elsewhere")
    with pytest.raises((UnsafePath, SaveFailed), match="is a link"), open_manager() as manager:
        _save(manager, 1)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_committed_checkpoint_that_is_gone_is_unsafe_and_the_older_is_offered(
    open_manager: Open, run_dir: Path
) -> None:
    with open_manager() as manager:
        _save(manager, 1)
        _save(manager, 2)
    shutil.rmtree(run_dir / "checkpoint" / "step-2")
    with open_manager() as manager:
        state = {"value": 0}
        with pytest.raises(UnsafeResume, match="R002"):
            manager.resume(state)
        resumed = manager.resume(state, allow_older=True)
        assert resumed is not None
        assert (resumed.step, state["value"]) == (1, 1)


def test_a_journal_of_another_run_is_refused(open_manager: Open, run_dir: Path, tmp_path: Path) -> None:
    with open_manager() as manager:
        _save(manager, 1)
    with open_manager(tmp_path / "other") as manager:
        _save(manager, 1)
    (tmp_path / "other.journal.db").replace(tmp_path / "run.journal.db")
    with pytest.raises(ForeignJournal) as caught:
        open_manager()
    assert "journal=" in caught.value.hint
    assert caught.value.found != caught.value.expected
    assert _steps_on_disk(run_dir) == ["step-1"]


def test_a_lost_journal_is_refused_with_the_way_to_rebuild_it(open_manager: Open, run_dir: Path) -> None:
    with open_manager() as manager:
        _save(manager, 1)
    journal = run_dir.with_name("run.journal.db")
    journal.unlink()
    with pytest.raises(JournalNotFound, match="--rebuild --apply"):
        open_manager()
    assert not journal.exists(), "no empty journal in its place"
    assert _steps_on_disk(run_dir) == ["step-1"]


def test_a_run_can_be_moved_and_its_journal_kept_elsewhere(open_manager: Open, run_dir: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "journals" / "alpha.db"
    elsewhere.parent.mkdir()
    with open_manager(journal=elsewhere) as manager:
        _save(manager, 1)
    run_dir.rename(tmp_path / "moved")
    with open_manager(tmp_path / "moved", journal=elsewhere) as manager:
        state = {"value": 0}
        manager.resume(state)
        assert state["value"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journals", "moved"]


def test_a_run_directory_that_goes_away_fails_saves_and_lets_nothing_go(open_manager: Open, run_dir: Path) -> None:
    """It was moved, or its file system was unmounted: a save in its empty place would retire what is not there."""
    with open_manager(series=[Series("checkpoint", DCP(), keep=KeepLast(1))]) as manager:
        _save(manager, 1)
        run_dir.rename(run_dir.with_name("away"))
        for _ in range(2):
            with pytest.raises(SaveFailed, match="does not say that it belongs to run") as caught:
                _save(manager, 2)
            assert "mounted" in caught.value.hint
        assert not run_dir.exists(), "nothing is made in its place"
        run_dir.with_name("away").rename(run_dir)
        state = {"value": 0}
        resumed = manager.resume(state)
        assert resumed is not None
        assert (resumed.step, state["value"]) == (1, 1)
        _save(manager, 2)
    assert _steps_on_disk(run_dir) == ["step-2"]


def test_a_run_directory_that_is_a_file_is_refused(open_manager: Open, run_dir: Path) -> None:
    run_dir.write_text("mine")
    with pytest.raises(InvalidArgument, match="not a directory"):
        open_manager()
    assert run_dir.read_text() == "mine"


# -- size ----------------------------------------------------------------------------------------------


def test_thousands_of_small_tensors_are_saved_and_come_back(open_manager: Open) -> None:
    state = {"tensors": {f"layer.{i}.weight": torch.full((3,), float(i)) for i in range(5000)}, "n": 1}
    with open_manager() as manager:
        began = time.monotonic()
        _save(manager, 1, state)
        first = time.monotonic() - began
        began = time.monotonic()
        pending = manager.save(2, state)
        assert pending is not None
        stall = time.monotonic() - began
        pending.wait()
        target = {"tensors": {name: torch.zeros(3) for name in state["tensors"]}, "n": 0}
        manager.resume(target)
    assert same(state["tensors"], target["tensors"])
    assert stall < max(first, 2.0)


def test_saving_takes_one_copy_of_the_state_in_memory_and_gives_it_back(open_manager: Open) -> None:
    size = 200 << 20
    process = psutil.Process()
    state = {"big": torch.zeros(size, dtype=torch.uint8).random_(0, 255), "small": torch.zeros(10)}
    before = process.memory_info().rss
    peak = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with open_manager() as manager:
            for step in (1, 2):
                _save(manager, step, state)
            assert manager.writer_pid is not None
            shared = psutil.Process(manager.writer_pid).memory_full_info()
            assert shared.uss < 60 << 20, "the writer has a copy of its own"
    finally:
        done.set()
        watcher.join()
    assert max(peak) - before < 1.15 * size + (30 << 20)
    assert process.memory_info().rss - before < 60 << 20, "the memory stays after close"


def test_the_state_is_whole_on_disk_when_it_is_committed(open_manager: Open, run_dir: Path) -> None:
    model = perceptron(0)
    with open_manager() as manager:
        _save(manager, 1, {"model": model})
        target = {"model": perceptron(1)}
        manager.resume(target, verify_digests=True)
        assert same(whole_state(model), whole_state(target["model"]))
    (record,) = _records(run_dir)
    assert record.bytes == sum(
        path.stat().st_size for path in (run_dir / record.directory).iterdir() if path.name != "ckptmgr.json"
    )
    assert all(
        getattr(record, name) is not None and getattr(record, name) >= 0
        for name in ("stage_s", "write_s", "gather_s", "commit_s")
    )


def test_keeping_all_is_the_default_and_nothing_is_ever_deleted(open_manager: Open, run_dir: Path) -> None:
    assert Series("checkpoint", DCP()).keep == KeepAll()
    with open_manager() as manager:
        for step in range(6):
            _save(manager, step)
    assert _live(run_dir) == list(range(6))
