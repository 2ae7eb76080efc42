"""What `save_pretrained` and what ckptmgr make of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckptmgr import DCP, CheckpointManager, HuggingFace, Series

MAX_SHARD_SIZE = 20_000


def published(model: Any, into: Path) -> Path:
    """What ``save_pretrained`` makes of *model*, in several shards."""
    model.save_pretrained(into, max_shard_size=MAX_SHARD_SIZE)
    return into


def exported(model: Any, run: Path, **options: Any) -> Path:
    """What ckptmgr makes of *model*: step 1 as a checkpoint and as an export, whose directory is returned."""
    export = HuggingFace(max_shard_size=MAX_SHARD_SIZE, **options)
    with CheckpointManager(run, series=[Series("checkpoint", DCP()), Series("hf", export)]) as manager:
        manager.save(1, {"model": model})
        manager.save(1, {"model": model}, series="hf")
    return run / "hf" / "hf-1"
