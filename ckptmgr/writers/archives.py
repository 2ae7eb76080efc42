"""
Files of ``torch.save``, read without trusting a byte of them.

``torch.load(weights_only=True)`` runs no code of a pickle's choosing, but a few bytes can make it build a
``bytearray`` of any length, unfold a compressed member of any size, or give a NumPy array a dtype whose fields
are pointers (PyTorch 2.13, NumPy 2.4). So archive and pickle are read here: members are stored, not
compressed, and no larger together than the archive; the pickle has the operations and the names of the
table below and no others; every number in it is compared with the bytes that are there. What is in memory
afterwards is at most a small multiple of what is in the file.

Layout: torch/serialization.py, ``_save``: a ZIP file with ``data.pkl``, ``byteorder``, and one member
``data/KEY`` per storage. Checksums are not looked at (ADR 0007: they are not the tensors'); digests are.
"""

from __future__ import annotations

import codecs
import collections
import io
import math
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from typing import Any, NoReturn

import numpy
import torch

from ckptmgr.errors import CorruptCheckpoint
from ckptmgr.pickles import MAX_CROWD, StrictUnpickler, brief, check_key, is_plain_key_part
from ckptmgr.writers.arena import available_bytes

#: Bytes of a ZIP directory and of any single read of it; a hundred bytes per tensor.
_MAX_DIRECTORY_BYTES = 64 << 20
#: Up to here nobody asks whether there is memory for an archive.
_SMALL_BYTES = 64 << 20
#: Parts that one may come by who walks through a value: so many in any case, and so many for each byte of its archive.
_MAX_PARTS = 10_000_000
_MAX_PARTS_PER_BYTE = 10
#: Elements of a tensor that shows each of its stored ones more than once.
_MAX_REPEATED = 1 << 20
_DTYPE = re.compile(r"[biufcSUVMm][0-9]{1,9}")
_UNITS = ("generic", "Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as")


class OpenFile:
    """A file that stays open for reading as long as somebody has this object; *descriptor* is duplicated."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = os.dup(descriptor)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Source:
    """
    Bytes that can be read anywhere: of an open file, from *offset* on, or in memory. It owns no descriptor, but keeps a
    `OpenFile`.

    Raises:
        ValueError: When bytes are asked for that are not there.
    """

    def __init__(self, where: int | bytes | OpenFile, offset: int = 0, length: int | None = None) -> None:
        self._owner = where
        self._where = where = where.descriptor if isinstance(where, OpenFile) else where
        self._offset = offset
        size = os.fstat(where).st_size if isinstance(where, int) else len(where)
        self.length = size - offset if length is None else length
        if not 0 <= offset <= offset + self.length <= size:
            raise ValueError(f"{self.length} bytes at {offset} are not in a file of {size}")

    def into(self, buffer: memoryview, at: int) -> None:
        """Fill *buffer* from the offset *at* on."""
        if not 0 <= at <= at + len(buffer) <= self.length:
            raise ValueError(f"{len(buffer)} bytes at {at} are not in {self.length}")
        if isinstance(self._where, bytes):
            buffer[:] = self._where[self._offset + at : self._offset + at + len(buffer)]
            return
        while buffer:
            count = os.preadv(self._where, [buffer], self._offset + at)
            if not count:
                raise ValueError("the file has become shorter")
            buffer = buffer[count:]
            at += count

    def at(self, at: int, count: int) -> bytes:
        """*count* bytes."""
        if count > self.length:
            raise ValueError(f"{count} bytes are not in {self.length}")
        data = bytearray(count)
        self.into(memoryview(data), at)
        return bytes(data)


class _View:
    """A source as `zipfile` wants it, which reads a directory of bounded size from it and nothing else."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._position = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, offset + (0, self._position, self._source.length)[whence])
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._source.length - self._position)
        count = left if count < 0 else min(count, left)
        if count > _MAX_DIRECTORY_BYTES:
            raise ValueError(f"a directory of {count} bytes")
        data = self._source.at(self._position, count)
        self._position += count
        return data


class _Archive:
    """The members of an archive: where each one is in the source."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._members: dict[str, zipfile.ZipInfo] = {}
        with zipfile.ZipFile(_View(source)) as archive:
            members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise ValueError(f"the member {member.filename[:80]!r} is compressed")
            # The folder that all members are in is named after the file.
            name = member.filename.partition("/")[2]
            if name in self._members:
                raise ValueError(f"two members are named {name[:80]!r}")
            self._members[name] = member
        # Or a file of many members that are one and the same would take many times its bytes.
        if sum(member.file_size for member in members) > source.length:
            raise ValueError("the members have more bytes than the archive")

    def size(self, name: str) -> int | None:
        """The bytes of a member; None if there is no such member."""
        member = self._members.get(name)
        return member.file_size if member is not None else None

    def into(self, name: str, buffer: memoryview) -> None:
        """Fill *buffer* with a member of its size."""
        member = self._members[name]
        at = member.header_offset
        signature, name_length, extra_length = struct.unpack("<4s22xHH", self._source.at(at, 30))
        if signature != b"PK\x03\x04":
            raise ValueError(f"the member {name[:80]!r} does not begin where it should")
        self._source.into(buffer, at + 30 + name_length + extra_length)

    def bytes(self, name: str) -> bytes:
        """A whole member."""
        size = self.size(name)
        if size is None:
            raise ValueError(f"there is no {name!r}")
        data = bytearray(size)
        self.into(name, memoryview(data))
        return bytes(data)


def _is_key_part(part: Any) -> bool:
    return is_plain_key_part(part) or type(part) in _KEYS or isinstance(part, numpy.generic)


_KEYS = frozenset({torch.dtype, torch.Size, torch.device})


def most_parts(length: int) -> int:
    """How many parts a value may have that is read from an archive of *length* bytes."""
    return max(_MAX_PARTS, _MAX_PARTS_PER_BYTE * length)


def check_parts(value: Any, most: int) -> None:
    """
    Refuse containers that hold the same ones again and again: small, and for ever to copy, compare or spell out.

    Raises:
        ValueError: Who walks through *value* comes by more than *most* parts.
    """
    parts: dict[int, int] = {}
    waiting: list[tuple[Any, list[Any] | None]] = [(value, None)]
    while waiting:
        part, inner = waiting.pop()
        if inner is not None:
            # One that holds itself has at least its own parts: a copy ends there.
            parts[id(part)] += sum(parts[id(one)] for one in inner)
            if parts[id(part)] > most:
                raise ValueError(f"it holds the same containers so often that they have more than {most} parts")
        elif id(part) not in parts and type(part) in _CONTAINERS:
            below = part
            if isinstance(part, dict):
                below = [*part.keys(), *part.values(), *getattr(part, "__dict__", {}).values()]
            inner = [one for one in below if type(one) in _CONTAINERS]
            parts[id(part)] = len(below)
            waiting.append((part, inner))
            waiting += [(one, None) for one in inner]


#: All that an archive can be read into.
_CONTAINERS = frozenset({tuple, list, dict, set, collections.OrderedDict, collections.Counter})


class _Storage:
    """Memory that tensors are views of."""

    def __init__(self, dtype: torch.dtype, data: torch.Tensor) -> None:
        self.dtype = dtype
        self.data = data


class _Values(StrictUnpickler):
    """Reads ``data.pkl``, and the tensors that it refers to from the rest of the archive."""

    def __init__(self, archive: _Archive) -> None:
        super().__init__(io.BytesIO(archive.bytes("data.pkl")))
        self._archive = archive
        self._storages: dict[str, _Storage] = {}

    def check_key(self, key: Any) -> None:
        check_key(key, _is_key_part)

    def persistent_load(self, pid: Any) -> _Storage:
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("a reference to what is no storage")
        _, kind, key, _, count = pid
        dtype = _STORAGES.get(id(kind))
        size = self._archive.size(f"data/{key}") if type(key) is str else None
        if dtype is None or type(count) is not int or size is None or count * dtype.itemsize != size:
            raise pickle.UnpicklingError(f"a storage of {brief(count)} elements that is not there")
        if key not in self._storages:
            data = torch.empty(size, dtype=torch.uint8)
            if size:
                self._archive.into(f"data/{key}", data.numpy().data)
            self._storages[key] = _Storage(dtype, data)
        return self._storages[key]

    def build(self, made: Any, state: Any) -> None:
        if type(made) is numpy.ndarray:
            _, shape, dtype, _, data = state
            _check_dtype(dtype)
            _check_sizes(shape)
            if type(data) is not bytes or len(data) != math.prod(shape) * dtype.itemsize or not dtype.itemsize:
                raise pickle.UnpicklingError("an array with other bytes than its shape says")
            made.__setstate__(state)
        elif isinstance(made, numpy.dtype):
            _check_dtype(made)
            if not any(state == like.__reduce__()[2] for like in _spellings(made, state)):
                raise pickle.UnpicklingError("a dtype with a state that no plain one has")
            made.__setstate__(state)  # type: ignore[attr-defined]
        elif type(made) is collections.OrderedDict and type(state) is dict:
            # A module's state dict has its versions as an attribute.
            if not all(type(name) is str and not hasattr(collections.OrderedDict, name) for name in state):
                raise pickle.UnpicklingError("an attribute that a mapping has already")
            vars(made).update(state)
        else:
            super().build(made, state)


def load(source: Source, what: str) -> Any:
    """
    Read back what ``torch.save`` wrote, on the CPU.

    Tensors, NumPy arrays and scalars, numbers, text and containers of them; the rest is refused.

    Raises:
        CorruptCheckpoint: It is something else, or there is not the memory for it.
    """
    try:
        if source.length > _SMALL_BYTES and source.length > (there := available_bytes()):
            raise MemoryError(f"it has {source.length} bytes, and {there} are available")
        archive = _Archive(source)
        if archive.size("byteorder") not in (None, len("little"), len("big")) or (
            archive.size("byteorder") is not None and archive.bytes("byteorder").decode() != sys.byteorder
        ):
            raise ValueError("it is of a machine with another order of bytes")
        value = _Values(archive).load()
        check_parts(value, most_parts(source.length))
        return value
    except Exception as error:
        reason = f"{error}" if str(error) and not isinstance(error, KeyError) else f"{type(error).__name__} {error}"
        raise CorruptCheckpoint(
            f"{what} cannot be read: {reason[:200]}", directory=what, mismatches=(reason[:200],)
        ) from error


# -- what may be called ---------------------------------------------------------------------------------


def _refuse(what: str) -> NoReturn:
    raise pickle.UnpicklingError(what)


def _check_sizes(sizes: Any) -> None:
    if type(sizes) not in (tuple, torch.Size) or not all(type(n) is int and 0 <= n < 1 << 63 for n in sizes):
        _refuse("a shape that is none")
    if len(sizes) > 64 or math.prod(n for n in sizes if n) >= 1 << 63:
        _refuse("a shape that no tensor can have")


def _tensor(*arguments: Any) -> torch.Tensor:
    storage, offset, sizes, strides, requires_grad, hooks, *more = arguments
    if type(storage) is not _Storage or hooks or more not in ([], [None], [{}]):
        _refuse("a tensor made of something else, or with more to it")
    return _flagged(_view(storage, storage.dtype, offset, sizes, strides), requires_grad)


def _tensor_of_dtype(*arguments: Any) -> torch.Tensor:
    storage, offset, sizes, strides, requires_grad, hooks, dtype, *more = arguments
    if type(storage) is not _Storage or hooks or type(dtype) is not torch.dtype or more not in ([], [None], [{}]):
        _refuse("a tensor made of something else, or with more to it")
    return _flagged(_view(storage, dtype, offset, sizes, strides), requires_grad)


def _flagged(tensor: torch.Tensor, requires_grad: Any) -> torch.Tensor:
    if type(requires_grad) is not bool:
        _refuse("a tensor of which is not known whether it has gradients")
    return tensor.requires_grad_() if requires_grad else tensor


def _view(storage: _Storage, dtype: torch.dtype, offset: Any, sizes: Any, strides: Any) -> torch.Tensor:
    _check_sizes(sizes)
    _check_sizes((offset, *strides) if type(strides) is tuple else None)
    if len(strides) != len(sizes):
        _refuse("a tensor whose shape and strides do not fit")
    there = len(storage.data) // dtype.itemsize
    count = math.prod(sizes)
    reach = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1 if count else 0
    if reach > there or (count > there and count > _MAX_REPEATED):
        _refuse(f"a tensor of {list(sizes)} in a storage of {there} elements")
    view = torch.empty(0, dtype=dtype)
    view.set_(storage.data.untyped_storage(), offset if count else 0, torch.Size(sizes), strides)
    return view


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> torch.nn.Parameter:
    if not isinstance(data, torch.Tensor) or type(requires_grad) is not bool or hooks:
        _refuse("a parameter made of something else")
    return torch.nn.Parameter(data, requires_grad)


def _array(kind: Any, shape: Any, code: Any) -> Any:
    if kind is not numpy.ndarray or shape != (0,) or code not in (b"b", "b"):
        _refuse("an array made of something else")
    return _reconstruct(numpy.ndarray, (0,), b"b")


def _dtype(text: Any, *how: Any) -> Any:
    if type(text) is not str or not _DTYPE.fullmatch(text) or how not in ((False, True), (0, 1)):
        _refuse("a dtype that is none")
    return numpy.dtype(text, False, True)


def _check_dtype(dtype: Any) -> None:
    if not isinstance(dtype, numpy.dtype) or dtype.kind not in "biufcSUVMm" or dtype.hasobject:
        _refuse("a dtype that is none")
    if dtype.names is not None or dtype.subdtype is not None or dtype.metadata is not None:
        _refuse("a dtype of parts")


def _spellings(dtype: Any, state: Any) -> list[Any]:
    """The plain dtypes that *dtype* may become by a state."""
    like = [dtype]
    if dtype.kind in "Mm" and type(state) is tuple and len(state) == 9 and type(state[8]) is tuple:
        unit, count, *_ = state[8][1] if len(state[8]) == 2 and type(state[8][1]) is tuple else ("", 0)
        unit = unit.decode("ascii", "replace") if type(unit) is bytes else unit
        if unit in _UNITS and type(count) is int and 0 < count < 1 << 31:
            like = [numpy.dtype(f"{dtype.kind}8[{count if unit != 'generic' else ''}{unit}]")]
    return [one.newbyteorder(order) for one in like for order in "<>="]


def _scalar(dtype: Any, data: Any = None) -> Any:
    _check_dtype(dtype)
    if type(data) is not bytes or len(data) != dtype.itemsize:
        _refuse("a number with other bytes than its dtype says")
    return _make_scalar(dtype, data)


def _bytes(*arguments: Any) -> bytes:
    return b"" if not arguments else _refuse("bytes made of something else")


def _bytearray(*arguments: Any) -> bytearray:
    if not arguments:
        return bytearray()
    if len(arguments) == 1 and type(arguments[0]) is bytes:
        return bytearray(arguments[0])
    return bytearray(_encode(*arguments))


def _encode(text: Any, how: Any) -> bytes:
    if type(text) is not str or how not in ("latin1", "latin-1"):
        _refuse("text that stands for something else than bytes")
    return text.encode("latin1")


def _set(items: Any) -> set[Any]:
    if type(items) is not list:
        _refuse("a set made of something else")
    for item in items:
        check_key(item, _is_key_part)
    if max(collections.Counter(map(hash, items)).values(), default=0) > MAX_CROWD:
        _refuse("too many items with one hash")
    return set(items)


def _complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        _refuse("a complex number made of something else")
    return complex(real, imaginary)


def size(numbers: Any) -> torch.Size:
    """A `torch.Size`, of whole numbers that are not negative."""
    _check_sizes(numbers)
    return torch.Size(numbers)


def layout(name: Any) -> torch.layout:
    """A `torch.layout` by its name."""
    found = getattr(torch, name.removeprefix("torch."), None) if type(name) is str else None
    return found if isinstance(found, torch.layout) else _refuse("a layout that is none")


def _device(*arguments: Any) -> torch.device:
    if not arguments or type(arguments[0]) is not str or not all(type(n) is int for n in arguments[1:]):
        _refuse("a device that is none")
    return torch.device(*arguments)


def _counter(*arguments: Any) -> collections.Counter[Any]:
    if arguments and (len(arguments) > 1 or type(arguments[0]) is not dict):
        _refuse("a counter made of something else")
    return collections.Counter(*arguments)


def _ordered(*arguments: Any) -> collections.OrderedDict[Any, Any]:
    return collections.OrderedDict() if not arguments else _refuse("a mapping made of something else")


_multiarray: Any = numpy._core.multiarray  # type: ignore[attr-defined]
_reconstruct, _make_scalar = _multiarray._reconstruct, _multiarray.scalar
#: Every dtype by the name that a pickle has for it.
DTYPES = {
    f"torch {str(value).removeprefix('torch.')}": value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
_TYPED = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
}  # fmt: skip
_KINDS = {f"torch {name}Storage": getattr(torch, f"{name}Storage") for name in (*_TYPED, "Untyped")}
_KINDS["torch.storage UntypedStorage"] = torch.UntypedStorage
_STORAGES = {id(_KINDS[f"torch {name}Storage"]): dtype for name, dtype in (*_TYPED.items(), ("Untyped", torch.uint8))}
_CALLABLE: dict[str, tuple[Any, Callable[..., Any]]] = {
    "torch._utils _rebuild_tensor_v2": (torch._utils._rebuild_tensor_v2, _tensor),
    "torch._utils _rebuild_tensor_v3": (torch._utils._rebuild_tensor_v3, _tensor_of_dtype),
    "torch._utils _rebuild_parameter": (torch._utils._rebuild_parameter, _parameter),
    "torch Size": (torch.Size, size),
    "torch device": (torch.device, _device),
    "torch.serialization _get_layout": (torch.serialization._get_layout, layout),
    "collections OrderedDict": (collections.OrderedDict, _ordered),
    "collections Counter": (collections.Counter, _counter),
    "builtins bytes": (bytes, _bytes),
    "builtins bytearray": (bytearray, _bytearray),
    "builtins set": (set, _set),
    "builtins complex": (complex, _complex),
    "_codecs encode": (codecs.encode, _encode),
    "numpy dtype": (numpy.dtype, _dtype),
    "numpy._core.multiarray _reconstruct": (_reconstruct, _array),
    "numpy._core.multiarray scalar": (_make_scalar, _scalar),
}
_Values.names = {
    **DTYPES,
    **_KINDS,
    **{name: real for name, (real, _) in _CALLABLE.items()},
    "numpy ndarray": numpy.ndarray,
}
_Values.calls = {id(real): instead for real, instead in _CALLABLE.values()}
