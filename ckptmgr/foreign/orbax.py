"""
Orbax: a directory per step, named by its number, with a directory per item; or one such directory.

On a local disk a step is written as ``N.orbax-checkpoint-tmp`` and renamed, on others ``commit_success.txt`` is
written last. ``_CHECKPOINT_METADATA`` has the items and the time of the commit. Arrays are in OCDBT, or each in a
directory of zarr (google/orbax 0.11 and 0.12, checkpoint/orbax/checkpoint/_src/path/atomicity.py).
"""

from __future__ import annotations

import itertools
import math
import os
import re
import struct
from collections.abc import Iterator
from typing import Any

from ckptmgr.errors import CheckpointError
from ckptmgr.foreign import ocdbt, zstd
from ckptmgr.foreign.contents import Fault, Look, at, refuse_zeros
from ckptmgr.foreign.ground import Folder, Kind
from ckptmgr.foreign.layout import NUMBER, Checkpoint, Found, gaps, numbered, step_of, unfinished
from ckptmgr.foreign.ocdbt import MANIFEST
from ckptmgr.resume import Level

LAYOUT = "Orbax"
ABOUT = "_CHECKPOINT_METADATA"
TREE = "_METADATA"
_DESCRIPTIONS = (TREE, "_sharding", "metadata", "metrics")
_COMMITTED = "commit_success.txt"
_STEP = re.compile(rf"(?:[A-Za-z]\w*_)?{NUMBER}", re.ASCII)
_TMP = ".orbax-checkpoint-tmp"
_TEMPORARY = rf".+{re.escape(_TMP)}.*"
_MOST_CHUNKS = 100_000
_MEANS = (
    "it says when it was committed, its items and their descriptions are there, and data files have the bytes that "
    "their manifest needs"
)


def find(folder: Folder, claimed: set[str]) -> list[Found]:
    """Steps, if one of them is Orbax's, or the directory itself."""
    found = Found(LAYOUT, "checkpoint", _MEANS, [])
    if not folder.path and (_is_itself(folder) or (is_one(folder) and not _has_ones(folder))):
        found.checkpoints.append(Checkpoint(folder, step_of(folder.root.name), judge))
        return [found]
    steps = [each for each in numbered(folder, _STEP.pattern, judge) if each.path not in claimed]
    known = {each.path for each in steps} | claimed
    steps += [
        Checkpoint(below, step_of(name), judge)
        for name, below in folder.folders()
        if below.path not in known and below.has(ABOUT) and not name.startswith(".") and _TMP not in name
    ]
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
        if _is_itself(folder):
            return True
        return any(below.has(name) for _, below in folder.folders() for name in (TREE, MANIFEST))
    except (OSError, CheckpointError):
        return False


def _is_itself(folder: Folder) -> bool:
    return any(folder.has(name) for name in (ABOUT, TREE, MANIFEST))


def _has_ones(folder: Folder) -> bool:
    """Whether there are checkpoints of one item in it, which look like items but have descriptions of their own."""
    return any(
        below.has(ABOUT) or (_is_itself(below) and _STEP.fullmatch(name) is not None)
        for name, below in folder.folders()
    )


def judge(look: Look) -> None:
    """The step's description, and every item."""
    folder = look.folder
    look.unfinished(_TEMPORARY, level=Level.ERROR)
    if not folder.has(_COMMITTED) and any(below.has(_COMMITTED) for _, below in folder.folders()):
        look.note("F010", _COMMITTED, "its items have it, and it has not", level=Level.ERROR)
    items: list[str] = []
    if folder.has(ABOUT) or not folder.has(TREE):
        about = look.json(ABOUT)
        if type(about) is dict:
            if not about.get("commit_timestamp_nsecs"):
                look.note("F010", ABOUT, "it has no time of a commit", level=Level.ERROR)
            handlers = about.get("item_handlers")
            items = [name for name in handlers if "/" not in name] if type(handlers) is dict else []
            if type(handlers) is str and "Tree" in handlers:
                look.file(TREE)
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
    if not {*folder.entries} - {_COMMITTED}:
        look.note("F002", why="an item without files")
    described: dict[str, Any] = {name: look.json(name) for name in _DESCRIPTIONS if _is_there(folder, name)}
    tree = described.get(TREE)
    needed: set[str] = set()
    database = MANIFEST in folder.entries or (type(tree) is dict and bool(tree.get("use_ocdbt")))
    if database:
        needed = ocdbt.judge(look)
        if TREE not in folder.entries:
            look.file(TREE)
    elif type(tree) is dict:
        for name in _arrays(tree.get("tree_metadata")):
            look.directory(name)
    _data(look, needed, "")
    # Which processes write depends on who holds a first replica. Where the database was read, it says what is needed.
    processes = _processes(look, r"ocdbt\.process_", Kind.DIRECTORY, all_of_them=not needed)
    for name in processes:
        below = look.below(name)
        _manifest(below)
        _data(below, needed, f"{name}/")
    for name, inner in folder.folders():
        if name in ("d", "array_metadatas", *processes):
            continue
        if any(inner.has(each) for each in _DESCRIPTIONS):
            _item(look.below(name))
        elif not database:
            _array(
                look.below(name), whole=type(tree) is dict and tree.get("store_array_data_equal_to_fill_value") is True
            )
    if "array_metadatas" in folder.entries and (arrays := look.directory("array_metadatas")) is not None:
        for name in _processes(arrays, "process_", Kind.FILE, all_of_them=not needed):
            arrays.json(name)


def _is_there(folder: Folder, name: str) -> bool:
    return name in folder.entries and not folder.has(name, Kind.DIRECTORY)


def _processes(look: Look, stem: str, kind: Kind, *, all_of_them: bool) -> list[str]:
    """What each process has written under a name with its number."""
    found = look.folder.matching(stem + NUMBER, kind)
    for number in gaps(int(match[1]) for match in found.values() if all_of_them):
        look.note("F007", stem.replace("\\", "") + str(number))
    return [*found]


def _data(look: Look, needed: set[str], prefix: str) -> None:
    """What the database may have left behind besides what it needs."""
    below = look.directory("d") if "d" in look.folder.entries else None
    if below is not None:
        for name in below.folder.entries:
            if f"{prefix}d/{name}" not in needed:
                below.bytes(name)


def _arrays(tree: Any) -> list[str]:
    """The directories of the arrays that have one each."""
    found: list[str] = []
    for about in tree.values() if type(tree) is dict else ():
        value = about.get("value_metadata") if type(about) is dict else None
        keys = about.get("key_metadata") if type(about) is dict else None
        if type(value) is not dict or value.get("value_type") not in ("jax.Array", "np.ndarray"):
            continue
        if type(keys) is list and all(type(key) is dict and "key" in key for key in keys):
            found.append(".".join(str(key["key"]) for key in keys))
    return [name for name in found if "/" not in name]


def _array(look: Look, *, whole: bool) -> None:
    """An array of zarr: its description and its chunks; those that are all zeros are left out unless it is *whole*."""
    name = next((name for name in (".zarray", "zarr.json") if look.folder.has(name)), ".zarray")
    about = look.json(name)
    compressor = about.get("compressor") if type(about) is dict else None
    compressed = type(compressor) is dict and compressor.get("id") == "zstd"
    found: set[str] = set()
    waiting = [(look, "")]
    while waiting:
        place, prefix = waiting.pop()
        waiting += [(place.below(name), f"{prefix}{name}/") for name, _ in place.folder.folders()]
        for chunk in place.folder.matching(r"[0-9.]+|c"):
            place.bytes(chunk)
            if compressed and not _is_whole(place.folder, chunk):
                place.note("F003", chunk, "compressed, and without its end")
            found.add(prefix + chunk)
    for chunk in _chunks(about) if whole and type(about) is dict else ():
        if chunk not in found:
            look.note("F002", chunk)


def _is_whole(folder: Folder, chunk: str) -> bool:
    """As far as it can be read; that it cannot is said elsewhere."""
    try:
        with folder.opened(chunk) as descriptor:
            size = os.fstat(descriptor).st_size
            return not size or zstd.is_whole(lambda place, count: os.pread(descriptor, count, place), size)
    except OSError:
        return True


def _chunks(about: dict[str, Any]) -> Iterator[str]:
    """The names of the chunks of an array, if they can be told and are not too many."""
    grid = about.get("chunk_grid")
    grid = grid.get("configuration") if type(grid) is dict else None
    sizes = grid.get("chunk_shape") if type(grid) is dict else about.get("chunks")
    shape = about.get("shape")
    if type(shape) is not list or type(sizes) is not list or len(shape) != len(sizes) or 0 in sizes:
        return
    if not all(type(number) is int and number >= 0 for number in (*shape, *sizes)):
        return
    counts = [-(-length // size) for length, size in zip(shape, sizes, strict=True)]
    if math.prod(counts) > _MOST_CHUNKS:
        return
    for place in itertools.product(*map(range, counts)):
        if grid is not None:
            yield "/".join(("c", *map(str, place)))
        else:
            yield str(about.get("dimension_separator") or ".").join(map(str, place)) or "0"


def _manifest(look: Look) -> None:
    """Of one process, from before they were put together: no longer needed, so only looked at from outside."""
    if look.file(MANIFEST) is None:
        return
    try:
        with look.folder.opened(MANIFEST) as descriptor:
            size = os.fstat(descriptor).st_size
            refuse_zeros(descriptor, size)
            magic, length = struct.unpack(">I8s", at(descriptor, 0, 12))
            (length,) = struct.unpack("<Q", length)
            if magic != ocdbt.MANIFEST_MAGIC:
                raise Fault("F006", "no manifest of OCDBT")
            if length != size:
                raise Fault("F003", f"{size} bytes, {length} by its header")
    except Fault as fault:
        look.note(fault.id, MANIFEST, fault.why)
    except OSError as error:
        look.note("F006", MANIFEST, str(error.strerror))
