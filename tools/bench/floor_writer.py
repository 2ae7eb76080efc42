"""
The floor's helper process: writes what lies in a memory file, and says when it is durable. Imports no torch.

    python floor_writer.py MEMORY_DESCRIPTOR SIZE DIGEST

Reads one path per line from standard input; for each it writes the memory to PATH/data and answers one line:
the digest, or an error. DIGEST is 0 or 1.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sys
import threading
from pathlib import Path

import xxhash

_CHUNK = 8 << 20
_THREADS = 2


def main() -> None:
    """Serve until standard input ends."""
    descriptor, size, wanted = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1"
    os.nice(10)
    memory = memoryview(mmap.mmap(descriptor, size, prot=mmap.PROT_READ))
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            print(_write(Path(line.rstrip("\n")), memory, digest=wanted), flush=True)
        except OSError as error:
            print(f"error {error}", flush=True)


def _write(path: Path, memory: memoryview, *, digest: bool) -> str:
    scratch = path.with_name(f"{path.name}.tmp")
    scratch.mkdir()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        descriptor = os.open(scratch / "data", flags | os.O_DIRECT, 0o666)
    except OSError:  # a file system that knows no direct writing
        descriptor = os.open(scratch / "data", flags, 0o666)
    starts = range(0, len(memory), _CHUNK)
    found: dict[int, bytes] = {}
    problems: list[OSError] = []

    def work(mine: range) -> None:
        try:
            for start in mine:
                chunk = memory[start : start + _CHUNK]
                if digest:
                    found[start] = xxhash.xxh3_128_digest(chunk)
                written = 0
                while written < len(chunk):
                    written += os.pwrite(descriptor, chunk[written:], start + written)
        except OSError as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(starts[n::_THREADS],)) for n in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    os.fsync(descriptor)
    os.close(descriptor)
    _sync_directory(scratch)
    scratch.rename(path)
    _sync_directory(path.parent)
    return hashlib.blake2b(b"".join(found[start] for start in sorted(found)), digest_size=16).hexdigest()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
