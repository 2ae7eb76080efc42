"""
``.metadata``, PyTorch's index of a DCP checkpoint, read without trusting it.

It is a pickle, and what it says decides what is allocated, which files are opened and where they are read.
So it is read by an unpickler that knows its classes and nothing else, and then every entry is compared with
the list of files that was committed: each piece must lie in one of them, be as long as its shape says, and
share no more bytes with others than the file has. What passes can be given to PyTorch's planner.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ckptmgr import reach
from ckptmgr.errors import CorruptCheckpoint
from ckptmgr.pickles import StrictUnpickler, brief
from ckptmgr.writers import archives

INDEX_NAME = ".metadata"
#: Five million pieces.
MAX_INDEX_BYTES = 1 << 30
#: Names and numbers on the way to a value. Whoever walks through nested state calls himself for each.
MAX_PATH_PARTS = 500
#: What an archive may have besides the bytes of its tensor.
_MAX_OVERHEAD_BYTES = 1 << 16
_CLASSES = (
    Metadata, TensorStorageMetadata, BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex, TensorProperties,
    StorageMeta, _StorageInfo,
)  # fmt: skip
_FIELDS = {kind: {field.name for field in dataclasses.fields(kind)} for kind in _CLASSES}
#: What a `TensorProperties` gives away of itself.
_PROPERTIES = (torch.dtype, torch.layout, bool, _MEM_FORMAT_ENCODING, bool)


def read_index(directory: Path, files: Mapping[str, int]) -> Metadata:
    """
    The index of the checkpoint in *directory*, all of whose *files* (with their bytes) are known.

    Raises:
        CorruptCheckpoint: It is missing, no index, or does not fit the files.
    """
    path = directory / INDEX_NAME
    try:
        if files.get(INDEX_NAME, MAX_INDEX_BYTES + 1) > MAX_INDEX_BYTES:
            raise ValueError("it is none of the checkpoint's files, or too large")
        with reach.directory(directory) as folder, reach.regular(folder, INDEX_NAME) as descriptor:
            if (size := os.fstat(descriptor).st_size) != files[INDEX_NAME]:
                raise ValueError(f"it has {size} bytes, {files[INDEX_NAME]} were committed")
            found: Metadata = _Index(io.BufferedReader(io.FileIO(descriptor, closefd=False))).load()
        check(found, files)
    except Exception as error:
        reason = f"{error}" if str(error) and not isinstance(error, KeyError) else f"{type(error).__name__} {error}"
        raise CorruptCheckpoint(f"{path}: {reason[:200]}", directory=str(path), mismatches=(reason[:200],)) from error
    return found


def check(metadata: Any, files: Mapping[str, int]) -> None:
    """
    Compare an index with the files of its checkpoint.

    Raises:
        ValueError: They do not fit, or it is no index.
    """
    if type(metadata) is not Metadata or not {"state_dict_metadata", "storage_data"} <= vars(metadata).keys():
        raise ValueError("it holds no metadata")
    entries, places = metadata.state_dict_metadata, metadata.storage_data
    if type(entries) is not dict or type(places) is not dict:
        raise ValueError("it holds no entries")
    metadata.storage_meta = StorageMeta()
    _check_paths(metadata, entries)
    used = dict.fromkeys(files, 0)
    for index, place in places.items():
        if type(index) is not MetadataIndex or index.fqn not in entries or type(place) is not _StorageInfo:
            raise ValueError("it places what is no entry")
        name = place.relative_path
        if type(name) is not str or name not in files:
            raise ValueError(f"it names the file {brief(name)!r}, which is none of the checkpoint's")
        for number in (place.offset, place.length):
            _check_number(number)
        used[name] += place.length
        if place.offset + place.length > files[name] or used[name] > files[name] or place.transform_descriptors:
            raise ValueError(f"it places {index.fqn[:80]!r} where {name!r} has no bytes")
    for fqn, about in entries.items():
        if type(fqn) is not str:
            raise ValueError("a name is no text")
        if type(about) is TensorStorageMetadata:
            _check_tensor(fqn, about, places)
        elif type(about) is not BytesStorageMetadata or MetadataIndex(fqn) not in places:
            raise ValueError(f"{fqn[:80]!r} is neither a tensor nor a value, or stands nowhere")


def _check_paths(metadata: Metadata, entries: Mapping[str, Any]) -> None:
    """Where each entry stands in the nested state: text for keys, numbers for places in lists."""
    paths = metadata.planner_data
    if paths is None:
        return
    if type(paths) is not dict or not paths.keys() <= entries.keys():
        raise ValueError("it has paths of what is no entry")
    for path in paths.values():
        if type(path) is not tuple or not 0 < len(path) <= MAX_PATH_PARTS or type(path[0]) is not str:
            raise ValueError("a path is none")
        for part in path:
            if type(part) is not str:
                _check_number(part)


def _check_tensor(fqn: str, about: TensorStorageMetadata, places: Mapping[Any, Any]) -> None:
    properties, whole, chunks = about.properties, about.size, about.chunks
    if type(properties) is not TensorProperties or type(properties.dtype) is not torch.dtype:
        raise ValueError(f"{fqn[:80]!r} has no dtype")
    if type(whole) is not torch.Size or type(chunks) is not list:
        raise ValueError(f"{fqn[:80]!r} has no shape, or no pieces")
    covered = 0
    for chunk in chunks:
        if type(chunk) is not ChunkStorageMetadata:
            raise ValueError(f"a piece of {fqn[:80]!r} is none")
        offsets, sizes = chunk.offsets, chunk.sizes
        if type(offsets) is not torch.Size or type(sizes) is not torch.Size:
            raise ValueError(f"a piece of {fqn[:80]!r} has no place")
        inside = all(offset + size <= end for offset, size, end in zip(offsets, sizes, whole, strict=True))
        place = places.get(MetadataIndex(fqn, offsets))
        count = math.prod(sizes)
        covered += count
        spare = place.length - count * properties.dtype.itemsize if place is not None else -1
        if not inside or not 0 <= spare <= _MAX_OVERHEAD_BYTES:
            raise ValueError(f"a piece of {fqn[:80]!r} lies outside of it, or does not have the bytes of its shape")
    if covered != math.prod(whole):
        raise ValueError(f"the pieces of {fqn[:80]!r} have {covered} elements, its shape {math.prod(whole)}")


def _check_number(number: Any) -> None:
    if type(number) is not int or not 0 <= number < 1 << 63:
        raise ValueError(f"a number is {brief(number)!r}")


class _Index(StrictUnpickler):
    """Makes the classes of an index and nothing else."""

    classes = _CLASSES

    def build(self, made: Any, state: Any) -> None:
        if type(made) in _FIELDS and vars(made):
            # Or a key that was found good would be changed after it has become one.
            raise pickle.UnpicklingError(f"a second state for a {type(made).__name__}")
        if type(made) is TensorProperties:
            if type(state) is not tuple or [type(part) for part in state] != list(_PROPERTIES):
                raise pickle.UnpicklingError("properties that no tensor has")
            made.__setstate__(state)  # type: ignore[no-untyped-call]
        elif type(made) in _FIELDS and type(state) is dict and state.keys() <= _FIELDS[type(made)]:
            vars(made).update(state)
        else:
            super().build(made, state)

    def check_key(self, key: Any) -> None:
        if type(key) is MetadataIndex:
            facts = vars(key)
            if type(facts.get("fqn")) is str and type(facts.get("offset")) in (torch.Size, type(None)):
                return
        elif type(key) is str:
            return
        raise pickle.UnpicklingError(f"a {type(key).__name__} as a key")


def _encoding(*arguments: Any) -> _MEM_FORMAT_ENCODING:
    """A member of the enumeration, as Python 3.12 and later store it: by its value."""
    (value,) = arguments
    return _MEM_FORMAT_ENCODING(value if type(value) is int else -1)


def _member(holder: Any, name: Any) -> _MEM_FORMAT_ENCODING:
    """The same as Python 3.11 stores it: by its name."""
    if holder is not _MEM_FORMAT_ENCODING or type(name) is not str:
        raise pickle.UnpicklingError("it reaches for an attribute")
    return _MEM_FORMAT_ENCODING[name]


def _path(*parts: Any) -> None:
    """Where somebody saved it, as PyTorch notes in `StorageMeta`: of no use, and `check` drops that."""
    if any(type(part) is not str for part in parts):
        raise pickle.UnpicklingError("a path that is none")


_Index.names = {
    **archives.DTYPES,
    **{f"{kind.__module__} {kind.__name__}": kind for kind in (*_CLASSES, _MEM_FORMAT_ENCODING)},
    "torch Size": torch.Size,
    "torch.serialization _get_layout": torch.serialization._get_layout,
    "builtins getattr": getattr,
    **{f"{module} {kind}Path": _path for module in ("pathlib", "pathlib._local") for kind in ("Posix", "PurePosix")},
}
_Index.calls = {
    id(torch.Size): archives.size,
    id(torch.serialization._get_layout): archives.layout,
    id(getattr): _member,
    id(_MEM_FORMAT_ENCODING): _encoding,
    id(_path): _path,
}
