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

import dataclasses
import functools
import hashlib
import logging
import operator
import pickle
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType
from torch.distributed.tensor import DTensor

from ckptmgr.errors import InvalidArgument
from ckptmgr.lifecycle import Format
from ckptmgr.writers import state as states
from ckptmgr.writers.arena import Copy, Layout, aligned
from ckptmgr.writers.index import INDEX_NAME, MAX_PATH_PARTS
from ckptmgr.writers.jobs import FileJob, Segment, SharedFile
from ckptmgr.writers.mappings import MAPPINGS_NAME, KeyPath, Mappings
from ckptmgr.writers.templates import template

log = logging.getLogger("ckptmgr")

_PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})


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

    *tensors* are what this rank stores, by the keys of the layout's copies, *watched* the state's own, with *names*.
    ``per_rank_names`` are those of the per-rank state that binds the checkpoint to its number of ranks.
    """

    plan: SavePlan
    in_pieces: frozenset[str]
    tensors: dict[object, torch.Tensor]
    watched: list[torch.Tensor]
    names: list[str]
    objects: dict[MetadataIndex, bytes]
    per_rank: bytes | None
    per_rank_names: tuple[str, ...]
    mappings: Mappings
    signature: bytes


@dataclasses.dataclass(frozen=True)
class _Seen:
    """
    A state as it is quickly compared: its *tensors* in the order in which PyTorch finds them, and all else.

    *parts* are what this rank has of each tensor, *shape* is everything besides tensors that planning depends on.
    """

    shape: list[Any]
    tensors: list[torch.Tensor]
    parts: list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class _Known:
    """
    What planning found out about a state of one *shape*; it holds for every state of that shape.

    *parts* are `_about_part` of what this rank has of each tensor and *wholes* `_about_whole` of each DTensor,
    *in_pieces* the tensors of which it has several pieces, *names* those of all tensors in the order of the state;
    *values* say where everything else stands.
    """

    shape: list[Any] | None
    wholes: list[Any]
    parts: list[Any]
    plan: SavePlan
    in_pieces: frozenset[str]
    names: list[str]
    values: list[tuple[MetadataIndex, tuple[Any, ...]]]
    mappings: Mappings
    signature: bytes

    def is_of(self, seen: _Seen) -> bool:
        """
        Whether it holds for the state that was *seen*.

        Tensors are compared one by one: in a list, what there is to compare would look like many objects that stay,
        and every few saves Python's garbage collector would go through all that the training has.
        """
        if self.shape != seen.shape or not all(map(operator.eq, self.parts, map(_about_part, seen.parts))):
            return False
        return not self.wholes or all(map(operator.eq, self.wholes, map(_about_whole, _sharded(seen.tensors))))


class DCPWriter:
    """
    Plans and lays out DCP checkpoints of one series on one rank.

    The plan is exchanged once and reused while every rank's signature (names, dtypes, shapes, places)
    stays the same.
    """

    kind = Format.DCP

    def __init__(self) -> None:
        self._own_values: list[MetadataIndex] | None = None
        self._known: _Known | None = None
        self._in_pieces: frozenset[str] = frozenset()
        self._metadata: Metadata | None = None
        self._tensor_places: dict[MetadataIndex, _StorageInfo] = {}
        self._objects_of: list[list[MetadataIndex]] = []
        #: The lengths of every rank's values at the last save, and the bytes of ``.metadata`` with them in.
        self._concluded: tuple[list[list[int]], bytes] | None = None

    def take(self, state: states.State, rank: int) -> Taken:
        """
        Look at the state to save, without copying a tensor. Other values are serialised now: they may change later.

        Raises:
            InvalidArgument: Not a mapping from names, or a value that could not be read back safely.
        """
        shared, per_rank = states.split(state)
        state_dicts = states.take(shared)
        strict = {name for name, value in shared.items() if isinstance(value, torch.nn.Module | torch.optim.Optimizer)}
        seen = _see([sorted(strict), sorted(per_rank)], state_dicts)
        known = self._known
        found: dict[object, torch.Tensor]
        if known is not None and seen is not None and known.is_of(seen):
            found, watched = dict(zip(known.names, seen.parts, strict=True)), seen.tensors
        else:
            self._known = None
            known, found, watched = _look(state_dicts, strict, per_rank, rank, seen)
            if seen is not None:
                self._known = known
        objects = {
            index: states.dump(functools.reduce(operator.getitem, path, state_dicts), f"state {index.fqn!r}")
            for index, path in known.values
        }
        own = {name: value.take() for name, value in per_rank.items()}
        blob = states.dump(own, "per-rank state") if own else None
        bound = tuple(sorted(name for name, value in per_rank.items() if value.when_resized == "refuse"))
        return Taken(
            known.plan, known.in_pieces, found, watched, known.names, objects, blob, bound, known.mappings,
            known.signature,
        )  # fmt: skip

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
        self._own_values = [item.index for item in mine.items if item.type is WriteItemType.BYTE_IO]
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
            archive = template(item.tensor_data.properties.dtype, shape)
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
        self._concluded = None
        self._tensor_places = dict(pair for of_rank in places for pair in of_rank)

    def report_bytes(self, taken: Taken) -> int:
        """How many bytes this rank's report on a save takes beyond a plain answer: the length of each value."""
        del taken
        assert self._own_values is not None
        return 16 * len(self._own_values)

    def sources(self, taken: Taken) -> dict[object, torch.Tensor]:
        """The tensors to capture, by the keys of the layout's copies."""
        return taken.tensors

    def watched(self, taken: Taken) -> list[tuple[str, torch.Tensor]]:
        """The state's own tensors, by name: an update of a DTensor leaves the version of its local part alone."""
        return list(zip(taken.names, taken.watched, strict=True))

    def small_files(self, taken: Taken, rank: int) -> tuple[list[FileJob], Any]:
        """
        Files made of values that are not tensors.

        Returns:
            The files, and for rank 0 the lengths in bytes of this rank's values in plan order.
        """
        assert self._own_values is not None
        files = []
        blobs = [taken.objects[index] for index in self._own_values]
        if blobs:
            data = b"".join(blobs)
            files.append(FileJob(f"__{rank}_1.distcp", len(data), own=True, data=data))
        if rank == 0 and taken.mappings != Mappings():
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
        """
        Rank 0 only: the files that need every rank's report, here ``.metadata``.

        Of what is in it only the lengths of values differ between saves of one plan, and pickling many thousand
        tensors takes longer than writing them, so it is pickled anew only where a length has changed.
        """
        lengths_of = [list(lengths) for lengths in reports]
        if self._concluded is None or self._concluded[0] != lengths_of:
            self._concluded = (lengths_of, self._pickled_index(lengths_of))
        yield INDEX_NAME, self._concluded[1]

    def _pickled_index(self, lengths_of: Sequence[Sequence[int]]) -> bytes:
        """``.metadata``, with *lengths_of* every rank's values."""
        assert self._metadata is not None
        places = dict(self._tensor_places)
        for rank, (indexes, lengths) in enumerate(zip(self._objects_of, lengths_of, strict=True)):
            offset = 0
            for index, length in zip(indexes, lengths, strict=True):
                places[index] = _StorageInfo(f"__{rank}_1.distcp", offset, length)
                offset += length
        metadata = dataclasses.replace(
            self._metadata, storage_data=places, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION
        )
        return pickle.dumps(metadata)


def _look(
    state_dicts: dict[str, Any], strict: set[str], names_per_rank: Iterable[str], rank: int, seen: _Seen | None
) -> tuple[_Known, dict[object, torch.Tensor], list[torch.Tensor]]:
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
    mappings = Mappings.of({name: below for name, below in state_dicts.items() if name not in strict})
    others = [item.index for item in plan.items if item.type is WriteItemType.BYTE_IO]
    values = list(zip(others, _own_keys(state_dicts, [planner.mappings[index.fqn] for index in others]), strict=True))
    watched = {name: value for name, value in planner.state_dict.items() if isinstance(value, torch.Tensor)}
    pieces = [item for item in plan.items if item.type is not WriteItemType.BYTE_IO]
    counts = Counter(item.index.fqn for item in pieces)
    in_pieces = frozenset(name for name, count in counts.items() if count > 1)
    tensors = {_key(item.index, in_pieces): _local(planner.resolve_data(item)) for item in pieces}
    alike: dict[Any, Any] = {}
    parts = [alike.setdefault(one, one) for one in map(_about_part, seen.parts if seen is not None else ())]
    wholes = list(map(_about_whole, _sharded(watched.values())))
    shape = seen.shape if seen is not None else None
    known = _Known(shape, wholes, parts, plan, in_pieces, list(watched), values, mappings, digest.digest())
    return known, tensors, list(watched.values())


def _own_keys(state_dicts: Mapping[str, Any], paths: Iterable[KeyPath]) -> Iterator[tuple[Any, ...]]:
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


#: What planning depends on in a dense tensor (whether it is quantized, its dtype says), and in a DTensor besides.
_about_part = operator.attrgetter("dtype", "shape", "layout", "is_meta")
_about_whole = operator.attrgetter("device_mesh", "placements", "shape")


def _sharded(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    return (tensor for tensor in tensors if type(tensor) is DTensor)


def _see(about: list[Any], state_dicts: Mapping[str, Any]) -> _Seen | None:
    """A state, and what else is *about* it, to be compared; None if it cannot be told what planning depends on."""
    tensors: list[torch.Tensor] = []
    try:
        _describe(state_dicts, about, tensors)
    except (TypeError, RecursionError):
        return None
    return _Seen(about, tensors, [tensor._local_tensor if type(tensor) is DTensor else tensor for tensor in tensors])


def _describe(value: Any, about: list[Any], tensors: list[torch.Tensor]) -> None:
    """One value for `_see`; as an inner function it would keep the tensors until the next garbage collection."""
    kind = type(value)
    if kind in _PLAIN_TENSORS:
        tensors.append(value)
        about.append(torch.Tensor)
    elif kind is DTensor:
        if type(value._local_tensor) is not torch.Tensor:
            raise TypeError
        tensors.append(value)
        about.append(DTensor)
    elif isinstance(value, torch.Tensor):
        raise TypeError
    elif isinstance(value, Mapping):
        keys = tuple(value)
        about.append((keys, tuple(map(type, keys))))
        if _PLAIN_TENSORS.issuperset(map(type, value.values())):
            about.append(_PLAIN_TENSORS)
            tensors.extend(value.values())
        else:
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


def _local(value: Any) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value
