"""
How a name on disk is reached: one directory after the other, never through a link, and only to a regular file.

Whoever may write into a run directory, or beside it, may put a link, a pipe or a device at any name, and
may swap a directory for a link between two calls. So nothing of a run is opened by its whole path: every
step is taken from the directory that the step before has opened, and refuses a link. Paths given here have
had their links resolved once, by `RunDirectory`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ckptmgr.errors import CorruptCheckpoint

READ_BYTES = 8 << 20
_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def directory(path: Path) -> Iterator[int]:
    """
    A descriptor to use as ``dir_fd``, for the directory *path*.

    Raises:
        NotADirectoryError: Something on the way is a link, or no directory.
        FileNotFoundError: It is missing.
    """
    here = os.open(path.anchor or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in path.parts[1:] if path.anchor else path.parts:
            below = _step(part, here, path)
            os.close(here)
            here = below
        yield here
    finally:
        os.close(here)


@contextlib.contextmanager
def parent(path: Path) -> Iterator[tuple[int, str]]:
    """The descriptor of the directory that holds *path*, as of `directory`, and the last part of the name."""
    with directory(path.parent) as folder:
        yield folder, path.name


@contextlib.contextmanager
def regular(folder: int, relative: str) -> Iterator[int]:
    """
    A descriptor for reading a regular file at the plain relative path *relative* below *folder*.

    Raises:
        OSError: It cannot be read; EINVAL if it is no regular file or *relative* is no plain path.
    """
    *parents, name = relative.split("/")
    if not name or {"", ".", ".."} & {*parents, name}:
        raise OSError(errno.EINVAL, "not a plain relative path", relative)
    here = os.dup(folder)
    try:
        for part in parents:
            below = _step(part, here, relative)
            os.close(here)
            here = below
        # Opening can do things to a device, so what it is comes first; and again, should it have been swapped.
        kind = os.stat(name, dir_fd=here, follow_symlinks=False).st_mode
        if stat.S_ISLNK(kind):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), relative)
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "not a regular file", relative)
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=here)
    finally:
        os.close(here)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", relative)
        yield descriptor
    finally:
        os.close(descriptor)


def read(path: Path, limit: int) -> bytes:
    """
    All bytes of the regular file *path*.

    Raises:
        CorruptCheckpoint: It has more than *limit* bytes.
        OSError: It cannot be read, or is no regular file.
    """
    with naming(path), parent(path) as (folder, name), regular(folder, name) as descriptor:
        size = os.fstat(descriptor).st_size
        pieces: list[bytes] = []
        # Not only by what fstat says: the file may grow meanwhile.
        while size <= limit and (piece := os.read(descriptor, READ_BYTES)):
            pieces.append(piece)
            size = max(size, sum(map(len, pieces)))
        if size > limit:
            raise CorruptCheckpoint(
                f"{path} has {size} bytes, more than {limit}", directory=str(path), mismatches=("too large",)
            )
        return b"".join(pieces)


def _step(part: str, here: int, path: object) -> int:
    with naming(path):
        try:
            return os.open(part, _STEP, dir_fd=here)
        except NotADirectoryError as error:
            # The kernel says so of a link as well.
            raise NotADirectoryError(error.errno, "not a directory, or a link to one") from error


@contextlib.contextmanager
def naming(path: object) -> Iterator[None]:
    """Let an error name the whole *path*; the kernel was given one part of it, or a descriptor."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
