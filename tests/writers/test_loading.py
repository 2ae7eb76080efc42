"""Tensors of a DCP checkpoint are read straight to where they belong, and what others wrote in their place is too."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from one_rank import OneRank, random_bits, read, same_bits
from torch.distributed.checkpoint import FileSystemReader

from ckptmgr.errors import CorruptCheckpoint
from ckptmgr.writers import archives, loading, templates
from ckptmgr.writers.dcp import DCP
from ckptmgr.writers.filling import BLOCK_BYTES
from ckptmgr.writers.state import PerRank

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
#: Of float32: more than is read at once, more than counts as small, small, and none.
SIZES = {"large": (3 << 20,), "wide": (700, 700), "small": (10, 10), "one": (), "none": (0, 4)}


@pytest.fixture
def rank() -> Iterator[OneRank]:
    rank = OneRank(DCP())
    yield rank
    rank.close()


def tensors(fill: Any = random_bits) -> dict[str, Any]:
    return {name: fill(torch.float32, shape) for name, shape in SIZES.items()}


def zeros(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.fixture
def unpickled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read by the reader that can read any archive."""
    found: list[str] = []
    real = archives.load

    def load(source: archives.Source, what: str) -> Any:
        found.append(what.rpartition(" ")[2])
        return real(source, what)

    monkeypatch.setattr(archives, "load", load)
    return found


def test_what_was_written_here_is_read_without_its_pickles(rank, tmp_path, unpickled):
    state = tensors()
    rank.save({"t": state, "step": 3}, tmp_path)
    target = tensors(zeros)
    plain = read(tmp_path, {"t": target, "step": 0})

    assert all(same_bits(target[name], tensor) for name, tensor in state.items())
    assert plain["step"] == 3
    assert unpickled == ["step"]


def test_what_pytorch_wrote_is_read_too(tmp_path, unpickled):
    state = tensors()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock.save({"t": state}, checkpoint_id=str(tmp_path), no_dist=True)
    metadata = FileSystemReader(tmp_path).read_metadata()
    metadata.storage_meta = None  # it has a path in it, which no index of ours has
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    target = tensors(zeros)
    read(tmp_path, {"t": target})

    assert all(same_bits(target[name], tensor) for name, tensor in state.items())
    assert sorted(unpickled) == sorted(f"t.{name}" for name in SIZES if name != "none")


@pytest.mark.parametrize("name", ["large", "wide", "small"])
def test_an_archive_that_is_not_quite_ours_is_not_taken_for_it(rank, tmp_path, unpickled, name):
    state = tensors()
    rank.save({"t": state}, tmp_path)
    metadata = FileSystemReader(tmp_path).read_metadata()
    ((index, place),) = ((i, p) for i, p in metadata.storage_data.items() if i.fqn == f"t.{name}")
    with (tmp_path / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        data = file.read(place.length)
        # The name of the dtype in the pickle: of the same length, and another type.
        at = data.index(b"FloatStorage")
        file.seek(place.offset + at)
        file.write(b"Floot")
    with pytest.raises(CorruptCheckpoint, match=index.fqn):
        read(tmp_path, {"t": tensors(zeros)})
    assert unpickled[-1] == index.fqn


def test_a_target_of_another_dtype_or_layout_in_memory_takes_the_values(rank, tmp_path):
    whole = torch.arange(3 << 20, dtype=torch.float32).view(1024, 3072)
    rank.save({"a": whole, "b": whole[:4, :4].contiguous()}, tmp_path)
    flipped = torch.zeros(3072, 1024).t()
    doubled = torch.zeros(4, 4, dtype=torch.float64)
    read(tmp_path, {"a": flipped, "b": doubled})

    assert torch.equal(flipped, whole)
    assert torch.equal(doubled, whole[:4, :4].double())


def test_small_tensors_side_by_side_are_read_together_and_those_far_apart_alone(rank, tmp_path, monkeypatch):
    state = {f"t{number:04}": random_bits(torch.float32, (1024,)) for number in range(2500)}
    state["t0500"] = random_bits(torch.float32, (1 << 20,))
    rank.save(state, tmp_path)
    counts: list[int] = []
    real = os.preadv

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        counts.append(sum(map(len, buffers)))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    read(tmp_path, target)
    assert all(same_bits(target[name], tensor) for name, tensor in state.items())
    assert len(counts) < 20
    assert max(counts) <= BLOCK_BYTES

    counts.clear()
    few = {name: torch.zeros_like(state[name]) for name in ("t0000", "t0001", "t0400")}
    read(tmp_path, few)
    assert all(same_bits(tensor, state[name]) for name, tensor in few.items())
    assert sum(counts) < 6 * 4096


def test_files_of_many_ranks_are_read_with_few_of_them_open(rank, tmp_path, monkeypatch):
    """Each tensor in a file of its own, as if as many ranks had saved."""
    state = {f"t{number}": random_bits(torch.float32, (100,)) for number in range(7)}
    rank.save(state, tmp_path)
    metadata = FileSystemReader(tmp_path).read_metadata()
    for number, place in enumerate(metadata.storage_data.values()):
        data = (tmp_path / "__0_0.distcp").read_bytes()[place.offset : place.offset + place.length]
        (tmp_path / f"__{number + 1}_0.distcp").write_bytes(data)
        place.relative_path, place.offset = f"__{number + 1}_0.distcp", 0
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    monkeypatch.setattr(loading, "_MOST_OPEN", 3)
    most, real = [0], loading.in_parallel

    def in_parallel(tasks: Any) -> None:
        leads_to = [Path(_leads_to(link)) for link in Path("/proc/self/fd").iterdir()]
        most.append(sum(path.parent == tmp_path and path.suffix == ".distcp" for path in leads_to))
        real(tasks)

    monkeypatch.setattr(loading, "in_parallel", in_parallel)
    target = {name: torch.zeros(100) for name in state}
    read(tmp_path, target)
    assert all(same_bits(target[name], tensor) for name, tensor in state.items())
    assert most == [0, 3, 3, 1]


def _leads_to(link: Path) -> str:
    try:
        return str(link.readlink())
    except FileNotFoundError:  # the listing's own
        return ""


class Doubled(torch.Tensor):
    """Keeps half of its values, in a tensor of its own, as quantised tensors keep something else."""

    half: torch.Tensor

    @staticmethod
    def __new__(cls, half: torch.Tensor) -> Doubled:
        made = torch.Tensor._make_wrapper_subclass(cls, half.shape, dtype=half.dtype)
        made.half = half
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        del types
        if func is torch.ops.aten.detach.default:
            return args[0]
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            args[0].half.copy_(args[1] / 2)
            return args[0]
        plain = [one.half * 2 if isinstance(one, cls) else one for one in args]
        return func(*plain, **(kwargs or {}))


def test_a_tensor_that_keeps_its_values_elsewhere_takes_them(rank, tmp_path):
    rank.save({"a": torch.full((4,), 6.0)}, tmp_path)
    target = Doubled(torch.zeros(4))
    read(tmp_path, {"a": target})
    assert torch.equal(target.half, torch.full((4,), 3.0))


def test_tied_tensors_that_were_stored_apart_take_the_last_one_always(rank, tmp_path, monkeypatch):
    stored = {name: torch.full((3 << 20,), value) for name, value in (("a", 1.0), ("b", 2.0))}
    rank.save(stored, tmp_path)
    counts: list[int] = []
    real = archives.Source.into

    def into(source: archives.Source, buffer: memoryview, at: int) -> None:
        counts.append(len(buffer))
        real(source, buffer, at)

    monkeypatch.setattr(archives.Source, "into", into)
    tied = torch.zeros(3 << 20)
    read(tmp_path, {"a": tied, "b": tied})
    assert torch.equal(tied, stored["b"])
    assert sum(counts) < 1.5 * tied.nbytes, "the other one was read as well, and which comes last is chance"


def test_the_callers_modes_and_default_device_do_not_matter(rank, tmp_path):
    state = {"large": torch.rand(1 << 20), "small": torch.rand(3)}
    rank.save(state, tmp_path)
    with torch.inference_mode():
        target = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in state.items()}
        read(tmp_path, target)
        assert all(torch.equal(target[name], tensor.double()) for name, tensor in state.items())
    templates.template.cache_clear()
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    with torch.device("meta"):
        read(tmp_path, target)
    assert all(torch.equal(target[name], tensor) for name, tensor in state.items())
    other = OneRank(DCP())
    try:
        other.save(state, tmp_path / "again")
    finally:
        other.close()
    assert (tmp_path / "again" / "__0_0.distcp").read_bytes() == (tmp_path / "__0_0.distcp").read_bytes()


def test_a_target_that_cannot_take_values_is_no_damage_of_the_checkpoint(rank, tmp_path):
    rank.save({"a": torch.rand(4)}, tmp_path)
    with pytest.raises(RuntimeError, match="single memory location"):
        read(tmp_path, {"a": torch.zeros(1).expand(4)})


def test_nothing_is_handed_over_before_it_is_wanted(rank, tmp_path):
    rank.save({"scheduler": {"at": 1}, "own": PerRank(5)}, tmp_path)
    own, state = PerRank(0), {"scheduler": {"at": 0}}
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    hand_over = loading.begin(tmp_path, {**state, "own": own}, 0, files=files, same_world=True)
    assert own.value == 0
    assert hand_over() == {"scheduler": {"at": 1}}
    assert own.value == 5
