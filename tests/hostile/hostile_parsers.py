"""
Every parser of bytes that came from disk, each with a harness: bytes in, and a judgement.

A harness feeds bytes to the product where it would read them from disk, and `judge` says whether what came
of it is allowed: an answer or an error of ours, no more memory and time than a small input may cost,
nothing touched outside of the run, nothing run. `make fuzz` drives the harnesses by coverage, and
`test_hostile_parsers` by Hypothesis.

Not here: what its own processes tell each other over private pipes and Gloo.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import pickle
import random
import shutil
import sqlite3
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hostile_bytes as b
import numpy
import torch
from guard import Guard
from hostile_kit import MOST_MIB, MOST_S, forget_peak, peak_kib, tame

from ckptmgr import PerRank, RandomState, filesystems, foreign, recovery, requests
from ckptmgr.errors import CheckpointError
from ckptmgr.journal import Journal, seal
from ckptmgr.lifecycle import Verified
from ckptmgr.manifest import MANIFEST_NAME, Manifest, is_run_id
from ckptmgr.rebuild import preview_rebuild
from ckptmgr.retention import KeepBest, KeepEvery, KeepFor, KeepLast
from ckptmgr.rundir import META_NAME, RUN_ID_NAME, RunDirectory
from ckptmgr.writers import archives, dcp, index, loading, mappings

_RELEASED = Path(__file__).parents[1] / "journal" / "released" / "0001.db"


class Ground:
    """
    A copy of a run for one harness to spoil, and beside it what is nobody's business.

    Args:
        pristine: A run that `hostile_ground.train` made.
        folder: An empty folder of this harness's own, links in its name resolved.
    """

    def __init__(self, pristine: Path, folder: Path) -> None:
        self.pristine = pristine
        self.folder = folder
        #: What the product may touch.
        self.home = folder / "home"
        self.run = self.home / "runs" / "alpha"
        self.step = self.run / "checkpoint" / "step-2"
        self.journal = self.home / "runs" / "alpha.journal.db"
        self.renew()
        (folder / "precious").mkdir()
        (folder / "precious" / "secret").write_bytes(b"secret" * 1000)
        self._before = self._beside()

    def renew(self) -> None:
        """Set the whole run right again."""
        with Guard.of_this_process().looking_away():
            shutil.rmtree(self.run.parent, ignore_errors=True)
            shutil.copytree(self.pristine.parent, self.run.parent, symlinks=True)

    def rundir(self) -> RunDirectory:
        """The run, as a fresh process would see it."""
        return RunDirectory(self.run)

    def committed(self) -> dict[str, int]:
        """The files of the checkpoint and their bytes, as they are now."""
        return {path.name: path.lstat().st_size for path in self.step.iterdir() if path.name != MANIFEST_NAME}

    def require_untouched(self) -> None:
        """Fail if something beside the run was made, changed or removed."""
        assert self._beside() == self._before, "something outside the run was changed"

    def _beside(self) -> Any:
        secret = (self.folder / "precious" / "secret").lstat()
        names = [sorted(path.name for path in folder.iterdir()) for folder in (self.folder, self.folder / "precious")]
        return names, secret.st_ino, secret.st_size, secret.st_mtime_ns


@dataclasses.dataclass(frozen=True)
class Harness:
    """
    One parser.

    `seeds` are real inputs and hostile ones; `words` what a mutation may put in; `mib` what one input may cost.
    """

    name: str
    parse: Callable[[Ground, bytes], None]
    seeds: Callable[[Ground], Sequence[bytes]]
    words: Sequence[bytes] = ()
    mib: float = MOST_MIB
    #: The longest input that is worth trying, in bytes.
    most_bytes: int = 1 << 16

    def seeds_of(self, ground: Ground) -> list[bytes]:
        """The seeds of a ground that nothing is wrong with: the run is set right before."""
        ground.renew()
        return list(self.seeds(ground))


def judge(harness: Harness, ground: Ground, data: bytes) -> None:
    """
    Give *data* to a parser.

    Raises:
        AssertionError: Something happened that may not.
        Exception: Whatever the parser raised that is no error of ours.
    """
    guard = Guard.of_this_process()
    forget_peak()
    before, began = peak_kib(), time.process_time()
    try:
        with guard.watching(ground.home):
            harness.parse(ground, data)
    except CheckpointError as error:
        _require_sound(error)
    took, grown = time.process_time() - began, (peak_kib() - before) / 1024
    assert not guard.seen, f"touched: {guard.seen[:5]}"
    assert grown < harness.mib, f"{grown:.0f} MiB were taken"
    assert took < MOST_S, f"it took {took:.1f} s"
    ground.require_untouched()


def _require_sound(error: CheckpointError) -> None:
    """An error says what is wrong in words that fit on a screen and do nothing to it, and reaches other ranks."""
    said = str(error)
    assert type(error) is not CheckpointError, "an error of no kind"
    _require_tame(said)
    assert len(said) < 5000, f"{len(said)} characters"
    assert str(pickle.loads(pickle.dumps(error))) == said


def _require_tame(text: str) -> None:
    strange = [char for char in text if not char.isprintable() and char != "\n"]
    assert not strange, f"{strange[:5]} in {text[:200]!r}"


def _require_inside(path: str) -> None:
    """Not the product's own check: what a kernel would make of it."""
    assert os.path.normpath(f"/run/{path}") == f"/run/{path}", path
    assert path.isprintable()


# -- manifests and what names they have ---------------------------------------------------------------


def _manifest(ground: Ground, data: bytes) -> None:
    (ground.step / MANIFEST_NAME).write_bytes(data)
    rundir = ground.rundir()
    rundir.listing(["checkpoint"], deep_for=["checkpoint/step-2"])
    for candidate in preview_rebuild(rundir).checkpoints:
        assert candidate.path in ("checkpoint/step-1", "checkpoint/step-2", "hf/hf-1", "hf/hf-2")
    found = Manifest.from_json(data)
    assert Manifest.from_json(found.to_json()) == found
    for entry in found.files:
        _require_inside(entry.path)
        assert 0 <= entry.size < 1 << 63


def _manifest_seeds(ground: Ground) -> list[bytes]:
    real = (ground.step / MANIFEST_NAME).read_bytes()
    body = json.loads(real)
    body["files"] = body["files"][:1]
    small = json.dumps(body).encode()
    return [real, small, json.dumps({**body, "files": [{**body["files"][0], "path": "../x"}]}).encode()]


# -- what a checkpoint is read by ------------------------------------------------------------------------


class _Taker:
    """An object of the user's that takes whatever it is given."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        assert isinstance(state, Mapping)


def _load(ground: Ground, **state: Any) -> None:
    """Resume from the checkpoint, as if its files had been committed as they are."""
    loading.read(ground.step, state, 0, files=ground.committed(), same_world=True)


def _load_shared(ground: Ground) -> None:
    model = {"0.weight": torch.zeros(3, 4), "1.bias": torch.zeros(2)}
    _load(ground, model=model, scheduler=_Taker(), plain={"two": None}, tensors={})


def _index(ground: Ground, data: bytes) -> None:
    (ground.step / index.INDEX_NAME).write_bytes(data)
    files = ground.committed()
    found = index.read_index(ground.step, files)
    for at, place in found.storage_data.items():
        assert at.fqn in found.state_dict_metadata
        assert 0 <= place.offset <= place.offset + place.length <= files[place.relative_path]
    _load_shared(ground)


def _index_seeds(ground: Ground) -> list[bytes]:
    data = (ground.step / index.INDEX_NAME).read_bytes()
    metadata = pickle.loads(data)
    for fqn in [fqn for fqn in metadata.state_dict_metadata if not fqn.startswith(("model", "plain.two"))]:
        del metadata.state_dict_metadata[fqn], metadata.planner_data[fqn]
        for at in [at for at in metadata.storage_data if at.fqn == fqn]:
            del metadata.storage_data[at]
    return [data, pickle.dumps(metadata), b.PROTO + b.name("posix", "system") + b.STOP]


def _mappings(ground: Ground, data: bytes) -> None:
    (ground.step / mappings.MAPPINGS_NAME).write_bytes(data)
    _load_shared(ground)


def _mappings_seeds(ground: Ground) -> list[bytes]:
    strange = {"integer_keys": [["plain", "1"]], "empty": [["plain", "empty"], ["scheduler", "x", 3]]}
    return [(ground.step / mappings.MAPPINGS_NAME).read_bytes(), json.dumps(strange).encode()]


def _shards(ground: Ground, data: bytes) -> None:
    """All bytes of tensors and values, as many as were committed."""
    for name in ("__0_0.distcp", "__0_1.distcp"):
        size = (ground.pristine / "checkpoint" / "step-2" / name).stat().st_size
        (ground.step / name).write_bytes(data[:size].ljust(size, b"\0"))
        data = data[size:]
    _load_shared(ground)


def _shards_seeds(ground: Ground) -> list[bytes]:
    return [b"".join((ground.step / name).read_bytes() for name in ("__0_0.distcp", "__0_1.distcp"))]


def _per_rank(ground: Ground, data: bytes) -> None:
    (ground.step / dcp.per_rank_name(0)).write_bytes(data)
    generators = RandomState()
    kept = generators.state_dict()
    try:
        _load(ground, loader=PerRank(None), random=PerRank(generators))
        state = numpy.random.get_state()
        assert isinstance(state, dict) or 0 <= state[2] <= 624, "NumPy's generator reads elsewhere"
        # What was given to them must be of use.
        for use in (random.random, numpy.random.rand, lambda: torch.rand(3)):
            use()
    finally:
        generators.load_state_dict(kept)


def _per_rank_seeds(ground: Ground) -> list[bytes]:
    found = [(ground.step / dcp.per_rank_name(0)).read_bytes()]
    kept = RandomState().state_dict()
    for spoiled in ({"numpy": (kept["numpy"][0], kept["numpy"][1], 625, 0, 0.0)}, {"python": (3, (1, 2), None)}):
        out = io.BytesIO()
        torch.save({"loader": None, "random": {**kept, **spoiled}}, out)
        found.append(out.getvalue())
    return found


def _archive(ground: Ground, data: bytes) -> None:
    del ground
    archives.load(archives.Source(data), "it")


def _archive_seeds(ground: Ground) -> list[bytes]:
    del ground
    seeds = [b.archive(b.tensor(b.storage())), b.archive(b.NONE, {})]
    for value in ({"a": [1, 2.5, None], "t": torch.ones(2, 2)}, [numpy.arange(3)], torch.nn.Parameter(torch.ones(1))):
        out = io.BytesIO()
        torch.save(value, out)
        seeds.append(out.getvalue())
    return seeds


#: What the pickle of a harness can refer to: members of an archive by their sizes in bytes.
MEMBERS = {"data/0": bytes(16), "data/1": bytes(range(64)), "data/2": b""}


def _pickle(ground: Ground, data: bytes) -> None:
    del ground
    found = archives.load(archives.Source(b.archive(data, MEMBERS)), "it")
    for tensor in _tensors(found):
        # PyTorch makes a storage longer that is too short for a tensor, by memory that was somebody else's.
        assert tensor.untyped_storage().nbytes() in map(len, MEMBERS.values()), tensor.shape


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    waiting, known = [value], set()
    while waiting:
        if id(part := waiting.pop()) in known:
            continue
        known.add(id(part))
        if isinstance(part, torch.Tensor):
            yield part
        elif isinstance(part, dict):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, tuple | list | set):
            waiting += part


def _pickle_seeds(ground: Ground) -> list[bytes]:
    del ground
    values = (
        {"a": (1, -2, 1 << 40), "b": [None, True, "x", b"y", 1.5]},
        numpy.arange(0, 4, dtype="M8[s]"), numpy.float64(2), numpy.array(["ab"], dtype="U2"),
        {1, 2}, bytearray(b"x"), 2 + 1j, torch.Size([2]), torch.int8,
    )  # fmt: skip
    seeds = [pickle.dumps(value, protocol)[2:-1] for value in values for protocol in (2, 4)]
    seeds += [b.tensor(b.storage()), b.tensor(b.storage("DoubleStorage", "1", 8), 1, (2, 2), (2, 1))]
    seeds += [b.array(b.plain_dtype("f8"), (2,), bytes(16)), b.dtype("V8"), b.call(b.name("posix", "system"))]
    seeds += [b.bomb(31), b.call(b.bomb(31)), b.EMPTY_DICT + b.bomb(31) + b.NONE + b"s"]
    return [*seeds, b.call(b.name("collections", "OrderedDict")) + b"}" + b.text("x") + b.NONE + b"s" + b.BUILD]


# -- the journal ---------------------------------------------------------------------------------------------


def _ask(journal: Journal) -> None:
    """Everything that one may ask, and what it decides."""
    for record in journal.checkpoints():
        _require_inside(record.directory)
        _require_inside(record.staging_directory)
        for part in (journal.files, journal.transitions, journal.verifications):
            with contextlib.suppress(CheckpointError):
                part(record.id)
    for question in (
        *(journal.epochs, journal.current_epoch, journal.standing, journal.transitions, journal.decisions),
        *(journal.require_intact, lambda: [journal.newest(name, 2) for name in journal.series()]),
        lambda: [journal.format_of(name) for name in journal.series()],
        lambda: [journal.live_directories(name) for name in journal.series()],
        lambda: journal.traced([1, 2], ["x"], [("checkpoint", 2)]),
    ):
        with contextlib.suppress(CheckpointError):
            question()


def _put_journal(ground: Ground, data: bytes | None, rollback: bytes | None = None) -> None:
    """Lay journal and rollback journal in place; None for none."""
    for suffix, content in (("", data), ("-journal", rollback), ("-wal", None), ("-shm", None)):
        path = Path(f"{ground.journal}{suffix}")
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
    for backup in ground.journal.parent.glob("*.before-*"):
        backup.unlink()


def _journal(ground: Ground, data: bytes) -> None:
    _put_journal(ground, data)
    try:
        with Journal.open_read_only(ground.journal) as journal:
            _ask(journal)
    finally:
        assert ground.journal.read_bytes() == data, "reading changed it"
    _open_to_write(ground)


def _open_to_write(ground: Ground) -> None:
    with Journal.open(ground.journal) as journal:
        _ask(journal)
        journal.begin_epoch(host="h", pid=1, command="c", versions={})
        _ask(journal)


def _journal_seeds(ground: Ground) -> list[bytes]:
    return [ground.journal.read_bytes(), _RELEASED.read_bytes()]


def _spilled(ground: Ground) -> tuple[bytes, bytes]:
    """A journal in the middle of a transaction that has reached the file, and its rollback journal."""
    _put_journal(ground, (ground.pristine.parent / "alpha.journal.db").read_bytes())
    with contextlib.closing(sqlite3.connect(ground.journal, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=PERSIST")
        connection.execute("PRAGMA cache_size=1")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE epoch SET host = 'elsewhere'")
        for number in range(100, 120):
            connection.execute("INSERT INTO pin VALUES ('checkpoint', ?, ?, 0)", (number, "x" * 1000))
        return ground.journal.read_bytes(), Path(f"{ground.journal}-journal").read_bytes()


def _rollback(ground: Ground, data: bytes) -> None:
    """A rollback journal beside a journal in the middle of a transaction: SQLite puts what it says into the file."""
    _put_journal(ground, _torn(ground), data)
    with contextlib.suppress(CheckpointError), Journal.open_read_only(ground.journal) as journal:
        _ask(journal)
    _open_to_write(ground)


_torn_ones: dict[Path, tuple[bytes, bytes]] = {}


def _torn(ground: Ground) -> bytes:
    if ground.folder not in _torn_ones:
        _torn_ones[ground.folder] = _spilled(ground)
    return _torn_ones[ground.folder][0]


def _rollback_seeds(ground: Ground) -> list[bytes]:
    _torn(ground)
    data = _torn_ones[ground.folder][1]
    name = str(ground.folder / "precious" / "secret").encode()
    total = sum(name) & 0xFFFFFFFF
    end = b"\0\0\0\1" + name + struct.pack(">II", len(name), total) + bytes.fromhex("d9d505f920a163d7")
    return [data, data + end, data[:28], bytes(28)]


TABLES = (
    *("run", "epoch", "checkpoint", "transition", "file", "retirement_decision", "pin", "verification"),
    *("alembic_version", "seal"),
)
_KINDS = ("null", "int", "float", "text", "blob", "other", "delete", "repeat")


@dataclasses.dataclass(frozen=True)
class Edit:
    """One value put into one row of a journal, by somebody who knows how to seal it."""

    table: int
    column: int
    row: int
    kind: str
    value: bytes = b""

    def to_bytes(self) -> bytes:
        """As the harness takes it."""
        head = bytes([self.table, self.column, self.row, _KINDS.index(self.kind), len(self.value[:255])])
        return head + self.value[:255]

    @classmethod
    def all(cls, data: bytes) -> Iterator[Edit]:
        """What any bytes say."""
        while len(data) >= 5:
            table, column, row, kind, length = data[:5]
            yield cls(table % len(TABLES), column, row, _KINDS[kind % len(_KINDS)], data[5 : 5 + length])
            data = data[5 + length :]

    @classmethod
    def of(cls, where: str, value: object, row: int = 0) -> Edit:
        """*value* for a ``table.column``."""
        table, _, column = where.partition(".")
        number = COLUMNS[table].index(column)
        match value:
            case None:
                kind, data = "null", b""
            case int():
                kind, data = "int", struct.pack("<q", value)
            case float():
                kind, data = "float", struct.pack("<d", value)
            case bytes():
                kind, data = "blob", value
            case _:
                kind, data = "text", str(value).encode(errors="surrogatepass")
        return cls(TABLES.index(table), number, row, kind, data)


COLUMNS = {
    "run": ("id", "run_id", "created_at", "last_change"),
    "epoch": ("epoch", "started_at", "ended_at", "host", "pid", "command", "versions"),
    "checkpoint": (
        *("id", "series", "step", "format", "state", "epoch", "world_size", "directory", "staging_directory"),
        *("created_at", "bytes", "manifest_digest", "committed_at", "commit_seq", "finished_at", "stage_s"),
        *("write_s", "gather_s", "commit_s", "reason", "failures", "metrics", "per_rank", "overwrites"),
        *("retire_started_at", "retire_reason", "retired_at"),
    ),
    "transition": ("id", "checkpoint_id", "source", "dest", "at", "epoch", "host", "pid", "note"),
    "file": ("checkpoint_id", "path", "rank", "size", "digest"),
    "retirement_decision": ("checkpoint_id", "decided_by", "verdict", "reasons", "at"),
    "pin": ("series", "step", "note", "pinned_at"),
    "verification": ("id", "checkpoint_id", "at", "level", "ok", "mismatches"),
    "alembic_version": ("version_num",),
    "seal": ("name", "checkpoint_id", "rows", "digest"),
}


def _edit(path: Path, edits: Iterable[Edit], *, sealed: bool) -> None:
    """Change rows behind the journal's back, whatever its CHECKs and triggers say."""
    away = Guard.of_this_process().looking_away()
    with away, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints=ON")
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        for edit in edits:
            with contextlib.suppress(sqlite3.Error):
                _apply(connection, edit)
        for _, text in triggers:
            connection.execute(text)
        if sealed:
            # Text that is no UTF-8 cannot be sealed by anybody.
            with contextlib.suppress(sqlite3.Error):
                seal.renew(connection)


def _apply(connection: sqlite3.Connection, edit: Edit) -> None:
    table = TABLES[edit.table]
    columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    if not columns:
        return
    rows = connection.execute(f"SELECT * FROM {table}").fetchall()
    column = columns[edit.column % len(columns)]
    row: Sequence[Any] = rows[edit.row % len(rows)] if rows else [None] * len(columns)
    number = struct.unpack("<q", edit.value[:8].ljust(8, b"\0"))[0]
    match edit.kind:
        case "null":
            value: Any = None
        case "int":
            value = number
        case "float":
            value = struct.unpack("<d", edit.value[:8].ljust(8, b"\0"))[0]
        case "text":
            value = edit.value.decode(errors="surrogateescape").encode(errors="surrogateescape")
        case "blob":
            value = edit.value
        case _:
            value = row[number % len(columns)]
    where = " AND ".join(f"{name} IS ?" for name in columns)
    if edit.kind == "delete":
        connection.execute(f"DELETE FROM {table} WHERE {where}", row)
    elif edit.kind == "repeat" or not rows:
        made = [value if name == column else old for name, old in zip(columns, row, strict=True)]
        connection.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})", made)
    else:
        how = "CAST(? AS TEXT)" if edit.kind == "text" else "?"
        connection.execute(f"UPDATE {table} SET {column} = {how} WHERE {where}", [value, *row])


def _rows(ground: Ground, data: bytes) -> None:
    """A journal with rows of the author's own, sealed; and what recovery would do, and does."""
    ground.renew()
    _put_journal(ground, ground.journal.read_bytes())
    _edit(ground.journal, Edit.all(data), sealed=True)
    for words in (
        *(("ls", ground.run), ("log", ground.run), ("show", ground.run, "2"), ("check", ground.run)),
        *(("recover", ground.run), ("ls", ground.run, "--json"), ("check", ground.run, "--deep", "--json")),
        ("metrics", ground.run, "--json"),
    ):
        tame(*words)
    with contextlib.suppress(CheckpointError), Journal.open_read_only(ground.journal) as journal:
        _ask(journal)
    tame("recover", ground.run, "--apply")


def _rows_seeds(ground: Ground) -> list[bytes]:
    del ground
    edits = (
        ("checkpoint.directory", "../precious"), ("checkpoint.staging_directory", "checkpoint/../../precious"),
        ("checkpoint.series", "'; DROP TABLE run; --"), ("checkpoint.state", "GATHERED"), ("checkpoint.step", 1 << 62),
        ("file.path", "/etc/passwd"), ("file.size", -1), ("epoch.host", "\x1b[2J"), ("epoch.started_at", float("inf")),
        ("checkpoint.retire_started_at", 1.0), ("checkpoint.metrics", '{"a": NaN}'), ("epoch.versions", "[" * 200),
        ("checkpoint.manifest_digest", b"\0"), ("run.run_id", "x"), ("checkpoint.overwrites", 2),
    )  # fmt: skip
    return [b"", *(Edit.of(where, value).to_bytes() for where, value in edits)]


def _upgrade(ground: Ground, data: bytes) -> None:
    """A journal of schema 0001, which has no seal."""
    _put_journal(ground, _RELEASED.read_bytes())
    _edit(ground.journal, Edit.all(data), sealed=False)
    _put_journal(ground, ground.journal.read_bytes())
    _open_to_write(ground)


# -- small files and names -------------------------------------------------------------------------------------


def _run_id(ground: Ground, data: bytes) -> None:
    (ground.run / RUN_ID_NAME).write_bytes(data)
    rundir = ground.rundir()
    found = rundir.run_id()
    assert found is None or is_run_id(found)
    rundir.require_pair("0" * 32)


def _lock(ground: Ground, data: bytes) -> None:
    """A lock that somebody holds, with a note of who it is."""
    rundir = ground.rundir()
    holder = os.open(rundir.lock_path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        rundir.lock_path.write_bytes(data)
        rundir.acquire("fuzz")
        raise AssertionError("the lock was taken")
    finally:
        os.close(holder)


def _lock_seeds(ground: Ground) -> list[bytes]:
    note = {"host": "h\x1b[2J", "pid": 1 << 70, "since": 1e300, "command": ["x"]}
    return [ground.rundir().lock_path.read_bytes(), json.dumps(note).encode()]


def _project(ground: Ground) -> None:
    rundir = ground.rundir()
    with Journal.open_read_only(ground.journal) as journal:
        for text in rundir.stale_projections(journal.run_id, journal.live_lists()):
            assert isinstance(text, str)
    tame("check", ground.run)


def _meta(ground: Ground, data: bytes) -> None:
    (ground.run / META_NAME).write_bytes(data)
    assert isinstance(ground.rundir().read_meta(), dict | None)
    _project(ground)


def _meta_seeds(ground: Ground) -> list[bytes]:
    return [(ground.run / META_NAME).read_bytes(), b'{"run_id": 1, "hf_list": {"a": [1e999]}}']


def _link(ground: Ground, data: bytes) -> None:
    """Where a latest link may lead."""
    target = os.fsdecode(data[:4000].replace(b"\0", b"") or b"x")
    link = ground.run / "hf" / "hf-latest"
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    _project(ground)


def _names(ground: Ground, data: bytes) -> None:
    """Names where a run has its own: each line makes something, of a kind and at a place that its first byte says."""
    away = Guard.of_this_process().looking_away
    made: list[Path] = []
    try:
        with away():
            made += _make_names(ground, data)
        rundir = ground.rundir()
        for found in rundir.listing(["checkpoint"]):
            assert found.series == "checkpoint"
        rundir.series_on_disk()
        preview_rebuild(rundir)
        with Journal.open_read_only(ground.journal) as journal:
            recovery.preview(journal, rundir)
        tame("check", ground.run)
        tame("recover", ground.run, "--json")
    finally:
        with away():
            for path in made:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _make_names(ground: Ground, data: bytes) -> Iterator[Path]:
    folders = (ground.run / "checkpoint", ground.step, ground.run)
    for line in filter(None, data.split(b"\n")[:20]):
        name = os.fsdecode(line[1:].replace(b"/", b"_").replace(b"\0", b"_")[:255])
        path = folders[line[0] % 3] / name
        if name in ("", ".", "..") or os.path.lexists(path):
            continue
        kind = line[0] // 3 % 4
        if kind == 0:
            path.touch()
        elif kind == 1:
            path.symlink_to("../../../precious")
        elif kind == 2:
            os.mkfifo(path)
        else:
            path.mkdir()
            shutil.copyfile(ground.step / MANIFEST_NAME, path / MANIFEST_NAME)
        yield path


def _names_seeds(ground: Ground) -> list[bytes]:
    del ground
    names = (
        ".step-3.e1.a9.incomplete", ".step-1.e1.a1.retired", "step-3", "step-03", ".step-4.e1.a1.quarantined.1",
        f"step-{'9' * 18}", "\x1b[2Jstep-5", "step-6\udcff", "a" * 64,
    )  # fmt: skip
    made = [bytes([n % 12]) + os.fsencode(name) for n, name in enumerate(names * 3)]
    return [b"\n".join(made[start : start + 5]) for start in range(0, len(made), 5)]


_IN_REQUESTS = (b'"last"', b'"n"', b'"hours"', b'"verify"', b'"verified"', b'"ok"', b'"mismatches"')


def _requests(ground: Ground, data: bytes) -> None:
    """What a command may have asked, and what a manager may have answered."""
    folder = ground.run / requests.DIRECTORY
    folder.mkdir(exist_ok=True)
    id = "0" * 32
    for end in ("asked", "answered"):
        (folder / f"{id}.{end}").write_bytes(data)
    assert requests.waiting(ground.run) == [id]
    with contextlib.suppress(CheckpointError):
        answer = requests.answer_to(ground.run, id)
        assert answer is not None
        assert requests.parse_answer(answer.to_json()) == answer
    requests.sweep(ground.run)
    asked = requests.read(ground.run, id)
    assert asked is not None
    _require_tame(f"{asked.kind} {asked.series} {asked.host}")
    asked.is_wanted(time.time())
    assert requests.parse_request(asked.to_json(), id) == asked


def _requests_seeds(ground: Ground) -> list[bytes]:
    del ground
    rule = KeepLast(2) | KeepEvery(10) | KeepBest(1, "loss") | KeepFor(1.5)
    who: dict[str, Any] = {"series": "checkpoint", "epoch": 1, "host": "h", "pid": 1, "asked_at": 1.5, "deadline": 2.5}
    asked = (
        requests.Request(requests.PRUNE, **who, rule=rule, safe=3),
        requests.Request(requests.PIN, **who, step=5, note="n\n"),
        requests.Request(requests.VERIFY, **who, verified=(Verified(1, True), Verified(2, False, ("digest: a",)))),
    )
    answer = requests.Answer(requests.DONE, "", {3: ("last 2",)}, {1: "no rule keeps it"})
    return [*(one.to_json() for one in asked), answer.to_json(), requests.Answer(requests.REFUSED, "no").to_json()]


def _mounts(ground: Ground, data: bytes) -> None:
    """What the kernel tells of mounts, whose names and sources whoever mounts may choose."""
    del ground
    found = filesystems.parse_mountinfo(os.fsdecode(data)).values()
    filesystems.mount_over(found, "/data/runs")
    for mount in found:
        filesystems.file_system(mount)
        filesystems.options_that_matter(mount)
        filesystems.reach_of_locks(mount)


def _mounts_seeds(ground: Ground) -> list[bytes]:
    del ground
    lines = (
        b"36 35 98:0 / / rw,noatime shared:1 - ext4 /dev/root rw,data=writeback,barrier=0",
        rb"40 36 0:40 / /data\040x rw,relatime - nfs4 s:/x rw,vers=4.2,hard,nolock,local_lock=all",
        b"41 36 0:41 / /data rw - fuse.sshfs a@b:c rw,user_id=0",
        b"42 36 0:42 / /data/runs ro - lustre 10.0.0.1@tcp:/x rw,localflock",
    )
    return [*lines, b"\n".join(lines)]


# -- checkpoints of others ---------------------------------------------------------------------------------------


def _others(ground: Ground, files: Mapping[str, bytes]) -> None:
    """A directory of another library with these files."""
    theirs = ground.home / "theirs"
    with Guard.of_this_process().looking_away():
        shutil.rmtree(theirs, ignore_errors=True)
        for name, data in files.items():
            (theirs / name).parent.mkdir(parents=True, exist_ok=True)
            (theirs / name).write_bytes(data)
    report = foreign.judge(theirs, foreign.Asked(deep=True, world_size=3))
    assert report is not None
    _require_tame(json.dumps(report.to_dict()))
    for judged in report.layouts:
        for finding in (*judged.findings, *(one for each in judged.candidates for one in each.findings)):
            _require_tame(finding.text)
            assert len(finding.text) < 2000, f"{len(finding.text)} characters"


def _of_others(*names: str, **beside: bytes) -> Callable[[Ground, bytes], None]:
    more = {name.replace("_DOT_", "."): data for name, data in beside.items()}
    return lambda ground, data: _others(ground, {**more, **dict.fromkeys(names, data)})


def _their_index(ground: Ground, data: bytes) -> None:
    shards = {name: (ground.step / name).read_bytes() for name in ("__0_0.distcp", "__0_1.distcp")}
    _others(ground, {f"step-2/{name}": shard for name, shard in {**shards, ".metadata": data}.items()})


def _their_json(ground: Ground, data: bytes) -> None:
    """Everything that is JSON in any of them."""
    places = (
        ".xtuner", "20260801/checkpoints/ckpt-step-1/train_state.json", "checkpoint-1/trainer_state.json",
        "iter_0000001/metadata.json", "1/_CHECKPOINT_METADATA", "1/default/_METADATA", "model.safetensors.index.json",
    )  # fmt: skip
    text = {"latest_checkpointed_iteration.txt": data, "latest": data}
    _others(ground, {**dict.fromkeys(places, data), **text})


def _their_header_seeds(ground: Ground) -> list[bytes]:
    real = next(ground.run.glob("hf/hf-2/*.safetensors")).read_bytes()
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return [real, struct.pack("<Q", len(header)) + header + bytes(4), struct.pack("<Q", 1 << 62) + header]


def _their_json_seeds(ground: Ground) -> list[bytes]:
    del ground
    weights = {"metadata": {"total_size": 4}, "weight_map": {"a": "model.safetensors", "b": "../x", "c": "x.bin"}}
    lists = {"exp_dir": "/x/20260801", "checkpoint_list": ["/x/20260801/checkpoints/ckpt-step-1"], "cur_step": 1}
    return [json.dumps({"exps": [lists], "item_handlers": {"default": "x"}, **weights}).encode(), b"[" * 100_000]


_IN_JSON = (
    *(b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 30, b"null", b"true", b"[]", b"{}", b"[[", b'"', b"\\u0000"),
    *(b"\\ud800", b"../", b"/etc/passwd", b"\x1b[2J", b"'; DROP TABLE run; --"),
)
_IN_PICKLES = (
    *(b.NONE, b.TRUE, b.EMPTY_TUPLE, b.EMPTY_LIST, b.EMPTY_DICT, b.REDUCE, b.BUILD, b"\x81", b"Q", b"(", b"t", b"e"),
    *(b"\x93", b"\x94", b"\x85", b"\x86", b"\x87", b"q\0", b"h\0", b"r\xff\xff\xff\x7f", b"\x8a\x08", b"0", b"u", b"s"),
    *(b.number(-1), b.number(1 << 31), b.number(1 << 62), b.text("latin1"), b.text("x"), b.text("M8"), b.text("O8")),
    *(b.name(*name.split()) for name in archives._Values.names if not name.startswith("torch b")),
    *(b.name("posix", "system"), b.name("builtins", "eval"), b.name("builtins", "getattr"), b.storage(), b.bomb(31)),
)
_OF_INDEX = tuple(b.name(*name.split()) for name in index._Index.names if " " in name)
_IN_SQLITE = (b"SQLite format 3\0", b"CREATE VIEW", b"CREATE TRIGGER", b"CREATE TABLE", b"0001", b"0002", b"9999")

HARNESSES = {
    harness.name: harness
    for harness in (
        Harness("manifest", _manifest, _manifest_seeds, _IN_JSON),
        Harness("index", _index, _index_seeds, (*_OF_INDEX, *_IN_PICKLES[:40])),
        Harness("mappings", _mappings, _mappings_seeds, (*_IN_JSON, b"scheduler", b"plain", b"integer_keys", b"empty")),
        Harness("shards", _shards, _shards_seeds, _IN_PICKLES),
        Harness("per-rank", _per_rank, _per_rank_seeds, _IN_PICKLES),
        Harness("archive", _archive, _archive_seeds, (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7")),
        Harness("pickle", _pickle, _pickle_seeds, _IN_PICKLES, most_bytes=4096),
        Harness("journal", _journal, _journal_seeds, _IN_SQLITE, most_bytes=1 << 17),
        Harness("rollback", _rollback, _rollback_seeds, (bytes.fromhex("d9d505f920a163d7"),), most_bytes=1 << 18),
        Harness("rows", _rows, _rows_seeds, _IN_JSON, most_bytes=1024),
        Harness("upgrade", _upgrade, _rows_seeds, _IN_JSON, most_bytes=1024),
        Harness("run-id", _run_id, lambda g: [(g.run / RUN_ID_NAME).read_bytes(), b"x\0y"], most_bytes=8192),
        Harness("lock", _lock, _lock_seeds, _IN_JSON, most_bytes=4096),
        Harness("meta", _meta, _meta_seeds, _IN_JSON, most_bytes=4096),
        Harness("link", _link, lambda g: [b"hf-2", b"../..", b"\x1b[2J", b"\xff"], most_bytes=4096),
        Harness("names", _names, _names_seeds, (b".e1.a9.incomplete", b".retired", b"step-", b"hf-"), most_bytes=2048),
        Harness("requests", _requests, _requests_seeds, (*_IN_JSON, *_IN_REQUESTS), most_bytes=4096),
        Harness("their-index", _their_index, _index_seeds, (*_OF_INDEX, *_IN_PICKLES[:40])),
        Harness(
            "their-metadata", _of_others("step_1/metadata.pkl", "step_1/model_0.pt"), _pickle_seeds, _IN_PICKLES[:40]
        ),
        Harness("their-archive", _of_others("last.ckpt"), _archive_seeds, (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6")),
        Harness("their-header", _of_others("model.safetensors", config_DOT_json=b"{}"), _their_header_seeds, _IN_JSON),
        Harness("their-json", _their_json, _their_json_seeds, _IN_JSON),
        Harness("mounts", _mounts, _mounts_seeds, (b" - ", rb"\040", rb"\777", b"fuse"), most_bytes=4096),
    )
}
