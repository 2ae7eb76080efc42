"""An adoption that dies on the way: what it leaves, what recovery makes of it, and the same command again."""

from __future__ import annotations

import errno
from pathlib import Path

import crash_run
import pytest
from child_process import AtComment, AtEffect
from crash_run import Save, Scenario, copy_of
from ledger import ADOPTING

from ckptmgr.cli import main
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import CheckpointRecord
from ckptmgr.rundir import RunDirectory

KEPT = Scenario((Save("dcp", 1), Save("dcp", 2), Save("dcp", 3)), (), keep=5)


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def as_left(run: Path) -> tuple[list[CheckpointRecord], set[str]]:
    rundir = RunDirectory(run)
    with Journal.open(rundir.journal_path) as journal:
        return journal.checkpoints(), {item.path for item in rundir.listing(["checkpoint"])}


@pytest.mark.parametrize(("at", "state", "where"), ADOPTING, ids=lambda each: getattr(each, "comment", str(each)))
def test_an_adoption_that_died_goes_on(forks, prepared, tmp_path: Path, at: AtComment, state: str, where: str):
    run = prepared(KEPT, tmp_path / "alpha")
    before = everything(run)
    # That it fails first: its staging directory gets no second file.
    faults = (AtEffect(16, error=errno.EIO),) if "failed" in at.comment else ()
    forks.crash(crash_run.adopt, run, at, *faults)
    new = run.with_name("new")
    rows, there = as_left(new)

    assert rows[-1].state == state
    places = {"staging": rows[-1].staging_directory, "final": rows[-1].directory}
    assert {name for name in places if places[name] in there} == ({where} - {"nowhere"})
    assert everything(run) == before

    recovered = copy_of(new, tmp_path.with_name(tmp_path.name + "-recovered"))
    assert main(["recover", str(recovered), "--apply"]) == 0
    rows, there = as_left(recovered)
    assert rows[-1].state == ("COMMITTED" if state == "GATHERED" else "FAILED")
    assert there == {row.directory for row in rows if row.is_live}

    forks.do(crash_run.adopt, run)
    rows, there = as_left(new)
    assert [row.step for row in rows if row.is_live] == [1, 2, 3]
    assert there == {row.directory for row in rows if row.is_live}
    assert main(["check", str(new), "--deep"]) == 0
    assert everything(run) == before
