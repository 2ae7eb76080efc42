"""
The arena: host memory that a rank's captured tensors lie in, shared with its writer process.

One anonymous memory file (memfd) per series and rank: one descriptor whatever the number of tensors,
no name in /dev/shm to leak or to fill up, and gone with the last process that holds it. It is
kept from save to save, so that only the first one pays for fresh pages, and laid out as the bytes
will stand in the files, so that writing needs no second copy. For tensors on a GPU it is page-locked,
so that the GPU copies by itself, on a stream of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import logging
import mmap
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from ckptmgr.writers.jobs import FileJob

log = logging.getLogger("ckptmgr")

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14; absent from the mmap module
#: Bytes whose pages are touched at a time: so long may a save, or a call that maps memory, have to wait for a warm-up.
_TOUCH_BYTES = 16 << 20
#: By how much the training goes before a warm-up in the background.
_WARMING_NICE = 10
#: What a tensor's place in the arena is aligned to, in bytes: enough for every dtype and a cache line.
ALIGNMENT = 64
#: Bytes of a tensor that a GPU casts at a time: all that a cast takes of its memory, whatever the state's size.
CAST_BYTES = 32 << 20
#: Tensors of at most so many bytes leave a GPU together: to begin a copy of each would take longer than to make it.
SMALL_BYTES = 64 << 10
#: Bytes of a GPU's memory in which they are put together, and bytes of the arena that are copied in one.
BATCH_BYTES = 16 << 20
_CGROUP = Path("/sys/fs/cgroup")
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every GPU of this process

_Pairs = list[tuple[torch.Tensor, torch.Tensor]]


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


@dataclasses.dataclass(frozen=True)
class Batch:
    """
    Small tensors that lie near each other in the arena, from *start* to *end*, and are copied there in one.

    Args:
        start: Where the first of them lies in the arena.
        end: Where the last one ends.
        indexes: Which copies of the layout they are.
        image: As many bytes of a buffer on the GPU.
        views: Where each of them lies in there.
        has_gaps: Whether there are bytes in between that are not theirs, and must stay.
    """

    start: int
    end: int
    indexes: tuple[int, ...]
    image: torch.Tensor
    views: list[torch.Tensor]
    has_gaps: bool

    def copy(self, arena: torch.Tensor, found: Sequence[torch.Tensor]) -> None:
        """Queue what copies them from *found*, all sources by index, to the *arena*'s bytes."""
        target = arena[self.start : self.end]
        if self.has_gaps:
            self.image.copy_(target, non_blocking=True)
        torch._foreach_copy_(self.views, [found[index] for index in self.indexes])
        target.copy_(self.image, non_blocking=True)


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
        self._is_small: list[bool] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._batches: tuple[torch.device, list[int], list[Batch]] | None = None
        self._tried_to_pin = self._pinned = False
        self._touched = 0
        self._warming: threading.Thread | None = None
        self._wanted = threading.Event()

    def warm_up_later(self, size: int) -> None:
        """
        Make room for *size* bytes now and touch their pages in the background, until the memory is wanted.

        What goes wrong there is logged; whoever wants the memory meets it again.

        Raises:
            MemoryError: There is not enough memory.
        """
        self._end_warming()
        self._make_room(size)
        self._wanted.clear()
        warming = threading.Thread(target=self._warm, name="ckptmgr-warm-up", daemon=True)
        warming.start()
        self._warming = warming

    def adopt(self, layout: Layout) -> None:
        """
        Make room for *layout*, touch every page and put its constant bytes in place. Cheap if it is in place.

        Raises:
            MemoryError: There is not enough memory.
        """
        if layout is self._layout:
            return
        self._end_warming()
        self._layout = self._batches = None
        self._views = []
        self._make_room(layout.size)
        try:
            while self._touch():
                pass
        except OSError as error:
            self.close()
            raise MemoryError(f"no memory for an arena of {layout.size} bytes: {error.strerror}") from error
        for offset, data in layout.constants:
            assert self._map is not None
            self._map[offset : offset + len(data)] = data
        self._views = [
            self._bytes[copy.offset : copy.offset + copy.nbytes].view(copy.dtype).view(copy.shape)
            for copy in layout.copies
        ]
        self._is_small = [copy.nbytes <= SMALL_BYTES for copy in layout.copies]
        self._layout = layout

    def capture(self, sources: Mapping[object, torch.Tensor]) -> None:
        """
        Copy every tensor of the layout from *sources*, each in one pass, cast to its dtype on the way.

        When this returns the sources may change; nothing is on disk yet.
        """
        self.begin(sources)()

    def begin(self, sources: Mapping[object, torch.Tensor]) -> Callable[[], None]:
        """
        Get ready for a capture without copying a byte.

        A GPU's tensors are captured as they will be once all that was queued before this call has run.

        Returns:
            What does the copying, on any thread. Until it returns the sources must not change, and nobody
            else may use the arena.
        """
        assert self._layout is not None
        found = [sources[copy.key] for copy in self._layout.copies]
        on: defaultdict[torch.device, list[int]] = defaultdict(list)
        for index, source in enumerate(found):
            on[source.device].append(index)
        queued = {device: torch.cuda.current_stream(device).record_event() for device in on if device.type == "cuda"}
        if queued:
            self.pin()
        views, copies, is_small = self._views, self._layout.copies, self._is_small

        @torch.no_grad()
        def copy_all() -> None:
            here = [index for device in on if device not in queued for index in on[device]]
            # The small ones first: they may stand between others that come from the GPU together.
            _copy_here(views, copies, found, [index for index in here if is_small[index]])
            try:
                events = [
                    self._copy_from_gpu(device, event, on[device], found, is_alone=len(queued) == 1)
                    for device, event in queued.items()
                ]
                _copy_here(views, copies, found, [index for index in here if not is_small[index]])
                for event in events:
                    event.synchronize()
            except BaseException:
                # What was queued still goes to memory that the caller takes for its own again.
                self._wait_for_gpus()
                raise
            finally:
                found.clear()

        return copy_all

    def pin(self) -> None:
        """Lock the memory's pages, so that GPUs copy to it at full speed while the CPU goes on. Cheap if it is done."""
        if self._tried_to_pin or self._map is None:
            return
        self._tried_to_pin = True
        code = int(_cudart().cudaHostRegister(self._bytes.data_ptr(), self.size, _PORTABLE))
        self._pinned = code == 0
        if not self._pinned:
            log.warning(
                "cannot page-lock %d bytes (CUDA error %d): copies from the GPU will be slower", self.size, code
            )
            # CUDA keeps the error for whoever launches the next kernel, which must not be the training.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device="cuda")

    def close(self) -> None:
        """Give the memory back."""
        self._end_warming()
        self._let_go()
        if self._map is not None:
            self._map.close()
            self._map = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor, self.size, self._touched = -1, 0, 0

    def _make_room(self, size: int) -> None:
        """Map *size* bytes, those that were touched among them; the others' pages are only promised."""
        if size <= self._touched:
            return
        # Nothing limits a memfd but the machine's memory, and who takes too much of that is killed, not told. What
        # was promised some time ago may be gone by now.
        available = available_bytes()
        if size - self._touched > available:
            self.close()
            raise MemoryError(f"no memory for an arena of {size} bytes: {available} are available")
        if size <= self.size:
            return
        self._let_go()
        try:
            if self._map is None:
                self.descriptor = os.memfd_create("ckptmgr", os.MFD_CLOEXEC)
                os.posix_fallocate(self.descriptor, size - 1, 1)  # its last byte gives it the size
                self._map = mmap.mmap(self.descriptor, size)
            else:
                self._map.resize(size)
        except OSError as error:
            self.close()
            raise MemoryError(f"no memory for an arena of {size} bytes: {error.strerror}") from error
        self.size = size
        self.generation += 1
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def _touch(self) -> bool:
        """Take the memory for some more pages, so that a copy need not; returns False if there are none left."""
        begin, end = self._touched, min(self._touched + _TOUCH_BYTES, self.size)
        if begin == end:
            return False
        os.posix_fallocate(self.descriptor, begin, end - begin)
        # Not by the mmap module, which keeps Python's global lock meanwhile.
        address = ctypes.c_void_p(self._bytes.data_ptr() + begin)
        if ctypes.CDLL(None).madvise(address, ctypes.c_size_t(end - begin), _POPULATE_WRITE) != 0:
            self._bytes[begin : end : mmap.PAGESIZE] = 0
        self._touched = end
        return True

    def _warm(self) -> None:
        os.nice(_WARMING_NICE)  # of this thread alone, on Linux
        try:
            while not self._wanted.is_set() and self._touch():
                pass
        except OSError as error:
            log.warning("an arena of %d bytes is not warmed up: %s", self.size, error.strerror)

    def _end_warming(self) -> None:
        """Let the background stop where it is, within moments."""
        if self._warming is not None:
            self._wanted.set()
            self._warming.join()
            self._warming = None

    def _let_go(self) -> None:
        """Forget all that points into the memory."""
        if self._pinned:
            self._wait_for_gpus()
            _cudart().cudaHostUnregister(self._bytes.data_ptr())
        self._tried_to_pin = self._pinned = False
        self._views = []
        self._layout = self._batches = None
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def _copy_from_gpu(
        self,
        device: torch.device,
        queued: torch.cuda.Event,
        indexes: list[int],
        found: list[torch.Tensor],
        *,
        is_alone: bool,
    ) -> torch.cuda.Event:
        """
        Queue copies on a stream of our own, after *queued*; returns the event that says that they are done.

        Unless this GPU *is_alone*, another one may write between its tensors, and none of them go together.
        """
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        with torch.cuda.stream(stream):
            stream.wait_event(queued)
            mine = self._batches_of(device, indexes) if is_alone else []
            batched = {index for batch in mine for index in batch.indexes}
            as_they_are: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
            others: _Pairs = []
            for index in indexes:
                if index in batched:
                    continue
                view, source = self._views[index], found[index]
                if _is_same_bytes(view, source):
                    as_they_are[0].append(view)
                    as_they_are[1].append(source)
                else:
                    others.append((view, source))
            if as_they_are[0]:
                torch._foreach_copy_(*as_they_are, non_blocking=True)
            for view, source in others:
                for target, piece in _pieces(view, source):
                    # Allocated on this stream and given back to it, so that the next piece reuses it in turn.
                    cast = torch.empty(piece.shape, dtype=target.dtype, device=device)
                    target.copy_(cast.copy_(piece), non_blocking=True)
            for batch in mine:
                batch.copy(self._bytes, found)
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(stream)
        return event

    def _batches_of(self, device: torch.device, indexes: list[int]) -> list[Batch]:
        """The small ones of *indexes* in batches; kept, with their buffer, until others come."""
        assert self._layout is not None
        if self._batches is None or self._batches[:2] != (device, indexes):
            self._batches = (device, indexes, [])
            if sum(0 < self._layout.copies[index].nbytes <= SMALL_BYTES for index in indexes) > 1:
                buffer = torch.empty(BATCH_BYTES, dtype=torch.uint8, device=device)
                self._batches = (device, indexes, batches(self._layout.copies, indexes, buffer))
        return self._batches[2]

    def _wait_for_gpus(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()


def memory_of(tensor: torch.Tensor) -> Any:
    """
    What is equal for two living tensors if they are the same bytes in memory.

    Nothing is equal to that of an empty tensor, nor to that of a subclass, which may keep its values elsewhere.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not tensor.numel() or not tensor.data_ptr():
        return object()
    is_view = (tensor.is_conj(), tensor.is_neg())
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), is_view


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _copy_here(
    views: Sequence[torch.Tensor], copies: Sequence[Copy], found: Sequence[torch.Tensor], indexes: Sequence[int]
) -> None:
    """Copy those at *indexes*, which no GPU copies by itself; all that need nothing but a copy go in one call."""
    plain = [index for index in indexes if found[index].is_cpu and found[index].dtype == copies[index].dtype]
    if plain:
        torch._foreach_copy_([views[index] for index in plain], [found[index] for index in plain])
    if len(plain) < len(indexes):
        for index in set(indexes).difference(plain):
            views[index].copy_(found[index])


def batches(copies: Sequence[Copy], indexes: Sequence[int], buffer: torch.Tensor) -> list[Batch]:
    """
    Put small copies together that are near each other; those that are alone or large are left out.

    Args:
        copies: All of the layout.
        indexes: Which of them come from this GPU.
        buffer: `BATCH_BYTES` of its memory, for one batch after the other.
    """
    found: list[Batch] = []
    members: list[int] = []

    def finish() -> None:
        if len(members) > 1:
            start = copies[members[0]].offset
            end = copies[members[-1]].offset + copies[members[-1]].nbytes
            first = start % ALIGNMENT
            places = [(copies[index], first + copies[index].offset - start) for index in members]
            views = [buffer[at : at + copy.nbytes].view(copy.dtype).view(copy.shape) for copy, at in places]
            has_gaps = sum(copy.nbytes for copy, _ in places) < end - start
            found.append(Batch(start, end, tuple(members), buffer[first : first + end - start], views, has_gaps))
        members.clear()

    for index in sorted(indexes, key=lambda index: copies[index].offset):
        copy = copies[index]
        if not 0 < copy.nbytes <= SMALL_BYTES:
            continue
        if members:
            last = copies[members[-1]]
            begin = copies[members[0]].offset // ALIGNMENT * ALIGNMENT
            # What lies between two of them is small as well, or somebody else may be writing there.
            if copy.offset - last.offset - last.nbytes > SMALL_BYTES or copy.offset + copy.nbytes - begin > BATCH_BYTES:
                finish()
        members.append(index)
    finish()
    return found


def _is_same_bytes(view: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether *source* lies in memory exactly as it is to lie in *view*."""
    return source.dtype == view.dtype and source.is_contiguous() and not source.is_conj() and not source.is_neg()


def _pieces(view: torch.Tensor, source: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both in slices of at most `CAST_BYTES`, or of one element."""
    if view.nbytes <= CAST_BYTES or not view.dim():
        yield view, source
    elif (rows := CAST_BYTES * len(view) // view.nbytes) > 0:
        for start in range(0, len(view), rows):
            yield view[start : start + rows], source[start : start + rows]
    else:
        for inner_view, inner_source in zip(view, source, strict=True):
            yield from _pieces(inner_view, inner_source)


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
