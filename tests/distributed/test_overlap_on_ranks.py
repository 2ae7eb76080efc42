"""capture="overlap" on several ranks: sharded state, one rank that breaks its promise, one that is late."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import pytest
import torch
from held_captures import held_captures
from rank_processes import Here, on_ranks
from saving_ranks import assert_failed, hear_alike, manager_on, rows, timeouts
from tiny_models import mixture_of_experts, same, sharded, train_step, whole_state

from ckptmgr import CheckpointManager, CheckpointState, RanksDisagree, StateChanged

HOST = socket.gethostname()


def _trainer(seed: int, **options: Any) -> dict[str, Any]:
    model = sharded(mixture_of_experts(seed))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), **options), "step": 0}


def _train(state: dict[str, Any], seed: int, manager: CheckpointManager | None = None) -> None:
    optimizer = state["optimizer"]
    step = optimizer.step
    optimizer.step = lambda: None  # the loss's gradients first, the update where the loop puts it
    try:
        train_step(state["model"], optimizer, seed)
    finally:
        optimizer.step = step
    with manager.updating() if manager is not None else contextlib.nullcontext():
        optimizer.step()
    state["step"] += 1


@on_ranks(2)
def test_sharded_training_overlaps_and_every_save_is_of_its_step(here: Here) -> None:
    state = _trainer(0)
    _train(state, 0)
    expected = {}
    with manager_on(here, capture="overlap") as manager:
        for step in range(1, 4):
            expected[step] = whole_state(state["model"]) | whole_state(state["optimizer"])
            manager.save(step, state)
            _train(state, step, manager)
            manager.poll()
        manager.save(3, {"model": state["model"]}, "hf")
    with manager_on(here) as manager:
        for step, saved in expected.items():
            like = _trainer(9)
            resumed = manager.resume(like, step)
            assert resumed is not None
            assert like["step"] == step
            assert same(whole_state(like["model"]) | whole_state(like["optimizer"]), saved)


@on_ranks(2)
@pytest.mark.parametrize("kind", ["foreach", "fused", "neither"])
def test_an_update_on_one_rank_fails_the_save_on_all_and_the_next_one_works(here: Here, kind: str) -> None:
    """Optimizers of DTensors do not touch the version counters of what is read."""
    state = _trainer(0, foreach=kind == "foreach", fused=kind == "fused")
    _train(state, 0)
    with manager_on(here, capture="overlap") as manager:
        with held_captures() as gate:
            manager.save(1, state)
            if here.rank == 1:
                # Without its own gradients no rank waits for another in it.
                state["optimizer"].step()
            gate.open()
            failure = hear_alike(here, manager)
        assert [(one.rank, one.silent) for one in failure.failures] == [(1, False)]
        assert failure.hint == StateChanged.hint
        pending = manager.save(2, state)
        with manager.updating():
            state["optimizer"].step()
        assert pending is not None
        pending.wait()
    if here.is_leader:
        found = rows(here)
        assert_failed(found[1], 1, StateChanged.__name__, HOST)
        assert found[2].state is CheckpointState.COMMITTED


@on_ranks(2)
@pytest.mark.parametrize("is_local", [False, True])
def test_a_dtensor_that_is_changed_in_place_is_seen(here: Here, is_local: bool) -> None:
    parameter = next(sharded(mixture_of_experts(0)).parameters())
    state = {"t": parameter.detach()}
    with manager_on(here, capture="overlap") as manager:
        with held_captures() as gate:
            manager.save(1, state)
            with torch.no_grad():
                (state["t"].to_local() if is_local else parameter).mul_(2)
            gate.open()
            failure = hear_alike(here, manager)
        assert [one.rank for one in failure.failures] == [0, 1]


@on_ranks(2)
def test_a_rank_that_does_not_read_in_time_fails_the_save_on_all(here: Here) -> None:
    with manager_on(here, capture="overlap", wait=timeouts(write_s=1.5)) as manager:
        with held_captures() as gate:
            if here.rank == 0:
                gate.open()
            manager.save(1, {"t": torch.ones(10)})
            failure = hear_alike(here, manager)
        assert [one.rank for one in failure.failures] == [1]
        assert "not read within 1.5 s" in failure.failures[0].cause
        pending = manager.save(2, {"t": torch.ones(10)})
        assert pending is not None
        pending.wait()


@on_ranks(2)
def test_ranks_that_capture_in_different_ways_are_told_at_once(here: Here) -> None:
    with pytest.raises(RanksDisagree, match="different arguments"):
        manager_on(here, capture="overlap" if here.rank else "sync")
