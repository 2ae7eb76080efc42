"""
What happens at each move of a soak, decided from the seed alone: every rank, and every life, comes to the same.

A move is one save, and a second one that must commit if the first met a fault. The soak has parts:

    0 %        32 %          48 %                    88 %       100 %
    | restless, | restless     | restful               | restless |
    | 4 deaths  |              | (for the writers)     |          |

Up to 32 % the whole job dies now and then; the trainers' life from there to the end is the one that is
judged. In the restful part nothing ends a writer process, so that one grows old and can be judged too.
"""

from __future__ import annotations

import dataclasses
import random

#: Width of the model by turns; each change of it lays the memory out anew.
WIDTHS = (64, 96, 80, 128)
_MOVES_PER_WIDTH = 37
#: How often each kind of move comes; what is left of 1000 are plain saves.
_ALWAYS = {
    "overwrite": 30,
    "fresh_model": 20,
    "resume": 25,
    "read_export": 15,
    "skip_while_busy": 10,
    "refuse_while_busy": 10,
    "wait_while_busy": 10,
    "failing_hook": 15,
    "slow_rank": 5,
    "raising_state": 15,
    "failing_capture": 15,
    "no_descriptors": 10,
    "disk_error": 40,
    "full_disk": 15,
}
#: Whatever ends a writer process.
_RESTLESS = {
    "idle_writer_killed": 15,
    "writer_killed": 15,
    "writer_killed_and_polled": 10,
    "stopped_writer": 3,
    "reopen": 25,
    "leave_with_error": 10,
    "reopen_on_bad_disk": 10,
}
_RESTLESS_OF_SEVERAL = {"frozen_rank": 10}
_DEATHS = (0.08, 0.16, 0.24, 0.32)
_RESTFUL = (0.48, 0.88)


@dataclasses.dataclass(frozen=True)
class Move:
    """One move: *step* is that of its first save, *victim* the rank that the fault concerns."""

    number: int
    kind: str
    series: str
    width: int
    victim: int
    seed: str

    @property
    def step(self) -> int:
        """Of the first save; a second one has the next."""
        return 2 * self.number

    @property
    def random(self) -> random.Random:
        """For everything else that is left to chance; the same on every rank."""
        return random.Random(self.seed)

    @property
    def is_death(self) -> bool:
        """Whether the processes of this life do not outlive it."""
        return self.kind in ("death_of_all", "death_of_one")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A soak of *moves* moves on *world* ranks; with *one_life*, nobody dies and writers have no rest."""

    seed: int
    moves: int
    world: int
    one_life: bool = False

    @property
    def deaths(self) -> tuple[int, ...]:
        """The moves that end a life; a short soak has one."""
        if self.one_life:
            return ()
        return tuple(int(part * self.moves) for part in (_DEATHS if self.moves >= 1000 else _DEATHS[1:2]))

    def move(self, number: int) -> Move:
        """The move of that number, from 0."""
        seed = f"{self.seed} {number}"
        chance = random.Random(seed)
        victim = chance.randrange(self.world)
        series = chance.choices(("dcp", "hf"), (3, 2))[0]
        kinds = dict(_ALWAYS)
        if self.one_life or not _RESTFUL[0] <= number / self.moves < _RESTFUL[1]:
            kinds |= _RESTLESS | (_RESTLESS_OF_SEVERAL if self.world > 1 else {})
        (kind,) = chance.choices((*kinds, "plain"), (*kinds.values(), 1000 - sum(kinds.values())))
        if number in self.deaths:
            kind = "death_of_one" if self.world > 1 and number == self.deaths[-1] else "death_of_all"
        width = WIDTHS[number // _MOVES_PER_WIDTH % len(WIDTHS)]
        return Move(number, kind, series, width, victim, f"{seed} more")
