"""
A watch over what a process touches, by Python's audit events.

Seen: files opened, made, renamed, removed or linked outside of the places that are allowed, programs
started, sockets, code compiled from pickles, libraries loaded. Not seen: what SQLite and other libraries in
C do by themselves; for that the surroundings are compared afterwards.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Where a process may read whatever it does: the interpreter, what is installed, and what the kernel tells.
_READABLE = (
    *{str(Path(path).resolve()) for path in sysconfig.get_paths().values()},
    *{str(Path(path).resolve()) for path in (sys.prefix, sys.base_prefix, sys.exec_prefix)},
    *(str(Path(path).resolve()) for path in sys.path if path),
    str(importlib.resources.files("ckptmgr.migrations")),
    *("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/proc", "/sys", "/dev/null", "/dev/urandom"),
)
_NEVER = (
    "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen", "pty.spawn",
    "socket.connect", "socket.bind", "socket.getaddrinfo", "os.chown", "os.setxattr", "pickle.find_class",
    "webbrowser.open", "urllib.Request", "shutil.rmtree",
)  # fmt: skip
#: Event → which arguments are paths, and which are the descriptors that they are relative to.
_CHANGES = {
    "os.mkdir": ((0, 2),), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.rename": ((0, 2), (1, 3)),
    "os.symlink": ((1, 2),), "os.link": ((0, 2), (1, 3)), "os.truncate": ((0, None),), "os.chmod": ((0, 2),),
    "os.utime": ((0, 3),), "os.mkfifo": ((0, 2),), "os.mknod": ((0, 3),), "sqlite3.connect": ((0, None),),
}  # fmt: skip


class Guard:
    """One per process: an audit hook cannot be taken back. What was seen is in `seen`."""

    _only: Guard | None = None

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._roots: tuple[str, ...] = ()
        self._on = False
        self._real_open = os.open
        os.open = self._open  # type: ignore[assignment]
        sys.addaudithook(self._audit)

    @classmethod
    def of_this_process(cls) -> Guard:
        """The guard, installed when it is first asked for."""
        if cls._only is None:
            cls._only = cls()
        return cls._only

    @contextlib.contextmanager
    def watching(self, *roots: Path) -> Iterator[None]:
        """Look out while the block runs; below *roots* and in the interpreter's own places anything may happen."""
        self.seen = []
        self._roots = tuple(str(root) for root in roots)
        self._on = True
        try:
            yield
        finally:
            self._on = False

    @contextlib.contextmanager
    def looking_away(self) -> Iterator[None]:
        """For what a harness itself does in the middle of it."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        # The audit event of an opening relative to a directory does not say to which.
        if self._on and dir_fd is not None and not flags & os.O_PATH:
            self._opened(self._at(path, dir_fd), flags)
        return self._real_open(path, flags, mode, dir_fd=dir_fd)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event == "open":
            path, _, flags = args
            named = isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith("/")
            if named and not (flags or 0) & os.O_PATH:
                self._opened(os.fsdecode(path), flags or 0)
        elif event in _NEVER or (event == "ctypes.dlopen" and args[0]) or (event == "os.kill" and args[1]):
            self._note(f"{event} {args!r}"[:200])
        elif event in _CHANGES:
            for path, folder in _CHANGES[event]:
                where = self._at(args[path], -1 if folder is None else args[folder])
                where = where.removeprefix("file://").partition("?")[0]
                if not self._allowed(where):
                    self._note(f"{event} {where}")
        elif event in ("os.scandir", "os.listdir"):
            self._opened(self._at(args[0], None) if not isinstance(args[0], int) else "/", os.O_RDONLY)

    def _opened(self, path: str, flags: int) -> None:
        writing = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))
        if not self._allowed(path, reading=not writing):
            self._note(f"{'write' if writing else 'read'} {path}")

    def _allowed(self, path: str, *, reading: bool = False) -> bool:
        real = os.path.normpath(path)
        places = (*self._roots, *(_READABLE if reading else ("/dev/null",)))
        return any(real == place or real.startswith(place + "/") for place in places) or real in ("/", ".")

    def _note(self, what: str) -> None:
        self.seen.append(what)

    @staticmethod
    def _at(path: Any, folder: int | None) -> str:
        if isinstance(path, int):
            folder, path = path, ""
        name = os.fsdecode(path)
        if folder is None or folder < 0 or name.startswith("/"):
            return name
        try:
            return f"{Path(f'/proc/self/fd/{folder}').readlink()}/{name}".removesuffix("/")
        except OSError:
            return name


def scratch() -> Path:
    """Where fuzzing puts files: in memory, if there is such a place."""
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
