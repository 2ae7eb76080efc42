"""However a manager ends, nothing of it stays: no process, thread, memory, descriptor or lock; no orphan writes on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from opened_managers import Open, Pause, leftovers
from rank_processes import Here, start_ranks

from ckptmgr import (
    DCP,
    CheckpointManager,
    CheckpointState,
    HuggingFace,
    KeepLast,
    SaveFailed,
    Series,
    Timeouts,
    WriterOptions,
)
from ckptmgr.errors import JournalError, ManagerClosed, RunLocked, WaitTimeout
from ckptmgr.journal import Journal
from ckptmgr.rundir import RunDirectory

SHORT = Timeouts(setup_s=30, write_s=30, gather_s=5, close_s=1, close_on_error_s=1)


def _states(run_dir: Path) -> dict[int, CheckpointState]:
    with Journal.open_read_only(run_dir.with_name("run.journal.db")) as journal:
        return {record.step: record.state for record in journal.checkpoints()}


def _gone(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


def test_closing_waits_for_what_is_in_flight_and_leaves_nothing(open_manager: Open, run_dir: Path) -> None:
    manager = open_manager()
    manager.save(1, {"t": torch.zeros(100_000)})
    assert leftovers(), "the watch sees nothing, so it proves nothing"
    manager.close()
    assert not leftovers()
    assert _states(run_dir) == {1: CheckpointState.COMMITTED}


def test_opening_and_closing_leaks_no_descriptor_and_no_thread(open_manager: Open) -> None:
    def cycle() -> None:
        with open_manager() as manager:
            manager.save(len(list(manager.path.glob("checkpoint/*"))), {"t": torch.zeros(10)})

    cycle()
    before = psutil.Process().num_fds(), psutil.Process().num_threads()
    for _ in range(3):
        cycle()
    assert (psutil.Process().num_fds(), psutil.Process().num_threads()) == before


def test_leaving_on_an_exception_finishes_the_save_and_frees_the_run(open_manager: Open, run_dir: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), open_manager() as manager:  # noqa: PT012 - leaving the block is tested
        manager.save(1, {"t": torch.zeros(100)})
        raise ZeroDivisionError
    assert time.monotonic() - began < 5
    assert not leftovers()
    assert _states(run_dir) == {1: CheckpointState.COMMITTED}
    open_manager().close()


def test_leaving_on_an_exception_with_a_hung_writer_ends_in_time(open_manager: Open, run_dir: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_manager(timeouts=SHORT) as manager:  # noqa: PT012 - see above
        first = manager.save(1, {"t": torch.zeros(100)})
        assert first is not None
        first.wait()
        pid = manager.writer_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        manager.save(2, {"t": torch.zeros(100)})
        began = time.monotonic()
        raise ZeroDivisionError
    assert time.monotonic() - began < 4
    assert _gone(pid, 0.5)
    assert not leftovers()
    with open_manager() as manager:
        assert _states(run_dir)[2] is CheckpointState.FAILED
        pending = manager.save(2, {"t": torch.zeros(100)})
        assert pending is not None
        pending.wait()


def test_closing_with_a_hung_writer_ends_in_time_and_tells(
    open_manager: Open, paused_writer: Pause, run_dir: Path
) -> None:
    manager = open_manager()
    with paused_writer(manager):
        pending = manager.save(1, {"t": torch.zeros(100)})
        began = time.monotonic()
        with pytest.raises(SaveFailed, match="signal 9"):
            manager.close(0.5)
        assert time.monotonic() - began < 4
    assert pending is not None
    assert pending.state is CheckpointState.FAILED
    assert _states(run_dir) == {1: CheckpointState.FAILED}
    assert not leftovers()


def test_several_saves_in_flight_at_a_short_close_all_end(
    open_manager: Open, paused_writer: Pause, run_dir: Path
) -> None:
    manager = open_manager(series=[Series(name, DCP()) for name in "abc"], on_failure="warn")
    with paused_writer(manager):
        pendings = [manager.save(1, {"t": torch.zeros(100)}, name) for name in "abc"]
        with pytest.warns(RuntimeWarning, match="a step 1 failed"):
            manager.close(0.5)
    assert all(one is not None and one.done() for one in pendings)
    assert not leftovers()
    open_manager(series=[Series(name, DCP()) for name in "abc"]).close()


def test_a_close_that_gives_up_on_a_save_says_so(open_manager: Open, run_dir: Path) -> None:
    """An asset that hangs is in the user's own code, where nothing can end it; the rest is closed all the same."""
    gate = threading.Event()

    class Hanging:
        def save_pretrained(self, directory: str) -> None:
            assert gate.wait(30)

    manager = open_manager(series=[Series("hf", HuggingFace(assets=Hanging()))])
    pending = manager.save(1, {"t": torch.zeros(4)}, "hf")
    with pytest.raises(WaitTimeout, match="hf step 1 was still in flight"):
        manager.close(0.3)
    gate.set()
    deadline = time.monotonic() + 10
    while leftovers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert pending is not None
    assert pending.state is not CheckpointState.COMMITTED
    open_manager(series=[Series("hf", HuggingFace())]).close()
    assert _states(run_dir) == {1: CheckpointState.FAILED}


def test_a_constructor_that_fails_leaves_nothing(open_manager: Open, run_dir: Path) -> None:
    run_dir.with_name("run.journal.db").write_bytes(
        b"this is no database, but it is long enough to look like a file" * 99
    )
    with pytest.raises(JournalError):
        open_manager()
    assert not leftovers()
    run_dir.with_name("run.journal.db").unlink()
    open_manager().close()


def test_a_writer_that_dies_idle_is_replaced_without_a_word(open_manager: Open, run_dir: Path) -> None:
    with open_manager() as manager:
        for step in (1, 2):
            pid = manager.writer_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            assert _gone(pid, 2)
            pending = manager.save(step, {"t": torch.full((100,), float(step))})
            assert pending is not None
            pending.wait()
            assert manager.writer_pid not in (None, pid)
            state = {"t": torch.zeros(100)}
            manager.resume(state, verify_digests=True)
            assert torch.equal(state["t"], torch.full((100,), float(step)))


def test_ctrl_c_does_not_reach_the_writer(open_manager: Open) -> None:
    with open_manager() as manager:
        pid = manager.writer_pid
        assert pid is not None
        os.kill(pid, signal.SIGINT)
        pending = manager.save(1, {"t": torch.zeros(10)})
        assert pending is not None
        pending.wait()
        assert manager.writer_pid == pid


def test_the_writer_is_as_nice_as_asked_and_the_trainer_is_not(open_manager: Open) -> None:
    mine = psutil.Process().nice()
    for nice, io_class, expected in (
        (0, "none", psutil.IOPRIO_CLASS_NONE),
        (7, "idle", psutil.IOPRIO_CLASS_IDLE),
        (19, "best-effort", psutil.IOPRIO_CLASS_BE),
    ):
        with open_manager(writers=WriterOptions(nice=nice, io_class=io_class)) as manager:
            writer = psutil.Process(manager.writer_pid)
            assert writer.nice() == min(19, mine + nice)
            assert writer.ionice().ioclass == expected
    assert psutil.Process().nice() == mine


def test_the_writer_imports_no_torch_and_holds_nothing_of_the_trainer(open_manager: Open) -> None:
    with open_manager() as manager:
        writer = psutil.Process(manager.writer_pid)
        assert not [region.path for region in writer.memory_maps() if "torch" in region.path]
        kept = [str(entry.readlink()) for entry in Path(f"/proc/{writer.pid}/fd").iterdir()]
        assert not [target for target in kept if ".journal." in target], kept


def test_a_forked_child_cannot_use_the_manager_nor_harm_it(open_manager: Open, run_dir: Path) -> None:
    with open_manager() as manager:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that forking with threads is risky
            child = os.fork()
        if child == 0:
            try:
                manager.save(1, {"value": 1})
            except ManagerClosed:
                os._exit(42)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
        pending = manager.save(1, {"value": 1})
        assert pending is not None
        pending.wait()


def _open_second(here: Here) -> Any:
    began = time.monotonic()
    try:
        CheckpointManager(here.run_dir).close()
    except RunLocked as error:
        return [error.holder, error.hint, str(error), time.monotonic() - began]
    return None


def test_a_second_manager_in_another_process_is_refused_soon_with_who_holds_it(
    open_manager: Open, tmp_path: Path
) -> None:
    with open_manager():
        with start_ranks(1, _open_second, tmp_path) as world:
            (told,) = world.join(20)
        assert told is not None, "two managers manage one run"
        holder, hint, text, took = told
        assert re.fullmatch(
            rf"CheckpointManager, pid {os.getpid()} on {re.escape(socket.gethostname())}, "
            r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ",
            holder,
        )
        assert holder in text
        assert "stop that process" in hint
        assert took < 5
        with pytest.raises(RunLocked):
            open_manager()
    with start_ranks(1, _open_second, tmp_path) as world:
        assert world.join(20) == [None]


def test_a_start_waits_for_a_command_that_has_the_run_lock_for_a_moment(open_manager: Open, run_dir: Path) -> None:
    open_manager().close()
    command = RunDirectory(run_dir)
    command.acquire("ckptmgr verify")
    done = threading.Timer(0.5, command.release)
    done.start()
    open_manager().close()
    done.join()


def _save_and_be_killed(here: Here) -> None:
    manager = CheckpointManager(here.run_dir, writers=WriterOptions(nice=0))
    pending = manager.save(1, {"t": torch.zeros(100)})
    assert pending is not None
    pending.wait()
    assert manager.writer_pid is not None
    if here.tmp_path.name.endswith("stopped"):
        os.kill(manager.writer_pid, signal.SIGSTOP)
    manager.save(2, {"t": torch.zeros(40 << 20)})
    here.tell("writer", manager.writer_pid)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("writer", ["running", "stopped"])
def test_the_writer_dies_with_its_trainer_and_nothing_is_published(tmp_path: Path, writer: str) -> None:
    folder = tmp_path / writer
    folder.mkdir()
    with start_ranks(1, _save_and_be_killed, folder) as world:
        pid = world.here.ask("writer")
        world.join(20, dead=[0])
        assert _gone(pid, 2.0), "an orphan is still there"
    published = (folder / "run" / "checkpoint" / "step-2").exists()
    with CheckpointManager(folder / "run") as manager:
        assert manager.resume({"t": torch.zeros(100)}, step=1) is not None
        states = _states(folder / "run")
        # The kill may come before the row exists; what is never allowed is a published directory without COMMITTED.
        assert states[1] is CheckpointState.COMMITTED
        assert states.get(2, CheckpointState.FAILED) is (
            CheckpointState.COMMITTED if published else CheckpointState.FAILED
        )
        left = [path.name for path in (folder / "run" / "checkpoint").iterdir() if path.name.startswith(".")]
        assert not left


def _fail_with(here: Here, on_failure: Any) -> Any:
    arrived = []
    signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(number))
    with CheckpointManager(here.run_dir, on_failure=on_failure) as manager:
        assert manager.writer_pid is not None
        pid = manager.writer_pid
        os.kill(pid, signal.SIGSTOP)
        pending = manager.save(1, {"t": torch.zeros(10)})
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
        assert pending is not None
        while not pending.done():
            time.sleep(0.01)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("error" if here.told("strict") else "always")
            with contextlib.suppress(RuntimeWarning):
                for _ in range(3):
                    manager.poll()
        good = manager.save(2, {"t": torch.zeros(10)})
        assert good is not None
        good.wait()
    return [len([w for w in caught if "step 1 failed" in str(w.message)]), arrived]


def test_a_failure_can_warn_or_terminate_once(tmp_path: Path) -> None:
    for on_failure, expected in (("warn", [1, []]), ("terminate", [1, [signal.SIGTERM]])):
        folder = tmp_path / on_failure
        folder.mkdir()
        with start_ranks(1, _fail_with, folder, on_failure=on_failure) as world:
            assert world.join(30) == [expected]


def _close_in_handler(here: Here) -> Any:
    manager = CheckpointManager(here.run_dir, on_failure="terminate")
    signal.signal(signal.SIGTERM, lambda *_: (manager.close(), sys.exit(7)))
    (here.run_dir / "checkpoint" / "step-1").mkdir(parents=True)  # somebody else's, so the save of step 1 fails
    pending = manager.save(1, {"t": torch.zeros(10)})
    assert pending is not None
    call = here.tmp_path.name
    while call != "save-while-in-flight" and not pending.done():
        time.sleep(0.01)
    try:
        if call == "poll":
            manager.poll()
        else:
            manager.save(2, {"t": torch.zeros(10)})
    except SystemExit as end:
        return [end.code, leftovers()]
    return "the handler was not called"


@pytest.mark.parametrize("call", ["poll", "save", "save-while-in-flight"])
def test_a_handler_of_terminate_can_close_the_manager(tmp_path: Path, call: str) -> None:
    folder = tmp_path / call
    folder.mkdir()
    with start_ranks(1, _close_in_handler, folder) as world:
        assert world.join(30) == [[7, []]]


def test_terminate_terminates_even_where_warnings_are_errors(tmp_path: Path) -> None:
    with start_ranks(1, _fail_with, tmp_path, on_failure="terminate") as world:
        world.here.tell("strict")
        ((_, arrived),) = world.join(30)
        assert arrived == [signal.SIGTERM]


def _run_script(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    head = """
        import sys, torch
        from ckptmgr import CheckpointManager, WriterOptions
        manager = CheckpointManager(sys.argv[1], writers=WriterOptions(nice=0))
        manager.save(1, {"t": torch.zeros(1000)})
        print(manager.writer_pid, flush=True)
    """
    script = textwrap.dedent(head) + textwrap.dedent(text)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", script, str(folder / "run")],
        capture_output=True, text=True, timeout=60, env=environ, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ending", "status"),
    [("", 0), ("raise RuntimeError('training broke')", 1)],
    ids=["end", "exception"],
)
def test_a_manager_that_is_not_closed_commits_and_leaves_no_orphan(tmp_path: Path, ending: str, status: int) -> None:
    began = time.monotonic()
    done = _run_script(tmp_path, ending)
    assert done.returncode == status, done.stderr
    assert time.monotonic() - began < 30
    assert _gone(int(done.stdout), 0.5)
    assert "not closed" in done.stderr
    assert _states(tmp_path / "run") == {1: CheckpointState.COMMITTED}
    with Journal.open_read_only(tmp_path / "run.journal.db") as journal:
        assert journal.epochs()[-1].ended_at is not None


def test_a_manager_that_was_taken_over_can_neither_commit_nor_delete(
    open_manager: Open, paused_writer: Pause, run_dir: Path
) -> None:
    series = [Series("checkpoint", DCP(), keep=KeepLast(1))]
    old = open_manager(series=series)
    first = old.save(1, {"t": torch.zeros(100)})
    assert first is not None
    first.wait()
    with paused_writer(old):
        zombie = old.save(2, {"t": torch.ones(100)})
        time.sleep(0.3)
        # The lock of a network file system that lost it: nobody told the old manager.
        old._rundir.release()
        new = open_manager(series=series)
        assert _states(run_dir)[2] is CheckpointState.FAILED
        state = {"t": torch.ones(100)}
        resumed = new.resume(state)
        assert resumed is not None
        assert resumed.step == 1
        fresh = new.save(2, {"t": torch.full((100,), 2.0)})
        assert fresh is not None
        fresh.wait()
    assert zombie is not None
    with pytest.raises(SaveFailed):
        zombie.wait()
    late = old.save(3, {"t": torch.ones(100)})
    assert late is not None
    with pytest.raises(SaveFailed, match="StaleWriter"):
        late.wait()
    old.close()
    new.resume(state, verify_digests=True)
    assert torch.equal(state["t"], torch.full((100,), 2.0))
    new.close()
    assert sorted(path.name for path in (run_dir / "checkpoint").iterdir()) == ["step-2"]


@pytest.mark.parametrize(
    ("moment", "names", "then"),
    [
        (CheckpointState.WRITING, ["step-1"], ["step-1"]),
        # The heir publishes and commits it, which lets nothing go; the next save does.
        (CheckpointState.GATHERED, [".step-2.e1.a2.incomplete", "step-1"], ["step-1", "step-2"]),
        (CheckpointState.COMMITTED, ["step-1", "step-2"], ["step-2"]),
    ],
)
def test_a_manager_that_is_taken_over_changes_no_row_and_no_name_of_others(
    open_manager: Open,
    run_dir: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    moment: CheckpointState,
    names: list[str],
    then: list[str],
) -> None:
    series = [Series("checkpoint", DCP(), keep=KeepLast(1))]
    old = open_manager(series=series)
    first = old.save(1, {"t": torch.zeros(100)})
    assert first is not None
    first.wait()
    advance = Journal.advance

    def advance_and_lose(journal: Journal, *move: Any, **facts: Any) -> Any:
        record = advance(journal, *move, **facts)
        if move[2] is moment:
            with Journal.open(journal.path) as heirs:
                heirs.begin_epoch(host="elsewhere", pid=1, command="heir", versions={})
        return record

    monkeypatch.setattr(Journal, "advance", advance_and_lose)
    late = old.save(2, {"t": torch.ones(100)})
    assert late is not None
    committed = moment is CheckpointState.COMMITTED
    with contextlib.nullcontext() if committed else pytest.raises(SaveFailed, match="StaleWriter"):
        late.wait()
    monkeypatch.undo()

    assert sorted(path.name for path in (run_dir / "checkpoint").iterdir()) == names
    assert "StaleWriter" in caplog.text
    old.close()
    new = open_manager(series=series)
    state = {"t": torch.zeros(100)}
    resumed = new.resume(state, verify_digests=True)
    assert resumed is not None
    assert (f"step-{resumed.step}", float(state["t"][0])) == (then[-1], resumed.step - 1.0)
    new.close()
    assert sorted(path.name for path in (run_dir / "checkpoint").iterdir()) == then
