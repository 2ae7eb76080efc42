"""
Models as ``save_pretrained`` writes them: ``config.json`` and weights, in one file or in shards with an index.

An adapter has ``adapter_config.json`` instead. The index maps each tensor to its file
(huggingface/transformers 5.20, src/transformers/modeling_utils.py; huggingface/safetensors).
"""

from __future__ import annotations

import collections
import re

from ckptmgr.errors import CheckpointError
from ckptmgr.foreign.contents import Look
from ckptmgr.foreign.ground import Folder
from ckptmgr.foreign.layout import Checkpoint, Found, step_of
from ckptmgr.manifest import is_plain_relative
from ckptmgr.resume import Level

LAYOUT = "Hugging Face model"
_MEANS = (
    "every shard that the index names is there, has the size of its header, and the tensors that the index puts "
    "into it; without an index, each file is whole; that no tokenizer or other file is missing cannot be told"
)
_CONFIGS = ("config.json", "adapter_config.json")
_WEIGHTS = r"(?:model|pytorch_model|adapter_model|diffusion_pytorch_model).*\.(?:safetensors|bin)"
_INDEX = r".*\.(?:safetensors|bin)\.index(?:\.\w+)?\.json"
_TEXTS = r".*\.(?:model|tiktoken|jinja)|(?:vocab|merges)\.txt"
_SHARD = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.(safetensors|bin)", re.DOTALL | re.ASCII)


def find(folder: Folder, claimed: set[str]) -> list[Found]:
    """The directory itself, or the directories in it that no other layout has claimed."""
    models: list[Checkpoint] = []
    if not folder.path and (is_one(folder) or _is_begun(folder)):
        # Adapters may stand below the one that is loaded.
        models.append(Checkpoint(folder, step_of(folder.root.name), judge, generation=1))
    models += [
        Checkpoint(below, step_of(name), judge)
        for name, below in folder.folders()
        if below.path not in claimed and is_one(below)
    ]
    return [Found(LAYOUT, "hf", _MEANS, models)] if models else []


def is_one(folder: Folder) -> bool:
    """Whether a model or an adapter has begun to be written there."""
    try:
        config = any(folder.has(name) for name in _CONFIGS)
        weights = bool(folder.matching(_WEIGHTS)) or bool(folder.matching(_INDEX))
        return (
            (config and weights)
            or bool(folder.matching(_INDEX))
            or bool(folder.matching(r"adapter_(?:config|model)\..*"))
        )
    except (OSError, CheckpointError):
        return False


def _is_begun(folder: Folder) -> bool:
    """Whether a model stands there without its config, or without its weights."""
    return folder.has("generation_config.json") and (folder.has("config.json") or bool(folder.matching(_WEIGHTS)))


def judge(look: Look) -> None:
    """Config, weights, and whether all other JSON is whole."""
    if not any(look.folder.has(name) for name in _CONFIGS):
        look.file("config.json")
    indexes = look.folder.matching(_INDEX)
    for name in look.folder.matching(r".*\.json"):
        if name not in indexes:
            look.json(name)
    texts(look)
    if not weights(look):
        look.note("F002", "model.safetensors", "or weights under another of their names")


def texts(look: Look) -> None:
    """What a tokenizer reads, and is no JSON."""
    for name in look.folder.matching(_TEXTS):
        look.bytes(name)


def weights(look: Look) -> bool:
    """All weights, and their indexes. Whether there are any."""
    folder = look.folder
    indexes = folder.matching(_INDEX)
    indexed = {shard for name in indexes for shard in _indexed(look, name)}
    files = [name for name in folder.matching(_WEIGHTS) if name not in indexed]
    sets: dict[tuple[str, str, str], set[int]] = collections.defaultdict(set)
    for name in files:
        look.any(name)
        if (shard := _SHARD.fullmatch(name)) is not None:
            sets[shard[1], shard[3], shard[4]].add(int(shard[2]))
            if indexes:
                look.note("F013", name)
    for (stem, of, suffix), numbers in sets.items():
        if indexes:
            continue
        look.note("F002", f"{stem}.{suffix}.index.json", "there are shards")
        missing = [number for number in range(1, int(of) + 1) if number not in numbers]
        for number in missing[:1000]:
            look.note("F007", f"{stem}-{number:05}-of-{of}.{suffix}")
    return bool(indexes or files)


def _indexed(look: Look, name: str) -> set[str]:
    """Judge the shards of one index; their names."""
    index = look.json(name)
    if index is None:
        return set()
    places = index.get("weight_map") if type(index) is dict else None
    if type(places) is not dict or not all(type(shard) is str for shard in places.values()):
        look.note("F006", name, "it maps no tensors to files")
        return set()
    total: int | None = 0
    shards: dict[str, list[str]] = collections.defaultdict(list)
    for tensor, shard in places.items():
        shards[shard].append(tensor)
    for shard, tensors in shards.items():
        if not is_plain_relative(shard) or "/" in shard:
            look.note("F006", name, "it names a file outside of its directory")
        elif not shard.endswith(".safetensors"):
            look.any(shard)
            total = None
        elif (header := look.tensors(shard)) is not None:
            lost = [tensor for tensor in tensors if tensor not in header]
            for tensor in lost:
                look.note("F008", shard, f"without {tensor}")
            held = [header[tensor]["data_offsets"] for tensor in tensors if tensor in header]
            total = None if lost or total is None else total + sum(end - begin for begin, end in held)
        else:
            total = None
    about = index.get("metadata")
    stated = about.get("total_size") if type(about) is dict else None
    if type(stated) in (int, float) and total not in (None, stated):
        # Nothing reads that number, and tools that edit models leave the old one.
        look.note("F003", name, f"total_size {stated}, its tensors have {total} bytes", level=Level.WARNING)
    return {*shards}
