"""
The arena: host memory that a rank's captured tensors lie in, shared with its writer process.

One anonymous memory file (memfd) per series and rank: one descriptor whatever the number of tensors,
no name in /dev/shm to leak or to fill up, and gone with the last process that holds it. It is
kept from save to save, so that only the first one pays for fresh pages, and laid out as the bytes
will stand in the files, so that writing needs no second copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch

from ckptmgr.writers.jobs import FileJob

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14; absent from the mmap module
#: What a tensor's place in the arena is aligned to, in bytes: enough for every dtype and a cache line.
ALIGNMENT = 64
_CGROUP = Path("/sys/fs/cgroup")


@dataclasses.dataclass(frozen=True)
class Copy:
    """One tensor to capture: where it goes, and the dtype and shape it has there (cast on the way)."""

    key: object
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the arena."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one rank's part of a checkpoint lies in the arena, and which file jobs read it from there."""

    size: int
    constants: tuple[tuple[int, bytes], ...]
    copies: tuple[Copy, ...]
    files: tuple[FileJob, ...]


class Arena:
    """
    Memory for one series of one rank.

    Args:
        number: What the writer process calls it.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.generation = 0
        self.size = 0
        self.descriptor = -1
        self._map: mmap.mmap | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._layout: Layout | None = None
        self._views: list[torch.Tensor] = []

    def adopt(self, layout: Layout) -> None:
        """
        Make room for *layout*, touch every page and put its constant bytes in place. Cheap if it is in place.

        Raises:
            MemoryError: There is not enough memory.
        """
        if layout is self._layout:
            return
        self._layout = None
        self._views = []
        if layout.size > self.size:
            self.close()
            # Nothing limits a memfd but the machine's memory, and who takes too much of that is killed, not told.
            available = available_bytes()
            if layout.size > available:
                raise MemoryError(f"no memory for an arena of {layout.size} bytes: {available} are available")
            descriptor = os.memfd_create("ckptmgr", os.MFD_CLOEXEC)
            try:
                os.posix_fallocate(descriptor, 0, layout.size)
                self._map = mmap.mmap(descriptor, layout.size)
            except OSError as error:
                os.close(descriptor)
                raise MemoryError(f"no memory for an arena of {layout.size} bytes: {error.strerror}") from error
            self.descriptor, self.size = descriptor, layout.size
            self.generation += 1
            try:
                self._map.madvise(_POPULATE_WRITE)
            except OSError:
                self._map[:: mmap.PAGESIZE] = bytes(len(range(0, layout.size, mmap.PAGESIZE)))
            self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        for offset, data in layout.constants:
            assert self._map is not None
            self._map[offset : offset + len(data)] = data
        self._views = [
            self._bytes[copy.offset : copy.offset + copy.nbytes].view(copy.dtype).view(copy.shape)
            for copy in layout.copies
        ]
        self._layout = layout

    @torch.no_grad()
    def capture(self, sources: Mapping[object, torch.Tensor]) -> None:
        """
        Copy every tensor of the layout from *sources*, each in one pass, cast to its dtype on the way.

        When this returns the sources may change; nothing is on disk yet.
        """
        assert self._layout is not None
        plain: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for copy, view in zip(self._layout.copies, self._views, strict=True):
            source = sources[copy.key].detach()
            if source.dtype == view.dtype and source.device.type == "cpu":
                plain[0].append(view)
                plain[1].append(source)
            else:
                view.copy_(source)
        if plain[0]:
            torch._foreach_copy_(*plain)

    def close(self) -> None:
        """Give the memory back."""
        self._views = []
        self._layout = None
        self._bytes = torch.empty(0, dtype=torch.uint8)
        if self._map is not None:
            self._map.close()
            self._map = None
            os.close(self.descriptor)
            self.descriptor, self.size = -1, 0


def available_bytes() -> int:
    """Memory that can be had without swapping: of the machine, or of our cgroup (version 2) where that is less."""
    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        available = min(available, limit - used + int(cached["inactive_file"]))
    return available


def aligned(offset: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of *alignment* at or after *offset*."""
    return -(-offset // alignment) * alignment


def runs_of_slice(
    shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], itemsize: int
) -> list[tuple[int, int, int, int]]:
    """
    Where a box of a row-major tensor lies in the tensor's bytes.

    Args:
        shape: Shape of the whole tensor.
        offsets: Where the box begins in each dimension.
        sizes: Extent of the box in each dimension.
        itemsize: Bytes of one element.

    Returns:
        Combs of runs ``(offset, length, count, stride)`` in bytes, in the row-major order of the box.
    """
    if 0 in sizes:
        return []
    strides = [itemsize] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    start = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    # The innermost dimensions that the box fills are contiguous; with the next one out they form a run.
    inner = len(shape)
    length = itemsize
    while inner > 0 and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
        length *= sizes[inner]
    if inner > 0:
        inner -= 1
        length *= sizes[inner]
    if inner == 0:
        return [(start, length, 1, 0)]
    # The dimensions outside repeat the run: at one stride as long as they are filled, then a comb each.
    outer = inner - 1
    stride, count = strides[outer], sizes[outer]
    while outer > 0 and sizes[outer] == shape[outer]:
        outer -= 1
        count *= sizes[outer]
    begins = [start]
    for dim in range(outer - 1, -1, -1):
        begins = [begin + index * strides[dim] for index in range(sizes[dim]) for begin in begins]
    return [(begin, length, count, stride) for begin in begins]
