"""A prune that dies on the way, here or in the manager that was asked for it; and a manager that was told of damage."""

from __future__ import annotations

import json
from pathlib import Path

import crash_run
import pytest
from child_process import AtComment
from crash_run import Save, Scenario, as_left, copy_of
from ledger import ASKED, PRUNING
from test_crash_sweep import Sweep, chosen

from ckptmgr import requests
from ckptmgr.journal import Journal
from ckptmgr.rundir import RunDirectory

KEPT = Scenario((Save("dcp", 1), Save("dcp", 2), Save("dcp", 3), Save("hf", 3)), (), keep=5)


@pytest.fixture
def kept(prepared, tmp_path) -> Path:
    """Three checkpoints, of which two are to go, and an export."""
    return prepared(KEPT, tmp_path / "run")


def fates(run: Path) -> dict[tuple[str, int], str]:
    """What the journal says of each checkpoint."""
    return {
        (row.series, row.step): "live" if row.is_live else "retiring" if row.retired_at is None else "retired"
        for row in as_left(run)[0]
    }


@pytest.mark.parametrize(
    ("function", "at"),
    [
        *((crash_run.prune, at) for at in PRUNING),
        *((crash_run.prune_by_asking, at) for at in ASKED),
    ],
    ids=lambda each: each.comment.replace(" ", "-") if isinstance(each, AtComment) else each.__name__,
)
def test_a_prune_that_died_is_finished_by_recovery(forks, kept: Path, function, at: AtComment):
    forks.crash(function, kept, at)
    left = fates(kept)

    assert (left["dcp", 3], left["hf", 3]) == ("live", "live")
    assert {left["dcp", 1], left["dcp", 2]} <= {"retiring", "retired"}
    assert "retiring" in (left["dcp", 1], left["dcp", 2])
    recovered = copy_of(kept, kept.parent.with_name("recovered"))
    crash_run.recover_alone(recovered)
    assert fates(recovered) == {("dcp", 1): "retired", ("dcp", 2): "retired", ("dcp", 3): "live", ("hf", 3): "live"}
    assert as_left(recovered)[1] == {"dcp/step-3", "hf/hf-3", "hf/hf-latest"}

    forks.do(crash_run.check, kept, True)
    assert not list((kept / requests.DIRECTORY).glob("*.taken"))


def test_a_prune_that_nothing_stops_leaves_the_newest(forks, kept: Path):
    asked = copy_of(kept, kept.parent.with_name("asked"))
    forks.do(crash_run.prune, kept)
    forks.do(crash_run.prune_by_asking, asked)

    assert fates(kept) == fates(asked)
    for run in (kept, asked):
        assert json.loads((run / "meta.json").read_text())["dcp_list"] == ["dcp/step-3"]
        forks.do(crash_run.check, run, True)


def test_what_a_manager_was_told_of_damage_stays_known_when_it_dies_before_it_says_so(forks, kept: Path):
    forks.crash(crash_run.verify_by_asking, kept, ASKED[-1])
    assert list((kept / requests.DIRECTORY).glob("*.taken"))
    forks.do(crash_run.recover_once, kept)

    with Journal.open_read_only(RunDirectory(kept).journal_path, whole=True) as journal:
        found = {id: (one.ok, one.mismatches) for id, one in journal.newest_verifications(range(1, 5)).items()}
    assert found == {1: (True, ()), 3: (False, ("digest: a",))}
    assert not list((kept / requests.DIRECTORY).iterdir())


@pytest.mark.timeout(600)
def test_die_before_every_change_of_a_prune(forks, prepared, tmp_path):
    sweep = Sweep(forks, crash_run.prune, lambda to: prepared(KEPT, to), tmp_path)
    effects = sweep.effects()

    assert len(effects) >= 15
    sweep.die_before_each(chosen(effects, 12))
