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
from pathlib import PurePosixPath
from typing import Any

import xxhash

from ckptmgr.errors import CorruptCheckpoint
from ckptmgr.lifecycle import Format

MANIFEST_NAME = "ckptmgr.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 1 << 30
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
        body = dataclasses.asdict(self)
        body["format"] = self.format.value
        body["files"] = [dataclasses.asdict(f) for f in sorted(self.files, key=lambda f: f.path)]
        return json.dumps({"format_version": FORMAT_VERSION, **body}, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | Buffer, *, where: str = MANIFEST_NAME) -> Manifest:
        """
        Read a manifest, trusting nothing in it; its files come in the order of their paths.

        Raises:
            CorruptCheckpoint: Not JSON, another version, a missing or mistyped field, a name that
                leaves the directory, a negative size, or a path listed twice.
        """

        def bad(why: str) -> CorruptCheckpoint:
            return CorruptCheckpoint(f"{where}: {why}", directory=where, mismatches=(why,))

        try:
            body = json.loads(text if isinstance(text, str) else bytes(text), parse_constant=_reject)
        except (ValueError, RecursionError) as error:
            raise bad(f"not a manifest: {error}") from error
        if not isinstance(body, dict):
            raise bad("not a JSON object")
        if type(version := body.get("format_version")) is not int or version != FORMAT_VERSION:
            raise bad(f"format_version is {version!r}, this version reads {FORMAT_VERSION}")

        def take(holder: dict[str, Any], key: str, *kinds: type) -> Any:
            value = holder.get(key)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise bad(f"{key!r} is {type(value).__name__}")
            if isinstance(value, str | int | float) and not (_is_text(value) or _is_finite(value)):
                raise bad(f"{key!r} is nothing that a file or a database can hold")
            return value

        def count(holder: dict[str, Any], key: str) -> int:
            value = take(holder, key, int)
            if not 0 <= value < 1 << 63:
                raise bad(f"{key!r} is out of range")
            return int(value)

        files = []
        seen = set()
        for row in take(body, "files", list):
            if not isinstance(row, dict):
                raise bad("a file entry is not an object")
            path = take(row, "path", str)
            if not is_plain_relative(path):
                raise bad(f"file name {path!r} leaves the directory")
            if path in seen:
                raise bad(f"file {path!r} is listed twice")
            seen.add(path)
            digest = take(row, "digest", str)
            if not _DIGEST.match(digest):
                raise bad(f"file {path!r} has a malformed digest")
            files.append(FileEntry(path, count(row, "size"), digest, count(row, "rank")))
        per_rank = take(body, "per_rank", list)
        metrics = take(body, "metrics", dict)
        versions = take(body, "versions", dict)
        if not all(_is_text(name) for name in per_rank):
            raise bad("'per_rank' holds something other than names")
        if not all(_is_text(name) and _is_finite(value) for name, value in metrics.items()):
            raise bad("'metrics' holds something other than numbers")
        if not all(_is_text(text) for pair in versions.items() for text in pair):
            raise bad("'versions' holds something other than text")
        try:
            layout = Format(take(body, "format", str))
        except ValueError as error:
            raise bad(f"unknown format {body['format']!r}") from error
        return cls(
            run_id=take(body, "run_id", str),
            series=take(body, "series", str),
            step=count(body, "step"),
            attempt=count(body, "attempt"),
            epoch=count(body, "epoch"),
            format=layout,
            world_size=count(body, "world_size"),
            created_at=float(take(body, "created_at", int, float)),
            files=tuple(sorted(files, key=lambda entry: entry.path)),
            per_rank=tuple(per_rank),
            metrics=metrics,
            versions=versions,
        )


def is_plain_relative(path: str) -> bool:
    """Whether *path* is a clean relative POSIX path: no root, no ``..``, no empty part, no NUL, no backslash."""
    if not path or len(path) > 4096 or "\0" in path or "\\" in path or not _is_text(path):
        return False
    pure = PurePosixPath(path)
    return not pure.is_absolute() and ".." not in pure.parts and "." not in path.split("/") and str(pure) == path


def _is_text(value: object) -> bool:
    """Whether *value* is text that UTF-8 can hold; JSON can spell halves of characters, which it cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_finite(value: object) -> bool:
    """Whether *value* is a number that a float can hold; JSON can spell larger ones, such as 1e999."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _reject(word: str) -> float:
    raise ValueError(f"{word} is not a number")
