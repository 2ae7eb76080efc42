"""
Real file systems that lose their power, in the middle of a run.

At a call of the run the shim shuts the file system down, its own log included, and everyone dies. Then it
is mounted again, which replays what the log had, and the judge opens what is there. ext4 and XFS can be shut
down; what was written back before nobody asked for it stays, so a real cut can hide a loss and never invents one.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import crash_run
from child_process import AtComment, Ended
from crash_run import Save, Scenario, scenario_of

from torture import faults, mounts, runs, shim
from torture.faults import MOST_S, NOT_REACHED, Ground, Outcome, RecoverySweep, Sweep
from torture.report import CONTROL, NotTried
from torture.shim import EVERYONE, Action, Call, Lies, Orders

#: Of so many calls one is a point.
_EVERY = 3
#: At so many calls the whole manager judges, at the others recovery alone, which is quicker.
_WHOLE = 4


@dataclasses.dataclass(frozen=True)
class Past:
    """How a run begins: an image of the disk that it stands on, and what was noted beside it."""

    image: Path
    notes: bytes


@dataclasses.dataclass(frozen=True)
class Started:
    """
    A run on a disk of its own. The run is reached through a link; notes, orders and traces stand beside the link.

    *store*: the disk and what backs it; only children of the fork server see it.
    """

    folder: Path
    store: Path

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder / "alpha"

    @property
    def orders(self) -> Path:
        """Where the shim's orders are."""
        return self.folder / "orders"

    @property
    def disk(self) -> Path:
        """Where the file system is mounted."""
        return self.store / "disk"


class Disks:
    """
    Images of file systems in memory, with a run's past on them, and copies of them to strike at.

    Args:
        ground: Whose fork server has the mounts.
        kind: ``ext4``, ``xfs``, ``btrfs`` or ``tmpfs``.
        narrow: For `mounts.leave_below`.

    Raises:
        NotTried: This machine cannot.
    """

    _numbers = itertools.count()

    def __init__(self, ground: Ground, kind: str, *, narrow: bool = False) -> None:
        mounts.require(*(() if kind == "tmpfs" else (f"mkfs.{kind}",)))
        self._ground = ground
        self._kind = kind
        self._narrow = narrow
        self._memory: Path = ground.once("disks", self._in_memory)
        self._past(None)

    def start(self, scenario: Scenario | None, folder: Path) -> Started:
        """A disk of its own with a run on it that has lived through *scenario*'s past, for *folder*."""
        past = self._past(scenario)
        folder.mkdir(parents=True, exist_ok=True)
        started = Started(folder, self._memory / f"disk-{next(self._numbers)}")
        started.run.symlink_to(started.disk / "alpha")
        crash_run.assets(started.run)
        if past.notes:
            (folder / "notes").write_bytes(past.notes)
        self._ground.forks.do(mounts.start, self._kind, past.image, started.store, self._narrow)
        return started

    def _in_memory(self, folder: Path) -> Path:
        self._ground.forks.do(mounts.tmpfs, folder)
        return folder

    def _past(self, scenario: Scenario | None) -> Past:
        def make(folder: Path) -> Past:
            folder.mkdir()
            if scenario is not None:
                self._ground.past(scenario, folder)
            notes = folder / "notes"
            past = Past(self._memory / f"image-{next(self._numbers)}", notes.read_bytes() if notes.exists() else b"")
            ended = self._ground.forks.run(mounts.make, self._kind, past.image, folder, "alpha*")
            if ended.status:
                raise NotTried(f"cannot make and mount {self._kind}: {ended.output.splitlines()[-1]}")
            return past

        return self._ground.once(("image", self._kind, scenario and scenario.before), make)

    def replay(self, started: Started) -> None:
        """Unmount and mount again."""
        self._ground.forks.do(mounts.replay, self._kind, started.store)

    def judge(self, started: Started, *, whole: bool) -> None:
        """
        Unmount, mount again, judge, and leave nothing of it; if it was violated, a copy beside the run.

        Raises:
            AssertionError: Something does not hold.
        """
        facts = (self._kind, started.store, started.run, started.folder / "left", whole)
        self._ground.forks.do(runs.judge_disk, *facts, timeout_s=MOST_S)
        shutil.rmtree(started.folder)


@dataclasses.dataclass(frozen=True)
class Whole:
    """The disks to strike at, and the calls of the run when nothing strikes; these are the same on every disk."""

    disks: Disks
    calls: Sequence[Call]


class PowerCut:
    """
    A cut at the calls of one run, or of a recovery.

    Args:
        kind: ``ext4`` or ``xfs``.
        words: Series and scenario, or ``create``.
        world: Ranks.
        first: A comment of the product: the run was ended there before, and the cut comes while it is recovered.
        lost: The first end was a cut as well; else a kill, after which the next start finds all that was written.
        offset: Every third call is a point, from this one.
        scenario: What *words* stand for, if it is none that they name.
    """

    def __init__(
        self,
        kind: str,
        words: str,
        world: int = 1,
        *,
        first: str = "",
        lost: bool = False,
        offset: int = 0,
        scenario: Scenario | None = None,
    ) -> None:
        self.fault = f"power cut, real {kind}" + (", while recovering" if first else "")
        self._kind = kind
        self._words = words
        self._world = world
        self._first = first
        self._lost = lost
        self._offset = offset
        self._scenario = scenario or scenario_of(words)

    @property
    def name(self) -> str:
        """What it is called in a report."""
        after = f" | after a {'cut' if self._lost else 'kill'}: {self._first}" if self._first else ""
        return f"{self.fault} | {self._words} | {self._world}{after}"

    @property
    def same(self) -> object:
        """Nothing is shared."""
        return self

    def prepare(self, ground: Ground, folder: Path) -> Whole:
        """See that there can be such disks, and let the run go by."""
        del folder
        disks = Disks(ground, self._kind)
        nothing: Any = lambda *_: None  # noqa: E731
        if self._first:
            return Whole(disks, ground.whole(RecoverySweep("", self._words, self._first, nothing)))
        whole = Sweep("", self._words, self._world, nothing, afterwards=False, scenario=self._scenario)
        return Whole(disks, ground.whole(whole))

    def points(self, prepared: Whole) -> Iterator[int]:
        """Every third call."""
        return iter(range(1 + self._offset, len(prepared.calls) + 1, _EVERY))

    def strike(self, ground: Ground, folder: Path, n: int, prepared: Whole) -> Outcome:
        """Cut the power at the *n*-th call, mount again and judge."""
        started, ended = self._go(ground, folder, prepared, self._orders(n))
        struck = shim.struck(started.orders)
        phase = struck.phase.name if struck.times else NOT_REACHED
        assert not struck.times or ended.status == faults.KILLED, f"{struck}: status {ended.status}\n{ended.output}"
        try:
            prepared.disks.judge(started, whole=n % _WHOLE == 0)
        except AssertionError as error:
            return self._found(phase, error, started)
        return Outcome(phase)

    def _orders(self, n: int) -> Orders:
        return Orders(n, Action.CUT, target=EVERYONE)

    def _found(self, phase: str, error: AssertionError, started: Started) -> Outcome:
        return Outcome(phase, f"{shim.struck(started.orders)}: {error}")

    def _go(self, ground: Ground, folder: Path, whole: Whole, orders: Orders) -> tuple[Started, Ended]:
        started = whole.disks.start(self._scenario, folder)
        run, place = started.run, started.orders
        if self._first:
            assert self._scenario is not None
            ground.forks.crash(crash_run.crash_while_saving, run, self._scenario, AtComment(self._first))
            if self._lost:
                ground.forks.do(mounts.cut, started.disk)
                whole.disks.replay(started)
        shim.give(place, run.resolve(), orders)
        if self._first:
            ended = ground.forks.run(runs.recover, run, place, self._scenario.exchange, timeout_s=MOST_S)
        elif self._scenario is None:
            ended = ground.forks.run(runs.create, run, place, timeout_s=MOST_S)
        else:
            ended = ground.forks.run(runs.live, run, place, self._scenario, self._world, False, timeout_s=MOST_S)
        faults.assert_all_gone(place)
        return started, ended


class LyingDisk(PowerCut):
    """
    The control: fsync says yes and does nothing, as some disks do, and then the power is cut.

    No order of calls survives that, so the judge must find losses: cuts come after a save was acknowledged.

    Args:
        kind: ``ext4`` or ``xfs``.
        series: The format's word.
        lies: Whether the journal's syncs are done.
    """

    def __init__(self, kind: str, series: str, lies: Lies) -> None:
        # All of the second save comes after the first was acknowledged.
        twice = Scenario((), (Save(series, 1), Save(series, 2)), keep=2)
        super().__init__(kind, f"{series} twice", scenario=twice)
        what = "lying fsync" if lies is Lies.ALL else "lying fsync of all but the journal"
        self.fault = f"{CONTROL}{what}, real {kind} (must fail)"
        self._lies = lies

    def points(self, prepared: Whole) -> Iterator[int]:
        """Calls of the second save, when the first was acknowledged."""
        second = next(n for n, call in enumerate(prepared.calls, 1) if "-2.e" in call.path)
        return iter(range(second, len(prepared.calls) + 1, 4 * _EVERY))

    def _orders(self, n: int) -> Orders:
        return Orders(n, Action.CUT, target=EVERYONE, lies=self._lies)

    def _found(self, phase: str, error: AssertionError, started: Started) -> Outcome:
        if runs.MOUNTED not in str(error):
            return super()._found(phase, error, started)
        shutil.rmtree(started.folder)
        return Outcome(phase, caught=True)


def sweeps() -> list[PowerCut]:
    """All of them."""
    found = []
    # The offsets differ, so that together all calls are points.
    for offset, kind in enumerate(("ext4", "xfs")):
        for series in crash_run.NAMES:
            for how in ("first", "steady", "overwrite"):
                found.append(PowerCut(kind, f"{series} {how}", offset=offset))
                found.append(PowerCut(kind, f"{series} {how}", 2, offset=2 - offset))
        found += [PowerCut(kind, words, offset=offset) for words in (faults.LARGE, "create")]
        for words, first in faults.CRASHED:
            found += [PowerCut(kind, words, first=first, lost=lost, offset=offset + lost) for lost in (False, True)]
        found += [LyingDisk(kind, series, lies) for series in crash_run.NAMES for lies in (Lies.ALL, Lies.DATA)]
    return found
