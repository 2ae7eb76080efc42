"""
Checkpoints of ckptmgr without a journal: directories that were copied out of their run, judged by their manifest.

A run directory whose journal is lost is no such thing: `ckptmgr recover --rebuild` makes its journal anew.
"""

from __future__ import annotations

import os
import re

from ckptmgr.errors import CheckpointError
from ckptmgr.foreign.contents import Fault, Look, at
from ckptmgr.foreign.ground import Folder
from ckptmgr.foreign.layout import NUMBER, Checkpoint, Found, step_of, unfinished
from ckptmgr.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Digest, FileEntry, Manifest
from ckptmgr.reach import READ_BYTES

LAYOUT = "ckptmgr without a journal"
_MEANS = "every file that the manifest names is there in its size, and with --deep in its bytes"
_FINAL = re.compile(f"(?:step|hf)-{NUMBER}", re.ASCII)


def find(folder: Folder, claimed: set[str]) -> list[Found]:
    """Every directory with a manifest, and those beside it whose manifest is missing."""
    del claimed
    directories = {name: below for name, below in folder.folders() if not name.startswith(".")}
    if not folder.path and folder.has(MANIFEST_NAME):
        directories = {folder.root.name: folder}
    series: dict[str, Found] = {}
    for name, below in directories.items():
        if below.has(MANIFEST_NAME):
            kind = _series(name)
            series.setdefault(kind, Found(LAYOUT, kind, _MEANS, []))
    for name, below in directories.items():
        if _series(name) in series and (below.has(MANIFEST_NAME) or _FINAL.fullmatch(name)):
            series[_series(name)].checkpoints.append(Checkpoint(below, step_of(name), judge))
    for found in series.values():
        unfinished(folder, found.faults, rf"\.(?:step|hf)-{NUMBER}\.e[0-9]+\.a[0-9]+\.incomplete")
    return [*series.values()]


def _series(name: str) -> str:
    return "hf" if name.startswith("hf-") else "checkpoint"


def judge(look: Look) -> None:
    """Everything that the manifest names."""
    manifest = _manifest(look)
    if manifest is None:
        return
    expected = {entry.path: entry for entry in manifest.files}
    for path, entry in expected.items():
        _file(look, path, entry)
    for name in look.folder.matching(".*"):
        if name not in expected and name != MANIFEST_NAME:
            look.note("F013", name)
    if look.asked.world_size not in (None, manifest.world_size) and manifest.per_rank:
        kept = ", ".join(manifest.per_rank)
        look.note("F014", why=f"by {manifest.world_size} ranks, and each has its own {kept}")


def _manifest(look: Look) -> Manifest | None:
    if (entry := look.file(MANIFEST_NAME)) is None:
        return None
    try:
        if entry.size > MAX_MANIFEST_BYTES:
            raise Fault("F006", f"{entry.size} bytes are too many for a manifest")
        with look.folder.opened(MANIFEST_NAME) as descriptor:
            return Manifest.from_json(at(descriptor, 0, min(entry.size, os.fstat(descriptor).st_size)))
    except Fault as fault:
        look.note(fault.id, MANIFEST_NAME, fault.why)
    except (OSError, CheckpointError) as error:
        look.note("F006", MANIFEST_NAME, getattr(error, "message", None) or str(error))
    return None


def _file(look: Look, path: str, expected: FileEntry) -> None:
    name = path.rpartition("/")[2]
    below = look.folder_of(path)
    if below is None or (entry := below.file(name, empty=not expected.size)) is None:
        return
    if entry.size != expected.size:
        below.note("F003", name, f"{entry.size} bytes, {expected.size} by the manifest")
    elif below.asked.deep and _digest(below, name) != expected.digest:
        below.note("F009", name)


def _digest(look: Look, name: str) -> str | None:
    digest = Digest()
    try:
        with look.folder.opened(name) as descriptor:
            while data := os.read(descriptor, READ_BYTES):
                digest.update(data)
                look.asked.progress(len(data))
    except OSError as error:
        look.note("F006", name, str(error.strerror))
    return digest.text
