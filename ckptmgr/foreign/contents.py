"""
Single files of a checkpoint, judged by what they say of themselves: archives, safetensors headers, JSON.

Nothing is unpickled and no tensor is made. A file is believed to be torn if its own table or header does not fit
its size; a file that says nothing of itself cannot be judged, and that is said. What is read at once is bounded,
whatever a header claims.

Formats: PKWARE APPNOTE 6.3.10 (ZIP, which ``torch.save`` writes since PyTorch 1.6, members stored); the README of
huggingface/safetensors (an unsigned 64-bit length, that many bytes of JSON, then the tensors without a gap).
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from typing import Any

from ckptmgr.errors import CheckpointError
from ckptmgr.foreign.ground import Asked, Entry, Folder, Kind
from ckptmgr.foreign.report import Faults
from ckptmgr.resume import Level

#: JSON of more bytes, headers included, is not parsed: a file of lists takes thirty times its bytes.
MAX_JSON_BYTES = 32 << 20
#: Members of an archive that are looked at.
MAX_MEMBERS = 2_000_000
_BLOCK_BYTES = 4 << 20
_TABLE_BYTES = 1 << 20
#: What an end of a ZIP file can have after it, and where it is looked for.
_END_BYTES = 22 + (1 << 16)
#: How many places of a file are looked at before it is said to hold nothing but zeros.
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16
#: How much of an archive is searched for what its pickle says: that is the first member.
_PICKLE_BYTES = 8 << 20
#: After a key: maybe that it is to be remembered, and then a whole number (pickle, protocols 2 to 5).
_NUMBER = rb"(?:q.|r.{4}|\x94)?(?:K(.)|M(..)|J(.{4}))"
#: The pickled number that files of ``torch.save`` began with before PyTorch 1.6 (torch/serialization.py).
_OLD_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")


class Fault(Exception):
    """What is wrong with a file: the id of a finding, and why."""

    def __init__(self, id: str, why: str = "") -> None:
        super().__init__(id, why)
        self.id = id
        self.why = why


class Look:
    """
    One checkpoint while it is judged: its directory, what was asked, and what was found out so far.

    Each method that takes a name notes what is wrong with that file, and returns what it is good for.
    """

    def __init__(self, folder: Folder, asked: Asked, faults: Faults, prefix: str = "") -> None:
        self.folder = folder
        self.asked = asked
        self.faults = faults
        self._prefix = prefix

    def below(self, name: str) -> Look:
        """The same checkpoint, seen from a directory in it."""
        return Look(self.folder.folder(name), self.asked, self.faults, f"{self._prefix}{name}/")

    def note(self, id: str, name: str = "", why: str = "", *, level: Level | None = None) -> None:
        """Note a finding about the file *name*."""
        self.faults.add(id, self._prefix + name if name else self._prefix.rstrip("/"), why, level=level)

    def unfinished(self, pattern: str, kind: Kind = Kind.DIRECTORY, *, level: Level | None = None) -> None:
        """Note every name that *pattern* matches in full, as what the save has not finished."""
        for name in self.folder.matching(pattern, kind):
            self.note("F010", name, level=level)

    def file(self, name: str, *, empty: bool = False) -> Entry | None:
        """The regular file *name*, which must be there and, unless *empty*, have bytes."""
        entry = self.folder.entries.get(name)
        if entry is None:
            self.note("F002", name)
        elif entry.kind is Kind.DIRECTORY:
            self.note("F006", name, "it is a directory")
        elif entry.kind is not Kind.FILE:
            self.note("F016", name, f"a {entry.kind.value}")
        elif not entry.size and not empty:
            self.note("F004", name)
        else:
            return entry
        return None

    def directory(self, name: str) -> Look | None:
        """The directory *name*, which must be there."""
        entry = self.folder.entries.get(name)
        if entry is None:
            self.note("F002", name)
        elif entry.kind is Kind.FILE:
            self.note("F006", name, "it is a file")
        elif entry.kind is not Kind.DIRECTORY:
            self.note("F016", name, f"a {entry.kind.value}")
        else:
            return self.below(name)
        return None

    def folder_of(self, path: str) -> Look | None:
        """The directory that holds the file *path*, which is relative to this one; it must be there."""
        look: Look | None = self
        for part in path.split("/")[:-1]:
            look = look.directory(part) if look is not None else None
        return look

    def archive(self, name: str) -> None:
        """A file of ``torch.save``, or a pickle."""
        self._read(name, _archive)

    def tensors(self, name: str) -> dict[str, Any] | None:
        """The header of a safetensors file; None if it has none that can be used."""
        header: dict[str, Any] | None = self._read(name, _safetensors)
        return header

    def json(self, name: str) -> Any:
        """What a JSON file holds; None if that cannot be had."""
        return self._read(name, _json)

    def bytes(self, name: str) -> None:
        """A file of which only is known that it is not empty and not all zeros."""
        self._read(name, _bytes)

    def said(self, name: str, key: str) -> int | None:
        """The number that the pickle of an archive of ``torch.save`` gives *key*; None if it cannot be had."""
        try:
            with self.folder.opened(name) as descriptor:
                head = os.pread(descriptor, _PICKLE_BYTES, 0)
        except OSError:
            return None
        length = struct.pack("<I", len(key))
        text = b"(?:X" + re.escape(length) + rb"|\x8c" + re.escape(length[:1]) + b")" + re.escape(key.encode())
        found = re.search(text + _NUMBER, head, re.DOTALL)
        return int.from_bytes(next(filter(None, found.groups())), "little") if found is not None else None

    def any(self, name: str) -> None:
        """A file, by the end of its name."""
        if name.endswith((".pt", ".pth", ".bin", ".ckpt")):
            self.archive(name)
        elif name.endswith(".safetensors"):
            self.tensors(name)
        elif name.endswith(".json"):
            self.json(name)
        else:
            self.file(name, empty=True)

    def _read(self, name: str, parse: Any) -> Any:
        if self.file(name) is None:
            return None
        try:
            with self.folder.opened(name) as descriptor:
                return parse(descriptor, os.fstat(descriptor).st_size, self.asked)
        except Fault as fault:
            self.note(fault.id, name, fault.why)
        except MemoryError:
            self.note("F015", name, "there is not the memory to read it")
        except (OSError, CheckpointError) as error:
            self.note("F006", name, getattr(error, "strerror", None) or str(error))
        return None


def at(descriptor: int, offset: int, count: int) -> bytes:
    """
    Exactly *count* bytes.

    Raises:
        Fault: They are not there.
    """
    data = os.pread(descriptor, count, offset)
    while len(data) < count and (more := os.pread(descriptor, count - len(data), offset + len(data))):
        data += more
    if len(data) < count:
        raise Fault("F003", f"it ends before byte {offset + count}")
    return data


def refuse_zeros(descriptor: int, size: int) -> None:
    """
    Look at the beginning, and if there are only zeros, at places all over the file.

    Raises:
        Fault: They hold nothing else.
    """
    step = max(_SAMPLE_BYTES, size // _SAMPLES)
    for offset in (*range(0, size, step), max(0, size - _SAMPLE_BYTES)):
        if any(os.pread(descriptor, _SAMPLE_BYTES, offset)):
            return
    raise Fault("F005")


def _bytes(descriptor: int, size: int, asked: Asked) -> None:
    del asked
    refuse_zeros(descriptor, size)


def _json(descriptor: int, size: int, asked: Asked) -> Any:
    del asked
    refuse_zeros(descriptor, size)
    if size <= MAX_JSON_BYTES:
        return parse_json(at(descriptor, 0, size))
    if at(descriptor, size - 64, 64).rstrip()[-1:] not in (b"}", b"]"):
        raise Fault("F006", "it ends in the middle")
    raise Fault("F015", f"{size} bytes of JSON are too many to read; it begins and ends as it should")


def parse_json(data: bytes) -> Any:
    """
    The value that JSON text holds.

    Raises:
        Fault: It is none; says so if it only ends too early.
    """
    try:
        text = data.decode()
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        raise Fault("F006", "it ends in the middle" if cut else f"no JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        raise Fault("F006", f"no JSON: {error}") from error


def _safetensors(descriptor: int, size: int, asked: Asked) -> dict[str, Any]:
    del asked
    if size < 8:
        raise Fault("F003", f"{size} bytes are no header")
    (length,) = struct.unpack("<Q", at(descriptor, 0, 8))
    if not length:
        refuse_zeros(descriptor, size)
    if 8 + length > size:
        raise Fault("F003", f"{size} bytes, of which the header alone should have {8 + length}")
    if length > MAX_JSON_BYTES:
        raise Fault("F015", f"a header of {length} bytes is too large to read")
    header = parse_json(at(descriptor, 8, length))
    if type(header) is not dict:
        raise Fault("F006", "its header is no object")
    header.pop("__metadata__", None)
    end = used = 0
    for entry in header.values():
        places = entry.get("data_offsets") if type(entry) is dict else None
        if type(places) is not list or [type(place) for place in places] != [int, int]:
            raise Fault("F006", "its header does not say where a tensor is")
        begin, stop = places
        if not 0 <= begin <= stop:
            raise Fault("F006", "its header has a tensor that ends before it begins")
        end, used = max(end, stop), used + stop - begin
    if 8 + length + end != size:
        raise Fault("F003", f"{size} bytes, {8 + length + end} by its header")
    if used != end:
        raise Fault("F006", "its header has tensors that overlap, or gaps between them")
    return header


def _archive(descriptor: int, size: int, asked: Asked) -> None:
    head = os.pread(descriptor, len(_OLD_MAGIC), 0)
    if head.startswith(b"PK\x03\x04"):
        check_archive(descriptor, 0, size, asked)
    elif head == _OLD_MAGIC:
        raise Fault("F015", "in the format from before PyTorch 1.6, which does not say how long it is")
    elif head.startswith(b"\x80"):
        if at(descriptor, size - 1, 1) != b".":
            raise Fault("F003", "a pickle without an end")
    else:
        refuse_zeros(descriptor, size)
        raise Fault("F006", "neither an archive of torch.save nor a pickle")


def check_archive(descriptor: int, offset: int, length: int, asked: Asked) -> None:
    """
    Compare an archive of ``torch.save`` at *offset* with its table; with ``deep``, its members with their checksums.

    Raises:
        Fault: It is cut short, or the table does not fit.
    """
    tail_at = max(0, length - _END_BYTES)
    tail = at(descriptor, offset + tail_at, length - tail_at)
    found = tail.rfind(b"PK\x05\x06")
    if found < 0 or len(tail) - found < 22:
        raise Fault("F003", "an archive without an end")
    end_at = tail_at + found
    count, table_bytes, table_at = struct.unpack("<HII", tail[found + 10 : found + 20])
    if count == 0xFFFF or 0xFFFFFFFF in (table_bytes, table_at):
        count, table_bytes, table_at = _large_table(descriptor, offset, end_at)
    if table_at + table_bytes > end_at:
        raise Fault("F003", f"{length} bytes, and its table should be at {table_at}")
    if count > MAX_MEMBERS:
        raise Fault("F015", f"an archive of {count} members is too large to look at")
    _Members(descriptor, offset, table_at, asked).check(count, table_bytes)


def _large_table(descriptor: int, offset: int, end_at: int) -> tuple[int, int, int]:
    """Count, bytes and place of a table whose numbers have 64 bits."""
    if end_at < 20:
        raise Fault("F006", "an archive without a table")
    signature, place = struct.unpack("<4s4xQ", at(descriptor, offset + end_at - 20, 16))
    if signature != b"PK\x06\x07" or place + 56 > end_at:
        raise Fault("F006", "an archive without a table")
    signature, count, table_bytes, table_at = struct.unpack("<4s28xQQQ", at(descriptor, offset + place, 56))
    if signature != b"PK\x06\x06":
        raise Fault("F006", "an archive without a table")
    return count, table_bytes, table_at


class _Members:
    """The members of one archive, looked at one after the other and not kept."""

    def __init__(self, descriptor: int, offset: int, table_at: int, asked: Asked) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._table_at = table_at
        self._asked = asked
        self._left = table_at
        self._has_pickle = False

    def check(self, count: int, table_bytes: int) -> None:
        """Look at all *count* of them."""
        buffer, begun, read = b"", 0, 0
        for _ in range(count):
            if len(buffer) - begun < 46 + 3 * 0xFFFF and read < table_bytes:
                more = min(_TABLE_BYTES, table_bytes - read)
                buffer = buffer[begun:] + at(self._descriptor, self._offset + self._table_at + read, more)
                begun, read = 0, read + more
            row = buffer[begun : begun + 46]
            if len(row) < 46 or not row.startswith(b"PK\x01\x02"):
                raise Fault("F006", "a table without all of its rows")
            method, crc, stored, size, *lengths = struct.unpack("<10xH4xIIIHHH12x", row)
            (at_,) = struct.unpack("<I", row[42:])
            rest = buffer[begun + 46 : begun + 46 + sum(lengths)]
            if len(rest) < sum(lengths):
                raise Fault("F006", "a table without all of its rows")
            begun += 46 + sum(lengths)
            stored, size, at_ = _wide(rest[lengths[0] : lengths[0] + lengths[1]], size, stored, at_)
            if method or stored != size:
                raise Fault("F006", "a member that is compressed, as torch.save does not do")
            self._has_pickle |= rest[: lengths[0]].endswith(b".pkl")
            self._member(at_, size, crc)
        if not self._has_pickle:
            raise Fault("F006", "an archive without a pickle")

    def _member(self, place: int, size: int, crc: int) -> None:
        # Or members that are one and the same would make few bytes take for ever.
        self._left -= size
        if self._left < 0 or place + 30 > self._table_at:
            raise Fault("F006", "members with more bytes than the archive")
        signature, name, extra = struct.unpack("<4s22xHH", at(self._descriptor, self._offset + place, 30))
        begin = place + 30 + name + extra
        if signature != b"PK\x03\x04" or begin + size > self._table_at:
            raise Fault("F006", "a member that is not where the table says")
        if self._asked.deep and crc:  # zero if PyTorch was told to compute none
            self._sum(begin, size, crc)

    def _sum(self, begin: int, size: int, crc: int) -> None:
        found = 0
        while size:
            data = at(self._descriptor, self._offset + begin, min(size, _BLOCK_BYTES))
            found = zlib.crc32(data, found)
            begin, size = begin + len(data), size - len(data)
            self._asked.progress(len(data))
        if found != crc:
            raise Fault("F009")


def _wide(extra: bytes, size: int, stored: int, place: int) -> tuple[int, int, int]:
    """Bytes stored, bytes, and place of a member, with the numbers of 64 bits that its row may have besides."""
    at_ = 0
    while at_ + 4 <= len(extra):
        kind, length = struct.unpack("<HH", extra[at_ : at_ + 4])
        if kind == 1:
            numbers = [
                number for (number,) in struct.iter_unpack("<Q", extra[at_ + 4 : at_ + 4 + min(length, 24) // 8 * 8])
            ]
            wide = [
                (numbers.pop(0) if numbers else value) if value == 0xFFFFFFFF else value
                for value in (size, stored, place)
            ]
            return wide[1], wide[0], wide[2]
        at_ += 4 + length
    return stored, size, place
