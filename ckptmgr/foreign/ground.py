"""
The directory that is judged: names, sizes and bytes, all of them reached without following a link.

Nothing is written, and nothing but regular files is opened. How much is listed or read at once has a limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from ckptmgr import reach
from ckptmgr.errors import UnsafePath

#: Names in one directory that are looked at.
MAX_ENTRIES = 250_000
#: Names in all directories together that are kept in mind, a few hundred bytes each.
MAX_NAMES = 1_000_000
#: Bytes of a text file that names something.
MAX_TEXT_BYTES = 4096


class Kind(enum.Enum):
    """What a name stands for."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"
    OTHER = "pipe, socket or device"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One name: what it stands for, its bytes, and when they were last changed, in nanoseconds."""

    kind: Kind
    size: int
    changed: int


@dataclasses.dataclass(frozen=True)
class Asked:
    """
    What somebody wants to know.

    Of the newest complete checkpoints, *min_step* is the least step that will do; *required* are series that are asked
    about besides what a training resumes from. *progress* is called with the number of bytes just read by *deep*.
    """

    step: int | None = None
    min_step: int | None = None
    required: frozenset[str] = frozenset()
    world_size: int | None = None
    deep: bool = False
    progress: Callable[[int], None] = lambda _: None


class Folder:
    """
    One directory below the one that is judged.

    Args:
        root: The directory that is judged, absolute and free of links.
        path: This one, relative to it; empty for itself.
    """

    def __init__(self, root: Path, path: str = "") -> None:
        self.root = root
        self.path = path
        self._below: dict[str, Folder] = {}
        #: How many more names may be kept; one for all that are reached from the same one.
        self._left = [MAX_NAMES]

    @functools.cached_property
    def entries(self) -> dict[str, Entry]:
        """
        Every name in it, in order.

        Raises:
            UnsafePath: There are more than `MAX_ENTRIES`, or than `MAX_NAMES` with those that were listed before.
            OSError: It cannot be listed, or is no directory.
        """
        found: dict[str, Entry] = {}
        with reach.naming(self.root / self.path), reach.directory(self.root / self.path) as here:
            readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=here)
            try:
                with os.scandir(readable) as entries:
                    for entry in itertools.islice(entries, MAX_ENTRIES + 1):
                        with contextlib.suppress(FileNotFoundError):
                            facts = entry.stat(follow_symlinks=False)
                            if entry.is_symlink() and (blob := self._blob(entry.name)) is not None:
                                facts = _facts(blob)
                            found[entry.name] = Entry(_kind(facts.st_mode), facts.st_size, facts.st_mtime_ns)
            finally:
                os.close(readable)
        self._left[0] -= min(len(found), MAX_ENTRIES)
        if len(found) > MAX_ENTRIES or self._left[0] < 0:
            most = MAX_NAMES if self._left[0] < 0 else MAX_ENTRIES
            text = f"{self.root / self.path} has more than {most} names" + " below it" * (most == MAX_NAMES)
            hint = "give the directory that has the checkpoints and nothing else"
            raise UnsafePath(text, hint=hint, path=str(self.root / self.path), reason="too many names")
        return dict(sorted(found.items()))

    def has(self, name: str, kind: Kind = Kind.FILE) -> bool:
        """Whether *name* is there and stands for that."""
        return name in self.entries and self.entries[name].kind is kind

    def matching(self, pattern: str, kind: Kind = Kind.FILE) -> dict[str, re.Match[str]]:
        """The names of that kind that *pattern* matches in full."""
        compiled = re.compile(pattern, re.DOTALL | re.ASCII)
        matches = {name: compiled.fullmatch(name) for name, entry in self.entries.items() if entry.kind is kind}
        return {name: match for name, match in matches.items() if match is not None}

    def folder(self, name: str) -> Folder:
        """The directory *name* in it, whether it is there or not."""
        if name not in self._below:
            self._below[name] = Folder(self.root, f"{self.path}/{name}" if self.path else name)
            self._below[name]._left = self._left
        return self._below[name]

    def folders(self) -> Iterator[tuple[str, Folder]]:
        """
        All directories in it that can be listed.

        Raises:
            UnsafePath: There are more than `MAX_NAMES` in them.
        """
        for name, entry in self.entries.items():
            if entry.kind is Kind.DIRECTORY:
                below = self.folder(name)
                try:
                    _ = below.entries
                except UnsafePath:
                    if self._left[0] < 0:
                        raise
                except OSError:
                    continue
                else:
                    yield name, below

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """
        A descriptor for reading the regular file *name*.

        Raises:
            OSError: It is none, or cannot be read.
        """
        at = self._blob(name) or self.root / self.path / name
        with reach.parent(at) as (here, last), reach.regular(here, last) as descriptor:
            yield descriptor

    def line(self, name: str) -> str | None:
        """What a small text file says, without the spaces around it; None if it is no such file."""
        try:
            with self.opened(name) as descriptor:
                data = os.pread(descriptor, MAX_TEXT_BYTES + 1, 0)
            return data.decode().strip() if len(data) <= MAX_TEXT_BYTES else None
        except (OSError, UnicodeDecodeError):
            return None

    def link(self, name: str) -> str | None:
        """Where the link *name* leads, unfollowed; None if it is none."""
        return _link(self.root / self.path / name)

    def _blob(self, name: str) -> Path | None:
        """
        Where the cache of huggingface_hub keeps the bytes of *name*: a regular file; None if *name* is no link of it.

        A revision in ``REPOSITORY/snapshots`` has links into ``REPOSITORY/blobs``, and those may be links into the
        ``blobs`` of the whole cache. They are read as text: what leads anywhere else is a link like any other.
        """
        at = self.root / self.path / name
        if "snapshots" not in at.parent.parts:
            return None
        repository = Path(*at.parts[: len(at.parts) - 1 - at.parts[::-1].index("snapshots")])
        for blobs in (repository / "blobs", repository.parent / "blobs"):
            target = _link(at)
            if target is None:
                return None
            at = Path(os.path.normpath(at.parent / target))
            if not at.is_relative_to(blobs):
                return None
            with contextlib.suppress(OSError):
                if stat.S_ISREG(_facts(at).st_mode):
                    return at
        return None


def _link(path: Path) -> str | None:
    try:
        with reach.parent(path) as (here, name):
            return os.readlink(name, dir_fd=here)
    except OSError:
        return None


def _facts(path: Path) -> os.stat_result:
    with reach.parent(path) as (here, name):
        return os.stat(name, dir_fd=here, follow_symlinks=False)


def _kind(mode: int) -> Kind:
    if stat.S_ISREG(mode):
        return Kind.FILE
    if stat.S_ISDIR(mode):
        return Kind.DIRECTORY
    return Kind.LINK if stat.S_ISLNK(mode) else Kind.OTHER
