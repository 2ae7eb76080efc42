"""A small training run, what it was told, and everything that must hold when it is opened after a crash."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from child_process import AtComment, AtEffect, arm, die, mark_trace

from ckptmgr import durable, recovery, requests
from ckptmgr.cli import main
from ckptmgr.errors import CheckpointError, JournalCorrupt, JournalError, SaveFailed, UnsafePath
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, Verified
from ckptmgr.manager import CheckpointManager
from ckptmgr.options import Permissions, Timeouts, WriterOptions
from ckptmgr.recovery import FoundKind
from ckptmgr.retention import KeepLast
from ckptmgr.rundir import RunDirectory
from ckptmgr.series import Series
from ckptmgr.writers.dcp import DCP
from ckptmgr.writers.huggingface import HuggingFace
from ckptmgr.writers.state import PerRank

NAMES = ("dcp", "hf")
PATIENCE = Timeouts(setup_s=30, write_s=20, gather_s=5, collective_s=20, close_s=20, close_on_error_s=5)


@dataclasses.dataclass(frozen=True)
class Save:
    """One call of save. *series* is the format's word; *gen* tells two savings of one step apart."""

    series: str
    step: int
    gen: int = 0
    overwrite: bool = False


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A run that has been trained before, and what it does now."""

    before: tuple[Save, ...]
    now: tuple[Save, ...]
    keep: int = 1
    exchange: bool = True


def scenarios(series: str) -> dict[str, Scenario]:
    """A first save, one that lets another go, and one that replaces what is there, in both ways of doing so."""
    first = Save(series, 1)
    replace = Save(series, 1, gen=1, overwrite=True)
    return {
        "first": Scenario((), (first,)),
        "steady": Scenario((first,), (Save(series, 2),)),
        "overwrite": Scenario((first,), (replace,)),
        "overwrite-aside": Scenario((first,), (replace,), exchange=False),
    }


#: The step whose state has a tensor that is written past the page cache.
LARGE = 30


def scenario_of(words: str) -> Scenario | None:
    """What words such as ``dcp steady`` stand for; None where nothing is saved before."""
    if words == "dcp large":
        return Scenario((Save("dcp", 1),), (Save("dcp", LARGE),))
    series, _, how = words.partition(" ")
    return scenarios(series)[how] if how else None


# --- the trainer -------------------------------------------------------------------------------


def module(step: int, gen: int) -> torch.nn.Module:
    """A model whose weights tell by which save they were written."""
    made = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) + 1000 * step + 100 * gen + number)
    return made


def wide(step: int, gen: int) -> torch.Tensor:
    """2.4 MB, no two blocks alike."""
    return torch.arange(300_000) + 1_000_000 * step + gen


def state(series: str, step: int, gen: int) -> dict[str, Any]:
    if series == "hf":
        return {"model": module(step, gen)}
    small = {"model": module(step, gen), "at": [step, gen], "loader": PerRank({"position": 7 * step + gen})}
    return small | ({"wide": wide(step, gen)} if step == LARGE else {})


def assets(run: Path) -> Path:
    """A model directory as exports copy it, with a folder in it."""
    folder = run.with_name("assets")
    if not folder.is_dir():
        scratch = folder.with_name("assets.new")
        (scratch / "chat_templates").mkdir(parents=True)
        (scratch / "config.json").write_text('{"model_type": "none"}')
        (scratch / "chat_templates" / "default.jinja").write_text("{{ messages }}")
        scratch.rename(folder)
    return folder


def manager(run: Path, series: Iterable[str] = NAMES, *, keep: int = 1) -> CheckpointManager:
    formats = {"dcp": DCP, "hf": lambda: HuggingFace(assets=assets(run), max_shard_size=80)}
    return CheckpointManager(
        run,
        series=[Series(name, formats[name](), keep=KeepLast(keep)) for name in dict.fromkeys(series)],
        timeouts=PATIENCE,
        writers=WriterOptions(nice=0, write_slots=0),
    )


def train(run: Path, saves: tuple[Save, ...], keep: int = 1, series: Iterable[str] = NAMES) -> None:
    """Save as told, one after the other, and note what was begun and what was acknowledged."""
    with manager(run, series, keep=keep) as opened:
        for save in saves:
            note(run, "begun", save)
            pending = opened.save(
                save.step,
                state(save.series, save.step, save.gen),
                save.series,
                overwrite=save.overwrite,
                metrics={"gen": save.gen},
            )
            assert pending is not None
            pending.wait()
            note(run, "acknowledged", save)


def without_exchange() -> None:
    """The file system of this child cannot swap two names."""
    real = durable._renameat2
    durable._renameat2 = lambda source, target, flags: False if flags == 2 else real(source, target, flags)


def prepare(run: Path, scenario: Scenario) -> None:
    """What happened before, without a crash."""
    run.parent.mkdir(parents=True, exist_ok=True)
    assets(run)
    if scenario.before:
        train(run, scenario.before, scenario.keep)


def crash_while_saving(run: Path, scenario: Scenario, *faults: AtComment | AtEffect) -> None:
    """Go on with the run until the place where it dies."""
    if not scenario.exchange:
        without_exchange()
    for fault in faults:
        arm(fault, run)
    train(run, scenario.now, scenario.keep)


def crash_while_recovering(run: Path, *faults: AtComment | AtEffect) -> None:
    """Open the run again, as at the next start, and die on the way."""
    for fault in faults:
        arm(fault, run)
    with manager(run):
        pass


def recover_without_exchange(run: Path, *faults: AtComment | AtEffect) -> None:
    """The same where two names cannot be swapped."""
    without_exchange()
    crash_while_recovering(run, *faults)


def with_trace(run: Path, function: str, args: tuple[Any, ...], *traces: AtEffect) -> None:
    """Call another of these functions while everything beside the run directory is traced too."""
    for trace in traces:
        arm(trace, run.parent)
    globals()[function](run, *args)


def die_after_mkdir(run: Path, trace: AtEffect) -> None:
    """Create a run and save, but die where the run's or a series' directory was just made and is not synced yet."""
    arm(trace, run.parents[1])
    made: list[str] = []

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "os.mkdir":
            folder = Path(f"/proc/self/fd/{args[2]}").readlink() if args[2] >= 0 else Path()
            if not os.path.lexists(folder / args[0]):
                made.append(os.fspath(folder / args[0]))

    sys.addaudithook(watch)
    real = durable.sync_directory

    def sync_directory(path: Path) -> None:
        if made and Path(made[-1]).parent == path and not made[-1].endswith(".incomplete"):
            die()
        real(path)

    durable.sync_directory = sync_directory
    train(run, (Save("dcp", 1),), series=["dcp"])


def save_in_trouble(run: Path, scenario: Scenario, *faults: AtEffect | BadCommit) -> None:
    """Save while the disk or the journal reports errors; whatever came of it, older ones are whole, and save again."""
    if not scenario.exchange:
        without_exchange()
    for fault in faults:
        if isinstance(fault, AtEffect):
            arm(fault, run)
    try:
        opened = manager(run, keep=scenario.keep)
    except (OSError, CheckpointError) as error:
        note(run, "refused", scenario.now[0])
        print(error)
        return
    with opened:
        for fault in faults:
            if isinstance(fault, BadCommit):
                fault.arm(opened)
        for save in scenario.now:
            note(run, "begun", save)
            pending = opened.save(
                save.step, state(save.series, save.step, save.gen), save.series,
                overwrite=save.overwrite, metrics={"gen": save.gen},
            )  # fmt: skip
            assert pending is not None
            try:
                pending.wait()
            except SaveFailed as failed:
                print(failed)
                note(run, "failed", save)
                assert_what_was_acknowledged_is_whole(run)
            else:
                assert_is_whole(run, save)
                note(run, "acknowledged", save)
        for fault in faults:
            if isinstance(fault, AtEffect) and fault.trace is not None:
                mark_trace(Path(fault.trace), "the next save")
        last = Save(scenario.now[-1].series, 40)
        pending = opened.save(last.step, state(last.series, last.step, 0), last.series, metrics={"gen": 0})
        assert pending is not None
        pending.wait()
        note(run, "acknowledged", last)


def assert_what_was_acknowledged_is_whole(
    run: Path, open_journal: Callable[[Path], Journal] = Journal.open_read_only
) -> None:
    """Right after a failure, before anything is recovered."""
    rundir = RunDirectory(run)
    with open_journal(rundir.journal_path) as journal:
        live = journal.checkpoints(live_only=True)
        for word, series, step, _ in list(notes(run)):
            if word == "acknowledged":
                (row,) = (row for row in live if (row.series, row.step) == (series, step))
                assert rundir.verify(row.directory, journal.files(row.id), digests=True) == ()


def assert_is_whole(run: Path, save: Save) -> None:
    """What has just been acknowledged is COMMITTED in the journal, and every byte of it stands at its name."""
    rundir = RunDirectory(run)
    with Journal.open_read_only(rundir.journal_path) as journal:
        live = [
            row for row in journal.checkpoints(live_only=True) if (row.series, row.step) == (save.series, save.step)
        ]
        assert len(live) == 1, f"{save} was acknowledged and is not COMMITTED"
        wrong = rundir.verify(live[0].directory, journal.files(live[0].id), digests=True)
        assert wrong == (), f"{save} was acknowledged with {wrong}"


@dataclasses.dataclass(frozen=True)
class BadCommit:
    """
    SQLite reports that the n-th COMMIT failed, once: before it did anything, or after it was done.

    The connection is a real one; only its answer is not.
    """

    nth: int
    done: bool

    def arm(self, opened: CheckpointManager) -> None:
        """From the manager's next transaction on."""
        bad = self
        connect = sqlite3.connect
        seen = 0

        class Connection(sqlite3.Connection):
            def commit(self) -> None:
                nonlocal seen
                seen += self.in_transaction and self.total_changes > self.before
                wrong, self.before = seen == bad.nth and self.total_changes > self.before, self.total_changes
                if wrong and not bad.done:
                    raise sqlite3.OperationalError("disk I/O error")
                super().commit()
                if wrong:
                    raise sqlite3.OperationalError("disk I/O error")

            before = 0

        sqlite3.connect = lambda *args, **kwargs: connect(*args, **kwargs | {"factory": Connection})
        assert opened._journal is not None
        opened._journal._database._discard()


def crash_while_creating(run: Path, at: AtComment | AtEffect) -> None:
    """Open a run that does not exist yet, and save once."""
    run.parents[1].mkdir(parents=True, exist_ok=True)
    arm(at, run.parent)
    train(run, (Save("dcp", 1),), series=["dcp"])


def retire_too_late(run: Path, *faults: AtComment) -> None:
    """
    Delete the first checkpoint of step 1 as a manager that was stopped after it had looked and before it renamed.

    Another manager has replaced that checkpoint meanwhile, so the live one stands under this name.
    """
    rundir = RunDirectory(run)
    with Journal.open_read_only(rundir.journal_path) as journal:
        gone = journal.checkpoint(1)
        assert journal.checkpoint(2).is_live
        assert journal.checkpoint(2).directory == gone.directory
    for fault in faults:
        arm(fault, run)
    look = rundir._attempt_at
    seen = iter([gone.id])
    rundir._attempt_at = lambda path: next(seen, None) or look(path)  # type: ignore[method-assign]
    with contextlib.suppress(UnsafePath):
        rundir.retire(gone)


def rebuild(run: Path, *faults: AtComment | AtEffect) -> None:
    """Rebuild the journal with the command line tool."""
    for fault in faults:
        arm(fault, run)
    assert main(["recover", str(run), "--rebuild", "--apply"]) == 0


def adopt(run: Path, *faults: AtComment | AtEffect) -> None:
    """Take the checkpoints of one series into a new run beside it, as those of a directory without a journal."""
    for fault in faults:
        arm(fault, run.with_name("new"))
    assert main(["adopt", str(run.with_name("new")), "--from", str(run / "dcp"), "--apply"]) in (0, 3)


def prune(run: Path, *faults: AtComment | AtEffect) -> None:
    """Keep the newest alone, with the command line tool."""
    for fault in faults:
        arm(fault, run)
    assert main(["prune", str(run), "--series", "dcp", "--keep-last", "1", "--apply"]) == 0


def prune_by_asking(run: Path, *faults: AtComment | AtEffect) -> None:
    """The same while a manager has the run open, which it is asked for."""
    _ask(run, faults, kind=requests.PRUNE, rule=KeepLast(1))


def verify_by_asking(run: Path, *faults: AtComment | AtEffect) -> None:
    """Say of two checkpoints how they were verified, while a manager has the run open, which records it."""
    _ask(run, faults, kind=requests.VERIFY, verified=(Verified(1, True), Verified(3, False, ("digest: a",))))


def _ask(run: Path, faults: Iterable[AtComment | AtEffect], **asked: Any) -> None:
    for fault in faults:
        arm(fault, run)
    with manager(run, keep=5), Journal.open_read_only(RunDirectory(run).journal_path) as journal:
        now = time.time()
        request = requests.Request(
            series="dcp", epoch=journal.current_epoch(), host=socket.gethostname(), pid=os.getpid(),
            asked_at=now, deadline=now + 30, **asked,
        )  # fmt: skip
        requests.ask(run, request, Permissions())
        while (answer := requests.answer_to(run, request.id)) is None:
            time.sleep(0.01)
        assert answer.outcome == requests.DONE


def recover_once(run: Path) -> None:
    """Open the run as a start does, and close it."""
    with manager(run):
        pass


# --- what must hold ----------------------------------------------------------------------------


def note(run: Path, word: str, save: Save) -> None:
    """Write down what the trainer was told."""
    with run.with_name("notes").open("a") as stream:
        stream.write(json.dumps([word, save.series, save.step, save.gen]) + "\n")


def notes(run: Path) -> Iterator[tuple[str, str, int, int]]:
    with contextlib.suppress(FileNotFoundError):
        for line in run.with_name("notes").read_text().splitlines():
            yield tuple(json.loads(line))


def tree(run: Path) -> dict[str, Any]:
    """Every name in the run directory: a file's bytes, a link's target, a directory's mark."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_symlink():
            found[name] = ("link", str(path.readlink()))
        else:
            found[name] = "directory" if path.is_dir() else path.read_bytes()
    return found


def content(run: Path, record: CheckpointRecord) -> tuple[int, int]:
    """Load a checkpoint with nothing but stock libraries and say which save wrote it; every byte must agree."""
    folder = run / record.directory
    if record.series == "hf":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        loaded: dict[str, torch.Tensor] = {}
        for name in sorted(set(index["weight_map"].values())):
            loaded |= safetensors.torch.load_file(folder / name)
        assert json.loads((folder / "config.json").read_text()) == {"model_type": "none"}
        assert (folder / "chat_templates" / "default.jinja").read_text() == "{{ messages }}"
    else:
        target: dict[str, Any] = {"model": module(0, 0).state_dict(), "at": [None, None]}
        if record.step == LARGE:
            target["wide"] = torch.zeros_like(wide(0, 0))
        torch.distributed.checkpoint.load(target, checkpoint_id=folder, no_dist=True)
        loaded = target["model"]
        assert target["at"] == [record.step, record.metrics["gen"]]
        if record.step == LARGE:
            assert torch.equal(target["wide"], wide(record.step, int(record.metrics["gen"])))
        position = torch.load(folder / "per-rank-0.pt", weights_only=True)["loader"]["position"]
        assert position == 7 * record.step + record.metrics["gen"]
    expected = module(record.step, int(record.metrics["gen"])).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())
    return record.step, int(record.metrics["gen"])


def assert_nothing_untrue(run: Path) -> None:
    """
    What anybody may read before anything is recovered is true: the journal, ``meta.json`` and ``hf-latest``.

    They may lag behind, but never name what is not COMMITTED, and a live row has its directory.
    """
    rundir = RunDirectory(run)
    try:
        opened = Journal.open_read_only(rundir.journal_path)
    except JournalCorrupt:
        raise
    except JournalError:
        return  # there is none yet, or readers are kept out of it until a transaction is undone
    with opened as journal:
        rows = journal.checkpoints()
        files = {row.id: journal.files(row.id) for row in rows}
    replaced = {row.overwrites: row for row in rows if row.state is CheckpointState.GATHERED}
    for row in (row for row in rows if row.is_live):
        by = replaced.get(row.id)
        places = [row.directory, *([row.retired_directory, by.staging_directory] if by is not None else [])]
        whole = [place for place in places if rundir.verify(place, files[row.id], digests=True) == ()]
        assert whole, f"{row.directory} is COMMITTED, and before anything is recovered it is not whole at its name"
    committed = {row.directory for row in rows if row.state is CheckpointState.COMMITTED}
    meta = run / "meta.json"
    try:
        listed = json.loads(meta.read_text()) if meta.exists() else {}
    except ValueError as error:
        raise AssertionError(f"meta.json cannot be read: {error}") from error
    named = {path for name, paths in listed.items() if name.endswith("_list") for path in paths}
    if (run / "hf" / "hf-latest").is_symlink():
        named.add(f"hf/{(run / 'hf' / 'hf-latest').readlink()}")
    assert named <= committed, f"meta.json or hf-latest names {named - committed}, which is not COMMITTED"


def assert_sound(run: Path, *, set_aside: bool = False) -> dict[str, list[CheckpointRecord]]:
    """
    Everything that must hold of a run that was opened after a crash.

    Args:
        run: The run directory.
        set_aside: Whether recovery was to put something aside for inspection.

    Returns:
        The live checkpoints by series, oldest first.
    """
    rundir = RunDirectory(run)
    with Journal.open_read_only(rundir.journal_path) as journal:
        rows = journal.checkpoints()
        files = {row.id: journal.files(row.id) for row in rows}
        left = recovery.preview(journal, rundir).actions
        epochs = [change.epoch for change in journal.transitions()]

    assert epochs == sorted(epochs), "a manager that was taken over has changed a row since"
    # No row in between, no directory but those of live checkpoints, nothing left for another recovery.
    assert [row for row in rows if row.is_in_flight] == []
    assert [row for row in rows if row.retire_started_at and not row.retired_at] == []
    live: dict[str, list[CheckpointRecord]] = {}
    for row in sorted((row for row in rows if row.is_live), key=lambda row: row.commit_seq or 0):
        live.setdefault(row.series, []).append(row)
    aside = set()
    for series in NAMES:
        there = rundir.listing([series])
        mine = live.get(series, [])
        aside |= {item.path for item in there if item.kind is FoundKind.QUARANTINED}
        names = {item.path for item in there if item.kind is not FoundKind.LINK}
        assert names - aside == {row.directory for row in mine}
        if series == "hf" and mine:
            assert (run / "hf" / "hf-latest").readlink() == Path(Path(mine[-1].directory).name)
    assert bool(aside) == set_aside
    assert {getattr(action, "path", action) for action in left} == aside
    assert [path.name for path in run.iterdir() if path.name.endswith(".new")] == []

    # COMMITTED: every byte is what was recorded, and loads as what was saved.
    for row in (row for mine in live.values() for row in mine):
        manifest, digest = rundir.read_manifest(row.directory)
        assert (manifest.attempt, digest) == (row.id, row.manifest_digest)
        assert sorted(manifest.files, key=lambda file: file.path) == files[row.id]
        assert rundir.verify(row.directory, files[row.id], digests=True) == ()
        folder = run / row.directory
        on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert on_disk == {file.path for file in files[row.id]} | {"ckptmgr.json"}
        content(run, row)

    # Acknowledged: live, or let go for one that committed later.
    for word, series, step, gen in notes(run):
        if word != "acknowledged":
            continue
        mine = live.get(series, [])
        assert mine, f"{series} had an acknowledged checkpoint and has none now"
        of_save = [row for row in rows if (row.series, row.step, row.metrics.get("gen")) == (series, step, gen)]
        newest = max((row.commit_seq for row in of_save if row.commit_seq), default=0)
        assert newest, f"{series} step {step} gen {gen} was acknowledged and is not COMMITTED"
        assert (mine[-1].commit_seq or 0) >= newest
    return live


def check(run: Path, twice: bool = False, set_aside: bool = False) -> None:
    """
    Open the run after a crash; everything holds, what is newest loads in place, and the next save works.

    Args:
        run: The run directory.
        twice: Recover before that as the command line tool does, and see that a second time does nothing.
        set_aside: Whether recovery was to put something aside for inspection.
    """
    used = sorted({series for _, series, _, _ in notes(run)} or {"dcp"})
    if twice:
        recover_alone(run)
        before = tree(run), rows(run)
        assert recover_alone(run).changes == ()
        assert (tree(run), rows(run)) == before, "a second recovery changed something"
    with manager(run) as opened:
        live = assert_sound(run, set_aside=set_aside)
        meta = json.loads((run / "meta.json").read_text())
        for series in NAMES:
            assert meta[f"{series}_list"] == [row.directory for row in live.get(series, [])]
        resumed: dict[str, Any] = {"model": module(0, 0), "at": None, "loader": PerRank({}, when_resized="skip")}
        chosen = opened.resume(resumed, series="dcp")
        if newest := live.get("dcp", []):
            step, gen = newest[-1].step, int(newest[-1].metrics["gen"])
            assert chosen is not None
            assert chosen.step == step
            position = {"position": 7 * step + gen} if newest[-1].world_size == 1 else {}
            assert (resumed["at"], resumed["loader"].value) == ([step, gen], position)
            pairs = zip(resumed["model"].parameters(), module(step, gen).parameters(), strict=True)
            assert all(torch.equal(mine, saved) for mine, saved in pairs)
        else:
            assert chosen is None
        for series in used:
            pending = opened.save(50, state(series, 50, 0), series, metrics={"gen": 0})
            assert pending is not None
            pending.wait()
        live = assert_sound(run, set_aside=set_aside)
        assert {series: [row.step for row in live[series]] for series in used} == {series: [50] for series in used}


def recover_alone(run: Path) -> recovery.RecoveryReport:
    """Recovery without a manager, as `ckptmgr recover --apply` does it."""
    rundir = RunDirectory(run)
    rundir.acquire("test")
    try:
        with Journal.open(rundir.journal_path) as journal:
            rundir.pair(journal.run_id)
            epoch = journal.begin_epoch(host="h", pid=1, command="test", versions={})
            return recovery.recover(journal, rundir, epoch=epoch, host="h", pid=1)
    finally:
        rundir.release()


def rows(run: Path) -> list[Any]:
    """Everything the journal says about checkpoints."""
    with Journal.open_read_only(RunDirectory(run).journal_path) as journal:
        return [journal.checkpoints(), journal.transitions(), journal.decisions()]


def as_left(run: Path) -> tuple[list[CheckpointRecord], set[str]]:
    """What a crash left, before anyone has recovered it: all rows, and all names in the series' directories."""
    rundir = RunDirectory(run)
    with Journal.open(rundir.journal_path) as journal:  # not read-only: a transaction may have to be rolled back
        found = journal.checkpoints()
    return found, {item.path for item in rundir.listing(NAMES)}


def copy_of(run: Path, to: Path) -> Path:
    """A whole run, with its journal and notes, in a new place."""
    shutil.copytree(run.parent, to, symlinks=True, dirs_exist_ok=True)
    return to / run.name
