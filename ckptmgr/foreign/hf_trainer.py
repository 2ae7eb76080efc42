"""
Trainer of transformers: ``checkpoint-N`` in the output directory.

Weights come first, then optimizer, scheduler and RNG, and ``trainer_state.json`` last; nothing says which of them
there should be (huggingface/transformers 5.20, src/transformers/trainer.py, ``_save_checkpoint``). With FSDP the
weights are a DCP directory, with DeepSpeed a ``global_stepN`` in it.
"""

from __future__ import annotations

from ckptmgr.errors import CheckpointError
from ckptmgr.foreign import dcp, deepspeed, huggingface
from ckptmgr.foreign.contents import Look
from ckptmgr.foreign.ground import Folder, Kind
from ckptmgr.foreign.layout import NUMBER, Checkpoint, Found, gaps, numbered, step_of, unfinished
from ckptmgr.resume import Level

LAYOUT = "Hugging Face Trainer"
STATE = "trainer_state.json"
_MEANS = (
    "trainer_state.json, which is written last, is there and of this step, the weights are whole, and no rank is "
    "missing between others; that the last ranks' RNG files are missing cannot be told"
)
_RNG = rf"rng_state_{NUMBER}\.pth"
_OTHERS = r"(?:optimizer|scheduler|scaler|training_args|pytorch_model_fsdp|rng_state)(?:_[0-9]+)?\.(?:pt|bin|pth)"


def find(folder: Folder, claimed: set[str]) -> list[Found]:
    """``checkpoint-N`` in an output directory, or one of them."""
    del claimed
    steps = numbered(folder, f"checkpoint-{NUMBER}", judge)
    found = Found(LAYOUT, "checkpoint", _MEANS, steps if any(_is_one(each.folder) for each in steps) else [])
    # The state and the arguments are also left in the output directory itself when training ends.
    if not folder.path and folder.has(STATE) and {*folder.matching(_OTHERS)} - {"training_args.bin"}:
        found.checkpoints.append(Checkpoint(folder, step_of(folder.root.name), judge))
    if found.checkpoints:
        unfinished(folder, found.faults, f"tmp-checkpoint-{NUMBER}")
    return [found] if found.checkpoints else []


def _is_one(folder: Folder) -> bool:
    """Whether a Trainer has begun to write into it; others name their directories so as well."""
    try:
        return folder.has(STATE) or bool(folder.matching(_OTHERS))
    except (OSError, CheckpointError):
        return False


def judge(look: Look) -> None:
    """State, weights, and the files of the ranks."""
    folder = look.folder
    state = look.json(STATE)
    step = step_of(folder.path or folder.root.name)
    if type(state) is dict and type(state.get("global_step")) is int and step not in (None, state["global_step"]):
        look.note("F017", STATE, f"step {state['global_step']}")
    for name in folder.matching(r".*\.json"):
        if name != STATE and not name.endswith(".index.json"):
            look.json(name)
    for name in folder.matching(_OTHERS):
        look.archive(name)
    huggingface.texts(look)
    engine = _deepspeed(look)
    parts = folder.matching("(?:pytorch_model_fsdp|optimizer)_[0-9]+", Kind.DIRECTORY)
    for name in parts:
        dcp.weights(look.below(name))
    if not (huggingface.weights(look) or engine or parts or folder.has("pytorch_model_fsdp.bin")):
        look.note("F002", "model.safetensors", "or weights under another of their names")
    _ranks(look, engine=engine, optimizer=bool(parts))


def _deepspeed(look: Look) -> bool:
    names = look.folder.matching(f"global_step{NUMBER}", Kind.DIRECTORY)
    for name in names:
        deepspeed.judge(look.below(name))
    if names or look.folder.has(deepspeed.TRACKER):
        deepspeed.require_latest(look)
    return bool(names)


def _ranks(look: Look, *, engine: bool, optimizer: bool) -> None:
    folder = look.folder
    ranks = {int(match[1]) for match in folder.matching(_RNG).values()}
    optimizer = engine or optimizer or bool(folder.matching(r"optimizer\.(?:pt|bin)"))
    if not optimizer and (ranks or folder.has("rng_state.pth")):
        look.note("F002", "optimizer.pt", "it is written before the RNG files, which are there")
    elif not optimizer:
        why = "neither it nor RNG files: saved with save_only_model, or cut short"
        look.note("F002", "optimizer.pt", why, level=Level.WARNING)
    if optimizer and not engine and not folder.has("scheduler.pt"):
        look.note("F002", "scheduler.pt", "without it, the Trainer does not load the optimizer either")
    if optimizer and not ranks and not folder.has("rng_state.pth"):
        look.note("F002", "rng_state.pth", "it is written after the optimizer, which is there", level=Level.WARNING)
    for rank in gaps(ranks):
        look.note("F007", f"rng_state_{rank}.pth")
    world_size = 1 + max(ranks, default=0)
    if look.asked.world_size not in (None, world_size) and (ranks or folder.has("rng_state.pth")):
        look.note("F014", why=f"by {world_size}, as its RNG files say: others begin with new ones", level=Level.WARNING)
