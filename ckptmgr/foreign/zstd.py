"""Frames of Zstandard (RFC 8878) that may be anybody's: decompressed within a limit, or looked at for their end."""

from __future__ import annotations

from collections.abc import Callable

from ckptmgr.foreign.contents import Fault

_MAGIC = b"\x28\xb5\x2f\xfd"
#: What every decompressor is to support, by the RFC; a larger one is memory that a header asks for.
_MAX_WINDOW = 8 << 20
#: So much is taken at a time: a block of four bytes can hold 128 KiB.
_PIECE = 64
#: That are looked at in a frame that is not decompressed: 13 GB.
_MAX_BLOCKS = 100_000


def decompress(data: bytes, limit: int) -> bytes:
    """
    What the one frame *data* holds.

    Raises:
        Fault: It is none, is cut short, or holds more than *limit* bytes.
    """
    import zstandard

    frame = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()
    found = bytearray()
    at = 0
    try:
        if zstandard.get_frame_parameters(data).window_size > _MAX_WINDOW:
            raise Fault("F015", "compressed in a way that takes much memory to read")
        while at < len(data) and not frame.eof:
            found += frame.decompress(data[at : at + _PIECE])
            at += _PIECE
            if len(found) > limit:
                raise Fault("F015", f"more than {limit} bytes, compressed")
    except zstandard.ZstdError as error:
        raise Fault("F006", "compressed bytes that are none") from error
    if not frame.eof or frame.unused_data or at < len(data):
        raise Fault("F006", "compressed bytes that are none")
    return bytes(found)


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
