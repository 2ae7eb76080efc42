"""capture="overlap": save returns before the state was read, updating() waits, and a promise that is broken is seen."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from held_captures import Gate, held_captures
from opened_managers import Open, Pause
from tiny_models import perceptron, same, train_step, whole_state
from torch.optim.optimizer import _global_optimizer_pre_hooks

from ckptmgr import (
    DCP,
    CheckpointManager,
    CheckpointState,
    HuggingFace,
    PerRank,
    SaveFailed,
    Series,
    Timeouts,
    errors,
)
from ckptmgr.errors import InvalidArgument, WaitTimeout
from ckptmgr.journal import Journal


@pytest.fixture
def gate() -> Iterator[Gate]:
    with held_captures() as gate:
        yield gate


def _states(run_dir: Path) -> dict[int, CheckpointState]:
    with Journal.open_read_only(run_dir.with_name("run.journal.db")) as journal:
        return {record.step: record.state for record in journal.checkpoints()}


def _refused(pending: Any) -> SaveFailed:
    """The save fails because its state was changed."""
    with pytest.raises(SaveFailed) as caught:
        pending.wait(20)
    (failure,) = caught.value.failures
    assert failure.cause.startswith(f"{errors.StateChanged.__name__}: ")
    assert caught.value.hint == errors.StateChanged.hint
    assert pending.state is CheckpointState.FAILED
    return caught.value


def _resumed(manager: CheckpointManager, like: dict[str, Any], step: int) -> dict[str, Any]:
    resumed = manager.resume(like)
    assert resumed is not None
    assert resumed.step == step
    return like


def test_save_returns_before_the_state_is_read_and_what_is_read_is_of_that_step(
    open_manager: Open, gate: Gate, run_dir: Path
) -> None:
    model, loader = perceptron(1), {"position": 7}
    state = {"model": model, "count": 3, "loader": PerRank(loader)}
    expected = whole_state(model)
    with open_manager(capture="overlap") as manager:
        pending = manager.save(1, state)
        assert pending is not None
        assert gate.reached.wait(20)
        assert pending.state is None
        # What is no tensor was taken already, and may change at once.
        state["count"], loader["position"] = 4, 8
        gate.open()
        with manager.updating():
            for parameter in model.parameters():
                parameter.data.zero_()
        pending.wait()
        like = {"model": perceptron(2), "count": 0, "loader": PerRank({"position": 0})}
        _resumed(manager, like, 1)
    assert same(whole_state(like["model"]), expected)
    assert (like["count"], like["loader"].value) == (3, {"position": 7})


def test_updating_lets_nobody_in_before_the_state_is_read(open_manager: Open, gate: Gate) -> None:
    tensor = torch.zeros(1000)
    inside = threading.Event()
    with open_manager(capture="overlap") as manager:
        pending = manager.save(1, {"t": tensor})

        def update() -> None:
            with manager.updating():
                inside.set()
                tensor.fill_(1)

        updater = threading.Thread(target=update)
        updater.start()
        assert gate.reached.wait(20)
        assert not inside.wait(0.2)
        gate.open()
        updater.join(20)
        assert inside.is_set()
        assert pending is not None
        pending.wait()
        assert torch.equal(_resumed(manager, {"t": torch.ones(1000)}, 1)["t"], torch.zeros(1000))


def _in_place(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    del optimizer
    with torch.no_grad():
        next(model.parameters()).add_(1)


def _of_a_view(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    del optimizer
    with torch.no_grad():
        next(model.parameters())[0].zero_()


def _buffer(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    del optimizer
    model.get_buffer("running").add_(1)


def _memory_taken_away(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    del optimizer
    buffer = model.get_buffer("running")
    buffer.untyped_storage().resize_(2 * buffer.untyped_storage().nbytes())


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    del model
    optimizer.step()


def _moments_only(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    del model
    next(iter(optimizer.state.values()))["exp_avg"].mul_(0.5)


UPDATES = [_in_place, _of_a_view, _buffer, _memory_taken_away, _step, _moments_only]


@pytest.mark.parametrize("kind", ["foreach", "fused", "neither"])
@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.__name__)
def test_an_update_that_does_not_wait_fails_the_save_and_the_next_one_works(
    open_manager: Open,
    gate: Gate,
    run_dir: Path,
    update: Callable[[torch.nn.Module, torch.optim.Optimizer], None],
    kind: str,
) -> None:
    """Fused optimizers do not touch version counters."""
    model = perceptron()
    model.register_buffer("running", torch.zeros(8))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=kind == "foreach", fused=kind == "fused")
    train_step(model, optimizer, 0)
    state = {"model": model, "optimizer": optimizer}
    with open_manager(capture="overlap") as manager:
        pending = manager.save(1, state)
        assert gate.reached.wait(20)
        update(model, optimizer)
        gate.open()
        failure = _refused(pending)
        assert "outside of updating()" in str(failure)
        after = manager.save(2, state)
        with manager.updating():
            update(model, optimizer)
        assert after is not None
        after.wait()
    assert _states(run_dir) == {1: CheckpointState.FAILED, 2: CheckpointState.COMMITTED}


def test_an_update_that_ends_after_the_capture_is_seen(
    open_manager: Open, gate: Gate, paused_writer: Pause, run_dir: Path
) -> None:
    """An operation raises the counter when it ends, and what it does may have begun while the state was read."""
    tensor = torch.zeros(8)
    gate.open()
    with open_manager(capture="overlap") as manager:
        with paused_writer(manager):
            pending = manager.save(1, {"t": tensor})
            reading = manager._captures["checkpoint"].reading
            assert reading is not None
            assert reading.wait(20)
            tensor.add_(1)
        _refused(pending)


def test_optimizers_of_other_tensors_may_step(open_manager: Open, gate: Gate) -> None:
    model, other = perceptron(), perceptron()
    optimizer = torch.optim.SGD(other.parameters())
    with open_manager(capture="overlap") as manager:
        pending = manager.save(1, {"model": model})
        train_step(other, optimizer, 0)
        gate.open()
        assert pending is not None
        pending.wait()


def test_an_optimizer_that_steps_once_all_is_read_does_no_harm(open_manager: Open, gate: Gate) -> None:
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters())
    gate.open()
    with open_manager(capture="overlap") as manager:
        pending = manager.save(1, {"model": model})
        reading = manager._captures["checkpoint"].reading
        assert reading is not None
        assert reading.wait(20)
        train_step(model, optimizer, 0)
        assert pending is not None
        pending.wait()


@pytest.mark.parametrize("second", ["checkpoint", "hf"])
def test_the_next_save_of_any_series_waits_until_the_state_is_read(open_manager: Open, gate: Gate, second: str) -> None:
    model = perceptron()
    done = threading.Event()
    with open_manager(capture="overlap", series=[Series("checkpoint", DCP()), Series("hf", HuggingFace())]) as manager:
        first = manager.save(1, {"model": model})

        def save_again() -> None:
            pending = manager.save(2, {"model": model}, second)
            done.set()
            assert pending is not None
            pending.wait()

        saver = threading.Thread(target=save_again)
        saver.start()
        assert gate.reached.wait(20)
        assert not done.wait(0.2)
        gate.open()
        saver.join(20)
        assert done.is_set()
        assert first is not None
        first.wait()


def test_resuming_waits_until_the_state_is_read(open_manager: Open, gate: Gate) -> None:
    tensor = torch.full((100,), 2.0)
    with open_manager(capture="overlap") as manager:
        gate.open()
        first = manager.save(1, {"t": torch.ones(100)})
        assert first is not None
        first.wait()
        gate.shut()
        pending = manager.save(2, {"t": tensor})
        threading.Timer(0.2, gate.open).start()
        _resumed(manager, {"t": tensor}, 2)
        assert torch.equal(tensor, torch.full((100,), 2.0))
        assert pending is not None
        assert pending.done()


def test_resuming_waits_until_another_series_has_read_the_state(open_manager: Open, gate: Gate) -> None:
    model = perceptron(1)
    series = [Series("checkpoint", DCP()), Series("hf", HuggingFace())]
    with open_manager(capture="overlap", series=series) as manager:
        gate.open()
        first = manager.save(1, {"model": perceptron(2)})
        assert first is not None
        first.wait()
        gate.shut()
        export = manager.save(1, {"model": model}, "hf")
        threading.Timer(0.2, gate.open).start()
        manager.resume({"model": model})
        assert same(whole_state(model), whole_state(perceptron(2)))
        assert export is not None
        export.wait()


def test_closing_waits_for_what_is_read(open_manager: Open, gate: Gate, run_dir: Path) -> None:
    manager = open_manager(capture="overlap")
    manager.save(1, {"t": torch.ones(10)})
    threading.Timer(0.2, gate.open).start()
    manager.close()
    assert _states(run_dir) == {1: CheckpointState.COMMITTED}


def test_a_capture_that_does_not_end_does_not_keep_the_manager_from_closing(
    open_manager: Open, gate: Gate, run_dir: Path
) -> None:
    manager = open_manager(capture="overlap")
    pending = manager.save(1, {"t": torch.ones(10)})
    assert gate.reached.wait(20)
    with pytest.raises(SaveFailed, match="closed while the state was read"):
        manager.close(0.2)
    assert pending is not None
    assert pending.state is CheckpointState.FAILED
    assert _states(run_dir) == {1: CheckpointState.FAILED}
    capture = manager._captures["checkpoint"]
    assert capture.arena.size, "memory that is written to must not be given back"
    gate.open()
    assert capture.reading is not None
    capture.reading._thread.join(20)
    capture.close()


def test_leaving_the_block_on_an_exception_while_the_state_is_read(
    open_manager: Open, gate: Gate, run_dir: Path
) -> None:
    with pytest.raises(ZeroDivisionError), open_manager(capture="overlap") as manager:  # noqa: PT012
        manager.save(1, {"t": torch.ones(10)})
        threading.Timer(0.2, gate.open).start()
        raise ZeroDivisionError
    assert _states(run_dir) == {1: CheckpointState.COMMITTED}


def test_waiting_for_a_capture_has_a_limit(open_manager: Open, gate: Gate) -> None:
    with open_manager(capture="overlap", timeouts=Timeouts(write_s=0.3, gather_s=5, close_s=20)) as manager:
        pending = manager.save(1, {"t": torch.ones(10)})
        with pytest.raises(WaitTimeout, match=r"still reads after 0.3 s"), manager.updating():
            raise AssertionError
        assert pending is not None
        with pytest.raises(SaveFailed, match=r"not read within 0.3 s"):
            pending.wait()
        gate.open()
        with manager.updating():
            pass


def test_a_capture_that_fails_fails_its_save_only(
    open_manager: Open, gate: Gate, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.open()
    with open_manager(capture="overlap") as manager:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "_foreach_copy_", lambda *_, **__: (_ for _ in ()).throw(MemoryError("no more")))
            pending = manager.save(1, {"t": torch.ones(10)})
            assert pending is not None
            with pytest.raises(SaveFailed, match="MemoryError: no more"):
                pending.wait()
        after = manager.save(2, {"t": torch.ones(10)})
        assert after is not None
        after.wait()
    assert _states(run_dir) == {1: CheckpointState.FAILED, 2: CheckpointState.COMMITTED}


def test_the_state_lives_until_it_is_read_and_no_longer(open_manager: Open, gate: Gate) -> None:
    with open_manager(capture="overlap") as manager:
        tensor = torch.arange(100.0)
        pending = manager.save(1, {"t": tensor})
        memory = weakref.ref(tensor)
        del tensor
        gc.collect()
        gate.open()
        assert pending is not None
        pending.wait()
        gc.collect()
        assert memory() is None
        assert torch.equal(_resumed(manager, {"t": torch.zeros(100)}, 1)["t"], torch.arange(100.0))


def test_memory_that_a_tensor_had_is_read_whatever_it_has_now(open_manager: Open, gate: Gate) -> None:
    """The module's own is another one then, and what was captured is whole; a tensor given by itself has changed."""
    model, tensor = perceptron(1), torch.ones(10)
    with open_manager(capture="overlap") as manager:
        for step, state in ((1, {"model": model}), (2, {"t": tensor})):
            gate.shut()
            pending = manager.save(step, state)
            assert gate.reached.wait(20)
            model[0].weight.data = torch.zeros(16, 8)
            tensor.data = torch.zeros(20)
            gate.open()
            if step == 2:
                _refused(pending)
            else:
                assert pending is not None
                pending.wait()
                like = perceptron(2)
                _resumed(manager, {"model": like}, 1)
                assert same(whole_state(like), whole_state(perceptron(1)))
                tensor.data = torch.ones(10)


def test_tensors_without_a_version_counter_are_captured_before_save_returns(
    open_manager: Open, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.inference_mode():
        tensor = torch.ones(10)
    with open_manager(capture="overlap") as manager:
        for step in (1, 2):
            pending = manager.save(step, {"t": tensor})
            with torch.inference_mode():
                tensor.zero_()
            assert pending is not None
            pending.wait()
        assert torch.equal(_resumed(manager, {"t": torch.zeros(10)}, 2)["t"], torch.zeros(10))
        assert torch.equal(_loaded(manager, 1), torch.ones(10))
    assert caplog.text.count("captured before save returns") == 1


def _loaded(manager: CheckpointManager, step: int) -> torch.Tensor:
    like = {"t": torch.zeros(10)}
    manager.resume(like, step)
    return like["t"]


def test_a_forked_process_does_not_wait_for_a_capture_that_it_does_not_have(open_manager: Open, gate: Gate) -> None:
    tensor = torch.nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([tensor])
    with open_manager(capture="overlap") as manager:
        pending = manager.save(1, {"t": tensor})
        assert gate.reached.wait(20)
        child = os.fork()
        if not child:
            with manager.updating():
                optimizer.step()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        gate.open()
        assert pending is not None
        pending.wait()


def test_capture_is_one_of_two_words(open_manager: Open) -> None:
    with pytest.raises(InvalidArgument, match="sync, overlap"):
        open_manager(capture="async")


def test_no_hook_is_left_behind(open_manager: Open) -> None:
    before = dict(_global_optimizer_pre_hooks)
    with open_manager(capture="overlap"):
        assert len(_global_optimizer_pre_hooks) == len(before) + 1
    assert _global_optimizer_pre_hooks == before
