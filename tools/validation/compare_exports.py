#!/usr/bin/env python3
"""
Compare two Hugging Face exports: every file that is not weights, the index, and every tensor's place.

    compare_exports.py EXPECTED EXPORT [--weights] [--ignore PATTERN …] [--accept PATTERN …]

EXPECTED is what EXPORT is held to, say what ``save_pretrained`` wrote. Files are compared byte by
byte; where that fails JSON files are compared by what they say, and the difference is shown key by
key. Of the weights, names, dtypes and shapes are compared, and in which file each stands; with
--weights also every byte. ckptmgr's own manifest is left out. Neither torch nor transformers is needed.
--accept takes a difference for none if its line fits, like '*: __metadata__: *'; it is shown all the same.

Exit status: 0 the same, 1 different, 2 wrong usage, 3 a file could not be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

SAME, DIFFERENT, UNREADABLE = 0, 1, 3
MANIFEST = "ckptmgr.json"
INDEX = "model.safetensors.index.json"
CHUNK = 8 << 20


class UnreadableExport(Exception):
    """A file of an export is not what it should be, so nothing can be compared."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read: {reason}")
        self.path = path
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor stands: the file, and the bytes in it; *begin* counts from the start of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int


@dataclasses.dataclass(frozen=True)
class Export:
    """A directory that ``from_pretrained`` could load, as far as it matters here."""

    path: Path
    small_files: frozenset[str]
    tensors: Mapping[str, Tensor]
    headers: Mapping[str, Mapping[str, str]]
    index: Mapping[str, Any] | None


def read_export(path: Path, ignore: Sequence[str]) -> Export:
    """
    Look at an export; of the weights only the headers are read.

    Raises:
        UnreadableExport: It is no directory, or a header or the index is damaged.
    """
    if not path.is_dir():
        raise UnreadableExport(path, "it is not a directory")
    names = {found.relative_to(path).as_posix() for found in path.rglob("*") if found.is_file()}
    names = {name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in (MANIFEST, *ignore))}
    tensors: dict[str, Tensor] = {}
    headers: dict[str, Mapping[str, str]] = {}
    for name in sorted(name for name in names if name.endswith(".safetensors")):
        headers[name], found = read_header(path / name, name)
        tensors |= found
    index = None
    if INDEX in names:
        try:
            index = json.loads((path / INDEX).read_bytes())
            where = dict(index["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnreadableExport(path / INDEX, repr(error)) from error
        if where != {name: tensor.file for name, tensor in tensors.items()}:
            raise UnreadableExport(path / INDEX, "its weight_map is not what the files hold")
    small = frozenset(name for name in names if not name.endswith(".safetensors") and name != INDEX)
    return Export(path, small, tensors, headers, index)


def read_header(path: Path, name: str) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    """
    The metadata and the tensors that a safetensors file says it holds.

    Raises:
        UnreadableExport: It is none, or is shorter than it says.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            total = file.seek(0, 2)
            if length > total - 8:
                raise UnreadableExport(path, "it is not a safetensors file")
            file.seek(8)
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        tensors = {
            tensor: Tensor(
                name,
                row["dtype"],
                tuple(row["shape"]),
                8 + length + row["data_offsets"][0],
                row["data_offsets"][1] - row["data_offsets"][0],
            )
            for tensor, row in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UnreadableExport(path, repr(error)) from error
    if any(tensor.begin + tensor.size > total for tensor in tensors.values()):
        raise UnreadableExport(path, "it is shorter than its header says")
    return metadata, tensors


def differences(expected: Export, export: Export, *, weights: bool) -> Iterator[str]:
    """Every way in which *export* is not *expected*, one line each."""
    yield from only_in(expected.small_files, export.small_files, "file")
    for name in sorted(expected.small_files & export.small_files):
        yield from in_file(name, expected.path / name, export.path / name)
    yield from in_json(INDEX, expected.index, export.index)
    yield from only_in(expected.headers, export.headers, "file")
    for name in sorted(expected.headers.keys() & export.headers.keys()):
        yield from in_json(f"{name}: __metadata__", expected.headers[name], export.headers[name])
    yield from only_in(expected.tensors, export.tensors, "tensor")
    for name in sorted(expected.tensors.keys() & export.tensors.keys()):
        yield from in_tensor(name, expected, export, weights=weights)


def only_in(expected: Iterable[str], export: Iterable[str], what: str) -> Iterator[str]:
    """Names that one side has and the other has not."""
    one, other = set(expected), set(export)
    yield from (f"missing {what}: {name}" for name in sorted(one - other))
    yield from (f"additional {what}: {name}" for name in sorted(other - one))


def in_file(name: str, expected: Path, export: Path) -> Iterator[str]:
    """How two files of the same name differ."""
    try:
        one, other = expected.read_bytes(), export.read_bytes()
    except OSError as error:
        raise UnreadableExport(Path(error.filename or name), error.strerror or str(error)) from error
    if one == other:
        return
    if name.endswith(".json"):
        try:
            found = list(in_json(name, json.loads(one), json.loads(other)))
        except ValueError as error:
            raise UnreadableExport(export, f"one of the two is not JSON: {error}") from error
        yield from found or [f"{name}: says the same in other bytes ({len(one)} and {len(other)})"]
    else:
        yield f"{name}: other bytes ({len(one)} and {len(other)})"


def in_json(where: str, expected: Any, export: Any) -> Iterator[str]:
    """How two JSON values differ, key by key."""
    if isinstance(expected, Mapping) and isinstance(export, Mapping):
        for key in sorted({*expected, *export}):
            if key not in export:
                yield f"{where}: missing {key} = {json.dumps(expected[key])}"
            elif key not in expected:
                yield f"{where}: additional {key} = {json.dumps(export[key])}"
            else:
                yield from in_json(f"{where}: {key}", expected[key], export[key])
    elif expected != export or type(expected) is not type(export):
        yield f"{where}: {json.dumps(expected)} expected, but it is {json.dumps(export)}"


def in_tensor(name: str, expected: Export, export: Export, *, weights: bool) -> Iterator[str]:
    """How two tensors of the same name differ."""
    one, other = expected.tensors[name], export.tensors[name]
    for what in ("dtype", "shape", "file"):
        if getattr(one, what) != getattr(other, what):
            yield f"tensor {name}: {what} {getattr(one, what)} expected, but it is {getattr(other, what)}"
    if weights and one.size == other.size and (one.dtype, one.shape) == (other.dtype, other.shape):
        with (expected.path / one.file).open("rb") as left, (export.path / other.file).open("rb") as right:
            if not same_bytes(left, one.begin, right, other.begin, one.size):
                yield f"tensor {name}: other bytes"


def same_bytes(left: BinaryIO, left_begin: int, right: BinaryIO, right_begin: int, size: int) -> bool:
    """Whether two stretches of two files are the same."""
    left.seek(left_begin)
    right.seek(right_begin)
    while size > 0:
        count = min(size, CHUNK)
        if left.read(count) != right.read(count):
            return False
        size -= count
    return True


def main(arguments: Sequence[str]) -> int:
    """Compare and report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("expected", type=Path, metavar="EXPECTED")
    parser.add_argument("export", type=Path, metavar="EXPORT")
    parser.add_argument("--weights", action="store_true", help="compare every byte of every tensor, too")
    parser.add_argument("--accept", action="append", default=[], metavar="PATTERN", help="such differences are fine")
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="leave out such files")
    options = parser.parse_args(arguments)
    try:
        expected, export = (read_export(path, options.ignore) for path in (options.expected, options.export))
        found = list(differences(expected, export, weights=options.weights))
    except UnreadableExport as error:
        print(error, file=sys.stderr)
        return UNREADABLE
    refused = [line for line in found if not any(fnmatch.fnmatchcase(line, pattern) for pattern in options.accept)]
    for line in found:
        print(line if line in refused else f"accepted: {line}")
    if not refused:
        print(f"the same: {len(export.small_files)} small files and {len(export.tensors)} tensors compared")
    return DIFFERENT if refused else SAME


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
