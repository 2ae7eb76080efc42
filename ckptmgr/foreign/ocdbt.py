"""
OCDBT databases, in which Orbax keeps arrays: which bytes of which data file they need.

``manifest.ocdbt`` has the place of the root of a tree for each version, a node the places of those below it, and a
leaf those of the values; the newest version is the last (google/tensorstore, docs/kvstore/ocdbt, storage format).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import struct
from collections.abc import Iterator

from ckptmgr.foreign import zstd
from ckptmgr.foreign.contents import Fault, Look, at, refuse_zeros
from ckptmgr.manifest import is_plain_relative

MANIFEST = "manifest.ocdbt"
MANIFEST_MAGIC = 0x0CDB3A2A
_NODE_MAGIC = 0x0CDB20DE
#: Of all descriptions of one database together, decompressed: some seconds.
MAX_BYTES = 8 << 20
_MAX_HEIGHT = 32
#: What says that a tree has no root.
_NOWHERE = (1 << 64) - 1


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    base: str
    path: str
    offset: int
    length: int


class _Fields:
    """The fields of a description, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise Fault("F006", "a description that ends in the middle")
        self._at += count
        return taken

    def number(self) -> int:
        found = shift = 0
        while True:
            byte = self.take(1)[0]
            found |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return found
            if shift > 63:
                raise Fault("F006", "a description with a number too large")

    def numbers(self, count: int) -> list[int]:
        if count > len(self._data):
            raise Fault("F006", "a description that ends in the middle")
        return [self.number() for _ in range(count)]

    def files(self) -> list[tuple[str, str]]:
        """The table of data files: what they and all that they name is relative to, and their names."""
        count = self.number()
        shared = [0, *self.numbers(count - 1)] if count else []
        rest = self.numbers(count)
        bases = self.numbers(count)
        found: list[tuple[str, str]] = []
        name = b""
        for same, new, base in zip(shared, rest, bases, strict=True):
            if same > len(name):
                raise Fault("F006", "a description with a name of nothing")
            name = name[:same] + self.take(new)
            text = os.fsdecode(name)
            found.append((os.fsdecode(name[:base]), text))
        return found

    def end(self) -> None:
        if self._at != len(self._data):
            raise Fault("F006", "a description with more than it should have")


def judge(look: Look) -> set[str]:
    """Judge the database in the directory of *look*, down to its data files, whose paths are returned."""
    if look.file(MANIFEST) is None:
        return set()
    torn: set[str] = set()
    needed: dict[str, int] = {}
    left = [MAX_BYTES]
    try:
        with look.folder.opened(MANIFEST) as descriptor:
            size = os.fstat(descriptor).st_size
            refuse_zeros(descriptor, size)
            waiting = {*_roots(_described(descriptor, 0, size, MANIFEST_MAGIC, left))}
    except Fault as fault:
        look.note(fault.id, MANIFEST, fault.why)
        return set()
    except OSError as error:
        look.note("F006", MANIFEST, str(error.strerror))
        return set()
    seen: set[_Place] = set()
    while waiting:
        place, height = waiting.pop()
        needed[place.path] = max(needed.get(place.path, 0), place.offset + place.length)
        if place in seen or place.path in torn:
            continue
        seen.add(place)
        try:
            waiting |= _below(look, place, height, needed, left)
        except OSError:
            continue
        except Fault as fault:
            torn.add(place.path)
            look.note(fault.id, place.path, fault.why)
            if not left[0]:
                break
    for path, end in needed.items():
        if path not in torn:
            _file(look, path, end)
    return {*needed}


def _described(descriptor: int, offset: int, length: int, magic: int, left: list[int]) -> _Fields:
    """
    The fields of the description at that place, decompressed.

    Raises:
        Fault: It is none, or is torn; or all of them together are too large.
    """
    head = at(descriptor, offset, min(14, length))
    if len(head) < 14 or struct.unpack(">I", head[:4])[0] != magic:
        raise Fault("F006", "no description of OCDBT")
    (stated,) = struct.unpack("<Q", head[4:12])
    if stated != length:
        raise Fault("F003", f"{length} bytes, {stated} by its header")
    if length > left[0]:
        left[0] = 0
        raise Fault("F015", "the descriptions of its data files are too large to read")
    data = at(descriptor, offset, length)
    if struct.unpack("<I", data[-4:])[0] != _crc32c(data[:-4]):
        raise Fault("F009", "a description with another checksum")
    version, compressed = data[12], data[13]
    if version or compressed > 1:
        raise Fault("F015", "a description of another version")
    body = zstd.decompress(data[14:-4], left[0]) if compressed else data[14:-4]
    left[0] -= max(len(body), length)
    return _Fields(body)


def _roots(fields: _Fields) -> Iterator[tuple[_Place, int]]:
    """The root of the newest version, and its height."""
    fields.take(16)
    kind = fields.number()
    fields.numbers(2)
    fields.take(1)
    if fields.number():
        fields.take(4)
    if kind:
        raise Fault("F015", "its versions are in other files, which are not looked at")
    files = fields.files()
    count = fields.number()
    fields.numbers(count)
    heights = fields.take(count)
    which, offsets, lengths = (fields.numbers(count) for _ in range(3))
    if count and lengths[-1] and offsets[-1] != _NOWHERE:
        yield _place(files, which[-1], offsets[-1], lengths[-1]), heights[-1]


def _below(look: Look, place: _Place, height: int, needed: dict[str, int], left: list[int]) -> set[tuple[_Place, int]]:
    """The nodes below one, after what its values need."""
    with look.folder.opened(place.path) as descriptor:
        if not (size := os.fstat(descriptor).st_size):
            raise Fault("F004")
        refuse_zeros(descriptor, size)
        fields = _described(descriptor, place.offset, place.length, _NODE_MAGIC, left)
    if (found := fields.take(1)[0]) != height or height > _MAX_HEIGHT:
        raise Fault("F006", f"a node of height {found}, not {height}")
    files = [(place.base + base, place.base + path) for base, path in fields.files()]
    count = fields.number()
    fields.numbers(max(0, count - 1))
    keys = sum(fields.numbers(count))
    if height:
        fields.numbers(count)
    fields.take(keys)
    if height:
        which, offsets, lengths, *_ = (fields.numbers(count) for _ in range(6))
        fields.end()
        return {(_place(files, *where), height - 1) for where in zip(which, offsets, lengths, strict=True)}
    lengths = fields.numbers(count)
    kinds = fields.take(count)
    outside = [length for length, kind in zip(lengths, kinds, strict=True) if kind]
    which, offsets = fields.numbers(len(outside)), fields.numbers(len(outside))
    fields.take(sum(lengths) - sum(outside))
    fields.end()
    for where in zip(which, offsets, outside, strict=True):
        value = _place(files, *where)
        needed[value.path] = max(needed.get(value.path, 0), value.offset + value.length)
    return set()


def _place(files: list[tuple[str, str]], which: int, offset: int, length: int) -> _Place:
    if which >= len(files):
        raise Fault("F006", "a description that names no file")
    if offset + length >= 1 << 63:
        raise Fault("F006", "a description with a place that no file has")
    base, path = files[which]
    if not is_plain_relative(path):
        raise Fault("F006", "it names a file outside of its directory")
    return _Place(base, path, offset, length)


def _file(look: Look, path: str, end: int) -> None:
    name = path.rpartition("/")[2]
    below = look.folder_of(path)
    if below is None or (entry := below.file(name)) is None:
        return
    if entry.size < end:
        below.note("F003", name, f"{entry.size} bytes, {end} by the manifest")
    else:
        below.bytes(name)


@functools.cache
def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        rest = byte
        for _ in range(8):
            rest = rest >> 1 ^ (0x82F63B78 if rest & 1 else 0)
        table.append(rest)
    return table


def _crc32c(data: bytes) -> int:
    table = _crc_table()
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF
