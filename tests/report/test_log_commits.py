"""The hook for a trainer's own log, on a real run."""

from __future__ import annotations

from pathlib import Path

import torch

from ckptmgr import DCP, CheckpointManager, Series, durability
from ckptmgr.integrations import log_commits


def test_each_commit_is_logged_with_its_numbers_and_step(run_dir: Path) -> None:
    logged: list[tuple[str, float, int]] = []
    state = {"model": torch.nn.Linear(8, 8)}
    series = [Series("checkpoint", DCP()), Series("snapshot", DCP())]
    hook = log_commits(lambda *row: logged.append(row), prefix="durable")
    with CheckpointManager(run_dir, series=series, on_commit=hook) as manager:
        for step in (10, 25):
            manager.save(step, state).wait(60)
        manager.save(30, state, series="snapshot").wait(60)

    names = {(name, step) for name, _, step in logged}
    assert {name for name, step in names if step == 25} == {
        f"durable/checkpoint/{number}" for number in durability.COMMIT_NUMBERS
    }
    assert ("durable/checkpoint/steps_since_commit", 10) not in names
    assert ("durable/snapshot/steps_since_commit", 30) not in names
    assert ("durable/checkpoint/steps_since_commit", 15.0, 25) in logged
    assert all(type(value) is float and value >= 0 for _, value, _ in logged)


def test_a_log_that_raises_fails_no_save(run_dir: Path) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the log is full")

    with CheckpointManager(run_dir, on_commit=log_commits(broken)) as manager:
        for step in (1, 2):
            manager.save(step, {"model": torch.nn.Linear(2, 2)}).wait(60)
        manager.poll()
