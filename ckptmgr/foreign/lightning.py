"""
Lightning: ``NAME.ckpt``, a file of ``torch.save``, or a directory of that name with shards.

A sharded one is a DCP directory with ``meta.pt`` (FSDP, ModelParallel), or has DeepSpeed's files in ``checkpoint``
(Lightning-AI/pytorch-lightning, src/lightning/pytorch/callbacks/model_checkpoint.py and strategies/).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from ckptmgr.foreign import dcp, deepspeed
from ckptmgr.foreign.contents import Look
from ckptmgr.foreign.ground import Folder, Kind
from ckptmgr.foreign.layout import Checkpoint, Found, step_of

LAYOUT = "Lightning"
_MEANS = (
    "each file is a whole archive, and each sharded directory is whole as for DCP or DeepSpeed; nothing says which "
    "entries there should be"
)
_NAME = r".+\.ckpt"
_VERSION = re.compile(r"version_[0-9]+", re.ASCII)
_LAST = re.compile(r"last(?:-v[0-9]+)?\.ckpt")


def find(folder: Folder, claimed: set[str]) -> list[Found]:
    """Every ``.ckpt`` in it; below a log directory, those of each version."""
    del claimed
    found = Found(LAYOUT, "checkpoint", _MEANS, [])
    places = [(0, folder), *_versions(folder)]
    for generation, place in places:
        _place(place, 2 * generation, found)
    if not folder.path and folder.root.name.endswith(".ckpt") and _is_sharded(folder):
        found.checkpoints.append(Checkpoint(folder, _step(folder.root.name), judge_directory))
    return [found] if found.checkpoints else []


def _versions(folder: Folder) -> Iterator[tuple[int, Folder]]:
    """The checkpoint directory of each version of the default logger, with the version's number from 1."""
    if folder.path:
        return
    for logs in (folder, *(below for name, below in folder.folders() if name == "lightning_logs")):
        for version, below in logs.folders():
            for inner, place in below.folders() if _VERSION.fullmatch(version) else ():
                if inner == "checkpoints":
                    yield 1 + (step_of(version) or 0), place


def _place(folder: Folder, generation: int, found: Found) -> None:
    for kind in (Kind.FILE, Kind.DIRECTORY):
        for name in folder.matching(_NAME, kind):
            # The one that is called so is written after the others, and has no step in its name.
            newer = generation + bool(_LAST.fullmatch(name))
            if kind is Kind.FILE:
                file = functools.partial(judge_file, name=name)
                found.checkpoints.append(Checkpoint(folder, _step(name), file, name, newer))
            else:
                below = folder.folder(name)
                found.checkpoints.append(Checkpoint(below, _step(name), judge_directory, generation=newer))
    for name in folder.matching(_NAME, Kind.LINK):
        target = folder.link(name) or ""
        if target.rpartition("/")[2] not in folder.entries:
            found.faults.add("F011", folder.folder(name).path, f"a link to {target}")


def _step(name: str) -> int | None:
    stated = re.findall(r"(?:step|global_step)=([0-9]{1,18})", name, re.ASCII)
    return int(stated[-1]) if stated else None if _LAST.fullmatch(name) else step_of(name.removesuffix(".ckpt"))


def judge_file(look: Look, *, name: str) -> None:
    """One that is a file."""
    look.archive(name)


def _is_sharded(folder: Folder) -> bool:
    return dcp.is_one(folder) or folder.has("checkpoint", Kind.DIRECTORY)


def judge_directory(look: Look) -> None:
    """One with shards."""
    if look.folder.has("checkpoint", Kind.DIRECTORY):
        deepspeed.require_latest(look)
        deepspeed.judge(look.below("checkpoint"))
        return
    look.archive("meta.pt")
    dcp.weights(look)
