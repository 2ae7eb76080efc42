"""
The manifest ``ckptmgr.json``: what a checkpoint is made of, so that a copy can be judged by it alone.

Pure text in and out. Format version 1: a JSON object with ``format_version``, identity
(``run_id``, ``series``, ``step``, ``attempt``, ``epoch``, ``format``), ``world_size``,
``per_rank``, ``metrics``, ``versions``, ``created_at`` (Unix seconds) and ``files``, a list of
``{"path", "size", "digest", "rank"}`` sorted by path. ``size`` is in bytes, ``digest`` is
``xxh3_128:`` and 32 hex digits over the whole file (XXH3, 128 bit, seed 0, canonical big-endian).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import xxhash

from ckptmgr.errors import CorruptCheckpoint
from ckptmgr.lifecycle import Format

MANIFEST_NAME = "ckptmgr.json"
FORMAT_VERSION = 1
#: A quarter of a million files. A manifest of this size takes less than a GiB of memory, however it is made.
MAX_MANIFEST_BYTES = 32 << 20
#: Numbers of steps, attempts, epochs and ranks: what a directory name has room for.
MAX_NUMBER = 10**18 - 1
#: Bytes that a file, or all files of a checkpoint, can have.
_MAX_BYTES = (1 << 63) - 1
#: Bytes of one part of a path, on every file system that counts.
_MAX_NAME_BYTES = 255
_RUN_ID = re.compile(r"[0-9A-Za-z_-]{1,64}\Z")
_DIGEST = re.compile(r"xxh3_128:[0-9a-f]{32}\Z")


Buffer = bytes | memoryview


class Digest:
    """The digest of a file, fed in pieces: XXH3, 128 bit (Cyan4973/xxHash, doc/xxhash_spec.md)."""

    def __init__(self, data: Buffer = b"") -> None:
        self._hash = xxhash.xxh3_128(data)

    def update(self, data: Buffer) -> None:
        """Take the next bytes in file order."""
        self._hash.update(data)

    @property
    def text(self) -> str:
        """The digest as it stands in a manifest."""
        return "xxh3_128:" + self._hash.hexdigest()


def digest_number(data: bytes) -> int:
    """The digest of *data* as a number below 2^128."""
    return int(xxhash.xxh3_128_intdigest(data))


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: path relative to its directory, bytes, digest, and the rank that sealed it."""

    path: str
    size: int
    digest: str
    rank: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Every file of one checkpoint, with sizes and digests."""

    run_id: str
    series: str
    step: int
    attempt: int
    epoch: int
    format: Format
    world_size: int
    created_at: float
    files: tuple[FileEntry, ...]
    per_rank: tuple[str, ...] = ()
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Sum of the sizes of all listed files."""
        return sum(entry.size for entry in self.files)

    def to_json(self) -> str:
        """The manifest as the text of ``ckptmgr.json``, the same text for the same manifest."""
        # Not `asdict`, which copies every file deeply: there may be as many as ranks.
        body = {
            **vars(self), "format_version": FORMAT_VERSION, "format": self.format.value,
            "files": [vars(entry) for entry in sorted(self.files, key=lambda entry: entry.path)],
            "metrics": dict(self.metrics), "versions": dict(self.versions),
        }  # fmt: skip
        return json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | Buffer, *, where: str = MANIFEST_NAME) -> Manifest:
        """
        Read a manifest, trusting nothing in it; its files come in the order of their paths.

        Raises:
            CorruptCheckpoint: Not JSON, another version, a missing or mistyped field, a name that
                leaves the directory, a negative size, a path or a field listed twice, or more than
                `MAX_MANIFEST_BYTES`.
        """
        if len(text) > MAX_MANIFEST_BYTES:
            raise _Fields({}, where).bad(f"it has {len(text)} bytes, more than {MAX_MANIFEST_BYTES}")
        try:
            data = text if isinstance(text, str) else bytes(text)
            parsed = json.loads(data, parse_constant=_reject, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise _Fields({}, where).bad(f"not a manifest: {error}") from error
        body = _Fields(parsed, where)
        if type(version := body.get("format_version")) is not int or version != FORMAT_VERSION:
            raise body.bad(f"format_version is {version!r}, this version reads {FORMAT_VERSION}")
        files = [_file(_Fields(row, where)) for row in body.take("files", list)]
        if len({entry.path for entry in files}) != len(files):
            raise body.bad("a file is listed twice")
        if sum(entry.size for entry in files) > _MAX_BYTES:
            raise body.bad("the files have more bytes than there can be")
        per_rank = body.take("per_rank", list)
        metrics = body.take("metrics", dict)
        versions = body.take("versions", dict)
        if not all(is_text(name) for name in per_rank):
            raise body.bad("'per_rank' holds something other than names")
        if not all(is_text(name) and is_finite(value) for name, value in metrics.items()):
            raise body.bad("'metrics' holds something other than numbers")
        if not all(is_text(text) for pair in versions.items() for text in pair):
            raise body.bad("'versions' holds something other than text")
        try:
            layout = Format(body.take("format", str))
        except ValueError as error:
            raise body.bad(f"unknown format {body.get('format')!r}") from error
        return cls(
            run_id=body.take("run_id", str),
            series=body.take("series", str),
            step=body.count("step"),
            attempt=body.count("attempt"),
            epoch=body.count("epoch"),
            format=layout,
            world_size=body.count("world_size"),
            created_at=float(body.take("created_at", int, float)),
            files=tuple(sorted(files, key=lambda entry: entry.path)),
            per_rank=tuple(per_rank),
            metrics=metrics,
            versions=versions,
        )


class _Fields:
    """One JSON object of a manifest, whose fields are checked as they are taken."""

    def __init__(self, body: object, where: str) -> None:
        self._where = where
        if not isinstance(body, dict):
            raise self.bad("not a JSON object")
        self._body = body

    def bad(self, why: str) -> CorruptCheckpoint:
        """The error that says *why* the manifest cannot be trusted."""
        return CorruptCheckpoint(f"{self._where}: {why}", directory=self._where, mismatches=(why,))

    def get(self, key: str) -> Any:
        """Whatever stands there, None if nothing does."""
        return self._body.get(key)

    def take(self, key: str, *kinds: type) -> Any:
        """A field that is of one of *kinds*."""
        value = self._body.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise self.bad(f"{key!r} is {type(value).__name__}")
        if isinstance(value, str | int | float) and not (is_text(value) or is_finite(value)):
            raise self.bad(f"{key!r} is nothing that a file or a database can hold")
        return value

    def count(self, key: str, limit: int = MAX_NUMBER) -> int:
        """A whole number from 0 to *limit*."""
        value = self.take(key, int)
        if not 0 <= value <= limit:
            raise self.bad(f"{key!r} is out of range")
        return int(value)


def _file(row: _Fields) -> FileEntry:
    path = row.take("path", str)
    if not is_plain_relative(path):
        raise row.bad(f"file name {path[:80]!r} leaves the directory, or no file can have it")
    digest = row.take("digest", str)
    if not is_digest(digest):
        raise row.bad(f"file {path!r} has a malformed digest")
    return FileEntry(path, row.count("size", _MAX_BYTES), digest, row.count("rank"))


def is_digest(text: object) -> bool:
    """Whether *text* is the digest of a file as it stands in a manifest."""
    return isinstance(text, str) and _DIGEST.match(text) is not None


def is_run_id(text: object) -> bool:
    """Whether *text* can say which run something belongs to. Ours are 32 hex digits."""
    return isinstance(text, str) and _RUN_ID.match(text) is not None


def is_plain_relative(path: str) -> bool:
    """
    Whether *path* is a clean relative POSIX path of characters that can be printed.

    That is: no root, no ``..``, no empty part, no backslash, nothing that steers a terminal, and no part or
    whole that is longer than file systems take.
    """
    if not isinstance(path, str) or len(path) > 4096 or not path.isprintable() or "\\" in path:
        return False
    parts = path.split("/")
    # A path that is empty, absolute, or ends in a slash has an empty part.
    return not {"", ".", ".."} & {*parts} and all(len(part.encode()) <= _MAX_NAME_BYTES for part in parts)


def is_text(value: object) -> bool:
    """Whether *value* is text that UTF-8 can hold; JSON can spell halves of characters, which it cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_finite(value: object) -> bool:
    """Whether *value* is a number that a float can hold; JSON can spell larger ones, such as 1e999."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two fields with one name another reader might take the other one."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field is there twice")
    return found


def _reject(word: str) -> float:
    raise ValueError(f"{word} is not a number")
