"""State on a GPU: page-locked memory, copies on a stream of their own, casts on the GPU, and overlapping."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from held_captures import held_captures
from opened_managers import Open
from safetensors.torch import load_file
from tiny_models import same

from ckptmgr import CheckpointManager, HuggingFace, SaveFailed, Series, StateChanged
from ckptmgr.writers import arena as arenas
from ckptmgr.writers.arena import Arena, Copy, Layout, aligned

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(0)
    yield arena
    arena.close()


def _adopt(arena: Arena, tensors: dict[str, torch.Tensor], **dtypes: torch.dtype) -> Layout:
    copies, end = [], 0
    for name, tensor in tensors.items():
        copy = Copy(name, aligned(end), dtypes.get(name, tensor.dtype), tuple(tensor.shape))
        copies.append(copy)
        end = copy.offset + copy.nbytes
    layout = Layout(end, (), tuple(copies), ())
    arena.adopt(layout)
    return layout


def _held(arena: Arena, copy: Copy) -> torch.Tensor:
    data = bytearray(os.pread(arena.descriptor, copy.nbytes, copy.offset))
    if not data:
        return torch.empty(copy.shape, dtype=copy.dtype)
    return torch.frombuffer(data, dtype=copy.dtype).view(copy.shape)


def test_a_capture_from_the_gpu_holds_the_same_values_in_memory_that_is_pinned(arena: Arena) -> None:
    base = torch.randn(64, 48, device="cuda")
    tensors = {
        "plain": base,
        "transposed": base.t(),
        "sliced": base[::2, 1:],
        "expanded": base[:1].expand(5, 48),
        "conjugated": torch.complex(base[:4], base[4:8]).conj(),
        "negated": torch._neg_view(base[9]),
        "scalar": base[0, 0],
        "half": base.bfloat16(),
        "mask": base > 0,
        "on the CPU": torch.arange(100.0),
    }
    layout = _adopt(arena, tensors)
    arena.capture(tensors)

    assert arena._pinned
    assert all(view.is_pinned() for view in arena._views if view.numel())
    for copy in layout.copies:
        assert torch.equal(_held(arena, copy), tensors[str(copy.key)].cpu().resolve_conj().resolve_neg()), copy.key


def test_thousands_of_small_tensors_arrive_beside_large_ones_and_those_of_the_cpu(arena: Arena) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for number in range(3000):
        tensors[f"{number}"] = torch.randn(number % 50, device="cuda")
        tensors[f"{number} on the CPU"] = torch.randn(3)
        if number % 100 == 0:
            tensors[f"{number} large"] = torch.randn(100_000, device="cuda")
            tensors[f"{number} large, on the CPU"] = torch.randn(100_000)
    layout = _adopt(arena, tensors, **{f"{number}": torch.bfloat16 for number in range(0, 3000, 7)})
    for _ in range(3):
        arena.capture(tensors)
        for copy in layout.copies:
            assert torch.equal(_held(arena, copy), tensors[str(copy.key)].to(copy.dtype).cpu()), copy.key
        torch._foreach_add_(list(tensors.values()), 1)
    assert arena._batches is not None
    assert sum(len(batch.indexes) for batch in arena._batches[2]) > 2000


def test_a_cast_takes_place_on_the_gpu_piece_by_piece(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "CAST_BYTES", 1 << 20)
    tensors = {"rows": torch.randn(4096, 1024, device="cuda"), "row": torch.randn(1, 3 << 20, device="cuda")}
    layout = _adopt(arena, tensors, rows=torch.bfloat16, row=torch.float16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    arena.capture(tensors)

    assert torch.cuda.max_memory_allocated() - before <= 8 << 20
    for copy in layout.copies:
        assert torch.equal(_held(arena, copy), tensors[str(copy.key)].to(copy.dtype).cpu())


def test_a_capture_has_what_was_queued_before_and_nothing_of_what_comes_after(arena: Arena) -> None:
    tensor = torch.zeros(1 << 24, device="cuda")
    layout = _adopt(arena, {"t": tensor})
    for value in range(1, 6):
        torch.cuda._sleep(20_000_000)
        tensor.fill_(value)
        arena.capture({"t": tensor})
        tensor.fill_(-1)
        assert torch.equal(_held(arena, layout.copies[0]), torch.full((1 << 24,), float(value)))


def test_a_stream_of_the_callers_counts_as_current(arena: Arena) -> None:
    tensor = torch.zeros(1 << 22, device="cuda")
    layout = _adopt(arena, {"t": tensor})
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        tensor.fill_(3)
        arena.capture({"t": tensor})
    assert torch.equal(_held(arena, layout.copies[0]), torch.full((1 << 22,), 3.0))


def test_where_pinning_is_refused_the_copies_are_right_and_the_training_goes_on(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {"t": torch.randn(1000, device="cuda"), "half": torch.randn(1000, device="cuda")}
    layout = _adopt(arena, tensors, half=torch.bfloat16)
    # CUDA refuses memory that is registered already, and leaves that error behind.
    cudart = torch.cuda.cudart()
    assert int(cudart.cudaHostRegister(arena._bytes.data_ptr(), arena.size, 1)) == 0
    arena.capture(tensors)
    torch.ones(10, device="cuda").add_(1)
    torch.cuda.synchronize()

    assert "cannot page-lock" in caplog.text
    assert torch.equal(_held(arena, layout.copies[0]), tensors["t"].cpu())
    assert torch.equal(_held(arena, layout.copies[1]), tensors["half"].bfloat16().cpu())
    assert int(cudart.cudaHostUnregister(arena._bytes.data_ptr())) == 0


def test_memory_is_unpinned_before_it_is_given_back_and_pinned_again(arena: Arena) -> None:
    for size in (1000, 100_000, 1_000_000):
        tensors = {"t": torch.randn(size, device="cuda")}
        layout = _adopt(arena, tensors)
        arena.capture(tensors)
        assert arena._pinned
        assert torch.equal(_held(arena, layout.copies[0]), tensors["t"].cpu())
    arena.close()
    assert not arena._pinned


def _trained(kind: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 64)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=kind == "foreach", fused=kind == "fused")
    _backward(model)
    optimizer.step()
    return model, optimizer


def _backward(model: torch.nn.Module) -> None:
    model(torch.randn(32, 256, device="cuda")).square().mean().backward()


def _copy(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _save(manager: CheckpointManager, step: int, state: dict[str, Any], series: str = "checkpoint") -> Any:
    pending = manager.save(step, state, series)
    assert pending is not None
    return pending


@pytest.mark.parametrize("capture", ["sync", "overlap"])
@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_training_goes_on_while_its_state_is_saved_and_every_save_is_of_its_step(
    open_manager: Open, capture: str, kind: str
) -> None:
    model, optimizer = _trained(kind)
    state = {"model": model, "optimizer": optimizer}
    with open_manager(capture=capture) as manager:
        manager.warm_up(state)
        assert manager._captures["checkpoint"].arena._pinned
        for step in range(1, 6):
            expected = _copy(model)
            pending = _save(manager, step, state)
            _backward(model)
            with manager.updating():
                optimizer.step()
            optimizer.zero_grad()
            pending.wait()
            like = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 64)).cuda()
            resumed = manager.resume({"model": like}, step)
            assert resumed is not None
            assert same(_copy(like), expected)


@pytest.mark.parametrize("kind", ["foreach", "fused"])
def test_an_update_on_the_gpu_that_does_not_wait_fails_the_save(open_manager: Open, kind: str) -> None:
    model, optimizer = _trained(kind)
    with held_captures() as gate, open_manager(capture="overlap") as manager:
        pending = _save(manager, 1, {"model": model})
        _backward(model)
        optimizer.step()
        gate.open()
        with pytest.raises(SaveFailed, match=StateChanged.__name__):
            pending.wait()
        _save(manager, 2, {"model": model}).wait()


def test_an_export_is_cast_on_the_gpu(open_manager: Open, run_dir: Path) -> None:
    model, _ = _trained("fused")
    series = [Series("hf", HuggingFace(dtype=torch.bfloat16))]
    with open_manager(capture="overlap", series=series) as manager:
        _save(manager, 1, {"model": model}, "hf").wait()
    found = load_file(run_dir / "hf" / "hf-1" / "model.safetensors")
    assert same(found, {name: tensor.bfloat16() for name, tensor in _copy(model).items()})
