"""
The writer process: reads an arena, writes files, syncs them, digests them on the way.

Started once per rank as ``python -m ckptmgr.writers.worker FD PARENT NICE IO_CLASS``, never forked from the
trainer's image, and without torch. It never opens the journal and decides nothing: it does jobs and
answers. It dies with its trainer, by PR_SET_PDEATHSIG and by the end of the pipe, so that no orphan
goes on writing; and it holds its host's write slot itself, so that one that lives still counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import itertools
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path

from ckptmgr import durable, reach
from ckptmgr.manifest import Digest, FileEntry
from ckptmgr.pace import Pace
from ckptmgr.writers.jobs import Answer, ArenaJob, DigestJob, FileJob, WriteJob

_PR_SET_PDEATHSIG = 1
_CHUNK = 8 << 20
#: Bytes that are put together for a write past the page cache, in one more buffer than there are writes under way.
_TOGETHER = 4 << 20
#: From how many bytes on it is quicker to go past the page cache, whose pages take longer to fill than the disk.
_LEAST_DIRECT = 1 << 20
#: Writes under way at a time: the disk has the next one while this one returns.
_DIRECT_THREADS = 2
_SLOT_POLL_S = 0.02

#: Arenas by number; None is the job's own.
_Memories = dict[int | None, memoryview]


def main() -> None:
    """Serve jobs from the trainer until it closes the pipe or dies."""
    pipe, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    _die_with(parent, pipe)
    _yield_to_training(int(sys.argv[3]), sys.argv[4])
    # Ctrl-C reaches the whole foreground group; what becomes of the save is the trainer's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe.send(Answer())
    arenas: dict[int, mmap.mmap] = {}
    with contextlib.suppress(EOFError, ConnectionError):
        while (job := pipe.recv()) is not None:
            pipe.send(_do(job, pipe, arenas))


def _do(job: object, pipe: Connection, arenas: dict[int, mmap.mmap]) -> Answer:
    try:
        if isinstance(job, ArenaJob):
            _map(job, pipe, arenas)
            return Answer()
        if isinstance(job, WriteJob):
            return _write(job, arenas)
        if isinstance(job, DigestJob):
            return _read_back(job)
        return Answer(cause=f"unknown job {type(job).__name__}")
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return Answer(cause=f"{type(error).__name__}: {error.strerror or error}{where}")
    except Exception as error:  # noqa: BLE001 - whatever went wrong belongs in the answer, not on a lost stderr
        return Answer(cause=f"{type(error).__name__}: {error}")


def _map(job: ArenaJob, pipe: Connection, arenas: dict[int, mmap.mmap]) -> None:
    descriptor = reduction.recv_handle(pipe)
    try:
        old = arenas.pop(job.arena, None)
        if old is not None:
            old.close()
        if job.size:
            arenas[job.arena] = mmap.mmap(descriptor, job.size, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)


def _write(job: WriteJob, arenas: Mapping[int, mmap.mmap]) -> Answer:
    directory = Path(job.directory)
    asked = time.monotonic()
    sealed = []
    pace = Pace(job.max_bytes_per_second)
    with _slot(job), contextlib.ExitStack() as views:
        memories: _Memories = {number: views.enter_context(memoryview(arena)) for number, arena in arenas.items()}
        memories[None] = memories.get(job.arena, memoryview(b""))
        started = time.monotonic()
        for file in job.files:
            try:
                digest = _write_file(directory / file.path, file, memories, job.file_mode, pace)
            except OSError as error:
                error.filename = error.filename or file.path
                raise
            if file.own:
                sealed.append(FileEntry(file.path, file.size, digest, job.rank))
        # Crash here: WRITING with files whose names may not be durable yet; recovery removes the staging directory.
        for below in {(directory / file.path).parent for file in job.files}:
            durable.sync_directory(below)
    return Answer(files=tuple(sealed), write_s=time.monotonic() - started, waited_s=started - asked)


def _write_file(path: Path, file: FileJob, memories: _Memories, mode: int | None, pace: Pace) -> str:
    for segment in file.segments:
        has = len(memories.get(segment.arena, b""))
        if segment.arena_offset + segment.length * segment.count > has:
            raise ValueError(f"{file.path} needs bytes that this process's arena of {has} bytes lacks")
    digest = Digest()
    with durable.new_file(path, mode=mode) if file.own else durable.shared_file(path) as descriptor:
        if file.own:
            durable.set_size(descriptor, file.size)
        if file.data is not None:
            digest.update(file.data)
            durable.write_at(descriptor, memoryview(file.data), 0)
        pieces: Iterable[_Piece] = _pieces(file)
        if file.own and file.size >= _LEAST_DIRECT:
            borrows = any(segment.arena is not None for segment in file.segments)
            write = _write_together if borrows else _write_directly
            pieces = write(descriptor, list(pieces), memories, digest, pace)
        for piece in pieces:
            with piece.bytes_in(memories) as chunk:
                if file.own and not piece.is_digested:
                    digest.update(chunk)
                pace.wait(piece.length)
                durable.write_at(descriptor, chunk, piece.file_offset)
    return digest.text


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    """At most `_CHUNK` bytes that lie together in an arena and in the file."""

    file_offset: int
    arena: int | None
    arena_offset: int
    length: int
    is_direct: bool = False
    is_digested: bool = False

    def bytes_in(self, memories: _Memories) -> memoryview:
        return memories[self.arena][self.arena_offset : self.arena_offset + self.length]

    def after(self, written: int) -> _Piece:
        """What is left of it, for the page cache."""
        return dataclasses.replace(self.cut(written, self.length), is_digested=True)

    def cut(self, begin: int, end: int) -> _Piece:
        """The part of it from *begin* to *end*."""
        return _Piece(self.file_offset + begin, self.arena, self.arena_offset + begin, end - begin)


def _pieces(file: FileJob) -> Iterator[_Piece]:
    """All of a file in its order; what goes past the page cache is whole blocks of it, many together."""
    for segment in file.segments:
        for file_offset, arena_offset in segment.runs():
            ends = [0, segment.length]
            if file.own and (file_offset - arena_offset) % durable.DIRECT_BLOCK == 0:
                first = -file_offset % durable.DIRECT_BLOCK
                last = segment.length - (file_offset + segment.length) % durable.DIRECT_BLOCK
                if last - first >= _LEAST_DIRECT:
                    ends = [0, first, last, segment.length]
            for begin, end in itertools.pairwise(ends):
                is_direct = len(ends) > 2 and begin == ends[1]
                for start in range(begin, end, _CHUNK):
                    length = min(_CHUNK, end - start)
                    yield _Piece(file_offset + start, segment.arena, arena_offset + start, length, is_direct)


def _write_directly(
    descriptor: int, pieces: list[_Piece], memories: _Memories, digest: Digest, pace: Pace
) -> list[_Piece]:
    """
    Digest all of a file and write what goes past the page cache meanwhile, on threads; returns what is left to write.

    The page cache has the rest to itself: no page of it is written both ways.
    """

    def write(piece: _Piece) -> _Piece:
        pace.wait(piece.length)
        with piece.bytes_in(memories) as chunk:
            return piece.after(durable.write_direct(descriptor, chunk, piece.file_offset))

    rest = []
    with durable.direct(descriptor) as can, ThreadPoolExecutor(_DIRECT_THREADS) as threads:
        if not can:
            return pieces
        try:
            written = [threads.submit(write, piece) if piece.is_direct else None for piece in pieces]
            for piece in pieces:
                with piece.bytes_in(memories) as chunk:
                    digest.update(chunk)
            for piece, future in zip(pieces, written, strict=True):
                left = piece.after(0) if future is None else future.result()
                rest += [left] if left.length else []
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return rest


def _write_together(
    descriptor: int, pieces: list[_Piece], memories: _Memories, digest: Digest, pace: Pace
) -> list[_Piece]:
    """
    `_write_directly` for a file that borrows bytes, which lie in memory as they stand in a file of another layout.

    What goes past the page cache begins at a block of memory, so they are put together in buffers first.
    """

    def write(chunk: memoryview, offset: int) -> int:
        pace.wait(len(chunk))
        return durable.write_direct(descriptor, chunk, offset)

    parts: list[tuple[int, list[_Piece]]] = []
    buffers = [memoryview(mmap.mmap(-1, _TOGETHER)) for _ in range(_DIRECT_THREADS + 1)]
    written: list[Future[int]] = []
    with durable.direct(descriptor) as can, ThreadPoolExecutor(_DIRECT_THREADS) as threads:
        if not can:
            return pieces
        try:
            for number, of_chunk in itertools.groupby(_at_chunks(pieces), lambda piece: piece.file_offset // _TOGETHER):
                if number >= len(buffers):
                    written[number - len(buffers)].result()  # that buffer is free again
                buffer, begin, end, together = buffers[number % len(buffers)], number * _TOGETHER, 0, list(of_chunk)
                for piece in together:
                    end = piece.file_offset - begin + piece.length
                    with piece.bytes_in(memories) as chunk:
                        buffer[end - piece.length : end] = chunk
                written.append(threads.submit(write, buffer[: end - end % durable.DIRECT_BLOCK], begin))
                digest.update(buffer[:end])
                parts.append((begin, together))
            ends = [begin + future.result() for (begin, _), future in zip(parts, written, strict=True)]
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return [
        piece.after(max(0, end - piece.file_offset))
        for end, (_, together) in zip(ends, parts, strict=True)
        for piece in together
        if end < piece.file_offset + piece.length
    ]


def _at_chunks(pieces: Iterable[_Piece]) -> Iterator[_Piece]:
    """*pieces*, cut where a multiple of `_TOGETHER` of the file goes through one."""
    for piece in pieces:
        begin = 0
        while begin < piece.length:
            end = min(piece.length, begin + _TOGETHER - (piece.file_offset + begin) % _TOGETHER)
            yield piece.cut(begin, end)
            begin = end


def _read_back(job: DigestJob) -> Answer:
    started = time.monotonic()
    sealed = []
    buffer = memoryview(bytearray(_CHUNK))
    for path in job.paths:
        digest = Digest()
        size = 0
        with reach.directory(Path(job.directory)) as folder, reach.regular(folder, path) as descriptor:
            while count := os.readv(descriptor, [buffer]):
                digest.update(buffer[:count])
                size += count
        sealed.append(FileEntry(path, size, digest.text, job.rank))
    return Answer(files=tuple(sealed), write_s=time.monotonic() - started)


@contextlib.contextmanager
def _slot(job: WriteJob) -> Iterator[None]:
    """
    Hold one of the host's write slots.

    A slot is a name in the kernel's abstract socket namespace: no file to leak or to clean up, one
    holder at a time, and free as soon as this process ends, however it ends (unix(7)).
    """
    deadline = time.monotonic() + job.slot_timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as holder:
        while job.write_slots and not any(_bind(holder, f"{job.slots}-{n}") for n in range(job.write_slots)):
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, f"no write slot was free within {job.slot_timeout_s:g} s")
            time.sleep(_SLOT_POLL_S)
        yield


def _bind(holder: socket.socket, name: str) -> bool:
    try:
        holder.bind("\0" + name)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def _die_with(parent: int, pipe: Connection) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    poller = select.poll()
    poller.register(pipe.fileno(), select.POLLRDHUP)

    def watch() -> None:
        poller.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _yield_to_training(nice: int, io_class: str) -> None:
    os.nice(nice)
    if io_class != "none":
        import psutil

        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE if io_class == "idle" else psutil.IOPRIO_CLASS_BE)


if __name__ == "__main__":
    main()
