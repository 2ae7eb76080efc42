"""The soak in small: nothing grows, what is planted is found, and the judge can tell one from the other."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from child_process import Ended
from soak import plants
from soak.__main__ import judge_run, verdicts
from soak.judge import Tolerance, judge, table
from soak.plan import Plan

Soak = Callable[..., Ended]
#: Measures that stay as they are from the first saves on, on every machine.
CONSTANT = [
    "trainer: descriptors", "trainer: sockets", "trainer: memfds", "trainer: threads", "trainer: children",
    "trainer: zombies", "trainer: dev shm entries", "trainer: loggers", "run: transactions", "run: leftovers",
    "run: free pages",
]  # fmt: skip
#: Those that differ a little from save to save.
NEARLY = ["run: vm steps dcp", "run: vm steps hf", "run: records read"]


# --- the judge ---------------------------------------------------------------------------------


def noisy(slope: float, *, values: int = 60, noise: float = 1.0, start: float = 100.0) -> list[tuple[float, float]]:
    chance = random.Random(7)
    return [(10 * n, start + slope * 10 * n / 1000 + chance.gauss(0, noise)) for n in range(values)]


@pytest.mark.parametrize("slope", [0.0, -50.0, 8.0])
def test_noise_shrinking_and_what_is_tolerated_are_no_growth(slope: float) -> None:
    found = judge("m", noisy(slope), Tolerance(10))

    assert found is not None
    assert not found.grows
    assert found.slope == pytest.approx(slope, abs=3)


@pytest.mark.parametrize("slope", [12.0, 100.0, 10_000.0])
def test_growth_is_found_under_noise(slope: float) -> None:
    found = judge("m", noisy(slope), Tolerance(10))

    assert found is not None
    assert found.grows
    assert found.last > found.first


def test_what_grows_in_the_beginning_is_warming_up() -> None:
    points = [(at, min(value, 100 + 10 * at)) for at, value in noisy(0)]
    points[:5] = [(at, 20.0 * at) for at, _ in points[:5]]
    found = judge("m", points, Tolerance(1))

    assert found is not None
    assert not found.grows


def test_a_few_wild_values_are_no_growth() -> None:
    points = noisy(0)
    points[-4:] = [(at, 5000.0) for at, _ in points[-4:]]
    found = judge("m", points, Tolerance(1))

    assert found is not None
    assert not found.grows


def test_one_more_every_hundred_saves_is_found_in_a_measure_that_is_counted() -> None:
    found = judge("m", [(10 * n, 11.0 + n // 10) for n in range(60)], Tolerance(1.0))

    assert found is not None
    assert found.grows


def test_a_tolerance_may_be_a_part_of_the_first_value() -> None:
    grown = judge("m", noisy(150, start=1000), Tolerance(1, relative=0.1))
    even = judge("m", noisy(50, start=1000), Tolerance(1, relative=0.1))

    assert grown is not None
    assert even is not None
    assert (grown.grows, even.grows) == (True, False)
    assert "**grows**" in table([grown])
    assert "no growth" in table([even])


def test_too_few_values_are_no_verdict() -> None:
    assert judge("m", noisy(1000, values=8), Tolerance(1)) is None


# --- the plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 4])
def test_everything_happens_in_a_soak_and_the_same_whoever_asks(world: int) -> None:
    plan = Plan(1, 3000, world)
    moves = [plan.move(number) for number in range(plan.moves)]
    kinds = Counter(move.kind for move in moves)

    assert moves == [Plan(1, 3000, world).move(number) for number in range(plan.moves)]
    assert moves != [Plan(2, 3000, world).move(number) for number in range(plan.moves)]
    assert kinds["plain"] > 1500
    assert kinds["death_of_all"] == (4 if world == 1 else 3)
    assert kinds["death_of_one"] == (0 if world == 1 else 1)
    assert (kinds["frozen_rank"] > 0) == (world > 1)
    assert min(kinds[kind] for kind in kinds if not kind.startswith("death")) >= 3
    assert {move.victim for move in moves} == set(range(world))
    assert {move.series for move in moves} == {"dcp", "hf"}
    assert len({move.width for move in moves}) == 4


def test_nothing_ends_a_writer_in_the_restful_part() -> None:
    plan = Plan(1, 3000, 4)
    kinds = {plan.move(number).kind for number in range(1440, 2640)}

    assert not kinds & {"idle_writer_killed", "writer_killed", "stopped_writer", "reopen", "frozen_rank"}
    assert {"disk_error", "raising_state", "failing_hook"} < kinds


# --- the soak ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)  # on a busy machine; 15 s on an idle one
def test_nothing_grows_in_a_short_soak(soak: Soak, tmp_path: Path) -> None:
    """Errors of the disk, dead writers, states that raise, hooks that fail, managers closed and opened."""
    ended = soak(tmp_path, 150, seed=387)
    assert ended.status == 0, ended.output
    judge_run(tmp_path)
    found = {one.measure: one for one in verdicts(tmp_path)}

    more = {name: one for name, one in found.items() if name in CONSTANT and one.last > one.first}
    assert more == {}
    assert {name: found[name] for name in NEARLY if not 0 < found[name].last <= 1.1 * found[name].first} == {}
    assert (found["trainer: children"].last, found["trainer: zombies"].last) == (1, 0)


@pytest.mark.timeout(300)
def test_planted_leaks_are_found_one_and_all(soak: Soak, tmp_path: Path) -> None:
    found_by = {
        "descriptor": "trainer: descriptors",
        "thread": "trainer: threads",
        "arena": "trainer: memfds",
        "rows": "run: vm steps dcp",
        "zombie": "trainer: zombies",
        "file": "run: leftovers",
        "memory": "trainer: python objects",
    }
    assert found_by.keys() == plants.PLANTS.keys()
    ended = soak(tmp_path, 75, seed=120, plant=list(found_by))
    assert ended.status == 0, ended.output
    grown = {one.measure for one in verdicts(tmp_path) if one.grows}

    assert set(found_by.values()) <= grown
