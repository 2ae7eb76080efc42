"""
Checkpoints of ``torch.distributed.checkpoint``: directories with ``.metadata`` and ``.distcp`` files.

torchtitan names them ``step-N``, in a directory ``checkpoint`` of its dump folder, and may leave an export of
the model in the last one; others name them as they like. ``.metadata`` is written last, under a name of its own
first, and says which bytes of which file every piece is (PyTorch 2.13, torch/distributed/checkpoint/filesystem.py;
torchtitan b5bcd76, torchtitan/components/checkpointer/dcp.py).
"""

from __future__ import annotations

import os

from ckptmgr.errors import CheckpointError
from ckptmgr.foreign import huggingface, indexes
from ckptmgr.foreign.contents import Fault, Look, at, check_archive, refuse_zeros
from ckptmgr.foreign.ground import Folder, Kind
from ckptmgr.foreign.layout import NUMBER, Checkpoint, Found, numbered, siblings, step_of, unfinished

LAYOUT = "DCP"
INDEX = ".metadata"
_DATA = rf"__{NUMBER}_{NUMBER}\.distcp"
_MEANS = (
    "every piece that .metadata names stands whole in its file, and every tensor has all of its pieces; "
    "files beside them (data loaders, RNG) are named nowhere"
)


def find(folder: Folder, claimed: set[str]) -> list[Found]:
    """Directories named ``step-N``, and all others with an index or data of DCP that no other layout has claimed."""
    found = Found(LAYOUT, "checkpoint", _MEANS, [])
    steps = numbered(folder, f"step-{NUMBER}", judge)
    known = {checkpoint.path for checkpoint in steps}
    if is_one(folder):
        found.checkpoints.append(Checkpoint(folder, step_of(folder.root.name) if not folder.path else None, judge))
    found.checkpoints += [
        Checkpoint(below, step_of(name), judge)
        for name, below in folder.folders()
        if below.path not in known | claimed and is_one(below) and not name.startswith("tmp_")
    ]
    siblings(folder, found.checkpoints, claimed | known, judge)
    # A directory of that name alone may be anybody's.
    if any(is_one(checkpoint.folder) or huggingface.is_one(checkpoint.folder) for checkpoint in steps):
        found.checkpoints += steps
    leftovers = unfinished(folder, found.faults, f"tmp_step-{NUMBER}")
    return [found] if found.checkpoints or (leftovers and not folder.path) else []


def is_one(folder: Folder) -> bool:
    """Whether DCP has begun to write into it."""
    try:
        return bool(folder.matching(_DATA)) or (folder.has(INDEX) and _may_be_index(folder))
    except (OSError, CheckpointError):
        return False


def _may_be_index(folder: Folder) -> bool:
    # Others have files of that name as well: those of Flutter are text.
    try:
        with folder.opened(INDEX) as descriptor:
            return os.pread(descriptor, 1, 0) in (b"\x80", b"\0", b"")
    except OSError:
        return True


def judge(look: Look) -> None:
    """Everything that the index names; or an export of the model alone, which torchtitan may end with."""
    if not look.folder.has(INDEX) and huggingface.is_one(look.folder) and not is_one(look.folder):
        # Its config is not torchtitan's to write.
        huggingface.weights(look)
        look.note("F015", why="the model alone, exported: a training cannot be resumed from it")
        return
    weights(look)


def weights(look: Look) -> None:
    """Everything that the index names."""
    look.unfinished(r"(?:__[0-9]+)?\.metadata\.tmp", Kind.FILE)
    index = indexes.read(look, INDEX, indexes.of_dcp)
    if index is None:
        for name in look.folder.matching(_DATA):
            look.bytes(name)
        return
    for name in index.homeless:
        look.note("F008", why=name)
    for name, pieces in index.pieces.items():
        _file(look, name, pieces)
    for name in look.folder.matching(_DATA):
        # A rank that had nothing to write has made its file all the same.
        if name not in index.pieces and look.folder.entries[name].size:
            look.note("F013", name)


def _file(look: Look, name: str, pieces: list[indexes.Piece]) -> None:
    last = name.rpartition("/")[2]
    below = look.folder_of(name)
    if below is None or below.file(last) is None:
        return
    try:
        with below.folder.opened(last) as descriptor:
            size = os.fstat(descriptor).st_size
            needed = max(piece.offset + piece.length for piece in pieces)
            if size < needed:
                raise Fault("F003", f"{size} bytes, {needed} by the index")
            if sum(piece.length for piece in pieces) > size:
                raise Fault("F006", "the index has pieces that overlap")
            refuse_zeros(descriptor, size)
            archives = _pieces(below, descriptor, [piece for piece in pieces if piece.plain and piece.length])
            header = not archives and size > 8 and at(descriptor, 8, 1) == b"{"
    except Fault as fault:
        below.note(fault.id, last, fault.why)
    except OSError as error:
        below.note("F006", last, str(error.strerror))
    else:
        if header:
            below.tensors(last)


def _pieces(look: Look, descriptor: int, pieces: list[indexes.Piece]) -> bool:
    """Each is an archive of its own. If not one of them is, another writer wrote them, and they are not judged."""
    begins = [at(descriptor, piece.offset, min(4, piece.length)) for piece in pieces]
    for piece, begin in zip(pieces, begins, strict=True):
        if begin == b"PK\x03\x04":
            check_archive(descriptor, piece.offset, piece.length, look.asked)
        elif b"PK\x03\x04" in begins:
            raise Fault("F006" if any(begin) else "F005", f"what should be an archive, at {piece.offset}")
    return b"PK\x03\x04" in begins
