"""save_together: several series of one moment, each with its own fate, and no byte captured twice."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed.checkpoint as stock
from held_captures import held_captures
from opened_managers import Open
from safetensors.torch import load_file
from tiny_models import mixture_of_experts, perceptron, same, train_step, whole_state
from transformers import AutoModelForCausalLM

from ckptmgr import DCP, CheckpointManager, CheckpointState, HuggingFace, SaveFailed, Series, StepAlreadySaved, Timeouts
from ckptmgr.errors import InvalidArgument, SaveInFlight, StateChanged
from ckptmgr.journal import Journal


class Held:
    """An asset that is written when the test lets it, which keeps an export from its commit."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def save_pretrained(self, directory: Path) -> None:
        self.reached.set()
        assert self.go_on.wait(20)
        (Path(directory) / "held.json").write_text("{}")


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def held() -> Iterator[Held]:
    held = Held()
    yield held
    held.go_on.set()


def _series(**export: Any) -> list[Series]:
    return [Series("hf", HuggingFace(**export)), Series("checkpoint", DCP())]


def _large(seed: int) -> dict[str, torch.Tensor]:
    """Enough for files that go past the page cache, in tensors that lie at no block."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (1501, 1003), "b": (), "c": (7,), "d": (999, 1201), "e": (0, 3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _wait(saved: dict[str, Any]) -> None:
    for pending in saved.values():
        assert pending is not None
        pending.wait()


def _held_bytes(manager: CheckpointManager) -> dict[str, int]:
    return {name: capture.arena.size for name, capture in manager._captures.items()}


def _both(run_dir: Path, step: int, state: dict[str, torch.Tensor]) -> None:
    """Both checkpoints of a step have the bits of *state*, as the libraries of the formats read them."""
    assert same(load_file(run_dir / "hf" / f"hf-{step}" / "model.safetensors"), state)
    target = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    stock.load({"model": target}, checkpoint_id=run_dir / "checkpoint" / f"step-{step}", no_dist=True)
    assert same(target, state)


def test_the_bytes_of_both_are_captured_once_and_every_reader_reads_them(open_manager: Open, run_dir: Path) -> None:
    with open_manager(series=_series()) as manager:
        for step in (1, 2, 3):
            state = _large(step)
            saved = manager.save_together(step, {"hf": {"model": state}, "checkpoint": {"model": state, "step": step}})
            assert list(saved) == ["checkpoint", "hf"]
            for tensor in state.values():
                tensor.zero_()
            _wait(saved)
            _both(run_dir, step, _large(step))
        size = sum(tensor.nbytes for tensor in state.values())
        held = _held_bytes(manager)
        assert held["checkpoint"] >= size
        assert held["hf"] < 4096


def test_a_trained_model_is_exported_beside_its_checkpoint_and_by_itself(open_manager: Open, run_dir: Path) -> None:
    model = mixture_of_experts(0)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    with open_manager(series=_series(max_shard_size=10_000)) as manager:
        for step in range(1, 5):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            if step % 2:
                _wait(manager.save_together(step, {"checkpoint": state, "hf": {"model": model}}))
            else:
                _wait({"hf": manager.save(step, {"model": model}, "hf")})
            exported = AutoModelForCausalLM.from_pretrained(run_dir / "hf" / f"hf-{step}")
            assert same(whole_state(exported), whole_state(model))
        like = {"model": mixture_of_experts(1)}
        manager.resume(like, 3)


def test_what_is_cast_or_laid_out_otherwise_is_copied_and_the_rest_is_not(open_manager: Open, run_dir: Path) -> None:
    state = {
        "same": torch.randn(300, 300),
        "whole": torch.arange(70_000),
        "turned": torch.arange(2500, dtype=torch.int16).view(50, 50),
        "complex": torch.randn(100, dtype=torch.complex64),
    }

    def adapter(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        if name == "turned":
            return [("turned", tensor.T), ("rows", tensor[10:20])]
        return [("complex", tensor.conj())] if name == "complex" else [(name, tensor)]

    with open_manager(series=_series(adapter=adapter, dtype=torch.bfloat16)) as manager:
        _wait(manager.save_together(1, {"checkpoint": dict(state), "hf": dict(state)}))
        size = _held_bytes(manager)["hf"]
    found = load_file(run_dir / "hf" / "hf-1" / "model.safetensors")
    assert same(
        found,
        {
            "same": state["same"].bfloat16(),
            "whole": state["whole"],
            "turned": state["turned"].T.contiguous(),
            "rows": state["turned"][10:20],
            "complex": state["complex"].conj().resolve_conj(),
        },
    )
    assert 2 * 90_000 < size < 8 * 70_000


class Fresh(torch.nn.Module):
    """A module whose state dict is made anew whenever it is asked for, and gone when nobody holds it."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        return {f"t{size}": torch.full((size,), self.value) for size in range(1, 300)}


def test_memory_that_was_let_go_and_taken_again_is_not_mistaken_for_the_same(open_manager: Open, run_dir: Path) -> None:
    with open_manager(series=_series()) as manager:
        for step in (1, 2, 3):
            _wait(manager.save_together(step, {"checkpoint": {"model": Fresh(1.0)}, "hf": {"model": Fresh(2.0)}}))
            exported = load_file(run_dir / "hf" / f"hf-{step}" / "model.safetensors")
            assert len(exported) == 299
            assert all(bool((tensor == 2.0).all()) for tensor in exported.values())


def test_an_export_that_changes_beside_the_same_checkpoint_is_laid_out_anew(open_manager: Open, run_dir: Path) -> None:
    state, more = _large(1), {"z": torch.arange(5000.0)}
    with open_manager(series=_series()) as manager:
        for step, export in enumerate((state, state | more, {"a": state["a"]}, state), start=1):
            _wait(manager.save_together(step, {"checkpoint": {"model": state}, "hf": {"model": export}}))
            assert same(load_file(run_dir / "hf" / f"hf-{step}" / "model.safetensors"), export)


# -- each with its own fate --------------------------------------------------------------------------


def _states(run_dir: Path) -> dict[str, CheckpointState]:
    with Journal.open_read_only(run_dir.with_name("run.journal.db")) as journal:
        return {record.series: record.state for record in journal.checkpoints()}


@pytest.mark.parametrize("broken", ["checkpoint", "hf"])
def test_one_that_fails_does_no_harm_to_the_other(open_manager: Open, run_dir: Path, broken: str) -> None:
    state = _large(1)
    with open_manager(series=_series(), on_failure="warn") as manager:
        (run_dir / broken).write_text("no directory")
        saved = manager.save_together(1, {"checkpoint": {"model": state}, "hf": {"model": state}})
        for name, pending in saved.items():
            assert pending is not None
            if name == broken:
                with pytest.raises(SaveFailed):
                    pending.wait()
            else:
                pending.wait()
        (run_dir / broken).unlink()
        _wait(manager.save_together(2, {"checkpoint": {"model": state}, "hf": {"model": state}}))
    _both(run_dir, 2, state)


def test_an_export_copies_for_itself_what_the_checkpoint_could_not_capture(
    open_manager: Open, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = _large(1)
    copy, calls = torch._foreach_copy_, []

    def fail_once(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError("no more")
        return copy(*arguments, **options)

    monkeypatch.setattr(torch, "_foreach_copy_", fail_once)
    with open_manager(series=_series(), on_failure="warn") as manager:
        saved = manager.save_together(1, {"checkpoint": {"model": state}, "hf": {"model": state}})
        assert saved["checkpoint"] is not None
        with pytest.raises(SaveFailed, match="MemoryError: no more"):
            saved["checkpoint"].wait()
        _wait({"hf": saved["hf"]})
    assert _states(run_dir) == {"checkpoint": CheckpointState.FAILED, "hf": CheckpointState.COMMITTED}
    assert same(load_file(run_dir / "hf" / "hf-1" / "model.safetensors"), state)


def test_the_bytes_stay_until_the_export_has_written_them(open_manager: Open, run_dir: Path, held: Held) -> None:
    state = _large(1)
    with open_manager(series=_series(assets=held)) as manager:
        saved = manager.save_together(1, {"checkpoint": {"model": state}, "hf": {"model": state}})
        assert held.reached.wait(20)
        assert saved["checkpoint"] is not None
        saved["checkpoint"].wait()
        for tensor in state.values():
            tensor.zero_()
        assert manager.save(2, {"model": state}, when_busy="skip") is None
        with pytest.raises(SaveInFlight):
            manager.save(2, {"model": state}, when_busy="raise")
        for wait in (
            lambda: manager.warm_up({"model": {"other": torch.zeros(3_000_000)}}),
            lambda: manager.save(2, {"model": state}),
        ):
            threading.Timer(0.3, held.go_on.set).start()
            wait()
            assert saved["hf"] is not None
            assert saved["hf"].done()
    _both(run_dir, 1, _large(1))


def test_a_writer_that_died_after_the_checkpoint_is_replaced_for_the_export(
    open_manager: Open, run_dir: Path, held: Held
) -> None:
    state = _large(1)
    with open_manager(series=_series(assets=held)) as manager:
        saved = manager.save_together(1, {"checkpoint": {"model": state}, "hf": {"model": state}})
        assert held.reached.wait(20)
        assert manager._finalizer is not None
        manager._finalizer._writer.kill()
        while manager._finalizer.writer_pid is not None:  # a signal is not yet a death
            time.sleep(0.01)
        held.go_on.set()
        _wait(saved)
    _both(run_dir, 1, state)


def test_what_makes_no_sense_is_refused_and_a_step_that_is_saved_keeps_only_its_series_back(
    open_manager: Open,
) -> None:
    state = {"t": torch.ones(3)}
    with open_manager(series=_series()) as manager:
        for wrong in ({}, None, ["hf"], {"nonsense": state}, {3: state}, {"hf": None}):
            with pytest.raises(InvalidArgument):
                manager.save_together(1, wrong)  # type: ignore[arg-type]
        _wait({"hf": manager.save(1, state, "hf")})
        with pytest.raises(StepAlreadySaved):
            manager.save_together(1, {"checkpoint": state, "hf": state})
        (pending,) = manager.poll() or (None,)
        assert pending is None or pending.series == "checkpoint"
        with pytest.raises(StepAlreadySaved):
            manager.save(1, state)


# -- overlap -----------------------------------------------------------------------------------------


def test_overlapping_both_are_read_once_and_are_of_their_step(open_manager: Open, run_dir: Path) -> None:
    state, expected = _large(1), _large(1)
    with held_captures() as gate, open_manager(capture="overlap", series=_series()) as manager:
        saved = manager.save_together(1, {"checkpoint": {"model": state}, "hf": {"model": state}})
        assert gate.reached.wait(20)
        assert [pending.state for pending in saved.values() if pending is not None] == [None, None]
        threading.Timer(0.2, gate.open).start()
        with manager.updating():
            for tensor in state.values():
                tensor.zero_()
        _wait(saved)
        assert _held_bytes(manager)["hf"] < 4096
    _both(run_dir, 1, expected)


def test_a_state_that_changed_while_it_was_read_fails_both(open_manager: Open) -> None:
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters())
    with held_captures() as gate, open_manager(capture="overlap", series=_series(), on_failure="warn") as manager:
        saved = manager.save_together(1, {"checkpoint": {"model": model}, "hf": {"model": model}})
        assert gate.reached.wait(20)
        train_step(model, optimizer, 0)
        gate.open()
        for pending in saved.values():
            assert pending is not None
            with pytest.raises(SaveFailed) as caught:
                pending.wait(20)
            assert caught.value.failures[0].cause.startswith(StateChanged.__name__)


def test_what_makes_no_sense_is_refused_without_waiting_for_what_is_in_flight(open_manager: Open, held: Held) -> None:
    state = {"t": torch.ones(3)}
    with open_manager(series=_series(assets=[held]), timeouts=Timeouts(write_s=1, gather_s=1)) as manager:
        pending = manager.save(1, state, "hf")
        assert pending is not None
        assert held.reached.wait(20)
        with pytest.raises(InvalidArgument):
            manager.save_together(2, {})
        assert not pending.done()
        held.go_on.set()


def test_memory_that_a_parameter_lets_go_meanwhile_is_not_taken_for_what_lies_there_next(
    open_manager: Open, run_dir: Path
) -> None:
    """An export whose state_dict puts other values in place, as a moving average does."""

    class Export(torch.nn.Module):
        def __init__(self, memory: numpy.ndarray) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.from_numpy(memory))
            self.memory = weakref.ref(memory)

        def state_dict(self, *args: Any, **options: Any) -> Any:
            self.w.data = torch.full((1 << 18,), 2.0)
            assert self.memory() is not None, "what is lent may lie where the next tensor will"
            return super().state_dict(*args, **options)

    with open_manager(series=_series()) as manager:
        export = Export(numpy.ones(1 << 18, numpy.float32))
        _wait(manager.save_together(1, {"checkpoint": {"w": export.w}, "hf": {"model": export}}))
        gc.collect()
        assert export.memory() is None, "it is held for the call alone"
    assert bool((load_file(run_dir / "hf" / "hf-1" / "model.safetensors")["w"] == 2.0).all())


def test_a_checkpoint_that_cannot_begin_does_not_blind_the_export_that_waits_for_the_same_read(
    open_manager: Open, run_dir: Path
) -> None:
    with held_captures() as gate, open_manager(series=_series(), capture="overlap", on_failure="warn") as manager:
        if (run_dir / "checkpoint").is_dir():
            (run_dir / "checkpoint").rmdir()
        (run_dir / "checkpoint").write_text("in the way")
        weight = torch.ones(1000)
        saved = manager.save_together(1, {"checkpoint": {"w": weight}, "hf": {"w": weight}})
        checkpoint, export = saved["checkpoint"], saved["hf"]
        assert checkpoint is not None
        assert export is not None
        with pytest.raises(SaveFailed):
            checkpoint.wait()
        weight.mul_(2)
        gate.open()
        with pytest.raises(SaveFailed, match="changed"):
            export.wait()
