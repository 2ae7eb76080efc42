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
import io
import json
import logging
import pickle
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItemType
from torch.distributed.checkpoint.stateful import Stateful

from ckptmgr.errors import CorruptCheckpoint, InvalidArgument, StateMismatch
from ckptmgr.lifecycle import Format
from ckptmgr.writers import state as states
from ckptmgr.writers.arena import Copy, Layout, aligned
from ckptmgr.writers.jobs import FileJob, Segment, SharedFile

log = logging.getLogger("ckptmgr")

MAPPINGS_NAME = "mappings.json"
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

    planner: DefaultSavePlanner
    plan: SavePlan
    objects: dict[MetadataIndex, bytes]
    per_rank: bytes | None
    per_rank_names: tuple[str, ...]
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
        planner = DefaultSavePlanner()
        state_dicts = states.take(shared)
        planner.set_up_planner(state_dicts, is_coordinator=rank == 0)
        plan = planner.create_local_plan()
        digest = hashlib.blake2b(digest_size=16)
        for item in plan.items:
            data = item.tensor_data
            if data is not None:
                _check_dense(item.index.fqn, planner.lookup_object(item.index))
            about = (data.properties.dtype, data.size, data.chunk.sizes) if data is not None else ()
            digest.update(repr((item.index, item.type, about)).encode())
        digest.update(repr(sorted(per_rank)).encode())
        strict = (torch.nn.Module, torch.optim.Optimizer)
        mappings = _Mappings.of({name: d for name, d in state_dicts.items() if not isinstance(shared[name], strict)})
        objects = {
            item.index: states.dump(planner.lookup_object(item.index), f"state {item.index.fqn!r}")
            for item in plan.items
            if item.type is WriteItemType.BYTE_IO
        }
        own = {name: value.take() for name, value in per_rank.items()}
        blob = states.dump(own, "per-rank state") if own else None
        bound = tuple(sorted(name for name, value in per_rank.items() if value.when_resized == "refuse"))
        return Taken(planner, plan, objects, blob, bound, mappings, digest.digest())

    def local_plan(self, taken: Taken) -> tuple[SavePlan, dict[MetadataIndex, bytes]]:
        """What rank 0 must know of this rank to plan: PyTorch's plan, and a digest of each value."""
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
        name = f"__{rank}_0.distcp"
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
            copies.append(Copy(item.index, start + archive.data_offset, item.tensor_data.properties.dtype, shape))
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
        assert self._mine is not None
        return {
            item.index: _local(taken.planner.resolve_data(item))
            for item in self._mine.items
            if item.type is not WriteItemType.BYTE_IO
        }

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
        yield ".metadata", pickle.dumps(metadata)


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


def _check_dense(name: str, tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        raise InvalidArgument(f"{name!r} is not a dense tensor with data ({tensor.layout}, {tensor.device})")


def per_rank_name(rank: int) -> str:
    """The file of one rank's `PerRank` state."""
    return f"per-rank-{rank}.pt"


def read(
    directory: Path, state: states.State, rank: int, *, same_world: bool, committed: Container[str] | None = None
) -> dict[str, Any]:
    """
    Load a DCP checkpoint into *state*, in place, resharding to how *state* is sharded now.

    Every rank reads for itself; no collective. Keys of the checkpoint that *state* does not ask for
    are ignored; what *state* asks for must be there.

    Args:
        directory: A committed checkpoint.
        state: As given to ``save``; tensors are overwritten, objects get ``load_state_dict``.
        rank: Whose `PerRank` state to give back.
        same_world: Whether the number of ranks is the one that saved.
        committed: The names of its files, so that nothing is read that was put there later; None if not known.

    Returns:
        The plain values read, by name, for the caller to put where it wants.

    Raises:
        StateMismatch: The checkpoint lacks something, or has it in another shape.
        CorruptCheckpoint: A file is not what a checkpoint holds.
    """
    shared, per_rank = states.split(state)
    stored: dict[str, Any] = {}
    wanted = {name: value for name, value in per_rank.items() if same_world or value.when_resized == "refuse"}
    if wanted and not same_world:
        raise StateMismatch(f"{sorted(wanted)} was saved by another number of ranks", missing=tuple(sorted(wanted)))
    if wanted:
        path = directory / per_rank_name(rank)
        stored = states.load(_read_bytes(path), str(path)) if _is_there(path, committed) else {}
        if missing := sorted(wanted.keys() - stored.keys()):
            raise StateMismatch(f"the checkpoint has no per-rank state for {missing}", missing=tuple(missing))
    plain: dict[str, Any] = {}
    if shared:
        reader = _Reader(directory)
        metadata = reader.read_metadata()
        states.ready_optimizers(shared)
        target = states.take(shared)
        path = directory / MAPPINGS_NAME
        mappings = _Mappings.read(path) if _is_there(path, committed) else _Mappings()
        _shape_to(metadata, shared, target, mappings)
        if missing := [fqn for fqn in flatten_state_dict(target)[0] if fqn not in metadata.state_dict_metadata]:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise StateMismatch(f"the checkpoint lacks {', '.join(missing[:3])}{more}", missing=tuple(missing))
        planner = _LoadPlanner(str(directory), mappings)
        planner.set_up_planner(target, metadata, is_coordinator=rank == 0)
        try:
            plan = planner.create_local_plan()
        except (RuntimeError, ValueError) as error:
            raise StateMismatch(f"the checkpoint does not fit: {error}", missing=()) from error
        reader.set_up_storage_reader(metadata, is_coordinator=rank == 0)
        try:
            reader.read_data(plan, planner).wait()
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, AssertionError) as error:
            raise CorruptCheckpoint(
                f"{directory} cannot be read: {error}", directory=str(directory), mismatches=(str(error),)
            ) from error
        for name, value in shared.items():
            if isinstance(value, Stateful):
                value.load_state_dict(target[name])
            else:
                plain[name] = target[name]
    for name, value in wanted.items():
        value.give_back(stored[name])
    return plain


def _is_there(path: Path, committed: Container[str] | None) -> bool:
    return path.exists() if committed is None else path.name in committed


def _shape_to(metadata: Metadata, shared: Mapping[str, Any], target: dict[str, Any], mappings: _Mappings) -> None:
    """
    Make *target* ask for what the checkpoint has, for objects whose state dict grows as they are used.

    A fresh scheduler or counter may not have all its keys yet; they would be lost silently. A ready
    optimizer has state for parameters that had none when saved; asking for those would fail.
    """
    paths: Mapping[str, _Path] = metadata.planner_data or {}
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
            body = json.loads(_read_bytes(path))
            return cls(*(frozenset(tuple(entry) for entry in body[field]) for field in ("integer_keys", "empty")))
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptCheckpoint(f"{path}: {error}", directory=str(path), mismatches=(str(error),)) from error


class _LoadPlanner(DefaultLoadPlanner):
    """PyTorch's planner, reading values without running code."""

    def __init__(self, where: str, mappings: _Mappings) -> None:
        super().__init__()
        self._where = where
        self._of_mappings = mappings

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        fqn = read_item.dest_index.fqn
        loaded = states.load(value.read(), f"{self._where}: {fqn}")
        _set(self.original_state_dict, self.mappings[fqn], loaded, self._of_mappings)


class _Reader(FileSystemReader):
    """PyTorch's reader, with an unpickler for ``.metadata`` that knows only what belongs there."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        del args, kwargs
        path = Path(self.path) / ".metadata"
        try:
            metadata = _MetadataUnpickler(io.BytesIO(_read_bytes(path))).load()
        except CorruptCheckpoint:
            raise
        except Exception as error:
            raise CorruptCheckpoint(f"{path}: {error}", directory=str(path), mismatches=(str(error),)) from error
        if not isinstance(metadata, Metadata):
            raise CorruptCheckpoint(f"{path} holds no metadata", directory=str(path), mismatches=("not metadata",))
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        for info in (metadata.storage_data or {}).values():
            if "/" in info.relative_path or info.relative_path.startswith(".."):
                raise CorruptCheckpoint(
                    f"{path} names the file {info.relative_path!r}", directory=str(path), mismatches=("path",)
                )
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("builtins", "set"),
            ("builtins", "getattr"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if module in self._MODULES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and (dataclasses.is_dataclass(found) or name == "_MEM_FORMAT_ENCODING"):
                return found
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if (module, name) in self._NAMES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise CorruptCheckpoint(
            f".metadata refers to {module}.{name}, which has no place there", directory="", mismatches=(name,)
        )


def _enum_member(holder: Any, name: str) -> Any:
    import enum

    if isinstance(holder, type) and issubclass(holder, enum.Enum):
        return holder[name]
    raise CorruptCheckpoint(".metadata reaches for an attribute", directory="", mismatches=(name,))


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


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptCheckpoint(
            f"{path} cannot be read: {error.strerror}", directory=str(path), mismatches=(str(error),)
        ) from error
