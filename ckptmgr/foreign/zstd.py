"""
Zstandard, decompressed in Python: the few hundred bytes of a description, where no library for it can be counted on.

Format: RFC 8878. No dictionaries; checksums of the content are not compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ckptmgr.foreign.contents import Fault

_MAGIC = b"\x28\xb5\x2f\xfd"
#: Of one block, by the format.
_MAX_BLOCK = 1 << 17
#: That are looked at in a frame that is not decompressed: 13 GB.
_MAX_BLOCKS = 100_000
#: The places that matches are copied from, at the beginning of a frame.
_OFFSETS = (1, 4, 8)
# fmt: off
_LITERALS = (
    *((code, 0) for code in range(16)), (16, 1), (18, 1), (20, 1), (22, 1), (24, 2), (28, 2), (32, 3), (40, 3), (48, 4),
    (64, 6), *((1 << bits, bits) for bits in range(7, 17)),
)
_MATCHES = (
    *((code + 3, 0) for code in range(32)), (35, 1), (37, 1), (39, 1), (41, 1), (43, 2), (47, 2), (51, 3), (59, 3),
    (67, 4), (83, 4), (99, 5), *((3 + (1 << bits), bits) for bits in range(7, 17)),
)
_USUAL_LITERALS = (4, 3, *[2] * 11, 1, 1, 1, *[2] * 9, 3, 2, *[1] * 5, *[-1] * 4)
_USUAL_OFFSETS = (*[1] * 6, 2, 2, 2, *[1] * 15, *[-1] * 5)
_USUAL_MATCHES = (1, 4, 3, *[2] * 6, *[1] * 37, *[-1] * 7)
# fmt: on


@dataclasses.dataclass(frozen=True, slots=True)
class _Table:
    """Of a finite state entropy code: for each state its symbol, how many bits to read, and what to add to them."""

    log: int
    rows: Sequence[tuple[int, int, int]]


def decompress(data: bytes, limit: int) -> bytes:
    """
    What the one frame *data* holds.

    Raises:
        Fault: It is none, is cut short, or holds more than *limit* bytes.
    """
    try:
        return _Frame(data, limit).read()
    except (IndexError, ValueError, OverflowError) as error:
        raise Fault("F006", "compressed bytes that are none") from error


def is_whole(read: Callable[[int, int], bytes], size: int) -> bool:
    """Whether one frame ends where *size* says, by the lengths of its blocks; *read* gives bytes at a place."""
    head = read(0, 5)
    if len(head) < 5 or not head.startswith(_MAGIC):
        return False
    at = 5 + _header_bytes(head[4])
    for _ in range(_MAX_BLOCKS):
        block = int.from_bytes(read(at, 3), "little")
        at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
        if block & 1 or at > size:
            return at + 4 * (head[4] >> 2 & 1) == size
    return True


def _header_bytes(about: int) -> int:
    """How many bytes follow the first one of a header."""
    single = about >> 5 & 1
    return (1 - single) + (0, 1, 2, 4)[about & 3] + (single, 2, 4, 8)[about >> 6]


class _Backwards:
    """Bits, read from the last to the first; zeros before that."""

    def __init__(self, data: bytes) -> None:
        if not data or not data[-1]:
            raise ValueError("no end mark")
        self._data = data
        self.left = 8 * len(data) - 9 + data[-1].bit_length()

    def peek(self, count: int) -> int:
        at = self.left - count
        if at < 0:
            return (int.from_bytes(self._data[:8], "little") & ((1 << self.left) - 1)) << -at if self.left > 0 else 0
        return (int.from_bytes(self._data[at >> 3 : (at >> 3) + 8], "little") >> (at & 7)) & ((1 << count) - 1)

    def read(self, count: int) -> int:
        value = self.peek(count)
        self.left -= count
        return value


class _Frame:
    def __init__(self, data: bytes, limit: int) -> None:
        self._data = data
        self._limit = limit
        self._at = 0
        self._out = bytearray()
        self._offsets = list(_OFFSETS)
        self._tree: tuple[int, list[tuple[int, int]]] | None = None
        self._tables: dict[str, _Table] = {}

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise ValueError("cut short")
        self._at += count
        return taken

    def _number(self, count: int) -> int:
        return int.from_bytes(self._take(count), "little")

    def read(self) -> bytes:
        if self._take(4) != _MAGIC:
            raise ValueError("no frame")
        about = self._number(1)
        self._take(_header_bytes(about))
        last = False
        while not last:
            head = self._number(3)
            last, kind, size = bool(head & 1), head >> 1 & 3, head >> 3
            if kind == 0:
                self._out += self._take(size)
            elif kind == 1:
                self._room(size)
                self._out += self._take(1) * size
            elif kind == 2:
                end = self._at + size
                self._block(end)
                self._at = end
            else:
                raise ValueError("a block of no kind")
            self._room(0)
        self._take(4 * (about >> 2 & 1))
        if self._at != len(self._data):
            raise ValueError("more than a frame")
        return bytes(self._out)

    def _room(self, more: int) -> None:
        if len(self._out) + more > self._limit:
            raise Fault("F015", f"more than {self._limit} bytes, compressed")

    def _block(self, end: int) -> None:
        literals = self._literals()
        count = self._number(1)
        if count == 255:
            count = self._number(2) + 0x7F00
        elif count >= 128:
            count = (count - 128 << 8) + self._number(1)
        used = 0
        if count:
            modes = self._number(1)
            lengths = self._table("literals", modes >> 6 & 3, _USUAL_LITERALS, 6, 9)
            offsets = self._table("offsets", modes >> 4 & 3, _USUAL_OFFSETS, 5, 8)
            matches = self._table("matches", modes >> 2 & 3, _USUAL_MATCHES, 6, 9)
            bits = _Backwards(self._take(end - self._at))
            states = [bits.read(table.log) for table in (lengths, offsets, matches)]
            for number in range(count):
                (length, *to_length), (offset, *to_offset), (match, *to_match) = (
                    table.rows[state] for table, state in zip((lengths, offsets, matches), states, strict=True)
                )
                place = (1 << offset) + bits.read(offset)
                match_bytes = _MATCHES[match][0] + bits.read(_MATCHES[match][1])
                literal_bytes = _LITERALS[length][0] + bits.read(_LITERALS[length][1])
                if number + 1 < count:
                    states[0] = to_length[1] + bits.read(to_length[0])
                    states[2] = to_match[1] + bits.read(to_match[0])
                    states[1] = to_offset[1] + bits.read(to_offset[0])
                self._room(literal_bytes + match_bytes)
                self._out += literals[used : used + literal_bytes]
                used += literal_bytes
                self._copy(self._offset(place, literal_bytes), match_bytes)
        self._out += literals[used:]

    def _offset(self, value: int, literal_bytes: int) -> int:
        known = self._offsets
        which = value - 1 + (not literal_bytes)
        new = value > 3 or which == 3
        found = value - 3 if value > 3 else known[0] - 1 if which == 3 else known[which]
        del known[2 if new else which]
        known.insert(0, found)
        return found

    def _copy(self, offset: int, count: int) -> None:
        begin = len(self._out) - offset
        if begin < 0 or offset <= 0:
            raise ValueError("a match before the beginning")
        piece = self._out[begin : begin + count]
        self._out += (piece * (count // len(piece) + 1))[:count]

    def _literals(self) -> bytes:
        first = self._data[self._at]
        kind, width = first & 3, first >> 2 & 3
        if kind < 2:
            size = self._number((1, 2, 1, 3)[width]) >> (3, 4, 3, 4)[width]
            if size > _MAX_BLOCK:
                raise ValueError("more than a block")
            return self._take(size) if kind == 0 else self._take(1) * size
        bits = (10, 10, 14, 18)[width]
        head = self._number((3, 3, 4, 5)[width]) >> 4
        size, stored = head & (1 << bits) - 1, head >> bits
        if size > _MAX_BLOCK:
            raise ValueError("more than a block")
        end = self._at + stored
        if kind == 2:
            self._tree = self._new_tree()
        if self._tree is None:
            raise ValueError("no tree")
        data = self._take(end - self._at)
        if not width:
            return _codes(data, size, self._tree)
        begins = [6, *(int.from_bytes(data[at : at + 2], "little") for at in (0, 2, 4))]
        ends = [sum(begins[: number + 1]) for number in range(4)] + [len(data)]
        each = (size + 3) // 4
        sizes = (each, each, each, size - 3 * each)
        return b"".join(_codes(data[a:b], n, self._tree) for a, b, n in zip(ends, ends[1:], sizes, strict=False))

    def _new_tree(self) -> tuple[int, list[tuple[int, int]]]:
        """Its depth, and for each of as many bits the symbol and how many of them it takes."""
        head = self._number(1)
        if head >= 128:
            nibbles = self._take((head - 126) // 2)
            weights = [byte >> shift & 15 for byte in nibbles for shift in (4, 0)][: head - 127]
        else:
            end = self._at + head
            table = self._described(6)
            weights = _weights(_Backwards(self._take(end - self._at)), table)
        total = sum(1 << weight - 1 for weight in weights if weight)
        depth = total.bit_length()
        rest = (1 << depth) - total
        if not total or rest & rest - 1 or depth > 11:
            raise ValueError("weights that do not add up")
        weights.append(rest.bit_length())
        rows: list[tuple[int, int]] = []
        for weight in range(1, depth + 1):
            for symbol, its in enumerate(weights):
                if its == weight:
                    rows += [(symbol, depth + 1 - weight)] * (1 << weight - 1)
        return depth, rows

    def _table(self, name: str, mode: int, usual: Sequence[int], log: int, most: int) -> _Table:
        if mode == 0:
            self._tables[name] = _built(usual, log)
        elif mode == 1:
            self._tables[name] = _Table(0, ((self._number(1), 0, 0),))
        elif mode == 2:
            self._tables[name] = self._described(most)
        if name not in self._tables:
            raise ValueError("no table")
        return self._tables[name]

    def _described(self, most: int) -> _Table:
        bits = int.from_bytes(self._data[self._at : self._at + 256], "little")
        log = (bits & 15) + 5
        if log > most:
            raise ValueError("a table too large")
        at = 4
        left = (1 << log) + 1
        counts: list[int] = []
        while left > 1 and len(counts) < 256:
            width = left.bit_length()
            low = (1 << width) - 1 - left
            value = bits >> at & (1 << width) - 1
            if value & (1 << width - 1) - 1 < low:
                value &= (1 << width - 1) - 1
                at += width - 1
            else:
                value -= low if value >= 1 << width - 1 else 0
                at += width
            counts.append(value - 1)
            left -= abs(value - 1)
            if value == 1:
                again = 3
                while again == 3:
                    again = bits >> at & 3
                    at += 2
                    counts += [0] * again
        if left != 1:
            raise ValueError("counts that do not add up")
        self._take((at + 7) // 8)
        return _built(counts, log)


def _built(counts: Sequence[int], log: int) -> _Table:
    size = 1 << log
    symbols = [0] * size
    following = [abs(count) for count in counts]
    high = size - 1
    for symbol, count in enumerate(counts):
        if count < 0:
            symbols[high] = symbol
            high -= 1
    at = 0
    for symbol, count in enumerate(counts):
        for _ in range(count):
            symbols[at] = symbol
            at = at + (size >> 1) + (size >> 3) + 3 & size - 1
            while at > high:
                at = at + (size >> 1) + (size >> 3) + 3 & size - 1
    rows = []
    for symbol in symbols:
        state = following[symbol]
        following[symbol] += 1
        bits = log + 1 - state.bit_length()
        rows.append((symbol, bits, (state << bits) - size))
    return _Table(log, rows)


def _weights(bits: _Backwards, table: _Table) -> list[int]:
    """Two states take turns until there are no more bits."""
    states = [bits.read(table.log), bits.read(table.log)]
    found: list[int] = []
    while len(found) < 255:
        symbol, count, base = table.rows[states[0]]
        found.append(symbol)
        if bits.left < count:
            found.append(table.rows[states[1]][0])
            break
        states = [states[1], base + bits.read(count)]
    return found


def _codes(data: bytes, size: int, tree: tuple[int, list[tuple[int, int]]]) -> bytes:
    depth, rows = tree
    bits = _Backwards(data)
    found = bytearray()
    for _ in range(size):
        symbol, count = rows[bits.peek(depth)]
        bits.left -= count
        found.append(symbol)
    if bits.left:
        raise ValueError("bits left over")
    return bytes(found)
