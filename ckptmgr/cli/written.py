"""
Writing a file that a user asked for: whole or not at all, and never over something that is not ours.

The run directory, the journal and what stands beside it belong to their manager; nothing is written there.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from ckptmgr import durable, reach
from ckptmgr.errors import InvalidArgument, UnsafePath
from ckptmgr.rundir import RunDirectory

_LOOKED_AT_BYTES = 4096


def place(name: str, rundir: RunDirectory, *, mark: str, force: bool) -> Path:
    """
    Where the file *name* may be written, absolute, its folder free of links.

    Args:
        name: As the user gave it.
        rundir: The run it is about.
        mark: Text near the beginning of every file of its kind.
        force: Whether a file without the mark may be overwritten.

    Raises:
        InvalidArgument: *name* is no name of a file, its folder is missing, or a file is there that is not of its kind.
        UnsafePath: It is in the run directory, or is the journal or beside it, or is a link or no regular file.
    """
    given = Path(name)
    if not name or "\0" in name or given.name in ("", "..") or name.endswith(os.sep):
        raise InvalidArgument(f"{name!r} cannot name a file")
    try:
        found = given.parent.resolve(strict=True) / given.name
    except (OSError, RuntimeError) as error:
        raise InvalidArgument(f"{given.parent} is no directory that can be reached", hint="make it first") from error
    if found.is_relative_to(rundir.path) or found.name.startswith(rundir.journal_path.name.removesuffix(".db")):
        hint = "give a FILE elsewhere"
        raise UnsafePath(f"{found} belongs to the run", hint=hint, path=str(found), reason="managed by ckptmgr")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(found.lstat().st_mode):
            raise UnsafePath(f"{found} is not a regular file", path=str(found), reason="not a file")
        if not force and mark not in _beginning(found):
            hint = "give another FILE, or --force to overwrite it"
            raise InvalidArgument(f"{found} is there already and was not made by this command", hint=hint)
    return found


def write(path: Path, data: bytes) -> None:
    """Put *data* at *path*, atomically: readers see the old bytes or the new ones. Durable on return."""
    scratch = f".{path.name}.{os.getpid()}.writing"
    try:
        with reach.naming(path):
            durable.replace_file(path, data, scratch=scratch)
    except BaseException:
        with contextlib.suppress(OSError):
            durable.remove_file(path.with_name(scratch))
        raise


def _beginning(path: Path) -> str:
    with reach.parent(path) as (folder, name), reach.regular(folder, name) as descriptor:
        return os.read(descriptor, _LOOKED_AT_BYTES).decode("utf-8", errors="replace")
