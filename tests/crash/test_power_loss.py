"""
The commit order against a power cut, at every moment of a save, a failure, a deletion and a recovery.

Each test writes down every change that trainer and writer make, plays it on a model that forgets
whatever was not synced, and asks at each step of the journal whether the disk can answer for it.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path

import crash_run
import pytest
from child_process import CRASHED, AtComment, AtEffect, Effect, ForkServer, read_trace
from crash_run import NAMES, as_left, scenarios
from power_loss import Disk

from ckptmgr.lifecycle import CheckpointRecord

CASES = [(series, how) for series in NAMES for how in ("first", "steady", "overwrite", "overwrite-aside")]


def traced(
    forks: ForkServer,
    start: Callable[[Path], Path],
    tmp_path: Path,
    function: str,
    *args: object,
    writer_fails: int = 0,
) -> tuple[Disk, list[Effect], Path]:
    """Run *function* with a trace of both processes in one file; the disk before, the effects, and the run."""
    run = start(tmp_path / "run")
    before = Disk(run.parent)
    trace = str(tmp_path / "trace")
    error = errno.EIO if writer_fails else None
    writer = AtEffect(writer_fails, error=error, trace=trace, in_writer=True)
    forks.do(crash_run.with_trace, run, function, args, AtEffect(0, trace=trace), writer)
    return before, read_trace(Path(trace)), run


def play(
    disk: Disk, effects: list[Effect], at_journal: Callable[[str], None], at_each: Callable[[], None] = lambda: None
):
    """
    Play all effects; before each journal transaction *at_journal* hears of it, before anything *at_each*.

    Nothing is ever deleted from a directory that a power cut would bring back under a published name.
    """
    for effect in effects:
        at_each()
        if effect.name == "remove" and (match := re.match(r"(/alpha/\w+/[^/]+)/", effect.where)):
            folder = disk.at(match[1])
            assert folder is not None
            back = [name for name in disk.names_after_power_loss(folder) if re.search(r"/(step|hf)-\d+$", name)]
            assert back == [], f"half of it would come back: {effect}"
        if effect.name.startswith("journal."):
            at_journal(effect.name + effect.where.replace("/alpha", ""))
        else:
            disk.play(effect)


def durable_under(disk: Disk, path: str) -> list[str]:
    return disk.lost(f"alpha/{path}")


@pytest.mark.parametrize(("series", "how"), CASES)
def test_the_disk_can_answer_for_every_state_of_a_save(forks, prepared, tmp_path, series, how):
    scenario = scenarios(series)[how]
    disk, effects, run = traced(forks, lambda to: prepared(scenario, to), tmp_path, "crash_while_saving", scenario)
    rows = as_left(run)[0]
    new, old = rows[-1], rows[0] if scenario.before else None
    manifest = f"alpha/{new.staging_directory}/ckptmgr.json"
    node_of_old = disk.at(f"alpha/{old.directory}") if old else None
    said: list[str] = []
    projected: list[object] = []

    def journal(what: str) -> None:
        said.append(what)
        if what == "journal.begin":
            projected.extend(projections(disk))
        elif what == "journal.advance to WRITING":
            staging = f"alpha/{new.staging_directory}"
            assert disk.after_power_loss(staging) is disk.at(staging)
        elif what == "journal.advance to GATHERED":
            assert disk.at(manifest) is not None
            assert durable_under(disk, new.staging_directory) == []
        elif what == "journal.advance to COMMITTED":
            assert durable_under(disk, new.directory) == []
        elif what == "journal.finish_retirement":
            assert disk.names_after_power_loss(node_of_old) == []

    def each() -> None:
        after_commit = "journal.advance to COMMITTED" in said
        if disk.at(manifest) is not None and "journal.advance to GATHERED" not in said:
            # Every rank's bytes are safe before anything vouches for them.
            torn = [name for name in durable_under(disk, new.staging_directory) if not name.startswith("ckptmgr.json")]
            assert [name for name in torn if is_file(disk, new, name) and not synced(disk, new, name)] == []
        if old is not None and not after_commit:
            # What is committed survives a power cut at any moment, under a name that recovery knows.
            assert node_of_old is not None
            names = disk.names_after_power_loss(node_of_old)
            allowed = [old.directory, old.retired_directory, new.staging_directory]
            assert [name for name in names if name.removeprefix("alpha/") in allowed], names
            assert [name for name, node in node_of_old.everything(durable=True) if not node.synced] == []
        if projected and not after_commit:
            assert projections(disk) == projected, "meta.json or the link changed before COMMITTED"

    play(disk, effects, journal, each)

    expected = [
        "journal.begin",
        "journal.advance to WRITING",
        "journal.advance to GATHERED",
        "journal.advance to COMMITTED",
    ]
    expected += ["journal.finish_retirement"] if old else []
    assert [what for what in said if "epoch" not in what] == expected
    assert durable_under(disk, new.directory) == []
    assert disk.lost("alpha/meta.json") == []
    if series == "hf":
        assert disk.after_power_loss("alpha/hf/hf-latest") is disk.at("alpha/hf/hf-latest")


def is_file(disk: Disk, record: CheckpointRecord, name: str) -> bool:
    node = disk.at(f"alpha/{record.staging_directory}/{name}")
    return node is not None and node.entries is None


def synced(disk: Disk, record: CheckpointRecord, name: str) -> bool:
    node = disk.at(f"alpha/{record.staging_directory}/{name}")
    return node is not None and node.synced


def projections(disk: Disk) -> list[object]:
    return [disk.at("alpha/meta.json"), disk.at("alpha/hf/hf-latest")]


@pytest.mark.parametrize("series", NAMES)
def test_a_failed_row_is_written_when_its_directory_can_no_longer_come_back(forks, prepared, tmp_path, series):
    scenario = scenarios(series)["steady"]
    disk, effects, run = traced(
        forks, lambda to: prepared(scenario, to), tmp_path, "save_in_trouble", scenario, writer_fails=7
    )
    new = as_left(run)[0][1]
    seen = []

    def journal(what: str) -> None:
        if what == "journal.advance to FAILED":
            seen.append(what)
            assert disk.after_power_loss(f"alpha/{new.staging_directory}") is None

    play(disk, effects, journal)

    assert new.state == "FAILED"
    assert seen


@pytest.mark.parametrize(
    ("words", "first", "dest"),
    [
        ("dcp steady", "WRITING with a durable manifest", "FAILED"),
        ("hf first", "PREWRITTEN with metadata", "FAILED"),
        ("dcp overwrite", "GATHERED with a complete", "COMMITTED"),
        ("dcp overwrite", "GATHERED with a published directory", "COMMITTED"),
        ("hf overwrite-aside", "GATHERED with the old", "COMMITTED"),
        ("dcp first", "GATHERED with a published directory", "COMMITTED"),
        ("dcp steady", "the row says retiring, the directory has its retired name", "retired"),
        ("hf overwrite", "GATHERED with a published directory", "COMMITTED"),
    ],
)
def test_recovery_does_the_disk_first_and_syncs_it(forks, prepared, tmp_path, words, first, dest):
    series, how = words.split()
    scenario = scenarios(series)[how]

    def crashed(to: Path) -> Path:
        run = prepared(scenario, to)
        forks.crash(crash_run.crash_while_saving, run, scenario, AtComment(first))
        return run

    disk, effects, run = traced(forks, crashed, tmp_path, "crash_while_recovering")
    new = as_left(run)[0][-1]
    # What the crashed process did last was not synced: a power cut would undo its renames.
    undo(disk, as_left(run)[0], first)
    said = []

    def journal(what: str) -> None:
        said.append(what)
        if what == "journal.advance to FAILED":
            assert disk.after_power_loss(f"alpha/{new.staging_directory}") is None
        elif what == "journal.advance to COMMITTED":
            assert durable_under(disk, new.directory) == []
        elif what == "journal.finish_retirement":
            names = [name for name, _ in disk.root.everything(durable=True)]
            assert [name for name in names if name.endswith((".retired", ".incomplete"))] == []

    play(disk, effects, journal)

    assert (f"journal.advance to {dest}" if dest != "retired" else "journal.finish_retirement") in said


def undo(disk: Disk, rows: list[CheckpointRecord], first: str) -> None:
    """Give the names that a killed process had renamed without syncing back, as a power cut would."""
    old, new = rows[0], rows[-1]
    folder = disk.at(f"alpha/{new.series}")
    assert folder is not None
    assert folder.entries is not None
    final_old, final_new = Path(old.directory).name, Path(new.directory).name
    staging, retired = Path(new.staging_directory).name, Path(old.retired_directory).name
    if first.startswith("GATHERED with a published"):
        folder.durable_entries = {staging: folder.entries[final_new]}
        if new.overwrites:
            folder.durable_entries[final_old] = folder.entries[staging]
    elif first.startswith("GATHERED with the old"):
        folder.durable_entries = {staging: folder.entries[staging], final_old: folder.entries[retired]}
    elif first.startswith("the row says retiring"):
        folder.durable_entries = {final_new: folder.entries[final_new], final_old: folder.entries[retired]}


def test_a_run_whose_creation_was_killed_survives_a_power_cut_once_it_has_saved(forks, tmp_path):
    """A directory that a killed process made, and had not synced yet, is synced by whoever builds on it."""
    runs = tmp_path / "place" / "runs"
    runs.parent.mkdir()
    disk = Disk(runs.parent)
    effects: list[Effect] = []
    # Die between each mkdir and the fsync of its parent: at every fsync of a first save.
    for nth in range(1, 200):
        trace = tmp_path / f"trace-{nth}"
        run = runs / "alpha"
        ended = forks.run(crash_run.die_after_mkdir, run, AtEffect(0, trace=str(trace)))
        effects += read_trace(trace)
        if ended.status == 0:
            break
        assert ended.status == CRASHED, ended.output
    for effect in effects:
        if not effect.name.startswith("journal.") and not effect.where.endswith((".lock", "/notes")):
            disk.play(effect)
    live = [row for row in as_left(runs / "alpha")[0] if row.is_live]

    assert nth >= 3
    assert [row.step for row in live] == [1]
    assert disk.lost(f"runs/alpha/{live[0].directory}") == []
