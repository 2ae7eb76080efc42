"""What goes past the page cache: the same bytes and digest, whatever the kernel makes of a write."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckptmgr import durable
from ckptmgr.manifest import Digest
from ckptmgr.pace import Pace
from ckptmgr.writers import worker
from ckptmgr.writers.jobs import FileJob, Segment

BLOCK = durable.DIRECT_BLOCK
MIB = 1 << 20
SIZE = 40 * MIB + 3 * BLOCK
LENDER = 7


@pytest.fixture(scope="module")
def memory() -> Iterator[memoryview]:
    mapped = mmap.mmap(-1, SIZE)
    mapped[:] = random.Random(1).randbytes(SIZE)
    with memoryview(mapped) as view:
        yield view


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int, int]]:
    """Of every write: whether it went past the page cache, where, and how many bytes were asked for."""
    made: list[tuple[bool, int, int]] = []
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        made.append((is_direct(descriptor), offset, len(data)))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return made


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def write(path: Path, memory: memoryview, *segments: Segment) -> None:
    """Write a file that these segments make up, and compare."""
    size = sum(segment.length for segment in segments)
    file = FileJob(path.name, size, own=True, segments=segments)
    digest = worker._write_file(path, file, {None: memory, LENDER: memory}, None, Pace(0))
    expected = b"".join(memory[one.arena_offset : one.arena_offset + one.length] for one in segments)
    assert path.read_bytes() == expected
    assert digest == Digest(expected).text


@pytest.mark.parametrize("size", [MIB - 1, MIB, MIB + 1, 3 * MIB + BLOCK - 1, 8 * MIB, 8 * MIB + BLOCK, 33 * MIB + 5])
@pytest.mark.parametrize("start", [0, BLOCK, 64])
def test_whole_blocks_of_what_lies_alike_go_past_the_page_cache(
    tmp_path: Path, memory: memoryview, calls: list[tuple[bool, int, int]], size: int, start: int
) -> None:
    write(tmp_path / "f", memory, Segment(0, start, size))

    direct = sum(length for past, _, length in calls if past)
    assert direct == (size // BLOCK * BLOCK if start % BLOCK == 0 and size >= MIB else 0)
    assert sum(length for _, _, length in calls) == size
    assert all(offset % BLOCK == length % BLOCK == 0 for past, offset, length in calls if past)


def test_a_piece_in_the_middle_of_a_block_leaves_its_ends_to_the_page_cache(
    tmp_path: Path, memory: memoryview, calls: list[tuple[bool, int, int]]
) -> None:
    write(
        tmp_path / "f",
        memory,
        Segment(0, 64, 100),
        Segment(100, 2 * BLOCK + 100, 5 * MIB),
        Segment(5 * MIB + 100, 0, 7),
    )

    assert sorted((offset, length) for past, offset, length in calls if past) == [(BLOCK, 5 * MIB - BLOCK)]
    assert sorted(offset for past, offset, _ in calls if not past) == [0, 100, 5 * MIB, 5 * MIB + 100]


def test_parts_of_shared_files_stay_in_the_page_cache_from_which_their_digest_is_taken(
    tmp_path: Path, memory: memoryview, calls: list[tuple[bool, int, int]]
) -> None:
    (tmp_path / "f").write_bytes(bytes(4 * MIB))
    worker._write_file(
        tmp_path / "f",
        FileJob("f", 4 * MIB, own=False, segments=(Segment(0, 0, 4 * MIB),)),
        {None: memory},
        None,
        Pace(0),
    )

    assert (tmp_path / "f").read_bytes() == memory[: 4 * MIB]
    assert not any(past for past, _, _ in calls)


def half(descriptor: int, data: memoryview, offset: int, real: Callable[..., int]) -> int:
    return real(descriptor, data[: max(BLOCK, len(data) // 2 // BLOCK * BLOCK)], offset)


def odd(descriptor: int, data: memoryview, offset: int, real: Callable[..., int]) -> int:
    """What a device does that runs full, or a signal, in the middle of a block."""
    if not is_direct(descriptor) or len(data) <= BLOCK:
        return real(descriptor, data, offset)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)
    try:
        return real(descriptor, data[: len(data) // 3 | 1], offset)
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)


def refused(descriptor: int, data: memoryview, offset: int, real: Callable[..., int]) -> int:
    if is_direct(descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return real(descriptor, data, offset)


def refused_later(descriptor: int, data: memoryview, offset: int, real: Callable[..., int]) -> int:
    return (refused if offset >= 16 * MIB else half)(descriptor, data, offset, real)


#: A file in one piece, and one of many that are borrowed and lie anywhere.
IN_ONE = (Segment(0, 0, SIZE - 5),)
BORROWED = (
    Segment(0, 128, 72),
    Segment(72, 64, 9 * MIB + 3, arena=LENDER),
    Segment(9 * MIB + 75, 10 * MIB, 5),
    *(Segment(9 * MIB + 80 + n * 5000, 11 * MIB + n * 6000, 5000, arena=LENDER) for n in range(2000)),
    Segment(9 * MIB + 80 + 10_000_000, 0, 14 * MIB, arena=LENDER),
)


@pytest.mark.parametrize("segments", [IN_ONE, BORROWED], ids=["in one", "borrowed"])
@pytest.mark.parametrize("how", [half, odd, refused, refused_later])
def test_a_write_that_is_cut_short_or_not_taken_is_gone_on_with(
    tmp_path: Path,
    memory: memoryview,
    monkeypatch: pytest.MonkeyPatch,
    how: Callable[..., int],
    segments: tuple[Segment, ...],
) -> None:
    real, lock = os.pwrite, threading.Lock()

    def pwrite(*args: Any) -> int:
        with lock:
            return how(*args, real)

    monkeypatch.setattr(os, "pwrite", pwrite)
    write(tmp_path / "f", memory, *segments)


@pytest.mark.parametrize("size", [MIB, MIB + 1, 4 * MIB - 64, 4 * MIB, 33 * MIB + 5])
@pytest.mark.parametrize("start", [0, 64])
def test_borrowed_bytes_go_past_the_page_cache_wherever_they_lie(
    tmp_path: Path, memory: memoryview, calls: list[tuple[bool, int, int]], size: int, start: int
) -> None:
    write(tmp_path / "f", memory, Segment(0, 640, 64), Segment(64, start, size, arena=LENDER))

    total = size + 64
    assert sum(length for past, _, length in calls if past) == total // BLOCK * BLOCK
    assert sum(length for _, _, length in calls) == total
    assert all(offset % BLOCK == length % BLOCK == 0 for past, offset, length in calls if past)


def test_bytes_of_an_arena_that_is_not_there_fail_the_file(tmp_path: Path, memory: memoryview) -> None:
    file = FileJob("f", 64, own=True, segments=(Segment(0, 0, 64, arena=LENDER),))
    with pytest.raises(ValueError, match="arena of 0 bytes"):
        worker._write_file(tmp_path / "f", file, {None: memory}, None, Pace(0))


def test_a_file_system_that_has_only_its_page_cache_is_written_through_it(
    tmp_path: Path, memory: memoryview, calls: list[tuple[bool, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.fcntl

    def refuse(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    write(tmp_path / "f", memory, Segment(0, 0, 9 * MIB + 1))
    write(tmp_path / "g", memory, *BORROWED)
    assert not any(past for past, _, _ in calls)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT, 0])
@pytest.mark.parametrize("at", [0, 16 * MIB, 32 * MIB])
def test_an_error_fails_the_file_and_leaves_no_thread_writing(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch, error: int, at: int
) -> None:
    """0 is a write that says that it has written nothing."""
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if offset != at:
            return real(descriptor, data, offset)
        if not error:
            return 0
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "pwrite", pwrite)
    before, opened = threading.active_count(), _descriptors()
    for name, segments in (("f", [Segment(0, 0, SIZE)]), ("g", BORROWED)):
        with pytest.raises(OSError, match="returned 0" if not error else os.strerror(error)) as caught:
            write(tmp_path / name, memory, *segments)
        assert caught.value.errno == (error or errno.EIO)
    assert threading.active_count() == before
    assert _descriptors() == opened


def test_both_threads_together_keep_to_the_rate(tmp_path: Path, memory: memoryview) -> None:
    file = FileJob("f", 33 * MIB, own=True, segments=(Segment(0, 0, 33 * MIB),))
    began = time.monotonic()
    worker._write_file(tmp_path / "f", file, {None: memory}, None, Pace(66 * MIB))
    assert time.monotonic() - began >= 0.5
    assert (tmp_path / "f").read_bytes() == memory[: 33 * MIB]


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_bytes_are_synced_after_the_last_of_them_was_written(
    tmp_path: Path, memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the page cache is not past the device's, and does not write the file's extents."""
    seen: list[str] = []
    writes, syncs = os.pwrite, os.fsync
    monkeypatch.setattr(os, "pwrite", lambda *args: (writes(*args), seen.append("write"))[0])
    monkeypatch.setattr(os, "fsync", lambda descriptor: (seen.append("sync"), syncs(descriptor))[1])
    write(tmp_path / "f", memory, Segment(0, 0, SIZE - 1))
    assert seen.count("write") > 4
    assert seen.index("sync") == seen.count("write")
