"""Host memory that captured tensors lie in, and where a slice of a tensor lies in the tensor's bytes."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from one_rank import bits, dtypes, random_bits

from ckptmgr.writers import arena as arenas
from ckptmgr.writers.arena import Arena, Copy, Layout, aligned, memory_of, runs_of_slice


@pytest.fixture
def arena():
    arena = Arena(3)
    yield arena
    arena.close()


def layout_of(tensors: dict[str, torch.Tensor], **dtype: torch.dtype) -> Layout:
    copies, end = [], 0
    for name, tensor in tensors.items():
        copy = Copy(name, aligned(end), dtype.get(name, tensor.dtype), tuple(tensor.shape))
        copies.append(copy)
        end = copy.offset + copy.nbytes
    return Layout(end, (), tuple(copies), ())


def held(arena: Arena, copy: Copy) -> bytes:
    """What another process would see of a copy."""
    return os.pread(arena.descriptor, copy.nbytes, copy.offset)


ALL_DTYPES = list(dtypes())


def test_there_are_dtypes_to_try():
    assert {torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.uint64, torch.float8_e5m2} <= set(
        ALL_DTYPES
    )


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_a_capture_holds_the_bits_of_every_dtype_and_shape(arena, dtype):
    tensors = {
        str(shape): random_bits(dtype, shape, seed=len(shape))
        for shape in [(), (1,), (7,), (3, 5), (2, 0, 4), (2, 3, 1, 2)]
    }
    layout = layout_of(tensors)
    arena.adopt(layout)
    arena.capture(tensors)

    for copy in layout.copies:
        assert held(arena, copy) == bits(tensors[copy.key])


def test_a_capture_takes_tensors_that_are_not_contiguous(arena):
    base = torch.arange(4 * 6 * 5, dtype=torch.float32).view(4, 6, 5)
    tensors = {
        "transposed": base.transpose(0, 2),
        "sliced": base[1:3, ::2, 1:],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 3),
        "conjugated": torch.complex(base[0], base[1]).conj(),
        "negated": torch._neg_view(base[2]),
        "channels last": torch.arange(48.0).view(2, 2, 3, 4).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(base[3].t()),
    }
    layout = layout_of(tensors)
    arena.adopt(layout)
    arena.capture(tensors)

    for copy in layout.copies:
        assert held(arena, copy) == bits(tensors[copy.key]), copy.key


def test_a_capture_casts_on_the_way(arena):
    tensors = {"a": torch.tensor([1.1, -2.2, float("inf")]), "b": torch.tensor([3.3], dtype=torch.bfloat16)}
    layout = layout_of(tensors, a=torch.bfloat16, b=torch.float32)
    arena.adopt(layout)
    arena.capture(tensors)

    assert held(arena, layout.copies[0]) == bits(tensors["a"].bfloat16())
    assert held(arena, layout.copies[1]) == bits(tensors["b"].float())


def test_what_was_captured_does_not_change_with_its_source(arena):
    source = torch.ones(8)
    layout = layout_of({"a": source})
    arena.adopt(layout)
    arena.capture({"a": source})
    source.zero_()

    assert held(arena, layout.copies[0]) == bits(torch.ones(8))


@pytest.mark.parametrize("shape", [(), (7,), (10, 6), (1, 100), (1, 2, 50), (3, 0, 5), (0,), (2, 3, 4, 5)], ids=str)
def test_the_pieces_of_a_cast_are_all_of_it_and_none_is_too_large(monkeypatch, shape):
    monkeypatch.setattr(arenas, "CAST_BYTES", 64)
    source = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
    view = torch.full(shape, -1, dtype=torch.float32)
    for target, piece in arenas._pieces(view, source):
        assert target.nbytes <= 64
        assert target.shape == piece.shape
        target.copy_(piece)

    assert torch.equal(view, source.float())


@pytest.mark.parametrize("seed", range(8))
def test_batches_of_small_tensors_arrive_and_change_nothing_between_them(monkeypatch, seed):
    """The buffer that stands on a GPU in earnest is on the CPU here."""
    monkeypatch.setattr(arenas, "SMALL_BYTES", 256)
    monkeypatch.setattr(arenas, "BATCH_BYTES", 2048)
    random = torch.Generator().manual_seed(seed)
    copies, sources, end = [], [], 0
    for index in range(120):
        length = int(torch.randint(0, 3000, (1,), generator=random)) if index % 9 == 0 else index % 40
        dtype = [torch.float32, torch.bfloat16, torch.int64, torch.uint8][index % 4]
        offset = aligned(end, [8, 64][index % 2]) + [0, 72, 320][index % 3]
        copies.append(Copy(index, offset, dtype, (length,)))
        sources.append(torch.randint(0, 100, (length,), generator=random).float())
        end = offset + copies[-1].nbytes
    memory = torch.randint(0, 256, (end,), dtype=torch.uint8, generator=random)
    expected = memory.clone()
    buffer = torch.zeros(2048, dtype=torch.uint8)
    mine = [index for index in range(120) if index % 7]
    found = arenas.batches(copies, mine, buffer)
    for batch in found:
        batch.copy(memory, sources)

    together = [index for batch in found for index in batch.indexes]
    assert len(together) == len(set(together)) > 50
    assert set(together) <= set(mine)
    assert all(len(batch.indexes) > 1 and batch.end - batch.start <= 2048 for batch in found)
    for index in together:
        copy = copies[index]
        assert copy.nbytes <= 256
        expected[copy.offset : copy.offset + copy.nbytes].view(copy.dtype).copy_(sources[index])
    assert torch.equal(memory, expected)
    # Large ones of somebody else are never between two of a batch, where they would be written over.
    for batch in found:
        assert not any(batch.start < c.offset < batch.end and c.nbytes > 256 for c in copies)


def test_a_capture_is_read_by_whoever_calls_what_was_begun(arena):
    """And as the sources are then: nothing was copied before."""
    source = torch.ones(8)
    layout = layout_of({"a": source})
    arena.adopt(layout)
    copy = arena.begin({"a": source})
    source.fill_(2)
    thread = threading.Thread(target=copy)
    thread.start()
    thread.join(20)

    assert held(arena, layout.copies[0]) == bits(torch.full((8,), 2.0))


def test_constants_stand_in_place_and_survive_captures(arena):
    layout = Layout(128, ((0, b"head"), (100, b"tail")), (Copy("a", 64, torch.uint8, (4,)),), ())
    arena.adopt(layout)
    for value in (1, 2):
        arena.capture({"a": torch.full((4,), value, dtype=torch.uint8)})
        assert os.pread(arena.descriptor, 4, 0) == b"head"
        assert os.pread(arena.descriptor, 4, 100) == b"tail"
        assert os.pread(arena.descriptor, 4, 64) == bytes([value] * 4)


def test_an_arena_grows_and_does_not_shrink(arena):
    small, large = {"a": torch.arange(8.0)}, {"a": torch.arange(5000.0)}
    arena.adopt(layout_of(small))
    first = (arena.size, arena.generation)
    arena.adopt(layout_of(large))
    grown = (arena.size, arena.generation)
    again = layout_of(small)
    arena.adopt(again)
    arena.capture(small)

    assert first == (32, 1)
    assert grown == (20000, 2)
    assert (arena.size, arena.generation) == grown
    assert held(arena, again.copies[0]) == bits(small["a"])


def test_growing_keeps_the_pages_that_are_there(arena):
    arena.adopt(layout_of({"a": torch.arange(5000.0)}))
    descriptor = arena.descriptor
    large = {"a": torch.arange(500_000.0)}
    layout = layout_of(large)
    arena.adopt(layout)
    arena.capture(large)

    assert arena.descriptor == descriptor
    assert held(arena, layout.copies[0]) == bits(large["a"])


def taken_bytes(arena: Arena) -> int:
    """How much memory it really has."""
    return os.fstat(arena.descriptor).st_blocks * 512


def test_memory_is_warmed_up_in_the_background_and_used_as_it_is(arena):
    state = {"a": torch.arange(10_000_000.0)}
    layout = layout_of(state)
    arena.warm_up_later(layout.size)
    arena._warming.join(20)
    assert taken_bytes(arena) >= layout.size
    before = (arena.descriptor, arena.generation)
    arena.adopt(layout)
    arena.capture(state)

    assert (arena.descriptor, arena.generation) == before
    assert held(arena, layout.copies[0]) == bits(state["a"])


@pytest.fixture
def slow_warming(monkeypatch):
    """Lets a warm-up in the background touch one part of the memory, and then take its time until it is stopped."""
    parts: list[int] = []
    reached = threading.Event()
    touch = Arena._touch

    def slowly(arena):
        more = touch(arena)
        if threading.current_thread().name == "ckptmgr-warm-up":
            parts.append(arena._touched)
            reached.set()
            assert arena._wanted.wait(20)
            time.sleep(0.2)
        return more

    monkeypatch.setattr(Arena, "_touch", slowly)
    return reached, parts


def test_who_wants_the_memory_stops_the_background_and_goes_on_where_it_was(arena, slow_warming):
    reached, parts = slow_warming
    state = {"a": torch.arange(15_000_000.0)}
    layout = layout_of(state)
    arena.warm_up_later(layout.size)
    assert reached.wait(20)
    assert arenas._TOUCH_BYTES <= taken_bytes(arena) < layout.size
    arena.adopt(layout)
    arena.capture(state)

    assert parts == [arenas._TOUCH_BYTES]
    assert taken_bytes(arena) >= layout.size
    assert held(arena, layout.copies[0]) == bits(state["a"])


def test_a_larger_layout_than_was_expected_gets_its_memory(arena):
    state = {"a": torch.arange(15_000_000.0)}
    layout = layout_of(state)
    arena.warm_up_later(layout.size // 2)
    arena.adopt(layout)
    arena.capture(state)

    assert arena.size == layout.size
    assert held(arena, layout.copies[0]) == bits(state["a"])


def test_what_was_promised_and_not_touched_is_looked_for_again(arena, slow_warming, monkeypatch):
    reached, _ = slow_warming
    state = {"a": torch.arange(15_000_000.0)}
    layout = layout_of(state)
    arena.warm_up_later(layout.size)
    assert reached.wait(20)
    with monkeypatch.context() as machine:
        machine.setattr(arenas, "available_bytes", lambda: layout.size - arenas._TOUCH_BYTES - 1)
        with pytest.raises(MemoryError, match="are available"):
            arena.adopt(layout)
    arena.adopt(layout)
    arena.capture(state)
    monkeypatch.setattr(arenas, "available_bytes", lambda: 0)
    arena.adopt(layout_of({"a": state["a"][:10]}))

    assert held(arena, layout_of(state).copies[0])


def test_closing_ends_a_warm_up_and_leaves_nothing_behind(arena, slow_warming):
    reached, parts = slow_warming
    before = open_memory()
    arena.warm_up_later(100 << 20)
    assert reached.wait(20)
    arena.close()

    assert parts == [arenas._TOUCH_BYTES]
    assert open_memory() == before
    assert not [thread for thread in threading.enumerate() if thread.name == "ckptmgr-warm-up"]


def test_a_warm_up_that_fails_is_logged_and_tried_again_by_who_wants_the_memory(arena, monkeypatch, caplog):
    layout = layout_of({"a": torch.arange(8.0)})
    fallocate = os.posix_fallocate

    def none_left(descriptor, offset, length):
        if length > 1:
            raise OSError(28, "No space left")
        fallocate(descriptor, offset, length)

    with monkeypatch.context() as machine:
        machine.setattr(os, "posix_fallocate", none_left)
        arena.warm_up_later(layout.size)
        arena._warming.join(20)
        assert "not warmed up: No space left" in caplog.text
        with pytest.raises(MemoryError, match="No space left"):
            arena.adopt(layout)
    arena.adopt(layout)
    assert taken_bytes(arena) >= layout.size


def test_pages_are_touched_by_hand_where_the_kernel_cannot(arena, monkeypatch):
    monkeypatch.setattr(arenas, "_POPULATE_WRITE", 12345)
    state = {"a": torch.arange(100_000.0)}
    layout = layout_of(state)
    arena.adopt(layout)
    arena.capture(state)
    assert held(arena, layout.copies[0]) == bits(state["a"])


def test_a_layout_in_place_is_adopted_for_nothing(arena):
    layout = layout_of({"a": torch.arange(8.0)})
    arena.adopt(layout)
    arena.capture({"a": torch.arange(8.0)})
    views = arena._views
    arena.adopt(layout)

    assert arena._views is views


def test_an_arena_without_a_byte_has_no_memory(arena):
    layout = layout_of({"a": torch.empty(0, 3)})
    arena.adopt(layout)
    arena.capture({"a": torch.empty(0, 3)})

    assert (arena.size, arena.descriptor) == (0, -1)


def open_memory() -> list[str]:
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(path.readlink()))
    return [link for link in links if "ckptmgr" in link]


def test_closing_gives_memory_and_descriptors_back():
    before = open_memory()
    arena = Arena(0)
    for size in (1000, 100_000, 1_000_000):
        tensors = {"a": torch.zeros(size)}
        arena.adopt(layout_of(tensors))
        arena.capture(tensors)
        # Ours and the one that Python's mmap keeps, however many tensors there are and were.
        assert len(open_memory()) == len(before) + 2
        assert "/memfd:ckptmgr" in Path("/proc/self/maps").read_text()
    arena.close()
    arena.close()

    assert open_memory() == before
    assert "/memfd:ckptmgr" not in Path("/proc/self/maps").read_text()


def test_no_memory_is_an_error_that_leaves_nothing_behind():
    before = open_memory()
    arena = Arena(0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        with pytest.raises(MemoryError, match="no memory for an arena of 2097152 bytes"):
            arena.adopt(Layout(2 << 20, (), (), ()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)

    assert (arena.size, arena.descriptor) == (0, -1)
    assert open_memory() == before
    arena.adopt(layout_of({"a": torch.arange(8.0)}))
    assert arena.size == 32
    arena.close()


def test_an_arena_larger_than_the_machines_memory_is_refused_before_it_is_touched():
    """Taking the pages one by one would wake the kernel's out-of-memory killer, and end the training."""
    arena = Arena(0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # A net for a product that does not look first.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        with pytest.raises(MemoryError, match="available"):
            arena.adopt(Layout(1 << 50, (), (), ()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
        arena.close()


def boxes(shape: tuple[int, ...]):
    per_dim = [[(low, high - low) for low in range(size + 1) for high in range(low, size + 1)] for size in shape]
    for choice in itertools.product(*per_dim):
        yield tuple(low for low, _ in choice), tuple(size for _, size in choice)


SHAPES = [
    (), (1,), (5,), (0,), (1, 1), (3, 4), (4, 1), (1, 4), (2, 0), (2, 3, 4), (1, 3, 1), (3, 1, 2), (2, 2, 1, 3),
    (1, 2, 3, 2),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_runs_of_every_box_are_where_torch_has_its_elements(shape):
    whole = torch.arange(int(torch.tensor(shape).prod()) if shape else 1, dtype=torch.int16).view(shape)
    data = bits(whole)
    for offsets, sizes in boxes(shape):
        part = whole[tuple(slice(low, low + size) for low, size in zip(offsets, sizes, strict=True))]
        runs = runs_of_slice(shape, offsets, sizes, whole.dtype.itemsize)
        found = b"".join(
            data[offset + index * stride : offset + index * stride + length]
            for offset, length, count, stride in runs
            for index in range(count)
        )

        assert found == bits(part), (offsets, sizes)
        assert all(length > 0 and count > 0 for _, length, count, _ in runs)


def test_a_slice_of_a_row_major_tensor_is_few_runs():
    """One comb for a shard on an inner dimension, however long the outer one is; one run where it is contiguous."""
    assert runs_of_slice((1000, 8, 4), (0, 2, 0), (1000, 2, 4), 4) == [(32, 32, 1000, 128)]
    assert runs_of_slice((1000, 8, 4), (10, 0, 0), (5, 8, 4), 4) == [(1280, 640, 1, 0)]


def test_a_background_that_cannot_begin_leaves_the_arena_as_usable_as_before(monkeypatch):
    arena = Arena(0)

    def refuse(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            arena.warm_up_later(1 << 20)
    arena.warm_up_later(2 << 20)
    arena.close()


def test_two_tensors_count_as_one_memory_only_where_that_is_certain():
    tensor = torch.zeros(2, 3)
    assert memory_of(tensor) == memory_of(torch.nn.Parameter(tensor.detach()))
    for other in (tensor.t(), tensor[:1], tensor.view(torch.int32), torch.zeros(2, 3)):
        assert memory_of(tensor) != memory_of(other)
    assert memory_of(torch.zeros(0)) != memory_of(torch.zeros(0))
    elsewhere = torch.zeros(2, device="meta")
    assert memory_of(elsewhere) != memory_of(elsewhere)
    kept = tensor.as_subclass(type("Kept", (torch.Tensor,), {}))
    assert memory_of(kept) != memory_of(kept)
