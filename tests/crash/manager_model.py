"""
What a manager must do, in a few lines: who is COMMITTED, what may be deleted, what is resumed.

It knows nothing of directories, epochs or transactions: a save is an attempt that is acknowledged or not,
and what it lets go is counted out here once more, by other code than the product's.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import crash_run
from child_process import AtEffect, arm

from ckptmgr.manager import CheckpointManager
from ckptmgr.retention import KeepAll, KeepBest, KeepEvery, KeepLast, KeepRule
from ckptmgr.series import Series
from ckptmgr.writers.dcp import DCP
from ckptmgr.writers.huggingface import HuggingFace
from ckptmgr.writers.state import PerRank

FOLDER = {"dcp": "step", "hf": "hf"}
#: The policies, as the product is told.
KEEP: dict[str, KeepRule] = {
    "all": KeepAll(),
    "last": KeepLast(1),
    "last two": KeepLast(2),
    "even or last": KeepEvery(2) | KeepLast(1),
    "best": KeepBest(1, "loss"),
}


@dataclasses.dataclass
class Attempt:
    """
    One call of save that got as far as a row.

    *gen* tells every two apart. *committed* is its number among the commits, None where it FAILED. *live*: neither
    replaced nor let go. *damaged*: somebody has changed a file of it.
    """

    series: str
    step: int
    gen: int
    loss: float | None
    committed: int | None = None
    live: bool = False
    damaged: bool = False

    @property
    def directory(self) -> str:
        return f"{self.series}/{FOLDER[self.series]}-{self.step}"

    @property
    def metrics(self) -> dict[str, float]:
        return {"gen": self.gen} | ({} if self.loss is None else {"loss": self.loss})


class Model:
    """All attempts so far, in the order in which they began, and the steps that are pinned."""

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.pins: set[tuple[str, int]] = set()
        self._commits = 0

    def of(self, series: str) -> list[Attempt]:
        return [one for one in self.attempts if one.series == series]

    def live(self, series: str) -> list[Attempt]:
        """What is listed, oldest first."""
        return sorted((one for one in self.of(series) if one.live), key=lambda one: one.committed or 0)

    def at(self, series: str, step: int) -> Attempt | None:
        return next((one for one in self.live(series) if one.step == step), None)

    def fail(self, attempt: Attempt) -> None:
        """It has a row, and is FAILED."""
        self.attempts.append(attempt)

    def commit(self, attempt: Attempt, keep: str) -> None:
        """It is COMMITTED; what it replaces and what nothing keeps is let go."""
        self._commits += 1
        attempt.committed, attempt.live = self._commits, True
        if replaced := self.at(attempt.series, attempt.step):
            replaced.live = False
        self.attempts.append(attempt)
        for one in self.let_go(attempt.series, keep):
            one.live = False

    def let_go(self, series: str, keep: str) -> list[Attempt]:
        """What a policy lets go now."""
        live = self.live(series)
        scored = [one for one in reversed(live) if one.loss is not None]
        wanted = {
            "all": live,
            "last": live[-1:],
            "last two": live[-2:],
            "even or last": [one for one in live if one.step % 2 == 0],
            "best": [min(scored, key=lambda one: one.loss or 0.0)] if scored else [],
        }[keep]
        stays = [*wanted, *live[-1:], *(one for one in live if (series, one.step) in self.pins)]
        return [one for one in live if one not in stays]

    def resumes(self, series: str, *, step: int | None = None, older: bool = False) -> Attempt | None:
        """What resuming loads: the newest, or this step, if it is whole; else an older one where that will do."""
        asked = [one for one in reversed(self.live(series)) if step in (None, one.step)]
        whole = [one for one in asked if not one.damaged]
        return whole[0] if whole and (older or whole[0] is asked[0]) else None


def opened(run: Path, keep: dict[str, str], **options: Any) -> CheckpointManager:
    """A manager of the run with one policy for each series."""
    formats = {"dcp": DCP, "hf": lambda: HuggingFace(assets=crash_run.assets(run), max_shard_size=80)}
    return CheckpointManager(
        run,
        series=[Series(name, formats[name](), keep=KEEP[rule]) for name, rule in keep.items()],
        timeouts=crash_run.PATIENCE,
        writers=crash_run.WriterOptions(nice=0, write_slots=0),
        **options,
    )


def save_and_die(run: Path, keep: dict[str, str], attempt: Attempt, at: AtEffect) -> None:
    """In a child: open the run, save, replace what is there, say when it is acknowledged; and die on the way."""
    arm(at, run)
    with opened(run, keep) as manager:
        state = crash_run.state(attempt.series, attempt.step, attempt.gen)
        pending = manager.save(attempt.step, state, attempt.series, metrics=attempt.metrics, overwrite=True)
        assert pending is not None
        pending.wait()
        print("acknowledged", flush=True)


def recover_and_die(run: Path, keep: dict[str, str], at: AtEffect) -> None:
    """In a child: open the run and close it, and die on the way."""
    arm(at, run)
    opened(run, keep).close()


def empty_state() -> dict[str, Any]:
    """What is resumed into."""
    return {"model": crash_run.module(0, 0), "at": None, "loader": PerRank({}, when_resized="skip")}


def loaded(state: dict[str, Any]) -> list[Any]:
    """Everything in a state, to compare."""
    return [[tensor.tolist() for tensor in state["model"].parameters()], state["at"], state["loader"].value]
