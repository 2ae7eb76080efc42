"""What is not ours stays, whatever a save, an overwrite or a recovery has to do at its name."""

from __future__ import annotations

from pathlib import Path

import crash_run
import pytest
from child_process import AtComment
from crash_run import scenarios


def precious(run: Path) -> list[str]:
    return [path.read_text() for path in sorted(run.parent.rglob("precious.txt"))]


def put_a_stranger_at(directory: Path) -> None:
    directory.mkdir()
    (directory / "precious.txt").write_text("somebody's work")


@pytest.mark.parametrize("how", ["overwrite", "overwrite-aside"])
def test_an_overwrite_does_not_delete_what_stands_at_the_old_ones_name(forks, prepared, tmp_path, how):
    """Somebody moved the committed directory away and put another there."""
    scenario = scenarios("dcp")[how]
    run = prepared(scenario, tmp_path / "run")
    (run / "dcp" / "step-1").rename(run.parent / "moved away")
    put_a_stranger_at(run / "dcp" / "step-1")
    forks.do(crash_run.save_in_trouble, run, scenario)

    assert precious(run) == ["somebody's work"]


def test_a_first_save_does_not_replace_what_stands_at_its_name(forks, prepared, tmp_path):
    scenario = scenarios("dcp")["first"]
    run = prepared(scenario, tmp_path / "run")
    (run / "dcp").mkdir()
    put_a_stranger_at(run / "dcp" / "step-1")
    forks.do(crash_run.save_in_trouble, run, scenario)

    assert precious(run) == ["somebody's work"]
    assert [word for word, *_ in crash_run.notes(run)] == ["begun", "failed", "acknowledged"]


@pytest.mark.parametrize("how", ["first", "overwrite", "overwrite-aside"])
def test_recovery_does_not_replace_what_came_to_stand_at_a_final_name(forks, prepared, tmp_path, how):
    scenario = scenarios("hf")[how]
    run = prepared(scenario, tmp_path / "run")
    forks.crash(crash_run.crash_while_saving, run, scenario, AtComment("GATHERED with a complete"))
    if (run / "hf" / "hf-1").exists():
        (run / "hf" / "hf-1").rename(run.parent / "moved away")
    (run / "hf").mkdir(exist_ok=True)
    put_a_stranger_at(run / "hf" / "hf-1")
    forks.do(crash_run.recover_once, run)

    assert precious(run) == ["somebody's work"]
