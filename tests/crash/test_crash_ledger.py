"""Every row of the crash ledger: die exactly there, look at what is left, start again, and again."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import crash_run
import pytest
from child_process import CRASHED, KILLED, AtEffect, comments
from crash_run import NAMES, as_left, copy_of, scenario_of, scenarios
from ledger import ADOPTING, ASKED, PRUNING, REBUILDING, RECOVERING, SAVING, TOO_LATE, Left, Twice

import ckptmgr
from ckptmgr.lifecycle import CheckpointRecord
from ckptmgr.recovery import Found
from ckptmgr.rundir import RunDirectory

DOCS = Path(__file__).parents[2] / "docs" / "explanation"


PACKAGE = Path(ckptmgr.__file__).parent


def label(row: Left | Twice) -> str:
    words = "-".join("".join(c for c in word if c.isalnum()) for word in row.at.comment.split())
    return f"{words}-{row.scenario}".replace(" ", "-") if isinstance(row, Twice) else words


def test_every_crash_comment_has_a_row_and_every_row_a_comment():
    there = comments(PACKAGE)
    rows = (row.at for row in (*SAVING, *RECOVERING))
    told = [at.comment for at in (*rows, *REBUILDING, *PRUNING, *ASKED, *TOO_LATE, *(at for at, *_ in ADOPTING))]

    assert [text for text in there if not any(text.startswith(start) for start in told)] == []
    for start in told:
        assert len([text for text in there if text.startswith(start)]) == 1, start


def test_the_crash_ledger_page_tells_every_comment():
    page = " ".join((DOCS / "crash-ledger.md").read_text().split())

    assert [text for text in comments(PACKAGE) if text.partition(";")[0].rstrip(".") not in page] == []


def find(run: Path) -> list[Found]:
    return RunDirectory(run).listing(NAMES)


def where(record: CheckpointRecord, found: list[Found], newest: CheckpointRecord) -> str:
    """Where an attempt's directory stands."""
    places = {
        record.directory: "final",
        record.retired_directory: "retired",
        newest.staging_directory: "staging" if record.id == newest.id else "the new one's staging",
    }
    names = [
        places[item.path]
        for item in found
        if item.path in places
        and (item.holds == record.id or (item.path == record.staging_directory and item.holds is None))
    ]
    assert len(names) <= 1, names
    return names[0] if names else "nowhere"


@pytest.mark.parametrize("row", SAVING, ids=label)
def test_crash_while_saving(forks, prepared, tmp_path, row: Left):
    def live_through(scenario: str) -> None:
        facts = scenario_of(scenario)
        run = prepared(facts, tmp_path / scenario)
        # That it fails first: its first file cannot be created.
        faults = (AtEffect(1, error=errno.EIO, in_writer=True),) if row.fails else ()
        forks.crash(
            crash_run.crash_while_saving, run, facts, row.at, *faults, by=KILLED if row.at.in_writer else CRASHED
        )
        rows, _ = as_left(run)
        new, found = rows[-1], find(run)

        assert new.state == row.state
        assert where(new, found, new) == row.new
        if facts.before:
            old = rows[0]
            assert old.state == "COMMITTED"
            assert where(old, found, new) == row.old.get(scenario.split()[1], "final")

        forks.do(crash_run.check, run, True)
        recovered = as_left(run)[0][new.id - 1]
        assert recovered.state == row.then
        assert bool(recovered.reason) == (row.then == "FAILED")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(live_through, row.scenarios))


@pytest.mark.parametrize("row", RECOVERING, ids=label)
def test_crash_while_recovering(forks, prepared, tmp_path, row: Twice):
    facts = scenario_of(row.scenario)
    run = prepared(facts, tmp_path / "run")
    forks.crash(crash_run.crash_while_saving, run, facts, row.first)
    new = as_left(run)[0][-1]
    if row.damage:
        folder = run / (new.directory if row.damage == "final" else new.staging_directory)
        victim = next(path for path in sorted(folder.iterdir()) if path.name.startswith(("__0_0", "model-00002")))
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
    uninterrupted = copy_of(run, tmp_path / "uninterrupted")
    forks.crash(crash_run.crash_while_recovering, run, row.at)
    crash_run.recover_alone(uninterrupted)
    interrupted = copy_of(run, tmp_path / "interrupted")
    crash_run.recover_alone(interrupted)

    assert as_left(interrupted)[1] == as_left(uninterrupted)[1]
    forks.do(crash_run.check, run, True, bool(row.damage))

    assert as_left(run)[0][new.id - 1].state == row.then


@pytest.mark.parametrize("crash", [*TOO_LATE, None], ids=["crash", "no crash"])
def test_a_manager_that_comes_too_late_deletes_nothing_live(forks, prepared, tmp_path, crash):
    overwrite = scenarios("dcp")["overwrite"]
    run = prepared(overwrite, tmp_path / "run")
    forks.do(crash_run.train, run, overwrite.now)
    if crash is None:
        forks.do(crash_run.retire_too_late, run)
    else:
        forks.crash(crash_run.retire_too_late, run, crash)
    rows, names = as_left(run)

    assert rows[1].is_live
    assert names == {rows[1].directory if crash is None else rows[0].retired_directory}
    forks.do(crash_run.check, run, True)
