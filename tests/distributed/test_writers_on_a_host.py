"""The writers of one host take turns: write slots that a process holds for as long as it lives."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from rank_processes import Here, on_ranks, start_ranks
from saving_ranks import manager_on, poll_until_failure, rows, timeouts

from ckptmgr import CheckpointState, WriterOptions
from ckptmgr.rundir import RunDirectory

_BYTES = 24 << 20


def _slot_names(run_dir: Path) -> list[str]:
    """Write slots of this run that some process of this host holds now."""
    prefix = f"@ckptmgr-{os.getuid()}-{RunDirectory(run_dir).run_id()}-"
    lines = Path("/proc/net/unix").read_text().splitlines()
    return [name for line in lines if (name := line.rpartition(" ")[2]).startswith(prefix)]


def _save_with_slots(here: Here, write_slots: int) -> list[Any]:
    state = {f"part-{here.rank}": torch.ones(_BYTES // 4)}
    with manager_on(here, writers=WriterOptions(write_slots=write_slots, nice=0)) as manager:
        manager.warm_up(state)
        here.tell(f"writer-{here.rank}", manager.writer_pid)
        here.ask("watching")
        pending = manager.save(1, state)
        assert pending is not None
        pending.wait()
        assert not here.is_leader or not _slot_names(here.run_dir), "a slot is held after the save"
    return []


def _write_intervals(run_dir: Path, pids: list[int], done: Any) -> tuple[list[tuple[float, float]], int]:
    """When each process began and ended to write, seen from outside; and the most slots that were held at once."""

    def written(pid: int) -> int:
        return int(Path(f"/proc/{pid}/io").read_text().split("wchar: ")[1].split()[0])

    base = {pid: written(pid) for pid in pids}
    last, seen = dict(base), dict.fromkeys(pids, (0.0, 0.0))
    most = 0
    while not done():
        now = time.monotonic()
        most = max(most, len(_slot_names(run_dir)))
        for pid in pids:
            with contextlib.suppress(OSError):
                if (count := written(pid)) - base[pid] > 1 << 20 and count != last[pid]:
                    last[pid] = count
                    seen[pid] = (seen[pid][0] or now, now)
        time.sleep(0.0005)
    return [interval for interval in seen.values() if interval[0]], most


def _watch(tmp_path: Path, write_slots: int) -> tuple[list[tuple[float, float]], int]:
    with start_ranks(4, _save_with_slots, tmp_path, write_slots=write_slots) as world:
        pids = [world.here.ask(f"writer-{rank}") for rank in range(4)]
        world.here.tell("watching")
        run_dir = tmp_path / "run"
        final = run_dir / "checkpoint" / "step-1"
        watched = _write_intervals(run_dir, pids, lambda: final.exists() or not psutil.pid_exists(pids[0]))
        world.join(40)
    return watched


def test_with_one_write_slot_at_most_one_writer_of_the_host_writes(tmp_path: Path) -> None:
    intervals, most = _watch(tmp_path, 1)
    assert most == 1
    assert len(intervals) >= 3, "too few writers were seen writing to judge"
    intervals.sort()
    for (_, ended), (began, _) in itertools.pairwise(intervals):
        # Both are seen at once where the second began right after the first had ended.
        assert ended <= began, f"two writers wrote at the same time: {intervals}"


def test_without_a_limit_no_slot_is_taken_and_with_two_at_most_two(tmp_path: Path) -> None:
    for write_slots in (0, 2):
        folder = tmp_path / str(write_slots)
        folder.mkdir()
        _, most = _watch(folder, write_slots)
        assert (most == 0) if write_slots == 0 else (1 <= most <= 2)


@on_ranks(2)
def test_an_orphan_keeps_its_slot_and_a_killed_one_frees_it(here: Here) -> None:
    state = {f"part-{here.rank}": torch.ones(100)}
    wait = timeouts(write_s=4.0, gather_s=2.0)
    with manager_on(here, wait=wait, writers=WriterOptions(write_slots=1, nice=0)) as manager:
        run_id = RunDirectory(here.run_dir).run_id()
        orphan = 0
        if here.is_leader:
            orphan = os.fork()
            if orphan == 0:
                # What a writer does that has outlived its trainer and is stuck on a dead disk.
                with contextlib.suppress(BaseException), socket.socket(socket.AF_UNIX) as held:
                    held.bind(f"\0ckptmgr-{os.getuid()}-{run_id}-0")
                    here.tell("held")
                    time.sleep(60)
                os._exit(0)
        here.ask("held")
        manager.save(1, state)
        _, failure = poll_until_failure(here, manager)
        assert [f.rank for f in failure.failures] == [0, 1]
        assert all("no write slot was free" in f.cause for f in failure.failures)
        here.meet()
        pending = manager.save(2, state)
        assert pending is not None
        time.sleep(0.3)
        assert not pending.done()
        if here.is_leader:
            os.kill(orphan, signal.SIGKILL)
            os.waitpid(orphan, 0)
        pending.wait()
        assert pending.state is CheckpointState.COMMITTED
    if here.is_leader:
        assert [record.state for record in rows(here).values()] == [CheckpointState.FAILED, CheckpointState.COMMITTED]


@on_ranks(2)
def test_every_rank_has_one_writer_as_nice_as_asked_and_none_after_closing(here: Here) -> None:
    mine = psutil.Process()
    with manager_on(here, writers=WriterOptions(nice=4, io_class="idle")) as manager:
        (writer,) = mine.children()
        assert writer.pid == manager.writer_pid
        assert (writer.nice(), writer.ionice().ioclass) == (min(19, mine.nice() + 4), psutil.IOPRIO_CLASS_IDLE)
        assert len(set(here.everyone("pid", writer.pid))) == 2
    assert not mine.children()
