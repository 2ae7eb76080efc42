"""
Megatron-LM: ``latest_checkpointed_iteration.txt`` and directories ``iter_N``, or ``release``.

A distributed checkpoint is a DCP directory with ``common.pt`` and ``metadata.json``; an older one has a directory
``mp_rank_TT[_PPP[_EEE]]`` for each model-parallel rank with ``model_optim_rng.pt`` and maybe ``distrib_optim.pt``.
The tracker is written last and in place (NVIDIA/Megatron-LM, megatron/training/checkpointing.py).
"""

from __future__ import annotations

import functools
import itertools
import math
import re

from ckptmgr.errors import CheckpointError
from ckptmgr.foreign import dcp
from ckptmgr.foreign.contents import Look
from ckptmgr.foreign.ground import Folder, Kind
from ckptmgr.foreign.layout import NUMBER, Checkpoint, Found, is_newest, judge_missing, numbered, step_of
from ckptmgr.resume import Level

LAYOUT = "Megatron"
TRACKER = "latest_checkpointed_iteration.txt"
_RANK = r"mp_rank_([0-9]{1,9})(?:_([0-9]{1,9}))?(?:_([0-9]{1,9}))?"
_MEANS = (
    "the tracker names it or a newer one; a distributed checkpoint is whole as for DCP; of an older one each file is "
    "a whole archive, and no model-parallel rank is missing between others"
)


def find(folder: Folder, claimed: set[str]) -> list[Found]:
    """Directories of iterations, or one of them."""
    del claimed
    found = Found(LAYOUT, "checkpoint", _MEANS, numbered(folder, f"iter_{NUMBER}", judge))
    tracked = folder.line(TRACKER)
    if folder.has(TRACKER) and folder.has("release", Kind.DIRECTORY):
        found.checkpoints.append(Checkpoint(folder.folder("release"), None, judge))
    if not folder.path and (folder.matching(_RANK, Kind.DIRECTORY) or folder.has("common.pt")):
        found.checkpoints.append(Checkpoint(folder, step_of(folder.root.name), judge))
        return [found]
    if not folder.has(TRACKER) and not any(_is_one(each.folder) for each in found.checkpoints):
        return []
    names = {each.folder.path.rpartition("/")[2]: each for each in found.checkpoints}
    if not folder.has(TRACKER):
        found.faults.add("F011", TRACKER, "it is missing")
    elif tracked is None or not re.fullmatch(f"{NUMBER}|release", tracked, re.ASCII):
        found.faults.add("F011", TRACKER, f"it says {tracked!r}: training would stop there, and with status 0")
    elif tracked == "release":
        if tracked not in names:
            found.faults.add("F011", TRACKER, "it names release")
    elif is_newest(int(tracked), found.checkpoints):
        found.checkpoints.append(Checkpoint(folder.folder(f"iter_{int(tracked):07}"), int(tracked), judge_missing))
    elif int(tracked) not in (each.step for each in names.values()):
        found.faults.add("F011", TRACKER, f"it names iteration {tracked}")
    else:
        found.checkpoints = [
            each
            if each.step is None or each.step <= int(tracked)
            else Checkpoint(each.folder, each.step, functools.partial(judge, tracked=tracked))
            for each in found.checkpoints
        ]
    return [found]


def _is_one(folder: Folder) -> bool:
    try:
        return folder.has("metadata.json") or bool(folder.matching(_RANK, Kind.DIRECTORY))
    except (OSError, CheckpointError):
        return False


def judge(look: Look, *, tracked: str | None = None) -> None:
    """One iteration. *tracked* is what the tracker names instead, if that is older than this one."""
    ranks = look.folder.matching(_RANK, Kind.DIRECTORY)
    if tracked is not None:
        # With ranks of their own nothing but the tracker says that all of them were through.
        level = Level.ERROR if ranks else Level.WARNING
        look.note("F012", why=f"the tracker still names iteration {tracked}", level=level)
    if ranks:
        _ranks(look, ranks)
    else:
        _distributed(look)


def _distributed(look: Look) -> None:
    about = look.json("metadata.json")
    backend = about.get("sharded_backend") if type(about) is dict else None
    if backend == "zarr":
        look.note("F015", why="its arrays are of the zarr backend and are not looked at")
        return
    if look.folder.has("common.pt") or backend != "fsdp_dtensor":
        look.archive("common.pt")
    dcp.weights(look)


def _ranks(look: Look, ranks: dict[str, re.Match[str]]) -> None:
    optimizers = False
    for name in ranks:
        below = look.directory(name)
        if below is None:
            continue
        below.archive("model_optim_rng.pt")
        for each in below.folder.matching(r".*\.pt"):
            optimizers |= each == "distrib_optim.pt"
            if each != "model_optim_rng.pt":
                below.archive(each)
    if optimizers:
        for name in ranks:
            below = look.below(name)
            if not below.folder.has("distrib_optim.pt"):
                below.file("distrib_optim.pt")
    _missing(look, ranks)


def _missing(look: Look, ranks: dict[str, re.Match[str]]) -> None:
    """Which model-parallel ranks are not there."""
    places = {tuple(int(part) for part in match.groups() if part is not None) for match in ranks.values()}
    widest = max(map(len, places))
    sizes = [1 + max(place[axis] for place in places if len(place) > axis) for axis in range(widest)]
    # What the arguments say that it was started with. With one pipeline stage, the second number is the expert's.
    first = look.below(next(iter(ranks)))
    tensor = first.said("model_optim_rng.pt", "tensor_model_parallel_size") or 1
    pipeline = first.said("model_optim_rng.pt", "pipeline_model_parallel_size") or 1
    sizes[0] = max(sizes[0], tensor)
    if pipeline > 1 and widest > 1:
        sizes[1] = max(sizes[1], pipeline)
    if math.prod(sizes) <= 1 << 20:
        for place in itertools.product(*map(range, sizes)):
            if place not in places:
                name = f"mp_rank_{place[0]:02}" + "".join(f"_{part:03}" for part in place[1:])
                look.note("F007", f"{name}/model_optim_rng.pt")
    else:
        look.note("F015", why=f"ranks up to {sizes} are too many to look for")
    together = math.prod(sizes[:2])
    if look.asked.world_size is not None and look.asked.world_size % together:
        look.note("F014", why=f"by {together} model-parallel ranks, of which {look.asked.world_size} is no multiple")
