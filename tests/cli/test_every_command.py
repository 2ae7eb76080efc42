"""Every command, with all of its flags, over a run in every state: the status, and that nothing is said wrongly."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from run_on_disk import NO_PROCESS, Call, Done, Run, S

from ckptmgr.cli import COMMANDS, build_parser, main
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.lifecycle import Format, RetirementMark
from ckptmgr.rundir import RunDirectory

RELEASED = Path(__file__).parents[1] / "journal" / "released" / "0001.db"

# -- the states: each makes a run, or what is none, and gives what the command is about ----------------


def _usual(run: Run) -> None:
    first = run.save(500, metrics={"loss": 2.0})
    run.save(1000, metrics={"loss": 1.0}, decisions=[(first.id, "keep", ("last 2",))])
    run.save(1000, series="hf", layout=Format.HUGGINGFACE)


def committed(run: Run) -> Path:
    """Two checkpoints and an export; the manager has ended."""
    _usual(run)
    run.start(pid=NO_PROCESS)
    return run.directory


def empty(run: Run) -> Path:
    """No rows."""
    run.start(pid=NO_PROCESS)
    return run.directory


def in_flight(run: Run) -> Path:
    """A live manager, and one on its way."""
    _usual(run)
    run.save(1500, until=S.WRITING)
    return run.directory


def failed(run: Run) -> Path:
    """The newest attempt failed, on one rank."""
    _usual(run)
    left = run.save(1500, until=S.FAILED, failures=[{"rank": 1, "host": "node-7", "cause": "OSError: no space"}])
    shutil.rmtree(run.directory / left.staging_directory)
    run.start(pid=NO_PROCESS)
    return run.directory


def crashed(run: Run) -> Path:
    """One was GATHERED and one WRITING when the manager died."""
    _usual(run)
    run.save(1500, until=S.GATHERED)
    run.save(1500, series="hf", layout=Format.HUGGINGFACE, until=S.WRITING)
    run.crash()
    return run.directory


def locked(run: Run) -> Path:
    """Something has the run lock that answers nobody."""
    committed(run)
    run.rundir.acquire("train.py")
    return run.directory


def pruned(run: Run) -> Path:
    """One was let go, one of them is deleted."""
    _usual(run)
    old = run.journal.checkpoints(live_only=True)[0]
    run.save(1500, retire=[RetirementMark(old.id, "no rule keeps it")])
    shutil.rmtree(run.directory / old.directory)
    run.journal.finish_retirement(old.id, epoch=run.epoch)
    run.start(pid=NO_PROCESS)
    return run.directory


def corrupted(run: Run) -> Path:
    """A byte of the newest differs, and a file of it is short."""
    committed(run)
    (run.directory / "checkpoint/step-1000/model.bin").write_bytes(b"short")
    return run.directory


def ruined(run: Run) -> Path:
    """Every checkpoint has lost a file."""
    committed(run)
    for step in (500, 1000):
        (run.directory / f"checkpoint/step-{step}/model.bin").unlink()
    return run.directory


def damaged_journal(run: Run) -> Path:
    """The journal was overwritten in the middle."""
    committed(run)
    run.journal.close()
    with run.journal_path.open("r+b") as file:
        file.seek(run.journal_path.stat().st_size // 2)
        file.write(b"\xff" * 4096)
    return run.directory


def lost_journal(run: Run) -> Path:
    """The journal is gone."""
    committed(run)
    run.journal.close()
    for path in run.journal_path.parent.glob(f"{run.journal_path.name}*"):
        path.unlink()
    return run.directory


def older_schema(run: Run) -> Path:
    """The journal of an earlier version."""
    place = run.directory.with_name("old")
    place.mkdir()
    rundir = RunDirectory(place)
    shutil.copyfile(RELEASED, rundir.journal_path)
    with contextlib.closing(sqlite3.connect(RELEASED)) as connection:
        ((run_id,),) = connection.execute("SELECT run_id FROM run")
    rundir.write_run_id(run_id)
    return place


def migrated(run: Run) -> Path:
    """The journal of an earlier version, upgraded; what it speaks of is not there."""
    place = older_schema(run)
    assert main(["upgrade", str(place)]) == 0
    return place


def no_run(run: Run) -> Path:
    """A directory with something else in it."""
    place = run.directory.with_name("photos")
    place.mkdir()
    (place / "a.jpg").write_bytes(b"\xff\xd8")
    return place


def nothing(run: Run) -> Path:
    """A name that is not there."""
    return run.directory.with_name("never")


STATES: tuple[Callable[[Run], Path], ...] = (
    committed, empty, in_flight, failed, crashed, locked, pruned, corrupted, ruined, damaged_journal, lost_journal,
    older_schema, migrated, no_run, nothing,
)  # fmt: skip

# -- the commands ------------------------------------------------------------------------------------

#: All words behind RUN, and the status that each state gives, in the order of `STATES`; ``OUT`` is a new file, ``FROM``
#: a directory of another library.
LINES = {
    "ls": "0 0 0 0 0 0 0 0 0 5 10 12 0 10 10",
    "ls --all --series checkpoint --limit 5": "0 2 0 0 0 0 0 0 0 5 10 12 0 10 10",
    "show 1000": "0 3 0 0 0 0 0 0 0 5 10 12 0 10 10",
    "show 1000 --series hf": "0 3 0 0 0 0 0 0 0 5 10 12 0 10 10",
    "log": "0 0 0 0 0 0 0 0 0 5 10 12 0 10 10",
    "log --series hf": "0 2 0 0 0 0 0 0 0 5 10 12 0 10 10",
    "latest": "0 3 0 0 0 0 0 0 5 5 10 12 5 10 10",
    "latest --series hf --world-size 2": "0 3 0 0 0 0 0 0 0 5 10 12 5 10 10",
    "check": "0 3 0 0 0 0 0 4 5 5 10 12 5 10 10",
    "check --series checkpoint --step 1000 --world-size 2": "0 3 0 0 0 0 0 5 5 5 10 12 5 10 10",
    "check --all": "0 3 0 0 0 0 0 4 5 5 10 12 5 10 10",
    "check --deep": "0 3 0 0 0 0 0 4 5 5 10 12 5 10 10",
    "check --require hf --min-step 1000 --max-age 1h --allow-empty": "0 0 0 0 0 0 0 3 5 5 10 12 5 0 0",
    "why 1000": "0 3 0 0 0 0 0 0 0 5 10 12 0 10 10",
    "why 1500 --series checkpoint": "3 3 0 0 0 3 0 3 3 5 10 12 0 10 10",
    "verify": "0 0 0 0 0 0 0 5 5 5 10 12 5 10 10",
    "verify --series hf --newest": "0 2 0 0 0 0 0 0 0 5 10 12 5 10 10",
    "verify --subset 100% --max-bytes-per-second 1GB": "0 0 0 0 0 0 0 5 5 5 10 12 5 10 10",
    "verify --older-than 7d": "0 0 0 0 0 0 0 5 5 5 10 12 5 10 10",
    "verify --step 1000 --timeout 0.5": "0 3 0 0 0 0 0 5 5 5 10 12 5 10 10",
    "watch --series checkpoint --interval 1": "0 2 - 0 0 0 0 0 0 5 10 12 0 10 10",
    "stats": "0 0 0 0 0 0 0 0 0 5 10 12 0 10 10",
    "stats --series hf": "0 2 0 0 0 0 0 0 0 5 10 12 0 10 10",
    "recover": "0 0 0 0 0 0 0 0 0 5 10 12 0 10 10",
    "recover --rebuild": "2 0 2 2 2 2 2 2 2 0 0 12 2 10 10",
    "recover --apply": "0 0 0 0 0 11 0 0 0 5 10 12 0 10 10",
    "recover --rebuild --apply": "2 0 2 2 2 2 2 2 2 0 0 12 2 10 10",
    "adopt --from FROM": "0 0 0 0 0 0 0 0 0 5 10 12 0 0 0",
    "adopt --from FROM --series checkpoint --step 7000 --copy --deep --apply": "0 0 0 0 0 11 0 0 0 5 10 12 0 0 0",
    "adopt --from FROM --as-step 8000": "0 0 0 0 0 0 0 0 0 5 10 12 0 0 0",
    "prune --keep-last 1 --series checkpoint": "0 2 0 0 0 0 0 0 0 5 10 12 0 10 10",
    "prune --keep-every 1000 --keep-within 7d --keep-best loss:min:1": "0 0 0 0 0 0 0 0 0 5 10 12 0 10 10",
    "prune --keep-last 1 --apply --timeout 0.5": "0 0 3 0 3 11 0 0 0 5 10 12 3 10 10",
    "prune": "2 2 2 2 2 2 2 2 2 2 2 2 2 2 2",
    "pin 1000 --series checkpoint --note mine --timeout 0.5": "0 3 0 0 0 11 0 0 0 5 10 12 0 10 10",
    "unpin 1000 --timeout 0.5": "0 3 0 0 0 0 0 0 0 5 10 12 0 10 10",
    "unpin 1000 --series hf --timeout 0.5": "0 3 0 0 0 0 0 0 0 5 10 12 0 10 10",
    "upgrade": "0 0 0 0 0 11 0 0 0 5 10 0 0 10 10",
    "report --output OUT --force": "0 0 0 0 0 0 0 0 0 5 10 12 0 10 10",
    "metrics": "0 0 0 0 0 0 0 0 0 5 10 12 0 10 10",
    "metrics --output OUT --force": "0 0 0 0 0 0 0 0 0 5 10 12 0 10 10",
}  # fmt: skip


def status_of(line: str, state: str) -> int:
    codes = dict(zip((each.__name__ for each in STATES), LINES[line].split(), strict=True))
    return int(codes[state])


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A directory of another library."""
    made = Run(tmp_path / "elsewhere" / "made")
    made.save(7000)
    made.journal.close()
    place = tmp_path / "theirs"
    (made.directory / "checkpoint").rename(place)
    return place


def everything(directory: Path) -> dict[str, str]:
    """What a command that only reads must leave as it is; locks are made where one looks who holds them."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if stat.S_ISREG(path.lstat().st_mode) and path.suffix != ".lock"
    }


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_every_command_says_how_it_went(
    run: Run, ckptmgr: Call, tmp_path: Path, theirs: Path, state: Callable[[Run], Path]
) -> None:
    about = state(run)
    run.journal.close()
    before = everything(about.parent)
    for number, line in enumerate(LINES):
        command, *rest = line.replace("OUT", str(tmp_path / "out")).replace("FROM", str(theirs)).split()
        if command == "watch" and state is in_flight:
            continue  # it goes on until the run ends: see test_cli_watch.py
        if changes(line):
            with a_copy(about, tmp_path / f"copy-{number}", lock=state is locked) as copy:
                say(ckptmgr(command, copy, *rest), line, state)
            shutil.rmtree(tmp_path / f"copy-{number}")
            continue
        done = ckptmgr(command, about, *rest)
        say(done, line, state)
        again = ckptmgr(command, about, *rest, "--json")  # the same, for programs
        assert (again.code, again.err) == (done.code, ""), line
        assert [type(json.loads(text)) for text in again.out.splitlines()] == [dict], line
        assert everything(about.parent) == before, line


def say(done: Done, line: str, state: Callable[[Run], Path]) -> None:
    """Check what every command must keep to."""
    assert done.code == status_of(line, state.__name__), f"{line}, {state.__name__}\n{done.out}{done.err}"
    assert "Traceback" not in done.err
    assert done.out or done.err or "--output" in line
    if done.code >= Exit.NO_JOURNAL or done.code == Exit.USAGE:
        assert done.err.startswith("ckptmgr: "), line
        assert "hint: " in done.err, line


def changes(line: str) -> bool:
    """Whether it may change the run."""
    return "--apply" in line or line.split(maxsplit=1)[0] in ("pin", "unpin", "upgrade", "verify")


@contextlib.contextmanager
def a_copy(about: Path, place: Path, *, lock: bool) -> Iterator[Path]:
    """The run, its journal beside it, somewhere else."""
    shutil.copytree(about.parent, place)
    rundir = RunDirectory(place / about.name)
    if lock:
        rundir.acquire("train.py")
    try:
        yield place / about.name
    finally:
        if lock:
            rundir.release()


def test_every_flag_of_every_command_is_in_a_line() -> None:
    (commands,) = [action.choices for action in build_parser()._actions if isinstance(action.choices, dict)]
    elsewhere = {"serve", "doctor", "completion"}  # not about a run: test_cli_serve.py and others
    for name in COMMANDS.keys() - elsewhere:
        flags = {flag for action in commands[name]._actions for flag in action.option_strings if flag.startswith("--")}
        tried = set(re.findall(r"(?<!\S)(--[a-z-]+)", " ".join(line for line in LINES if line.split()[0] == name)))
        tried |= {"--help", "--json", "--journal"} | ({"--output"} if " -o" in " ".join(LINES) else set())
        assert flags - tried == set() or flags - tried == {"--follow"}, name


def test_every_status_is_reached() -> None:
    watched = ("watch --series checkpoint --interval 1", in_flight)
    reached = {status_of(line, state.__name__) for line in LINES for state in STATES if (line, state) != watched}

    # A bug, an interrupt: test_cli_process.py.
    assert reached == {int(each) for each in Exit} - {Exit.FAILED, Exit.INTERRUPTED}
