"""
Real disks without enough space: the kernel itself refuses, in the middle of a save.

A run goes on with so much space left, in bytes or in names, as does not last; each point leaves a little more
than the one before, so the refusal comes at every step of the commit order in turn. Then the space is freed,
and the same process must be able to save.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from child_process import Ended

from torture import faults, mounts, runs, shim
from torture.faults import MOST_S, NOT_REACHED, Ground, Outcome, Sweep
from torture.realdisks import Disks, Whole
from torture.runs import Trouble
from torture.shim import Action, Call, Kind, Orders, Struck

#: What a cause says when the space is spent: the kernel's words and SQLite's.
_WORDS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "Input/output error",
    "Read-only file system",
    "database or disk is full",
    "disk I/O error",
    "readonly database",
)


#: Blocks of 4 KiB that the journal may need besides.
_JOURNAL_GROWS = 4


class _Scarce(Sweep):
    """What all have in common: points are levels, of which the n-th leaves n units."""

    def __init__(self, fault: str, words: str, world: int) -> None:
        super().__init__(fault, words, world, lambda *_: None, afterwards=True)

    @property
    def same(self) -> object:
        """Nothing is shared."""
        return self

    def _calls(self, ground: Ground) -> Sequence[Call]:
        """The same run with room enough."""
        return ground.whole(Sweep("", self.words, self.world, lambda *_: None, afterwards=False))

    def _judged(self, ended: Ended, struck: Struck, run: Path, *, unseen: bool = False) -> None:
        """Everyone was told what had to be told, or AssertionError; *unseen*: reading may have been refused as well."""
        self._survivors_heard(Orders(action=Action.WATCH), struck, ended, run)
        told = runs.told(run, 0)
        failed = [cause for word, _, *facts in told if word == "failed" for _, cause in facts[0]]
        causes = failed + [facts[0] for word, _, *facts in told if word == "refused"]
        strange = [cause for cause in causes if not any(words in cause for words in _WORDS)]
        assert not strange, f"not what was wrong: {strange}"
        if not struck.times:
            # At the start the folder that holds the run is synced as well, and the shim does not watch that.
            assert unseen or not failed, f"refused by nobody: {failed}"
            return
        # What a writer could not write cannot be committed.
        assert struck.role % 2 == 0 or causes, f"{struck}, and the save did not fail: {told}"


@dataclasses.dataclass(frozen=True)
class Scarcity:
    """
    One kind.

    Args:
        fault: What the table calls it.
        kind: File system.
        unit: Of the levels, in bytes; 1 for names.
        leave: Called in a child with the mounted disk and how much to leave.
        relieve: Undoes it.
        commands: What has to be installed besides.
        spare: Units that it takes besides what the files need.
        below: What is missing is missing below the file system, which only hears of it when it writes back, and
            may then refuse everything until it is mounted again.
    """

    fault: str
    kind: str
    unit: int
    leave: Callable[[Path, int], None]
    relieve: Callable[[Path], None]
    commands: tuple[str, ...] = ()
    below: bool = False
    spare: int = 0


class FullDisk(_Scarce):
    """
    Too little of something on a file system of its own.

    Args:
        scarcity: Of what.
        words: Series and scenario.
        world: Ranks.
    """

    def __init__(self, scarcity: Scarcity, words: str, world: int) -> None:
        super().__init__(scarcity.fault, words, world)
        self._scarcity = scarcity
        self._afterwards = not scarcity.below

    def prepare(self, ground: Ground, folder: Path) -> Any:
        """See that there can be such disks, and let the run go by, to know what it needs."""
        del folder
        mounts.require(*self._scarcity.commands)
        disks = Disks(ground, self._scarcity.kind, narrow=self._scarcity.below)
        return Whole(disks, self._calls(ground))

    def points(self, prepared: Whole) -> Iterator[int]:
        """From nothing to what is enough even if nothing is ever freed."""
        return iter(range(_needed(prepared.calls, self._scarcity.unit) + self._scarcity.spare))

    def strike(self, ground: Ground, folder: Path, n: int, prepared: Whole) -> Outcome:
        """Leave *n* units, let the run go on, and judge."""
        scarcity = self._scarcity
        started = prepared.disks.start(self._scenario, folder)
        ground.forks.do(scarcity.leave, started.disk, n * scarcity.unit)
        trouble = None if scarcity.below else Trouble(None, scarcity.relieve, (started.disk,))
        shim.give(started.orders, started.run.resolve(), Orders(action=Action.WATCH))
        args = (started.run, started.orders, self._scenario, self.world, self._afterwards, trouble)
        ended = ground.forks.run(runs.live, *args, timeout_s=MOST_S)
        struck = shim.struck(started.orders)
        phase = struck.phase.name if struck.times else NOT_REACHED
        try:
            faults.assert_all_gone(started.orders)
            self._judged(ended, struck, started.run, unseen=scarcity.below)
            if scarcity.below:
                ground.forks.do(scarcity.relieve, started.disk)
            prepared.disks.judge(started, whole=True)
        except AssertionError as error:
            return Outcome(phase, f"{n} left, {struck if struck.times else 'enough'}: {error}")
        return Outcome(phase)


class FileLimit(_Scarce):
    """
    No file may grow beyond so many bytes (RLIMIT_FSIZE): the points are the sizes at which one stops that was to grow.

    Args:
        words: Series and scenario.
        role: Whose files.
    """

    def __init__(self, words: str, role: int) -> None:
        super().__init__("file size limit, real", words, 1)
        self._role = role

    @property
    def name(self) -> str:
        """What it is called in a report."""
        return f"{super().name} | {'writer' if self._role % 2 else 'trainer'}"

    def prepare(self, ground: Ground, folder: Path) -> Any:
        """Let the run go by, and see how far files grow."""
        del folder
        ends = {_end(call) - 1 for call in self._calls(ground) if call.role == self._role}
        # What the trainer is told has to be written down too.
        return sorted(end for end in ends if end > (1024 if self._role == shim.trainer(0) else 0))

    def points(self, prepared: Sequence[Any]) -> Iterator[int]:
        """All sizes."""
        return iter(prepared)

    def strike(self, ground: Ground, folder: Path, n: int, prepared: Any) -> Outcome:
        """Let no file grow beyond *n* bytes."""
        del prepared
        assert self._scenario is not None
        run = ground.past(self._scenario, folder)
        orders = folder / "orders"
        shim.give(orders, run, Orders(action=Action.WATCH))
        trouble = Trouble(runs.limit_files, runs.lift_limit, (orders, self._role, n))
        ended = ground.forks.run(runs.live, run, orders, self._scenario, 1, True, trouble, timeout_s=MOST_S)
        struck = shim.struck(orders)
        phase = struck.phase.name if struck.times else NOT_REACHED
        try:
            faults.assert_all_gone(orders)
            self._judged(ended, struck, run)
            ground.forks.do(runs.judge, run, timeout_s=MOST_S)
        except AssertionError as error:
            return Outcome(phase, f"no file above {n} bytes: {error}")
        shutil.rmtree(folder)
        return Outcome(phase)


def _end(call: Call) -> int:
    if call.kind is Kind.WRITE:
        return call.offset + len(call.data)
    return call.offset if call.kind in (Kind.ALLOCATE, Kind.TRUNCATE) else 0


def _needed(calls: Sequence[Call], unit: int) -> int:
    """Units that are enough even if nothing that goes is freed."""
    names = sum(call.kind in (Kind.CREATE, Kind.MKDIR, Kind.SYMLINK) and not call.flags for call in calls)
    if unit == 1:
        return names + 1
    made = {call.path: 0 for call in calls if call.kind is Kind.CREATE and not call.flags}
    for call in calls:
        if call.path in made:
            made[call.path] = max(made[call.path], _end(call))
    blocks = sum(end // 4096 + 1 for end in made.values()) + sum(call.kind is Kind.MKDIR for call in calls)
    return (blocks + _JOURNAL_GROWS) * 4096 // unit + 1


KINDS = (
    Scarcity("no space, real tmpfs", "tmpfs", 4096, mounts.leave_bytes, mounts.remove_ballast),
    Scarcity("no names, real tmpfs", "tmpfs", 1, mounts.leave_inodes, mounts.remove_ballast),
    Scarcity("no space, real ext4", "ext4", 4096, mounts.leave_bytes, mounts.remove_ballast),
    Scarcity("no names, real ext4", "ext4", 1, mounts.leave_inodes, mounts.remove_ballast),
    Scarcity("no quota, real btrfs", "btrfs", 16384, mounts.leave_quota, mounts.lift_quota, ("btrfs",), spare=12),
    Scarcity(
        "write-back fails, real ext4", "ext4", 4096, mounts.leave_below, mounts.relieve_below, below=True, spare=40
    ),
)


def sweeps() -> list[Sweep]:
    """All of them."""
    runs_of_one = ("dcp first", "dcp steady", "hf steady", "hf overwrite")
    found: list[Sweep] = [FileLimit(words, role) for words in runs_of_one for role in (shim.trainer(0), shim.writer(0))]
    for scarcity in KINDS:
        found += [FullDisk(scarcity, words, 1) for words in runs_of_one]
        found += [FullDisk(scarcity, words, 2) for words in ("dcp overwrite", "hf steady")]
    return found
