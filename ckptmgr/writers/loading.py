"""
DCP checkpoints back into state, without trusting a byte of them.

PyTorch plans, with an index that was compared with what was committed, and opens no file. What was laid out here
is read straight into the tensors, by several threads; a piece that another program wrote in its place, as
``torch.save`` would, is read by `archives`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.stateful import Stateful

from ckptmgr import reach
from ckptmgr.errors import CorruptCheckpoint, StateMismatch
from ckptmgr.writers import archives
from ckptmgr.writers import state as states
from ckptmgr.writers.archives import OpenFile, Source
from ckptmgr.writers.arena import available_bytes, memory_of
from ckptmgr.writers.dcp import per_rank_name
from ckptmgr.writers.filling import BLOCK_BYTES, Piece, in_parallel
from ckptmgr.writers.index import read_index
from ckptmgr.writers.mappings import MAPPINGS_NAME, MAX_MAPPINGS_BYTES, KeyPath, Mappings
from ckptmgr.writers.templates import data_offset

#: Files that are open at the same time.
_MOST_OPEN = 64
#: A piece of at most so many bytes is read together with those beside it.
_SMALL_BYTES = 1 << 20
_SMALL_GAP_BYTES = 64 << 10
_P = ParamSpec("_P")
_R = TypeVar("_R")
_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")


def read(
    directory: Path, state: states.State, rank: int, *, files: Mapping[str, int], same_world: bool
) -> dict[str, Any]:
    """`begin`, and the rest at once; returns the plain values."""
    return begin(directory, state, rank, files=files, same_world=same_world)()


def begin(
    directory: Path, state: states.State, rank: int, *, files: Mapping[str, int], same_world: bool
) -> Callable[[], dict[str, Any]]:
    """
    Load the tensors of a DCP checkpoint into *state*, in place, resharding to how *state* is sharded now.

    Every rank reads for itself; no collective. Keys of the checkpoint that *state* does not ask for
    are ignored; what *state* asks for must be there. Nothing in the directory is trusted: PyTorch plans
    with an index that was compared with *files* before, and opens no file.

    Args:
        directory: A committed checkpoint.
        state: As given to ``save``; tensors are overwritten.
        rank: Whose `PerRank` state to give back.
        files: The files that were committed and their bytes; nothing else is opened.
        same_world: Whether the number of ranks is the one that saved.

    Returns:
        What gives objects their ``load_state_dict`` and `PerRank` its value, and returns the plain values read, by
        name, for the caller to put where it wants.

    Raises:
        StateMismatch: The checkpoint lacks something, or has it in another shape.
        CorruptCheckpoint: A file is not what a checkpoint holds.
    """
    shared, per_rank = states.split(state)
    wanted = {name: value for name, value in per_rank.items() if same_world or value.when_resized == "refuse"}
    if wanted and not same_world:
        raise StateMismatch(f"{sorted(wanted)} was saved by another number of ranks", missing=tuple(sorted(wanted)))
    stored = _read_per_rank(directory, rank, wanted, files) if wanted else {}
    target = _read_shared(directory, shared, files) if shared else {}

    def hand_over() -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for name, value in shared.items():
            if isinstance(value, Stateful):
                value.load_state_dict(target[name])
            else:
                plain[name] = target[name]
        for name, value in wanted.items():
            value.give_back(stored[name])
        return plain

    return hand_over


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
    mappings = _read_mappings(directory / MAPPINGS_NAME) if MAPPINGS_NAME in files else Mappings()
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
    by_file: dict[str, list[_Wanted]] = {}
    for one in sorted(planner.wanted(plan.items), key=lambda one: one.place.offset):
        by_file.setdefault(one.place.relative_path, []).append(one)
    names = sorted(by_file)
    for start in range(0, len(names), _MOST_OPEN):
        tasks: list[Iterator[_Task]] = []
        for name in names[start : start + _MOST_OPEN]:
            with _opened(directory, name, files) as descriptor:
                # Open until the last of its tasks is gone, even where a second Ctrl-C has ended the wait for them.
                file = OpenFile(descriptor)
            tasks.append(planner.tasks(by_file[name], file, directory / name))
            del file
        in_parallel(itertools.chain.from_iterable(tasks))
    return target


def _read_mappings(path: Path) -> Mappings:
    try:
        return Mappings.from_json(reach.read(path, MAX_MAPPINGS_BYTES))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _corrupt(path, f"{error}") from error


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


def _shape_to(metadata: Metadata, shared: Mapping[str, Any], target: dict[str, Any], mappings: Mappings) -> None:
    """
    Make *target* ask for what the checkpoint has, for objects whose state dict grows as they are used.

    A fresh scheduler or counter may not have all its keys yet; they would be lost silently. A ready
    optimizer has state for parameters that had none when saved; asking for those would fail.
    """
    paths: Mapping[str, KeyPath] = metadata.planner_data or {}
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


def _set(root: dict[str, Any], path: KeyPath, value: Any, mappings: Mappings, *, replace: bool = True) -> None:
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


@dataclasses.dataclass(frozen=True, slots=True)
class _Wanted:
    """What PyTorch planned to read, where it stands, and for a tensor where it goes."""

    item: ReadItem
    place: _StorageInfo
    target: torch.Tensor | None

    @property
    def fqn(self) -> str:
        return self.item.dest_index.fqn


class _LoadPlanner(DefaultLoadPlanner):
    """PyTorch's planner, and what it planned, read without PyTorch's reader."""

    def __init__(self, mappings: Mappings) -> None:
        super().__init__()
        self._of_mappings = mappings
        self._whole = threading.Lock()

    def wanted(self, items: Iterable[ReadItem]) -> Iterator[_Wanted]:
        """
        What is to be read. Of what goes to one and the same memory, as it does where tensors are tied, the last.

        They were stored with the same values, or had been no ties; then ranks must not differ in which one they take.
        """
        assert self.metadata is not None
        found: dict[Any, _Wanted] = {}
        for item in items:
            is_tensor = isinstance(self.metadata.state_dict_metadata[item.dest_index.fqn], TensorStorageMetadata)
            target = self.resolve_tensor(item).detach() if is_tensor else None
            key = memory_of(target) if target is not None else object()
            found[key] = _Wanted(item, self.metadata.storage_data[item.storage_index], target)
        for device in {one.target.device for one in found.values() if one.target is not None and one.target.is_cuda}:
            torch.cuda.synchronize(device)  # what is queued on the caller's stream must not come after what is loaded
        return iter(found.values())

    def tasks(self, wanted: Iterable[_Wanted], file: OpenFile, path: Path) -> Iterator[_Task]:
        """
        Read what is *wanted* of one file, given in the order of the places in it.

        Yields:
            What is left to do for tensors, by any thread and in any order. Small ones side by side are one task.

        Raises:
            CorruptCheckpoint: What stands there is something else than the index says. The tasks raise it too.
        """
        run: list[_Wanted] = []
        for one in wanted:
            if one.target is None:
                loaded = archives.load(_source(file, one.place, 0, path), f"{path}: {one.fqn}")
                _set(self.original_state_dict, self.mappings[one.fqn], loaded, self._of_mappings)
            elif one.place.length > _SMALL_BYTES:
                yield from self._fill(one, one.target, _source(file, one.place, 0, path), path)
            else:
                if run and not _is_close(run[0].place, run[-1].place, one.place):
                    yield functools.partial(self._fill_run, run, file, path)
                    run = []
                run.append(one)
        if run:
            yield functools.partial(self._fill_run, run, file, path)

    def _fill_run(self, run: Sequence[_Wanted], file: OpenFile, path: Path) -> None:
        first, last = run[0].place, run[-1].place
        whole = dataclasses.replace(first, length=last.offset + last.length - first.offset)
        data = _reading(path, _source(file, whole, 0, path).at, 0, whole.length)
        for one in run:
            assert one.target is not None
            for task in self._fill(one, one.target, _source(data, one.place, first.offset, path), path):
                task()

    def _fill(self, one: _Wanted, target: torch.Tensor, source: Source, path: Path) -> Iterator[_Task]:
        """What is to do to read one tensor, or a part of it, from the archive in *source*."""
        assert self.metadata is not None
        about = self.metadata.state_dict_metadata[one.fqn]
        assert isinstance(about, TensorStorageMetadata)
        dtype, sizes = about.properties.dtype, tuple(about.chunks[one.item.storage_index.index or 0].sizes)
        offsets = tuple(one.item.storage_offsets)
        at = _reading(path, data_offset, source, dtype, sizes)
        if at is not None:
            piece = Piece(at, dtype, sizes, offsets, target)
            return (functools.partial(_reading, path, block.fill, source) for block in piece.blocks())
        piece = Piece(0, dtype, sizes, offsets, target)
        return iter([functools.partial(self._fill_by_any_other, piece, source, path, one.fqn)])

    def _fill_by_any_other(self, piece: Piece, source: Source, path: Path, fqn: str) -> None:
        """Read an archive that is laid out in another way than ours, as one that another version of PyTorch wrote."""
        with self._whole:  # it is in memory as a whole, so one at a time
            loaded = archives.load(source, f"{path}: {fqn}")
            if not isinstance(loaded, torch.Tensor) or loaded.dtype is not piece.dtype or loaded.shape != piece.sizes:
                raise _corrupt(path, f"the piece of {fqn} is another than .metadata says")
            piece.target.copy_(narrow_tensor_by_index(loaded.detach(), piece.offsets, piece.target.shape))


_Task = Callable[[], None]


def _is_close(first: _StorageInfo, last: _StorageInfo, next_: _StorageInfo) -> bool:
    """Whether reading from *first* on to *next_*, which follows *last*, is better than reading twice."""
    reads = next_.offset + next_.length - first.offset
    return reads <= BLOCK_BYTES and next_.offset - last.offset - last.length <= _SMALL_GAP_BYTES


def _source(where: OpenFile | bytes, place: _StorageInfo, begins: int, path: Path) -> Source:
    """The bytes at *place*, of a file or of a part of it that begins at *begins*."""
    return _reading(path, Source, where, place.offset - begins, place.length)


def _reading(path: Path, read: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
    try:
        return read(*args, **kwargs)
    except (OSError, ValueError) as error:
        raise _corrupt(path, f"{error}") from error
