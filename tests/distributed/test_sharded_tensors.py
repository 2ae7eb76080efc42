"""Every way in which a tensor can be spread over ranks goes into a checkpoint and an export, and comes back whole."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from rank_processes import Here, on_ranks, run_on_ranks
from safetensors.torch import load_file
from saving_ranks import manager_on, rows
from tiny_models import fused_when_published, same, whole
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ckptmgr import DCP, CheckpointState, HuggingFace, Series
from ckptmgr.errors import InvalidArgument, StateMismatch

#: name: shape, dtype, mesh ("1d", "2d", or None for plain on every rank), placements
_ZOO: dict[str, tuple[tuple[int, ...], torch.dtype, str | None, tuple[Any, ...]]] = {
    "even": ((8, 6), torch.float32, "1d", (Shard(0),)),
    "uneven": ((7, 3), torch.float32, "1d", (Shard(0),)),
    "fewer-than-ranks": ((2, 5), torch.bfloat16, "1d", (Shard(0),)),
    "single-row": ((1, 5), torch.float16, "1d", (Shard(0),)),
    "columns": ((5, 10), torch.float32, "1d", (Shard(1),)),
    "last-of-three": ((3, 2, 7), torch.float64, "1d", (Shard(2),)),
    "middle": ((3, 6, 4), torch.float32, "1d", (Shard(1),)),
    "replicated": ((4, 4), torch.float32, "1d", (Replicate(),)),
    "scalar": ((), torch.float32, "1d", (Replicate(),)),
    "nothing": ((0, 4), torch.float32, "1d", (Shard(0),)),
    "integers": ((9,), torch.int64, "1d", (Shard(0),)),
    "booleans": ((6,), torch.bool, "1d", (Shard(0),)),
    "bytes": ((33,), torch.uint8, "1d", (Shard(0),)),
    "hybrid": ((6, 4), torch.float32, "2d", (Replicate(), Shard(0))),
    "hybrid-inner": ((6, 4), torch.float32, "2d", (Shard(0), Replicate())),
    "grid": ((5, 7), torch.float32, "2d", (Shard(0), Shard(1))),
    "grid-turned": ((5, 7), torch.float32, "2d", (Shard(1), Shard(0))),
    "twice": ((9, 2), torch.float32, "2d", (Shard(0), Shard(0))),
    "cube": ((3, 4, 5), torch.float32, "2d", (Shard(2), Shard(1))),
    "everywhere": ((3, 3), torch.float32, "2d", (Replicate(), Replicate())),
    "plain": ((3, 5), torch.float32, None, ()),
    "plain-scalar": ((), torch.int32, None, ()),
    "plain-flag": ((), torch.bool, None, ()),
    "plain-half": ((4, 4), torch.bfloat16, None, ()),
}


def _reference(name: str) -> torch.Tensor:
    shape, dtype, _, _ = _ZOO[name]
    values = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape) + len(name)
    return (values % 3 == 0) if dtype is torch.bool else values.to(dtype)


def _meshes(here: Here) -> dict[str | None, DeviceMesh]:
    return {
        "1d": init_device_mesh("cpu", (here.world_size,)),
        "2d": init_device_mesh("cpu", (2, here.world_size // 2)),
    }


def _zoo(here: Here, *, blank: bool = False) -> dict[str, torch.Tensor]:
    meshes = _meshes(here)
    found = {}
    for name, (_, _, mesh, placements) in _ZOO.items():
        tensor = torch.zeros_like(_reference(name)) if blank else _reference(name)
        found[name] = distribute_tensor(tensor, meshes[mesh], placements) if mesh else tensor
    return found


def _experts(rank: int) -> dict[str, torch.Tensor]:
    """Keys that only this rank holds, and of these different numbers."""
    return {f"expert.{rank}.{n}.weight": torch.full((2, 3), 10.0 * rank + n) for n in range(rank + 1)}


def _save_zoo(here: Here) -> None:
    series = [
        Series("checkpoint", DCP()),
        Series("one", HuggingFace()),
        Series("many", HuggingFace(max_shard_size=40)),
        Series("cast", HuggingFace(max_shard_size=400, dtype=torch.bfloat16)),
    ]
    with manager_on(here, series=series) as manager:
        pendings = [manager.save(1, {"t": {**_zoo(here), **_experts(here.rank)}}, one.name) for one in series]
        # Views whose memory is not in the order of their elements.
        turned = {"turned": _reference("middle").permute(2, 0, 1), "sliced": torch.arange(50.0)[5:40:4]}
        pendings += [manager.save(2, {"t": turned}, name) for name in ("checkpoint", "one")]
        for pending in pendings:
            assert pending is not None
            pending.wait()
        assert here.is_leader or manager.poll() == []
    if here.is_leader:
        assert [record.state for record in rows(here).values()] == [CheckpointState.COMMITTED] * 2


def _resume_zoo(here: Here) -> None:
    with manager_on(here, series=[Series("checkpoint", DCP())]) as manager:
        # Whoever had an expert then, any rank can ask for any of them now.
        wanted = {name: torch.zeros(2, 3) for rank in range(4) for name in _experts((rank + here.rank) % 4)}
        state = {"t": {**_zoo(here, blank=True), **wanted}}
        assert manager.resume(state, step=1) is not None
        for name in _ZOO:
            assert same({name: whole(state["t"][name])}, {name: _reference(name)}), name
        for rank in range(4):
            for name, tensor in _experts(rank).items():
                assert torch.equal(state["t"][name], tensor), name
        with pytest.raises(StateMismatch):
            manager.resume({"t": {"expert.9.0.weight": torch.zeros(2, 3)}}, step=1)


def _check_files(tmp_path: Path) -> None:
    expected = {name: _reference(name) for name in _ZOO} | {
        name: tensor for rank in range(4) for name, tensor in _experts(rank).items()
    }
    # Plain PyTorch, by hand, without a process group.
    target = {f"t.{name}": torch.zeros_like(tensor) for name, tensor in expected.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.load(target, checkpoint_id=tmp_path / "run" / "checkpoint" / "step-1", no_dist=True)
    assert same({name.removeprefix("t."): tensor for name, tensor in target.items()}, expected)
    for name, cast in (("one", False), ("many", False), ("cast", True)):
        found: dict[str, torch.Tensor] = {}
        for file in (tmp_path / "run" / name / "hf-1").glob("*.safetensors"):
            found |= load_file(file)
        wanted = {
            key: tensor.bfloat16() if cast and tensor.is_floating_point() else tensor
            for key, tensor in expected.items()
        }
        assert found.keys() == wanted.keys()
        assert not [key for key in wanted if not same({key: found[key]}, {key: wanted[key]})], name
    files = list((tmp_path / "run" / "many" / "hf-1").glob("*.safetensors"))
    assert len(files) > len(_ZOO)
    turned = load_file(tmp_path / "run" / "one" / "hf-2" / "model.safetensors")
    assert torch.equal(turned["turned"], _reference("middle").permute(2, 0, 1))
    assert torch.equal(turned["sliced"], torch.arange(50.0)[5:40:4])


def test_every_placement_comes_back_on_the_same_ranks_on_fewer_and_in_plain_files(tmp_path: Path) -> None:
    run_on_ranks(4, _save_zoo, tmp_path)
    _check_files(tmp_path)
    for world_size in (4, 2):
        run_on_ranks(world_size, _resume_zoo, tmp_path)


def _alike(here: Here) -> list[dict[str, Any]]:
    """States of which every rank has parts of one shape, but parts of different wholes, or under another name."""
    ranks = list(range(here.world_size))
    part = torch.arange(4.0).reshape(2, 2) + 4 * here.rank
    rows, columns, turned = (
        DTensor.from_local(part, DeviceMesh("cpu", order), placements, run_check=False)
        for order, placements in ((ranks, [Shard(0)]), (ranks, [Shard(1)]), (ranks[::-1], [Shard(1)]))
    )
    return [{"a": whole, "b": 1} for whole in (rows, columns, turned)] + [{"a": 1, "b": turned}]


def _save_alike(here: Here) -> None:
    with manager_on(here) as manager:
        for number, state in enumerate(_alike(here)):
            for step in (2 * number, 2 * number + 1):
                pending = manager.save(step, state)
                assert pending is not None
                pending.wait()


def test_parts_of_one_shape_are_planned_anew_when_they_are_parts_of_another_whole(tmp_path: Path) -> None:
    run_on_ranks(2, _save_alike, tmp_path)
    first, second = torch.arange(4.0).reshape(2, 2), torch.arange(4.0, 8.0).reshape(2, 2)
    rows, columns, turned = torch.cat([first, second]), torch.cat([first, second], 1), torch.cat([second, first], 1)
    expected = [{"a": rows, "b": 1}, {"a": columns, "b": 1}, {"a": turned, "b": 1}, {"a": 1, "b": turned}]
    for step in range(2 * len(expected)):
        state = expected[step // 2]
        target = {
            key: torch.zeros_like(value) if isinstance(value, torch.Tensor) else 0 for key, value in state.items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process
            dcp.load(target, checkpoint_id=tmp_path / "run" / "checkpoint" / f"step-{step}", no_dist=True)

        for key, value in state.items():
            assert torch.equal(torch.as_tensor(target[key]), torch.as_tensor(value))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10, bias=True)
        self.down = nn.Linear(10, 6, bias=True)


def _block(here: Here, seed: int) -> _Block:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        block = _Block()
    if here.world_size > 1:
        mesh = init_device_mesh("cpu", (2, here.world_size // 2), mesh_dim_names=("dp", "tp"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            fully_shard(block, mesh=mesh["dp"])
    return block


def _save_tensor_parallel(here: Here) -> None:
    block = _block(here, 3)
    kinds = {type(placement).__name__ for tensor in block.parameters() for placement in tensor.placements}
    assert "_StridedShard" in kinds, "this test is about tensors that are sharded twice along one dimension"
    with manager_on(here) as manager:
        for name in ("checkpoint", "hf"):
            pending = manager.save(1, {"block": block}, name)
            assert pending is not None
            pending.wait()
        other = _block(here, 4)
        manager.resume({"block": other})
    assert same(
        {name: whole(tensor) for name, tensor in block.state_dict().items()},
        {name: whole(tensor) for name, tensor in other.state_dict().items()},
    )


def test_tensor_parallel_layers_under_fsdp_come_back_whole(tmp_path: Path) -> None:
    run_on_ranks(4, _save_tensor_parallel, tmp_path)
    expected = {name: tensor.detach() for name, tensor in _block(Here(0, 1, tmp_path, "none"), 3).state_dict().items()}
    assert same(load_file(tmp_path / "run" / "hf" / "hf-1" / "model.safetensors"), expected)
    run_on_ranks(1, _resume_block, tmp_path)


def _resume_block(here: Here) -> None:
    block, expected = _block(here, 4), _block(here, 3)
    with manager_on(here) as manager:
        manager.resume({"block": block})
    assert same(dict(block.state_dict()), dict(expected.state_dict()))


@on_ranks(2)
def test_pieces_that_do_not_fit_together_are_refused_on_every_rank(here: Here) -> None:
    mesh = init_device_mesh("cpu", (2,))
    partial = DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False)
    bad: list[tuple[str, dict[str, Any]]] = [
        ("hf", {"t": {"other-shape": torch.ones(2 + here.rank)}}),
        ("hf", {"t": {"other-dtype": torch.ones(2, dtype=[torch.float32, torch.float64][here.rank])}}),
        ("hf", {"t": {"partial": partial}}),
        ("hf", {"t": {"complex": torch.ones(2, dtype=torch.complex128)}}),
        ("checkpoint", {"other-shape": torch.ones(2 + here.rank)}),
        ("checkpoint", {"other-dtype": torch.ones(2, dtype=[torch.float32, torch.float64][here.rank])}),
        ("checkpoint", {"tensor-or-value": torch.ones(2) if here.is_leader else 5}),
        ("checkpoint", {"partial": partial}),
        ("checkpoint", {3: 4}),
    ]
    taken = []
    with manager_on(here) as manager:
        for step, (series, state) in enumerate(bad):
            try:
                manager.save(step, state, series)
            except InvalidArgument as error:
                told = here.everyone(f"text-{step}", str(error))
                assert len(set(told)) == 1, told
            else:
                taken.append((series, next(iter(state))))
        assert not taken, "saved without a word"
        for series in ("checkpoint", "hf"):
            pending = manager.save(50, {"t": {"fine": torch.ones(2)}}, series)
            assert pending is not None
            pending.wait()
    if here.is_leader:
        assert list(rows(here)) == [50], "what is refused leaves no row"


def _export_fused(here: Here, dim: int) -> None:
    model = fused_when_published()
    mesh = init_device_mesh("cpu", (here.world_size,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(dim if p.ndim > dim else 0))
    with manager_on(here, series=[Series("hf", HuggingFace(max_shard_size=4000))]) as manager:
        pending = manager.save(1, {"model": model}, "hf")
        assert pending is not None
        pending.wait()


@pytest.mark.parametrize("dim", [0, 1])
def test_sharded_weights_that_are_published_joined_are_joined_without_gathering(tmp_path: Path, dim: int) -> None:
    """Every rank writes its rows, or columns, of three weights into one tensor."""
    run_on_ranks(2, _export_fused, tmp_path, dim=dim)
    fused_when_published().save_pretrained(tmp_path / "theirs", max_shard_size=4000)
    mine, theirs = tmp_path / "run" / "hf" / "hf-1", tmp_path / "theirs"

    names = sorted(path.name for path in theirs.glob("*.safetensors*"))
    assert len(names) > 2
    for name in names:
        if name.endswith(".json"):
            assert (mine / name).read_bytes() == (theirs / name).read_bytes()
        else:
            assert same(load_file(mine / name), load_file(theirs / name))


@on_ranks(2)
def test_ranks_may_name_their_tensors_in_any_order(here: Here) -> None:
    names = [f"n{i}" for i in range(20)]
    state = {name: torch.full((3,), float(i)) for i, name in enumerate(names)}
    mine = dict(sorted(state.items(), reverse=here.rank == 1))
    with manager_on(here) as manager:
        for series in ("checkpoint", "hf"):
            pending = manager.save(1, {"t": mine}, series)
            assert pending is not None
            pending.wait()
        target = {name: torch.zeros(3) for name in sorted(names, reverse=here.rank == 0)}
        manager.resume({"t": target})
    assert same(dict(sorted(target.items())), dict(sorted(state.items())))
    if here.is_leader:
        assert same(load_file(here.run_dir / "hf" / "hf-1" / "model.safetensors"), state)


@on_ranks(2)
def test_a_plan_that_only_one_rank_changes_is_made_anew_by_all(here: Here) -> None:
    with manager_on(here) as manager:
        for step in range(4):
            grown = {f"late-{n}": torch.full((5,), float(n)) for n in range(step if here.rank == 1 else 0)}
            state = {"t": {"base": torch.full((4,), float(step)), **grown}}
            for series in ("checkpoint", "hf"):
                pending = manager.save(step, state, series)
                assert pending is not None
                pending.wait()
        target = {"base": torch.zeros(4), **{f"late-{n}": torch.zeros(5) for n in range(3)}}
        manager.resume({"t": target})
    assert all(torch.equal(target[f"late-{n}"], torch.full((5,), float(n))) for n in range(3))
    if here.is_leader:
        assert same(load_file(here.run_dir / "hf" / "hf-3" / "model.safetensors"), dict(sorted(target.items())))
