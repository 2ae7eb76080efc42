"""
What a writer process is asked to do, and what it answers. Plain data, pickled over a private pipe.

A job writes files of one staging directory. The bytes of a file come from segments of a shared
memory arena (tensors, already in their final layout) or stand in the job itself (small objects).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ckptmgr.manifest import FileEntry


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """
    Bytes that lie together in the arena and go to *count* runs of *length* bytes in the file.

    Run *i* lands at ``file_offset + i * stride``. A slice of a row-major tensor that is sharded on
    an inner dimension is such a comb of runs; anything contiguous is one run. *arena* is another one than the
    job's where the bytes were captured for another series.
    """

    file_offset: int
    arena_offset: int
    length: int
    count: int = 1
    stride: int = 0
    arena: int | None = None

    def runs(self) -> Iterator[tuple[int, int]]:
        """(offset in the file, offset in the arena) of each run."""
        for index in range(self.count):
            yield self.file_offset + index * self.stride, self.arena_offset + index * self.length


@dataclasses.dataclass(frozen=True, slots=True)
class FileJob:
    """
    One file to write.

    With ``own`` the writer creates the file, its segments cover it in file order, and its digest is
    taken on the way. Otherwise the file exists, other ranks write other parts of it, and only this
    rank's parts are written and synced. ``data`` replaces segments for small files.
    """

    path: str
    size: int
    own: bool
    segments: tuple[Segment, ...] = ()
    data: bytes | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class SharedFile:
    """A file that rank 0 creates, *size* bytes long and beginning with *header*, for several ranks to fill in."""

    path: str
    size: int
    header: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class WriteJob:
    """
    Write, digest and sync these files below *directory*, holding one of the host's write slots.

    Slots of one run on one host are named *slots* and a number below *write_slots*; 0 means no limit.
    Files are created with *file_mode*; with None as the umask says. 0 of *max_bytes_per_second* means no limit.
    """

    directory: str
    arena: int
    files: tuple[FileJob, ...]
    rank: int
    slots: str
    write_slots: int
    slot_timeout_s: float
    file_mode: int | None = None
    max_bytes_per_second: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class DigestJob:
    """Read back files that several ranks wrote and take their digests."""

    directory: str
    paths: tuple[str, ...]
    rank: int


@dataclasses.dataclass(frozen=True, slots=True)
class ArenaJob:
    """Map the arena whose descriptor follows; *size* is in bytes. It replaces the one of the same number."""

    arena: int
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What came of a job: the files it sealed, or the cause of its failure."""

    files: tuple[FileEntry, ...] = ()
    cause: str | None = None
    write_s: float = 0.0
    waited_s: float = 0.0
