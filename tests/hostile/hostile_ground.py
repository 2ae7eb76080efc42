"""A real run to take seeds from, and to put what is hostile into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch

from ckptmgr import DCP, CheckpointManager, HuggingFace, PerRank, RandomState, Series, WriterOptions


def state(seed: int = 0) -> dict[str, Any]:
    """Everything a checkpoint may hold: modules, an optimizer, a scheduler, tensors, arrays, values, per-rank state."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.LinearLR(optimizer),
        "tensors": {"bf16": torch.ones(5, dtype=torch.bfloat16), "list": [torch.zeros(2), {"deep": torch.ones(1)}]},
        "plain": {1: "one", "two": [2.0, None], "empty": {}, "tuple": (1, b"bytes", 2 + 1j)},
        "loader": PerRank({"at": 3, "order": numpy.arange(6), "when": numpy.array(["2026-01-01"], dtype="M8[s]")}),
        "random": PerRank(RandomState()),
    }


def train(run: Path) -> None:
    """Save two steps in both formats and leave."""
    assets = run.parent / "assets"
    assets.mkdir(parents=True)
    (assets / "tokenizer.json").write_text("{}")
    series = [Series("checkpoint", DCP()), Series("hf", HuggingFace(assets=assets, max_shard_size=40))]
    with CheckpointManager(run, series, writers=WriterOptions(nice=0)) as manager:
        for step in (1, 2):
            made = state(step)
            for name, what in (("checkpoint", made), ("hf", {"model": made["model"]})):
                pending = manager.save(step, what, name, metrics={"loss": 0.5})
                assert pending is not None
                pending.wait()
