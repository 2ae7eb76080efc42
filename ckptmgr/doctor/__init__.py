"""
Trying on a directory's own storage what the commit order relies on; `storage` judges what was seen.

Storage may hang, and a process that waits for it cannot always be killed. So the caller's process touches
none of it: a child does (`trials`), which says before each step what comes next, and is given up when it
falls silent. All that is made is in one directory with a name that says whose it is. The child removes
it whatever happens, or another child does if that one had to be killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptmgr.errors import InvalidArgument
from ckptmgr.filesystems import MAGIC, Mount, mount_over, parse_mountinfo
from ckptmgr.rundir import RunDirectory
from ckptmgr.storage import Leftover, Outcome, Place, Role, Trial, word_at_start

#: Seconds that one step may take before the storage counts as stuck.
STEP_S = 10.0
#: What all steps in one place may take together, in units of that.
_STEPS_AT_MOST = 6
#: Seconds for a child to start and import what it needs, which lies on other storage as a rule.
_START_S = 60.0
#: Seconds to wait for the end of a process that was killed; in uninterruptible sleep it does not come.
_REAP_S = 1.0

Progress = Callable[[str], None]


def examine(
    directory: str, journal: str | None = None, *, timeout_s: float = STEP_S, progress: Progress | None = None
) -> list[Place]:
    """
    Try the storage of *directory*, and that of its journal where it is another one.

    Args:
        directory: A run directory, or where one would go; it need not exist.
        journal: The journal's file, if it is not to be beside the run directory; it need not exist.
        timeout_s: Seconds that any single step may take. Nothing is waited for without a limit.
        progress: Told what is being tried.

    Returns:
        What was seen in one place or two, the run's first.

    Raises:
        InvalidArgument: *directory* is no directory, or *journal* is one.
    """
    if not directory or journal == "":
        raise InvalidArgument("an empty path names nothing", hint="give `.` for the current directory")
    here = _lexical(directory)
    if journal is None:
        place, journal_in = _try(here, (Role.RUN, Role.JOURNAL), timeout_s, progress)
        if journal_in is None:
            return [place]
        return [place, _try(journal_in, (Role.JOURNAL,), timeout_s, progress)[0]]
    place, _ = _try(here, (Role.RUN,), timeout_s, progress)
    beside, _ = _try(str(Path(_lexical(journal)).parent), (Role.JOURNAL,), timeout_s, progress, file=_lexical(journal))
    if beside.path and beside.path == place.path:
        both = {**beside.trials, **place.trials}
        return [dataclasses.replace(place, holds=(Role.RUN, Role.JOURNAL), trials=both)]
    return [place, beside]


def words_at_start(rundir: RunDirectory) -> list[str]:
    """
    What a manager has to say of the storage it starts on: a sentence for each mount that needs one.

    Cheap: two small files of /proc and no trial. It raises nothing.
    """
    held: dict[Mount, list[tuple[Role, Path]]] = {}
    for role, path in ((Role.RUN, rundir.path), (Role.JOURNAL, rundir.journal_path.parent)):
        if (mount := mount_of(path)) is not None:
            held.setdefault(mount, []).append((role, path))
    said = []
    for mount, parts in held.items():
        where = str(parts[0][1])
        if (word := word_at_start(Place(where, where, 0, tuple(role for role, _ in parts), mount))) is not None:
            said.append(f"{where} is on {word}")
    return said


def mount_of(path: Path) -> Mount | None:
    """The mount that *path* stands on; None if it does not exist, or neither /proc nor statfs(2) knows."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _by_number(descriptor) or _by_magic(descriptor, path)
    finally:
        os.close(descriptor)


def _by_number(descriptor: int) -> Mount | None:
    try:
        number = re.search(r"^mnt_id:\s*([0-9]+)$", read_kernel(f"/proc/self/fdinfo/{descriptor}"), re.MULTILINE)
    except OSError:
        return None
    return mounts().get(int(number[1])) if number is not None else None


def _by_magic(descriptor: int, path: Path) -> Mount | None:
    # struct statfs begins with f_type, a long wherever PyTorch runs, and is much smaller than this.
    buffer = ctypes.create_string_buffer(512)
    if ctypes.CDLL(None, use_errno=True).fstatfs(descriptor, buffer) != 0:
        return None
    magic = int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder) & 0xFFFFFFFF
    return Mount(MAGIC[magic], "", str(path)) if magic in MAGIC else None


def mounts() -> dict[int, Mount]:
    """What is mounted where, by the number of the mount; nothing if /proc is not there."""
    try:
        return parse_mountinfo(read_kernel("/proc/self/mountinfo"))
    except OSError:
        return {}


def read_kernel(path: str) -> str:
    """The text of a small file that the kernel makes up, names in it as Python spells paths."""
    return Path(path).read_text(encoding="utf-8", errors="surrogateescape")


def _lexical(path: str) -> str:
    # Links are for the child to look at, since that touches the storage.
    return str(Path(path) if path.startswith("/") else Path.cwd() / path)


def _try(
    directory: str, holds: Sequence[Role], timeout_s: float, progress: Progress | None, *, file: str = ""
) -> tuple[Place, str | None]:
    """Have a child try *directory*. The second is where its journal stands, if that is another mount."""
    told = _Account(directory, holds, progress)
    child = _Child(["try", directory, ",".join(holds), repr(timeout_s), file])
    left = None
    try:
        message = child.next(_START_S)
        until = time.monotonic() + _STEPS_AT_MOST * timeout_s
        while message is not None:
            told.take(message)
            if time.monotonic() > until:
                raise _Stuck(f"all of it takes more than {_STEPS_AT_MOST * timeout_s:g} s")
            message = child.next(timeout_s)
        if not told.done:
            status = child.status()
            if status is not None and status >= 0:
                raise RuntimeError(f"the process that tries the storage ended with {status}: {child.noise}")
            raise _Stuck("the process was killed" if status is not None else "the process does not end")
    except _Stuck as stuck:
        left = child.kill(told.scratch, timeout_s)
        told.facts |= {"stuck_at": told.at, "stuck_because": str(stuck), "left_behind": left}
    except BaseException:
        # Ctrl-C, too: the child removes what it made. A second Ctrl-C does not wait for that.
        child.end(told.scratch, timeout_s)
        raise
    else:
        child.kill(None, timeout_s)
    return Place(**told.facts, trials=told.trials), told.journal_in


class _Account:
    """What a child has told so far."""

    def __init__(self, directory: str, holds: Sequence[Role], progress: Progress | None) -> None:
        self._directory = directory
        self._progress = progress
        mount = mount_over(mounts().values(), directory)
        self.facts: dict[str, Any] = {
            "asked": directory, "path": "", "missing": 0, "holds": tuple(holds), "mount": mount,
        }  # fmt: skip
        self.trials: dict[str, Trial] = {}
        self.at = "starting a process"
        self.scratch: str | None = None
        self.journal_in: str | None = None
        self.done = False

    def take(self, message: Mapping[str, Any]) -> None:
        """
        Take in one message.

        Raises:
            InvalidArgument: It says that the arguments make no sense.
        """
        match message:
            case {"at": at}:
                self.at = at
                if self._progress is not None:
                    self._progress(f"trying {self._directory}: {at}")
            case {"trial": name, **seen}:
                self.trials[name] = Trial(**{**seen, "outcome": Outcome(seen["outcome"])})
            case {"place": place, "journal_in": journal_in}:
                self.facts, self.journal_in = _place_facts(place), journal_in
            case {"scratch": scratch}:
                self.scratch = scratch
            case {"left": left}:
                self.facts["left_behind"], self.done = left, True
            case {"refused": text, "hint": hint}:
                raise InvalidArgument(text, hint=hint)


def _place_facts(said: Mapping[str, Any]) -> dict[str, Any]:
    mount = said["mount"]
    return {
        **said,
        "holds": tuple(Role(role) for role in said["holds"]),
        "mount": Mount(**{**mount, "options": tuple(mount["options"])}) if mount is not None else None,
        "leftovers": tuple(Leftover(**leftover) for leftover in said["leftovers"]),
    }


class _Stuck(Exception):
    """The storage gave no answer; the text says for how long."""


class _Child:
    """A process that touches the storage for us, in a session of its own so that Ctrl-C is ours alone to handle."""

    def __init__(self, words: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ckptmgr.doctor.trials", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # It must import this very package, and nothing from the working directory.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"},
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        self._unread = b""
        #: What it printed besides its messages.
        self.noise = ""

    def next(self, timeout_s: float) -> dict[str, Any] | None:
        """
        Its next message; None when it has closed its end.

        Raises:
            _Stuck: There is none within *timeout_s* seconds.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if newline:
                self._unread = rest
                try:
                    message = json.loads(line)
                except ValueError:
                    message = None
                if isinstance(message, dict):
                    return message
                self.noise += line.decode(errors="replace") + "\n"
                continue
            if not select.select([self._output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise _Stuck(f"no answer within {timeout_s:.3g} s")
            piece = os.read(self._output, 1 << 16)
            if not piece:
                return None
            self._unread += piece

    def status(self) -> int | None:
        """Its exit status, None if it does not end soon."""
        try:
            return self._process.wait(_REAP_S)
        except subprocess.TimeoutExpired:
            return None

    def end(self, scratch: str | None, timeout_s: float) -> None:
        """Ask it to remove *scratch* and end; make it, if that takes longer than *timeout_s* seconds."""
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(_Stuck):
            while (message := self.next(timeout_s)) is not None:
                if message.get("left", scratch) is None:
                    scratch = None
        self.kill(scratch, timeout_s)

    def kill(self, scratch: str | None, timeout_s: float) -> str | None:
        """
        Kill it with all it has started, and have another child remove *scratch*.

        Returns:
            *scratch*, if that could not be done within *timeout_s* seconds.
        """
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self.status()
        assert self._process.stdout is not None
        self._process.stdout.close()
        if scratch is None:
            return None
        other, left, wait_s = _Child(["remove", scratch]), scratch, _START_S
        try:
            while (message := other.next(wait_s)) is not None:
                left, wait_s = message.get("left", left), timeout_s
        except _Stuck:
            pass
        finally:
            other.kill(None, 0)
        return left
