"""Ranks compare a checkpoint together before any of them loads it: each file once, and all hear the same."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_processes import Here, on_ranks, run_on_ranks, start_ranks
from saving_ranks import manager_on, save_two, timeouts
from torch.distributed.tensor import Shard, distribute_tensor

from ckptmgr import PerRank, UnsafeResume
from ckptmgr.errors import RanksDisagree
from ckptmgr.manifest import FileEntry
from ckptmgr.rundir import RunDirectory


def _state(here: Here, step: int) -> dict[str, Any]:
    whole = torch.arange(64.0) + step
    if dist.is_initialized():
        whole = distribute_tensor(whole, dist.init_device_mesh("cpu", (here.world_size,)), [Shard(0)])
    return {"weight": whole, "step": step, "own": PerRank({"at": [step, here.rank]}, when_resized="skip")}


def _save_two(here: Here) -> None:
    save_two(here, _state)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _resumed_from(here: Here, state: dict[str, Any], step: int) -> None:
    weight = state["weight"]
    mine = torch.arange(64.0) + step
    if dist.is_initialized():
        weight = weight.to_local()
        mine = mine.chunk(here.world_size)[here.rank]
    assert torch.equal(weight, mine)
    assert state["step"] == step
    if here.world_size == 2:
        assert state["own"].value == {"at": [step, here.rank]}


def _refuse_then_fall_back(here: Here, names: Sequence[str], verify: Any) -> list[Any]:
    with manager_on(here) as manager:
        state = _state(here, 0)
        with pytest.raises(UnsafeResume) as caught:
            manager.resume(state, verify_digests=verify)
        assert all(name in str(caught.value) for name in names), caught.value
        if verify is True:
            _resumed_from(here, state, 0)
        resumed = manager.resume(state, allow_older=True, verify_digests=verify)
        assert resumed is not None
        _resumed_from(here, state, 1)
        return [str(caught.value), [finding.text for finding in resumed.passed_over]]


@pytest.mark.parametrize(
    ("name", "ranks", "verify"),
    [
        ("__1_0.distcp", 2, True), ("__0_0.distcp", 2, True), ("per-rank-1.pt", 2, True), (".metadata", 2, True),
        ("__1_0.distcp", 3, True), ("__1_0.distcp", 2, "meanwhile"), ("per-rank-1.pt", 2, "meanwhile"),
        ("__0_0.distcp", 3, "meanwhile"),
    ],
)  # fmt: skip
def test_damage_that_one_rank_finds_is_told_to_all_and_all_fall_back_together(
    tmp_path: Path, name: str, ranks: int, verify: Any
):
    run_on_ranks(2, _save_two, tmp_path)
    _flip(tmp_path / "run" / "checkpoint" / "step-2" / name)
    told = run_on_ranks(ranks, _refuse_then_fall_back, tmp_path, names=[name, "step-2", "R005"], verify=verify)

    assert all(one == told[0] for one in told)
    (why,) = told[0][1]
    assert name in why
    if ranks == 2:
        assert f"seen by rank {1 if '1' in name else 0} " in why


@contextlib.contextmanager
def _opened_below(folder: Path) -> Iterator[list[str]]:
    """The names that this process opens in a folder or relative to an open one."""
    names: list[str] = []
    there = {path.name for path in folder.iterdir()}

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str) and Path(args[0]).name in there:
            names.append(Path(args[0]).name)

    sys.addaudithook(watch)
    yield names


@on_ranks(3)
def test_each_file_is_compared_once_in_the_job(here: Here) -> None:
    with manager_on(here) as manager:
        pending = manager.save(1, _state(here, 1))
        assert pending is not None
        pending.wait()
        with _opened_below(here.run_dir / "checkpoint" / "step-1") as opened:
            manager.resume(_state(here, 0), verify_digests=False)
            loading = len(opened)
            manager.resume(_state(here, 0))
        compared = opened[loading:]
        for name in opened[:loading]:
            compared.remove(name)
    everyone = [name for of_rank in here.everyone("compared", compared) for name in of_rank]
    files = {path.name for path in (here.run_dir / "checkpoint" / "step-1").iterdir()} - {"ckptmgr.json"}
    assert sorted(everyone) == sorted(files)
    assert compared, "this rank had nothing to do"


@pytest.mark.slow
@on_ranks(2, timeout_s=90)
def test_a_rank_that_takes_longer_than_ranks_wait_for_each_other_is_waited_for(here: Here) -> None:
    real = RunDirectory.verify

    def slow(self: RunDirectory, path: str, files: Sequence[FileEntry], **how: Any) -> tuple[str, ...]:
        if how["digests"] and here.rank == 1:
            time.sleep(6)
        return real(self, path, files, **how)

    RunDirectory.verify = slow  # type: ignore[method-assign]
    with manager_on(here, wait=timeouts(collective_s=4)) as manager:
        pending = manager.save(1, _state(here, 1))
        assert pending is not None
        pending.wait()
        state = _state(here, 0)
        assert manager.resume(state) is not None
        _resumed_from(here, state, 1)


def _die_or_hear(here: Here) -> None:
    real = RunDirectory.verify

    def verify(self: RunDirectory, path: str, files: Sequence[FileEntry], **how: Any) -> tuple[str, ...]:
        if how["digests"] and here.rank == 1:
            os._exit(9)
        return real(self, path, files, **how)

    with manager_on(here, wait=timeouts(collective_s=4)) as manager:
        pending = manager.save(1, _state(here, 1))
        assert pending is not None
        pending.wait()
        RunDirectory.verify = verify  # type: ignore[method-assign]
        with pytest.raises(RanksDisagree):
            manager.resume(_state(here, 0))
        here.tell("heard")
        os._exit(0)


def test_a_rank_that_dies_while_it_compares_is_missed(tmp_path: Path) -> None:
    with start_ranks(2, _die_or_hear, tmp_path) as world:
        world.join(40, dead=[0, 1])
        assert world.here.told("heard")
