#!/usr/bin/env python3
"""
What comparing every byte costs a resume, on the storage at hand.

    resume_time.py DIR --gib 4
    torchrun --nproc-per-node 8 tools/validation/resume_time.py DIR --gib 4

Saves one checkpoint of --gib GiB per rank below DIR, resumes from it --times times with each value of
``verify_digests``, in turn, and prints the seconds of the slowest rank. *cold* asks the kernel to forget the
files before each resume, so that the first reading comes from the disk; *warm* leaves them in the page cache.
Removes what it saved.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ckptmgr import CheckpointManager

#: As many tensors as there are in a model of some size; 0.25 GiB each at most.
_TENSOR_BYTES = 1 << 28
_WAYS = {"not comparing": False, "comparing first": True, "comparing meanwhile": "meanwhile"}


def forget(directory: Path) -> None:
    """Ask the kernel to drop the pages of all files."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def slowest(seconds: float) -> float:
    """The largest of all ranks' numbers, on every rank."""
    if not dist.is_initialized():
        return seconds
    box = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return box.item()


def main(arguments: list[str]) -> int:
    """Measure, and print one line per way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the checkpoint per rank (default 1)")
    parser.add_argument("--times", type=int, default=3, help="resumes of each kind (default 3)")
    options = parser.parse_args(arguments)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo")
    run = options.directory / "resume-time"
    total = int(options.gib * (1 << 30)) * world
    count = max(1, total // _TENSOR_BYTES)
    # Every rank holds every tensor; PyTorch's planner spreads what is stored over the ranks.
    state = {f"t{n}": torch.rand(total // count // 4) for n in range(count)}
    found: dict[tuple[str, str], list[float]] = {}
    try:
        with CheckpointManager(run) as manager:
            pending = manager.save(1, state)
            assert pending is not None
            pending.wait()
            for _ in range(options.times):
                for kind in ("cold", "warm"):
                    for way, verify in _WAYS.items():
                        if kind == "cold" and rank == 0:
                            forget(run)
                        slowest(0.0)
                        began = time.perf_counter()
                        manager.resume(state, verify_digests=verify)
                        found.setdefault((kind, way), []).append(slowest(time.perf_counter() - began))
    finally:
        if rank == 0:
            shutil.rmtree(run, ignore_errors=True)
            for path in options.directory.glob("resume-time.journal*"):
                path.unlink()
    if rank == 0:
        for kind in ("cold", "warm"):
            seconds = {way: statistics.median(found[kind, way]) for way in _WAYS}
            least = seconds["not comparing"]
            said = ", ".join(f"{taken:.2f} s {way} ({taken / least:.2f} times)" for way, taken in seconds.items())
            print(f"{world} ranks, {total / (1 << 30):g} GiB, {kind}: {said}")
    if world > 1:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
