"""What a manager does not keep of the trainer's things: texts, models, and what a frame holds when it fails."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import signal
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import mixture_of_experts

from ckptmgr import DCP, CheckpointManager, HuggingFace, SaveFailed, Series, Timeouts, WriterOptions


@pytest.fixture
def manager(run_dir: Path) -> Iterator[CheckpointManager]:
    with CheckpointManager(
        run_dir,
        series=[Series("checkpoint", DCP()), Series("hf", HuggingFace())],
        timeouts=Timeouts(setup_s=30, write_s=20, gather_s=5, close_s=20, close_on_error_s=5),
        writers=WriterOptions(nice=0),
    ) as opened:
        yield opened


def save(manager: CheckpointManager, step: int, state: dict[str, Any], series: str = "checkpoint") -> None:
    pending = manager.save(step, state, series)
    assert pending is not None
    pending.wait()


def test_a_long_text_that_changes_is_not_kept(manager: CheckpointManager) -> None:
    size, saves = 300_000, 12
    save(manager, 0, {"text": "x" * size})
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for step in range(1, saves):
            save(manager, step, {"text": f"{step}" * size})
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()

    assert kept < 4 * size, "the last one may be there, not one for each save"


@pytest.mark.parametrize("series", ["checkpoint", "hf"])
def test_a_model_that_was_made_for_one_save_is_gone_after_it(manager: CheckpointManager, series: str) -> None:
    """As an average of weights, or a model put together for the export, is."""
    model = mixture_of_experts()
    gone = []
    for step in range(3):
        once = copy.deepcopy(model)
        gone.append(weakref.ref(once))
        save(manager, step, {"model": once}, series)
        del once
        gc.collect()

        assert [ref() for ref in gone] == [None] * len(gone)
    assert len(manager._captures["hf"]._writer._views) == 0, "what was found out about a model goes with it"


def by_waiting(manager: CheckpointManager, fail: Callable[[], None]) -> weakref.ref[Any]:
    mine = torch.zeros(3)
    pending = manager.save(1, {"t": mine})
    assert pending is not None
    fail()
    for _ in range(2):
        with pytest.raises(SaveFailed, match="writer process died"):
            pending.wait()
    return weakref.ref(mine)


def by_polling(manager: CheckpointManager, fail: Callable[[], None]) -> weakref.ref[Any]:
    mine = torch.zeros(3)
    pending = manager.save(1, {"t": mine})
    assert pending is not None
    fail()
    while not pending.done():
        threading.Event().wait(0.01)
    with pytest.raises(SaveFailed, match="writer process died"):
        manager.poll()
    return weakref.ref(mine)


@pytest.mark.parametrize("heard", [by_waiting, by_polling])
def test_a_failed_save_keeps_nothing_alive_that_the_trainer_holds(
    manager: CheckpointManager, heard: Callable[..., weakref.ref[Any]]
) -> None:
    """Not even until the next garbage collection, which some trainers put off for thousands of steps."""
    pid = manager.writer_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)

    def fail() -> None:
        threading.Event().wait(0.3)  # a writer that dies before it has its job is replaced
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    gc.disable()
    try:
        assert heard(manager, fail)() is None
    finally:
        gc.enable()
