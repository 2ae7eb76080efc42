"""
What one may ask the journal. Reading never changes, creates or migrates anything.

One public method is one transaction. Times are Unix seconds, sizes bytes, durations seconds,
directories relative to the run directory. It is asked in SQL, by the driver: a command that only reads need
not wait for SQLAlchemy, which takes longer to import than most answers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from ckptmgr.errors import CheckpointNotFound, JournalCorrupt, JournalNotFound, JournalSchemaMismatch
from ckptmgr.journal import database, declared, seal
from ckptmgr.journal.declared import IN_FLIGHT, LIVE
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, EpochRecord, Format, TransitionRecord
from ckptmgr.manifest import MAX_NUMBER, FileEntry, is_digest, is_finite, is_plain_relative, is_run_id

T = TypeVar("T")
COMMITTED = CheckpointState.COMMITTED
_STATES = {state.value: state for state in CheckpointState}
_FORMATS = {layout.value: layout for layout in Format}
#: Numbers that are bytes; all others count something that a directory may be named after.
_SIZES = ("bytes", "size")
_STAGING = re.compile(r"\.e[0-9]{1,18}\.a[0-9]{1,18}\.incomplete\Z")


def _columns(table: str) -> str:
    return ", ".join(f"{table}.{name}" for name in declared.COLUMNS[table])


_NEWEST_EPOCH = "SELECT coalesce(max(epoch), 0) FROM epoch"
_EPOCHS = f"SELECT {_columns('epoch')} FROM epoch ORDER BY epoch"  # noqa: S608
_TRANSITIONS = (
    f"SELECT {_columns('transition')}, checkpoint.series, checkpoint.step FROM transition"  # noqa: S608
    " JOIN checkpoint ON checkpoint.id = transition.checkpoint_id WHERE transition.id > ?"
)
_VERIFICATIONS = f"SELECT {_columns('verification')} FROM verification"  # noqa: S608
_STANDING = "state <> 'FAILED' AND retired_at IS NULL"
ATTEMPTS = (
    f"SELECT {_columns('checkpoint')}, pin.step IS NOT NULL AS has_pin FROM checkpoint"  # noqa: S608
    " LEFT OUTER JOIN pin ON pin.series = checkpoint.series AND pin.step = checkpoint.step"
)
#: The plus keeps SQLite from walking all rows in this order, where a partial index holds the few that are asked for.
_FEW_BY_ID = "+checkpoint.id"
#: And here from reading all rows of a series, where those that are asked for are the last ones of an order.
_LAST_COMMITTED = (
    f"{ATTEMPTS} WHERE +checkpoint.series = ? AND {LIVE} AND commit_seq IS NOT NULL ORDER BY commit_seq DESC LIMIT ?"
)
_IN_FLIGHT = f"{ATTEMPTS} WHERE checkpoint.series = ? AND {IN_FLIGHT}"
_FAILED_AFTER = f"{ATTEMPTS} WHERE +checkpoint.series = ? AND state = 'FAILED' AND checkpoint.id > ?"
#: Values in one query; SQLite takes a few hundred in all its versions.
_AT_ONCE = 400

Facts = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Verification:
    """That the files of a committed checkpoint were compared with the journal: sizes, or digests too."""

    id: int
    checkpoint_id: int
    at: float
    level: str
    ok: bool
    mismatches: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Pin:
    """That the live checkpoint of a step stays whatever the keep rules say, since when, and what was noted."""

    series: str
    step: int
    note: str
    pinned_at: float


@dataclasses.dataclass(frozen=True)
class Decision:
    """The last word of retention on a checkpoint, and the checkpoint whose commit asked for it."""

    checkpoint_id: int
    decided_by: int
    verdict: str
    reasons: tuple[str, ...]
    at: float


class Questions:
    """
    The reading half of `Journal`.

    Attributes:
        path: The journal's one name: absolute, links in its folders resolved.
        run_id: Which run this is: 32 hex digits, drawn when the journal was created.
        read_only: Whether it was opened with `Journal.open_read_only`.
    """

    path: Path
    run_id: str
    read_only: bool

    def __init__(self, opened: database.Database, run_id: str) -> None:
        self._database = opened
        self.path = opened.path
        self.read_only = opened.read_only
        self.run_id = run_id
        self._decisions_compared = False

    @classmethod
    def open_read_only(cls, path: Path, *, whole: bool = False) -> Self:
        """
        Open the journal for reading. Never creates, migrates, rolls back or writes anything.

        What decides which attempts there are and what may be done with each is looked through for damage (0.05 s
        for 10,000 checkpoints); the rest is when it is read, unless the *whole* of it is to be looked through now.

        Raises:
            JournalNotFound: There is no journal, or nobody has finished creating it.
            JournalSchemaMismatch: It has an older or a newer schema; the hint names the command.
            JournalCorrupt: It is damaged, or has something in it that we did not make.
            JournalError: It cannot be read, or holds an unfinished transaction of a process that died.
        """
        path = database.plain_path(path)
        if not path.exists():
            raise JournalNotFound(f"there is no journal at {path}", path=str(path))
        found = database.look_through(path, "ro", every_page=whole, every_row=whole, outlined=True)
        if found is None:
            raise JournalNotFound(f"{path} is empty: no manager has finished creating it", path=str(path))
        if found != declared.REVISION:
            raise schema_mismatch(path, found)
        return cls._opened(database.Database(path))

    @classmethod
    def _opened(cls, opened: database.Database) -> Self:
        try:
            with opened.reading() as connection:
                row = connection.execute("SELECT run_id FROM run").fetchone()
            if row is None or not is_run_id(row[0]):
                raise JournalCorrupt(f"{opened.path} names no run", path=str(opened.path), reason="no run id")
        except BaseException:
            opened.close()
            raise
        return cls(opened, str(row[0]))

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def require_intact(self, checkpoints: Iterable[int] | None = None) -> None:
        """
        Look again whether what decides is what was written, as opening did.

        For a journal that has been open for long: what it says next may lose a checkpoint if it is wrong.

        Args:
            checkpoints: Only these attempts, and the pins; None for everything that decides.

        Raises:
            JournalCorrupt: It is not.
        """
        with self._database.reading() as connection:
            if checkpoints is None:
                database.require_sound(connection, self.path, whole=False)
                database.require_intact(connection, self.path, seal.DECISIVE)
            else:
                database.require_intact(connection, self.path, ["checkpoint", "pin"], of=checkpoints)

    def current_epoch(self) -> int:
        """The newest epoch, the only one that may change anything; 0 before the first."""
        with self._database.reading() as connection:
            (value,) = connection.execute(_NEWEST_EPOCH).fetchone()
        return self._number(value)

    def epochs(self) -> list[EpochRecord]:
        """Every start of a manager or of a command that changes the run, oldest first."""
        return [self._epoch(row) for row in self._asked(_EPOCHS)]

    def checkpoints(self, *, series: str | None = None, live_only: bool = False) -> list[CheckpointRecord]:
        """Every attempt in the order in which they began; *live_only*: those one may resume from."""
        conditions = [*(["checkpoint.series = ?"] if series is not None else []), *([LIVE] if live_only else [])]
        where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        order = _FEW_BY_ID if live_only else "checkpoint.id"
        return self._records(f"{ATTEMPTS}{where} ORDER BY {order}", *([series] if series is not None else []))

    def present(self, series: str, count: int | None = None) -> list[CheckpointRecord]:
        """
        The attempts of *series* that are no history: not retired, and not FAILED before the newest commit.

        Args:
            series: Which series.
            count: Only so many, those that began last.
        """
        query = (
            f"{ATTEMPTS} WHERE checkpoint.series = ? AND retired_at IS NULL"
            " AND (state <> 'FAILED' OR checkpoint.id > ?) ORDER BY checkpoint.id DESC LIMIT ?"
        )
        with self._database.reading() as connection:
            newest = _rows(connection, _LAST_COMMITTED, series, 1)
            after = newest[0]["id"] if newest else 0
            rows = self._attempts(connection, query, series, after, -1 if count is None else count)
        return [self._record(row) for row in reversed(rows)]

    def has_committed(self, series: str) -> bool:
        """Whether any checkpoint of *series* was ever COMMITTED, retired ones included."""
        with self._database.reading() as connection:
            query = "SELECT 1 FROM checkpoint WHERE series = ? AND commit_seq IS NOT NULL LIMIT 1"
            return connection.execute(query, (series,)).fetchone() is not None

    def count(self, series: str) -> int:
        """How many attempts of *series* there have been."""
        with self._database.reading() as connection:
            (number,) = connection.execute("SELECT count(*) FROM checkpoint WHERE series = ?", (series,)).fetchone()
        return self._number(number)

    def pinned(self, series: str) -> frozenset[int]:
        """The steps of *series* that are pinned, compared with the seal: what is not pinned may be let go."""
        rows = self._asked("SELECT step FROM pin WHERE series = ?", series, sealed=("pin", None))
        return frozenset(self._facts("pin", row)["step"] for row in rows)

    def pin_of(self, series: str, step: int) -> Pin | None:
        """The pin of a step, if it is pinned."""
        query = f"SELECT {_columns('pin')} FROM pin WHERE series = ? AND step = ?"  # noqa: S608
        rows = self._asked(query, series, step, sealed=("pin", None))
        return Pin(**self._facts("pin", rows[0])) if rows else None

    def in_flight(self, series: str) -> CheckpointRecord | None:
        """The attempt of *series* that is in flight; there is at most one."""
        return next(iter(self._records(_IN_FLIGHT, series)), None)

    def standing(self, series: str | None = None) -> list[CheckpointRecord]:
        """Every attempt that is not gone: in flight, live, or retiring and not deleted yet."""
        query = f"{ATTEMPTS} WHERE {_STANDING}"
        if series is None:
            return self._records(f"{query} ORDER BY checkpoint.id")
        return self._records(f"{query} AND checkpoint.series = ? ORDER BY checkpoint.id", series)

    def newest(self, series: str, count: int) -> list[CheckpointRecord]:
        """
        The *count* live checkpoints of *series* that committed last, what is in flight, and what FAILED since the last.

        All of one moment, in the order of their numbers, and without reading the history before them.
        """
        with self._database.reading() as connection:
            rows = self._attempts(connection, _LAST_COMMITTED, series, count)
            last = rows[0]["id"] if rows else 0
            rows += self._attempts(connection, _IN_FLIGHT, series)
            rows += self._attempts(connection, _FAILED_AFTER, series, last)
        return [self._record(row) for row in sorted(rows, key=lambda row: row["id"])]

    def last_failed(self, series: str) -> CheckpointRecord | None:
        """The attempt of *series* that began last of those that FAILED."""
        return next(iter(self._records(f"{_FAILED_AFTER} ORDER BY checkpoint.id DESC LIMIT 1", series, 0)), None)

    def live_directories(self, series: str) -> frozenset[str]:
        """The directories of all live checkpoints of *series*; nothing else of them is read."""
        query = f"SELECT directory FROM checkpoint WHERE series = ? AND {LIVE}"  # noqa: S608
        with self._database.reading() as connection:
            return frozenset(directory for (directory,) in connection.execute(query, (series,)))

    def live_lists(self) -> dict[str, list[str]]:
        """Of each series with live checkpoints their directories, as they were committed; nothing else is read."""
        query = f"SELECT series, directory FROM checkpoint WHERE {LIVE} ORDER BY commit_seq"  # noqa: S608
        found: dict[str, list[str]] = {}
        with self._database.reading() as connection:
            for series, directory in connection.execute(query):
                found.setdefault(series, []).append(directory)
        return found

    def of_step(self, series: str, step: int) -> list[CheckpointRecord]:
        """Every attempt to save *step*."""
        query = f"{ATTEMPTS} WHERE checkpoint.series = ? AND checkpoint.step = ? ORDER BY checkpoint.id"
        return self._records(query, series, step)

    def traced(
        self, numbers: Iterable[int], staging_directories: Iterable[str], steps: Iterable[tuple[str, int]]
    ) -> list[CheckpointRecord]:
        """Every attempt with one of these *numbers* or *staging_directories*, or to save one of *steps* of a series."""
        found: dict[int, CheckpointRecord] = {}
        for column, one, values in (
            ("checkpoint.id", "?", [(number,) for number in {*numbers}]),
            ("staging_directory", "?", [(name,) for name in {*staging_directories}]),
            ("(checkpoint.series, checkpoint.step)", "(?, ?)", [*{*steps}]),
        ):
            ordered: list[tuple[Any, ...]] = sorted(values)
            for start in range(0, len(ordered), _AT_ONCE):
                some = ordered[start : start + _AT_ONCE]
                among = ", ".join([one] * len(some))
                among = f"VALUES {among}" if one != "?" else among
                query = f"{ATTEMPTS} WHERE {column} IN ({among})"
                found |= {record.id: record for record in self._records(query, *(each for row in some for each in row))}
        return [found[id] for id in sorted(found)]

    def checkpoint(self, checkpoint_id: int) -> CheckpointRecord:
        """
        One attempt.

        Raises:
            CheckpointNotFound: There is no such attempt.
        """
        records = self._records(f"{ATTEMPTS} WHERE checkpoint.id = ?", checkpoint_id)
        if not records:
            raise self._no_attempt(checkpoint_id)
        return records[0]

    def find(self, series: str, step: int) -> CheckpointRecord:
        """
        The live checkpoint of a step; if there is none, the newest attempt.

        Raises:
            CheckpointNotFound: The step was never begun.
        """
        query = (
            f"{ATTEMPTS} WHERE checkpoint.series = ? AND checkpoint.step = ?"
            f" ORDER BY {LIVE} DESC, checkpoint.id DESC LIMIT 1"
        )
        records = self._records(query, series, step)
        if not records:
            raise not_found(series, step)
        return records[0]

    def files(self, checkpoint_id: int) -> list[FileEntry]:
        """Every file of a gathered checkpoint, by path; an attempt that was never gathered has none."""
        query = "SELECT path, size, digest, rank FROM file WHERE checkpoint_id = ? ORDER BY path"
        rows = self._asked(query, checkpoint_id, sealed=("file", [checkpoint_id]))
        found = [FileEntry(**self._facts("file", row)) for row in rows]
        for entry in found:
            if not is_plain_relative(entry.path) or not is_digest(entry.digest):
                raise self._corrupt(f"no file can be {entry.path[:80]!r} with the digest {entry.digest[:80]!r}")
        return found

    def transitions(self, checkpoint_id: int | None = None, after_id: int = 0) -> list[TransitionRecord]:
        """The history, oldest first: of one attempt or of all, only what came after line *after_id*."""
        values = [after_id]
        query = _TRANSITIONS
        if checkpoint_id is not None:
            query += " AND transition.checkpoint_id = ?"
            values.append(checkpoint_id)
        with self._database.reading() as connection:
            rows = _rows(connection, f"{query} ORDER BY transition.id", *values)
            of = [checkpoint_id] if checkpoint_id is not None else {row["checkpoint_id"] for row in rows}
            everything = checkpoint_id is None and not after_id
            database.require_intact(connection, self.path, ["transition"], of=None if everything else of)
        found = []
        for row in rows:
            facts = self._facts("transition", row)
            facts["source"] = None if row["source"] is None else self._word(_STATES, row["source"])
            facts["dest"] = self._word(_STATES, row["dest"])
            whose = self._facts("checkpoint", {name: row[name] for name in ("series", "step")})
            found.append(TransitionRecord(**facts | whose))
        return found

    def series(self) -> list[str]:
        """The names of all series seen, in the order of their first use."""
        rows = self._asked("SELECT series FROM checkpoint GROUP BY series ORDER BY min(id)")
        return [self._series_name(self._facts("checkpoint", row)["series"]) for row in rows]

    def format_of(self, series: str) -> Format | None:
        """The format of a series, None before its first save."""
        rows = self._asked("SELECT format FROM checkpoint WHERE series = ? LIMIT 1", series)
        return self._word(_FORMATS, rows[0]["format"]) if rows else None

    def decisions(self, of: Iterable[int] | None = None) -> dict[int, tuple[str, tuple[str, ...]]]:
        """The last word of retention on each checkpoint it looked at, or those *of*: ("keep" or "drop", reasons)."""
        query = "SELECT checkpoint_id, verdict, reasons FROM retirement_decision"
        self._compare_decisions()
        rows = self._asked(query) if of is None else self._asked_of(f"{query} WHERE checkpoint_id IN", of)
        return {
            each["checkpoint_id"]: (each["verdict"], self._texts(each["reasons"])) for each in map(self._decision, rows)
        }

    def origins(self, of: Iterable[int]) -> dict[int, str]:
        """How those of these that no manager saved came into the journal: adopted, or rebuilt, and from what."""
        query = (
            "SELECT checkpoint_id, note FROM transition WHERE source IS NULL"
            " AND (note LIKE 'adopted from %' OR note LIKE 'rebuilt from %') AND checkpoint_id IN"
        )
        rows = [self._facts("transition", row) for row in self._asked_of(query, of)]
        return {row["checkpoint_id"]: row["note"] for row in rows}

    def decision_on(self, checkpoint_id: int) -> Decision | None:
        """The last word of retention on one checkpoint, if it has looked at it."""
        query = f"SELECT {_columns('retirement_decision')} FROM retirement_decision WHERE checkpoint_id = ?"  # noqa: S608
        self._compare_decisions()
        rows = self._asked(query, checkpoint_id)
        if not rows:
            return None
        facts = self._decision(rows[0])
        return Decision(**{**facts, "reasons": self._texts(facts["reasons"])})

    def verifications(self, checkpoint_id: int) -> list[Verification]:
        """Every comparison of a checkpoint's files with the journal, oldest first."""
        query = f"{_VERIFICATIONS} WHERE checkpoint_id = ? ORDER BY id"
        rows = self._asked(query, checkpoint_id, sealed=("verification", [checkpoint_id]))
        return [self._verification(row) for row in rows]

    def newest_verifications(self, of: Iterable[int]) -> dict[int, Verification]:
        """Of each of these whose bytes were compared with the journal: the last time."""
        query = (
            f"{_VERIFICATIONS} WHERE level = 'digest' AND NOT EXISTS (SELECT 1 FROM verification AS later"  # noqa: S608
            " WHERE later.checkpoint_id = verification.checkpoint_id AND later.level = 'digest'"
            " AND later.id > verification.id) AND checkpoint_id IN"
        )
        rows = self._asked_of(query, of, sealed="verification")
        return {found.checkpoint_id: found for found in map(self._verification, rows)}

    def _asked(self, query: str, *values: Any, sealed: tuple[str, Sequence[int] | None] | None = None) -> list[Facts]:
        """The rows of one query; with *sealed* that table, of all or some checkpoints, is compared with the seal."""
        with self._database.reading() as connection:
            rows = _rows(connection, query, *values)
            if sealed is not None:
                table, of = sealed
                database.require_intact(connection, self.path, [table], of=of)
        return rows

    def _asked_of(self, query: str, numbers: Iterable[int], *, sealed: str | None = None) -> list[Facts]:
        """The rows of a query that ends with IN, for any *numbers*; the table *sealed* of these is compared, if any."""
        ordered = sorted(numbers)
        found = []
        for start in range(0, len(ordered), _AT_ONCE):
            few = ordered[start : start + _AT_ONCE]
            whole = f"{query} ({', '.join('?' * len(few))})"
            found += self._asked(whole, *few, sealed=(sealed, few) if sealed is not None else None)
        return found

    def _records(self, query: str, *values: Any) -> list[CheckpointRecord]:
        with self._database.reading() as connection:
            rows = self._attempts(connection, query, *values)
        return [self._record(row) for row in rows]

    def _attempts(self, connection: sqlite3.Connection, query: str, *values: Any) -> list[Facts]:
        """Whole rows of attempts; opening for reading may have compared no more than their outline."""
        rows = _rows(connection, query, *values)
        if self.read_only:
            database.require_intact(connection, self.path, ["checkpoint"], of=[row["id"] for row in rows])
        return rows

    def _compare_decisions(self) -> None:
        """Once, where opening has left them out: they are sealed as one."""
        if self.read_only and not self._decisions_compared:
            with self._database.reading() as connection:
                database.require_intact(connection, self.path, ["retirement_decision"])
            self._decisions_compared = True

    def _no_attempt(self, checkpoint_id: int) -> CheckpointNotFound:
        return CheckpointNotFound(f"there is no checkpoint {checkpoint_id} in {self.path}", series="", step=None)

    # From rows to records. A CHECK holds for what is written here, not for what a file from elsewhere holds.

    def _epoch(self, row: Facts) -> EpochRecord:
        facts = self._facts("epoch", row)
        return EpochRecord(**{**facts, "versions": self._mapping(facts["versions"], str)})

    def _decision(self, row: Facts) -> Facts:
        return self._facts("retirement_decision", row)

    def _verification(self, row: Facts) -> Verification:
        facts = self._facts("verification", row)
        texts = self._texts(facts["mismatches"])
        return Verification(**{**facts, "ok": bool(facts["ok"]), "mismatches": texts})

    def _record(self, row: Facts) -> CheckpointRecord:
        facts = self._facts("checkpoint", row)
        has_pin = facts.pop("has_pin")
        facts["pinned"] = bool(has_pin and facts["state"] == COMMITTED and facts["retire_started_at"] is None)
        facts["state"] = self._word(_STATES, facts["state"])
        facts["format"] = self._word(_FORMATS, facts["format"])
        facts["failures"] = tuple(self._parsed(facts["failures"], list))
        if not all(isinstance(failure, dict) for failure in facts["failures"]):
            raise self._corrupt("a failure is not an object")
        facts["metrics"] = self._mapping(facts["metrics"], int, float)
        facts["per_rank"] = self._texts(facts["per_rank"])
        record = CheckpointRecord(**facts)
        # What is renamed and removed goes by these names, and what is printed is pasted into other commands.
        final = f"{self._series_name(record.series)}/{record.format.directory_name(record.step)}"
        series, _, staging = record.staging_directory.partition("/")
        stem = f".{record.format.directory_name(record.step)}"
        if record.directory != final or series != record.series or not staging.startswith(stem):
            raise self._corrupt(f"attempt {record.id} has the directory {record.directory[:80]!r}")
        if not _STAGING.match(staging.removeprefix(stem)):
            raise self._corrupt(f"attempt {record.id} has the staging directory {record.staging_directory[:80]!r}")
        return record

    def _facts(self, table: str, row: Facts) -> dict[str, Any]:
        """What a row says, every column of *table* of the type that it is to have."""
        known = declared.COLUMNS[table]
        for name, value in row.items():
            if name not in known:
                continue
            kind, nullable = known[name]
            if value is None:
                fine = nullable
            elif kind is float:
                fine = type(value) in (int, float) and is_finite(value)
            elif kind is int:
                fine = type(value) is int and (0 <= value <= MAX_NUMBER or (name in _SIZES and value >= 0))
            else:
                fine = type(value) is str
            if not fine:
                raise self._corrupt(f"{name} of a {table} is {str(value)[:80]!r}")
        return dict(row)

    def _series_name(self, name: str) -> str:
        if not _can_name_a_series(name):
            raise self._corrupt(f"a series is named {name[:80]!r}")
        return name

    def _number(self, value: Any) -> int:
        if type(value) is not int or not 0 <= value <= MAX_NUMBER:
            raise self._corrupt(f"a number is {str(value)[:80]!r}")
        return value

    def _word(self, words: Mapping[str, T], word: str) -> T:
        try:
            return words[word]
        except KeyError:
            raise self._corrupt(f"unknown word {word[:80]!r}") from None

    def _parsed(self, stored: str, kind: type) -> Any:
        try:
            value = json.loads(stored)
        except (ValueError, RecursionError) as error:
            raise self._corrupt(f"not JSON: {stored[:80]!r}") from error
        if not isinstance(value, kind):
            raise self._corrupt(f"not a {kind.__name__}: {stored[:80]!r}")
        return value

    def _texts(self, stored: str) -> tuple[str, ...]:
        texts = self._parsed(stored, list)
        if not all(isinstance(text, str) for text in texts):
            raise self._corrupt(f"not a list of texts: {stored[:80]!r}")
        return tuple(texts)

    def _mapping(self, stored: str, *kinds: type) -> dict[str, Any]:
        found: dict[str, Any] = self._parsed(stored, dict)
        if not all(type(value) in kinds and (str in kinds or is_finite(value)) for value in found.values()):
            raise self._corrupt(f"not a mapping to {' or '.join(kind.__name__ for kind in kinds)}: {stored[:80]!r}")
        return found

    def _corrupt(self, reason: str) -> JournalCorrupt:
        return database.damaged(self.path, reason)


@functools.lru_cache
def _can_name_a_series(name: str) -> bool:
    return is_plain_relative(name) and "/" not in name and not name.startswith(".")


def _rows(connection: sqlite3.Connection, query: str, *values: Any) -> list[Facts]:
    cursor = connection.execute(query, values)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def not_found(series: str, step: int) -> CheckpointNotFound:
    return CheckpointNotFound(f"there is no checkpoint of step {step} in series {series}", series=series, step=step)


def schema_mismatch(path: Path, found: str | None) -> JournalSchemaMismatch:
    """The error for a journal of another schema, with the command that helps."""
    older = found is not None and found < declared.REVISION
    return JournalSchemaMismatch(
        f"{path} has schema {found}, this version of ckptmgr reads {declared.REVISION}",
        hint="run `ckptmgr upgrade RUN`"
        if older
        else "the journal was written by a newer ckptmgr: run `pip install -U ckptmgr`",
        path=str(path),
        found=found,
        expected=declared.REVISION,
    )
