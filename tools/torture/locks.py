"""
Locks that do not work: a file system that refuses them, and one that keeps them to one mount.

bindfs shows one folder at two places, and a lock that is taken at one is free at the other, as on two hosts that
mount the same storage with `localflock`. Each place can have a manager of its own, with the product's own lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from child_process import Ended
from crash_run import Scenario

from ckptmgr import errors
from ckptmgr.journal.database import BUSY_TIMEOUT_MS
from ckptmgr.rundir import RunDirectory
from torture import faults, mounts, runs, shim
from torture.faults import MOST_S, NOT_REACHED, Ground, Outcome, Sweep
from torture.report import NotTried
from torture.runs import Members
from torture.shim import EVERYONE, Action, Call, Kind, Orders, Phase, Struck

#: Errors that say that there are no locks, and one that says nothing in particular.
_CODES = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO)
#: Of points that cost much, every so many-th.
_ONE_IN = 7
#: Where SQLite's locks are, in bytes of the journal that nothing else uses.
_PENDING_BYTE, _LOCK_BYTES = 0x40000000, 512
#: Who is told that the first was in a transaction, so that there was no second.
_KEPT_OUT = "kept-out"


class RefusedLock(Sweep):
    """
    flock and fcntl fail, the first for the run lock, the second for SQLite's.

    Args:
        code: errno.
        sticky: From then on, until the fault ends.
        words: Series and scenario.
    """

    def __init__(self, code: int, *, sticky: bool, words: str) -> None:
        fault = f"{errno.errorcode[code]} of a lock {'sticky' if sticky else 'once'}"
        # SQLite takes ENOLCK for a lock that somebody holds and waits, at each transaction: up to 40 s at a point.
        waits = sticky and code == errno.ENOLCK

        def orders(call: Call) -> Orders | None:
            if waits and call.number % _ONE_IN and ".journal.db" in call.path:
                return None
            return Orders(call.number, Action.FAIL, code, sticky=sticky, kinds=(Kind.LOCK,))

        super().__init__(fault, words, 1, orders, afterwards=True, kinds=(Kind.LOCK,))
        if waits:
            self._heard_within_s += 4 * BUSY_TIMEOUT_MS / 1000

    def _survivors_heard(self, orders: Orders, struck: Struck, ended: Ended, run: Path) -> None:
        super()._survivors_heard(orders, struck, ended, run)
        _refused_by_type(struck, run)


class RefusedStart(Sweep):
    """
    What the run lock needs is refused, or the fsync of the directory above the run: no bare OSError.

    Args:
        code: errno.
        words: Series and scenario.
    """

    def __init__(self, code: int, words: str) -> None:
        def orders(call: Call) -> Orders | None:
            # What is in the run and its journal has sweeps of its own; "told" and "notes" are ours.
            mine = call.path.endswith(".lock") or not Path(call.path).name.startswith(("alpha", "told", "notes"))
            outside = "/alpha/" not in call.path
            return Orders(call.number, Action.FAIL, code) if mine and outside and call.phase is Phase.START else None

        super().__init__(f"{errno.errorcode[code]} under the run lock", words, 1, orders, afterwards=True)

    @property
    def same(self) -> object:
        """The calls of all that begin so."""
        return ("with the folder above", self.words)

    def _live(
        self, ground: Ground, folder: Path, place: Path, orders: Orders, *, afterwards: bool
    ) -> tuple[Ended, Path]:
        assert self._scenario is not None
        run = ground.past(self._scenario, folder / "runs")
        shim.give(place, run.parent, orders)
        return ground.forks.run(runs.live, run, place, self._scenario, 1, afterwards, timeout_s=MOST_S), run

    def _survivors_heard(self, orders: Orders, struck: Struck, ended: Ended, run: Path) -> None:
        super()._survivors_heard(orders, struck, ended, run)
        _refused_by_type(struck, run)


def _refused_by_type(struck: Struck, run: Path) -> None:
    for word, *facts in runs.told(run, 0):
        if word == "refused" and struck.times:
            assert hasattr(errors, facts[0]), f"{struck}: refused by a bare {facts}"
            of_the_lock = struck.path.endswith(".lock")
            assert facts[0] == "LockUnsupported" or not of_the_lock, f"{struck}: refused by {facts}"
            assert of_the_lock or struck.path in facts[1], f"{struck}: refused by {facts}, which do not say where"


class TwoMounts(Sweep):
    """
    Two live managers on one run, each through a mount with locks of its own.

    At a call the first stands still, the second takes over and saves step 1, and the first goes on. Whatever it
    does then, it changes no row and deletes nothing, and its next save is refused by a typed error.
    """

    def __init__(self, words: str) -> None:
        super().__init__("two managers, locks local to a mount", words, 1, _between, afterwards=True)

    def prepare(self, ground: Ground, folder: Path) -> Any:
        """
        See that locks are local here, and let the run go by on one of the mounts: it makes other calls there.

        The calls by their numbers; None stands for one that was refused, such as a swap of two names.
        """
        assert self._scenario is not None
        mounts.require("bindfs", "fusermount3")
        if not Path("/dev/fuse").exists():
            raise NotTried("needs /dev/fuse")
        folder.mkdir()
        ended = ground.forks.run(assert_locks_are_local, folder / "tried")
        if ended.status:
            raise NotTried(f"bindfs does not keep locks to a mount: {ended.output.splitlines()[-1]}")
        ground.past(self._scenario, folder / "under")
        trace = folder / "trace"
        shim.give(folder / "orders", folder / "a" / "alpha", Orders(trace=str(trace)))
        ground.forks.do(live_on_two_mounts, folder, folder / "orders", self._scenario, False, timeout_s=MOST_S)
        by_number = {call.number: call for call in shim.calls(trace)}
        return [by_number.get(n) for n in range(1, max(by_number) + 1)]

    @property
    def same(self) -> object:
        """Nothing is shared."""
        return self

    def points(self, prepared: Sequence[Any]) -> Iterator[int]:
        """The calls that were not refused, between transactions."""
        return (n for n, call in enumerate(prepared, 1) if call is not None and self._orders(call) is not None)

    def strike(self, ground: Ground, folder: Path, n: int, prepared: Sequence[Any]) -> Outcome:
        """Let the second take over at the *n*-th call of the first."""
        assert self._scenario is not None
        run = ground.past(self._scenario, folder / "under")
        place = folder / "orders"
        orders = self._orders(prepared[n - 1])
        assert orders is not None
        shim.give(place, folder / "a" / "alpha", orders)
        phase = prepared[n - 1].phase.name
        try:
            ground.forks.do(live_on_two_mounts, folder, place, self._scenario, True, timeout_s=MOST_S)
            struck = shim.struck(place)
            faults.assert_all_gone(place)
            phase = struck.phase.name if struck.times and not runs.told(run, _KEPT_OUT) else NOT_REACHED
            if phase != NOT_REACHED:
                self._first_heard(run)
            ground.forks.do(runs.judge, run, timeout_s=MOST_S)
        except AssertionError as error:
            return Outcome(phase, f"{orders} ({prepared[n - 1].kind.name.lower()}): {error}")
        shutil.rmtree(folder)
        return Outcome(phase)

    def _first_heard(self, run: Path) -> None:
        if runs.told(run, runs.HEIR):
            return  # the second was refused, so the first may go on
        told = runs.told(run, 0)
        assert told, "the first was told nothing"
        assert _is_too_late(told[-1]), f"the first saves on after it was taken over: {told}"


def _is_too_late(told: list[Any]) -> bool:
    word, _, *facts = told
    if word == "failed":
        return all(cause.startswith("StaleWriter") for _, cause in facts[0])
    return bool(word == "error" and facts[0] == "StaleWriter")


def _between(call: Call) -> Orders | None:
    # Not within a transaction, see `_in_transaction`.
    inside = ".journal.db" in call.path
    late = call.phase not in (Phase.START, Phase.END)
    return Orders(call.number, Action.STOP, target=EVERYONE) if late and not inside else None


@contextlib.contextmanager
def _two_mounts(folder: Path) -> Iterator[tuple[Path, Path]]:
    with mounts.bound(folder / "under", folder / "a") as a, mounts.bound(folder / "under", folder / "b") as b:
        yield a, b


def assert_locks_are_local(folder: Path) -> None:
    """A lock that is taken on one mount is taken there, and free on another mount of the same folder."""
    (folder / "under").mkdir(parents=True)
    (folder / "under" / "lock").touch()
    with (
        _two_mounts(folder) as (a, b),
        (a / "lock").open() as mine,
        (a / "lock").open() as same,
        (b / "lock").open() as other,
    ):
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(same, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise AssertionError("not even one mount keeps a lock")
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def live_on_two_mounts(folder: Path, orders: Path, scenario: Scenario, afterwards: bool) -> None:
    """In a child: the first manager on ``a``, the second on ``b``; both show ``under``."""
    with _two_mounts(folder) as (a, b), Members() as members:
        first = members.start(runs.live, a / "alpha", orders, scenario, 1, afterwards)
        if members.stopped(first, orders):
            if _in_transaction(RunDirectory(a / "alpha").journal_path):
                runs.tell(folder / "under" / "alpha", _KEPT_OUT)
            else:
                second = members.start(runs.take_over, b / "alpha", scenario.now[0].series, 1, True)
                status = members.end_of(second)
                assert status == 0, f"the second manager ended with {status}"
            members.go_on(first)
        members.end_of(first)


def _in_transaction(journal: Path) -> bool:
    """
    Whether somebody on the same mount holds SQLite's lock.

    Two transactions at once on two mounts with locks of their own damage any database; that is detected, by the seal
    and the checks at the next start, but nothing can be promised of it.
    """
    with journal.open("r+b") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB, _LOCK_BYTES, _PENDING_BYTE)
        except BlockingIOError:
            return True
    return False


def sweeps() -> Iterator[Sweep]:
    """All of them."""
    for code in _CODES:
        for sticky in (False, True):
            yield RefusedLock(code, sticky=sticky, words="dcp steady")
        yield RefusedStart(code, "dcp steady")
    yield RefusedLock(errno.ENOLCK, sticky=False, words="hf overwrite")
    for words in ("dcp first", "dcp steady", "dcp overwrite", "hf steady", "hf overwrite-aside"):
        yield TwoMounts(words)
