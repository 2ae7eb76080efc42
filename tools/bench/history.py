"""
What a save, a start and the search for the newest checkpoint cost a run that holds many checkpoints.

    python -m bench.history make FOLDER NUMBER
    python -m bench.history measure FOLDER SAVES

``make`` gives FOLDER/run so many committed checkpoints of one small tensor; ``measure`` prints one object of lists of
seconds.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

_MANIFEST = "ckptmgr.json"
#: Nothing is repeated once all its repetitions have taken so long.
_ENOUGH_S = 15.0
_WHO: dict[str, Any] = {"host": "bench", "pid": 1}


def make(folder: Path, number: int) -> None:
    """Save once, make the other checkpoints from that by linking its files, and enter them in the journal."""
    import torch

    from ckptmgr import CheckpointManager
    from ckptmgr.journal import Journal
    from ckptmgr.rundir import RunDirectory

    run = folder / "run"
    with CheckpointManager(run) as manager:
        pending = manager.save(0, {"t": torch.zeros(1024)})
        assert pending is not None
        pending.wait()
    first = run / "checkpoint" / "step-0"
    manifest = json.loads((first / _MANIFEST).read_text())
    files = [path for path in first.iterdir() if path.name != _MANIFEST]
    for step in range(1, number):
        there = first.with_name(f"step-{step}")
        there.mkdir()
        for path in files:
            os.link(path, there / path.name)
        more = {"step": step, "attempt": manifest["attempt"] + step, "created_at": manifest["created_at"] + step / 1000}
        (there / _MANIFEST).write_text(json.dumps(manifest | more))
    with Journal.open(folder / "run.journal.db") as journal:
        epoch = journal.begin_epoch(**_WHO, command="the past", versions={})
        for step in range(1, number):
            entry, digest = RunDirectory(run).read_manifest(f"checkpoint/step-{step}")
            journal.insert_rebuilt(entry, epoch=epoch, manifest_digest=digest, committed_at=entry.created_at, **_WHO)
        journal.end_epoch(epoch)


def measure(folder: Path, saves: int) -> dict[str, list[float]]:
    """The seconds of a start, of saves whose bytes cost nothing, of resumes, and of finding the newest checkpoint."""
    import torch

    from ckptmgr import CheckpointManager
    from ckptmgr.restore import Restore

    logging.getLogger("ckptmgr").setLevel(logging.ERROR)
    run = folder / "run"
    found: dict[str, list[float]] = collections.defaultdict(list)
    on_training_thread = journal_clock()
    choosing: list[float] = []
    clocked(Restore, "_choose", choosing.append)
    state = {"t": torch.zeros(1024)}
    began = time.perf_counter()
    with CheckpointManager(run) as manager:
        found["start_s"].append(time.perf_counter() - began)
        manager.warm_up(state)
        step = 10**9 + int(time.time())
        until = time.monotonic() + _ENOUGH_S
        for number in range(saves + 1):
            if number > 1 and time.monotonic() > until:
                break
            on_training_thread[0] = 0.0
            began = time.perf_counter()
            pending = manager.save(step + number, state)
            stall = time.perf_counter() - began
            assert pending is not None
            while not pending.done():
                time.sleep(0.0002)
            durable = time.perf_counter() - began
            pending.wait()
            if number:  # the first one finds caches empty
                found["small_stall_s"].append(stall)
                found["small_durable_s"].append(durable)
                found["journal_on_thread_s"].append(on_training_thread[0])
        until = time.monotonic() + _ENOUGH_S
        for number in range(saves + 1):
            if number > 1 and time.monotonic() > until:
                break
            choosing.clear()
            began = time.perf_counter()
            resumed = manager.resume(dict(state), verify_digests=False)
            assert resumed is not None
            if number:
                found["small_resume_s"].append(time.perf_counter() - began)
                found["find_s"].extend(choosing)
    until = time.monotonic() + _ENOUGH_S
    for _ in range(min(saves, 3)):
        if found["cli_latest_s"] and time.monotonic() > until:
            break
        began = time.perf_counter()
        assert newest_by_listing(run / "checkpoint")
        found["listing_s"].append(time.perf_counter() - began)
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ckptmgr", "latest", str(run)], capture_output=True, check=True)
        found["cli_latest_s"].append(time.perf_counter() - began)
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ckptmgr", "--version"], capture_output=True, check=True)
        found["cli_version_s"].append(time.perf_counter() - began)
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], capture_output=True, check=True)
        found["python_s"].append(time.perf_counter() - began)
    return dict(found)


def newest_by_listing(series: Path) -> Path:
    """What a trainer without a journal does: look into every directory for a complete checkpoint, take the last."""
    complete = []
    for entry in os.scandir(series):
        if entry.name.startswith("step-") and (Path(entry.path) / ".metadata").exists():
            manifest = json.loads((Path(entry.path) / _MANIFEST).read_text())
            complete.append((manifest["step"], entry.path))
    return Path(max(complete)[1])


def journal_clock() -> list[float]:
    """From now on: the seconds that the main thread spends in the journal, in the one element of the answer."""
    from ckptmgr.journal import Journal

    total = [0.0]
    main = threading.main_thread()

    def add(seconds: float) -> None:
        if threading.current_thread() is main:
            total[0] += seconds

    for name, value in list(vars(Journal).items()):
        if not name.startswith("_") and callable(value):
            clocked(Journal, name, add)
    for name in dir(Journal):
        if not name.startswith("_") and name not in vars(Journal) and callable(getattr(Journal, name)):
            clocked(Journal, name, add)
    return total


def clocked(owner: Any, name: str, took: Any) -> None:
    """Have *took* told how long each call of a method takes. Without such a method there is nothing to be told."""
    real = getattr(owner, name, None)
    if real is None:
        return

    @functools.wraps(real)
    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            took(time.perf_counter() - began)

    if isinstance(vars(owner).get(name), classmethod | staticmethod):
        return
    with contextlib.suppress(AttributeError, TypeError):
        setattr(owner, name, call)


def main() -> None:
    """One of the two commands."""
    command, folder, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if command == "make":
        make(folder, number)
    else:
        print(json.dumps(measure(folder, number)))


if __name__ == "__main__":
    main()
