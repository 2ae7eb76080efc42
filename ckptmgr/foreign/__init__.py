"""
Checkpoints that ckptmgr did not write: which are complete, what is missing or torn, and which one to resume from.

One function, `judge`. Each layout is a file here that finds its checkpoints in a directory and judges one; what all
of them share are `ground` (the directory), `contents` (single files), `indexes` (pickled indexes) and `report`.
Only read, never unpickled freely, without torch; nothing but regular files is opened, and no link is followed
but those of the cache of huggingface_hub into its own blobs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ckptmgr.errors import CheckpointError
from ckptmgr.foreign import (
    copied,
    dcp,
    deepspeed,
    hf_trainer,
    huggingface,
    lightning,
    megatron,
    orbax,
    torch_checkpointing,
    xtuner,
)
from ckptmgr.foreign.contents import Look
from ckptmgr.foreign.ground import Asked, Folder, Kind
from ckptmgr.foreign.layout import Checkpoint, Found
from ckptmgr.foreign.report import Candidate, Faults, ForeignReport, Judged

__all__ = ["LAYOUTS", "Asked", "ForeignReport", "judge"]

#: Those that are surest of themselves first: what one has claimed is not looked at by the next.
LAYOUTS = (
    copied, xtuner, megatron, deepspeed, hf_trainer, lightning, orbax, torch_checkpointing, dcp, huggingface,
)  # fmt: skip
#: Directories in which libraries put their checkpoints.
_PLACES = ("checkpoint", "checkpoints")


def judge(directory: Path, asked: Asked | None = None) -> ForeignReport | None:
    """
    Judge every checkpoint in *directory*, in a directory ``checkpoint`` or ``checkpoints`` of it, or itself as one.

    Args:
        directory: Absolute and free of links.
        asked: What somebody wants to know beyond that.

    Returns:
        What was found out, or None if no layout is recognised.

    Raises:
        UnsafePath: It has more names than are looked at.
        OSError: It cannot be listed.
    """
    asked = asked or Asked()
    root = Folder(directory)
    _ = root.entries
    found: list[Found] = []
    claimed: set[str] = set()
    for name in ("", *(name for name in _PLACES if root.has(name, Kind.DIRECTORY))):
        place = root.folder(name) if name else root
        if name in claimed or any(each.series != "hf" and not one.path for each in found for one in each.checkpoints):
            continue
        for layout in LAYOUTS:
            for each in layout.find(place, claimed):
                new = [one for one in each.checkpoints if one.path not in claimed]
                if new or not each.checkpoints:
                    each.checkpoints = new
                    found.append(each)
                    claimed |= {one.path for one in new}
    # What a checkpoint is made of is judged with it, and is none of its own.
    itself = [each for each in found if each.series != "hf" and any(not one.path for one in each.checkpoints)]
    found = itself or found
    judged = tuple(_judged(each, asked) for each in found)
    return ForeignReport(directory, judged, asked.required) if judged else None


def _judged(found: Found, asked: Asked) -> Judged:
    newest_first = sorted(found.checkpoints, key=lambda each: each.age, reverse=True)
    candidates = tuple(
        _candidate(checkpoint, asked) for checkpoint in newest_first if asked.step in (None, checkpoint.step)
    )
    if not candidates:
        found.faults.add("F001", "", "" if asked.step is None else f"step {asked.step}")
    judged = Judged(found.layout, found.series, found.means, candidates, found.faults.findings())
    newest = judged.chosen
    if asked.min_step is None or newest is None or (newest.step is not None and newest.step >= asked.min_step):
        return judged
    behind = Faults()
    behind.add(
        "F018", "", f"{newest.step if newest.step is not None else 'one that is not known'}, not {asked.min_step}"
    )
    return dataclasses.replace(judged, unmet=behind.findings(newest.path, newest.step))


def _candidate(checkpoint: Checkpoint, asked: Asked) -> Candidate:
    faults = Faults()
    # A fresh view: what was listed to find it may be old by now. But not for each of many files.
    folder = checkpoint.folder if checkpoint.name else Folder(checkpoint.folder.root, checkpoint.folder.path)
    try:
        checkpoint.judge(Look(folder, asked, faults))
    except (OSError, CheckpointError) as error:
        faults.add("F006", "", getattr(error, "message", None) or str(error))
    return Candidate(checkpoint.path, checkpoint.step, faults.findings(checkpoint.path, checkpoint.step))
