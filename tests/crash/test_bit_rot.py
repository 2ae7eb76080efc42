"""What rots on disk is found and named, by commands and by `resume`; some of what `make torture` tries in full."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import crash_run
import pytest
import rot
from child_process import ForkServer

#: The series whose checkpoints are resumed, and the exports.
SERIES = ("checkpoint", "hf")


@pytest.fixture(scope="module")
def saved(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A run that was saved on so many ranks, made once."""
    made: dict[int, Path] = {}

    def get(world: int) -> Path:
        if world not in made:
            made[world] = tmp_path_factory.mktemp("rot") / "alpha"
            forks.do(rot.make, made[world], world, timeout_s=90)
        return made[world]

    return get


@pytest.fixture(scope="module")
def answers(forks: ForkServer, saved: Callable[[int], Path]) -> Path:
    """Where it is written down what the commands say of the run that nothing has happened to."""
    path = saved(1).with_name("answers")
    forks.do(rot.note_answers, saved(1), path)
    return path


def some(run: Path, series: str, row: str, each: int = 1) -> list[rot.Damage]:
    """Damages of a row, the same ones each time; one or more of every way there is."""
    by_way: dict[str, list[rot.Damage]] = {}
    for of, damage in rot.damages(run, series):
        if of == row:
            by_way.setdefault(damage.how, []).append(damage)
    picked = random.Random(row)
    return [one for ways in by_way.values() for one in picked.sample(ways, min(each, len(ways)))]


def rows(series: str) -> list[str]:
    lacks = "bit rot: index" if series == "checkpoint" else "bit rot: .metadata"
    return [row for row in rot.ROWS if row != lacks]


@pytest.mark.slow
@pytest.mark.parametrize(("series", "row"), [(series, row) for series in SERIES for row in rows(series)])
def test_what_rots_in_a_checkpoint_is_found_and_named(forks, saved, tmp_path: Path, series: str, row: str):
    damages = some(saved(1), series, row)
    for number, damage in enumerate(damages):
        forks.do(rot.judge, crash_run.copy_of(saved(1), tmp_path / str(number)), damage)

    assert damages


@pytest.mark.slow
@pytest.mark.parametrize("row", ["bit rot: shard data", "bit rot: sidecars", "bit rot: .metadata"])
def test_two_ranks_resume_nothing_that_rots(forks, saved, tmp_path: Path, row: str):
    (damage,) = some(saved(2), "checkpoint", row)
    forks.do(rot.judge, crash_run.copy_of(saved(2), tmp_path / "copy"), damage, 2)


@pytest.mark.slow
@pytest.mark.parametrize("row", rot.JOURNAL_ROWS)
def test_a_journal_that_rots_is_found_or_says_what_it_said(forks, saved, answers, tmp_path: Path, row: str):
    found = [damage for of, damage in rot.journal_damages(saved(1)) if of == row]
    for number, damage in enumerate(random.Random(row).sample(found, min(3, len(found)))):
        forks.do(rot.rot_journal, crash_run.copy_of(saved(1), tmp_path / str(number)), damage, answers)

    assert found


def test_rows_that_rot_under_a_manager_commit_and_delete_nothing(forks, saved, tmp_path: Path):
    forks.do(rot.damage_while_open, crash_run.copy_of(saved(1), tmp_path / "copy"))
