"""Managers of one process, and a watch that none of them leaves anything behind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opened_managers import Open, Pause, leftovers

from ckptmgr import CheckpointManager, Timeouts, WriterOptions


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert not leftovers()


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
