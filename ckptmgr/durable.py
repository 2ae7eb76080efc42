"""
Every call that must survive a power cut, and nothing else.

No other module renames, syncs, creates or removes files of a run, so a fault can be injected at
each of these calls and a test can forbid them elsewhere. The rules are those of fsync(2) and
rename(2): a file's bytes are durable after fsync of the file, its name only after fsync of the
directory that holds it. A failed fsync or close is never retried: the kernel may have dropped the
dirty pages, and a second fsync would claim that they were written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
#: The file system or the kernel does not know renameat2 or the flag asked for.
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def make_directory(path: Path, *, mode: int = 0o777) -> None:
    """
    Create *path*, which must not exist. Durable on return: the entry in its parent is synced.

    Args:
        path: The directory.
        mode: Its permissions, less the umask.

    Raises:
        FileExistsError: Something of that name exists, a link included.
    """
    path.mkdir(mode)
    sync_directory(path.parent)


def ensure_directory(path: Path) -> None:
    """Create *path* and its missing parents. Durable on return, even if made by a process that died before syncing."""
    if not path.is_dir():
        ensure_directory(path.parent)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
    # A parent that we may not read is not one in which anybody of ours made this.
    with contextlib.suppress(PermissionError):
        sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Fsync the bytes of *path* through a fresh descriptor; its name needs `sync_directory`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Fsync a directory: names created in it, renamed into it or removed from it are durable on return."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directories(root: Path) -> None:
    """Fsync *root* and every directory below it, bottom-up."""
    for directory, _, _ in os.walk(root, topdown=False):
        sync_directory(Path(directory))


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[int]:
    """
    A descriptor to write a file that must not exist. Its bytes are synced when the block ends well.

    The name is durable only after `sync_directory` of its parent. If the block, the fsync or the
    close fails, the error is raised and the file is to be given up.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with _synced(descriptor):
        yield descriptor


@contextlib.contextmanager
def shared_file(path: Path) -> Iterator[int]:
    """A descriptor to write parts of a file that another rank created; synced when the block ends well."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    with _synced(descriptor):
        yield descriptor


@contextlib.contextmanager
def _synced(descriptor: int) -> Iterator[None]:
    try:
        yield
        os.fsync(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise
    os.close(descriptor)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of *data* (bytes) at *offset*, however short the kernel's writes are."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        if written == 0:
            raise OSError(errno.EIO, "write returned 0")
        offset += written
        data = data[written:]


def set_size(descriptor: int, size: int) -> bool:
    """
    Give a new file its final size in bytes, with the space behind it where the file system can.

    A full disk is met here, before the first byte, instead of in the middle of the write.

    Returns:
        Whether the space is there; False where the file system can set a size only.
    """
    if not size:
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    # Not os.posix_fallocate: where the file system lacks it, glibc writes a byte into every block.
    if libc.fallocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(size)) != 0:
        code = ctypes.get_errno()
        if code not in _UNSUPPORTED:
            raise OSError(code, os.strerror(code))
        os.ftruncate(descriptor, size)
        return False
    return True


def write_new(path: Path, data: bytes) -> None:
    """Write a whole new file and fsync it; its name needs `sync_directory`."""
    with new_file(path) as descriptor:
        write_at(descriptor, memoryview(data), 0)


def replace_file(path: Path, data: bytes, *, scratch: str) -> None:
    """
    Put *data* at *path*, atomically: readers see the old bytes or the new ones. Durable on return.

    Args:
        path: The file to create or replace.
        data: Its new bytes.
        scratch: A name in the same directory that is ours; whatever an earlier crash left there goes.
    """
    temporary = path.with_name(scratch)
    temporary.unlink(missing_ok=True)
    write_new(temporary, data)
    rename_over(temporary, path)
    sync_directory(path.parent)


def overwrite(path: Path, data: bytes) -> None:
    """Overwrite a small existing file in place. A note for people to read: neither atomic nor synced."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.ftruncate(descriptor, 0)
        write_at(descriptor, memoryview(data), 0)
    finally:
        os.close(descriptor)


def replace_link(path: Path, target: str, *, scratch: str) -> None:
    """Point the symbolic link *path* at *target*, atomically and durably."""
    temporary = path.with_name(scratch)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    rename_over(temporary, path)
    sync_directory(path.parent)


def remove_link(path: Path) -> None:
    """Remove a symbolic link (never what it points to), durably."""
    path.unlink(missing_ok=True)
    sync_directory(path.parent)


def rename_over(source: Path, target: Path) -> None:
    """Rename over the file or link *target*, if there is one, in one step. The caller syncs the parent directory."""
    source.replace(target)


def rename_new(source: Path, target: Path) -> bool:
    """
    Rename, never over something that exists. The caller syncs the parent directory.

    Returns:
        Whether it was one atomic step; False where the file system cannot, and *target* was looked at first.

    Raises:
        FileExistsError: *target* exists.
        FileNotFoundError: *source* does not.
    """
    if _renameat2(source, target, _RENAME_NOREPLACE):
        return True
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "the final name is taken", str(target))
    source.rename(target)
    return False


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one atomic step; False where the file system cannot. The caller syncs the parent."""
    return _renameat2(first, second, _RENAME_EXCHANGE)


def remove_tree(path: Path) -> None:
    """Remove a directory and all in it, never through a link; a missing one is fine. Durable on return."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "refusing to remove through a symbolic link", str(path))
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
    sync_directory(path.parent)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """renameat2(2), which Python does not wrap. False if this kernel or file system lacks it."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
