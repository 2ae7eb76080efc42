"""
What is measured, how, and what it may grow by.

Read from outside (`/proc`) where that is possible, so that a leak in C or in the kernel counts as well. What
a journal costs is counted in its own process: steps of SQLite's virtual machine, which do not depend on
how busy the machine is, and the time of transactions.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import logging
import os
import sqlite3
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ckptmgr.journal import database, questions, writing
from ckptmgr.rundir import META_NAME, RunDirectory
from soak.judge import Tolerance

_EXACT = Tolerance(1.0)
#: Name → what may grow by how much in 1000 saves. Names that are not here are not judged.
TOLERANCES = {
    # Of every process. Memory in kB. What the kernel counts has the holes between what malloc has handed out in it,
    # of which there are more for some thousand saves; what is in use is judged by itself below.
    "rss_kb": Tolerance(8000),
    "uss_kb": Tolerance(8000),
    "anonymous_kb": Tolerance(8000),
    "shared_memory_kb": Tolerance(100),
    "mappings": Tolerance(10),
    "descriptors": _EXACT,
    "sockets": _EXACT,
    "memfds": _EXACT,
    "threads": _EXACT,
    "children": _EXACT,
    "zombies": _EXACT,
    # Of a trainer. In use: five of Python's blocks for each save, as caches take 1000 saves to fill. Of malloc's
    # memory more, because some of it comes in large steps: what SQLite has read is 2 MB.
    "malloc_used_kb": Tolerance(3000),
    "python_blocks": Tolerance(5000),
    "python_objects": Tolerance(500),
    # CPython keeps the empty place of a callback that was taken back, 8 bytes: two for each manager here.
    "atexit_places": Tolerance(100),
    "process_groups": _EXACT,
    "loggers": _EXACT,
    "modules": Tolerance(2),
    # Of the journal and the run directory.
    "dev_shm_entries": _EXACT,
    "vm_steps_dcp": Tolerance(20, 0.1),
    "vm_steps_hf": Tolerance(20, 0.1),
    "records_read": Tolerance(0.5, 0.1),
    "transactions": Tolerance(0.2),
    "journal_ms": Tolerance(1.0, 0.25),
    "journal_cpu_ms": Tolerance(0.3, 0.1),
    "save_ms": Tolerance(5.0, 0.25),
    "save_cpu_ms": Tolerance(2.0, 0.1),
    "journal_bytes_per_attempt": Tolerance(100, 0.05),
    "free_pages": Tolerance(2),
    "rollback_journal_bytes": Tolerance(20_000),
    "meta_json_bytes": Tolerance(200),
    "leftovers": _EXACT,
    "live": Tolerance(3),
    "log_bytes": Tolerance(50, 0.25),
    # Not a cost of a save: a start looks through all of the journal for damage, 8000 rows and 1 MB per 1000 saves.
    "start_cpu_ms": Tolerance(100, 0.25),
}
#: Judged over the longest life of the trainer, not over the whole run.
OF_A_LIFE = ("save_ms", "save_cpu_ms", "journal_cpu_ms", "journal_ms", "start_cpu_ms", "log_bytes")


def of_process(pid: int) -> dict[str, float]:
    """Memory, descriptors, threads and children of one process, as the kernel counts them."""
    folder = Path(f"/proc/{pid}")
    sizes = dict.fromkeys(("Rss", "Pss", "Anonymous", "Pss_Shmem", "Private_Clean", "Private_Dirty"), 0)
    for line in (folder / "smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        if name in sizes:
            sizes[name] = int(value.split()[0])
    kinds: Counter[str] = Counter()
    for entry in (folder / "fd").iterdir():
        with contextlib.suppress(OSError):
            kinds[str(entry.readlink()).partition(":")[0]] += 1
            kinds["memfd"] += "/memfd:" in str(entry.readlink())
    children = [
        int(child)
        for task in (folder / "task").iterdir()
        for child in _read(task / "children").split()
    ]  # fmt: skip
    return {
        "rss_kb": sizes["Rss"],
        "pss_kb": sizes["Pss"],
        "uss_kb": sizes["Private_Clean"] + sizes["Private_Dirty"],
        "anonymous_kb": sizes["Anonymous"],
        "shared_memory_kb": sizes["Pss_Shmem"],
        "mappings": _read(folder / "maps").count("\n"),
        "descriptors": sum(kinds.values()) - kinds["memfd"],
        "sockets": kinds["socket"],
        "memfds": kinds["memfd"],
        "threads": len(list((folder / "task").iterdir())),
        "children": len(children),
        "zombies": sum(") Z " in _read(Path(f"/proc/{child}/stat")) for child in children),
    }


def of_this_python() -> dict[str, float]:
    """What only the process itself can count, after all garbage is collected."""
    gc.collect()
    groups = dist.distributed_c10d._world.pg_map if dist.is_available() and dist.is_initialized() else ()
    mine = str(os.getpid())
    heap = _heap()
    return {
        "malloc_used_kb": (heap.uordblks + heap.hblkhd) / 1024,
        "python_blocks": sys.getallocatedblocks(),
        "python_objects": len(gc.get_objects()),
        "atexit_places": atexit._ncallbacks(),  # type: ignore[attr-defined]
        "process_groups": len(groups),
        "loggers": len(logging.root.manager.loggerDict),
        "modules": len(sys.modules),
        "dev_shm_entries": sum(mine in entry.name for entry in Path("/dev/shm").iterdir()),
    }


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


_heap = ctypes.CDLL(None).mallinfo2
_heap.restype = _Heap


def of_run(run: Path, series: tuple[str, ...]) -> dict[str, float]:
    """Journal and run directory while nothing is in flight."""
    rundir = RunDirectory(run)
    with contextlib.closing(sqlite3.connect(f"{rundir.journal_path.as_uri()}?mode=ro", uri=True)) as connection:
        ((attempts,),) = connection.execute("SELECT count(*) FROM checkpoint")
        ((pages,),) = connection.execute("PRAGMA page_count")
        ((page,),) = connection.execute("PRAGMA page_size")
        ((free,),) = connection.execute("PRAGMA freelist_count")
        ((live,),) = connection.execute(
            "SELECT count(*) FROM checkpoint WHERE state = 'COMMITTED' AND retire_started_at IS NULL"
        )
    beside = rundir.journal_path.with_name(rundir.journal_path.name + "-journal")
    names = [entry.name for one in series if (run / one).is_dir() for entry in (run / one).iterdir()]
    return {
        "fsync_ms": 1000 * statistics.median(_synced(run.with_name("probe")) for _ in range(5)),
        "attempts": attempts,
        "journal_bytes": pages * page,
        "free_pages": free,
        "rollback_journal_bytes": beside.stat().st_size if beside.exists() else 0,
        "meta_json_bytes": (run / META_NAME).stat().st_size if (run / META_NAME).exists() else 0,
        "leftovers": sum(name.startswith(".") for name in names),
        "live": live,
    }


class Costs:
    """Counts what journals that are opened after this cost, and what is logged, in this process."""

    def __init__(self) -> None:
        self._steps = self._records = self._transactions = 0
        self._wall = self._cpu = 0.0
        self._logged = 0
        self._lock = threading.Lock()
        connect, record = database.connect, questions.Questions._record

        def counting(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            connection = connect(*args, **kwargs)
            connection.set_progress_handler(self._step, 10)
            return connection

        def recording(journal: Any, row: Any) -> Any:
            self._records += 1
            return record(journal, row)

        database.connect = counting
        database.limit_steps = lambda *_: None  # it would take the place of the counter, of which there is one
        questions.Questions._record = recording  # type: ignore[method-assign]
        database.Database.reading = self._timed(database.Database.reading)  # type: ignore[method-assign]
        writing.WritableDatabase.writing = self._timed(writing.WritableDatabase.writing)  # type: ignore[method-assign]
        handler = logging.Handler()
        handler.emit = self._log  # type: ignore[method-assign]
        logging.getLogger("ckptmgr").addHandler(handler)

    def taken(self) -> dict[str, float]:
        """What there was since it was last asked."""
        found = {
            "vm_steps": self._steps,
            "records_read": self._records,
            "transactions": self._transactions,
            "journal_ms": 1000 * self._wall,
            "journal_cpu_ms": 1000 * self._cpu,
        }
        self._steps = self._records = self._transactions = 0
        self._wall = self._cpu = 0.0
        return found

    def logged(self) -> int:
        """Bytes of log since it was last asked."""
        found, self._logged = self._logged, 0
        return found

    def _step(self) -> int:
        self._steps += 10
        return 0

    def _log(self, record: logging.LogRecord) -> None:
        self._logged += len(record.getMessage())

    def _timed(self, transaction: Any) -> Any:
        @contextlib.contextmanager
        def timed(journal: database.Database) -> Iterator[Any]:
            wall, cpu = time.monotonic(), time.thread_time()
            try:
                with transaction(journal) as connection:
                    yield connection
            finally:
                with self._lock:
                    self._transactions += 1
                    self._wall += time.monotonic() - wall
                    self._cpu += time.thread_time() - cpu

        return timed


def _synced(path: Path) -> float:
    """How long a small write takes to be durable here and now, in seconds: most of what a transaction takes."""
    began = time.monotonic()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    try:
        os.pwrite(descriptor, bytes(4096), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return time.monotonic() - began


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
