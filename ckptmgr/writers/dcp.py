"""
Sharded checkpoints in the format of ``torch.distributed.checkpoint``, planned by it and readable by it.

PyTorch plans (which rank writes which piece, without duplicates, for any DTensor placement) and
reads; the bytes are laid out here. A ``.distcp`` file is a row of ``torch.save`` archives, one per
piece (torch/distributed/checkpoint/filesystem.py, 2.13). Everything in such an archive but the
tensor's own bytes is the same from save to save, so it is put into the arena once, and a capture moves
tensor bytes only. Files of rank R: ``__R_0.distcp`` tensors, ``__R_1.distcp`` other values,
``per-rank-R.pt`` its `PerRank` state; of rank 0 also ``.metadata`` and, where there is something to tell,
``mappings.json``: DCP turns integer keys into text and drops empty mappings, and both must come back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import math
import operator
import os
import pickle
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItemType
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from ckptmgr import reach
from ckptmgr.errors import CorruptCheckpoint, InvalidArgument, StateMismatch
from ckptmgr.lifecycle import Format
from ckptmgr.writers import archives
from ckptmgr.writers import state as states
from ckptmgr.writers.arena import Copy, Layout, aligned, available_bytes
from ckptmgr.writers.index import INDEX_NAME, MAX_PATH_PARTS, read_index
from ckptmgr.writers.jobs import FileJob, Segment, SharedFile

log = logging.getLogger("ckptmgr")

MAPPINGS_NAME = "mappings.json"
MAX_MAPPINGS_BYTES = 64 << 20
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")

_Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class DCP:
    """Sharded checkpoints to resume from, loadable with plain ``torch.distributed.checkpoint`` too."""

    @property
    def kind(self) -> Format:
        """The format's word in journal and manifest."""
        return Format.DCP

    def writer(self) -> DCPWriter:
        """The trainer-side half of the writing, one per series and rank."""
        return DCPWriter()


@dataclasses.dataclass
class Taken:
    """
    One rank's state at one save: PyTorch's local plan and what it refers to. No tensor is copied yet.

    ``per_rank_names`` are those of the per-rank state that binds the checkpoint to its number of ranks.
    """

    plan: SavePlan
    in_pieces: frozenset[str]
    tensors: dict[object, torch.Tensor]
    watched: list[tuple[str, torch.Tensor]]
    objects: dict[MetadataIndex, bytes]
    per_rank: bytes | None
    per_rank_names: tuple[str, ...]
    mappings: _Mappings
    signature: bytes


@dataclasses.dataclass(frozen=True)
class _Known:
    """
    What planning found out about a state of one *shape*; it holds for every state of that shape.

    *in_pieces* are the tensors of which this rank has several pieces, *names* are of all tensors in the order
    of the state, *values* say where everything else stands.
    """

    shape: list[Any] | None
    plan: SavePlan
    in_pieces: frozenset[str]
    names: list[str]
    values: list[tuple[MetadataIndex, tuple[Any, ...]]]
    mappings: _Mappings
    signature: bytes


class DCPWriter:
    """
    Plans and lays out DCP checkpoints of one series on one rank.

    The plan is exchanged once and reused while every rank's signature (names, dtypes, shapes, places)
    stays the same.
    """

    kind = Format.DCP

    def __init__(self) -> None:
        self._mine: SavePlan | None = None
        self._known: _Known | None = None
        self._in_pieces: frozenset[str] = frozenset()
        self._metadata: Metadata | None = None
        self._tensor_places: dict[MetadataIndex, _StorageInfo] = {}
        self._objects_of: list[list[MetadataIndex]] = []

    def take(self, state: states.State, rank: int) -> Taken:
        """
        Look at the state to save, without copying a tensor. Other values are serialised now: they may change later.

        Raises:
            InvalidArgument: Not a mapping from names, or a value that could not be read back safely.
        """
        shared, per_rank = states.split(state)
        state_dicts = states.take(shared)
        strict = {name for name, value in shared.items() if isinstance(value, torch.nn.Module | torch.optim.Optimizer)}
        tensors: list[torch.Tensor] = []
        shape = _shape([sorted(strict), sorted(per_rank)], state_dicts, tensors)
        known = self._known
        found: dict[object, torch.Tensor]
        if known is not None and shape is not None and known.shape == shape:
            watched = list(zip(known.names, tensors, strict=True))
            found = {name: tensor._local_tensor if type(tensor) is DTensor else tensor for name, tensor in watched}
        else:
            self._known = None
            known, found, watched = _look(state_dicts, strict, per_rank, rank, shape)
            if shape is not None:
                self._known = known
        objects = {
            index: states.dump(functools.reduce(operator.getitem, path, state_dicts), f"state {index.fqn!r}")
            for index, path in known.values
        }
        own = {name: value.take() for name, value in per_rank.items()}
        blob = states.dump(own, "per-rank state") if own else None
        bound = tuple(sorted(name for name, value in per_rank.items() if value.when_resized == "refuse"))
        return Taken(known.plan, known.in_pieces, found, watched, objects, blob, bound, known.mappings, known.signature)

    def local_plan(self, taken: Taken) -> tuple[SavePlan, dict[MetadataIndex, bytes]]:
        """What rank 0 must know of this rank to plan: PyTorch's plan, and a digest of each value."""
        self._in_pieces = taken.in_pieces
        digests = {index: hashlib.blake2b(data, digest_size=8).digest() for index, data in taken.objects.items()}
        return taken.plan, digests

    def plan_globally(self, locals_: Sequence[tuple[SavePlan, dict[MetadataIndex, bytes]]]) -> list[SavePlan]:
        """
        Rank 0 only: decide which rank writes what. Of a value that several ranks have, the lowest one's is stored.

        Raises:
            InvalidArgument: The pieces do not make up whole tensors, overlap, or differ where they should be copies.
        """
        _check_copies([plan for plan, _ in locals_])
        _warn_of_values_that_differ([digests for _, digests in locals_])
        stored: set[MetadataIndex] = set()
        plans = []
        for plan, digests in locals_:
            items = [i for i in plan.items if i.type is not WriteItemType.BYTE_IO or i.index not in stored]
            stored |= digests.keys()
            plans.append(dataclasses.replace(plan, items=items))
        planner = DefaultSavePlanner()
        try:
            final, metadata = planner.create_global_plan(plans)
        except (ValueError, TypeError, AssertionError, RuntimeError) as error:
            raise InvalidArgument(f"the ranks' state does not fit together: {error}") from error
        self._metadata = metadata
        self._objects_of = [[i.index for i in plan.items if i.type is WriteItemType.BYTE_IO] for plan in final]
        return final

    def lay_out(self, mine: SavePlan, rank: int) -> tuple[Layout, Any]:
        """
        Place this rank's pieces in its arena.

        Returns:
            The layout, and what rank 0 must know of it: where each piece stands in ``__R_0.distcp``.
        """
        self._mine = mine
        name = _tensors_name(rank)
        constants: list[tuple[int, bytes]] = []
        copies: list[Copy] = []
        places: list[tuple[MetadataIndex, _StorageInfo]] = []
        end = 0
        for item in mine.items:
            if item.type is WriteItemType.BYTE_IO or item.tensor_data is None:
                continue
            start = aligned(end)
            shape = tuple(item.tensor_data.chunk.sizes)
            archive = _archive(item.tensor_data.properties.dtype, shape)
            constants += [(start + offset, data) for offset, data in archive.constants]
            copies.append(
                Copy(
                    _key(item.index, self._in_pieces),
                    start + archive.data_offset,
                    item.tensor_data.properties.dtype,
                    shape,
                )
            )
            places.append((item.index, _StorageInfo(name, start, archive.length)))
            end = start + archive.length
        files = (FileJob(name, end, own=True, segments=(Segment(0, 0, end),)),) if copies else ()
        return Layout(end, tuple(constants), tuple(copies), files), places

    def accept_layouts(self, places: Sequence[Any]) -> None:
        """Rank 0 only: remember where every rank's pieces stand."""
        self._tensor_places = dict(pair for of_rank in places for pair in of_rank)

    def report_bytes(self, taken: Taken) -> int:
        """How many bytes this rank's report on a save takes beyond a plain answer: the length of each value."""
        del taken
        assert self._mine is not None
        return 16 * len(self._mine.items)

    def sources(self, taken: Taken) -> dict[object, torch.Tensor]:
        """The tensors to capture, by the keys of the layout's copies."""
        return taken.tensors

    def watched(self, taken: Taken) -> list[tuple[str, torch.Tensor]]:
        """The state's own tensors, by name: an update of a DTensor leaves the version of its local part alone."""
        return taken.watched

    def small_files(self, taken: Taken, rank: int) -> tuple[list[FileJob], Any]:
        """
        Files made of values that are not tensors.

        Returns:
            The files, and for rank 0 the lengths in bytes of this rank's values in plan order.
        """
        assert self._mine is not None
        files = []
        blobs = [taken.objects[item.index] for item in self._mine.items if item.type is WriteItemType.BYTE_IO]
        if blobs:
            data = b"".join(blobs)
            files.append(FileJob(f"__{rank}_1.distcp", len(data), own=True, data=data))
        if rank == 0 and taken.mappings != _Mappings():
            data = taken.mappings.to_json()
            files.append(FileJob(MAPPINGS_NAME, len(data), own=True, data=data))
        if taken.per_rank is not None:
            files.append(FileJob(per_rank_name(rank), len(taken.per_rank), own=True, data=taken.per_rank))
        return files, [len(blob) for blob in blobs]

    def prewrite(self, scratch: Path) -> Iterator[tuple[str, bytes]]:
        """Rank 0 only: small files that stand before any rank writes. None here: ``.metadata`` needs every rank."""
        del scratch
        return iter(())

    def shared_files(self) -> list[SharedFile]:
        """Rank 0 only: files that several ranks write parts of. None here."""
        return []

    def conclude(self, reports: Sequence[Any]) -> Iterator[tuple[str, bytes]]:
        """Rank 0 only: the files that need every rank's report, here ``.metadata``."""
        assert self._metadata is not None
        places = dict(self._tensor_places)
        for rank, (indexes, lengths) in enumerate(zip(self._objects_of, reports, strict=True)):
            offset = 0
            for index, length in zip(indexes, lengths, strict=True):
                places[index] = _StorageInfo(f"__{rank}_1.distcp", offset, length)
                offset += length
        metadata = dataclasses.replace(
            self._metadata, storage_data=places, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION
        )
        yield INDEX_NAME, pickle.dumps(metadata)


def _look(
    state_dicts: dict[str, Any], strict: set[str], names_per_rank: Iterable[str], rank: int, shape: Any
) -> tuple[_Known, dict[object, torch.Tensor], list[tuple[str, torch.Tensor]]]:
    """What is known of a state from now on, its tensors by the keys of copies, and as they are to be watched."""
    planner = DefaultSavePlanner()
    try:
        planner.set_up_planner(state_dicts, is_coordinator=rank == 0)
    except RecursionError as error:
        raise _too_deep() from error
    if max(map(len, planner.mappings.values()), default=0) > MAX_PATH_PARTS:
        raise _too_deep()
    plan = planner.create_local_plan()
    digest = hashlib.blake2b(digest_size=16)
    for item in plan.items:
        data = item.tensor_data
        if data is not None:
            _check_dense(item.index.fqn, planner.lookup_object(item.index))
        about = (data.properties.dtype, data.size, data.chunk.sizes) if data is not None else ()
        digest.update(repr((item.index, item.type, about)).encode())
    digest.update(repr(sorted(names_per_rank)).encode())
    mappings = _Mappings.of({name: below for name, below in state_dicts.items() if name not in strict})
    others = [item.index for item in plan.items if item.type is WriteItemType.BYTE_IO]
    values = list(zip(others, _own_keys(state_dicts, [planner.mappings[index.fqn] for index in others]), strict=True))
    watched = [(name, value) for name, value in planner.state_dict.items() if isinstance(value, torch.Tensor)]
    pieces = [item for item in plan.items if item.type is not WriteItemType.BYTE_IO]
    counts = Counter(item.index.fqn for item in pieces)
    in_pieces = frozenset(name for name, count in counts.items() if count > 1)
    tensors = {_key(item.index, in_pieces): _local(planner.resolve_data(item)) for item in pieces}
    known = _Known(shape, plan, in_pieces, [name for name, _ in watched], values, mappings, digest.digest())
    return known, tensors, watched


def _own_keys(state_dicts: Mapping[str, Any], paths: Iterable[_Path]) -> Iterator[tuple[Any, ...]]:
    """PyTorch's *paths* with the keys that the mappings have themselves, some of them integers."""
    by_name: dict[int, dict[str, Any]] = {}
    for path in paths:
        own: list[Any] = []
        value: Any = state_dicts
        for part in path:
            if isinstance(value, Mapping) and part not in value:
                names = by_name.get(id(value)) or by_name.setdefault(id(value), {str(key): key for key in value})
                part = names[str(part)]  # noqa: PLW2901
            own.append(part)
            value = value[part]
        yield tuple(own)


def _key(index: MetadataIndex, in_pieces: Collection[str]) -> object:
    """What a copy is known by: a name where that is enough, which is hashed once and for all."""
    return index if index.fqn in in_pieces else index.fqn


def _shape(about: list[Any], state_dicts: Mapping[str, Any], tensors: list[torch.Tensor]) -> list[Any] | None:
    """
    All of a state that planning depends on, in a form that is quickly compared; None if that cannot be told.

    Its tensors are appended to *tensors*, in the order in which PyTorch finds them.
    """

    try:
        _describe(state_dicts, about, tensors)
    except (TypeError, RecursionError):
        return None
    return about


def _describe(value: Any, about: list[Any], tensors: list[torch.Tensor]) -> None:
    """One value for `_shape`; as an inner function it would keep the tensors until the next garbage collection."""
    kind = type(value)
    if kind in (torch.Tensor, torch.nn.Parameter):
        tensors.append(value)
        about.append((value.dtype, value.shape, value.layout, value.is_meta, value.is_quantized))
    elif kind is DTensor:
        local = value._local_tensor
        if type(local) is not torch.Tensor:
            raise TypeError
        tensors.append(value)
        about.append((value.device_mesh, value.placements, value.shape, local.dtype, local.shape, local.layout))
        about.append((local.is_meta, local.is_quantized))
    elif isinstance(value, torch.Tensor):
        raise TypeError
    elif isinstance(value, Mapping):
        keys = tuple(value)
        about.append((keys, tuple(map(type, keys))))
        for below in value.values():
            _describe(below, about, tensors)
    elif isinstance(value, list) and any(isinstance(below, torch.Tensor | Mapping | list) for below in value):
        about.append(len(value))
        for below in value:
            _describe(below, about, tensors)
    else:
        about.append(None)  # stored as it is now, whatever it is


def _check_copies(plans: Sequence[SavePlan]) -> None:
    """Refuse a tensor of one name that is not the same on every rank that has it: one copy would be stored for all."""
    seen: dict[MetadataIndex, tuple[int, Any]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            if (data := item.tensor_data) is None:
                continue
            about = (data.properties.dtype, tuple(data.size), tuple(data.chunk.sizes))
            other, known = seen.setdefault(item.index, (rank, about))
            if known != about:
                here, there = (f"{dtype} {list(shape)}" for dtype, shape, _ in (about, known))
                raise InvalidArgument(
                    f"{item.index.fqn!r} is {here} on rank {rank}, but {there} on rank {other}",
                    hint="wrap state that differs by rank in PerRank",
                )


def _warn_of_values_that_differ(digests: Sequence[Mapping[MetadataIndex, bytes]]) -> None:
    first: dict[MetadataIndex, bytes] = {}
    everyone = [pair for of_rank in digests for pair in of_rank.items()]
    differing = {index.fqn for index, digest in everyone if first.setdefault(index, digest) != digest}
    if differing:
        log.warning(
            "%s differs by rank, and only the lowest rank's is stored; wrap what each rank must get back in PerRank",
            ", ".join(sorted(differing)[:5]),
        )


def _too_deep() -> InvalidArgument:
    return InvalidArgument(
        f"state has a value below more than {MAX_PATH_PARTS} names", hint="have state_dict() return it less nested"
    )


def _check_dense(name: str, tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        raise InvalidArgument(f"{name!r} is not a dense tensor with data ({tensor.layout}, {tensor.device})")


def _tensors_name(rank: int) -> str:
    """The file of one rank's pieces of tensors, which lies in its arena as it is."""
    return f"__{rank}_0.distcp"


def per_rank_name(rank: int) -> str:
    """The file of one rank's `PerRank` state."""
    return f"per-rank-{rank}.pt"


def arena_bytes(files: Mapping[str, int], rank: int, *, world_size: int, same_world: bool) -> int:
    """What a save of the state that *files* hold will take in this rank's arena; after resharding an even share."""
    if same_world:
        return files.get(_tensors_name(rank), 0)
    return sum(size for name, size in files.items() if name.endswith("_0.distcp")) // world_size


def read(
    directory: Path, state: states.State, rank: int, *, files: Mapping[str, int], same_world: bool
) -> dict[str, Any]:
    """
    Load a DCP checkpoint into *state*, in place, resharding to how *state* is sharded now.

    Every rank reads for itself; no collective. Keys of the checkpoint that *state* does not ask for
    are ignored; what *state* asks for must be there. Nothing in the directory is trusted: PyTorch plans
    with an index that was compared with *files* before, and opens no file.

    Args:
        directory: A committed checkpoint.
        state: As given to ``save``; tensors are overwritten, objects get ``load_state_dict``.
        rank: Whose `PerRank` state to give back.
        files: The files that were committed and their bytes; nothing else is opened.
        same_world: Whether the number of ranks is the one that saved.

    Returns:
        The plain values read, by name, for the caller to put where it wants.

    Raises:
        StateMismatch: The checkpoint lacks something, or has it in another shape.
        CorruptCheckpoint: A file is not what a checkpoint holds.
    """
    shared, per_rank = states.split(state)
    wanted = {name: value for name, value in per_rank.items() if same_world or value.when_resized == "refuse"}
    if wanted and not same_world:
        raise StateMismatch(f"{sorted(wanted)} was saved by another number of ranks", missing=tuple(sorted(wanted)))
    stored = _read_per_rank(directory, rank, wanted, files) if wanted else {}
    plain: dict[str, Any] = {}
    if shared:
        target = _read_shared(directory, shared, files)
        for name, value in shared.items():
            if isinstance(value, Stateful):
                value.load_state_dict(target[name])
            else:
                plain[name] = target[name]
    for name, value in wanted.items():
        value.give_back(stored[name])
    return plain


def _read_per_rank(directory: Path, rank: int, wanted: Iterable[str], files: Mapping[str, int]) -> dict[str, Any]:
    name = per_rank_name(rank)
    stored: Any = {}
    if name in files:
        with _opened(directory, name, files) as descriptor:
            stored = archives.load(archives.Source(descriptor), str(directory / name))
    if type(stored) is not dict:
        raise _corrupt(directory / name, "it holds no state by name")
    if missing := sorted(set(wanted) - stored.keys()):
        raise StateMismatch(f"the checkpoint has no per-rank state for {missing}", missing=tuple(missing))
    return stored


def _read_shared(directory: Path, shared: Mapping[str, Any], files: Mapping[str, int]) -> dict[str, Any]:
    """The state dicts of *shared* as the checkpoint has them; their tensors are overwritten in place."""
    metadata = read_index(directory, files)
    states.ready_optimizers(shared)
    target = states.take(shared)
    mappings = _Mappings.read(directory / MAPPINGS_NAME) if MAPPINGS_NAME in files else _Mappings()
    try:
        _shape_to(metadata, shared, target, mappings)
        asked = flatten_state_dict(target)[0]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise _corrupt(directory, f"its names make up no state: {error}") from error
    known = metadata.state_dict_metadata
    if missing := [fqn for fqn in asked if fqn not in known]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise StateMismatch(f"the checkpoint lacks {', '.join(missing[:3])}{more}", missing=tuple(missing))
    for fqn, value in asked.items():
        if isinstance(value, torch.Tensor) and not isinstance(known[fqn], TensorStorageMetadata):
            raise StateMismatch(f"{fqn} is a tensor, but not in the checkpoint", missing=())
    planner = _LoadPlanner(mappings)
    planner.set_up_planner(target, metadata)
    try:
        plan = planner.create_local_plan()
    except (RuntimeError, ValueError) as error:
        raise StateMismatch(f"the checkpoint does not fit: {error}", missing=()) from error
    by_file: dict[str, list[ReadItem]] = {}
    for item in plan.items:
        by_file.setdefault(metadata.storage_data[item.storage_index].relative_path, []).append(item)
    for name, items in by_file.items():
        with _opened(directory, name, files) as descriptor:
            for item in items:
                planner.fill(item, descriptor, directory / name)
    return target


@contextlib.contextmanager
def _opened(directory: Path, name: str, files: Mapping[str, int]) -> Iterator[int]:
    """A descriptor of a file of the checkpoint that has the bytes it is to have."""
    with contextlib.ExitStack() as opened:
        try:
            folder = opened.enter_context(reach.directory(directory))
            descriptor = opened.enter_context(reach.regular(folder, name))
            size = os.fstat(descriptor).st_size
        except OSError as error:
            raise _corrupt(directory / name, f"it cannot be read: {error.strerror}") from error
        if size != files[name]:
            raise _corrupt(directory / name, f"it has {size} bytes, {files[name]} were committed")
        yield descriptor


def _corrupt(path: Path, why: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"{path}: {why}", directory=str(path), mismatches=(why,))


def _shape_to(metadata: Metadata, shared: Mapping[str, Any], target: dict[str, Any], mappings: _Mappings) -> None:
    """
    Make *target* ask for what the checkpoint has, for objects whose state dict grows as they are used.

    A fresh scheduler or counter may not have all its keys yet; they would be lost silently. A ready
    optimizer has state for parameters that had none when saved; asking for those would fail.
    """
    paths: Mapping[str, _Path] = metadata.planner_data or {}
    # A list has no more items than there are entries, empty mappings included.
    most = len(paths) + len(mappings.empty)
    for path in (*paths.values(), *mappings.empty):
        if any(type(part) is int and part >= most for part in path):
            raise ValueError("a list is longer than what is in it")
    room = available_bytes()
    for name, value in shared.items():
        if isinstance(value, torch.nn.Module) or not isinstance(target[name], dict):
            continue
        if isinstance(value, torch.optim.Optimizer):
            kept = {path[2] for path in paths.values() if path[:2] == (name, "state") and len(path) > 2}
            of_params = target[name].get("state", {})
            target[name]["state"] = {key: entry for key, entry in of_params.items() if str(key) in kept}
        for path in mappings.empty:
            if path[0] == name and len(path) > 1:
                _set(target, path, {}, mappings, replace=False)
        present = set(flatten_state_dict({name: target[name]})[1].values())
        for fqn, path in paths.items():
            if path[0] == name and not any(path[:depth] in present for depth in range(1, len(path) + 1)):
                about = metadata.state_dict_metadata[fqn]
                empty = None
                if isinstance(about, TensorStorageMetadata):
                    room -= math.prod(about.size) * about.properties.dtype.itemsize
                    if room < 0:
                        raise ValueError("it brings more than there is memory for")
                    empty = torch.empty(about.size, dtype=about.properties.dtype)
                _set(target, path, empty, mappings)


def _set(root: dict[str, Any], path: _Path, value: Any, mappings: _Mappings, *, replace: bool = True) -> None:
    """Put *value* where DCP's flattened *path* leads, with the keys that the mappings on the way really have."""
    here: Any = root
    for depth, part in enumerate(path):
        if isinstance(here, dict):
            key = _own_key(here, part, as_integer=path[: depth + 1] in mappings.integer_keys)
        else:
            key = int(part)
            here += [None] * (key + 1 - len(here))
        if depth == len(path) - 1:
            absent = key not in here if isinstance(here, dict) else here[key] is None
            if replace or absent:
                here[key] = value
        else:
            below = here.get(key) if isinstance(here, dict) else here[key]
            if below is None:
                below = here[key] = [] if isinstance(path[depth + 1], int) else {}
            here = below


def _own_key(mapping: Mapping[Any, Any], part: str | int, *, as_integer: bool) -> Any:
    if part in mapping:
        return part
    number = int(part) if _INTEGER.fullmatch(str(part)) else None
    return number if number is not None and (as_integer or number in mapping) else part


@dataclasses.dataclass(frozen=True)
class _Mappings:
    """
    What DCP's flattened names do not tell about mappings: which keys are integers, and which mappings are empty.

    Kept in ``mappings.json`` when there is any; paths of names and list indexes.
    """

    integer_keys: frozenset[_Path] = frozenset()
    empty: frozenset[_Path] = frozenset()

    @classmethod
    def of(cls, state_dicts: Mapping[str, Any]) -> _Mappings:
        """
        Look through plain state, whose objects may be filled only as they are used.

        Raises:
            InvalidArgument: A mapping has keys that are neither text nor integers; they would come back as text.
        """
        integer_keys: set[_Path] = set()
        empty: set[_Path] = set()

        def look(value: Any, path: _Path) -> None:
            if isinstance(value, Mapping):
                if not value:
                    empty.add(path)
                for key, below in value.items():
                    if type(key) is int:
                        integer_keys.add((*path, str(key)))
                    elif not isinstance(key, str):
                        raise InvalidArgument(
                            f"state {'.'.join(map(str, path))!r} has the key {key!r}; keys must be text or integers",
                            hint="turn such keys into text in state_dict(), or put the object into PerRank",
                        )
                    look(below, (*path, str(key)))
                if len({str(key) for key in value}) != len(value):
                    raise InvalidArgument(f"state {'.'.join(map(str, path))!r} has keys that differ only in their type")
            elif isinstance(value, list):
                for index, below in enumerate(value):
                    look(below, (*path, index))

        for name, value in state_dicts.items():
            look(value, (name,))
        return cls(frozenset(integer_keys), frozenset(empty))

    def to_json(self) -> bytes:
        """The text of ``mappings.json``."""
        paths = {"integer_keys": sorted(self.integer_keys, key=str), "empty": sorted(self.empty, key=str)}
        return json.dumps(paths).encode()

    @classmethod
    def read(cls, path: Path) -> _Mappings:
        """
        Read ``mappings.json``.

        Raises:
            CorruptCheckpoint: It is something else.
        """
        try:
            body = json.loads(reach.read(path, MAX_MAPPINGS_BYTES))
            return cls(*(_paths(body[field]) for field in ("integer_keys", "empty")))
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise _corrupt(path, f"{error}") from error


def _paths(entries: Any) -> frozenset[_Path]:
    """Paths as JSON has them: lists of texts and numbers that begin with a text."""
    if not isinstance(entries, list):
        raise TypeError("no list of paths")
    for path in entries:
        plain = isinstance(path, list) and 0 < len(path) <= MAX_PATH_PARTS and isinstance(path[0], str)
        if not plain or not all(isinstance(part, str) or (type(part) is int and part >= 0) for part in path):
            raise TypeError("a path is none")
    return frozenset(map(tuple, entries))


class _LoadPlanner(DefaultLoadPlanner):
    """PyTorch's planner, and what it planned, read without PyTorch's reader."""

    def __init__(self, mappings: _Mappings) -> None:
        super().__init__()
        self._of_mappings = mappings

    def fill(self, item: ReadItem, descriptor: int, path: Path) -> None:
        """
        Read one item from its file.

        Raises:
            CorruptCheckpoint: What stands there is something else than the index says.
        """
        assert self.metadata is not None
        fqn = item.dest_index.fqn
        place = self.metadata.storage_data[item.storage_index]
        piece = archives.Source(descriptor, place.offset, place.length)
        loaded = archives.load(piece, f"{path}: {fqn}")
        about = self.metadata.state_dict_metadata[fqn]
        if not isinstance(about, TensorStorageMetadata):
            _set(self.original_state_dict, self.mappings[fqn], loaded, self._of_mappings)
            return
        same = isinstance(loaded, torch.Tensor) and loaded.dtype is about.properties.dtype
        if not same or loaded.shape != about.chunks[item.storage_index.index or 0].sizes:
            raise _corrupt(path, f"the piece of {fqn} is another than .metadata says")
        target = self.resolve_tensor(item).detach()
        target.copy_(narrow_tensor_by_index(loaded.detach(), item.storage_offsets, item.lengths))
        self.commit_tensor(item, target)


@dataclasses.dataclass(frozen=True)
class _Archive:
    """A ``torch.save`` archive of one tensor, without the tensor's bytes. Offsets and lengths in bytes."""

    constants: tuple[tuple[int, bytes], ...]
    data_offset: int
    length: int


class _Gap(io.RawIOBase):
    """Takes an archive's bytes as they are written and remembers where the tensor's were left out."""

    def __init__(self) -> None:
        self.position = 0
        self.parts: list[tuple[int, bytes]] = []
        self.gap = (0, 0)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.parts.append((self.position, bytes(data)))
        self.position += len(self.parts[-1][1])
        return len(self.parts[-1][1])

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == 1, "archives are written front to back"
        self.gap = (self.position, offset)
        self.position += offset
        return self.position


@functools.lru_cache(maxsize=4096)
def _archive(dtype: torch.dtype, shape: tuple[int, ...]) -> _Archive:
    sink = _Gap()
    # The tensor's memory is never touched: skip_data leaves its bytes out.
    with torch.serialization.skip_data():
        torch.save(torch.empty(shape, dtype=dtype), sink)  # type: ignore[arg-type]
    merged: list[tuple[int, bytes]] = []
    for offset, data in sink.parts:
        if merged and merged[-1][0] + len(merged[-1][1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + data)
        else:
            merged.append((offset, data))
    return _Archive(tuple(merged), sink.gap[0], sink.position)


def _local(value: Any) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value
