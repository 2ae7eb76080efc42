"""
xtuner: a work directory with ``.xtuner``, experiments in it, and in each ``checkpoints/ckpt-step-N`` and ``hf-N``.

A checkpoint has a DCP directory ``weights`` (``model`` and ``optimizer`` in older versions), which is written as
``weights.incomplete``, and beside it the files of rank 0: ``train_state.json``, ``dataloader``, ``lr_scheduler`` and
the configuration. ``.xtuner`` lists what was finished, by absolute paths, and is written last and in place
(InternLM/xtuner b934f46, xtuner/v1/train/trainer.py).
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from typing import Any

from ckptmgr.foreign import dcp, huggingface
from ckptmgr.foreign.contents import Look
from ckptmgr.foreign.ground import Asked, Folder, Kind
from ckptmgr.foreign.layout import NUMBER, Checkpoint, Found, is_newest, judge_missing, numbered, step_of, unfinished
from ckptmgr.foreign.report import Faults

LAYOUT = "xtuner"
_META = r"\.xtuner(?:_rl_\w+)?"
_CHECKPOINT = rf"(?:ckpt|snapshot)-step-{NUMBER}"
_EXPORT = rf"hf-{NUMBER}"
_LISTS = ("checkpoint_list", "snap_checkpoint_list", "hf_checkpoint_list")
_MEANS = "the weights are whole as for DCP, and train_state.json is there and of this step"
#: What ``weights`` was before it was one directory.
_OLDER_WEIGHTS = ("model", "optimizer")


def find(folder: Folder, claimed: set[str]) -> list[Found]:
    """Checkpoints and exports of all experiments of a work directory, of one experiment, or one checkpoint."""
    del claimed
    metas = folder.matching(_META) if not folder.path else {}
    found = Found(LAYOUT, "checkpoint", _MEANS, [])
    exports = Found(LAYOUT, "hf", f"{huggingface.LAYOUT}: the same", [])
    listed = _listed(folder, metas, found.faults)
    if not folder.path and folder.has("train_state.json") and folder.matching("weights|model", Kind.DIRECTORY):
        found.checkpoints.append(Checkpoint(folder, step_of(folder.root.name), functools.partial(judge, listed=None)))
    experiments = [(folder.root.name, folder), *folder.folders()]
    for generation, (name, experiment) in enumerate(experiments):
        inside = name == "checkpoints" and experiment is not folder
        if not inside and _is_experiment(experiment, marked=bool(metas)):
            _experiment(name, experiment, generation, listed=listed, found=found, exports=exports)
    there = {(_experiment_of(each), each.folder.path.rpartition("/")[2]) for each in found.checkpoints}
    there |= {(_experiment_of(each), each.folder.path.rpartition("/")[2]) for each in exports.checkpoints}
    generations = {name: generation for generation, (name, _) in enumerate(experiments)}
    for experiment_name, name in sorted((listed or set()) - there):
        generation = generations.get(experiment_name, -1)
        match = re.fullmatch(_CHECKPOINT, name, re.ASCII)
        if match and is_newest(int(match[1]), (each for each in found.checkpoints if each.generation == generation)):
            place = experiments[generation][1].folder("checkpoints").folder(name)
            found.checkpoints.append(Checkpoint(place, int(match[1]), judge_missing, generation=generation))
        else:
            found.faults.add("F011", f"{experiment_name}/{name}", "listed in .xtuner, and not there")
    return [each for each in (found, exports) if each.checkpoints or (each is found and metas)]


def _is_experiment(folder: Folder, *, marked: bool) -> bool:
    if folder.matching(_CHECKPOINT, Kind.DIRECTORY):
        return True
    if folder.has("checkpoints", Kind.DIRECTORY):
        places = [below for name, below in folder.folders() if name == "checkpoints"]
        return any(below.matching(_CHECKPOINT, Kind.DIRECTORY) for below in places)
    return marked and bool(folder.matching(_EXPORT, Kind.DIRECTORY))


def _experiment(
    name: str, folder: Folder, generation: int, *, listed: set[tuple[str, str]] | None, found: Found, exports: Found
) -> None:
    places = [folder, *(below for at, below in folder.folders() if at == "checkpoints")]
    for each in itertools.chain.from_iterable(numbered(place, _CHECKPOINT, judge) for place in places):
        known = None if listed is None else (name, each.folder.path.rpartition("/")[2]) in listed
        found.checkpoints.append(
            Checkpoint(each.folder, each.step, functools.partial(judge, listed=known), generation=generation)
        )
    exports.checkpoints += [
        Checkpoint(each.folder, each.step, huggingface.judge, generation=generation)
        for each in numbered(folder, _EXPORT, huggingface.judge)
    ]
    unfinished(folder, exports.faults, rf"\.?hf-{NUMBER}\.incomplete")
    latest = folder.link("hf-latest")
    if latest is not None and not folder.has(latest.rstrip("/").rpartition("/")[2], Kind.DIRECTORY):
        exports.faults.add("F011", folder.folder("hf-latest").path, f"a link to {latest}")


def _experiment_of(checkpoint: Checkpoint) -> str:
    *_, outer, inner = ("", *(checkpoint.folder.root / checkpoint.path).parent.parts)
    return outer if inner == "checkpoints" else inner


def _listed(folder: Folder, metas: Any, faults: Faults) -> set[tuple[str, str]] | None:
    """Experiment and name of every checkpoint that ``.xtuner`` lists; None if there is none that can be read."""
    found: set[tuple[str, str]] = set()
    for name in metas:
        wrong = Faults()
        body = Look(folder, Asked(), wrong).json(name)
        experiments = body.get("exps") if type(body) is dict else None
        if type(experiments) is not list:
            faults.add("F011", name, next((f.text for f in wrong.findings()), "it lists no experiments"))
            return None
        for experiment in experiments:
            found |= {*_of_experiment(experiment)}
    return found if metas else None


def _of_experiment(experiment: Any) -> Iterator[tuple[str, str]]:
    if type(experiment) is not dict or type(experiment.get("exp_dir")) is not str:
        return
    name = experiment["exp_dir"].rstrip("/").rpartition("/")[2]
    for paths in (experiment.get(key) for key in _LISTS):
        for path in paths if type(paths) is list else ():
            if type(path) is str:
                yield name, path.rstrip("/").rpartition("/")[2]


def judge(look: Look, *, listed: bool | None = None) -> None:
    """Weights, and the files of rank 0. *listed* is whether ``.xtuner`` has it; None if it cannot be asked."""
    folder = look.folder
    look.unfinished(r"(?:weights|model|optimizer)\.incomplete")
    older = "weights" not in folder.entries and any(name in folder.entries for name in _OLDER_WEIGHTS)
    for name in _OLDER_WEIGHTS if older else ("weights",):
        below = look.directory(name)
        if below is not None:
            dcp.weights(below)
    state = look.json("train_state.json")
    step = step_of(folder.path or folder.root.name)
    if type(state) is dict and type(state.get("cur_step")) is int and step not in (None, state["cur_step"]):
        look.note("F017", "train_state.json", f"step {state['cur_step']}")
    for name in ("trainer_config.json", "trainer_config.bin", "dataloader", "lr_scheduler"):
        if name.endswith((".json", ".bin")) and name in folder.entries:
            look.any(name)
        elif name in folder.entries:
            look.archive(name)
    if listed is False:
        look.note("F012", why=".xtuner does not list it")
