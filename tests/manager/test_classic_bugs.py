"""
The four classic bugs of background checkpoints (docs, "The problem"), each beside a checkpointer that has it.

`Naive` does what many trainers do: a writer thread, directories as the only memory. Every scenario
first shows that it walks into the trap, so that the test proves something, and then that ckptmgr does not.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from opened_managers import Open, Pause
from rank_processes import Here, start_ranks
from tiny_models import perceptron

from ckptmgr import DCP, CheckpointManager, Committed, HuggingFace, KeepLast, SaveFailed, Series, WriterOptions


class Naive:
    """A background checkpointer with all four bugs; *write* is what its thread does to store a state."""

    def __init__(self, run: Path, *, keep: int = 1, write: Callable[[Any, Path], None] = torch.save) -> None:
        self.run = run
        self.keep = keep
        self._write = write
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        run.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Dispatch, write the meta file, delete old ones, and look at what became of the last save."""
        self.wait()
        directory = self.run / f"step-{step}"
        directory.mkdir()
        self._thread = threading.Thread(target=self._store, args=(state, directory / "model.pt"))
        self._thread.start()
        (self.run / "meta.json").write_text(json.dumps({"latest": directory.name}))
        for old in sorted(self.run.glob("step-*"), key=self._step)[: -self.keep]:
            shutil.rmtree(old)

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def latest(self) -> Path | None:
        """What it would resume from: the directory with the highest number."""
        return max(self.run.glob("step-*"), key=self._step, default=None)

    def _store(self, state: dict[str, Any], path: Path) -> None:
        try:
            self._write(state, path)
        except Exception as error:
            self._error = error

    @staticmethod
    def _step(path: Path) -> int:
        return int(re.sub(r"\D", "", path.name))


def _loads(path: Path | None) -> bool:
    try:
        torch.load(path / "model.pt")  # type: ignore[operator]
    except Exception:
        return False
    return True


def _no_space(state: Any, path: Path) -> None:
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


# -- 1: resume picks a half-written directory -----------------------------------------------------------


def _naive_dies_while_it_writes(here: Here) -> None:
    naive = Naive(here.tmp_path / "naive", keep=2)
    naive.save(1, {"t": torch.ones(10)})
    naive.wait()
    naive._write = lambda state, path: (path.write_bytes(b"half"), here.tell("half"), time.sleep(30))  # type: ignore[assignment, return-value]
    naive.save(2, {"t": torch.ones(10)})
    time.sleep(30)


def _manager_dies_while_it_writes(here: Here) -> None:
    manager = CheckpointManager(here.run_dir, writers=WriterOptions(nice=0))
    first = manager.save(1, {"t": torch.ones(10)})
    assert first is not None
    first.wait()
    assert manager.writer_pid is not None
    os.kill(manager.writer_pid, signal.SIGSTOP)
    manager.save(2, {"t": torch.ones(10)})
    while not list(here.run_dir.glob("checkpoint/.step-2.*.incomplete")):
        time.sleep(0.01)
    here.tell("half")
    time.sleep(30)


def test_resume_never_picks_a_half_written_directory(tmp_path: Path, open_manager: Open) -> None:
    for scenario in (_naive_dies_while_it_writes, _manager_dies_while_it_writes):
        with start_ranks(1, scenario, tmp_path) as world:
            world.here.ask("half")
            world.signal(0, signal.SIGKILL)
            world.join(20, dead=[0])
    picked = Naive(tmp_path / "naive").latest()
    assert picked is not None
    assert (picked.name, _loads(picked)) == ("step-2", False), "the naive one was meant to fall into the trap"

    with open_manager() as manager:
        state = {"t": torch.zeros(10)}
        resumed = manager.resume(state)
        assert resumed is not None
        assert resumed.step == 1
        assert torch.equal(state["t"], torch.ones(10))


# -- 2: the meta file lists a checkpoint whose weights never finished ------------------------------------


def test_meta_never_lists_a_checkpoint_whose_weights_did_not_finish(
    tmp_path: Path, run_dir: Path, open_manager: Open, paused_writer: Pause
) -> None:
    naive = Naive(tmp_path / "naive", write=_no_space)
    naive.save(1, {"t": torch.ones(10)})
    listed = json.loads((tmp_path / "naive" / "meta.json").read_text())["latest"]
    assert not _loads(tmp_path / "naive" / listed), "the naive one was meant to fall into the trap"
    with pytest.raises(OSError, match="No space"):
        naive.wait()

    def listed_in_meta() -> list[str]:
        return list(json.loads((run_dir / "meta.json").read_text())["checkpoint_list"])

    with open_manager(on_failure="warn") as manager:
        with paused_writer(manager) as pid:
            pending = manager.save(1, {"t": torch.ones(10)})
            assert pending is not None
            for _ in range(30):
                assert listed_in_meta() == []
                time.sleep(0.01)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(SaveFailed):
                pending.wait()
        assert listed_in_meta() == []
        good = manager.save(2, {"t": torch.ones(10)})
        assert good is not None
        good.wait()
        assert listed_in_meta() == ["checkpoint/step-2"]
        for path in listed_in_meta():
            assert (run_dir / path / ".metadata").is_file()


# -- 3: retention deletes the last good checkpoint before the new one is durable -------------------------


def test_retention_never_takes_the_last_good_one_for_one_that_is_not_durable(
    tmp_path: Path, run_dir: Path, open_manager: Open
) -> None:
    naive = Naive(tmp_path / "naive", keep=1)
    naive.save(1, {"t": torch.ones(10)})
    naive.wait()
    naive._write = _no_space
    naive.save(2, {"t": torch.ones(10)})
    assert [_loads(path) for path in (tmp_path / "naive").glob("step-*")] == [False], "the naive one has one left"
    with pytest.raises(OSError, match="No space"):
        naive.wait()

    series = [Series("checkpoint", DCP(), keep=KeepLast(1))]
    with open_manager(series=series, on_failure="warn") as manager:
        first = manager.save(1, {"t": torch.ones(5000)})
        assert first is not None
        first.wait()
        assert manager.writer_pid is not None
        before = resource.prlimit(manager.writer_pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        for step in (2, 3):
            failing = manager.save(step, {"t": torch.zeros(5000)})
            assert failing is not None
            with pytest.raises(SaveFailed, match="File too large"):
                failing.wait()
            state = {"t": torch.zeros(5000)}
            resumed = manager.resume(state)
            assert resumed is not None
            assert resumed.step == 1
            assert torch.equal(state["t"], torch.ones(5000))
        resource.prlimit(manager.writer_pid, resource.RLIMIT_FSIZE, before)
        good = manager.save(4, {"t": torch.zeros(5000)})
        assert good is not None
        good.wait()
    assert [path.name for path in (run_dir / "checkpoint").iterdir()] == ["step-4"]


# -- 4: a background failure is noticed late, or never ---------------------------------------------------


def test_a_failure_in_the_background_is_noticed_at_the_next_poll_and_not_at_the_next_save(
    tmp_path: Path, open_manager: Open, paused_writer: Pause
) -> None:
    naive = Naive(tmp_path / "naive", write=_no_space)
    naive.save(1, {"t": torch.ones(10)})
    for _ in range(30):
        time.sleep(0.01)  # training steps; nothing is ever heard
    with pytest.raises(OSError, match="No space"):
        naive.save(2, {"t": torch.ones(10)})

    with open_manager() as manager:
        with paused_writer(manager) as pid:
            manager.save(1, {"t": torch.ones(10)})
            time.sleep(0.3)
            manager.poll()
            os.kill(pid, signal.SIGKILL)
            began = time.monotonic()
            with pytest.raises(SaveFailed, match="step 1 failed"):  # noqa: PT012 - which poll raises is open
                while time.monotonic() - began < 5:
                    manager.poll()
                    time.sleep(0.01)
        assert time.monotonic() - began < 3
    naive_last = Naive(tmp_path / "last", write=_no_space)
    naive_last.save(1, {"t": torch.ones(10)})  # the last save of the run: nobody ever hears of it
    leaving = pytest.raises(SaveFailed, match="step 9 failed")
    with leaving, open_manager() as manager, paused_writer(manager) as pid:
        manager.save(9, {"t": torch.ones(10)})
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)


# -- and the commit itself does not wait for the next save ------------------------------------------------


def test_what_is_saved_commits_without_another_call(open_manager: Open) -> None:
    committed: set[tuple[str, int]] = set()
    saved: set[tuple[str, int]] = set()
    model = perceptron()

    def note(event: Committed) -> None:
        committed.add((event.series, event.step))

    with open_manager(series=[Series("checkpoint", DCP()), Series("hf", HuggingFace())], on_commit=note) as manager:
        for step in range(3):
            manager.save(step, {"model": model})
            manager.save(step, {"model": model}, series="hf")
            saved |= {("checkpoint", step), ("hf", step)}
            deadline = time.monotonic() + 30
            while committed != saved:  # training; no save, no poll
                assert time.monotonic() < deadline, f"after step {step} only {sorted(committed)} are committed"
                time.sleep(0.01)
