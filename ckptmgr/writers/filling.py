"""
Bytes of files into tensors, by several threads.

What is wanted of a stored tensor goes in blocks, each read where it stands: straight into the tensor's memory
where that has the same bytes in the same order, else through a block of its own, for another dtype, other
strides or another device. So nothing is ever in memory twice but a block for each thread.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import torch

from ckptmgr.writers.archives import Source

#: Bytes that are read at once, and of memory for each thread.
BLOCK_BYTES = 8 << 20
#: More threads read no faster than memory, or the disks of one host, and several ranks share a host.
_MOST_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Piece:
    """
    What is wanted of a tensor that is stored whole, and where it goes.

    Args:
        at: Where its first element stands in its source, in bytes. Elements follow each other row by row.
        dtype: Of the stored elements.
        sizes: The shape that is stored.
        offsets: Where in it the wanted part begins, by dimension.
        target: What is overwritten, of the wanted part's shape; of any dtype, strides and device.
    """

    at: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    target: torch.Tensor

    def blocks(self) -> Iterator[Piece]:
        """The same in parts that each span at most `BLOCK_BYTES` of the source, or one element; none if empty."""
        waiting = [self] if self.target.numel() else []
        while waiting:
            piece = waiting.pop()
            span = piece._span()[1]
            dim = next((dim for dim, length in enumerate(piece.target.shape) if length > 1), None)
            if span <= BLOCK_BYTES or dim is None:
                yield piece
                continue
            length = piece.target.shape[dim]
            step = max(1, length * BLOCK_BYTES // span)
            for start in reversed(range(0, length, step)):
                offsets = (*piece.offsets[:dim], piece.offsets[dim] + start, *piece.offsets[dim + 1 :])
                part = piece.target.narrow(dim, start, min(step, length - start))
                waiting.append(dataclasses.replace(piece, offsets=offsets, target=part))

    def fill(self, source: Source) -> None:
        """
        Read it.

        Raises:
            ValueError: The source has not the bytes.
            OSError: It cannot be read.
        """
        at, span = self._span()
        target = self.target
        # A subclass may keep its values elsewhere, and take them by copy_ alone.
        is_plain = type(target) is torch.Tensor and not (target.is_conj() or target.is_neg())
        as_stored = is_plain and target.dtype is self.dtype and target.is_contiguous()
        if as_stored and target.device.type == "cpu" and span == target.numel() * self.dtype.itemsize:
            source.into(_memory(target), at)
            torch.autograd.graph.increment_version(target)
            return
        block = torch.empty(span // self.dtype.itemsize, dtype=self.dtype, device="cpu")
        source.into(_memory(block), at)
        target.copy_(block.as_strided(target.shape, self._strides()))

    def _span(self) -> tuple[int, int]:
        """Where its bytes begin in the source, and how many there are to the end of the last one."""
        strides = self._strides()
        first = sum(map(math.prod, zip(self.offsets, strides, strict=True)))
        beyond = sum((length - 1) * stride for length, stride in zip(self.target.shape, strides, strict=True))
        return self.at + first * self.dtype.itemsize, (beyond + 1) * self.dtype.itemsize

    def _strides(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[dim + 1 :]) for dim in range(len(self.sizes)))


def in_parallel(tasks: Iterable[Callable[[], None]]) -> None:
    """
    Do *tasks* in a few threads, in about their order.

    Raises:
        Exception: The first that a task raises; those that have not begun are left undone, none is left running.
    """
    mode = torch.is_inference_mode_enabled()

    def do(task: Callable[[], None]) -> None:
        with torch.inference_mode(mode), torch.no_grad():  # a thread does not have its caller's modes
            task()

    threads = max(2, min(_MOST_THREADS, len(os.sched_getaffinity(0))))
    with ThreadPoolExecutor(threads, thread_name_prefix="ckptmgr-load") as pool:
        try:
            futures = [pool.submit(do, task) for task in tasks]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _memory(tensor: torch.Tensor) -> memoryview:
    # A single element may have any stride, and counts as contiguous.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data
