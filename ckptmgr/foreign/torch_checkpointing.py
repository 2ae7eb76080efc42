"""
torch_checkpointing: a directory with one file ``ITEM_RANK.pt`` per item and rank, and ``metadata.pkl`` where an item
can be resharded.

It is written as ``tmp_NAME`` and renamed when every rank has arrived; nothing is synced (torch_checkpointing 0.1.1,
checkpoint_writer.py, checkpoint_layout.py, metadata_serialization.py).
"""

from __future__ import annotations

import collections
import os
from typing import Any

from ckptmgr.errors import CheckpointError
from ckptmgr.foreign import indexes
from ckptmgr.foreign.contents import Fault, Look
from ckptmgr.foreign.ground import Folder
from ckptmgr.foreign.layout import NUMBER, Checkpoint, Found, siblings, step_of, unfinished
from ckptmgr.manifest import is_plain_relative

LAYOUT = "torch_checkpointing"
INDEX = "metadata.pkl"
_FILE = rf"(.+)_{NUMBER}\.pt"
_MEANS = (
    "every file that metadata.pkl names is whole, and items of several ranks have a file of each rank; which items "
    "there should be is recorded only for those that can be resharded"
)


def find(folder: Folder, claimed: set[str]) -> list[Found]:
    """The directory itself, or those in it, whatever they are called."""
    found = Found(LAYOUT, "checkpoint", _MEANS, [])
    if is_one(folder) and not folder.path:
        found.checkpoints.append(Checkpoint(folder, step_of(folder.root.name), judge))
    found.checkpoints += [
        Checkpoint(below, step_of(name), judge)
        for name, below in folder.folders()
        if below.path not in claimed and not name.startswith("tmp_") and is_one(below)
    ]
    siblings(folder, found.checkpoints, claimed, judge)
    begun = any(name.startswith("tmp_") and is_one(below) for name, below in folder.folders())
    if found.checkpoints or (begun and not folder.path):
        unfinished(folder, found.faults, "tmp_.+")
        return [found]
    return []


def is_one(folder: Folder) -> bool:
    """By an item and its index, or by two items of rank 0: one alone may be anybody's, the index as well."""
    try:
        items = {match[1] for match in folder.matching(_FILE).values() if int(match[2]) == 0}
        return not folder.has(".metadata") and (
            len(items) > 1 or (folder.has(INDEX) and (bool(items) or _describes(folder)))
        )
    except (OSError, CheckpointError):
        return False


def _describes(folder: Folder) -> bool:
    # Many call a pickle so. This one is a mapping that begins with what it says of the items.
    try:
        with folder.opened(INDEX) as descriptor:
            return b"metadata" in os.pread(descriptor, 64, 0)
    except OSError:
        return False


def judge(look: Look) -> None:
    """Every file that is there or should be."""
    ranks: dict[str, set[int]] = collections.defaultdict(set)
    for match in look.folder.matching(_FILE).values():
        ranks[match[1]].add(int(match[2]))
    if not ranks and not look.folder.has(INDEX):
        look.note("F002", "model_0.pt", "or any other item")
    found = indexes.read(look, INDEX, _described) if look.folder.has(INDEX) else None
    named, world_size = found or ({}, None)
    files = look.folder.matching(r".*\.(?:pt|safetensors|json)")
    for name in sorted({*files, *(name for names in named.values() for name in names)}):
        look.any(name)
    most = world_size or 1 + max((rank for those in ranks.values() for rank in those), default=0)
    # Each rank loads the file with its own number.
    for item, those in ranks.items():
        for rank in [rank for rank in range(min(most, 1 << 16)) if rank not in those and item not in named][:1000]:
            look.note("F007", f"{item}_{rank}.pt")
    alone = [item for item in ranks if item not in named]
    if look.asked.world_size not in (None, most) and alone:
        look.note("F014", why=f"by {most}, and {', '.join(sorted(alone)[:3])} cannot be resharded")


def _described(body: Any) -> tuple[dict[str, list[str]], int | None]:
    """The files of each item that can be resharded, and by how many ranks they were saved."""
    items = body.get("metadata") if type(body) is dict else None
    if type(items) is not dict:
        raise Fault("F006", "it describes no items")
    world_size = body.get("world_size")
    named = {item: _files(item, about) for item, about in items.items() if type(item) is str}
    return named, world_size if type(world_size) is int and 0 < world_size < 1 << 20 else None


def _files(item: str, about: Any) -> list[str]:
    layouts = about.get("rank_to_layout_info") if type(about) is dict else None
    if type(layouts) is not dict:
        return []
    names = []
    for rank, layout in layouts.items():
        name = layout.get("file_path") if type(layout) is dict else f"{item}_{rank}.pt"
        if type(rank) is not int or type(name) is not str or not is_plain_relative(name):
            raise Fault("F006", "it names a file outside of its directory")
        if "/" not in name:
            names.append(name)
    return names
