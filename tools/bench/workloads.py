"""
What is saved: names, dtypes and shapes of a workload's tensors, the memory they lie in, and the training beside it.

The tensors of a workload lie in one anonymous memory file that the workers of all peers map, each at the same
bytes, so that ten peers need the state once. Only one of them works at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import time
from collections.abc import Callable
from typing import Any

#: Bytes of one element, by the dtype's name in torch.
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
#: Name of the memory file, by which the measuring of memory knows it.
STATE_NAME = "bench-state"
_ALIGNMENT = 64
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
#: The weights of one decoder layer, in units of the model's width.
_LAYER = {
    "q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "gate": (4, 1), "up": (4, 1), "norm1": (1,), "norm2": (1,),
}  # fmt: skip
_LAYERS = 8


@dataclasses.dataclass(frozen=True)
class Spec:
    """One tensor of a workload and where it lies in the memory file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.count * ITEM_BYTES[self.dtype]


def specs(workload: str, size: int) -> list[Spec]:
    """
    The tensors of a workload.

    Args:
        workload: ``train`` (a model and its AdamW state, float32), ``export`` (weights, bfloat16) or ``moe``
            (tensors of 4 KiB).
        size: For ``train`` and ``export`` about how many bytes, for ``moe`` how many tensors.
    """
    shapes: list[tuple[str, str, tuple[int, ...]]] = []
    if workload == "moe":
        shapes = [(f"model.expert{n:06d}", "float32", (32, 32)) for n in range(size)]
    else:
        dtype, copies = ("float32", 3) if workload == "train" else ("bfloat16", 1)
        elements = size / copies / ITEM_BYTES[dtype] / _LAYERS / 12
        width = max(16, round(elements**0.5 / 16) * 16)
        for part in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")[:copies]:
            for layer in range(_LAYERS):
                for name, factors in _LAYER.items():
                    shapes.append((f"{part}.{layer}.{name}", dtype, tuple(width * factor for factor in factors)))
    found = []
    end = 0
    for name, dtype, shape in shapes:
        spec = Spec(name, dtype, shape, -(-end // _ALIGNMENT) * _ALIGNMENT)
        end = spec.offset + spec.nbytes
        found.append(spec)
    return found


def extent(layout: list[Spec]) -> int:
    """Bytes of the memory file."""
    return -(-(layout[-1].offset + layout[-1].nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE


def memory_file(layout: list[Spec]) -> int:
    """The memory file of a workload, empty; returns its descriptor."""
    descriptor = os.memfd_create(STATE_NAME, 0)
    os.posix_fallocate(descriptor, 0, extent(layout))
    return descriptor


def tensors(layout: list[Spec], descriptor: int) -> dict[str, Any]:
    """The tensors of a workload, each with a storage of its own in the memory file, every page touched."""
    import torch

    memory = mmap.mmap(descriptor, extent(layout))
    memory.madvise(_POPULATE_WRITE)
    return {
        spec.name: torch.frombuffer(
            memory, dtype=getattr(torch, spec.dtype), count=spec.count, offset=spec.offset
        ).view(spec.shape)
        for spec in layout
    }


def fill(state: dict[str, Any], seed: int) -> None:
    """Give every tensor values that no compression makes smaller than weights are."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for tensor in state.values():
        tensor.normal_(generator=generator)


def change(state: dict[str, Any]) -> None:
    """Change every element of every tensor in place, as an optimiser would: turn its sign."""
    import torch

    torch._foreach_neg_(list(state.values()))


def digests(state: dict[str, Any]) -> dict[str, str]:
    """A digest of the bytes of every tensor."""
    import torch
    import xxhash

    return {
        name: xxhash.xxh3_128_hexdigest(tensor.view(-1).view(torch.uint8).numpy().data)
        for name, tensor in state.items()
    }


class Training:
    """A training loop of some milliseconds per step, on a model of its own, with one thread."""

    def __init__(self) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        self._model = torch.nn.Sequential(
            *(layer for _ in range(3) for layer in (torch.nn.Linear(384, 384), torch.nn.GELU()))
        )
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._data = torch.randn(64, 384, generator=generator)

    def step(self, updating: Callable[[], Any] = contextlib.nullcontext) -> None:
        """One step; *updating* is put around the optimiser's part of it."""
        self._optimizer.zero_grad()
        self._model(self._data).square().mean().backward()
        with updating():
            self._optimizer.step()

    def run(
        self, over: Callable[[float], bool], updating: Callable[[], Any] = contextlib.nullcontext
    ) -> tuple[int, float]:
        """Train until *over*, given the seconds so far, says so; returns the steps and the seconds they took."""
        began = time.perf_counter()
        steps = 0
        while not over(time.perf_counter() - began):
            self.step(updating)
            steps += 1
        return steps, time.perf_counter() - began
