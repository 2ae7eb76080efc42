"""
Pickled indexes of checkpoints, ``.metadata`` and ``metadata.pkl``, read as inert facts.

Whatever class or function a pickle names becomes a name and nothing more: none is imported, called or made. What it
would have been called with or given as its state is kept, and the facts are looked for in that. So this needs no
torch, and does not depend on which version of it wrote the file.

Classes and fields: torch/distributed/checkpoint/metadata.py and filesystem.py (PyTorch 2.13).
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

from ckptmgr.foreign.contents import Fault, Look, refuse_zeros
from ckptmgr.manifest import is_plain_relative
from ckptmgr.pickles import StrictUnpickler, brief, check_key, is_plain_key_part

#: About 300,000 pieces. An index of more bytes is not read.
MAX_INDEX_BYTES = 64 << 20
#: Steps of the pickle machine, each of which makes one object at most.
_MAX_STEPS = 40_000_000


@dataclasses.dataclass(slots=True, eq=False)
class Made:
    """What would have been an object: the name of what makes it, and what it would have been given."""

    kind: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


class _Name(str):
    """A class or function that a pickle names."""

    __slots__ = ()


class _Steps(dict[int, Any]):
    """The table of operations, which counts how often it is asked."""

    left = _MAX_STEPS

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Fault("F015", "its index is too large to read")
        return super().__getitem__(code)


class _Inert(StrictUnpickler):
    """Makes names and `Made`, and nothing else that is not plain."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {**StrictUnpickler.dispatch}

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.dispatch = _Steps(type(self).dispatch)  # type: ignore[misc]

    def find_class(self, module: str, name: str) -> Any:
        return _Name(f"{module} {name}")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        name = self.stack[-1]
        if type(name) is not _Name or type(arguments) is not tuple:
            raise pickle.UnpicklingError(f"a call of {brief(name)}")
        if name == "collections OrderedDict" and not arguments:
            self.stack[-1] = {}
        else:
            self.stack[-1] = Made(name, arguments)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        name = self.stack.pop()
        if type(name) is not _Name or type(arguments) is not tuple:
            raise pickle.UnpicklingError(f"an object of {brief(name)}")
        self.append(Made(name, arguments))

    def build(self, made: Any, state: Any) -> None:
        if type(made) is not Made or made.state is not None:
            super().build(made, state)
        made.state = state

    def check_key(self, key: Any) -> None:
        # By which of them it is, never by what is in it: that may change when it has become a key.
        check_key(key, lambda part: is_plain_key_part(part) or type(part) in (Made, _Name))


for _operation in (pickle.REDUCE, pickle.NEWOBJ):
    _Inert.dispatch[_operation[0]] = getattr(_Inert, StrictUnpickler.dispatch[_operation[0]].__name__)


Facts = TypeVar("Facts")


def read(look: Look, name: str, facts: Callable[[Any], Facts]) -> Facts | None:
    """What *facts* makes of the index *name* of a checkpoint; None, and a note, if it cannot be had."""
    if look.file(name) is None:
        return None
    try:
        with look.folder.opened(name) as descriptor:
            return facts(unpickle(descriptor, os.fstat(descriptor).st_size))
    except Fault as fault:
        look.note(fault.id, name, fault.why)
    except OSError as error:
        look.note("F006", name, str(error.strerror))
    return None


def unpickle(descriptor: int, size: int) -> Any:
    """
    What a pickle holds, of a file that has not been read yet.

    Raises:
        Fault: It is cut short, is none, or is too large.
    """
    refuse_zeros(descriptor, size)
    if size > MAX_INDEX_BYTES:
        raise Fault("F015", f"an index of {size} bytes is too large to read")
    try:
        with io.BufferedReader(io.FileIO(descriptor, closefd=False)) as file:
            return _Inert(file).load()
    except Fault:
        raise
    except MemoryError as error:
        raise Fault("F015", "there is not the memory to read it") from error
    except EOFError as error:
        raise Fault("F006", "it ends in the middle") from error
    except Exception as error:  # the pickle machine raises whatever its operations do on nonsense
        cut = "truncated" in str(error) or "exhausted" in str(error)
        raise Fault("F006", "it ends in the middle" if cut else f"no index: {type(error).__name__} {error}") from error


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where a piece of a tensor, or a value, stands in a file. ``plain`` if the bytes are what ``torch.save`` wrote."""

    offset: int
    length: int
    plain: bool


@dataclasses.dataclass(frozen=True)
class Index:
    """What ``.metadata`` says: the pieces in each file, and the names of what has pieces that stand nowhere."""

    pieces: dict[str, list[Piece]]
    homeless: list[str]


def of_dcp(found: Any) -> Index:
    """
    The facts of a ``.metadata``.

    Raises:
        Fault: It holds none.
    """
    entries, places = _fields(found, "Metadata", "state_dict_metadata", "storage_data")
    if type(entries) is not dict or type(places) is not dict:
        raise Fault("F006", "an index without entries")
    pieces: dict[str, list[Piece]] = {}
    placed: dict[str, set[tuple[int, ...] | None]] = {}
    for at, place in places.items():
        (name,) = _fields(at, "MetadataIndex", "fqn")
        path, offset, length = _fields(place, "_StorageInfo", "relative_path", "offset", "length")
        if type(path) is not str or not is_plain_relative(path):
            raise Fault("F006", f"it names the file {brief(path)!r}")
        if type(name) is not str or not _is_count(offset) or not _is_count(length):
            raise Fault("F006", "an index without places")
        plain = not place.state.get("transform_descriptors")
        pieces.setdefault(path, []).append(Piece(offset, length, plain))
        placed.setdefault(name, set()).add(_sizes(at.state.get("offset")))
    homeless = [
        name
        for name, about in entries.items()
        if type(name) is str and not set(_corners(about)) <= placed.get(name, set())
    ]
    return Index(pieces, homeless)


def _fields(made: Any, kind: str, *names: str) -> list[Any]:
    if type(made) is not Made or type(made.state) is not dict or not {*names} <= made.state.keys():
        raise Fault("F006", f"an index without {kind}")
    return [made.state[name] for name in names]


def _corners(about: Any) -> Iterator[tuple[int, ...] | None]:
    """Where the pieces of an entry begin; None for what is no tensor."""
    state = about.state if type(about) is Made else None
    chunks = state.get("chunks") if type(state) is dict else None
    if type(chunks) is not list:
        yield None
        return
    for chunk in chunks:
        yield _sizes(*_fields(chunk, "ChunkStorageMetadata", "offsets"))


def _sizes(made: Any) -> tuple[int, ...] | None:
    """The numbers of a ``torch.Size``; None for None."""
    if made is None:
        return None
    numbers = made.arguments[0] if type(made) is Made and len(made.arguments) == 1 else None
    if type(numbers) is not tuple or not all(_is_count(number) for number in numbers):
        raise Fault("F006", "an index with places that are none")
    return numbers


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 1 << 63
