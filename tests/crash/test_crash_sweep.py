"""
Die before every single change that a run makes, in the trainer and in its writer; then while recovering from that.

A sweep first lets the run go by and writes down its changes, then repeats it once for each change and
dies before it. By default a fixed choice of them is tried, each kind of change at least once in some
sweep; ``CKPTMGR_FULL_SWEEP=1`` tries all.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import crash_run
import pytest
from child_process import CRASHED, KILLED, AtComment, AtEffect, Effect, ForkServer, read_trace
from crash_run import Save, Scenario, copy_of, scenarios

FULL = os.environ.get("CKPTMGR_FULL_SWEEP") == "1"

#: Three saves of which the older ones go, one that is replaced, and an export.
WHOLE_RUN = Scenario(
    (),
    (Save("dcp", 1), Save("dcp", 2), Save("dcp", 3), Save("dcp", 3, gen=1, overwrite=True), Save("hf", 3)),
)


def kind(effect: Effect) -> str:
    """What an effect does to what sort of name, whatever the numbers in it."""
    return f"{effect.name} {re.sub('[0-9]+', '#', effect.where)}"


def chosen(effects: Sequence[Effect], most: int) -> list[Effect]:
    """All of them in a full sweep; else the last of each kind, and of those *most*, spread evenly."""
    if FULL:
        return list(effects)
    kinds = sorted({kind(effect): effect for effect in effects}.values(), key=lambda effect: effect.nth)
    return [kinds[round(n * (len(kinds) - 1) / (most - 1))] for n in range(most)] if most < len(kinds) else kinds


class Sweep:
    """
    One thing that a child does to a run, again and again.

    Args:
        forks: Where children come from.
        function: Called in a child with a run, *args* and a place to die.
        start: Puts a run to start from at a place.
        folder: Where the runs go.
    """

    def __init__(
        self, forks: ForkServer, function: Callable[..., None], start: Callable[[Path], Path], folder: Path, *args
    ):
        self._forks = forks
        self._function = function
        self._start = start
        self._folder = folder
        self._args = args

    def effects(self, *, in_writer: bool = False) -> list[Effect]:
        """Let it happen; what was changed, in order."""
        run = self._start(self._folder / f"whole-{in_writer}")
        trace = self._folder / f"trace-{in_writer}"
        self._forks.do(self._function, run, *self._args, AtEffect(0, trace=str(trace), in_writer=in_writer))
        return read_trace(trace)

    def die_before_each(self, effects: Sequence[Effect], *, in_writer: bool = False) -> None:
        """Die before each of *effects*, start again, and see that everything holds."""

        def die_before(effect: Effect) -> None:
            run = self._start(self._folder / f"{effect.nth}-{in_writer}")
            at = AtEffect(effect.nth, in_writer=in_writer)
            try:
                self._forks.crash(self._function, run, *self._args, at, by=KILLED if in_writer else CRASHED)
                self._forks.do(crash_run.check, run)
            except AssertionError as error:
                error.add_note(f"died before {effect}")
                raise
            shutil.rmtree(run.parent)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(die_before, effects))


@pytest.mark.timeout(3600 if FULL else 120)
@pytest.mark.parametrize("in_writer", [False, True], ids=["trainer", "writer"])
@pytest.mark.parametrize(
    ("scenario", "most"),
    [
        pytest.param(WHOLE_RUN, 10, id="whole-run"),
        *(
            pytest.param(scenario, 0, id=f"{series}-{how}")
            for series in crash_run.NAMES
            for how, scenario in scenarios(series).items()
            if FULL
        ),
    ],
)
def test_die_before_every_change_of_a_save(forks, prepared, tmp_path, scenario: Scenario, most: int, in_writer: bool):
    sweep = Sweep(forks, crash_run.crash_while_saving, lambda to: prepared(scenario, to), tmp_path, scenario)
    effects = sweep.effects(in_writer=in_writer)

    assert len(effects) >= (9 if in_writer else 20)
    sweep.die_before_each(chosen(effects, most // 2 if in_writer else most), in_writer=in_writer)


@pytest.mark.timeout(3600 if FULL else 120)
@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("hf steady", "WRITING with a durable manifest"),
        ("dcp overwrite", "GATHERED with a complete"),
        ("dcp overwrite", "GATHERED with a published directory"),
        ("dcp overwrite-aside", "GATHERED with a complete"),
        ("hf overwrite-aside", "GATHERED with the old"),
        ("hf steady", "GATHERED with a complete"),
        ("dcp steady", "COMMITTED and retiring"),
        ("hf overwrite", "COMMITTED with a stale"),
    ],
)
def test_die_before_every_change_of_a_recovery(forks, prepared, tmp_path, words: str, first: str):
    series, how = words.split()
    scenario = scenarios(series)[how]
    left = prepared(scenario, tmp_path / "left")
    forks.crash(crash_run.crash_while_saving, left, scenario, AtComment(first))

    def start(to: Path) -> Path:
        return copy_of(left, to)

    function = crash_run.recover_without_exchange if how == "overwrite-aside" else crash_run.crash_while_recovering
    sweep = Sweep(forks, function, start, tmp_path)
    effects = sweep.effects()

    assert len(effects) >= 5
    # The first ones take the lock, the last one ends the epoch.
    sweep.die_before_each(chosen([effect for effect in effects if effect.name != "pwrite" or FULL][2:-1], 3))


def test_a_crash_while_the_run_is_created_leaves_nothing_in_the_way(forks, tmp_path):
    sweep = Sweep(forks, crash_run.crash_while_creating, lambda to: to / "runs" / "alpha", tmp_path)
    effects = sweep.effects()

    assert len(effects) >= 8
    sweep.die_before_each(chosen(effects, 6))
