"""
What ``torch.save`` writes around the bytes of a tensor: the same for every tensor of one dtype and shape.

Layout: torch/serialization.py, ``_save``.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from typing import Any

import torch

from ckptmgr.writers.archives import Source


@dataclasses.dataclass(frozen=True)
class Template:
    """A ``torch.save`` archive of one tensor, without the tensor's bytes. Offsets and lengths in bytes."""

    constants: tuple[tuple[int, bytes], ...]
    data_offset: int
    length: int

    def is_around(self, source: Source) -> bool:
        """Whether *source* is such an archive, of a tensor of the same dtype and shape."""
        return source.length == self.length and all(
            source.at(offset, len(data)) == data for offset, data in self.constants
        )


class _Gap(io.RawIOBase):
    """Takes an archive's bytes as they are written and remembers where the tensor's were left out."""

    def __init__(self) -> None:
        self.position = 0
        self.parts: list[tuple[int, bytes]] = []
        self.gap = (0, 0)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.parts.append((self.position, bytes(data)))
        self.position += len(self.parts[-1][1])
        return len(self.parts[-1][1])

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == 1, "archives are written front to back"
        self.gap = (self.position, offset)
        self.position += offset
        return self.position


@functools.lru_cache(maxsize=4096)
def template(dtype: torch.dtype, shape: tuple[int, ...]) -> Template:
    sink = _Gap()
    # Its memory is promised and never touched: skip_data leaves the bytes out. Of the CPU whatever the caller's
    # default device is, and not by torch.empty, which fills it where algorithms are to be deterministic.
    strides = torch.empty(shape, dtype=dtype, device="meta").stride()
    storage = torch.UntypedStorage(math.prod(shape) * dtype.itemsize, device="cpu")  # type: ignore[no-untyped-call]
    tensor = torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, strides)
    with torch.serialization.skip_data():
        torch.save(tensor, sink)  # type: ignore[arg-type]
    merged: list[tuple[int, bytes]] = []
    for offset, data in sink.parts:
        if merged and merged[-1][0] + len(merged[-1][1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + data)
        else:
            merged.append((offset, data))
    return Template(tuple(merged), sink.gap[0], sink.position)


def data_offset(source: Source, dtype: torch.dtype, shape: tuple[int, ...]) -> int | None:
    """Where the bytes of a tensor stand in *source*; None if that is not the archive that would be written here."""
    if math.prod(shape) * dtype.itemsize > source.length or max(shape, default=0) > source.length:
        return None
    archive = template(dtype, shape)
    return archive.data_offset if archive.is_around(source) else None
