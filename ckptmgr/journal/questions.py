"""
What one may ask the journal. Reading never changes, creates or migrates anything.

One public method is one transaction. Times are Unix seconds, sizes bytes, durations seconds,
directories relative to the run directory.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import Connection, Row, Select, Table, and_, bindparam, func, select, text, tuple_

from ckptmgr.errors import CheckpointNotFound, JournalCorrupt
from ckptmgr.journal import database, schema, seal
from ckptmgr.journal.schema import checkpoint, epoch, file, pin, retirement_decision, transition, verification
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, EpochRecord, Format, TransitionRecord
from ckptmgr.manifest import MAX_NUMBER, FileEntry, is_digest, is_finite, is_plain_relative

T = TypeVar("T")
COMMITTED = CheckpointState.COMMITTED
_STATES = {state.value: state for state in CheckpointState}
_FORMATS = {layout.value: layout for layout in Format}
#: Numbers that are bytes; all others count something that a directory may be named after.
_SIZES = ("bytes", "size")
_STAGING = re.compile(r"\.e[0-9]{1,18}\.a[0-9]{1,18}\.incomplete\Z")

newest_epoch = select(func.coalesce(func.max(epoch.c.epoch), 0))
live = text(schema.LIVE)
in_flight = text(schema.IN_FLIGHT)
standing = text("state <> 'FAILED' AND retired_at IS NULL")
attempts = select(checkpoint, pin.c.step.is_not(None).label("has_pin")).outerjoin(
    pin, and_(pin.c.series == checkpoint.c.series, pin.c.step == checkpoint.c.step)
)


#: The plus keeps SQLite from walking all rows in this order, where a partial index holds the few that are asked for.
_few_by_id = text("+checkpoint.id")
#: And here from reading all rows of a series, where those that are asked for are the last ones of an order.
_of_series = text("+checkpoint.series = :series")
_last_committed = (
    attempts.where(_of_series, live, checkpoint.c.commit_seq.is_not(None))
    .order_by(checkpoint.c.commit_seq.desc())
    .limit(bindparam("count"))
)
_in_flight = attempts.where(checkpoint.c.series == bindparam("series"), in_flight)
_failed_after = attempts.where(
    _of_series, checkpoint.c.state == CheckpointState.FAILED.value, checkpoint.c.id > bindparam("last")
)
#: Values in one query; SQLite takes a few hundred in all its versions.
_AT_ONCE = 400


@dataclasses.dataclass(frozen=True)
class Verification:
    """That the files of a committed checkpoint were compared with the journal: sizes, or digests too."""

    id: int
    checkpoint_id: int
    at: float
    level: str
    ok: bool
    mismatches: tuple[str, ...]


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
            below = database.driver(connection)
            if checkpoints is None:
                database.require_sound(below, self.path, whole=False)
                database.require_intact(below, self.path, seal.DECISIVE)
            else:
                database.require_intact(below, self.path, ["checkpoint", "pin"], of=checkpoints)

    def current_epoch(self) -> int:
        """The newest epoch, the only one that may change anything; 0 before the first."""
        with self._database.reading() as connection:
            return self._scalar(connection, newest_epoch)

    def epochs(self) -> list[EpochRecord]:
        """Every start of a manager or of a command that changes the run, oldest first."""
        with self._database.reading() as connection:
            rows = connection.execute(select(epoch).order_by(epoch.c.epoch)).all()
        found = []
        for row in rows:
            facts = self._facts(epoch, row)
            found.append(EpochRecord(**{**facts, "versions": self._mapping(facts["versions"], str)}))
        return found

    def checkpoints(self, *, series: str | None = None, live_only: bool = False) -> list[CheckpointRecord]:
        """Every attempt in the order in which they began; *live_only*: those one may resume from."""
        query = attempts.order_by(_few_by_id if live_only else checkpoint.c.id)
        if series is not None:
            query = query.where(checkpoint.c.series == series)
        if live_only:
            query = query.where(live)
        return self._records(query)

    def pinned(self, series: str) -> frozenset[int]:
        """The steps of *series* that are pinned, compared with the seal: what is not pinned may be let go."""
        with self._database.reading() as connection:
            steps = connection.execute(select(pin.c.step).where(pin.c.series == series)).scalars().all()
            database.require_intact(database.driver(connection), self.path, ["pin"])
        return frozenset(self._fact(pin, "step", step) for step in steps)

    def in_flight(self, series: str) -> CheckpointRecord | None:
        """The attempt of *series* that is in flight; there is at most one."""
        with self._database.reading() as connection:
            row = connection.execute(_in_flight, {"series": series}).first()
        return None if row is None else self._record(row)

    def standing(self, series: str | None = None) -> list[CheckpointRecord]:
        """Every attempt that is not gone: in flight, live, or retiring and not deleted yet."""
        query = attempts.where(standing).order_by(checkpoint.c.id)
        return self._records(query if series is None else query.where(checkpoint.c.series == series))

    def newest(self, series: str, count: int) -> list[CheckpointRecord]:
        """
        The *count* live checkpoints of *series* that committed last, what is in flight, and what FAILED since the last.

        All of one moment, in the order of their numbers, and without reading the history before them.
        """
        with self._database.reading() as connection:
            rows = list(connection.execute(_last_committed, {"series": series, "count": count}))
            last = rows[0].id if rows else 0
            rows += connection.execute(_in_flight, {"series": series})
            rows += connection.execute(_failed_after, {"series": series, "last": last})
        return [self._record(row) for row in sorted(rows, key=lambda row: row.id)]

    def live_directories(self, series: str) -> frozenset[str]:
        """The directories of all live checkpoints of *series*; nothing else of them is read."""
        query = select(checkpoint.c.directory).where(checkpoint.c.series == series, live)
        with self._database.reading() as connection:
            return frozenset(connection.execute(query).scalars())

    def of_step(self, series: str, step: int) -> list[CheckpointRecord]:
        """Every attempt to save *step*."""
        query = attempts.where(checkpoint.c.series == series, checkpoint.c.step == step)
        return self._records(query.order_by(checkpoint.c.id))

    def traced(
        self, numbers: Iterable[int], staging_directories: Iterable[str], steps: Iterable[tuple[str, int]]
    ) -> list[CheckpointRecord]:
        """Every attempt with one of these *numbers* or *staging_directories*, or to save one of *steps* of a series."""
        found: dict[int, CheckpointRecord] = {}
        for column, values in (
            (checkpoint.c.id, numbers),
            (checkpoint.c.staging_directory, staging_directories),
            (tuple_(checkpoint.c.series, checkpoint.c.step), steps),
        ):
            ordered: list[Any] = sorted({*values})
            for start in range(0, len(ordered), _AT_ONCE):
                query = attempts.where(column.in_(ordered[start : start + _AT_ONCE]))
                found |= {record.id: record for record in self._records(query)}
        return [found[id] for id in sorted(found)]

    def checkpoint(self, checkpoint_id: int) -> CheckpointRecord:
        """
        One attempt.

        Raises:
            CheckpointNotFound: There is no such attempt.
        """
        with self._database.reading() as connection:
            row = self._row(connection, checkpoint_id)
        return self._record(row)

    def find(self, series: str, step: int) -> CheckpointRecord:
        """
        The live checkpoint of a step; if there is none, the newest attempt.

        Raises:
            CheckpointNotFound: The step was never begun.
        """
        query = (
            attempts.where(checkpoint.c.series == series, checkpoint.c.step == step)
            .order_by(text(f"{schema.LIVE} DESC"), checkpoint.c.id.desc())
            .limit(1)
        )
        with self._database.reading() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise not_found(series, step)
        return self._record(row)

    def files(self, checkpoint_id: int) -> list[FileEntry]:
        """Every file of a gathered checkpoint, by path; an attempt that was never gathered has none."""
        query = select(file.c.path, file.c.size, file.c.digest, file.c.rank).where(
            file.c.checkpoint_id == checkpoint_id
        )
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(file.c.path)).all()
            database.require_intact(database.driver(connection), self.path, ["file"], of=[checkpoint_id])
        found = [FileEntry(**self._facts(file, row)) for row in rows]
        for entry in found:
            if not is_plain_relative(entry.path) or not is_digest(entry.digest):
                raise self._corrupt(f"no file can be {entry.path[:80]!r} with the digest {entry.digest[:80]!r}")
        return found

    def transitions(self, checkpoint_id: int | None = None, after_id: int = 0) -> list[TransitionRecord]:
        """The history, oldest first: of one attempt or of all, only what came after line *after_id*."""
        query = (
            select(transition, checkpoint.c.series, checkpoint.c.step)
            .join(checkpoint, checkpoint.c.id == transition.c.checkpoint_id)
            .where(transition.c.id > after_id)
            .order_by(transition.c.id)
        )
        if checkpoint_id is not None:
            query = query.where(transition.c.checkpoint_id == checkpoint_id)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
            of = [checkpoint_id] if checkpoint_id is not None else {row.checkpoint_id for row in rows}
            everything = checkpoint_id is None and not after_id
            database.require_intact(
                database.driver(connection), self.path, ["transition"], of=None if everything else of
            )
        found = []
        for row in rows:
            facts = self._facts(transition, row)
            facts["source"] = None if row.source is None else self._word(_STATES, row.source)
            facts["dest"] = self._word(_STATES, row.dest)
            whose = {name: self._fact(checkpoint, name, getattr(row, name)) for name in ("series", "step")}
            found.append(TransitionRecord(**facts | whose))
        return found

    def series(self) -> list[str]:
        """The names of all series seen, in the order of their first use."""
        query = select(checkpoint.c.series).group_by(checkpoint.c.series).order_by(func.min(checkpoint.c.id))
        with self._database.reading() as connection:
            names = list(connection.execute(query).scalars())
        return [self._series_name(self._fact(checkpoint, "series", name)) for name in names]

    def format_of(self, series: str) -> Format | None:
        """The format of a series, None before its first save."""
        query = select(checkpoint.c.format).where(checkpoint.c.series == series).limit(1)
        with self._database.reading() as connection:
            word = connection.execute(query).scalar_one_or_none()
        return None if word is None else self._word(_FORMATS, word)

    def decisions(self) -> dict[int, tuple[str, tuple[str, ...]]]:
        """The last word of retention on each checkpoint it looked at: ("keep" or "drop", reasons)."""
        table = retirement_decision.c
        with self._database.reading() as connection:
            rows = connection.execute(select(table.checkpoint_id, table.verdict, table.reasons)).all()
        facts = [self._facts(retirement_decision, row) for row in rows]
        return {each["checkpoint_id"]: (each["verdict"], self._texts(each["reasons"])) for each in facts}

    def verifications(self, checkpoint_id: int) -> list[Verification]:
        """Every comparison of a checkpoint's files with the journal, oldest first."""
        table = verification.c
        with self._database.reading() as connection:
            rows = connection.execute(
                select(verification).where(table.checkpoint_id == checkpoint_id).order_by(table.id)
            ).all()
            database.require_intact(database.driver(connection), self.path, ["verification"], of=[checkpoint_id])
        return [self._verification(row) for row in rows]

    def newest_verifications(self) -> dict[int, Verification]:
        """Of each checkpoint whose bytes were compared with the journal: the last time."""
        table = verification.c
        last = select(func.max(table.id)).where(table.level == "digest").group_by(table.checkpoint_id)
        with self._database.reading() as connection:
            rows = connection.execute(select(verification).where(table.id.in_(last))).all()
            database.require_intact(database.driver(connection), self.path, ["verification"])
        return {found.checkpoint_id: found for found in map(self._verification, rows)}

    def _verification(self, row: Row[Any]) -> Verification:
        facts = self._facts(verification, row)
        texts = self._texts(facts["mismatches"])
        return Verification(**{**facts, "ok": bool(facts["ok"]), "mismatches": texts})

    def _records(self, query: Select[Any]) -> list[CheckpointRecord]:
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return [self._record(row) for row in rows]

    def _row(self, connection: Connection, checkpoint_id: int) -> Row[Any]:
        row = connection.execute(attempts.where(checkpoint.c.id == checkpoint_id)).first()
        if row is None:
            raise CheckpointNotFound(f"there is no checkpoint {checkpoint_id} in {self.path}", series="", step=None)
        return row

    # From rows to records. A CHECK holds for what is written here, not for what a file from elsewhere holds.

    def _record(self, row: Row[Any]) -> CheckpointRecord:
        facts = self._facts(checkpoint, row)
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

    def _facts(self, table: Table, row: Row[*tuple[Any, ...]]) -> dict[str, Any]:
        """What a row says, every column of *table* of the type that it is to have."""
        known = _columns(table)
        return {
            name: self._fact(table, name, value) if name in known else value
            for name, value in zip(row._fields, row, strict=True)
        }

    def _fact(self, table: Table, name: str, value: Any) -> Any:
        kind, nullable = _columns(table)[name]
        if value is None:
            fine = nullable
        elif kind is float:
            fine = type(value) in (int, float) and is_finite(value)
        elif kind is int:
            fine = type(value) is int and (0 <= value <= MAX_NUMBER or (name in _SIZES and value >= 0))
        else:
            fine = type(value) is str
        if not fine:
            raise self._corrupt(f"{name} of a {table.name} is {str(value)[:80]!r}")
        return value

    def _series_name(self, name: str) -> str:
        if not _can_name_a_series(name):
            raise self._corrupt(f"a series is named {name[:80]!r}")
        return name

    def _scalar(self, connection: Connection, query: Select[Any]) -> int:
        value = connection.execute(query).scalar_one()
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


@functools.cache
def _columns(table: Table) -> Mapping[str, tuple[type, bool]]:
    """Of each column the type of its values, and whether there may be none."""
    return {column.name: (column.type.python_type, column.nullable is True) for column in table.columns}


def not_found(series: str, step: int) -> CheckpointNotFound:
    return CheckpointNotFound(f"there is no checkpoint of step {step} in series {series}", series=series, step=step)
