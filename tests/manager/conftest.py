"""Managers of one process, and a watch that none of them leaves anything behind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest

from ckptmgr import CheckpointManager, Timeouts, WriterOptions


def leftovers() -> list[str]:
    """What a manager may hold while it is open and must not hold afterwards: threads, processes, memory."""
    threads = [f"thread {thread.name}" for thread in threading.enumerate() if thread.name.startswith("ckptmgr")]
    children = [
        f"process {' '.join(child.cmdline())}"
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "ckptmgr.writers.worker" in child.cmdline()
    ]
    memory = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(entry.readlink())
            if "memfd:ckptmgr" in target or ".journal." in target:
                memory.append(f"descriptor {target}")
    return threads + children + memory


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert not leftovers()


Open = Callable[..., CheckpointManager]


@pytest.fixture
def open_manager(run_dir: Path) -> Iterator[Open]:
    """Opens a manager on the test's run directory; closed at the end of the test if the test did not."""
    opened = []

    def open_it(path: Path = run_dir, **options: Any) -> CheckpointManager:
        options.setdefault("timeouts", Timeouts(setup_s=30, write_s=30, gather_s=5, close_s=30, close_on_error_s=10))
        options.setdefault("writers", WriterOptions(nice=0))
        opened.append(CheckpointManager(path, **options))
        return opened[-1]

    yield open_it
    for manager in opened:
        with contextlib.suppress(Exception):
            manager.close(5)


Pause = Callable[[CheckpointManager], AbstractContextManager[int]]


@pytest.fixture
def paused_writer() -> Pause:
    """Stops a manager's writer process for as long as the block lasts, so that a save stays in flight."""

    @contextlib.contextmanager
    def pause(manager: CheckpointManager) -> Iterator[int]:
        pid = manager.writer_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            yield pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    return pause
