"""
Bit rot: every byte of every kind of file of a run, and of its journal, is not what was written any more.

No process dies here. A run that was saved by one rank or two is copied, something in it rots (`rot.damages`),
and the command line tool and a manager are asked: what was committed is found damaged and named, or every
answer is the one it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import crash_run
import rot

from torture.faults import MOST_S, Ground, Outcome

#: The columns of the table.
OUTCOMES = (rot.FOUND, rot.HARMLESS)

#: The run, the row of the table, and what happens to it.
Point = tuple[Path, str, "rot.Damage | rot.JournalDamage"]


class Rot:
    """
    One kind of damage to one series, or to the journal.

    Args:
        fault: What the table calls it.
        words: The series, or ``journal``.
        world: By how many ranks the run was saved and is resumed.
    """

    def __init__(self, fault: str, words: str, world: int) -> None:
        self.fault = fault
        self.words = words
        self.world = world

    @property
    def name(self) -> str:
        """What it is called in a report."""
        return f"{self.fault} | {self.words} | {self.world}"

    @property
    def same(self) -> object:
        """Sweeps of which this is equal can share what `prepare` lists."""
        return ("rot", self.words, self.world)

    def prepare(self, ground: Ground, folder: Path) -> list[Point]:
        """Save a run, and list everything that can happen to it."""
        del folder
        run = ground.once(("rot", self.world), lambda made: self._saved(ground, made / "alpha"))
        if self.words == "journal":
            return [(run, row, damage) for row, damage in rot.journal_damages(run)]
        return [(run, row, damage) for row, damage in rot.damages(run, self.words)]

    def _saved(self, ground: Ground, run: Path) -> Path:
        ground.forks.do(rot.make, run, self.world, timeout_s=MOST_S)
        ground.forks.do(rot.note_answers, run, run.with_name("answers"), timeout_s=MOST_S)
        return run

    def points(self, prepared: Sequence[Point]) -> Iterator[int]:
        """Which of the damages belong to this row."""
        return (n for n, (_, row, _) in enumerate(prepared) if row == self.fault)

    def strike(self, ground: Ground, folder: Path, n: int, prepared: Sequence[Point]) -> Outcome:
        """Let one damage happen to a copy, and judge what is said of it."""
        made, _, damage = prepared[n]
        run = crash_run.copy_of(made, folder)
        try:
            if isinstance(damage, rot.JournalDamage):
                ended = ground.forks.run(rot.rot_journal, run, damage, made.with_name("answers"), timeout_s=MOST_S)
            else:
                ended = ground.forks.run(rot.judge, run, damage, self.world, timeout_s=MOST_S)
        except AssertionError as error:
            return Outcome(rot.FOUND, f"{damage}: {error}")
        if ended.status != 0:
            return Outcome(rot.FOUND, f"{damage}: status {ended.status}\n{ended.output}")
        shutil.rmtree(folder)
        return Outcome(rot.outcome(ended.output) if self.words == "journal" else rot.FOUND)


def sweeps() -> list[Rot]:
    """All of them."""
    found = [Rot(row, "journal", 1) for row in rot.JOURNAL_ROWS]
    for world in (1, 2):
        for series in rot.NAMES:
            found += [Rot(row, series, world) for row in rot.ROWS if series == "hf" or row != "bit rot: index"]
    return [sweep for sweep in found if (sweep.fault, sweep.words) != ("bit rot: .metadata", "hf")]
