"""
Children that die at an exact place, and a fork server that makes them cheap.

The product has no fail points. A child dies (status 73, no clean-up of any kind) in one of two ways:

- at a line: a trace function ends it when the statement below a comment of the product is about to run;
- at an effect: Python's audit hook, and wrappers around the few calls without an audit event, end
  it before its n-th change of the run directory or the journal. They can also raise an error there, or
  write a trace of all effects.

Importing torch takes seconds and forking milliseconds, so a server that has imported everything, and
has no thread and no manager, forks every child. A child leads a session of its own; whoever is left of
it when it is over or out of time is killed.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import pickle
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

#: The status of a child that reached the place where it was to die.
CRASHED = 73
#: The same of one whose writer process reached it and took its trainer along.
KILLED = -signal.SIGKILL
_IN_WRITER = "CKPTMGR_TEST_IN_WRITER"
#: The address of the server that all others are forked from.
_STEM = "FORKS_STEM"


# --- the fork server ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a child ended: exit status (0 fine, 1 it raised, -N killed by signal N), and what it printed."""

    status: int
    output: str
    pid: int


class ForkServer:
    """
    Runs functions in forked children. Threads may share it.

    A server can itself be forked, from one that has imported what is slow and nothing of ours (`stem`): so
    that many servers, each with another copy of the product, cost little.

    Args:
        preload: Modules to import once, before any fork.
        path: Folders that go before this process's import path, in every child and its writer processes.
        environment: What else children and their writer processes find in their environment.
        within: A command, with its arguments, that becomes the one that follows, such as `unshare --mount`.
        stem: The `address` of a server to fork this one from; by default as the environment says.
    """

    def __init__(
        self,
        *preload: str,
        path: tuple[Path, ...] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
        within: tuple[str, ...] = (),
        stem: str | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forks-")
        self.address = str(Path(self._folder.name, "socket"))
        self._process: subprocess.Popen[bytes] | None = None
        self._trunk: socket.socket | None = None
        import_path = [*map(str, path), *filter(None, sys.path)]
        if stem := stem or os.environ.get(_STEM):
            given = {**environment, "PYTHONPATH": os.pathsep.join(import_path), _STEM: stem}
            self._alive = self._branch_off(stem, import_path, given, preload)
            return
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen(64)
            self._alive, theirs = socket.socketpair()
            with theirs:
                descriptors = (listener.fileno(), theirs.fileno())
                self._process = subprocess.Popen(
                    # Not from the working directory: it may have another copy of the product.
                    [*within, sys.executable, "-P", "-m", "child_process", *map(str, descriptors), *preload],
                    pass_fds=descriptors,
                    env={
                        **os.environ,
                        "PYTHONPATH": os.pathsep.join(import_path),
                        "OMP_NUM_THREADS": "1",
                        **environment,
                    },
                )

    def _branch_off(
        self, stem: str, import_path: list[str], environment: Mapping[str, str], preload: tuple[str, ...]
    ) -> socket.socket:
        output = Path(self._folder.name, "output")
        output.touch()
        args = (self.address, import_path, dict(environment), preload)
        request = pickle.dumps((str(output), "child_process:_branch", args))
        self._trunk = trunk = socket.socket(socket.AF_UNIX)
        trunk.connect(stem)
        trunk.sendall(struct.pack("<Q", len(request)) + request)
        alive = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                alive.connect(self.address)
                return alive
            ended, _, _ = select.select([trunk], [], [], 0.005)
            assert not ended, f"the fork server did not start: {output.read_text()}"
            assert time.monotonic() < deadline, f"the fork server did not start in time: {output.read_text()}"

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 60) -> Ended:
        """Call *function*, importable by name, in a fresh child and wait for its end."""
        number, output = tempfile.mkstemp(dir=self._folder.name)
        os.close(number)
        request = pickle.dumps((output, f"{function.__module__}:{function.__qualname__}", args))
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            connection.connect(self.address)
            connection.sendall(struct.pack("<Q", len(request)) + request)
            try:
                answer = connection.recv(16, socket.MSG_WAITALL)
            except TimeoutError:
                raise AssertionError(f"no end after {timeout_s} s: {Path(output).read_text()}") from None
        if len(answer) != 16:
            raise AssertionError("the fork server is gone")
        pid, status = struct.unpack("<qq", answer)
        return Ended(os.waitstatus_to_exitcode(status), Path(output).read_text(errors="replace"), pid)

    def do(self, function: Callable[..., Any], *args: Any, timeout_s: float = 60) -> None:
        """Call *function* in a child; it must not fail."""
        ended = self.run(function, *args, timeout_s=timeout_s)

        assert ended.status == 0, f"status {ended.status}\n{ended.output}"

    def crash(self, function: Callable[..., Any], *args: Any, by: int = CRASHED, timeout_s: float = 60) -> Ended:
        """Call *function* in a child that must reach the place where it dies, and take its writer along."""
        ended = self.run(function, *args, timeout_s=timeout_s)

        assert ended.status == by, f"the child did not die where it should: {ended.status}\n{ended.output}"
        assert_no_writer_of(ended.pid)
        return ended

    def close(self) -> None:
        """End the server and every child that is left."""
        self._alive.close()
        try:
            if self._trunk is not None:
                self._trunk.settimeout(20)
                self._trunk.recv(16)
            if self._process is not None:
                self._process.wait(20)
        finally:
            if self._trunk is not None:
                self._trunk.close()  # it is killed, if it has not ended
            if self._process is not None:
                self._process.kill()
                self._process.wait()
            self._folder.cleanup()


def writers_of(pid: int) -> list[int]:
    """The writer processes, not reaped or still running, that were started by the trainer *pid*."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if (
                    b"ckptmgr.writers.worker" in words
                    and words[words.index(b"ckptmgr.writers.worker") + 2] == b"%d" % pid
                ):
                    found.append(int(folder.name))
    return found


def assert_no_writer_of(pid: int, within_s: float = 5) -> None:
    """The trainer *pid* is dead; its writer must be so too, soon."""
    deadline = time.monotonic() + within_s
    while left := writers_of(pid):
        assert time.monotonic() < deadline, f"writer process {left} outlived its trainer by {within_s} s"
        time.sleep(0.01)


def _serve(listener: socket.socket, alive: socket.socket) -> None:
    children: dict[int, socket.socket] = {}
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    with selectors.DefaultSelector() as selector:
        for one in (listener, alive, woken):
            selector.register(one, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is alive:
                    for pid in children:
                        _kill_session(pid)
                    return
                if key.fileobj is woken:
                    with contextlib.suppress(BlockingIOError):
                        woken.recv(4096)
                elif key.fileobj is listener:
                    connection, _ = listener.accept()
                    pid = _fork(connection)
                    children[pid] = connection
                    selector.register(connection, selectors.EVENT_READ, pid)
                elif key.data in children:  # whoever asked has given up
                    _kill_session(key.data)
                    selector.unregister(key.fileobj)
            while children:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                connection = children.pop(pid)
                with contextlib.suppress(KeyError):
                    selector.unregister(connection)
                with contextlib.suppress(OSError):
                    connection.sendall(struct.pack("<qq", pid, status))
                connection.close()


def _kill_session(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _fork(connection: socket.socket) -> int:
    (length,) = struct.unpack("<Q", connection.recv(8, socket.MSG_WAITALL))
    output, name, args = pickle.loads(connection.recv(length, socket.MSG_WAITALL))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from 3.12 on, about forks of processes with threads
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.closerange(3, 256)
        module, _, function = name.partition(":")
        getattr(importlib.import_module(module), function)(*args)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _branch(address: str, import_path: list[str], environment: dict[str, str], preload: tuple[str, ...]) -> None:
    """In a child of another server: be a server."""
    sys.path[:] = import_path
    os.environ.update(environment)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        alive, _ = listener.accept()
        with alive:
            for name in preload:
                importlib.import_module(name)
            assert threading.active_count() == 1, threading.enumerate()
            _serve(listener, alive)


def _main() -> None:
    listener, alive = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    for name in sys.argv[3:]:
        importlib.import_module(name)
    assert threading.active_count() == 1, threading.enumerate()
    _serve(listener, alive)


# --- where to die ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AtComment:
    """Die at the statement below the n-th time that the comment of the product that begins so is passed."""

    comment: str
    nth: int = 1
    in_writer: bool = False


@dataclasses.dataclass(frozen=True)
class AtEffect:
    """
    Die before the n-th effect (from 1), or raise OSError there once.

    Transactions of the journal count only where the child is to die. With *nth* 0 nothing happens but a
    trace: one line per effect in *trace*.
    """

    nth: int
    error: int | None = None
    in_writer: bool = False
    trace: str | None = None


def arm(what: AtComment | AtEffect, root: Path) -> None:
    """Prepare this child, or the writer process that it will start, to die while it changes *root*."""
    if what.in_writer:
        facts = {"kind": type(what).__name__, "root": str(root), **dataclasses.asdict(what), "in_writer": False}
        os.environ[_IN_WRITER] = json.dumps(facts)
    elif isinstance(what, AtComment):
        _die_at_line(what)
    else:
        Effects(root, what).install(journal=what.error is None)


def arm_writer() -> None:
    """In a writer process: do what `arm` asked for. Called by the sitecustomize of the tests."""
    if facts := json.loads(os.environ.get(_IN_WRITER, "null")):
        kind = {"AtComment": AtComment, "AtEffect": AtEffect}[facts.pop("kind")]
        root = Path(facts.pop("root"))
        what = kind(**facts)
        Death.takes_trainer_along = True
        if isinstance(what, AtComment):
            _die_at_line(what)
        else:
            Effects(root, what).install(journal=False)


class Death:
    """What else goes when this process dies."""

    takes_trainer_along = False


def die() -> NoReturn:
    """End this process as a crash does: no handler, no buffer, no lock is taken care of."""
    if Death.takes_trainer_along:
        # First, so that it cannot see its writer die and go on.
        os.kill(os.getppid(), signal.SIGKILL)
    os._exit(CRASHED)


# At a line


@dataclasses.dataclass(frozen=True)
class Place:
    """A comment's place between statements: before the line *below*, or, at the end of a block, after *above*."""

    file: str
    line: int
    below: int | None
    above: range


def comments(package: Path) -> dict[str, tuple[Path, int]]:
    """Every ``# Crash here:`` comment of a package: what is left → file and last line of the comment."""
    found: dict[str, tuple[Path, int]] = {}
    for path in sorted(package.rglob("*.py")):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            before, mark, text = line.partition("Crash here:")
            if mark and before.lstrip().startswith("#"):
                assert text.strip() not in found, f"two comments say the same: {text}"
                last = number
                while lines[last + 1].lstrip().startswith("#"):
                    last += 1
                found[text.strip()] = (path, last + 1)
    return found


def place_of(comment: str) -> Place:
    """Where in the product the comment that begins with *comment* stands."""
    import ckptmgr

    hits = [at for text, at in comments(Path(ckptmgr.__file__).parent).items() if text.startswith(comment)]
    assert len(hits) == 1, f"{len(hits)} comments begin with {comment!r}"
    ((file, line),) = hits
    source = file.read_text()
    text = source.splitlines()
    column = len(text[line - 1]) - len(text[line - 1].lstrip())
    statements = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt) and node.col_offset == column
    ]
    above = max((node for node in statements if node.lineno < line), key=lambda node: node.lineno)
    below = min((node for node in statements if node.lineno > line), key=lambda node: node.lineno, default=None)
    ends_block = False
    for following in text[line:]:
        if following.strip():
            ends_block = len(following) - len(following.lstrip()) < column
            break
    assert above.end_lineno is not None
    first = None if ends_block or below is None else below.lineno
    return Place(str(file), line, first, range(above.lineno, above.end_lineno + 1))


def _die_at_line(what: AtComment) -> None:
    place = place_of(what.comment)
    passed = 0

    def reached() -> None:
        nonlocal passed
        passed += 1
        if passed == what.nth:
            die()

    def in_frame() -> Callable[..., Any]:
        was_above = False

        def local(frame: Any, event: str, arg: Any) -> Any:
            nonlocal was_above
            del arg
            if place.below is not None:
                if event == "line" and frame.f_lineno == place.below:
                    reached()
            elif event == "line" and frame.f_lineno in place.above:
                was_above = True
            elif event == "exception":
                was_above = False
            elif was_above and event in ("line", "return"):
                was_above = False
                reached()
            return local

        return local

    def trace(frame: Any, event: str, arg: Any) -> Any:
        del event, arg
        code = frame.f_code
        if code.co_filename != place.file or not code.co_firstlineno <= place.line:
            return None
        last = max((line for _, _, line in code.co_lines() if line), default=0)
        return in_frame() if (place.below or place.above[-1]) <= last else None

    threading.settrace(trace)
    sys.settrace(trace)


# At an effect


class Effects:
    """Everything that changes *root* or the journal beside it, counted in the order in which it happens."""

    def __init__(self, root: Path, what: AtEffect) -> None:
        self._root = str(root)
        self._what = what
        self._count = 0
        self._lock = threading.RLock()
        self._trace = -1
        if what.trace is not None:
            self._trace = os.open(what.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def install(self, *, journal: bool) -> None:
        """Watch this process from now on; there is no way back."""
        from ckptmgr import durable

        sys.addaudithook(self._audit)
        self._before(os, "open", self._created_in, "create")
        self._before(os, "fsync", lambda fd, *_: self._path(fd))
        self._before(os, "pwrite", lambda fd, *_: self._path(fd))
        self._before(durable, "set_size", lambda fd, *_: self._path(fd))
        self._before(durable, "_renameat2", lambda source, target, flags: f"{source} -> {target} ({flags})")
        if journal:
            from ckptmgr.journal import Journal

            for name in ("begin_epoch", "end_epoch", "begin", "adopt", "mark_retiring", "finish_retirement"):
                self._before(Journal, name, lambda *_, **__: self._root, "journal." + name)
            self._before(Journal, "advance", lambda *args, **_: f"{self._root} to {args[3]}", "journal.advance")

    def _before(self, owner: Any, name: str, where: Callable[..., str], label: str = "") -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._effect(label or name.lstrip("_"), where(*args, **kwargs))
            return real(*args, **kwargs)

        setattr(owner, name, wrapper)

    def _path(self, descriptor: int) -> str:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())

    def _created_in(self, path: Any, flags: int, *_: Any, dir_fd: int | None = None, **__: Any) -> str:
        """What an opening relative to a directory creates; its audit event does not say which directory."""
        return self._at(path, dir_fd) if dir_fd is not None and flags & (os.O_CREAT | os.O_TRUNC) else ""

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, str | bytes | os.PathLike) and flags & (os.O_CREAT | os.O_TRUNC):
                self._effect("create", os.fsdecode(path))
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            self._effect(event.removeprefix("os."), self._at(args[0], args[-1]))
        elif event == "os.rename":
            self._effect("rename", f"{self._at(args[0], args[2])} -> {self._at(args[1], args[3])}")
        elif event == "os.symlink":
            self._effect("symlink", self._at(args[1], args[2]))

    def _at(self, path: Any, folder: int) -> str:
        name = os.fsdecode(path)
        return name if folder < 0 or name.startswith("/") else f"{self._path(folder)}/{name}"

    def _effect(self, name: str, where: str) -> None:
        if not where.startswith(self._root):
            return
        with self._lock:
            self._count += 1
            if self._trace >= 0:
                os.write(self._trace, f"{self._count}\t{name}\t{where.replace(self._root, '')}\n".encode())
            if self._count == self._what.nth:
                if self._what.error is None:
                    die()
                raise OSError(self._what.error, os.strerror(self._what.error), where)


@dataclasses.dataclass(frozen=True)
class Effect:
    """One line of a trace."""

    nth: int
    name: str
    where: str


def read_trace(path: Path) -> list[Effect]:
    """The effects that a child with a *trace* had, in order."""
    rows = (line.split("\t") for line in path.read_text().splitlines()) if path.exists() else ()
    return [Effect(int(nth), name, where) for nth, name, where in rows]


def mark_trace(path: Path, words: str) -> None:
    """Put a line of its own into a trace, so that a test finds its way about in it."""
    with path.open("a") as stream:
        stream.write(f"0\tmark\t{words}\n")


if __name__ == "__main__":
    # Under its own name, so that children find the very module that pickled their functions.
    importlib.import_module("child_process")._main()
