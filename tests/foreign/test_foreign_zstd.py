"""Frames of Zstandard: what is decompressed is bounded, and what is torn is said to be."""

from __future__ import annotations

import contextlib
import hashlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.foreign import zstd
from ckptmgr.foreign.contents import Fault

CONTENTS = {
    "empty": b"",
    "as it is": b"incompressible?!",
    "zeros": bytes(5000),
    "names": b"".join(b"d/" + hashlib.sha256(bytes([number])).hexdigest()[:32].encode() for number in range(12)),
    "two blocks": b"".join(
        b"layer_%d.w%d " % (number % 5, number % 3) + b"abcdefgh" * (number % 4) for number in range(7000)
    ),
}


def frame_of(name: str, *, checksum: bool = True, content_size: bool = True, level: int = 3) -> bytes:
    made = zstandard.ZstdCompressor(level, write_checksum=checksum, write_content_size=content_size)
    return made.compress(CONTENTS[name])


@pytest.mark.parametrize("level", [1, 19])
@pytest.mark.parametrize("content_size", [True, False])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_frame_is_what_was_compressed(name: str, content_size: bool, level: int) -> None:
    frame = frame_of(name, content_size=content_size, level=level)

    assert zstd.decompress(frame, 1 << 20) == CONTENTS[name]


@pytest.mark.parametrize("name", CONTENTS)
def test_a_frame_that_is_cut_short_or_longer_is_none(name: str) -> None:
    frame = frame_of(name)
    for length in range(len(frame)):
        with pytest.raises(Fault, match="F006"):
            zstd.decompress(frame[:length], 1 << 20)
    for more in (b"x", b"x" * 1000):
        with pytest.raises(Fault, match="F006"):
            zstd.decompress(frame + more, 1 << 20)


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("name", CONTENTS)
def test_where_a_frame_ends_is_seen_without_what_it_holds(name: str, checksum: bool) -> None:
    frame = frame_of(name, checksum=checksum)

    def ends_at(length: int) -> bool:
        return zstd.is_whole(lambda at, count: frame[:length][at : at + count], length)

    assert [length for length in range(len(frame) + 1) if ends_at(length)] == [len(frame)]


@pytest.mark.parametrize("name", [name for name in CONTENTS if len(CONTENTS[name]) > 100])
def test_no_more_is_made_than_was_allowed(name: str) -> None:
    with pytest.raises(Fault, match="F015"):
        zstd.decompress(frame_of(name), 100)


def test_a_header_that_asks_for_much_memory_is_not_followed() -> None:
    much = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=much).compressobj()
    frame = compressor.compress(b"some") + compressor.flush()
    with pytest.raises(Fault, match="F015"):
        zstd.decompress(frame, 1 << 20)


@given(st.sampled_from([*CONTENTS]), st.integers(0, 1 << 20), st.integers(0, 255))
def test_a_frame_with_any_other_byte_gives_something_or_a_fault(name: str, at: int, byte: int) -> None:
    frame = bytearray(frame_of(name))
    frame[at % len(frame)] = byte
    with contextlib.suppress(Fault):
        assert len(zstd.decompress(bytes(frame), 1 << 18)) <= 1 << 18
