"""Leaks that can be planted into the product, one kind each, to see that the soak finds them: ``--plant NAME``."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ckptmgr import durable
from ckptmgr.commit import Leader
from ckptmgr.manager import CheckpointManager
from ckptmgr.writers.arena import Arena
from ckptmgr.writers.process import WriterProcess

_kept: list[Any] = []


def descriptor() -> None:
    """A directory that was synced is not closed, one time in each commit."""
    real = Leader.after_commit

    def after_commit(leader: Leader, *args: Any) -> None:
        real(leader, *args)
        os.open(leader._rundir.path, os.O_RDONLY | os.O_CLOEXEC)

    Leader.after_commit = after_commit  # type: ignore[method-assign]


def thread() -> None:
    """Each commit starts a thread that waits for a word that never comes."""
    real = Leader.after_commit

    def after_commit(leader: Leader, *args: Any) -> None:
        real(leader, *args)
        threading.Thread(target=threading.Event().wait, daemon=True).start()

    Leader.after_commit = after_commit  # type: ignore[method-assign]


def arena() -> None:
    """The memory of an old layout is neither unmapped nor closed."""
    real = Arena.close

    def close(self: Arena) -> None:
        if self._map is not None:
            _kept.append((self._map, self._bytes))
            self._map, self.descriptor, self.size = None, -1, 0
        real(self)

    Arena.close = close  # type: ignore[method-assign]


def memory() -> None:
    """Every save leaves 8 kB behind, and an object."""
    real = CheckpointManager._save

    def save(manager: CheckpointManager, *args: Any, **options: Any) -> Any:
        _kept.append([os.urandom(8192)])
        return real(manager, *args, **options)

    CheckpointManager._save = save  # type: ignore[method-assign]


def rows() -> None:
    """A save looks for an attempt in flight by reading every row of its series."""

    def settle(leader: Leader, series: str) -> None:
        if any(record.is_in_flight for record in leader._journal.checkpoints(series=series)):
            leader._recover()

    Leader._settle_series = settle  # type: ignore[method-assign]


def zombie() -> None:
    """A writer process that was ended is not waited for."""

    def stop(process: WriterProcess, timeout_s: float) -> None:
        del timeout_s
        if process._pipe is not None:
            process._pipe.close()
            process._pipe = None
        if process._process is not None:
            process._process.kill()
            _kept.append(process._process)
            process._process.poll = lambda: 0  # type: ignore[method-assign]
            process._process = None
        process._mapped.clear()

    WriterProcess.stop = stop  # type: ignore[method-assign]


def file() -> None:
    """A failed save leaves a file in the run directory's series."""
    real = durable.remove_tree

    def remove_tree(path: Path) -> None:
        real(path)
        path.with_name(f".{len(_kept)}.left").touch()
        _kept.append(path.name)

    durable.remove_tree = remove_tree


PLANTS: Mapping[str, Callable[[], None]] = MappingProxyType(
    {one.__name__: one for one in (descriptor, thread, arena, memory, rows, zombie, file)}
)
