"""Pickles, archives and journals put together byte by byte, to say what no library would write."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping

STOP = b"."
PROTO = b"\x80\x02"
NONE = b"N"
TRUE, FALSE = b"\x88", b"\x89"
EMPTY_TUPLE, EMPTY_LIST, EMPTY_DICT = b")", b"]", b"}"
REDUCE, BUILD = b"R", b"b"


def text(value: str) -> bytes:
    """Text on the stack."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """A whole number on the stack."""
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, of: str) -> bytes:
    """What a module has under a name."""
    return f"c{module}\n{of}\n".encode()


def tuple_of(*items: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def list_of(*items: bytes) -> bytes:
    """A list."""
    return b"](" + b"".join(items) + b"e"


def call(function: bytes, *arguments: bytes) -> bytes:
    """What a function answers."""
    return function + tuple_of(*arguments) + REDUCE


def raw(data: bytes) -> bytes:
    """Bytes, as protocol 2 has them."""
    return call(name("_codecs", "encode"), text(data.decode("latin1")), text("latin1"))


def storage(kind: str = "FloatStorage", key: str = "0", count: int = 4) -> bytes:
    """A reference to a member of the archive."""
    return tuple_of(text("storage"), name("torch", kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(of: bytes, offset: int = 0, sizes: tuple[int, ...] = (4,), strides: tuple[int, ...] = (1,)) -> bytes:
    """A tensor made of a storage."""
    return call(
        name("torch._utils", "_rebuild_tensor_v2"), of, number(offset), tuple_of(*map(number, sizes)),
        tuple_of(*map(number, strides)), FALSE, call(name("collections", "OrderedDict")),
    )  # fmt: skip


def array(dtype: bytes, shape: tuple[int, ...], data: bytes) -> bytes:
    """A NumPy array: made empty, then given shape, dtype and bytes."""
    made = call(
        name("numpy._core.multiarray", "_reconstruct"), name("numpy", "ndarray"), tuple_of(number(0)), raw(b"b")
    )
    return made + tuple_of(number(1), tuple_of(*map(number, shape)), dtype, FALSE, raw(data)) + BUILD


def dtype(kind: str, *state: bytes) -> bytes:
    """A NumPy dtype, with a state if there is one."""
    made = call(name("numpy", "dtype"), text(kind), FALSE, TRUE)
    return made + tuple_of(*state) + BUILD if state else made


def plain_dtype(kind: str, order: str = "<") -> bytes:
    """A dtype as NumPy itself writes it."""
    return dtype(kind, number(3), text(order), NONE, NONE, NONE, number(-1), number(-1), number(0))


def bomb(levels: int) -> bytes:
    """A tuple of two that are the same tuple of two, and so on: small to write, for ever to hash."""
    return EMPTY_TUPLE + b"q\x00h\x00\x86" * levels


def archive(
    data: bytes, members: Mapping[str, bytes] = {"data/0": bytes(16)}, compression: int = zipfile.ZIP_STORED
) -> bytes:
    """A ``torch.save`` archive with *data* as its pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for key, content in {"data.pkl": PROTO + data + STOP, "byteorder": b"little", **members}.items():
            file.writestr(f"archive/{key}", content)
    return out.getvalue()
