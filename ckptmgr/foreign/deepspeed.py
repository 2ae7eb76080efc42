"""
DeepSpeed: ``latest``, a file with the name of a directory, and directories ``global_stepN`` with a file per rank.

Every data-parallel rank writes ``[bf16_|fp16_]zero_pp_rank_D_mp_rank_MM_optim_states.pt``; the model is in
``mp_rank_MM_model_states.pt``, or with ZeRO-3 in one file per rank too. ``latest`` is written when all ranks are
through, and in place (deepspeedai/DeepSpeed, deepspeed/runtime/engine.py).
"""

from __future__ import annotations

import dataclasses
import functools
import re

from ckptmgr.errors import CheckpointError
from ckptmgr.foreign.contents import Look
from ckptmgr.foreign.ground import Folder, Kind
from ckptmgr.foreign.layout import NUMBER, Checkpoint, Found, gaps, is_newest, judge_missing, numbered, step_of
from ckptmgr.resume import Level

LAYOUT = "DeepSpeed"
TRACKER = "latest"
_STATES = r".*mp_rank_[0-9]+.*_(?:model|optim)_states\.pt"
_OPTIMIZER = rf"(?:bf16_|fp16_)?zero_pp_rank_{NUMBER}_mp_rank_{NUMBER}_optim_states\.pt"
_MODEL = rf"mp_rank_{NUMBER}_model_states\.pt"
_MODEL_3 = rf"zero_pp_rank_{NUMBER}_mp_rank_{NUMBER}_model_states\.pt"
_LAYER = rf"layer_([0-9]+)-model_{NUMBER}-model_states\.pt"
_EXPERT = rf"layer_([0-9]+)_expert_{NUMBER}_mp_rank_([0-9]+)_model_states\.pt"
_EXPERT_OPTIMIZER = rf"expp_rank_{NUMBER}_mp_rank_[0-9]+_optim_states\.pt"
_MEANS = (
    "latest names it or a newer one, each file is a whole archive, and no rank is missing between others; that the "
    "last ranks are missing cannot be told, unless the model's files tell"
)


def find(folder: Folder, claimed: set[str]) -> list[Found]:
    """Every directory with states of ranks, one that ``latest`` names, or the directory itself."""
    tracked = folder.line(TRACKER) if folder.has(TRACKER) else None
    named = {
        below.path: Checkpoint(below, step_of(name), judge)
        for name, below in folder.folders()
        if below.path not in claimed and _has_states(below)
    }
    marked = folder.has(TRACKER) and (str(tracked).startswith("global_step") or folder.has("zero_to_fp32.py"))
    # Converted from one of the others, and loaded only where that is asked for: never before what it was made of.
    named |= {
        path: dataclasses.replace(each, judge=judge_universal, generation=-1)
        for path, each in named.items()
        if each.folder.has("zero", Kind.DIRECTORY)
    }
    if named or marked:
        named = {each.path: each for each in numbered(folder, f"global_step{NUMBER}", judge)} | named
    if not folder.path and _has_states(folder):
        named[""] = Checkpoint(folder, step_of(folder.root.name), judge)
    found = Found(LAYOUT, "checkpoint", _MEANS, [*named.values()])
    if not found.checkpoints and not marked:
        return []
    if "" in named:
        return [found]
    if not tracked:
        found.faults.add("F011", TRACKER, "it is empty or unreadable" if folder.has(TRACKER) else "it is missing")
    elif not folder.has(tracked, Kind.DIRECTORY):
        match = re.fullmatch(f"global_step{NUMBER}", tracked, re.ASCII)
        if match and is_newest(int(match[1]), found.checkpoints):
            found.checkpoints.append(Checkpoint(folder.folder(tracked), int(match[1]), judge_missing))
        else:
            found.faults.add("F011", TRACKER, f"it names {tracked}")
    elif (step := step_of(tracked)) is not None:
        found.checkpoints = [
            each
            if each.step is None or each.step <= step
            else Checkpoint(each.folder, each.step, functools.partial(judge, tracked=tracked))
            for each in found.checkpoints
        ]
    return [found]


def _has_states(folder: Folder) -> bool:
    try:
        return bool(folder.matching(_STATES))
    except (OSError, CheckpointError):
        return False


def require_latest(look: Look) -> None:
    """That ``latest`` names a directory beside it, where nobody could name another one to load."""
    if look.file(TRACKER) is None:
        return
    tag = look.folder.line(TRACKER)
    if not tag or not look.folder.has(tag, Kind.DIRECTORY):
        look.note("F002", tag or TRACKER, "latest names it" if tag else "it names nothing")


def judge_universal(look: Look) -> None:
    """The model, and a directory with files of the optimizer for each parameter."""
    for name in look.folder.matching(r".*\.pt"):
        look.archive(name)
    if not look.folder.matching(_MODEL):
        look.note("F002", "mp_rank_00_model_states.pt")
    zero = look.below("zero")
    for name in zero.folder.matching(".*", Kind.DIRECTORY):
        parameter = zero.below(name)
        parameter.archive("fp32.pt")
        for each in parameter.folder.matching(r".*\.pt"):
            if each != "fp32.pt":
                parameter.archive(each)


def judge(look: Look, *, tracked: str | None = None) -> None:
    """Every rank's file. *tracked* is what ``latest`` names instead, if that is older than this one."""
    if tracked is not None:
        # Written after all ranks are through, it is all that says that they were.
        look.note("F012", why=f"latest still names {tracked}: nothing says that this save has ended", level=Level.ERROR)
    folder = look.folder
    for name in folder.matching(r".*\.pt"):
        look.archive(name)
    optimizer = {(int(m[1]), int(m[2])): name for name, m in folder.matching(_OPTIMIZER).items()}
    model_3 = {(int(m[1]), int(m[2])): name for name, m in folder.matching(_MODEL_3).items()}
    model = {int(match[1]) for match in folder.matching(_MODEL).values()}
    if not (model or model_3):
        look.note("F002", "mp_rank_00_model_states.pt", "or another file of the model")
    _layers(look)
    # What the model's file says of the number of ranks, if it says it (engine.py, ``_save_checkpoint``).
    stated = next(iter(folder.matching(rf"{_MODEL}|{_MODEL_3}")), "")
    saved_by = {key: look.said(stated, f"{key}_world_size") or 0 for key in ("dp", "mp")}
    # One more than the last, so that the last may be missing too.
    for rank in gaps({*model, min(max(saved_by["mp"], 1 + max(model, default=-1)), 1 << 16)} if model else ()):
        look.note("F007", f"mp_rank_{rank:02}_model_states.pt")
    ranks = {*optimizer, *model_3}
    count = max(1 + max((dp for dp, _ in ranks), default=-1), saved_by["dp"] if ranks else 0)
    for dp in range(min(1 << 16, count)):
        for mp in sorted({*model, *(mp for _, mp in ranks)}):
            if optimizer and (dp, mp) not in optimizer:
                look.note("F007", f"zero_pp_rank_{dp}_mp_rank_{mp:02}_optim_states.pt")
            if model_3 and (dp, mp) not in model_3:
                look.note("F007", f"zero_pp_rank_{dp}_mp_rank_{mp:02}_model_states.pt")
    if optimizer and look.asked.world_size not in (None, len(optimizer)):
        look.note("F014", why=f"by {len(optimizer)}; make it universal to resume with another number")


def _layers(look: Look) -> None:
    """With pipelines a file for each layer and model-parallel rank; with experts one for each of a layer."""
    parts = {(m[1], int(m[2])) for m in look.folder.matching(_LAYER).values()}
    experts = {(m[1], int(m[2]), m[3]) for m in look.folder.matching(_EXPERT).values()}
    for layer in sorted({layer for layer, _ in parts}):
        for rank in sorted({rank for _, rank in parts}):
            if (layer, rank) not in parts:
                look.note("F007", f"layer_{layer}-model_{rank:02}-model_states.pt")
    for layer, mp in sorted({(layer, mp) for layer, _, mp in experts}):
        # As many as in the layer that has most.
        there = {number for its, number, rank in experts if (its, rank) == (layer, mp)}
        for number in gaps({*there, 1 + max(number for _, number, _ in experts)}):
            look.note("F007", f"layer_{layer}_expert_{number}_mp_rank_{mp}_model_states.pt")
    for rank in gaps(int(m[1]) for m in look.folder.matching(_EXPERT_OPTIMIZER).values()):
        look.note("F007", f"expp_rank_{rank}_mp_rank_00_optim_states.pt")
