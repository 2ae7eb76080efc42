"""
Every call that must survive a power cut, and nothing else.

No other module renames, syncs, creates or removes files of a run, so a fault can be injected at
each of these calls and a test can forbid them elsewhere. The rules are those of fsync(2) and
rename(2): a file's bytes are durable after fsync of the file, its name only after fsync of the
directory that holds it. A failed fsync or close is never retried: the kernel may have dropped the
dirty pages, and a second fsync would claim that they were written.

Every name is reached as `reach` says, so that none of these calls leaves its directory through a link.
A *mode* is what a new file or directory gets whatever the umask is; with None the umask decides. What is
new never has a wider mode than it will have, not even for a moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ckptmgr import reach

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
#: What a write past the page cache has to be aligned to, in bytes; no file system that we know asks for more.
DIRECT_BLOCK = 4096
#: How often a directory is emptied that somebody else fills: whoever syncs what he makes is much slower.
_MOST_TRIES = 100
#: The file system or the kernel does not know renameat2 or the flag asked for.
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def make_directory(path: Path, *, mode: int | None = None) -> None:
    """
    Create *path*, which must not exist. Durable on return: the entry in its parent is synced.

    Args:
        path: The directory.
        mode: Its permissions, less the umask.

    Raises:
        FileExistsError: Something of that name exists, a link included.
    """
    with reach.parent(path) as (folder, name):
        _make_directory(folder, name, mode)
    sync_directory(path.parent)


def ensure_directory(path: Path, *, mode: int | None = None) -> None:
    """Create *path* and its missing parents. Durable on return, even if made by a process that died before syncing."""
    if not path.is_dir():
        ensure_directory(path.parent, mode=mode)
        with reach.parent(path) as (folder, name), contextlib.suppress(FileExistsError):
            _make_directory(folder, name, mode)
    # A parent that we may not read is not one in which anybody of ours made this.
    with contextlib.suppress(PermissionError):
        sync_directory(path.parent)


def _make_directory(folder: int, name: str, mode: int | None) -> None:
    os.mkdir(name, 0o777 if mode is None else mode & 0o777, dir_fd=folder)
    if mode is not None:
        made = _open_directory(folder, name)
        try:
            # A group that is handed down from the parent stays.
            os.fchmod(made, mode | os.fstat(made).st_mode & stat.S_ISGID)
        finally:
            os.close(made)


def _open_directory(folder: int, name: str) -> int:
    return os.open(name or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)


def sync_file(path: Path) -> None:
    """Fsync the bytes of *path* through a fresh descriptor; its name needs `sync_directory`."""
    with reach.naming(path), reach.parent(path) as (folder, name), reach.regular(folder, name) as descriptor:
        os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Fsync a directory: names created in it, renamed into it or removed from it are durable on return."""
    with reach.naming(path):
        with reach.parent(path) as (folder, name):
            descriptor = _open_directory(folder, name)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_directories(root: Path) -> None:
    """Fsync *root* and every directory below it, bottom-up."""

    def refuse(error: OSError) -> None:
        raise error

    # A directory that cannot be listed would be left out, unsynced, without a word.
    for directory, _, _ in os.walk(root, topdown=False, onerror=refuse):
        sync_directory(Path(directory))


def ensure_file(path: Path, *, mode: int | None = None) -> None:
    """
    Create *path* empty unless something of that name exists, whatever it is; its name needs `sync_directory`.

    For files that a library opens by their names, so that they have their mode from the first moment.
    """
    with contextlib.suppress(FileExistsError):
        os.close(_create(path, mode))


@contextlib.contextmanager
def new_file(path: Path, *, mode: int | None = None) -> Iterator[int]:
    """
    A descriptor to write a file that must not exist. Its bytes are synced when the block ends well.

    The name is durable only after `sync_directory` of its parent. If the block, the fsync or the
    close fails, the error is raised and the file is to be given up.
    """
    descriptor = _create(path, mode)
    with _synced(descriptor):
        yield descriptor


def _create(path: Path, mode: int | None) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with reach.parent(path) as (folder, name):
        descriptor = os.open(name, flags, 0o666 if mode is None else mode, dir_fd=folder)
    if mode is not None:
        try:
            os.fchmod(descriptor, mode)
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor


@contextlib.contextmanager
def shared_file(path: Path) -> Iterator[int]:
    """
    A descriptor to write parts of a file that another rank created; synced when the block ends well.

    Raises:
        OSError: It is missing, a link, no regular file, or has a second name, under which it may be somebody else's.
    """
    with _synced(_open_only(path)) as descriptor:
        yield descriptor


def _open_only(path: Path) -> int:
    """A descriptor for writing an existing file that has this one name."""
    with reach.parent(path) as (folder, name):
        descriptor = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file with one name", str(path))
    return descriptor


@contextlib.contextmanager
def _synced(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
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


@contextlib.contextmanager
def direct(descriptor: int) -> Iterator[bool]:
    """
    Let writes to *descriptor* go past the page cache within the block, which is for `write_direct` alone.

    The bytes still need the fsync: the device may have a cache, and the file's size and extents are not written yet.

    Returns:
        Whether the file system says that it can.
    """
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        yield False
        return
    try:
        yield True
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)


def write_direct(descriptor: int, data: memoryview, offset: int) -> int:
    """
    Write *data* at *offset* past the page cache, as far as that goes.

    Its place in memory, *offset* and its length are multiples of `DIRECT_BLOCK`.

    Returns:
        How many bytes were written. The rest, of a write that the kernel cut short within a block, or of one that
        the file system does not take, is to be written with `write_at` after the block of `direct`.
    """
    written = 0
    while written < len(data):
        try:
            count = os.pwrite(descriptor, data[written:], offset + written)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break
        if count == 0:
            raise OSError(errno.EIO, "write returned 0")
        written += count
        if count % DIRECT_BLOCK:
            break
    return written


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


def write_new(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Write a whole new file and fsync it; its name needs `sync_directory`."""
    with new_file(path, mode=mode) as descriptor:
        write_at(descriptor, memoryview(data), 0)


def replace_file(path: Path, data: bytes, *, scratch: str, mode: int | None = None) -> None:
    """
    Put *data* at *path*, atomically: readers see the old bytes or the new ones. Durable on return.

    Args:
        path: The file to create or replace.
        data: Its new bytes.
        scratch: A name in the same directory that is ours; whatever an earlier crash left there goes.
        mode: Of the new file.

    Raises:
        IsADirectoryError: One of the two names is a directory, which is nothing of ours.
    """
    temporary = path.with_name(scratch)
    _remove_file(temporary)
    write_new(temporary, data, mode=mode)
    rename_over(temporary, path)
    sync_directory(path.parent)


def overwrite(path: Path, data: bytes) -> None:
    """
    Overwrite a small existing file in place. A note for people to read: neither atomic nor synced.

    Raises:
        OSError: As of `shared_file`; nothing was written.
    """
    descriptor = _open_only(path)
    try:
        os.ftruncate(descriptor, 0)
        write_at(descriptor, memoryview(data), 0)
    finally:
        os.close(descriptor)


def replace_link(path: Path, target: str, *, scratch: str) -> None:
    """Point the symbolic link *path* at *target*, atomically and durably."""
    temporary = path.with_name(scratch)
    _remove_file(temporary)
    with reach.parent(temporary) as (folder, name):
        os.symlink(target, name, dir_fd=folder)
    rename_over(temporary, path)
    sync_directory(path.parent)


def second_name(descriptor: int, path: Path) -> None:
    """
    Give the open file a second name that must not exist, whatever its first one stands for by now, and sync its bytes.

    The name is durable only after `sync_directory` of its parent.

    Raises:
        OSError: The file system cannot, the kernel refuses, or it is another one (EXDEV).
    """
    os.fsync(descriptor)
    with reach.naming(path), reach.parent(path) as (folder, name):
        os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=folder, follow_symlinks=True)
        made, found = os.stat(name, dir_fd=folder, follow_symlinks=False), os.fstat(descriptor)
    if (made.st_dev, made.st_ino) != (found.st_dev, found.st_ino):
        raise OSError(errno.EINVAL, "the second name stands for another file", str(path))


def remove_file(path: Path) -> None:
    """Remove a file or a symbolic link (never what it points to), durably; a missing one is fine."""
    _remove_file(path)
    sync_directory(path.parent)


def _remove_file(path: Path) -> None:
    with reach.parent(path) as (folder, name), contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


def rename_over(source: Path, target: Path) -> None:
    """Rename over the file or link *target*, if there is one, in one step. The caller syncs the parent directory."""
    with reach.parent(source) as (here, old), reach.parent(target) as (there, new):
        os.replace(old, new, src_dir_fd=here, dst_dir_fd=there)


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
    with reach.parent(source) as (here, old), reach.parent(target) as (there, new):
        os.rename(old, new, src_dir_fd=here, dst_dir_fd=there)
    return False


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one atomic step; False where the file system cannot. The caller syncs the parent."""
    return _renameat2(first, second, _RENAME_EXCHANGE)


def remove_tree(path: Path) -> None:
    """
    Remove a directory and all in it, never through a link; a missing one is fine. Durable on return.

    However deep it is: no path is formed and nothing calls itself. Who still makes files in it, such as a writer that
    has outlived its trainer, is outrun: it syncs each of them, and finds no directory for the next one.

    Raises:
        OSError: It is a link or a file, or something in it cannot be removed or was moved away meanwhile, or it is
            filled again and again.
    """
    with reach.parent(path) as (folder, name):
        if path.is_symlink():
            raise OSError(errno.ELOOP, "refusing to remove through a symbolic link", str(path))
        with contextlib.suppress(FileNotFoundError):
            tries = 1
            while not _is_removed(folder, name, once_more=tries < _MOST_TRIES):
                tries += 1
    sync_directory(path.parent)


def _is_removed(folder: int, name: str, *, once_more: bool) -> bool:
    """Remove a directory with all in it; False if somebody has made something in it meanwhile, or else OSError."""
    try:
        _empty(_open_directory(folder, name))
        os.rmdir(name, dir_fd=folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not once_more:
            raise
        return False
    return True


def _empty(here: int) -> None:
    """Remove all that is in a directory, and close its descriptor."""
    #: What each directory above this one is, and the directories in it that are left, this one last.
    above: list[tuple[os.stat_result, list[str]]] = []
    try:
        left = _remove_files(here)
        while left or above:
            if left:
                try:
                    below = _open_directory(here, left[-1])
                except FileNotFoundError:  # somebody else removes it too
                    left.pop()
                    continue
                above.append((os.fstat(here), left))
                here = _instead(here, below)
                left = _remove_files(here)
            else:
                here = _instead(here, _open_directory(here, ".."))
                expected, left = above.pop()
                if not os.path.samestat(expected, os.fstat(here)):
                    raise OSError(errno.EBUSY, "a directory was moved while it was being removed", left[-1])
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(left[-1], dir_fd=here)
                left.pop()
    finally:
        os.close(here)


def _instead(old: int, new: int) -> int:
    os.close(old)
    return new


def _remove_files(here: int) -> list[str]:
    """Remove all that is no directory; the names of the directories."""
    directories = []
    with os.scandir(here) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                directories.append(entry.name)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.name, dir_fd=here)
    return directories


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """renameat2(2), which Python does not wrap. False if this kernel or file system lacks it."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    with reach.parent(source) as (here, old), reach.parent(target) as (there, new):
        if call(here, os.fsencode(old), there, os.fsencode(new), flags) == 0:
            return True
        code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))
