"""
Orbax: a directory per step, named by its number, with a directory per item; or one such directory.

On a local disk a step is written as ``N.orbax-checkpoint-tmp`` and renamed, on others ``commit_success.txt`` is
written last. ``_CHECKPOINT_METADATA`` has the items and the time of the commit. Arrays are in OCDBT: a manifest,
which begins with a magic number and its own length, and data files whose names stand in it, compressed
(google/orbax 0.11, checkpoint/orbax/checkpoint/_src/path/atomicity.py; TensorStore, OCDBT storage format).
"""

from __future__ import annotations

import os
import struct
from typing import Any

from ckptmgr.errors import CheckpointError
from ckptmgr.foreign.contents import Fault, Look, at, refuse_zeros
from ckptmgr.foreign.ground import Folder, Kind
from ckptmgr.foreign.layout import NUMBER, Checkpoint, Found, gaps, numbered, step_of, unfinished
from ckptmgr.resume import Level

LAYOUT = "Orbax"
ABOUT = "_CHECKPOINT_METADATA"
TREE = "_METADATA"
MANIFEST = "manifest.ocdbt"
_DESCRIPTIONS = (TREE, "_sharding", "metadata")
_TEMPORARY = r".+\.orbax-checkpoint-tmp.*"
_MAGIC = 0x0CDB3A2A
_MEANS = (
    "it says when it was committed, its items and their descriptions are there, manifests have their size and no "
    "process is missing between others; which data files a manifest needs is not read"
)


def find(folder: Folder, claimed: set[str]) -> list[Found]:
    """Steps, if one of them is Orbax's, or the directory itself."""
    found = Found(LAYOUT, "checkpoint", _MEANS, [])
    if not folder.path and is_one(folder):
        found.checkpoints.append(Checkpoint(folder, step_of(folder.root.name), judge))
        return [found]
    steps = [each for each in numbered(folder, rf"(?:[A-Za-z]\w*_)?{NUMBER}", judge) if each.path not in claimed]
    sure = [each for each in steps if is_one(each.folder)]
    leftovers = unfinished(folder, found.faults, _TEMPORARY)
    if not sure and not leftovers:
        return []
    prefixes = {each.folder.path.rstrip("0123456789") for each in sure}
    found.checkpoints = [each for each in steps if each.folder.path.rstrip("0123456789") in prefixes]
    return [found]


def is_one(folder: Folder) -> bool:
    """Whether it has descriptions of Orbax, itself or in an item."""
    try:
        if any(folder.has(name) for name in (ABOUT, TREE, MANIFEST)):
            return True
        return any(below.has(name) for _, below in folder.folders() for name in (TREE, MANIFEST))
    except (OSError, CheckpointError):
        return False


def judge(look: Look) -> None:
    """The step's description, and every item."""
    folder = look.folder
    look.unfinished(_TEMPORARY, level=Level.ERROR)
    items: list[str] = []
    if folder.has(ABOUT) or not folder.has(TREE):
        about = look.json(ABOUT)
        if type(about) is dict:
            if not about.get("commit_timestamp_nsecs"):
                look.note("F010", ABOUT, "it has no time of a commit", level=Level.ERROR)
            handlers = about.get("item_handlers")
            items = [name for name in handlers if "/" not in name] if type(handlers) is dict else []
    if folder.has(TREE):
        _item(look)
    for name in dict.fromkeys((*items, *(name for name, _ in folder.folders()))):
        if not folder.has(TREE) or name in items:
            below = look.directory(name)
            if below is not None and not name.endswith("tmp"):
                _item(below)


def _item(look: Look) -> None:
    folder = look.folder
    look.unfinished(_TEMPORARY, level=Level.ERROR)
    if not folder.entries:
        look.note("F002", why="an item without files")
    described: dict[str, Any] = {name: look.json(name) for name in _DESCRIPTIONS if name in folder.entries}
    tree = described.get(TREE)
    if MANIFEST in folder.entries or (type(tree) is dict and tree.get("use_ocdbt")):
        _manifest(look)
        if TREE not in folder.entries:
            look.file(TREE)
    _data(look)
    for name in _processes(look, r"ocdbt\.process_", Kind.DIRECTORY):
        below = look.below(name)
        _manifest(below)
        _data(below)
    if "array_metadatas" in folder.entries and (arrays := look.directory("array_metadatas")) is not None:
        for name in _processes(arrays, "process_", Kind.FILE):
            arrays.json(name)


def _processes(look: Look, stem: str, kind: Kind) -> list[str]:
    """What each process has written under a name with its number."""
    found = look.folder.matching(stem + NUMBER, kind)
    for number in gaps(int(match[1]) for match in found.values()):
        look.note("F007", stem.replace("\\", "") + str(number))
    return [*found]


def _data(look: Look) -> None:
    below = look.directory("d") if "d" in look.folder.entries else None
    if below is not None:
        for name in below.folder.entries:
            below.bytes(name)


def _manifest(look: Look) -> None:
    if look.file(MANIFEST) is None:
        return
    try:
        with look.folder.opened(MANIFEST) as descriptor:
            size = os.fstat(descriptor).st_size
            refuse_zeros(descriptor, size)
            magic, length = struct.unpack(">I8s", at(descriptor, 0, 12))
            (length,) = struct.unpack("<Q", length)
            if magic != _MAGIC:
                raise Fault("F006", "no manifest of OCDBT")
            if length != size:
                raise Fault("F003", f"{size} bytes, {length} by its header")
    except Fault as fault:
        look.note(fault.id, MANIFEST, fault.why)
    except OSError as error:
        look.note("F006", MANIFEST, str(error.strerror))
