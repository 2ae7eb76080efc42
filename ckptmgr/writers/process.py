"""
The trainer's handle on its writer process: start it, give it jobs, replace it when it dies or hangs.

One thread at a time uses a handle: the finalizer's, whose life is the manager's. It must be that
thread which starts the process, because PR_SET_PDEATHSIG fires when the *thread* that started it ends.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import reduction
from multiprocessing.connection import Connection

from ckptmgr.options import WriterOptions
from ckptmgr.writers.arena import Arena
from ckptmgr.writers.jobs import Answer, ArenaJob, DigestJob, WriteJob


class WriterProcess:
    """
    One writer process, spawned when first needed and again after a death.

    Every request has a timeout. A process that dies or lets one pass is killed and its answer is a
    failure with the cause; the next request starts a new one.
    """

    def __init__(self, options: WriterOptions) -> None:
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._mapped: dict[int, int] = {}

    @property
    def pid(self) -> int | None:
        """The process id of the running writer, or None."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self, timeout_s: float) -> str | None:
        """Start the process if none is running, in at most *timeout_s* seconds; returns why that failed, or None."""
        if self.pid is not None:
            return None
        self.stop(0)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            # Also where the training has set a default timeout for its sockets.
            for end in (ours, theirs):
                end.setblocking(True)
            try:
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-m", "ckptmgr.writers.worker", str(theirs.fileno()), str(os.getpid())),
                        *(str(self._options.nice), self._options.io_class),
                    ],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    # The writer must import this very package, and nothing from the working directory.
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"},
                )
            except OSError as error:
                ours.close()
                return f"cannot start the writer process: {error}"
        self._pipe = Connection(ours.detach())
        return self._receive(timeout_s).cause

    def share(self, arena: Arena, timeout_s: float) -> str | None:
        """Let the process read *arena*; returns why that failed, or None. Cheap when it already can."""
        deadline = time.monotonic() + timeout_s
        if (cause := self.start(timeout_s)) is not None:
            return cause
        if self._mapped.get(arena.number) == arena.generation:
            return None
        assert self._pipe is not None
        assert self._process is not None
        try:
            with self._within(timeout_s):
                self._pipe.send(ArenaJob(arena.number, arena.size))
                reduction.send_handle(self._pipe, arena.descriptor, self._process.pid)
        except OSError as error:
            return self._give_up(f"the writer process died ({_how(self._process, error)})")
        answer = self._receive(deadline - time.monotonic())
        if answer.cause is None:
            self._mapped[arena.number] = arena.generation
        return answer.cause

    def do(
        self, job: WriteJob | DigestJob, timeout_s: float, *, meanwhile: Callable[[], object] = lambda: None
    ) -> Answer:
        """
        Have a job done by the process that `start` or `share` found running, in at most *timeout_s* seconds.

        *meanwhile* is called while it is at work, raises nothing, and counts into that time.

        A failure is an answer with a cause. A process that has died meanwhile is not replaced here: a
        new one would not have the arena that the job reads.
        """
        if self._pipe is None:
            return Answer(cause="the writer process is not running")
        began = time.monotonic()
        try:
            with self._within(timeout_s):
                self._pipe.send(job)
        except TimeoutError:
            return Answer(cause=self._give_up(f"the writer process did not take its job within {timeout_s:g} s"))
        except OSError as error:
            return Answer(cause=self._give_up(f"the writer process died ({_how(self._process, error)})"))
        meanwhile()
        return self._receive(timeout_s, began)

    def stop(self, timeout_s: float) -> None:
        """End the process: ask, wait up to *timeout_s* seconds, kill. Nothing of it is left on return."""
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                if timeout_s > 0:
                    with self._within(timeout_s):
                        self._pipe.send(None)
            if timeout_s > 0 and self._process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout_s)
            self._pipe.close()
            self._pipe = None
        if self._process is not None:
            self._process.kill()
            # A process in uninterruptible sleep (a dead network disk) cannot be reaped now; do not hang for it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._process = None
        self._mapped.clear()

    def kill(self) -> None:
        """Kill the process now, from any thread; whoever waits for its answer gets a failure."""
        process = self._process
        if process is not None:
            process.kill()

    def _receive(self, timeout_s: float, began: float | None = None) -> Answer:
        """The answer, if it comes within *timeout_s* of when the job *began*; of now, where that is not given."""
        assert self._pipe is not None
        deadline = (time.monotonic() if began is None else began) + timeout_s
        try:
            with self._within(deadline - time.monotonic()):
                answer = self._pipe.recv()
        except TimeoutError:
            return Answer(cause=self._give_up(f"the writer process did not answer within {max(0.0, timeout_s):g} s"))
        except (EOFError, OSError) as error:
            return Answer(cause=self._give_up(f"the writer process died ({_how(self._process, error)})"))
        assert isinstance(answer, Answer)
        return answer

    @contextlib.contextmanager
    def _within(self, timeout_s: float) -> Iterator[None]:
        """
        Break the pipe once the time is over.

        A process that stops with half a message taken or sent would otherwise be waited for without an end: the
        buffer between the two holds about 200 kB, and the job of a large state is longer.

        Raises:
            TimeoutError: It was over.
            OSError: There can be no thread that looks at the time.
        """
        assert self._pipe is not None
        # The same descriptor: where all are in use, there would be no other one to break it by.
        pipe, late = socket.socket(fileno=self._pipe.fileno()), threading.Event()
        pipe.setblocking(True)

        def expire() -> None:
            late.set()
            pipe.shutdown(socket.SHUT_RDWR)

        watch = threading.Timer(max(0.001, timeout_s), expire)
        watch.name, watch.daemon = "ckptmgr-writer-watch", True
        try:
            try:
                watch.start()
            except RuntimeError as error:
                # The answer would be taken for that to the next request.
                raise OSError(str(error)) from error
            yield
        except (EOFError, OSError):
            if not late.is_set():
                raise
        finally:
            watch.cancel()
            if watch.ident is not None:
                watch.join()
            pipe.detach()
        if late.is_set():
            raise TimeoutError

    def _give_up(self, cause: str) -> str:
        self.stop(0)
        return cause


def _how(process: subprocess.Popen[bytes] | None, error: Exception) -> str:
    if process is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(5)
            return f"signal {-code}" if code < 0 else f"exit status {code}"
    return f"{type(error).__name__}: {error}"
