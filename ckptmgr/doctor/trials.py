"""
The child that touches the storage: ``python -m ckptmgr.doctor.trials try DIRECTORY ROLES SECONDS JOURNAL``.

It prints one JSON object a line: what it does next, and what it saw. Its output going nowhere, or SIGTERM,
makes it remove what it has made and end. For what takes two it forks a second process, which it kills in
the middle of a transaction. It follows no link below the directory it is given, and changes nothing but
what is in the directory it makes there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import select
import signal
import socket
import stat
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ckptmgr import durable
from ckptmgr.doctor import mount_of, mounts, read_kernel
from ckptmgr.errors import CheckpointError, InvalidArgument, RunLocked
from ckptmgr.filesystems import Mount, mount_over
from ckptmgr.journal import trial as sqlite
from ckptmgr.rundir import RUN_ID_NAME, RunDirectory
from ckptmgr.storage import Outcome, Role, Trial

#: The part of a step that may be spent on waiting for the second process.
_PATIENCE = 0.7
_POLL_S = 0.05
_NAME = re.compile(r"\.ckptmgr-doctor\.([A-Za-z0-9-]{1,32})\.([1-9][0-9]{0,9})\.[0-9a-f]{8}\Z")
#: Lengths of names (bytes) to try: what Linux allows, what eCryptfs leaves of it, what ckptmgr needs.
_LONGEST_NAMES = (255, 143, 128)
#: How often fsync is timed, at most, and seconds after which no further round begins.
_ROUNDS = 5
_ROUNDS_S = 1.0
_SYNCED_BYTES = 1 << 16
#: SQLite opens no path with this many bytes (MAX_PATHNAME in its os_unix.c).
_SQLITE_PATH = 512
_WORKS = Trial(Outcome.WORKS)


def main() -> None:
    """Try a directory, or remove what another child left; ``sys.argv`` says which and where."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    try:
        match sys.argv[1:]:
            case ["try", directory, holds, timeout_s, file]:
                _Trials([Role(role) for role in holds.split(",")], float(timeout_s)).run(directory, file)
            case ["remove", scratch]:
                _say(at="removing what was made")
                _say(left=_remove(Path(scratch)))
    except InvalidArgument as error:
        _say(refused=error.message, hint=error.hint)


def _leave(number: int, frame: object) -> NoReturn:
    del number, frame
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: what follows is the removing
    raise SystemExit(0)


def _say(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _remove(scratch: Path) -> str | None:
    """Remove a doctor's directory; returns it if that failed. That it is gone need not survive a power cut."""
    if _NAME.match(scratch.name):
        with contextlib.suppress(OSError):
            durable.remove_tree(scratch)
    return str(scratch) if os.path.lexists(scratch) else None


class _Wrong(Exception):
    """A call succeeded and did something else than it must."""


class _Silent(Exception):
    """The second process gave no answer."""


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Wrong(otherwise)


class _Trials:
    """What is tried in one directory, each in a method that has the name of its row in `storage.TRIALS`."""

    def __init__(self, holds: Sequence[Role], timeout_s: float) -> None:
        self._holds = holds
        self._patience_s = _PATIENCE * timeout_s
        self._second: _Second
        self._at: Path

    def run(self, directory: str, file: str) -> None:
        """Do all of it, and say what was seen."""
        _say(at="looking at the directory")
        path = self._look(directory, file)
        if path is None:
            return
        self._at = path / f".ckptmgr-doctor.{_host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        _say(scratch=str(self._at))
        left: str | None = str(self._at)
        try:
            if self._try("enter", "creating a directory"):
                self._second = _Second(self._patience_s)
                self._all()
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with contextlib.suppress(BrokenPipeError):
                _say(at="removing what was made")
            left = _remove(self._at)
            with contextlib.suppress(BrokenPipeError):
                _say(left=left)

    def _all(self) -> None:
        of_runs = Role.RUN in self._holds
        self._try("create", "creating files")
        if of_runs:
            self._try("share", "writing into one file from two processes")
            self._try("reserve", "reserving space")
            self._try("replace", "renaming over a file")
            self._try("keep", "renaming without replacing")
            self._try("exchange", "swapping two names")
            self._try("move", "renaming a directory")
        self._try("sync_file", "fsync of a file")
        self._try("sync_directory", "fsync of a directory")
        if of_runs:
            self._try("names", "long names, upper and lower case")
            self._try("links", "symbolic links")
            self._try("clock", "times of files")
        self._try("owner", "owner and permissions")
        if Role.JOURNAL in self._holds:
            self._locks()

    def _try(self, name: str, words: str, trial: Callable[[], Trial] | None = None) -> bool:
        """Make one trial and say what it saw; returns whether it went well."""
        _say(at=words)
        seen = _seen(trial or getattr(self, name))
        _say(trial=name, **dataclasses.asdict(seen))
        return seen.outcome is Outcome.WORKS

    # -- looking ------------------------------------------------------------------------------------

    def _look(self, directory: str, file: str) -> Path | None:
        """Say what can be seen without changing anything; returns where to make trials, or None if that cannot be."""
        path, missing, refused = _nearest(directory)
        numbers: dict[str, float] = {}
        leftovers: list[dict[str, Any]] = []
        if file and os.path.isdir(file):  # noqa: PTH112
            raise InvalidArgument(f"{file} is a directory", hint="name the journal's file, which need not exist")
        journal_in = None
        mount = mount_of(path) or mount_over(mounts().values(), str(path))
        if refused is None:
            try:
                numbers, leftovers = _numbers(path, mount), _leftovers(path)
            except OSError as error:
                refused = error
        is_run = len(self._holds) > 1 and not missing and os.path.lexists(path / RUN_ID_NAME)
        if is_run and mount_of(path.parent) != mount:
            # A run's journal stands beside it: elsewhere, if the run directory is a mount of its own.
            self._holds, journal_in = [Role.RUN], str(path.parent)
        place = {
            "asked": directory,
            "path": str(path),
            "missing": missing,
            "holds": self._holds,
            "mount": dataclasses.asdict(mount) if mount is not None else None,
            "numbers": numbers,
            "leftovers": leftovers,
        }
        _say(place=place, journal_in=journal_in)
        if refused is None:
            return path
        _say(trial="enter", **dataclasses.asdict(_refusal(refused)))
        _say(left=None)
        return None

    # -- trials -------------------------------------------------------------------------------------

    def enter(self) -> Trial:
        """A directory for all that follows, which no other user can reach into."""
        try:
            durable.make_directory(self._at, mode=0o700)
        except OSError:
            if not os.path.lexists(self._at):  # else it is made, and syncing its parent has a trial of its own
                raise
        return _WORKS

    def create(self) -> Trial:
        """Nobody can create what exists, whoever made it."""
        mine, theirs = self._at / "create-1", self._at / "create-2"
        _must(_create(mine), "a name that nobody had used was refused")
        _must(not _create(mine), "by one process, which was told nothing")
        _must(not self._second.ask("create", mine), "by two processes, one after the other")
        _must(self._second.ask("create", theirs), "a name that nobody had used was refused")
        _must(not _create(theirs), "by two processes, one after the other")
        return _WORKS

    def share(self) -> Trial:
        """Two processes write into one file, in place, and both read the whole."""
        path, block = self._at / "share", 4096
        with _unsynced(durable.new_file(path)) as descriptor:
            durable.write_at(descriptor, memoryview(b"a" * block), 0)
        self._second.ask("write", path, "b" * block, block)
        with _unsynced(durable.shared_file(path)) as descriptor:
            durable.write_at(descriptor, memoryview(b"c" * 100), block - 50)
        expected = "a" * (block - 50) + "c" * 100 + "b" * (block - 50)
        _must(_text(path) == expected, "by the process that wrote last")
        _must(self._second.ask("text", path) == expected, "by the process that wrote first")
        return _WORKS

    def reserve(self) -> Trial:
        """Space for a file, before anything is written."""
        path, size = self._at / "reserve", 1 << 20
        with _unsynced(durable.new_file(path)) as descriptor:
            reserved = durable.set_size(descriptor, size)
        found = path.stat().st_size
        _must(found == size, f"a file that was given {size} bytes has {found}")
        return _WORKS if reserved else Trial(Outcome.FALLBACK)

    def replace(self) -> Trial:
        """One file takes the name of another."""
        old, new = self._at / "replace", self._at / "replace.new"
        self._file(old, "old")
        self._file(new, "new")
        durable.rename_over(new, old)
        _must(_text(old) == "new", "the old one is still read")
        _must(self._second.ask("text", old) == "new", "another process still reads the old one")
        _must(not os.path.lexists(new), "it still has its old name, too")
        return _WORKS

    def keep(self) -> Trial:
        """A directory never takes a name that is taken, even by an empty directory, which rename(2) would replace."""
        one, other = self._directory("keep-1", "x"), self._directory("keep-2")
        try:
            durable.rename_new(one, other)
        except FileExistsError:
            pass
        else:
            raise _Wrong("it replaced an empty directory")
        _must(_text(one / "x") == "x", "what was refused its new name has changed")
        in_one_step = durable.rename_new(one, self._at / "keep-3")
        _must(_text(self._at / "keep-3" / "x") == "x", "what it renamed has changed")
        return _WORKS if in_one_step else Trial(Outcome.FALLBACK)

    def exchange(self) -> Trial:
        """Two directories change places."""
        one, other = self._directory("exchange-1", "one"), self._directory("exchange-2", "other")
        if not durable.exchange(one, other):
            return Trial(Outcome.FALLBACK)
        _must((one / "other").exists() and (other / "one").exists(), "the directories are where they were")
        seen = self._second.ask("names", one), self._second.ask("names", other)
        _must(seen == (["other"], ["one"]), "another process sees them where they were")
        return _WORKS

    def move(self) -> Trial:
        """A directory with files and a directory in it gets another name, as a checkpoint does when it is published."""
        old, new = self._directory("move", "x"), self._at / "moved"
        self._directory("move/below", "y")
        durable.rename_new(old, new)
        _must(_text(new / "x") == "x" and _text(new / "below" / "y") == "y", "files in it are missing")
        _must(not os.path.lexists(old), "it still has its old name, too")
        _must(self._second.ask("names", new) == ["below", "x"], "another process misses files in it")
        _must("move" not in self._second.ask("names", self._at), "another process still sees the old name")
        return _WORKS

    def sync_file(self) -> Trial:
        """Bytes that are written over and over, with an fsync each time."""
        path, data = self._at / "sync", b""
        self._file(path, "")

        def dirty(number: int) -> None:
            nonlocal data
            data = bytes([number]) * _SYNCED_BYTES
            durable.overwrite(path, data)

        numbers = _timed(dirty, lambda: durable.sync_file(path))
        _must(path.read_bytes() == data, "not those that were written")
        return Trial(Outcome.WORKS, numbers=numbers)

    def sync_directory(self) -> Trial:
        """Names that are added one after the other, with an fsync of their directory each time."""
        at = self._directory("sync-names")
        numbers = _timed(lambda number: self._file(at / str(number), ""), lambda: durable.sync_directory(at))
        return Trial(Outcome.WORKS, numbers=numbers)

    def names(self) -> Trial:
        """Long names, and names that differ in case alone."""
        _must(_create(self._at / "case") and _create(self._at / "CASE"), "")
        for length in _LONGEST_NAMES:
            try:
                _create(self._at / ("n" * length))
            except OSError as error:
                if error.errno not in (errno.ENAMETOOLONG, errno.EINVAL) or length == _LONGEST_NAMES[-1]:
                    raise
            else:
                break
        return _WORKS if length == _LONGEST_NAMES[0] else Trial(Outcome.FALLBACK, f"{length}")

    def links(self) -> Trial:
        """A link like hf-latest, made and then pointed elsewhere."""
        link = self._at / "hf-latest"
        for target in ("hf-1", "hf-2"):
            try:
                durable.replace_link(link, target, scratch=".hf-latest.new")
            except OSError:
                if not link.is_symlink():
                    raise
            found = str(link.readlink())
            _must(found == target, f"to {found}, not to {target}")
        return _WORKS

    def owner(self) -> Trial:
        """To whom belongs what is made here, and who may do what with it."""
        umask = os.umask(0)
        os.umask(umask)
        self._file(self._at / "owner", "x")
        file, directory = (self._at / "owner").stat(), self._directory("owners").stat()
        return Trial(
            Outcome.WORKS,
            numbers={
                "umask": umask,
                "user": os.geteuid(),
                "owner": file.st_uid,
                "group": file.st_gid,
                "file_mode": stat.S_IMODE(file.st_mode),
                "directory_mode": stat.S_IMODE(directory.st_mode) & 0o777,
                "setgid": int(bool(directory.st_mode & stat.S_ISGID)),
            },
        )

    def clock(self) -> Trial:
        """The time of a file that was written just now."""
        path = self._at / "clock"
        self._file(path, "x")
        return Trial(Outcome.WORKS, numbers={"ahead_s": path.stat().st_mtime - time.time()})

    # -- locks --------------------------------------------------------------------------------------

    def _locks(self) -> None:
        """Let the second process hold each lock, want it here, kill the second, and have it here."""
        run, file, journal = RunDirectory(self._at / "run"), self._at / "fcntl", self._at / "run.journal.db"

        def want_flock() -> Trial:
            self._second.ask("take_flock", run.path)
            with contextlib.suppress(RunLocked):
                run.acquire("ckptmgr doctor")
                run.release()
                raise _Wrong("two processes have it at once")
            return _WORKS

        def have_flock() -> Trial:
            try:
                run.acquire("ckptmgr doctor", timeout_s=self._patience_s)
            except RunLocked:
                raise _Wrong(self._not_freed) from None
            run.release()
            return _WORKS

        def want_fcntl() -> Trial:
            self._file(file, "")
            self._second.ask("take_fcntl", file)
            _must(not _is_free(file), "two processes have one at once")
            return _WORKS

        def have_fcntl() -> Trial:
            until = time.monotonic() + self._patience_s
            while not _is_free(file):
                _must(time.monotonic() < until, self._not_freed)
                time.sleep(_POLL_S)
            return _WORKS

        def want_journal() -> Trial:
            if len(os.fsencode(journal)) + len("-journal") >= _SQLITE_PATH:
                text = f"a journal's path here is close to the {_SQLITE_PATH} bytes that SQLite can open, or over them"
                raise OSError(errno.ENAMETOOLONG, text)
            self._file(journal, "")
            sqlite.create(journal)
            self._second.ask("begin", journal)
            _must(sqlite.is_busy(journal), "two processes write at once")
            self._second.ask("spill", journal)
            return _WORKS

        def have_journal() -> Trial:
            rows = sqlite.take_over(journal, self._patience_s)
            _must(bool(rows), self._not_freed)
            _must("killed" not in rows, "what a killed process had not committed is there")
            _must(rows == ["first", "second"], f"of two committed rows there are {len(rows)}")
            return _WORKS

        locks = {
            "flock": ("the run lock", want_flock, have_flock),
            "fcntl": ("a fcntl lock", want_fcntl, have_fcntl),
            "journal": ("a SQLite journal", want_journal, have_journal),
        }
        held = {}
        for name, (words, want, _) in locks.items():
            _say(at=f"wanting {words} that another process has")
            held[name] = _seen(want)
        _say(at="killing the process that has the locks")
        killed = _seen(self._second.kill)
        for name, (words, _, have) in locks.items():
            before = next((one for one in (held[name], killed) if one.outcome is not Outcome.WORKS), None)
            self._try(name, f"taking {words} of a killed process", have if before is None else partial(_same, before))

    @property
    def _not_freed(self) -> str:
        return f"still taken {self._patience_s:.3g} s after its holder was killed"

    # -- inside -------------------------------------------------------------------------------------

    def _file(self, path: Path, text: str) -> None:
        with _unsynced(durable.new_file(path)) as descriptor:
            durable.write_at(descriptor, memoryview(text.encode()), 0)

    def _directory(self, name: str, file: str | None = None) -> Path:
        """A new directory, with a file in it that holds its own name."""
        path = self._at / name
        try:
            durable.make_directory(path)
        except OSError:
            if not path.is_dir():  # else what failed is the sync of the directory above, see `sync_directory`
                raise
        if file is not None:
            self._file(path / file, file)
        return path


class _Second:
    """
    A second process, forked from the child, that does what it is asked to and keeps what it takes.

    Every question is given up after *patience_s* seconds, and then all later ones at once.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._silent = ""
        questions, asking = os.pipe()
        answering, answers = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                nowhere = os.open(os.devnull, os.O_RDWR)
                for descriptor in (1, 2):
                    os.dup2(nowhere, descriptor)  # the child's end must be seen when the child ends
                os.close(asking)
                os.close(answering)
                self._serve(questions, answers)
            finally:
                os._exit(0)
        os.close(questions)
        os.close(answers)
        self._ask, self._answers = os.fdopen(asking, "w"), answering
        self._unread = b""

    def ask(self, action: str, *arguments: Path | str | int) -> Any:
        """
        The answer to a question.

        Raises:
            _Silent: There is none in time.
            OSError: What it was asked to do failed with that.
        """
        if not self._silent:
            try:
                self._ask.write(
                    json.dumps([action, *(str(one) if isinstance(one, Path) else one for one in arguments)])
                )
                self._ask.write("\n")
                self._ask.flush()
                answer = json.loads(self._line())
            except (BrokenPipeError, EOFError):
                self._silent = "it has ended"
            except TimeoutError:
                self._silent = f"for {self._patience_s:.3g} s"
        if self._silent:
            raise _Silent(self._silent)
        if "refused" in answer:
            raise _Refused(**answer["refused"])
        return answer["value"]

    def kill(self) -> Trial:
        """
        Kill it, as a crash does.

        Raises:
            _Silent: It does not end.
        """
        os.kill(self._pid, signal.SIGKILL)
        until = time.monotonic() + self._patience_s
        while os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > until:
                raise _Silent(f"it was killed, and has not ended for {self._patience_s:.3g} s")
            time.sleep(_POLL_S)
        self._silent = "it was killed"
        return _WORKS

    def _line(self) -> bytes:
        until = time.monotonic() + self._patience_s
        while b"\n" not in self._unread:
            if not select.select([self._answers], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError
            if not (piece := os.read(self._answers, 1 << 16)):
                raise EOFError
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    @staticmethod
    def _serve(questions: int, answers: int) -> None:
        kept = _Kept()
        with os.fdopen(questions) as asked, os.fdopen(answers, "w") as answering:
            for line in asked:
                action, *arguments = json.loads(line)
                try:
                    answer = {"value": getattr(kept, action)(*arguments)}
                except (OSError, CheckpointError) as refused:
                    answer = {"refused": dict(zip(("detail", "error"), _words(refused), strict=True))}
                answering.write(json.dumps(answer) + "\n")
                answering.flush()


class _Kept:
    """What the second process can be asked for, and what it has taken."""

    def __init__(self) -> None:
        self._run: RunDirectory
        self._files = contextlib.ExitStack()
        self._transaction: Any

    def create(self, path: str) -> bool:
        return _create(Path(path))

    def text(self, path: str) -> str:
        return _text(Path(path))

    def names(self, path: str) -> list[str]:
        return sorted(os.listdir(path))  # noqa: PTH208

    def write(self, path: str, text: str, offset: int) -> None:
        with _unsynced(durable.shared_file(Path(path))) as descriptor:
            durable.write_at(descriptor, memoryview(text.encode()), offset)

    def take_flock(self, run: str) -> None:
        self._run = RunDirectory(run)
        self._run.acquire("ckptmgr doctor")

    def take_fcntl(self, path: str) -> None:
        fcntl.lockf(self._files.enter_context(durable.shared_file(Path(path))), fcntl.LOCK_EX | fcntl.LOCK_NB)

    def begin(self, journal: str) -> None:
        self._transaction = sqlite.hold(Path(journal))

    def spill(self, journal: str) -> None:
        sqlite.spill(Path(journal), self._transaction)


class _Refused(OSError):
    """What the second process was refused, in the words it was told."""

    def __init__(self, detail: str, error: str) -> None:
        super().__init__(getattr(errno, error, 0), detail)


def _seen(trial: Callable[[], Trial]) -> Trial:
    try:
        return trial()
    except _Wrong as wrong:
        return Trial(Outcome.WRONG, str(wrong))
    except _Silent as silent:
        return Trial(Outcome.SILENT, str(silent))
    except (OSError, CheckpointError) as refused:
        return _refusal(refused)


def _same(trial: Trial) -> Trial:
    return trial


def _refusal(error: Exception) -> Trial:
    detail, name = _words(error)
    return Trial(Outcome.REFUSED, detail, name)


def _words(error: BaseException) -> tuple[str, str]:
    """What an error says, and the name of the system's error below it, if there is one."""
    if isinstance(error, OSError) and not isinstance(error, CheckpointError):
        return error.strerror or str(error), errno.errorcode.get(error.errno or 0, "")
    cause, name = error.__cause__, ""
    if getattr(cause, "sqlite_errorname", "") == "SQLITE_FULL":
        name = "ENOSPC"
    elif isinstance(cause, OSError):
        return _words(cause)
    return getattr(error, "message", str(error)), name


@contextlib.contextmanager
def _unsynced(opened: AbstractContextManager[int]) -> Iterator[int]:
    """A file of `durable`, without its last word: whether it could be synced is what `sync_file` asks."""
    written = False
    try:
        with opened as descriptor:
            yield descriptor
            written = True
    except OSError:
        if not written:
            raise


def _create(path: Path) -> bool:
    """Whether *path* could be created; False if it was there."""
    try:
        with _unsynced(durable.new_file(path)):
            pass
    except FileExistsError:
        return False
    return True


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _is_free(path: Path) -> bool:
    """Whether a lock on *path* can be had; it is given back at once."""
    free = True
    with _unsynced(durable.shared_file(path)) as descriptor:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, says POSIX
            free = False
    return free


def _timed(dirty: Callable[[int], None], sync: Callable[[], None]) -> dict[str, float]:
    """The median of some rounds of *sync*, each after *dirty*; fewer where one takes long."""
    took: list[float] = []
    while len(took) < _ROUNDS and sum(took) < _ROUNDS_S:
        dirty(len(took))
        began = time.perf_counter()
        sync()
        took.append(time.perf_counter() - began)
    return {"seconds": statistics.median(took), "rounds": len(took)}


def _nearest(directory: str) -> tuple[Path, int, OSError | None]:
    """
    Where *directory* is, without links: itself or its nearest parent that exists, and how many are missing.

    The third is the error if that cannot be told: no permission, or storage that is out of order.

    Raises:
        InvalidArgument: It can never be a directory.
    """
    path, missing = Path(os.path.realpath(directory)), 0
    while True:
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            path, missing = path.parent, missing + 1
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                raise InvalidArgument(f"{directory} cannot be used: {error.strerror}") from error
            return path, missing, error
        else:
            if not stat.S_ISDIR(mode):
                hint = "give a run directory, or the directory where one would go; --journal names a journal"
                raise InvalidArgument(f"{path} is not a directory", hint=hint)
            return path, missing, None


def _numbers(path: Path, mount: Mount | None) -> dict[str, float]:
    """Facts about the whole: free space and inodes, the directory's own mode, and whether a disk turns."""
    numbers: dict[str, float] = {"mode": stat.S_IMODE(path.stat().st_mode)}
    space = os.statvfs(path)
    numbers |= {"free_bytes": space.f_bavail * space.f_frsize}
    if space.f_files:
        numbers["free_inodes"] = space.f_favail
    for queue in ("queue", "../queue"):  # of a disk, of a partition
        with contextlib.suppress(OSError, ValueError):
            if mount is not None:
                numbers["rotating"] = int(read_kernel(f"/sys/dev/block/{mount.device}/{queue}/rotational"))
    return numbers


def _leftovers(path: Path) -> list[dict[str, Any]]:
    """The directories of other doctors in *path*."""
    host = _host()
    found = []
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if (match := _NAME.match(entry.name)) is not None:
                running = _is_running(int(match[2])) if match[1] == host else None
                found.append({"name": entry.name, "running": running})
    return sorted(found, key=lambda one: str(one["name"]))


def _is_running(pid: int) -> bool | None:
    """Whether process *pid* of this host makes trials; None if that is hidden."""
    try:
        return __spec__.name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()  # a zombie has no words
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return None
    return False


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:32] or "host"


if __name__ == "__main__":
    main()
