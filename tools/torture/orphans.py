"""
A writer that outlives its trainer.

The product sees to it twice that a writer dies with its trainer: by the death signal, and by the end of the pipe.
Here neither comes: the signal as where a change of user has cleared it, the end of the pipe because somebody else
has the trainer's end open, as a data loader's process has that was forked from the trainer.
So the writer goes on with its job while the run belongs to another manager.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from child_process import Ended
from crash_run import Scenario

from ckptmgr.writers.jobs import Answer
from torture import runs, shim
from torture.faults import MOST_S, Ground, Sweep
from torture.report import NotTried
from torture.runs import Members, Pause
from torture.shim import EVERYONE, Action, Call, Orders, Struck

_SYS_PIDFD_GETFD = 438
#: Longest that a writer may take for the rest of its job, seconds.
_PATIENCE_S = 10.0


class OutlivingWriter(Sweep):
    """
    The trainers are killed at a call of a writer, a second manager recovers and saves, and the writer goes on.

    Args:
        words: Series and scenario.
        world: Ranks; the second manager has one.
        pause: When the writer goes on: where the second manager pauses for it, or None for after all of it.
    """

    def __init__(self, words: str, world: int, pause: Pause | None) -> None:
        super().__init__("a writer outlives its trainer", words, world, _at_a_writer, afterwards=False)
        self._pause = pause

    @property
    def name(self) -> str:
        """What it is called in a report."""
        return f"{super().name} | {self._pause.value if self._pause else 'afterwards'}"

    @property
    def same(self) -> object:
        """All that need the trainer's pipe and let the same run go by."""
        return ("outlived", self.words, self.world)

    def prepare(self, ground: Ground, folder: Path) -> list[Call]:
        """See that an open file of another process can be had here; the calls are those of any run."""
        folder.mkdir()
        with (folder / "any").open("w") as stream:
            try:
                os.close(_from(os.getpid(), stream.fileno()))
            except OSError as error:
                raise NotTried(f"needs pidfd_getfd(2), to have the trainer's pipe: {error}") from error
        calls: list[Call] = ground.whole(Sweep("", self.words, self.world, lambda *_: None, afterwards=False))
        return calls

    def _live(
        self, ground: Ground, folder: Path, place: Path, orders: Orders, *, afterwards: bool
    ) -> tuple[Ended, Path]:
        if orders.action is not Action.STOP:
            return super()._live(ground, folder, place, orders, afterwards=afterwards)
        assert self._scenario is not None
        run = ground.past(self._scenario, folder)
        shim.give(place, run, orders)
        return ground.forks.run(outlive, run, place, self._scenario, self.world, self._pause, timeout_s=MOST_S), run

    def _survivors_heard(self, orders: Orders, struck: Struck, ended: Ended, run: Path) -> None:
        del orders, struck
        assert ended.status == 0, ended.output
        # The trainers are dead, so nobody holds the run lock, and whatever their writer does is no reason to refuse.
        assert not runs.told(run, runs.HEIR), f"the second manager was refused: {runs.told(run, runs.HEIR)}"


def _at_a_writer(call: Call) -> Orders | None:
    return Orders(call.number, Action.STOP, target=EVERYONE) if call.role % 2 else None


def outlive(run: Path, orders: Path, scenario: Scenario, world: int, pause: Pause | None) -> None:
    """In a child: the run under *orders*, of which only the writers are left; the second manager; the writers again."""
    with Members() as members:
        first = members.start(_without_death_signal, run, orders, scenario, world)
        if not members.stopped(first, orders):
            members.end_of(first)
            return
        trainers = {role: pid for role, pid in shim.pids(orders).items() if role % 2 == 0}
        with _pipes(trainers) as pipes:
            dead = dict.fromkeys([first, *trainers.values()])  # with one rank they are the same
            for pid in dead:
                os.kill(pid, signal.SIGKILL)
            for pid in dead:
                members.end_of(pid)
            second = members.start(runs.take_over, run, scenario.now[0].series, 1, True, pause)
            paused = pause is not None and members.paused(second)
            if not paused:
                assert members.end_of(second) == 0, "the second manager failed"
            members.go_on(first)
            struck = shim.struck(orders).role
            assert struck % 2 == 0 or _answered(pipes[struck - 1]), "the writer did not go on, so nothing was tried"
            if paused:
                members.go_on(second)
                assert members.end_of(second) == 0, "the second manager failed"


def _without_death_signal(run: Path, orders: Path, scenario: Scenario, world: int) -> None:
    os.environ["CKPTMGR_SHIM_OUTLIVES"] = "1"
    runs.live(run, orders, scenario, world, False)


@contextlib.contextmanager
def _pipes(trainers: dict[int, int]) -> Iterator[dict[int, list[Connection]]]:
    """Every local socket that each trainer has open, open here as well."""
    pipes: dict[int, list[Connection]] = {role: [] for role in trainers}
    try:
        for role, pid in trainers.items():
            for open_file in Path(f"/proc/{pid}/fd").iterdir():
                if str(open_file.readlink()).startswith("socket:"):
                    ours = socket.socket(fileno=_from(pid, int(open_file.name)))
                    if ours.family is socket.AF_UNIX:
                        pipes[role].append(Connection(ours.detach()))
                    ours.close()
        yield pipes
    finally:
        for pipe in (pipe for mine in pipes.values() for pipe in mine):
            pipe.close()


def _from(pid: int, number: int) -> int:
    """A descriptor of our own for what another process has open as *number*."""
    held = os.pidfd_open(pid)
    try:
        ours = int(ctypes.CDLL(None, use_errno=True).syscall(_SYS_PIDFD_GETFD, held, number, 0))
    finally:
        os.close(held)
    if ours < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return ours


def _answered(pipes: list[Connection]) -> bool:
    """Wait until the writer has done its job, as well as it can."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        for pipe in pipes:
            if pipe.poll(0.01):
                answer = pipe.recv()
                if isinstance(answer, Answer) and answer != Answer():  # which is the one to an arena
                    return True
    return False


def sweeps() -> Iterator[Sweep]:
    """All of them."""
    for pause in (None, *Pause):
        for words in ("dcp first", "dcp steady", "dcp overwrite", "hf steady", "hf overwrite-aside"):
            yield OutlivingWriter(words, 1, pause)
        for words in ("dcp overwrite", "hf steady"):
            yield OutlivingWriter(words, 2, pause)
