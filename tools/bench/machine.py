"""The machine: what it is, how noisy it is just now, and how much memory a tree of processes holds."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import subprocess
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from bench.workloads import STATE_NAME

_NOISE_BYTES = 64 << 20
_PACKAGES = ("torch", "numpy", "safetensors", "xxhash", "sqlalchemy", "torch_checkpointing", "orbax-checkpoint", "jax")


def facts(folder: Path, root: Path) -> dict[str, Any]:
    """What stands above the figures: processor, memory, kernel, disk, versions."""
    model = "unknown processor"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.is_relative_to(part.mountpoint)]
    mount = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    revision = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "filesystem": mount.fstype if mount is not None else "unknown",
        "disk": _disk(folder),
        "python": platform.python_version(),
        "versions": versions,
        "ckptmgr": revision or "unknown",
    }


def noise(folder: Path) -> dict[str, float]:
    """How fast memory and disk are just now, and how much of the processors others took while that was measured."""
    before = psutil.cpu_times()
    source, target = mmap.mmap(-1, _NOISE_BYTES), mmap.mmap(-1, _NOISE_BYTES)
    where = [ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in (target, source)]
    ctypes.memset(where[1], 7, _NOISE_BYTES)
    ctypes.memmove(*where, _NOISE_BYTES)
    began = time.perf_counter()
    for _ in range(4):
        ctypes.memmove(*where, _NOISE_BYTES)
    copied = time.perf_counter() - began
    path = folder / "noise"
    began = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with contextlib.suppress(OSError):
            os.set_blocking(descriptor, True)
        done = 0
        while done < _NOISE_BYTES:
            done += os.write(descriptor, memoryview(source)[done : done + (8 << 20)])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    written = time.perf_counter() - began
    path.unlink()
    after = psutil.cpu_times()
    taken = sum(after) - sum(before)
    return {
        "copy_mib_s": 4 * _NOISE_BYTES / copied / (1 << 20),
        "durable_mib_s": _NOISE_BYTES / written / (1 << 20),
        "steal": (after.steal - before.steal) / taken if taken else 0.0,
        "load": os.getloadavg()[0],
    }


class Watch:
    """
    Looks at a process and all below it again and again, in a thread: memory held, bytes written.

    Memory is the proportional set size of all mappings that are not of a file on disk: private memory, and shared
    memory (memory files included) counted once. The workload's own tensors are left out.

    Args:
        pid: The top of the tree.
        every_s: How often to look.
    """

    def __init__(self, pid: int, every_s: float = 0.05) -> None:
        self._top = psutil.Process(pid)
        self._every_s = every_s
        self._over = threading.Event()
        self._written: dict[int, int] = {}
        self.peak_bytes = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        for process in self._tree():
            self._written.setdefault(process.pid, -_written(process.pid))
        self._before = dict(self._written)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def written_bytes(self) -> int:
        """What the tree gave to the disk's file systems while it was watched."""
        return sum(now + self._before.get(pid, 0) for pid, now in self._written.items() if now > 0)

    def held(self) -> int:
        """The memory that the tree holds now."""
        total = 0
        for process in self._tree():
            with contextlib.suppress(OSError):
                total += _held(process.pid)
                self._written[process.pid] = _written(process.pid)
        self.peak_bytes = max(self.peak_bytes, total)
        return total

    def _tree(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return [self._top, *self._top.children(recursive=True)]
        return []

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            self.held()
        self.held()


def _held(pid: int) -> int:
    """Proportional bytes of one process: private and shared memory, without the workload's tensors."""
    total, name = 0, ""
    with Path(f"/proc/{pid}/smaps").open() as lines:
        for line in lines:
            word, _, rest = line.partition(" ")
            if not word.endswith(":"):
                name = (line.rstrip("\n").split(None, 5)[5:] and line.rstrip("\n").split(None, 5)[5]) or ""
            elif word == "Pss:" and _counts(name):
                total += int(rest.split()[0]) << 10
    return total


def _counts(name: str) -> bool:
    if STATE_NAME in name:
        return False
    return not name.startswith("/") or name.startswith(("/memfd:", "/dev/shm/", "/dev/zero", "/SYSV"))


def _written(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/io").read_text().splitlines():
            if line.startswith("write_bytes:"):
                return int(line.split()[1])
    return 0


def _disk(folder: Path) -> str:
    device = folder.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    with contextlib.suppress(OSError):
        rotational = (block / "queue/rotational").read_text().strip() == "1"
        return f"{block.resolve().name} ({'rotating' if rotational else 'not rotating'})"
    return "unknown"
