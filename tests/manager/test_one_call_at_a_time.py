"""Calls from a second thread, from a hook, or below another call are refused, and do no harm."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptmgr import CheckpointManager, HuggingFace, InvalidArgument, SaveFailed, Series


class _Slow:
    """State whose taking waits, so that a call is certainly under way."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()

    def state_dict(self) -> dict[str, Any]:
        self.begun.set()
        assert self.go_on.wait(30)
        return {"value": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError(state)


def test_a_second_thread_cannot_capture_into_the_memory_of_the_first(tmp_path: Path) -> None:
    slow = _Slow()
    with CheckpointManager(tmp_path / "run") as manager:
        first = threading.Thread(target=manager.save, args=(1, {"slow": slow}))
        first.start()
        assert slow.begun.wait(30)
        with pytest.raises(InvalidArgument, match="under way"):
            manager.save(2, {"t": torch.zeros(3)})
        slow.go_on.set()
        first.join(30)
        pending = manager.save(3, {"t": torch.zeros(3)})
        assert pending is not None
        pending.wait(30)


def test_a_hook_that_closes_its_manager_is_refused_and_the_run_is_free_after_close(tmp_path: Path) -> None:
    refused: list[Exception] = []

    def hook(committed: Any) -> None:
        for call in (manager.close, manager.poll, lambda: manager.save(committed.step + 1, {"t": torch.zeros(1)})):
            try:
                call()
            except InvalidArgument as error:
                refused.append(error)

    manager = CheckpointManager(tmp_path / "run", on_commit=hook)
    pending = manager.save(1, {"t": torch.zeros(3)})
    assert pending is not None
    pending.wait(30)
    manager.close()

    assert len(refused) == 3
    with CheckpointManager(tmp_path / "run") as again:
        assert again.resume({"t": torch.zeros(3)}) is not None


def test_a_hook_that_waits_for_its_own_save_does_not_wait_for_itself(tmp_path: Path) -> None:
    done = threading.Event()

    def hook(committed: Any) -> None:
        pending.wait(60)
        done.set()

    with CheckpointManager(tmp_path / "run", on_commit=lambda committed: ready.wait(30) and hook(committed)) as manager:
        ready = threading.Event()
        pending = manager.save(1, {"t": torch.zeros(3)})
        assert pending is not None
        ready.set()
        assert done.wait(20)


def test_assets_that_are_gone_fail_the_export_instead_of_leaving_it_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    series = [Series("hf", HuggingFace(assets="assets"))]
    with CheckpointManager(tmp_path / "run", series, on_failure="warn") as manager:
        os.chdir("/")
        first = manager.save(1, {"t": torch.zeros(3)}, series="hf")
        assert first is not None
        first.wait(30)
        assert (tmp_path / "run" / "hf" / "hf-1" / "tokenizer.json").is_file()

        shutil.rmtree(tmp_path / "assets")
        second = manager.save(2, {"t": torch.zeros(3)}, series="hf")
        assert second is not None
        with pytest.raises(SaveFailed, match="assets"):
            second.wait(30)
