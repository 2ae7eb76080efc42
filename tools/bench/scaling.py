"""
What the messages of a save cost by the number of ranks, with a state of one small tensor.

    python tools/bench/scaling.py --ranks 2 4 8 16 32 64

All ranks are processes of this machine, forked from one that has imported torch. *Agreeing* is the collective with
which ``save`` begins, on the training thread; a *round* is what the finalizer threads say to each other in a save:
go, every rank's report, the outcome. Both are also measured in CPU time of rank 0, which tells what it would cost
where every rank had a core of its own: the seconds here are of many processes that wait for few cores. Gloo connects
all ranks of a group with each other, unless ``TORCH_GLOO_LAZY_INIT=1`` lets it wait until they speak: *descriptors*
are those that a manager has opened.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ckptmgr import DCP, CheckpointManager, KeepLast, Series, Timeouts
from ckptmgr.ranks import Ranks

#: About as much as a rank says of a save: a file with its digest, and seconds.
_REPORT = {"files": [("__0_0.distcp", 1 << 30, "xxh3_128:" + 32 * "0")], "cause": None, "write_s": 1.0}
_COLUMNS = {
    "agree_ms": "agreeing, ms", "agree_cpu_ms": "CPU of rank 0", "round_ms": "a round, ms",
    "round_cpu_ms": "CPU of rank 0", "stall_ms": "stall of a save, ms", "commit_ms": "until COMMITTED, ms",
    "descriptors": "descriptors of rank 0", "descriptors_of_last": "of the last rank",
}  # fmt: skip


def _median_ms(times: int, what: Callable[[int], Any]) -> tuple[float, float]:
    """Medians of the time that *what* takes from a barrier on, and of this thread's CPU time, in milliseconds."""
    spent = []
    for number in range(times):
        dist.barrier()
        began, cpu = time.perf_counter(), time.thread_time()
        what(number)
        spent.append((time.perf_counter() - began, time.thread_time() - cpu))
    walls, cpus = zip(*spent, strict=True)
    return 1e3 * statistics.median(walls), 1e3 * statistics.median(cpus)


def _rounds(ranks: Ranks) -> Callable[[int], None]:
    def one(number: int) -> None:
        if ranks.rank == 0:
            ranks.order(number, 0, "go", 60)
            assert len(ranks.collect(number, 1, _REPORT, 60)) == ranks.world_size
            ranks.order(number, 2, (), 60)
        else:
            ranks.await_order(number, (0,), 60)
            ranks.report(number, 1, _REPORT, 60)
            ranks.await_order(number, (2,), 60)

    return one


def _open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _rank(rank: int, world_size: int, port: int, saves: int, folder: str, into: Any) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    timeouts = Timeouts(setup_s=600, collective_s=300)
    found: dict[str, float] = {}
    ranks = Ranks(timeouts)
    found["agree_ms"], found["agree_cpu_ms"] = _median_ms(5 * saves, lambda number: ranks.agree([number] * 12))
    found["round_ms"], found["round_cpu_ms"] = _median_ms(5 * saves, _rounds(ranks))
    ranks.close()
    state = {"t": torch.zeros(1024)}
    before = _open_descriptors()
    stalls = []
    with CheckpointManager(Path(folder, "run"), [Series("c", DCP(), keep=KeepLast(1))], timeouts=timeouts) as manager:

        def save(number: int) -> None:
            began = time.perf_counter()
            pending = manager.save(number, state, series="c")
            stalls.append(time.perf_counter() - began)
            assert pending is not None
            pending.wait()

        save(0)
        found["commit_ms"], _ = _median_ms(saves, lambda number: save(number + 1))
        descriptors = _open_descriptors() - before
    found["stall_ms"] = 1e3 * statistics.median(stalls[1:])
    opened: list[Any] = [None] * world_size
    dist.all_gather_object(opened, descriptors)
    if rank == 0:
        into.send(found | {"descriptors": opened[0], "descriptors_of_last": opened[-1]})
    dist.barrier()
    os._exit(0)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default that of temporary files")
    given = parser.parse_args()
    context = multiprocessing.get_context("fork")
    print(f"| ranks | {' | '.join(_COLUMNS.values())} |\n| ---: |{' ---: |' * len(_COLUMNS)}", flush=True)
    for world_size in given.ranks:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder, socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            taken.close()
            ours, theirs = context.Pipe(duplex=False)
            processes = [
                context.Process(target=_rank, args=(rank, world_size, port, given.saves, folder, theirs))
                for rank in range(world_size)
            ]
            for process in processes:
                process.start()
            theirs.close()
            found = ours.recv()
            for process in processes:
                process.join()
        cells = [f"{value:.2f}" if isinstance(value := found[column], float) else str(value) for column in _COLUMNS]
        print(f"| {world_size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
