"""One rank's whole way from a state to files, through the real arena and, where asked, the real writer process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ckptmgr.writers import loading, worker
from ckptmgr.writers.arena import Arena
from ckptmgr.writers.jobs import Answer, WriteJob
from ckptmgr.writers.process import WriterProcess


class OneRank:
    """A format's writer with its arena, saving again and again as a series does."""

    def __init__(self, options: Any, process: WriterProcess | None = None) -> None:
        self.writer = options.writer()
        self.arena = Arena(0)
        self.process = process
        self.layout: Any = None
        self._signature: bytes | None = None

    def save(self, state: Mapping[str, Any], directory: Path) -> Answer:
        """Write *state* into *directory*, which may exist; the answer has the entries of the files with tensors."""
        directory.mkdir(exist_ok=True)
        taken = self.writer.take(state, 0)
        if taken.signature != self._signature:
            (mine,) = self.writer.plan_globally([self.writer.local_plan(taken)])
            self.layout, place = self.writer.lay_out(mine, 0)
            self.writer.accept_layouts([place])
            self._signature = taken.signature
        self.arena.adopt(self.layout)
        self.arena.capture(self.writer.sources(taken))
        small, report = self.writer.small_files(taken, 0)
        for name, data in self.writer.prewrite(directory):
            put(directory / name, data)
        job = WriteJob(str(directory), 0, (*self.layout.files, *small), 0, f"test-{os.getpid()}", 0, 10)
        answer = self._write(job)
        assert answer.cause is None, answer.cause
        assert self.writer.shared_files() == []
        for name, data in self.writer.conclude([report]):
            put(directory / name, data)
        return answer

    def _write(self, job: WriteJob) -> Answer:
        if self.process is not None:
            if self.arena.size:
                assert self.process.share(self.arena, 30) is None
            else:
                assert self.process.start(30) is None
            return self.process.do(job, 30)
        # The very function that the process runs, here.
        return worker._write(job, {0: self.arena._map} if self.arena._map is not None else {})

    def close(self) -> None:
        self.arena.close()


def read(directory: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Load what stands in *directory* into *state*, as the only rank; its files count as committed."""
    files = {path.name: path.stat().st_size for path in directory.iterdir()}
    return loading.read(directory, state, 0, files=files, same_world=True)


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(data)


def same_bits(mine: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit, NaNs and signed zeros included."""
    if (mine.dtype, mine.shape) != (other.dtype, other.shape):
        return False
    return bits(mine) == bits(other)


def bits(tensor: torch.Tensor) -> bytes:
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()) if tensor.numel() else b""


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of any bits that its dtype may have."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.tensor(shape).prod()) if shape else 1
    if dtype is torch.bool:
        return torch.randint(0, 2, (count,), generator=generator, dtype=torch.uint8).bool().view(shape)
    data = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).view(shape)


def dtypes(*, without: tuple[torch.dtype, ...] = ()) -> Iterator[torch.dtype]:
    """Every dtype of this PyTorch that a dense tensor can have."""
    for name in sorted(dir(torch)):
        dtype = getattr(torch, name)
        if isinstance(dtype, torch.dtype) and dtype not in without and str(dtype) == f"torch.{name}":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.complex32 is experimental
                try:
                    torch.empty(1, dtype=dtype).clone()
                except (RuntimeError, TypeError):
                    continue
            yield dtype
