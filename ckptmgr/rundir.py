"""
The run directory: names, the run lock, and every change ckptmgr makes on disk.

Rank 0 only. All paths given and returned as text are relative to the run
directory and made of names this file formed or recognised itself; nothing outside the run directory
is ever written or removed, links are never followed, and a directory without a readable manifest of
this run is never taken for ours.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import json
import logging
import operator
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptmgr import durable, reach
from ckptmgr.errors import (
    CorruptCheckpoint,
    ForeignJournal,
    InvalidArgument,
    JournalNotFound,
    LockUnsupported,
    RunLocked,
    UnsafePath,
)
from ckptmgr.lifecycle import CheckpointRecord
from ckptmgr.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Digest,
    FileEntry,
    Manifest,
    is_plain_relative,
    is_run_id,
)
from ckptmgr.options import Permissions
from ckptmgr.recovery import Found, FoundKind

if TYPE_CHECKING:
    from filelock import UnixFileLock

log = logging.getLogger("ckptmgr")

META_NAME = "meta.json"
RUN_ID_NAME = ".ckptmgr-run-id"
LATEST_NAME = "hf-latest"
_LATEST_SCRATCH = f".{LATEST_NAME}.new"
#: Names in one directory that are looked at: a listing of more takes more than a GiB of memory.
MAX_ENTRIES = 1_000_000
MAX_META_BYTES = 32 << 20

#: What is digested at once, small enough to stay in the cache of a core, and how many more of them are read ahead.
_BLOCK_BYTES = 2 << 20
_READ_AHEAD = 3

#: Pieces of data in one file that are counted.
_MOST_PIECES = 10_000

_SERIES = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")
_FINAL = re.compile(r"(?:step|hf)-(0|[1-9][0-9]{0,17})\Z")
_WORKING = re.compile(
    r"\.(?:step|hf)-(0|[1-9][0-9]{0,17})\.e([1-9][0-9]{0,17})\.a([1-9][0-9]{0,17})"
    r"\.(incomplete|retired|quarantined)(?:(?<=quarantined)\.[0-9]+)?\Z"
)
#: Errors that say that no such regular file is there, rather than that the disk cannot be read.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL, errno.EISDIR, errno.ENXIO, errno.ENAMETOOLONG)
#: Errors that say that something else stands where a file of ours would be created or replaced.
_TAKEN = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.ELOOP, errno.EINVAL)
#: Of the journal's path, in bytes: SQLite opens none of more than 504, and what is kept beside it has longer names.
MAX_JOURNAL_PATH_BYTES = 480
_READ_ONLY = (
    "even to resume, a manager writes to its run: be its user, on a mount that is writable, or load with "
    "torch.distributed.checkpoint what `ckptmgr latest RUN` names"
)
_NO_LINK = "put the directory itself there; of a run, only the way to its directory may lead through links"
_MARK = "ckptmgr writes a plain file there; put it back, or remove what is there if the run is new"
_KINDS = {
    "incomplete": FoundKind.STAGING,
    "retired": FoundKind.RETIRED,
    "quarantined": FoundKind.QUARANTINED,
}


def check_series_name(name: str) -> str:
    """
    Return *name* if it may be a series: a letter or digit, then letters, digits, ``_`` and ``-``, 64 at most.

    Raises:
        InvalidArgument: It may not.
    """
    if not isinstance(name, str) or not _SERIES.match(name):
        raise InvalidArgument(
            f"{name!r} cannot name a series: use at most 64 letters, digits, '_' and '-', "
            "starting with a letter or digit"
        )
    return name


class RunDirectory:
    """
    One run directory and the journal's place beside it.

    Args:
        path: The run directory, or its ``.journal.db``. Links in it are resolved once, here.
        journal: The journal file, if it is not ``<run>.journal.db`` beside the run directory.
        permissions: The modes of what is created; by default as the environment says.

    Raises:
        InvalidArgument: *path* or *journal* cannot be a path.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        journal: str | os.PathLike[str] | None = None,
        *,
        permissions: Permissions | None = None,
    ) -> None:
        self.permissions = permissions or Permissions()
        if not os.fspath(path):
            raise InvalidArgument("'' is no run directory", hint="is a variable unset? '.' is the current directory")
        given = Path(path)
        if journal is not None and Path(journal).name in ("", ".."):
            raise InvalidArgument(f"{os.fspath(journal)!r} cannot be a journal")
        if journal is None and given.name.endswith(".journal.db") and given.name != ".journal.db":
            journal = given
            given = given.with_name(given.name.removesuffix(".journal.db"))
        self.path = _resolved(given)
        if self.path == Path(self.path.anchor) or not self.path.name:
            raise InvalidArgument(f"{str(given)!r} cannot be a run directory")
        if journal is None:
            self.journal_path = self.path.with_name(self.path.name + ".journal.db")
        else:
            beside = Path(journal)
            self.journal_path = _resolved(beside.parent) / beside.name
        self.lock_path = self.journal_path.with_name(self.journal_path.name.removesuffix(".db") + ".lock")
        self._lock: UnixFileLock | None = None

    def check_journal_path(self) -> None:
        """
        Refuse a journal that SQLite could not open by its name.

        Raises:
            InvalidArgument: Its path has more than `MAX_JOURNAL_PATH_BYTES`.
        """
        length = len(os.fsencode(self.journal_path))
        if length > MAX_JOURNAL_PATH_BYTES:
            raise InvalidArgument(
                f"the journal's path has {length} bytes and SQLite can use no more than {MAX_JOURNAL_PATH_BYTES}: "
                f"{self.journal_path}",
                hint="put the journal under a shorter path on the same host: journal= in code, --journal PATH on the "
                "command line; the run directory itself may stay where it is",
            )

    # -- the run lock ---------------------------------------------------------------------------

    def acquire(self, command: str, *, timeout_s: float = 0.0) -> None:
        """
        Take the run lock for this process, or fail at once. The kernel frees it when the process ends.

        Raises:
            RunLocked: Another process holds it; ``holder`` says who, where and since when.
            LockUnsupported: This file system cannot lock (never a silent soft lock), or cannot make the lock's file.
            UnsafePath: Lock, journal or run directory may be somebody else's: a link, a file with a second
                name, no file at all, or another user's in a directory where everybody may make files.
        """
        from filelock import Timeout, UnixFileLock  # slow to import, and whoever only looks takes no lock

        with self._refused_is_unsupported("make"):
            durable.ensure_directory(self.lock_path.parent, mode=self.permissions.directory_mode)
            self._refuse_what_was_planted()
            durable.ensure_file(self.lock_path, mode=self.permissions.file_mode)
        lock = UnixFileLock(self.lock_path, timeout=timeout_s, thread_local=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout as error:
            holder = self.holder()
            message = f"run {self.path} is in use by {holder}"
            raise RunLocked(message, path=str(self.lock_path), holder=holder) from error
        except (OSError, NotImplementedError) as error:
            refused = isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
            raise LockUnsupported(
                f"cannot lock {self.lock_path}: {error}",
                hint=_READ_ONLY if refused else None,
                path=str(self.lock_path),
                reason=str(error),
            ) from error
        self._lock = lock
        import socket  # slow to import, and who only reads has no lock

        note = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time(), "command": command}
        try:
            with self._refused_is_unsupported("write into"), _taken_is_unsafe(self.lock_path):
                durable.overwrite(self.lock_path, json.dumps(note).encode())
        except BaseException:
            self.release()
            raise

    @contextlib.contextmanager
    def _refused_is_unsupported(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LockUnsupported(
                f"cannot {doing} the run lock {self.lock_path}: {error}",
                hint="see to what the file system says; until the lock is there, two managers could not be kept apart",
                path=str(self.lock_path),
                reason=str(error),
            ) from error

    def release(self) -> None:
        """Free the run lock. The file stays: removing it would let two holders in."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def holder(self) -> str:
        """Who took the run lock last, in words."""
        try:
            note = json.loads(reach.read(self.lock_path, 1 << 16))
            since = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(note["since"]))
            return f"{note['command']}, pid {int(note['pid'])} on {note['host']}, since {since}"
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError, CorruptCheckpoint):
            return "an unknown process"

    # -- identity -------------------------------------------------------------------------------

    def run_id(self) -> str | None:
        """
        The run this directory belongs to, or None if no manager has opened it yet.

        Raises:
            UnsafePath: The mark that says so is a link, no regular file, or says something else: nothing of ours.
            InvalidArgument: The run directory is no directory.
        """
        mark = self.path / RUN_ID_NAME
        try:
            text = reach.read(mark, 4096).decode(errors="replace").strip()
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise InvalidArgument(f"{self.path} is not a directory") from error
        except (OSError, CorruptCheckpoint) as error:
            if isinstance(error, OSError) and error.errno not in _ABSENT:
                raise
            raise UnsafePath(f"{mark} is not a regular file", hint=_MARK, path=str(mark), reason=str(error)) from error
        if not is_run_id(text):
            raise UnsafePath(f"{mark} holds no run id", hint=_MARK, path=str(mark), reason="no run id")
        return text

    def write_run_id(self, run_id: str) -> None:
        """Mark the directory as *run_id*'s; durable on return."""
        self._replace(RUN_ID_NAME, (run_id + "\n").encode(), scratch=RUN_ID_NAME + ".new")

    def require_journal(self) -> None:
        """
        Refuse to start a fresh journal for a directory that has lost its own.

        Raises:
            JournalNotFound: The directory was managed before and its journal is gone.
        """
        if self.run_id() is not None and not os.path.lexists(self.journal_path):
            raise JournalNotFound(
                f"{self.path} was managed before, but its journal {self.journal_path} is gone",
                hint=f"put the journal back, or run `ckptmgr recover {self.path} --rebuild --apply`",
                path=str(self.journal_path),
            )

    def require_pair(self, run_id: str, *, managed: bool = False) -> None:
        """
        Check, without marking anything, that directory and journal are of one run.

        Args:
            run_id: The journal's.
            managed: Whether the journal has checkpoints; then a directory without its mark is refused too.
                It may be the empty place where a file system is not mounted, and looks as if all were lost.

        Raises:
            ForeignJournal: They belong to two runs, or the directory does not say.
        """
        found = self.run_id()
        if found == run_id or (found is None and not managed):
            return
        facts = {"path": str(self.journal_path), "found": run_id, "expected": found or ""}
        if found is None:
            hint = f"is its file system mounted? If it is, write {run_id} into {self.path / RUN_ID_NAME}"
            raise ForeignJournal(f"{self.path} does not say that it belongs to run {run_id}", hint=hint, **facts)
        raise ForeignJournal(
            f"{self.path} belongs to run {found}, but its journal {self.journal_path} to run {run_id}", **facts
        )

    def pair(self, run_id: str, *, managed: bool = False) -> None:
        """Like `require_pair`, and a fresh directory is created and marked as *run_id*'s; durable on return."""
        self.require_pair(run_id, managed=managed)
        durable.ensure_directory(self.path, mode=self.permissions.directory_mode)
        if self.run_id() is None:
            self.write_run_id(run_id)

    # -- looking --------------------------------------------------------------------------------

    def listing(
        self,
        series: Iterable[str],
        *,
        deep_for: Collection[str] = (),
        sizes_for: Collection[str] = (),
        unread: Set[str] = frozenset(),
        besides: Collection[str] = (),
    ) -> list[Found]:
        """
        What stands in the directories of *series*.

        Args:
            series: Names of series; a missing directory holds nothing.
            deep_for: Paths whose files are verified by digest.
            sizes_for: Paths whose files are verified by size.
            unread: Paths of directories that are taken for what their names say, which makes a long list quick;
                not where a staging, retired or quarantined directory of the same step stands beside one.
            besides: Paths that are not asked for at all, which makes it quicker still.

        Raises:
            UnsafePath: The directory of a series is a link or a file, or has more than `MAX_ENTRIES` names.
        """
        found = []
        for name in series:
            entries = _entries(self._inside(check_series_name(name)), besides)
            moved = {f"{name}/{each[1:].partition('.')[0]}" for each, _ in entries if _WORKING.match(each)}
            alone = unread - moved
            found += [self._look(name, entry, deep_for, sizes_for, alone) for entry in entries]
        return found

    def series_on_disk(self) -> list[str]:
        """The names of all directories that can be those of a series."""
        names = (name for name, kind in _entries(self.path) if kind == stat.S_IFDIR and _SERIES.match(name))
        return sorted(names)

    def _look(
        self,
        series: str,
        entry: tuple[str, int],
        deep_for: Collection[str],
        sizes_for: Collection[str],
        unread: Collection[str],
    ) -> Found:
        name, file_type = entry
        path = f"{series}/{name}"
        is_directory = file_type == stat.S_IFDIR
        passed_by = False
        step = epoch = attempt = None
        kind = FoundKind.OTHER
        if match := _FINAL.match(name):
            kind, step = FoundKind.FINAL, int(match[1])
            passed_by = is_directory and path in unread
        elif match := _WORKING.match(name):
            kind, step, epoch, attempt = _KINDS[match[4]], int(match[1]), int(match[2]), int(match[3])
        elif file_type == stat.S_IFLNK and name in (LATEST_NAME, _LATEST_SCRATCH):
            kind = FoundKind.LINK
        holds = digest = mismatches = ours = None
        rotten = unreadable = False
        extra: tuple[str, ...] = ()
        if is_directory and not passed_by and kind is not FoundKind.OTHER:
            try:
                manifest, digest = self.read_manifest(path)
                if manifest.run_id == self.run_id() and manifest.series == series:
                    holds, ours = manifest.attempt, manifest
                if path in deep_for or path in sizes_for:
                    mismatches = self.verify(path, manifest.files, digests=path in deep_for)
                    extra = self._extra(path, manifest.files)
            except CorruptCheckpoint:
                rotten = True
            except OSError as error:
                if error.errno not in _ABSENT:
                    unreadable = True
                    mismatches = (f"unreadable: {MANIFEST_NAME} cannot be read: {error.strerror or error}",)
        return Found(
            path=path, series=series, kind=kind, step=step, epoch=epoch, attempt=attempt,
            is_directory=is_directory, holds=holds, mismatches=mismatches, manifest_digest=digest,
            manifest=ours, extra=extra, rotten=rotten, unreadable=unreadable, unread=passed_by,
        )  # fmt: skip

    def _extra(self, path: str, files: Sequence[FileEntry]) -> tuple[str, ...]:
        """What stands in a checkpoint directory and was not committed: names relative to it."""
        listed = {entry.path for entry in files} | {MANIFEST_NAME}
        folders = {parent for name in listed for parent in _parents(name)}
        known = listed | folders
        directory = str(self._inside(path))
        names: list[str] = []
        for root, below, here in os.walk(directory):
            at = f"{root[len(directory) + 1 :]}/".lstrip("/")
            # A link to a directory is one of *below*, and is not walked into.
            names += [at + one for one in (*here, *below) if at + one not in known]
            below[:] = [one for one in below if at + one in folders]
        return tuple(sorted(names))

    def written(self, path: str) -> dict[str, int]:
        """
        How many bytes of each file below *path* have been written, by its path relative to it.

        A writer reserves the space of a whole file first; that is not counted, where the file system can tell.
        What goes meanwhile is left out.
        """
        found = {}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), reach.directory(self._inside(path)) as folder:
            for root, below, names in os.walk(self._inside(path)):
                at = Path(root).relative_to(self._inside(path))
                below.sort()
                for name in ((at / name).as_posix() for name in sorted(names)):
                    with contextlib.suppress(OSError), reach.regular(folder, name) as descriptor:
                        found[name] = _written(descriptor)
        return found

    def space(self) -> tuple[int, int]:
        """Bytes of the file system: those that are free for anybody but root, and all."""
        space = os.statvfs(self.path)
        return space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize

    def read_manifest(self, path: str) -> tuple[Manifest, str]:
        """
        The manifest of the checkpoint directory *path* and the digest of its bytes.

        Raises:
            FileNotFoundError: There is none.
            CorruptCheckpoint: It cannot be trusted.
        """
        name = self._inside(path) / MANIFEST_NAME
        data = reach.read(name, MAX_MANIFEST_BYTES)
        return Manifest.from_json(data, where=str(name)), Digest(data).text

    def verify(
        self,
        path: str,
        files: Sequence[FileEntry],
        *,
        digests: bool,
        progress: Callable[[int], None] | None = None,
        from_disk: bool = False,
    ) -> tuple[str, ...]:
        """
        Compare the files of the directory *path* with what was recorded.

        Args:
            path: A checkpoint directory.
            files: What is expected in it; sizes in bytes.
            digests: Read every byte, not only the sizes.
            progress: Called with the number of bytes just read.
            from_disk: Read what the disk holds rather than what memory still has of it, as far as the kernel
                lets go of that; and leave no more in memory for others to make room for.

        Returns:
            What differs, each starting with ``missing:``, ``unreadable:``, ``size:`` or ``digest:``; empty if intact.
        """
        try:
            with reach.directory(self._inside(path)) as folder:
                return tuple(self._compare(folder, files, digests=digests, progress=progress, from_disk=from_disk))
        except (FileNotFoundError, NotADirectoryError):
            return tuple(f"missing: {entry.path} cannot be read: there is no directory {path}" for entry in files)

    def _compare(
        self,
        folder: int,
        files: Sequence[FileEntry],
        *,
        digests: bool,
        progress: Callable[[int], None] | None,
        from_disk: bool,
    ) -> list[str]:
        wrong = []
        for entry in files:
            try:
                with reach.regular(folder, entry.path) as descriptor:
                    size = os.fstat(descriptor).st_size
                    if size != entry.size:
                        wrong.append(f"size: {entry.path} has {size} bytes, {entry.size} were committed")
                    elif digests and _digest_of(descriptor, size, progress, from_disk=from_disk) != entry.digest:
                        wrong.append(f"digest: {entry.path} has other bytes than were committed")
            except OSError as error:
                word = "missing" if error.errno in _ABSENT else "unreadable"
                wrong.append(f"{word}: {entry.path} cannot be read: {error.strerror or error}")
        return wrong

    def exists(self, path: str) -> bool:
        """Whether anything, a dangling link included, stands at *path*."""
        return os.path.lexists(self._inside(path))

    def absolute(self, path: str) -> Path:
        """*path* as an absolute one, checked to stay inside."""
        return self._inside(path)

    # -- changing: the commit order -------------------------------------------------------------

    def create_staging(self, record: CheckpointRecord) -> Path:
        """
        Create the staging directory of an attempt; durable on return.

        Raises:
            UnsafePath: The final name is taken by something the journal does not know.
        """
        if record.overwrites is None and self.exists(record.directory):
            raise UnsafePath(
                f"{self.path / record.directory} exists, but the journal does not know it",
                hint="move it away; ckptmgr never deletes or replaces what it did not write",
                path=record.directory,
                reason="taken",
            )
        staging = self._inside(record.staging_directory)
        durable.ensure_directory(staging.parent, mode=self.permissions.directory_mode)
        durable.make_directory(staging, mode=self.permissions.directory_mode)
        return staging

    def seal(self, record: CheckpointRecord, manifest: Manifest) -> str:
        """
        Write the manifest into a complete staging directory and make the whole directory durable.

        Every rank has synced its own files. Rule C2: when this returns, anyone who has only the disk can finish.

        Returns:
            The manifest's digest.

        Raises:
            CorruptCheckpoint: The directory does not hold exactly the files the ranks reported.
            InvalidArgument: There are more files than a manifest can list.
        """
        staging = self._inside(record.staging_directory)
        there = {str(Path(root, name).relative_to(staging)) for root, _, names in os.walk(staging) for name in names}
        expected = {entry.path for entry in manifest.files}
        wrong = [f"missing: {name}" for name in sorted(expected - there)]
        wrong += [f"unknown: {name}" for name in sorted(there - expected)]
        wrong += self.verify(record.staging_directory, manifest.files, digests=False)
        if wrong:
            raise CorruptCheckpoint(
                f"{staging} is not what the ranks reported: {'; '.join(wrong[:5])}",
                hint="",
                directory=str(staging),
                mismatches=tuple(wrong),
            )
        text = manifest.to_json().encode()
        if len(text) > MAX_MANIFEST_BYTES:
            raise InvalidArgument(
                f"the manifest of {len(manifest.files)} files has {len(text)} bytes, more than {MAX_MANIFEST_BYTES}"
            )
        # What is committed must be readable: nobody could resume from it, and it retires those before it.
        Manifest.from_json(text, where=str(staging / MANIFEST_NAME))
        durable.write_new(staging / MANIFEST_NAME, text, mode=self.permissions.file_mode)
        durable.sync_directories(staging)
        durable.sync_directory(staging.parent)
        return Digest(text).text

    def publish(self, record: CheckpointRecord, replaces: CheckpointRecord | None) -> None:
        """
        Give a GATHERED checkpoint its final name, never over something that exists; durable on return.

        Idempotent: what a crash left half done is finished. A checkpoint that is overwritten is swapped
        out in one step where the file system can, and stands at its retired name afterwards, unharmed,
        until the new one is COMMITTED.

        Raises:
            UnsafePath: The final name is taken by something else.
        """
        staging, final = self._inside(record.staging_directory), self._inside(record.directory)
        at_final = self._attempt_at(record.directory)
        if replaces is not None and at_final is None and os.path.lexists(final) and not final.is_symlink():
            # The journal knows whose name this is, but nothing says that this is it: not ours to swap out and delete.
            self.quarantine(record.directory, record)
        if at_final != record.id:
            if not os.path.lexists(final):
                durable.rename_new(staging, final)
            elif replaces is not None and at_final == replaces.id:
                if not durable.exchange(staging, final):
                    self._move_aside(replaces)
                    durable.sync_directory(final.parent)
                    # Crash here: GATHERED with the old directory set aside; recovery publishes the new one.
                    durable.rename_new(staging, final)
            else:
                raise UnsafePath(
                    f"{final} is taken by something else",
                    hint="move it away and save again",
                    path=record.directory,
                    reason="taken",
                )
        # Crash here: GATHERED with a published directory; recovery commits it.
        if replaces is not None and os.path.lexists(staging):
            # A name that moves twice is synced in between: nobody promises that renames survive in their order.
            durable.sync_directory(final.parent)
            durable.rename_new(staging, self._inside(replaces.retired_directory))
        durable.sync_directory(final.parent)

    def restore(self, record: CheckpointRecord, path: str) -> None:
        """Put a committed checkpoint that an overwrite had set aside at *path* back under its final name."""
        final = self._inside(record.directory)
        durable.rename_new(self._inside(path), final)
        durable.sync_directory(final.parent)

    def retire(self, record: CheckpointRecord) -> None:
        """
        Delete the directory of a checkpoint whose row says that it is being retired (rule D1). Idempotent.

        The final name goes first, so no published name ever holds half a checkpoint. A directory at the
        final name that is not this attempt's is left alone; one whose manifest has rotted, so that nobody can
        tell, is set aside, or its step could never be saved again.

        Raises:
            OSError: The disk refused, or cannot say right now what stands at the final name.
        """
        retired = self._inside(record.retired_directory)
        if not os.path.lexists(retired):
            if self._attempt_at(record.directory) == record.id:
                self._move_aside(record)
                # Crash here: the row says retiring, the directory has its retired name; recovery removes it.
            else:
                self._set_aside_if_rotten(record)
        self._remove(retired)

    def _set_aside_if_rotten(self, record: CheckpointRecord) -> None:
        try:
            self.read_manifest(record.directory)
        except CorruptCheckpoint as error:
            log.warning("%s is retired and set aside, not deleted: %s", record.directory, error.message)
            self.quarantine(record.directory, record)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise

    def _move_aside(self, record: CheckpointRecord) -> None:
        """
        Rename a checkpoint from its final to its retired name.

        A manager that was stopped after it had looked may be late: where locks do not hold, another one
        may have committed under this final name since. So it is looked at again under the new name, which is
        this attempt's alone, before anything is deleted.
        """
        durable.rename_new(self._inside(record.directory), self._inside(record.retired_directory))
        if self._attempt_at(record.retired_directory) != record.id:
            # Crash here: a live checkpoint stands at the retired name of another; recovery puts it back.
            durable.rename_new(self._inside(record.retired_directory), self._inside(record.directory))
            durable.sync_directory(self._inside(record.directory).parent)
            raise UnsafePath(
                f"{record.directory} holds another checkpoint than attempt {record.id} by now",
                hint="another manager has taken the run over; end this one",
                path=record.directory,
                reason="taken",
            )

    def remove(self, path: str) -> None:
        """
        Remove a staging or retired directory, durably.

        Raises:
            UnsafePath: *path* is not a name ckptmgr gives to such directories.
        """
        match = _WORKING.match(path.rpartition("/")[2])
        if match is None or match[4] == "quarantined":
            raise UnsafePath(f"refusing to remove {path!r}", path=path, reason="not a staging or retired directory")
        self._remove(self._inside(path))

    def quarantine(self, path: str, record: CheckpointRecord) -> str:
        """Set a directory aside for inspection under a name nobody resumes from; returns the new path."""
        stem = record.staging_directory.removesuffix(".incomplete") + ".quarantined"
        # An attempt may need more than one: its final and its staging directory, or another one's again.
        target = next(name for n in itertools.count(1) if not self.exists(name := stem if n == 1 else f"{stem}.{n}"))
        durable.rename_new(self._inside(path), self._inside(target))
        durable.sync_directory(self._inside(target).parent)
        return target

    # -- projections of the journal -------------------------------------------------------------

    def write_meta(self, run_id: str, live: Sequence[CheckpointRecord], series: Iterable[str]) -> None:
        """
        Project the journal into ``meta.json``: one ``<series>_list`` per series, oldest first. Atomic, durable.

        Only called after COMMITTED and at start; deleting the file loses nothing.
        """
        found: dict[str, list[str]] = {name: [] for name in series}
        for record in sorted(live, key=operator.attrgetter("commit_seq")):
            found.setdefault(record.series, []).append(record.directory)
        body = {"run_id": run_id, **{f"{name}_list": directories for name, directories in found.items()}}
        # A line for each: `indent` would write the same by Python's slow encoder.
        text = (json.dumps(body, separators=(",\n", ": ")) + "\n").encode()
        try:
            is_current = reach.read(self.path / META_NAME, MAX_META_BYTES) == text
        except (OSError, CorruptCheckpoint):
            is_current = False
        if not is_current:
            self._replace(META_NAME, text, scratch=f".{META_NAME}.new")

    def read_meta(self) -> Mapping[str, Any] | None:
        """What ``meta.json`` says, or None if it is missing or unreadable. Nothing is decided by it."""
        try:
            body = json.loads(reach.read(self.path / META_NAME, MAX_META_BYTES))
        except (OSError, ValueError, RecursionError, CorruptCheckpoint):
            return None
        return body if isinstance(body, dict) else None

    def point_latest(self, series: str, record: CheckpointRecord | None) -> None:
        """
        Let ``<series>/hf-latest`` name the newest committed export, swapped atomically; None removes it.

        Where the directory of the series is gone there is nothing to name.
        """
        link = self._inside(f"{series}/{LATEST_NAME}")
        if not os.path.lexists(link.parent):
            return
        if os.path.lexists(link) and not link.is_symlink():
            raise UnsafePath(f"{link} is not a link", path=str(link), reason="not ours")
        current = str(link.readlink()) if link.is_symlink() else None
        target = record.directory.rpartition("/")[2] if record is not None else None
        if target is None and current is not None:
            durable.remove_file(link)
        elif target is not None and target != current:
            with _taken_is_unsafe(link):
                durable.replace_link(link, target, scratch=_LATEST_SCRATCH)

    def stale_projections(self, run_id: str, live: Mapping[str, Sequence[str]]) -> list[str]:
        """
        What ``meta.json`` and the latest links say that the journal does not, in words, each naming the file.

        One that is missing says nothing wrong.

        Args:
            run_id: Of the journal.
            live: Of each series the directories of its live checkpoints, in the order in which they were committed.
        """
        lists = {f"{name}_list": [*directories] for name, directories in live.items()}
        said = self.read_meta()
        wrong = []
        if said is None:
            wrong += [f"{META_NAME} cannot be read"] if self.exists(META_NAME) else []
        elif {name: value for name, value in said.items() if value} != {"run_id": run_id, **lists}:
            wrong.append(f"{META_NAME} does not list what is committed")
        for name, directories in live.items():
            newest = directories[-1].rpartition("/")[2]
            if not newest.startswith("hf-"):
                continue
            link = self._inside(f"{name}/{LATEST_NAME}")
            target = str(link.readlink()) if link.is_symlink() else None
            if os.path.lexists(link) and target != newest:
                wrong.append(f"{name}/{LATEST_NAME} is {'no link' if target is None else target}, not {newest}")
        return wrong

    # -- inside ---------------------------------------------------------------------------------

    def _replace(self, name: str, data: bytes, *, scratch: str) -> None:
        with _taken_is_unsafe(self.path / name):
            durable.replace_file(self.path / name, data, scratch=scratch, mode=self.permissions.file_mode)

    def _refuse_what_was_planted(self) -> None:
        """Refuse to write into what somebody else may have put where a run of ours is to begin."""
        for path in (self.path, self.lock_path, self.journal_path, Path(f"{self.journal_path}-journal")):
            try:
                found, around = path.lstat(), path.parent.stat()
            except FileNotFoundError:
                continue
            if path == self.lock_path and (not stat.S_ISREG(found.st_mode) or found.st_nlink != 1):
                what = f"has {found.st_nlink} names" if stat.S_ISREG(found.st_mode) else "is a link or no file"
                hint = "remove it; ckptmgr makes a plain file of its own there"
                raise UnsafePath(f"the run lock {path} {what}", hint=hint, path=str(path), reason=what)
            # As Linux with fs.protected_regular=2, whatever it is set to.
            shared = around.st_mode & stat.S_ISVTX and around.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if shared and found.st_uid not in (os.geteuid(), around.st_uid, 0):
                what = f"belongs to user {found.st_uid}, in a directory where others may make files"
                hint = "keep runs in a directory of your own, or remove what is not yours"
                raise UnsafePath(f"{path} {what}", hint=hint, path=str(path), reason="another user's")

    def _remove(self, path: Path) -> None:
        if os.path.lexists(path):
            # A process that died may have renamed it to this name and not synced that: a power cut during
            # the removal must not bring half of it back under its final name.
            durable.sync_directory(path.parent)
        if path.parent.is_dir():
            durable.remove_tree(path)

    def _attempt_at(self, path: str) -> int | None:
        try:
            manifest, _ = self.read_manifest(path)
        except (OSError, CorruptCheckpoint):
            return None
        return manifest.attempt if manifest.run_id == self.run_id() else None

    def _inside(self, path: str) -> Path:
        if not is_plain_relative(path):
            raise UnsafePath(f"{path!r} leaves the run directory", path=path, reason="not a plain relative path")
        here = self.path
        for part in ("", *path.split("/")[:-1]):
            here = here / part
            if here.is_symlink():
                raise UnsafePath(f"{here} is a link", hint=_NO_LINK, path=path, reason="links are not followed")
        return self.path / path


def _parents(name: str) -> Iterator[str]:
    while name := name.rpartition("/")[0]:
        yield name


def _resolved(path: Path) -> Path:
    """*path* with its links resolved, as far as it exists."""
    try:
        resolved = path.resolve()
        os.fsencode(resolved)
        resolved.is_dir()
    except (RuntimeError, ValueError) as error:  # links that lead round in a circle; a NUL
        raise InvalidArgument(f"{str(path)!r} cannot be a path: {error}") from error
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise InvalidArgument(f"{str(path)!r} cannot be a path: {error.strerror}") from error
    return resolved


def _entries(directory: Path, besides: Collection[str] = ()) -> list[tuple[str, int]]:
    """
    The names in *directory* in order, each with its type as in ``st_mode``; none if it is missing.

    Without those of *besides*, which start with the directory's own name.
    """
    found = []
    count = 0
    prefix = f"{directory.name}/"
    try:
        with reach.directory(directory) as folder:
            readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
        try:
            with os.scandir(readable) as entries:
                for entry in itertools.islice(entries, MAX_ENTRIES + 1):
                    count += 1
                    if prefix + entry.name in besides:
                        continue
                    is_directory = entry.is_dir(follow_symlinks=False)
                    kind = stat.S_IFDIR if is_directory else stat.S_IFLNK if entry.is_symlink() else 0
                    found.append((entry.name, kind))
        finally:
            os.close(readable)
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        text = f"{directory} is a link or a file, not a directory"
        raise UnsafePath(text, hint=_NO_LINK, path=str(directory), reason="not a directory") from error
    if count > MAX_ENTRIES:
        hint = "move away what is not of ckptmgr"
        text = f"{directory} has more than {MAX_ENTRIES} names"
        raise UnsafePath(text, hint=hint, path=str(directory), reason="too many names")
    return sorted(found)


@contextlib.contextmanager
def _taken_is_unsafe(path: Path) -> Iterator[None]:
    """Say what is meant when something else stands where *path*, or its next version, is to be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        hint = "move away what stands there, or at the hidden name of its next version"
        raise UnsafePath(f"{path} cannot be replaced: {error}", hint=hint, path=str(path), reason=str(error)) from error


def _written(descriptor: int) -> int:
    """Bytes of a file that hold data: neither holes nor space that is only reserved."""
    written = end = 0
    # A file in more pieces is somebody else's.
    for _ in range(_MOST_PIECES):
        try:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data after this
                return written
            raise
        written += end - begin
    return written


def _digest_of(descriptor: int, size: int, progress: Callable[[int], None] | None, *, from_disk: bool) -> str:
    digest = Digest()
    if from_disk:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    for block in _blocks(descriptor, size):
        digest.update(block)
        if progress is not None:
            progress(len(block))
    if from_disk:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.text


def _blocks(descriptor: int, size: int) -> Iterator[memoryview]:
    """All that can be read of a file of about *size* bytes; of a large one a little ahead, by a thread of its own."""
    buffers = [
        memoryview(bytearray(min(_BLOCK_BYTES, size + 1))) for _ in range(1 + _READ_AHEAD * (size > _BLOCK_BYTES))
    ]
    if len(buffers) == 1:
        while count := os.readv(descriptor, buffers):
            yield buffers[0][:count]
        return
    with ThreadPoolExecutor(1, thread_name_prefix="ckptmgr-read") as reader:
        ahead = collections.deque((buffer, reader.submit(os.readv, descriptor, [buffer])) for buffer in buffers)
        while count := ahead[0][1].result():
            buffer, _ = ahead.popleft()
            yield buffer[:count]
            ahead.append((buffer, reader.submit(os.readv, descriptor, [buffer])))
