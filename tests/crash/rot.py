"""
A small run in which something on disk is not what was written any more, and what must be said of it.

Everything here runs in children of the fork server. A run has three checkpoints and three exports, saved by
one rank or by two. `damages` are all the ways in which its files can rot; `judge` does one of them to a run
and asserts that it is found, that the file is named, and that nothing is handed out that was not committed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import io
import json
import logging
import os
import signal
import sqlite3
import struct
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import crash_run
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.tensor import Shard, distribute_tensor

from ckptmgr.cli import main
from ckptmgr.errors import CheckpointError, JournalCorrupt, JournalError, SaveFailed, UnsafeResume
from ckptmgr.journal import Journal, schema
from ckptmgr.manager import CheckpointManager
from ckptmgr.manifest import MANIFEST_NAME, Digest
from ckptmgr.options import Timeouts, WriterOptions
from ckptmgr.retention import KeepLast
from ckptmgr.rundir import RunDirectory
from ckptmgr.series import Series
from ckptmgr.writers.dcp import DCP
from ckptmgr.writers.huggingface import HuggingFace
from ckptmgr.writers.state import PerRank

STEPS = (1, 2, 3)
NAMES = {"checkpoint": "step", "hf": "hf"}
#: The rows of the table of torture.
ROWS = (
    *(f"bit rot: {kind}" for kind in ("shard data", "headers", ".metadata", "index", "manifest", "sidecars")),
    "truncation",
    "trailing bytes",
    "zeroed block",
    "file missing or replaced",
    "manifest made to match",
    "files exchanged",
)
JOURNAL_ROWS = (
    "bit rot: journal",
    "journal cut short",
    "journal with a zeroed page",
    "journal with a stale rollback journal",
    "journal edited by hand",
)
#: What became of a damage to the journal.
FOUND, HARMLESS = "found", "harmless"
_PATIENCE = Timeouts(setup_s=30, write_s=20, gather_s=5, collective_s=20, close_s=20, close_on_error_s=5)


# --- the run -----------------------------------------------------------------------------------


def make(run: Path, world: int) -> None:
    """Save everything there is to rot, on *world* ranks."""
    run.parent.mkdir(parents=True, exist_ok=True)
    _assets(run)
    on_ranks(run, world, _save, STEPS[:-1])
    _keep_a_rollback_journal(run)
    on_ranks(run, world, _save, STEPS[-1:])
    with Journal.open(RunDirectory(run).journal_path) as journal:
        journal.pin("hf", STEPS[0], note="published")


def _save(run: Path, rank: int, world: int, steps: tuple[int, ...]) -> None:
    with _manager(run) as manager:
        manager.resume(_state(0, rank, world), series="checkpoint")
        for step in steps:
            for series, state in (("checkpoint", _state(step, rank, world)), ("hf", {"model": _module(step, world)})):
                pending = manager.save(step, state, series, metrics={"loss": 1.0 / step})
                assert pending is not None
                pending.wait()


def _keep_a_rollback_journal(run: Path) -> None:
    """What a transaction that was cut short at this moment would have left, for `JournalDamage` to put back later."""
    path = RunDirectory(run).journal_path
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for setting in ("journal_mode=PERSIST", "cache_size=1", "synchronous=FULL"):
            connection.execute(f"PRAGMA {setting}").close()
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE epoch SET command = ?", ("x" * 100_000,))
        connection.execute("UPDATE checkpoint SET reason = ?", ("x" * 100_000,))
        run.with_name("stale").write_bytes(Path(f"{path}-journal").read_bytes())
        connection.execute("ROLLBACK")


def _manager(run: Path) -> CheckpointManager:
    return CheckpointManager(
        run,
        series=[
            Series("checkpoint", DCP(), keep=KeepLast(3)),
            Series("hf", HuggingFace(assets=_assets(run), max_shard_size=80), keep=KeepLast(3)),
        ],
        timeouts=_PATIENCE,
        writers=WriterOptions(nice=0, write_slots=0),
    )


def _assets(run: Path) -> Path:
    folder = run.with_name("assets")
    if not folder.is_dir():
        scratch = folder.with_name(f"assets.{os.getpid()}")
        (scratch / "chat_templates").mkdir(parents=True)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (scratch / name).write_text(json.dumps({"model_type": "none", "file": name}))
        (scratch / "chat_templates" / "default.jinja").write_text("{{ messages }}")
        with contextlib.suppress(OSError):  # another rank was first
            scratch.rename(folder)
    return folder


def _module(step: int, world: int) -> torch.nn.Module:
    module = crash_run.module(step, 0)
    if world > 1:
        mesh = dist.init_device_mesh("cpu", (world,))
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                whole = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
                part.register_parameter(name, torch.nn.Parameter(whole))
    return module


def _state(step: int, rank: int, world: int) -> dict[str, Any]:
    own = {"position": 7 * step + rank} if step else {}
    plain = {"at": step, "map": {1: "x", "nothing": {}}} if step else {"at": None, "map": {}}
    return {"model": _module(step, world), "plain": plain, "loader": PerRank(own)}


def _values(state: dict[str, Any]) -> list[Any]:
    """Everything in a state, to compare."""
    tensors = [getattr(value, "_local_tensor", value).tolist() for value in state["model"].state_dict().values()]
    return [tensors, state["plain"], state["loader"].value]


def on_ranks(run: Path, world: int, function: Callable[..., None], *args: Any) -> None:
    """Do it on *world* ranks, in this process where that is one."""
    if world == 1:
        function(run, 0, 1, *args)
        return
    ranks = []
    meeting = run.with_name(f"meeting-{os.getpid()}-{function.__name__}")
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.alarm(100)
                store = dist.FileStore(str(meeting), world)
                wait = datetime.timedelta(seconds=20)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=wait)
                function(run, rank, world, *args)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        ranks.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    meeting.unlink()  # the next world must not find this one's addresses
    assert statuses == [0] * world, f"the ranks ended with {statuses}"


# --- damage to the files of a checkpoint --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Damage:
    """
    One way in which one file rots.

    Args:
        how: ``flip``, ``truncate``, ``extend``, ``zero``, ``missing``, ``link``, ``folder``, ``pipe``, ``swap``
            or ``vouched``: flipped, and the manifest made to say so.
        series: Whose checkpoint.
        name: The file in it.
        at: ``flip``, ``vouched``: the byte; ``truncate``: the size that is left; ``zero``: the first byte of a block.
        bit: ``flip``: which one of the byte.
        length: ``zero``: how many bytes.
        steps: In which checkpoints.
    """

    how: str
    series: str
    name: str
    at: int = 0
    bit: int = 0
    length: int = 0
    steps: tuple[int, ...] = (STEPS[-1],)

    @property
    def is_seen_by_size(self) -> bool:
        """Whether names and sizes alone tell."""
        return self.how not in ("flip", "zero", "swap") or self.name == MANIFEST_NAME

    def do(self, run: Path) -> None:
        """Let it happen."""
        for step in self.steps:
            folder = run / self.series / f"{NAMES[self.series]}-{step}"
            path = folder / self.name
            match self.how:
                case "flip":
                    # A manifest of another step may be a digit of a time shorter.
                    flip(path, min(self.at, path.stat().st_size - 1), self.bit)
                case "truncate":
                    os.truncate(path, self.at)
                case "extend":
                    with path.open("ab") as stream:
                        stream.write(b"\0" * 7)
                case "zero":
                    data = bytearray(path.read_bytes())
                    data[self.at : self.at + self.length] = bytes(len(data[self.at : self.at + self.length]))
                    path.write_bytes(data)
                case "missing":
                    path.unlink()
                case "link" | "folder" | "pipe":
                    away = path.rename(run.with_name(f"away-{step}"))
                    make = {"link": lambda p=path, a=away: p.symlink_to(a), "folder": path.mkdir}
                    make.get(self.how, lambda p=path: os.mkfifo(p))()
                case "swap":
                    other = folder.with_name(f"{NAMES[self.series]}-{STEPS[0]}") / self.name
                    aside = path.rename(run.with_name("aside"))
                    other.rename(path)
                    aside.rename(other)
                case "vouched":
                    flip(path, self.at, self.bit)
                    manifest = json.loads((folder / MANIFEST_NAME).read_text())
                    (entry,) = (entry for entry in manifest["files"] if entry["path"] == self.name)
                    entry["digest"] = Digest(path.read_bytes()).text
                    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
                    (folder / MANIFEST_NAME).write_text(text)
                case _:
                    raise AssertionError(self.how)


def flip(path: Path, at: int, bit: int) -> None:
    """Turn one bit of a file over, in place."""
    with path.open("r+b") as stream:
        stream.seek(at)
        (old,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([old ^ 1 << bit]))


def files(run: Path, series: str) -> dict[str, int]:
    """Every file of the newest checkpoint of a series, with its size."""
    folder = run / series / f"{NAMES[series]}-{STEPS[-1]}"
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _bit_of(at: int) -> int:
    """Which bit of a byte is turned over: all of them have their turn."""
    return (at * 5 + at // 8) % 8


def kind_of(name: str) -> str:
    """The row of the table that a file belongs to, headers aside."""
    if name == MANIFEST_NAME:
        return "manifest"
    if name == ".metadata":
        return ".metadata"
    if name.endswith(".index.json"):
        return "index"
    return "shard data" if name.endswith((".safetensors", "_0.distcp")) else "sidecars"


def header_bytes(run: Path, series: str, name: str) -> set[int]:
    """Which bytes of a file of tensors are not a tensor's."""
    folder = run / series / f"{NAMES[series]}-{STEPS[-1]}"
    size = (folder / name).stat().st_size
    if series == "hf":
        (length,) = (int.from_bytes((folder / name).read_bytes()[:8], "little"),)
        return set(range(8 + length))
    header = set(range(size))
    for index, place in FileSystemReader(folder).read_metadata().storage_data.items():
        if place.relative_path == name and index.offset is not None:
            data = (folder / name).read_bytes()[place.offset : place.offset + place.length]
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                (entry,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
            lengths = data[entry.header_offset + 26 : entry.header_offset + 30]
            start = place.offset + entry.header_offset + 30 + sum(struct.unpack("<HH", lengths))
            header -= set(range(start, start + entry.file_size))
    return header


def damages(run: Path, series: str) -> Iterator[tuple[str, Damage]]:
    """Every damage to one file of a checkpoint, one bit of every byte included, with the row it belongs to."""
    for name, size in files(run, series).items():
        kind = kind_of(name)
        header = header_bytes(run, series, name) if kind == "shard data" else set()
        for at in range(size):
            # Each step is hit, most often the newest; now and then all of them.
            steps = STEPS if at % 11 == 5 else (STEPS[-1 - at % 7 // 5],)
            row = "headers" if at in header else kind
            yield f"bit rot: {row}", Damage("flip", series, name, at, _bit_of(at), steps=steps)
        for left in sorted({0, 1, 7, 8, size // 2, size - 1} - {size}):
            yield "truncation", Damage("truncate", series, name, left)
        yield "trailing bytes", Damage("extend", series, name)
        for length in (512, 4096):
            for at in range(0, size, length):
                yield "zeroed block", Damage("zero", series, name, at, length=length)
        for how in ("missing", "link", "folder", "pipe"):
            yield "file missing or replaced", Damage(how, series, name)
        if name not in (MANIFEST_NAME,):
            yield "manifest made to match", Damage("vouched", series, name, size // 2, 3)
        yield "files exchanged", Damage("swap", series, name)


# --- what must be said of it --------------------------------------------------------------------


def judge(run: Path, damage: Damage, world: int = 1) -> None:
    """Let a file rot, ask everybody, and assert that they know."""
    before = {
        step: (run / damage.series / f"{NAMES[damage.series]}-{step}" / damage.name).read_bytes() for step in STEPS
    }
    damage.do(run)
    hit = tuple(step for step in STEPS if _differs(run, damage, step, before[step]))
    named = {step: f"{damage.series}/{NAMES[damage.series]}-{step}" for step in STEPS}
    names = {MANIFEST_NAME if damage.how == "vouched" else damage.name}
    newest = STEPS[-1] in hit
    for deep in (False, True):
        status, document = _asked("check", str(run), "--series", damage.series, *(["--deep"] if deep else []))
        _, whole = (status, document) if not deep else _asked("check", str(run), "--deep")
        assert deep or document["reports"], document
        for step in STEPS:
            found = _errors(document, step)
            if step not in hit:
                assert not found, f"step {step} is intact, but: {found}"
            elif deep or damage.is_seen_by_size:
                assert any(named[step] in text and any(name in text for name in names) for text in found), (
                    f"nothing names {damage.name} of step {step}: {found}"
                )
        told = deep or damage.is_seen_by_size
        safe = [step for step in STEPS if step not in hit or not told]
        expected = 0 if STEPS[-1] in safe else 4 if safe else 5
        if deep and not newest and hit:
            expected = 5
        assert status == expected, f"status {status} instead of {expected}: {document}"
        assert document["step"] == (max(safe) if safe else None), document
        if deep and hit:
            assert whole["damaged"], "check --deep of everything has not seen it"
    if damage.series == "checkpoint":
        on_ranks(run, world, _resume, hit, sorted(names))


def _differs(run: Path, damage: Damage, step: int, before: bytes) -> bool:
    path = run / damage.series / f"{NAMES[damage.series]}-{step}" / damage.name
    if damage.how == "vouched":
        return step in damage.steps
    return path.is_symlink() or not path.is_file() or path.read_bytes() != before


def _errors(document: dict[str, Any], step: int) -> list[str]:
    found = [f for report in document["reports"] for one in report["candidates"] for f in one["findings"]]
    return [f["text"] for f in found if f["step"] == step and f["level"] == "error"]


def _resume(run: Path, rank: int, world: int, hit: tuple[int, ...], names: list[str]) -> None:
    """Resuming hands out what was committed, or says which file is not; an older one only if that is allowed."""
    said = _Log()
    log = logging.getLogger("ckptmgr")
    log.addHandler(said)
    try:
        with _manager(run) as manager:
            for allow_older in (False, True):
                state = _state(0, rank, world)
                untouched = _values(state)
                safe = [step for step in STEPS if step not in hit]
                resumed, error = _tried(manager.resume, state, series="checkpoint", allow_older=allow_older)
                if isinstance(error, JournalError):
                    raise error
                if error is not None:
                    assert isinstance(error, UnsafeResume), error
                    assert STEPS[-1] in hit
                    assert not (allow_older and safe), error
                    assert any(name in str(error) for name in names), f"no file is named: {error}"
                    assert "step-3" in str(error)
                    assert _values(state) == untouched, "a refused resume has changed the state"
                    continue
                assert resumed is not None
                assert resumed.step == (max(safe) if safe else None)
                assert _values(state) == _values(_state(resumed.step, rank, world)), "the state is not what was saved"
                newer = [step for step in STEPS if step > resumed.step]
                assert sorted({finding.step for finding in resumed.passed_over}) == newer
                for step in newer:
                    why = [finding.text for finding in resumed.passed_over if finding.step == step]
                    assert any(name in text for text in why for name in names), why
                    warned = [text for text in said.texts if f"step-{step}" in text and any(n in text for n in names)]
                    assert warned or rank, f"the log does not say that step {step} was passed over: {said.texts}"
                assert allow_older or not newer
    finally:
        log.removeHandler(said)


def _tried(call: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, CheckpointError | None]:
    """What a call returns, or the error of ours that it raises."""
    try:
        return call(*args, **options), None
    except CheckpointError as error:
        return None, error


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _asked(*words: str) -> tuple[int, Any]:
    """What the command says, and that it does not fall over."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*words, "--json"])
    assert "Traceback" not in err.getvalue(), err.getvalue()
    return int(status), json.loads(out.getvalue())


# --- damage to the journal ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class JournalDamage:
    """
    One way in which the journal rots.

    Args:
        how: ``flip``, ``truncate``, ``zero``, ``edit``, or ``stale``: an old rollback journal is put back.
        at: The byte, the size that is left, or the first byte of a page.
        bit: Which one of the byte.
        length: How many bytes.
        statement: ``edit``: SQL that somebody runs on it.
    """

    how: str
    at: int = 0
    bit: int = 0
    length: int = 0
    statement: str = ""

    def do(self, run: Path) -> None:
        """Let it happen."""
        path = RunDirectory(run).journal_path
        match self.how:
            case "flip":
                flip(path, self.at, self.bit)
            case "truncate":
                os.truncate(path, self.at)
            case "zero":
                with path.open("r+b") as stream:
                    stream.seek(self.at)
                    stream.write(bytes(self.length))
            case "stale":
                Path(f"{path}-journal").write_bytes(run.with_name("stale").read_bytes())
            case "edit":
                with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
                    connection.execute("PRAGMA synchronous=OFF")
                    connection.execute("PRAGMA ignore_check_constraints=ON")
                    triggers = connection.execute(
                        "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
                    ).fetchall()
                    for name, _ in triggers:
                        connection.execute(f"DROP TRIGGER {name}")
                    connection.execute(self.statement)
                    for _, text in triggers:
                        connection.execute(text)


def journal_damages(run: Path) -> Iterator[tuple[str, JournalDamage]]:
    """Every damage to the journal, one bit of every byte included, with the row it belongs to."""
    size = RunDirectory(run).journal_path.stat().st_size
    for at in range(size):
        yield "bit rot: journal", JournalDamage("flip", at, _bit_of(at))
    yield "journal with a stale rollback journal", JournalDamage("stale")
    for page in range(0, size, 4096):
        yield "journal cut short", JournalDamage("truncate", page)
        yield "journal cut short", JournalDamage("truncate", page + 1000)
        yield "journal with a zeroed page", JournalDamage("zero", page, length=4096)
        yield "journal with a zeroed page", JournalDamage("zero", page + 512, length=512)
    for table in schema.metadata.sorted_tables:
        for column in table.columns:
            text = f"typeof({column.name}) = 'text'"
            new = f"CASE WHEN {text} THEN {column.name} || '1' ELSE coalesce({column.name}, 0) + 1000 END"
            edit = f"UPDATE OR IGNORE {table.name} SET {column.name} = {new}"
            yield "journal edited by hand", JournalDamage("edit", statement=edit)


def judge_journal(run: Path, damage: JournalDamage, before: dict[str, Any]) -> str:
    """
    Let the journal rot and ask for everything: it is found, or every answer is the one it was.

    Args:
        run: A copy of the run.
        damage: To its journal.
        before: What `answers` said of the run before it was copied.

    Returns:
        FOUND or HARMLESS.
    """
    damage.do(run)
    after, refused = answers(run)
    if refused is not None:
        assert refused.status in (3, 5, 10, 12), refused
    else:
        assert after == before, "\n".join(
            f"{question}: {before.get(question)} became {after.get(question)}"
            for question in before | after
            if before.get(question) != after.get(question)
        )
    error = _refused_by_a_manager(run)
    corrupt = [(refused.text, refused.hint)] if refused is not None and refused.kind == "JournalCorrupt" else []
    corrupt += [(str(error), error.hint)] if isinstance(error, JournalCorrupt) else []
    for text, hint in corrupt:
        assert str(RunDirectory(run).journal_path) in text
        assert "--rebuild" in hint
    if corrupt:
        _rebuild(run)
    return HARMLESS if refused is error is None else FOUND


@dataclasses.dataclass(frozen=True)
class Refused:
    """The error that a command ended with."""

    question: str
    kind: str
    text: str
    hint: str
    status: int


def answers(run: Path) -> tuple[dict[str, Any], Refused | None]:
    """Everything that the command says of a run, with the same words wherever the run stands, until one is refused."""
    questions = [["ls", "--all"], ["log"], ["recover"]]
    for series in NAMES:
        questions += [["latest", "--series", series], ["check", "--series", series]]
        questions += [["show", str(step), "--series", series] for step in STEPS]
    questions.append(["check", "--deep"])
    found = {}
    for command, *rest in questions:
        question = " ".join([command, *rest])
        status, document = _asked(command, str(run), *rest)
        if error := document.get("error"):
            return found, Refused(question, error["type"], error["message"], error["hint"], error["exit_code"])
        found[question] = [status, json.loads(json.dumps(document).replace(str(run), "RUN"))]
    return found, None


def _refused_by_a_manager(run: Path) -> CheckpointError | None:
    """
    None if a manager resumes what was committed, else the error with which it refuses.

    It looks at every page, which commands do not, and not at every row, as commands do that are asked for it.
    """
    return _tried(on_ranks, run, 1, _resume, (), [])[1]


def _rebuild(run: Path) -> None:
    """What a damaged journal says to do works, and the newest checkpoint is there afterwards."""
    status, document = _asked("recover", str(run), "--rebuild", "--apply")
    assert status == 0, document
    assert len(document["checkpoints"]) == len(NAMES) * len(STEPS)
    assert _asked("check", str(run), "--deep")[0] == 0
    on_ranks(run, 1, _resume, (), [])


# --- for both -----------------------------------------------------------------------------------


def note_answers(run: Path, to: Path) -> None:
    """Write down what `answers` says of a run that nothing has happened to."""
    said, refused = answers(run)
    assert refused is None, refused
    to.write_text(json.dumps(said))


def rot_journal(run: Path, damage: JournalDamage, before: Path) -> None:
    """`judge_journal`, and print what came of it, for whoever has forked this child."""
    print(f"outcome: {judge_journal(run, damage, json.loads(before.read_text()))}")


def outcome(output: str) -> str:
    """What `rot_journal` printed."""
    return output.rpartition("outcome: ")[2].split()[0]


def damage_while_open(run: Path) -> None:
    """Rows that rot under a manager: nothing is let go by them, nothing resumed, and the save says so."""
    with _manager(run) as manager:
        path = RunDirectory(run).journal_path
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            newer = "UPDATE checkpoint SET commit_seq = commit_seq + 100 WHERE series = 'checkpoint' AND step = 1"
            assert connection.execute(newer).rowcount == 1
        state = _state(0, 0, 1)
        _, error = _tried(manager.resume, state, series="checkpoint")
        assert isinstance(error, JournalCorrupt), "a damaged journal was believed"
        assert str(path) in str(error)
        pending = manager.save(4, _state(4, 0, 1), "checkpoint")
        assert pending is not None
        _, error = _tried(pending.wait)
        assert isinstance(error, SaveFailed), "a save was committed by a damaged journal"
        assert "JournalCorrupt" in str(error)
    there = {path.name for path in (run / "checkpoint").iterdir()}
    assert {f"step-{step}" for step in STEPS} <= there, f"something was let go: {there}"
    status, _ = _asked("check", str(run))
    assert status == 5
    status, document = _asked("recover", str(run), "--rebuild", "--apply")
    assert status == 0
    with Journal.open_read_only(path) as journal:
        assert [row.step for row in journal.checkpoints(series="checkpoint")] == [1, 2, 3, 4], document
