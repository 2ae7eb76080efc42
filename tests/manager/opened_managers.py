"""What the tests of one process share: how managers are opened and paused, and what they may not leave behind."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import psutil

from ckptmgr import CheckpointManager

#: Opens a manager on the test's run directory.
Open = Callable[..., CheckpointManager]
#: Stops a manager's writer process for as long as the block lasts, so that a save stays in flight.
Pause = Callable[[CheckpointManager], AbstractContextManager[int]]


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
