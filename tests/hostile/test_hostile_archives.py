"""Archives and pickles made to hurt: an error of ours, nothing run, and no more memory than their bytes are worth."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_bytes as b
import numpy
import pytest
import torch
from hostile_kit import bounded, guarded, refuse

from ckptmgr.errors import CorruptCheckpoint
from ckptmgr.writers import archives
from ckptmgr.writers import state as states
from ckptmgr.writers.state import RandomState

GIB = 1 << 30
VOID_OF_OBJECTS = (
    *(b.number(3), b.text("|"), b.NONE, b.tuple_of(b.text("a"))),
    b"}" + b.text("a") + b.tuple_of(b.dtype("O8"), b.number(0)) + b"s",
    *(b.number(8), b.number(1), b.number(0)),
)


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for key, content in members.items():
            file.writestr(key, content)
    return out.getvalue()


def empty() -> bytes:
    return zipped({})


def twice() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for content in (b.PROTO + b.NONE + b.STOP, b.PROTO + b.TRUE + b.STOP):
            file.writestr("archive/data.pkl", content)
    return out.getvalue()


def overlapping() -> bytes:
    """An archive of 300 members of 8 MiB that are all the same 8 MiB, and a pickle that asks for every one."""
    whole = b.archive(b.list_of(*(b.tensor(b.storage(key=str(n), count=2 << 20)) for n in range(300))), {})
    out = io.BytesIO(whole)
    with zipfile.ZipFile(out, "a") as file:
        file.writestr("archive/data/0", bytes(8 << 20))
        one = file.getinfo("archive/data/0")
        for n in range(1, 300):
            other = zipfile.ZipInfo(f"archive/data/{n}")
            other.header_offset, other.CRC = one.header_offset, one.CRC
            other.file_size = other.compress_size = one.file_size
            file.filelist.append(other)
            file.NameToInfo[other.filename] = other
        file._didModify = True
    return out.getvalue()


def alike() -> list[bytes]:
    """Numbers that all have the hash 0, so that each is compared with all before it."""
    return [b.number(n * sys.hash_info.modulus) for n in range(1, 200_000)]


HOSTILE: dict[str, Callable[[], bytes]] = {
    # Calls
    "system": lambda: b.archive(b.call(b.name("posix", "system"), b.text("touch /tmp/owned"))),
    "eval": lambda: b.archive(b.call(b.name("builtins", "eval"), b.text("1"))),
    "getattr": lambda: b.archive(b.call(b.name("builtins", "getattr"), b.name("torch", "Size"), b.text("mro"))),
    "torch.load": lambda: b.archive(b.call(b.name("torch.serialization", "load"), b.text("x"))),
    "a dotted name": lambda: b.archive(b.name("torch", "nn.Module")),
    "a nested tensor": lambda: b.archive(b.call(b.name("torch._utils", "_rebuild_nested_tensor"), b.NONE)),
    "a call of a number": lambda: b.archive(b.call(b.number(1))),
    "a call of a list": lambda: b.archive(b.call(b.EMPTY_LIST)),
    "a file": lambda: b.archive(b.call(b.name("builtins", "open"), b.text("/etc/passwd"))),
    # Memory
    "a bytearray of a length": lambda: b.archive(b.call(b.name("__builtin__", "bytearray"), b.number(GIB))),
    "bytes of a length": lambda: b.archive(b.call(b.name("__builtin__", "bytes"), b.number(GIB))),
    "an untyped storage": lambda: b.archive(b.call(b.name("torch.storage", "UntypedStorage"), b.number(GIB))),
    "a tensor of a size": lambda: b.archive(b.call(b.name("torch", "Tensor"), b.number(GIB))),
    "an array of a shape": lambda: b.archive(b.call(b.name("numpy", "ndarray"), b.tuple_of(b.number(GIB)))),
    "a large dtype": lambda: b.archive(b.array(b.dtype("S900000000"), (4,), b"")),
    "long text": lambda: b.archive(b"X" + struct.pack("<I", GIB)),
    "long bytes": lambda: b.archive(b"\x8e" + struct.pack("<Q", 1 << 62)),
    "a long bytearray": lambda: b.archive(b"\x96" + struct.pack("<Q", GIB)),
    "a frame": lambda: b.archive(b"\x95" + struct.pack("<Q", 1 << 62)),
    "compressed": lambda: b.archive(b.NONE, {"data/0": bytes(GIB >> 6)}, zipfile.ZIP_DEFLATED),
    "compressed by lzma": lambda: b.archive(b.NONE, {"data/0": bytes(1 << 20)}, zipfile.ZIP_LZMA),
    "members on top of each other": overlapping,
    # Time
    "a call of what takes for ever to spell out": lambda: b.archive(b.call(b.bomb(40))),
    "an object of what takes for ever to spell out": lambda: b.archive(b.bomb(40) + b.EMPTY_TUPLE + b"\x81"),
    "a storage of a number that takes for ever to spell out": lambda: b.archive(
        b.tuple_of(b.text("storage"), b.name("torch", "FloatStorage"), b.text("0"), b.text("cpu"), b.bomb(40)) + b"Q"
    ),
    "a key that takes for ever": lambda: b.archive(b.EMPTY_DICT + b.bomb(31) + b.NONE + b"s"),
    "keys that take for ever": lambda: b.archive(b.EMPTY_DICT + b"(" + b.bomb(31) + b.NONE + b"u"),
    "an item that takes for ever": lambda: b.archive(b.call(b.name("__builtin__", "set"), b.list_of(b.bomb(31)))),
    "a dtype that takes for ever": lambda: b.archive(b.call(b.name("numpy", "dtype"), b.bomb(31))),
    "keys of one hash": lambda: b.archive(b.EMPTY_DICT + b"(" + b"".join(n + b.NONE for n in alike()) + b"u"),
    "keys of one hash, one by one": lambda: b.archive(b.EMPTY_DICT + b"".join(n + b.NONE + b"s" for n in alike())),
    "items of one hash": lambda: b.archive(b.call(b.name("__builtin__", "set"), b.list_of(*alike()))),
    "a long list again and again": lambda: b.archive(
        b"](" + b"]q\x00(" + b.NONE * 50_000 + b"e" + b"h\x00" * 50_000 + b"e"
    ),
    "tuples in tuples": lambda: b.archive(b.bomb(40)),
    "lists in lists": lambda: b.archive(b.EMPTY_LIST + b"q\x00" + b"](h\x00h\x00eq\x00" * 40),
    "mappings in mappings": lambda: b.archive(
        b.EMPTY_DICT + b"q\x00" + (b"}(" + b.text("a") + b"h\x00" + b.text("b") + b"h\x00uq\x00") * 40
    ),
    "tuples in tuples as an attribute": lambda: b.archive(
        b.call(b.name("collections", "OrderedDict")) + b.EMPTY_DICT + b.text("x") + b.bomb(40) + b"s" + b.BUILD
    ),
    "a wide key": lambda: b.archive(b.EMPTY_DICT + b.tuple_of(*[b.NONE] * 5000) + b.NONE + b"s"),
    # Memory that is somebody else's
    "more elements than bytes": lambda: b.archive(b.tensor(b.storage(count=1 << 20), sizes=(1 << 20,))),
    "elements behind the end": lambda: b.archive(b.tensor(b.storage(), offset=3)),
    "strides behind the end": lambda: b.archive(b.tensor(b.storage(), strides=(1 << 40,))),
    "a negative offset": lambda: b.archive(b.tensor(b.storage(), offset=-1)),
    "negative strides": lambda: b.archive(b.tensor(b.storage(), strides=(-1,))),
    "a negative size": lambda: b.archive(b.tensor(b.storage(), sizes=(-4,))),
    "sizes that overflow": lambda: b.archive(b.tensor(b.storage(), sizes=(1 << 33, 1 << 33), strides=(0, 0))),
    "one element shown for ever": lambda: b.archive(b.tensor(b.storage(), sizes=(1 << 40,), strides=(0,))),
    "a negative storage": lambda: b.archive(b.tensor(b.storage(count=-4))),
    "a storage that is not there": lambda: b.archive(b.tensor(b.storage(key="1"))),
    "a storage elsewhere": lambda: b.archive(b.tensor(b.storage(key="../data.pkl"))),
    "a pointer in an array": lambda: b.archive(b.array(b.dtype("V8", *VOID_OF_OBJECTS), (1,), b"AAAAAAAA")),
    "an array of pointers": lambda: b.archive(b.array(b.dtype("O8"), (1,), b"AAAAAAAA")),
    "a pointer for a number": lambda: b.archive(
        b.call(b.name("numpy._core.multiarray", "scalar"), b.dtype("O8"), b.raw(b"AAAAAAAA"))
    ),
    "an array with less than its shape": lambda: b.archive(b.array(b.plain_dtype("f8"), (1 << 20,), bytes(8))),
    "an array with more than its shape": lambda: b.archive(b.array(b.plain_dtype("f8"), (1,), bytes(80))),
    "a number with too few bytes": lambda: b.archive(
        b.call(b.name("numpy._core.multiarray", "scalar"), b.plain_dtype("f8"), b.raw(b"A"))
    ),
    "a dtype with another size": lambda: b.archive(
        b.dtype("f8", b.number(3), b.text("<"), b.NONE, b.NONE, b.NONE, b.number(1 << 20), b.number(-1), b.number(0))
    ),
    "a dtype with flags": lambda: b.archive(
        b.dtype("V8", b.number(3), b.text("|"), b.NONE, b.NONE, b.NONE, b.number(8), b.number(1), b.number(63))
    ),
    # Nonsense
    "nothing": lambda: b"",
    "an empty archive": empty,
    "no pickle": lambda: zipped({"archive/byteorder": b"little"}),
    "another order of bytes": lambda: b.archive(b.NONE, {"byteorder": b"big"}),
    "a member twice": twice,
    "a pickle alone": lambda: pickle.dumps({"a": 1}),
    "an object": lambda: b.archive(b.name("torch.nn.modules.linear", "Linear") + b.EMPTY_TUPLE + b"\x81"),
    "a state for a list": lambda: b.archive(b.EMPTY_LIST + b.EMPTY_DICT + b.BUILD),
    "a mapping's method": lambda: b.archive(
        b.call(b.name("collections", "OrderedDict")) + b"}" + b.text("items") + b.NONE + b"s" + b.BUILD
    ),
    "items for a tensor": lambda: b.archive(b.tensor(b.storage()) + b.number(0) + b.number(1) + b"s"),
    "a list as a key": lambda: b.archive(b.EMPTY_DICT + b.EMPTY_LIST + b.NONE + b"s"),
    "half a pair": lambda: b.archive(b.EMPTY_DICT + b"(" + b.NONE + b"u"),
    "an empty stack": lambda: b.archive(b"00R"),
    "a mark that is not there": lambda: b.archive(b"t"),
    "a memo that is not there": lambda: b.archive(b"h\x07"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_is_refused_and_costs_next_to_nothing(what, tmp_path):
    data = HOSTILE[what]()
    with bounded(), guarded(tmp_path):
        error = refuse(CorruptCheckpoint, archives.load, archives.Source(data), "it")

    assert error.message.startswith("it cannot be read: ")
    assert len(error.message) < 400
    assert not Path("/tmp/owned").exists()


def test_a_memo_of_any_number_takes_one_place():
    """Python's unpickler in C makes room for all numbers up to it."""
    with bounded():
        assert archives.load(archives.Source(b.archive(b.NONE + b"r" + struct.pack("<I", 1 << 27))), "it") is None


@pytest.mark.parametrize("size", [1 << 40, 1 << 43])
def test_a_file_that_claims_to_be_large_is_not_read(tmp_path, size):
    """Sparse: it takes no room on the disk, and must take none in memory."""
    path = tmp_path / "per-rank-0.pt"
    data = HOSTILE["nothing"]() or b.archive(b.NONE)
    path.write_bytes(data)
    os.truncate(path, size)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with bounded():
            refuse(CorruptCheckpoint, archives.load, archives.Source(descriptor), "it")
    finally:
        os.close(descriptor)


def test_an_archive_with_a_directory_as_long_as_the_file_is_not_read_into_memory(tmp_path):
    """The end of an archive says how long its directory is; here half of a sparse file."""
    path = tmp_path / "it"
    path.touch()
    os.truncate(path, 2 * GIB)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, GIB, GIB - 22, 0)
    with path.open("r+b") as file:
        file.seek(-len(end), os.SEEK_END)
        file.write(end)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with bounded():
            refuse(CorruptCheckpoint, archives.load, archives.Source(descriptor), "it")
    finally:
        os.close(descriptor)


def test_more_than_there_is_memory_for_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "available_bytes", lambda: 50 << 20)
    path = tmp_path / "it"
    torch.save(torch.zeros(20 << 20), path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with bounded(mib=20):
            error = refuse(CorruptCheckpoint, archives.load, archives.Source(descriptor), "it")
    finally:
        os.close(descriptor)

    assert "are available" in error.message


def test_what_torch_writes_is_read_as_torch_reads_it():
    value = {
        "tied": [torch.arange(6.0).view(2, 3), torch.zeros(0, 3), torch.tensor(3)],
        "strange": [torch.ones(3, 4).t(), torch.ones(4)[::2], torch.ones(1).expand(5)],
        "narrow": torch.ones(2, dtype=torch.uint16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "module": torch.nn.BatchNorm1d(2).state_dict(),
        "layout": torch.strided, "device": torch.device("cpu"), "set": {1, "a"}, "bytearray": bytearray(b"xyz"),
        "when": numpy.array(["2026-01-01T00:00"], dtype="M8[25s]"), "big": numpy.arange(3, dtype=">i4"),
        "fortran": numpy.asfortranarray(numpy.ones((2, 3))), "keys": {(1, ("a", None)): 1, 2.5: 2, b"x": 3},
    }  # fmt: skip
    value["tied"].append(value["tied"][0])
    buffer = io.BytesIO()
    torch.save(value, buffer)
    back = archives.load(archives.Source(buffer.getvalue()), "it")
    theirs = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)

    assert repr(back) == repr(theirs)
    assert back["tied"][3] is back["tied"][0]
    assert back["when"].dtype == value["when"].dtype
    assert back["module"]._metadata == value["module"]._metadata
    back["tied"][0][0] = 7
    assert back["tied"][3][0, 0] == 7


def test_containers_that_are_shared_or_hold_themselves_are_read():
    names = [str(n) for n in range(100)]
    value: dict[str, Any] = {"shared": [names] * 1000, "keys": {(n, n / 2): n for n in range(5000)}}
    value["itself"] = value
    buffer = io.BytesIO()
    torch.save(value, buffer)

    back = archives.load(archives.Source(buffer.getvalue()), "it")

    assert back["itself"] is back
    assert (back["shared"], back["keys"]) == (value["shared"], value["keys"])


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, 2).to_sparse(), torch.ones(1 << 21).expand(2, -1), numpy.zeros(1, [("a", "i4")]),
        [[0] * 10_000] * 2000, {(n * sys.hash_info.modulus, 0): None for n in range(1100)}, {(0,) * 1001: 0},
    ],
    ids=["sparse", "repeated", "structured", "shared", "keys of one hash", "a wide key"],
)  # fmt: skip
def test_what_would_not_be_read_back_is_refused_when_it_is_saved(value):
    from ckptmgr.errors import InvalidArgument

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refuse(InvalidArgument, states.dump, {"v": value}, "what")


def deep(levels: int) -> Any:
    """What takes for ever to spell out, to hash or to make an array of."""
    made: Any = ()
    for _ in range(levels):
        made = (made, made)
    return made


def spoiled(**changes: Any) -> dict[str, Any]:
    return {**RandomState().state_dict(), **changes}


name, key, *rest = numpy.random.get_state()


def of_mapping(*, name: str = "MT19937", pos: Any = None, **more: Any) -> dict[str, Any]:
    """The state of NumPy's generator in its other form."""
    made = {"bit_generator": name, "state": {"key": key, "pos": pos}, "has_gauss": 0, "gauss": 0.0}
    return {**made, **more}


@pytest.mark.parametrize(
    "state",
    [
        spoiled(numpy=(name, key, 1 << 20, *rest[1:])),
        spoiled(numpy=(name, key, -1, *rest[1:])),
        spoiled(numpy=(name, key[:10], *rest)),
        spoiled(numpy=("PCG64", {}, 0, 0, 0.0)),
        spoiled(numpy=None),
        spoiled(numpy=of_mapping(pos=1 << 20)),
        spoiled(numpy=of_mapping(pos=-1)),
        spoiled(numpy={**of_mapping(), "a": 1, "b": 2}),
        spoiled(numpy=of_mapping(name="Philox", buffer_pos=1 << 20)),
        spoiled(numpy=(name, [1 << 70] * 624, *rest)),
        spoiled(numpy=(name, key, rest[0], 1 << 70, 0.0)),
        spoiled(python=(3, (1 << 70,) * 625, None)),
        spoiled(python=(3, RandomState().state_dict()["python"][1], "x")),
        spoiled(python=(2, ("%900000000d",) * 625, None)),
        spoiled(python=(deep(40), (1,), None)),
        spoiled(numpy=(name, deep(40), *rest)),
        spoiled(numpy=(deep(40), key, *rest)),
        spoiled(numpy={"bit_generator": "PCG64", "state": deep(40), "has_uint32": 0, "uinteger": 0}),
        spoiled(torch=deep(40)),
        spoiled(python=(3, (1, 2, 3), None)),
        spoiled(python=(3, (*range(624), 10**9), None)),
        spoiled(python="x"),
        spoiled(torch=torch.zeros(3, dtype=torch.uint8)),
        spoiled(torch=torch.full((5056,), 255, dtype=torch.uint8)),
        spoiled(torch=None),
        {},
    ],
)
def test_the_state_of_a_generator_that_points_elsewhere_is_refused(state):
    """NumPy would read at any position that it is given."""
    kept = RandomState().state_dict()
    try:
        with bounded():
            refuse(CorruptCheckpoint, RandomState().load_state_dict, state)
        numpy.random.rand(10)
    finally:
        RandomState().load_state_dict(kept)


@pytest.mark.parametrize("kind", [numpy.random.MT19937, numpy.random.PCG64, numpy.random.Philox, numpy.random.SFC64])
def test_the_state_of_whatever_generator_numpy_uses_is_given_back(kind):
    kept = numpy.random.get_bit_generator()
    try:
        numpy.random.set_bit_generator(kind(3))
        numpy.random.rand(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its legacy form
            state = RandomState().state_dict()
        expected = numpy.random.rand(7)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        RandomState().load_state_dict(archives.load(archives.Source(buffer.getvalue()), "it"))

        assert numpy.array_equal(numpy.random.rand(7), expected)
    finally:
        numpy.random.set_bit_generator(kept)
