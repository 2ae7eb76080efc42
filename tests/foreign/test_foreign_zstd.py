"""Zstandard in Python, held to what the zstd command made."""

from __future__ import annotations

import base64
import contextlib
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.foreign import zstd
from ckptmgr.foreign.contents import Fault

_NAMES = b"".join(b"d/" + hashlib.sha256(bytes([number])).hexdigest()[:32].encode() for number in range(12))
_TEXT = b"".join(b"params.layer_%d.kernel=%d;" % (number % 7, number * number % 53) for number in range(60))
_LONG = b"".join(b"layer_%d.w%d " % (number % 5, number % 3) + b"abcdefgh" * (number % 4) for number in range(7000))
#: By zstd 1.5.4, with -3, or -19 for the last two.
FRAMES = {
    "empty": (b"", "KLUv/SQAAQAAmenYUQ=="),
    "as it is": (b"incompressible?!", "KLUv/QRYgQAAaW5jb21wcmVzc2libGU/IWWY5lE="),
    "zeros": (bytes(5000), "KLUv/QRYTQAAEAAAAQCD0wMsJbcyMA=="),
    "four streams of a tree": (
        _NAMES,
        (
            "KLUv/QRYZQcANpk4DMB1JPm/I+uybK4yJzQANAA0AFGBFNi0be2ssfw/IrlWeBs0+e00466P95JxmVXRz4j9FmgeDbzd4FWmnJh6tP+cG0Ue"
            "QAfvFUZD7MP2dmyQp2tq7p2DDr0s2XrB2FV0RRPGGMbZYw4abQNqqDoNKX1dr3i5GO1fGKAl97toe8IuRXT2XJl3re4LGuv0Lo9ybqyeg990"
            "eLRDI2XQRe+iScGLIXND+6b1MT2gXQDdGRNYJf9Kbhv9+tX+eKGhnrdGLPhUMlYk/cMGcsqVrgToW2mS8DttUUnzdaKynyKuHdC0HgEAdU/B"
            "TAGOQiHu"
        ),
    ),
    "matches": (
        _TEXT,
        (
            "KLUv/QRo5QQAIogVFKCpDZj9aA9ZAbjpI7Ry006xqlIjwZX5mi89r+arfHuMt56iVvW/r57G4t2n0/27DZuu3/1XsainrPjj5unqzHZ91t0G"
            "JBxFshQGQMNSNMQBMAixEEpBqCFgfv83YC+pDhK4RzBDE3z17t8BF66EJbTEpd/OYBCt6uhejj60OkhTGmgfZDzGAsZXLVIxBfnfxWUTwtVg"
            "u60KtOd8gQ=="
        ),
    ),
    "two blocks": (
        _LONG,
        (
            "KLUv/QRo9AQAksUOEsCnA5yaNqGltvzXm1JKPAoODne5u9xd7i53l7vL3eXucne5u63NZb8it6hGQZxBCExhEcuKBiAnMUdEoEC2wtYYcBUk"
            "NYwBmfpn5Rgbb3Ow/a3T5m/Otr9x2vzN2fY3Tpu/Odv+xmnzN2fb3zht/uZsB38hN1+N+jZie6pfXVEDVsKvIkp0+9qrtlItmPkd29YlyHob"
            "GslDlAFNAAAAAQDl9K7+roH3/1w0"
        ),
    ),
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_is_what_was_compressed(name: str) -> None:
    content, frame = FRAMES[name]

    assert zstd.decompress(base64.b64decode(frame), 1 << 20) == content


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_that_is_cut_short_anywhere_is_none(name: str) -> None:
    frame = base64.b64decode(FRAMES[name][1])
    for length in range(len(frame)):
        with pytest.raises(Fault, match="F006"):
            zstd.decompress(frame[:length], 1 << 20)


@pytest.mark.parametrize("name", FRAMES)
def test_where_a_frame_ends_is_seen_without_what_it_holds(name: str) -> None:
    frame = base64.b64decode(FRAMES[name][1])

    def ends_at(length: int) -> bool:
        return zstd.is_whole(lambda at, count: frame[:length][at : at + count], length)

    assert [length for length in range(len(frame) + 1) if ends_at(length)] == [len(frame)]


@pytest.mark.parametrize("name", [name for name in FRAMES if len(FRAMES[name][0]) > 100])
def test_no_more_is_made_than_was_allowed(name: str) -> None:
    with pytest.raises(Fault, match="F015"):
        zstd.decompress(base64.b64decode(FRAMES[name][1]), 100)


@given(st.sampled_from([*FRAMES]), st.integers(0, 1 << 20), st.integers(0, 255))
def test_a_frame_with_any_other_byte_gives_something_or_a_fault(name: str, at: int, byte: int) -> None:
    frame = bytearray(base64.b64decode(FRAMES[name][1]))
    frame[at % len(frame)] = byte
    with contextlib.suppress(Fault):
        assert len(zstd.decompress(bytes(frame), 1 << 18)) <= 1 << 18
