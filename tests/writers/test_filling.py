"""Bytes of files come into tensors block by block, wherever they go and whatever is wanted of them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.writers import filling
from ckptmgr.writers.archives import Source
from ckptmgr.writers.filling import Piece, in_parallel

BEFORE = 24
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int64]


def stored(sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = torch.Size(sizes).numel()
    return (torch.arange(count) % 199 - 99).to(torch.float32).to(dtype).view(sizes)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return torch.cat([tensor.flatten()]).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and as_bytes(one.contiguous()) == as_bytes(other.contiguous())


@st.composite
def wanted(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    sizes = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    parts = []
    for size in sizes:
        start = draw(st.integers(0, size))
        parts.append(slice(start, draw(st.integers(start, size))))
    return sizes, tuple(parts)


@given(wanted=wanted(), dtype=st.sampled_from(DTYPES), block=st.integers(1, 300), how=st.sampled_from("=tcd"))
def test_any_part_of_a_tensor_comes_into_any_target(wanted, dtype, block, how) -> None:
    sizes, part = wanted
    there = stored(sizes, dtype)
    expected = there[part]
    source = Source(b"x" * BEFORE + as_bytes(there) + b"y" * 9)
    around = torch.zeros((*expected.shape, 2), dtype=dtype)
    target = {
        "=": lambda: torch.zeros(expected.shape, dtype=dtype),
        "t": lambda: torch.zeros(expected.shape[::-1], dtype=dtype).permute([*reversed(range(expected.dim()))]),
        "c": lambda: torch.zeros(expected.shape, dtype=torch.complex128),
        "d": lambda: around[..., 0],
    }[how]()
    piece = Piece(BEFORE, dtype, sizes, tuple(one.start for one in part), target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filling, "BLOCK_BYTES", block)
        blocks = list(piece.blocks())
        assert all(one._span()[1] <= block or one.target.numel() == 1 for one in blocks)
        assert sum(one.target.numel() for one in blocks) == expected.numel()
        for one in blocks:
            one.fill(source)
    assert same(target, expected.to(target.dtype))
    assert not around[..., 1].to(torch.complex64).any(), "what stands beside it is left alone"


def test_a_tensor_of_the_same_bytes_is_read_without_a_block_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    there = stored((64, 32), torch.float32)
    target = torch.zeros(32, 32)
    places: list[int] = []
    real = Source.into
    monkeypatch.setattr(
        Source, "into", lambda self, buffer, at: (places.append(len(buffer)), real(self, buffer, at))[1]
    )
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *_: pytest.fail("it was copied"))

    Piece(0, torch.float32, (64, 32), (16, 0), target).fill(Source(as_bytes(there)))

    assert places == [32 * 32 * 4]
    assert same(target, there[16:48])


def test_reading_into_a_tensor_counts_as_a_change_of_it() -> None:
    target = torch.zeros(4)
    before = target._version
    Piece(0, torch.float32, (4,), (0,), target).fill(Source(bytes(16)))
    assert target._version > before


def test_conjugated_and_negated_targets_have_the_values_not_the_bytes() -> None:
    there = torch.tensor([1 + 2j, 3 - 4j])
    conjugated = torch.zeros(2, dtype=torch.complex64).conj()
    negated = torch.zeros(2, dtype=torch.complex64).conj().imag
    Piece(0, torch.complex64, (2,), (0,), conjugated).fill(Source(as_bytes(there)))
    Piece(0, torch.float32, (2,), (0,), negated).fill(Source(as_bytes(torch.tensor([5.0, -6.0]))))
    assert torch.equal(conjugated.resolve_conj(), there)
    assert torch.equal(negated.resolve_neg(), torch.tensor([5.0, -6.0]))


def test_a_file_that_ends_too_early_is_an_error_and_one_that_is_read_in_parts_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = stored((1000,), torch.int64)
    (tmp_path / "file").write_bytes(as_bytes(there))
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    target = torch.zeros(1000, dtype=torch.int64)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:77]], at))
    piece = Piece(0, torch.int64, (1000,), (0,), target)
    piece.fill(Source(descriptor))
    assert same(target, there)
    source = Source(descriptor)
    os.truncate(tmp_path / "file", 7992)
    with pytest.raises(ValueError, match="shorter"):
        piece.fill(source)
    os.close(descriptor)


def test_of_several_tasks_the_first_error_is_raised_and_the_rest_left_undone() -> None:
    running, done = threading.Semaphore(0), []

    def tasks() -> Iterator[object]:
        yield running.release
        yield lambda: int("no number")
        yield from [lambda: time.sleep(0.1)] * 8  # so that some are waiting when the error is seen
        for number in range(10_000):
            yield lambda number=number: done.append(number)

    with pytest.raises(ValueError, match="no number"):
        in_parallel(tasks())  # type: ignore[arg-type]
    assert running.acquire(timeout=5)
    assert len(done) < 10_000
    assert not [one for one in threading.enumerate() if one.name.startswith("ckptmgr-load")]


def test_an_error_while_tasks_are_made_ends_those_that_were_begun() -> None:
    def tasks() -> Iterator[object]:
        yield from [lambda: time.sleep(0.05)] * 8
        yield lambda: done.append(1)
        raise OSError("no more of them")

    done: list[int] = []

    with pytest.raises(OSError, match="no more"):
        in_parallel(tasks())  # type: ignore[arg-type]
    assert not done
    assert not [one for one in threading.enumerate() if one.name.startswith("ckptmgr-load")]
