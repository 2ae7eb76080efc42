"""
`Journal`: every change one may make to the database. What one may ask stands in `questions`.

One public method is one transaction. When a method that changes something returns, the change is
on disk, synced; when it raises, nothing has changed (or the message says that this is not known).
Only rank 0's manager process writes, and only under the run lock; the epoch in every change keeps
out a writer that lost the lock without noticing. Times are Unix seconds, sizes bytes, durations
seconds, directories relative to the run directory.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, Row, Select, and_, func, insert, select, text, update
from sqlalchemy.dialects.sqlite import insert as upsert

from ckptmgr.errors import (
    CheckpointNotFound,
    IllegalTransition,
    InvalidArgument,
    JournalError,
    SaveInFlight,
    StaleWriter,
    StepAlreadySaved,
)
from ckptmgr.journal import database, declared, schema, seal, upgrade, writing
from ckptmgr.journal.questions import Questions, not_found
from ckptmgr.journal.schema import checkpoint, epoch, file, pin, retirement_decision, run, transition, verification
from ckptmgr.lifecycle import (
    TRANSITIONS,
    CheckpointRecord,
    CheckpointState,
    Format,
    RetirementMark,
    Verified,
)
from ckptmgr.manifest import MAX_NUMBER, FileEntry, Manifest, is_plain_relative, is_run_id

COMMITTED, FAILED, GATHERED = CheckpointState.COMMITTED, CheckpointState.FAILED, CheckpointState.GATHERED
_LEGAL = {
    (source, row["dest"])
    for row in TRANSITIONS
    for source in (row["source"] if isinstance(row["source"], list) else [row["source"]])
}
newest_epoch = select(func.coalesce(func.max(epoch.c.epoch), 0))
live = text(declared.LIVE)
in_flight = text(declared.IN_FLIGHT)
_attempts = select(checkpoint, pin.c.step.is_not(None).label("has_pin")).outerjoin(
    pin, and_(pin.c.series == checkpoint.c.series, pin.c.step == checkpoint.c.step)
)
_newest_id = select(func.coalesce(func.max(checkpoint.c.id), 0))
_newest_commit_seq = select(func.coalesce(func.max(checkpoint.c.commit_seq), 0))


class Journal(Questions):
    """
    What happened to every checkpoint of one run, and what may be done with each.

    Made by `open` or `open_read_only`. Threads may share one; a forked child may not use it.
    """

    @classmethod
    def open(cls, path: Path, *, file_mode: int | None = None) -> Journal:
        """
        Open the journal for reading and writing; create it, or upgrade an older one after a copy.

        Rank 0 only. The caller holds the run lock. An unfinished transaction of a process that
        died is rolled back, and the whole file is looked through for damage (0.2 s for 10,000
        checkpoints with 3 files each): better found now than in the middle of a run.

        Args:
            path: The journal.
            file_mode: Of a file that is created; None leaves it to the umask. What SQLite makes beside it has
                the same.

        Raises:
            JournalSchemaMismatch: It was written by a newer version of ckptmgr.
            JournalCorrupt: It is damaged, or has something in it that we did not make.
            JournalError: It is a link, no journal, or cannot be written.
        """
        path = database.plain_path(path)
        if database.look_through(path, "rw", every_page=True) != declared.REVISION:
            upgrade.upgrade(path, create=True, file_mode=file_mode)
        journal = cls._opened(writing.WritableDatabase(path))
        journal._draw_outline()
        return journal

    def _draw_outline(self) -> None:
        """Have an outline for readers where there is no right one: the journal may be of a version that made none."""
        # Without it they compare everything, so a full disk may keep us from it.
        with contextlib.suppress(JournalError):
            with self._database.reading() as connection:
                if seal.broken(connection, seal.OUTLINE) is None:
                    return
            with self._database.writing() as connection:
                seal.draw(writing.driver(connection))

    # The run and its epochs

    def set_run_id(self, run_id: str) -> None:
        """
        Take over the run id that the run directory and its manifests carry. Rank 0 only.

        Raises:
            JournalError: The journal has checkpoints already, so it is this run's or another's.
        """
        if not is_run_id(run_id):
            raise InvalidArgument(f"{run_id[:80]!r} cannot be a run id")
        with self._database.writing() as connection:
            if connection.execute(select(checkpoint.c.id).limit(1)).first() is not None:
                raise JournalError(f"{self.path} has checkpoints of run {self.run_id}; its run id stays")
            connection.execute(update(run).values(run_id=run_id))
        self.run_id = run_id

    def begin_epoch(self, *, host: str, pid: int, command: str, versions: Mapping[str, str], after: int = 0) -> int:
        """
        Take the next epoch: from now on, no writer of an older one can change anything. Rank 0 only.

        Args:
            host: This machine's name.
            pid: This process.
            command: What was started, for people.
            versions: Versions that matter, by package.
            after: An epoch that a journal before this one had given out.
        """
        with self._database.writing() as connection:
            number = self._next(max(self._scalar(connection, newest_epoch), after))
            connection.execute(
                insert(epoch).values(
                    epoch=number,
                    started_at=time.time(),
                    host=host,
                    pid=pid,
                    command=command,
                    versions=_json(dict(versions), "versions"),
                )
            )
        return number

    def end_epoch(self, epoch: int) -> None:
        """Note that the manager of *epoch* closed in an orderly way. The first end counts. Rank 0 only."""
        table = schema.epoch
        with self._database.writing() as connection:
            connection.execute(
                update(table).where(table.c.epoch == epoch, table.c.ended_at.is_(None)).values(ended_at=time.time())
            )

    # The life of a checkpoint

    def begin(
        self,
        *,
        series: str,
        step: int,
        format: Format,
        epoch: int,
        world_size: int,
        metrics: Mapping[str, float] | None = None,
        per_rank: Sequence[str] = (),
        overwrite: bool = False,
        host: str,
        pid: int,
        note: str = "",
    ) -> CheckpointRecord:
        """
        Begin an attempt to save *step*: a PREWRITTEN row and its first transition. Rank 0 only.

        Args:
            series: Name of the series; one plain directory name.
            step: Training step, 0 or more.
            format: Layout of the files; names the directory.
            epoch: The caller's epoch.
            world_size: Number of ranks that save.
            metrics: Finite numbers to keep rules and people, by name.
            per_rank: Names of the state that differs by rank.
            overwrite: Replace a committed checkpoint of the same step; it stays until this one is committed.
            host: This machine's name.
            pid: This process.
            note: Why, for the history.

        Raises:
            StepAlreadySaved: The step is committed and *overwrite* is false.
            SaveInFlight: The series has a save in flight.
            StaleWriter: *epoch* is not the newest (``checkpoint_id`` is 0: there is no row yet).
            InvalidArgument: A value that the journal cannot hold, or a name that is not plain.
        """
        _require_plain(series)
        name = format.directory_name(_number(step, "step", 0))
        now = time.time()
        with self._database.writing() as connection:
            self._require_epoch(connection, epoch, checkpoint_id=0)
            busy = connection.execute(select(checkpoint.c.step).where(checkpoint.c.series == series, in_flight)).first()
            if busy is not None:
                raise SaveInFlight(
                    f"series {series} has a save of step {busy.step} in flight",
                    series=series,
                    step=step,
                    in_flight_step=busy.step,
                )
            saved = connection.execute(
                select(checkpoint.c.id, checkpoint.c.directory).where(
                    checkpoint.c.series == series, checkpoint.c.step == step, live
                )
            ).first()
            if saved is not None and not overwrite:
                raise StepAlreadySaved(
                    f"step {step} of series {series} is committed already",
                    series=series,
                    step=step,
                    path=saved.directory,
                )
            # Rows are never deleted, so the largest id is the largest attempt number ever used.
            attempt = self._next(self._scalar(connection, _newest_id))
            connection.execute(
                insert(checkpoint).values(
                    id=attempt,
                    series=series,
                    step=step,
                    format=format.value,
                    state=CheckpointState.PREWRITTEN.value,
                    epoch=epoch,
                    world_size=_number(world_size, "world_size", 1),
                    directory=f"{series}/{name}",
                    staging_directory=f"{series}/.{name}.e{epoch}.a{attempt}.incomplete",
                    created_at=now,
                    metrics=_json(dict(metrics or {}), "metrics"),
                    per_rank=_json(list(per_rank), "per_rank"),
                    overwrites=None if saved is None else saved.id,
                )
            )
            _note_transition(
                connection,
                attempt,
                None,
                CheckpointState.PREWRITTEN,
                at=now,
                epoch=epoch,
                host=host,
                pid=pid,
                note=note,
            )
            row = self._row(connection, attempt)
        return self._record(row._asdict())

    def advance(
        self,
        checkpoint_id: int,
        source: CheckpointState,
        dest: CheckpointState,
        *,
        epoch: int,
        host: str,
        pid: int,
        note: str = "",
        reason: str | None = None,
        failures: Sequence[Mapping[str, Any]] = (),
        manifest_digest: str | None = None,
        bytes: int | None = None,
        files: Sequence[FileEntry] = (),
        stage_s: float | None = None,
        write_s: float | None = None,
        gather_s: float | None = None,
        commit_s: float | None = None,
        retire: Sequence[RetirementMark] = (),
        decisions: Sequence[tuple[int, str, tuple[str, ...]]] = (),
    ) -> CheckpointRecord:
        """
        Move a checkpoint from *source* to *dest*, if it still is in *source* and *epoch* still counts.

        Rank 0 only. One transaction: the move, its line in the history, the facts, the files, and
        (on COMMITTED) the marks of what this commit lets go: every row of *retire*, and the row
        that this checkpoint overwrites. A fact that is None stays as it was.

        Args:
            checkpoint_id: The attempt.
            source: The state it must be in.
            dest: The state it gets.
            epoch: The caller's epoch; must be the row's and the newest.
            host: This machine's name.
            pid: This process.
            note: Why, for the history.
            reason: Why it failed. A FAILED row without one takes the note.
            failures: What each failed rank said, as JSON objects.
            manifest_digest: Digest of the manifest; a GATHERED row has one.
            bytes: Size of all files.
            files: What was gathered.
            stage_s: Seconds of copying to host memory.
            write_s: Seconds of writing.
            gather_s: Seconds of gathering.
            commit_s: Seconds of publishing.
            retire: Committed checkpoints that may go, COMMITTED only.
            decisions: (id, "keep" or "drop", reasons) of each checkpoint that retention looked at.

        Raises:
            StaleWriter: Somebody moved the row, or took a newer epoch; nothing has changed.
            IllegalTransition: The state machine has no such transition.
            CheckpointNotFound: There is no such attempt.
            JournalError: A row of *retire* is pinned, not committed, retiring already, or this row.
        """
        if (source, dest) not in _LEGAL:
            raise IllegalTransition(f"a checkpoint that is {source} cannot become {dest}", source=source, trigger=dest)
        if retire and dest is not COMMITTED:
            raise InvalidArgument("only a commit retires other checkpoints")
        if dest is GATHERED and manifest_digest is None:
            raise InvalidArgument("a gathered checkpoint has the digest of its manifest: pass manifest_digest")
        now = time.time()
        facts: dict[str, Any] = {
            "reason": reason,
            "failures": _json([dict(failure) for failure in failures], "failures") if failures else None,
            "manifest_digest": manifest_digest,
            "bytes": bytes,
            "stage_s": stage_s,
            "write_s": write_s,
            "gather_s": gather_s,
            "commit_s": commit_s,
        }
        values = {name: value for name, value in facts.items() if value is not None}
        if dest in (COMMITTED, FAILED):
            values["finished_at"] = now
        if dest is FAILED:
            values.setdefault("reason", note or "no reason was given")
        with self._database.writing() as connection:
            before = self._row(connection, checkpoint_id)
            # Asked before the marks are judged, so that a stale writer hears that it is stale; the UPDATE asks again.
            if (before.state, before.epoch) != (source, epoch):
                raise self._stale(connection, checkpoint_id, epoch)
            self._require_epoch(connection, epoch, checkpoint_id)
            if dest is COMMITTED:
                # The old row goes before the new one comes: at no moment are two of a step live.
                if before.overwrites is not None:
                    connection.execute(
                        update(checkpoint)
                        .where(checkpoint.c.id == before.overwrites, live)
                        .values(retire_started_at=now, retire_reason=f"overwritten by attempt {checkpoint_id}")
                    )
                marks = [mark for mark in retire if mark.checkpoint_id != before.overwrites]
                self._mark(connection, marks, now)
                values["committed_at"] = now
                values["commit_seq"] = self._next(self._scalar(connection, _newest_commit_seq))
            moved = connection.execute(
                update(checkpoint)
                .where(
                    checkpoint.c.id == checkpoint_id,
                    checkpoint.c.state == source.value,
                    checkpoint.c.epoch == epoch,
                    newest_epoch.scalar_subquery() == epoch,
                )
                .values(state=dest.value, **values)
            )
            if moved.rowcount != 1:
                raise self._stale(connection, checkpoint_id, epoch)
            _note_transition(
                connection, checkpoint_id, source, dest, at=now, epoch=epoch, host=host, pid=pid, note=note
            )
            _add_files(connection, checkpoint_id, files)
            _decide(connection, checkpoint_id, decisions, now)
            row = self._row(connection, checkpoint_id)
        return self._record(row._asdict())

    def adopt(self, checkpoint_id: int, *, epoch: int) -> CheckpointRecord:
        """
        Give an attempt that a dead manager left in flight to this *epoch*, to finish it. Rank 0 only.

        Raises:
            StaleWriter: *epoch* is not the newest, or the attempt is not in flight.
            CheckpointNotFound: There is no such attempt.
        """
        with self._database.writing() as connection:
            self._require_epoch(connection, epoch, checkpoint_id)
            taken = connection.execute(
                update(checkpoint)
                .where(checkpoint.c.id == checkpoint_id, in_flight, newest_epoch.scalar_subquery() == epoch)
                .values(epoch=epoch)
            )
            if taken.rowcount != 1:
                raise self._stale(connection, checkpoint_id, epoch)
            row = self._row(connection, checkpoint_id)
        return self._record(row._asdict())

    def mark_retiring(self, marks: Sequence[RetirementMark], *, epoch: int) -> None:
        """
        Mark committed checkpoints as retiring; from now on none is listed, kept or resumed from. Rank 0 only.

        Raises:
            StaleWriter: *epoch* is not the newest; nothing has changed.
            JournalError: A row is pinned, not committed or retiring already; nothing has changed.
        """
        with self._database.writing() as connection:
            self._require_epoch(connection, epoch, marks[0].checkpoint_id if marks else 0)
            self._mark(connection, marks, time.time())

    def finish_retirement(self, checkpoint_id: int, *, epoch: int) -> None:
        """
        Note that a retiring checkpoint is gone from disk. Idempotent: the first time counts. Rank 0 only.

        Raises:
            StaleWriter: *epoch* is not the newest.
            JournalError: The checkpoint is not retiring.
            CheckpointNotFound: There is no such attempt.
        """
        with self._database.writing() as connection:
            self._require_epoch(connection, epoch, checkpoint_id)
            if self._row(connection, checkpoint_id).retire_started_at is None:
                raise JournalError(f"checkpoint {checkpoint_id} is not retiring")
            connection.execute(
                update(checkpoint)
                .where(checkpoint.c.id == checkpoint_id, checkpoint.c.retired_at.is_(None))
                .values(retired_at=time.time())
            )

    def insert_rebuilt(
        self,
        manifest: Manifest,
        *,
        epoch: int,
        manifest_digest: str,
        committed_at: float,
        host: str,
        pid: int,
    ) -> CheckpointRecord:
        """
        Enter a checkpoint that stands on disk but in no journal, as COMMITTED. Rank 0 only.

        For rebuilding a lost journal, oldest first: ``commit_seq`` follows the order of calls. The
        attempt number is the manifest's while that is free, so that later attempts get larger ones
        and no directory name is ever used twice.

        Raises:
            StepAlreadySaved: The step is entered already.
            StaleWriter: *epoch* is not the newest.
            InvalidArgument: The manifest names a series that is no plain directory name.
        """
        _require_plain(manifest.series)
        name = manifest.format.directory_name(_number(manifest.step, "step", 0))
        with self._database.writing() as connection:
            self._require_epoch(connection, epoch, checkpoint_id=0)
            there = connection.execute(
                select(checkpoint.c.directory).where(
                    checkpoint.c.series == manifest.series, checkpoint.c.step == manifest.step, live
                )
            ).first()
            if there is not None:
                raise StepAlreadySaved(
                    f"step {manifest.step} of series {manifest.series} is entered already",
                    series=manifest.series,
                    step=manifest.step,
                    path=there.directory,
                )
            taken = connection.execute(select(checkpoint.c.id).where(checkpoint.c.id == manifest.attempt)).first()
            free = manifest.attempt >= 1 and taken is None
            number = manifest.attempt if free else self._next(self._scalar(connection, _newest_id))
            connection.execute(
                insert(checkpoint).values(
                    id=number,
                    series=manifest.series,
                    step=manifest.step,
                    format=manifest.format.value,
                    state=COMMITTED.value,
                    epoch=epoch,
                    world_size=manifest.world_size,
                    directory=f"{manifest.series}/{name}",
                    staging_directory=f"{manifest.series}/.{name}.e{manifest.epoch}.a{manifest.attempt}.incomplete",
                    created_at=manifest.created_at,
                    bytes=manifest.bytes,
                    manifest_digest=manifest_digest,
                    committed_at=committed_at,
                    commit_seq=self._next(self._scalar(connection, _newest_commit_seq)),
                    finished_at=committed_at,
                    metrics=_json(dict(manifest.metrics), "metrics"),
                    per_rank=_json(list(manifest.per_rank), "per_rank"),
                )
            )
            _note_transition(
                connection,
                number,
                None,
                COMMITTED,
                at=time.time(),
                epoch=epoch,
                host=host,
                pid=pid,
                note="rebuilt from its manifest",
            )
            _add_files(connection, number, manifest.files)
            row = self._row(connection, number)
        return self._record(row._asdict())

    # Pins and verifications

    def pin(self, series: str, step: int, *, note: str = "") -> None:
        """
        Keep the live checkpoint of a step until it is unpinned. Pinning again replaces the note. Rank 0 only.

        The pin holds the step: a checkpoint that overwrites it is pinned as well.

        Raises:
            CheckpointNotFound: No live checkpoint of this step.
        """
        with self._database.writing() as connection:
            found = connection.execute(
                select(checkpoint.c.id).where(checkpoint.c.series == series, checkpoint.c.step == step, live)
            ).first()
            if found is None:
                raise not_found(series, step)
            facts = {"note": note, "pinned_at": time.time()}
            connection.execute(
                upsert(pin)
                .values(series=series, step=step, **facts)
                .on_conflict_do_update(index_elements=["series", "step"], set_=facts)
            )

    def unpin(self, series: str, step: int) -> None:
        """
        Let retention decide on a step again. Rank 0 only.

        Raises:
            CheckpointNotFound: The step is not pinned.
        """
        with self._database.writing() as connection:
            gone = connection.execute(pin.delete().where(pin.c.series == series, pin.c.step == step))
            if gone.rowcount != 1:
                raise CheckpointNotFound(f"step {step} of series {series} is not pinned", series=series, step=step)

    def record_verification(
        self, checkpoint_id: int, *, level: Literal["size", "digest"], ok: bool, mismatches: Sequence[str]
    ) -> None:
        """
        Note that the files of a checkpoint were compared with the journal. Rank 0 only.

        Raises:
            CheckpointNotFound: There is no such attempt.
        """
        self.record_verifications([Verified(checkpoint_id, ok, tuple(mismatches))], level=level)

    def record_verifications(self, found: Sequence[Verified], *, level: Literal["size", "digest"]) -> tuple[int, ...]:
        """
        The same for several checkpoints: for all of them or for none. Rank 0 only.

        Returns:
            Those of which nothing is recorded: they were found intact, but damage has been recorded since they were
            read, and what was read before it was found does not take it back.

        Raises:
            CheckpointNotFound: One of them is no attempt.
        """
        facts = {"at": time.time(), "level": level}
        outdated = []
        worse = select(verification.c.id).where(verification.c.level == level, verification.c.ok == 0)
        with self._database.writing() as connection:
            for one in found:
                self._row(connection, one.checkpoint_id)
                if one.ok and one.after is not None:
                    later = (verification.c.checkpoint_id == one.checkpoint_id, verification.c.id > one.after)
                    if connection.execute(worse.where(*later).limit(1)).first() is not None:
                        outdated.append(one.checkpoint_id)
                        continue
                told = {"ok": int(one.ok), "mismatches": _json(list(one.mismatches), "mismatches")}
                connection.execute(insert(verification).values(checkpoint_id=one.checkpoint_id, **facts, **told))
        return tuple(outdated)

    # Within a transaction

    def _row(self, connection: Connection, checkpoint_id: int) -> Row[Any]:
        row = connection.execute(_attempts.where(checkpoint.c.id == checkpoint_id)).first()
        if row is None:
            raise self._no_attempt(checkpoint_id)
        return row

    def _scalar(self, connection: Connection, query: Select[Any]) -> int:
        return self._number(connection.execute(query).scalar_one())

    def _next(self, number: int) -> int:
        """The number after *number*, which still fits into the name of a directory."""
        if number >= MAX_NUMBER:
            raise self._corrupt(f"it has given out the number {number}, after which there is none")
        return number + 1

    def _require_epoch(self, connection: Connection, number: int, checkpoint_id: int) -> None:
        newest = self._scalar(connection, newest_epoch)
        if number != newest:
            raise StaleWriter(
                f"epoch {number} may change nothing: the newest is {newest}",
                checkpoint_id=checkpoint_id,
                epoch=number,
                found=f"epoch {newest}",
            )

    def _stale(self, connection: Connection, checkpoint_id: int, number: int) -> StaleWriter:
        row = self._row(connection, checkpoint_id)
        newest = self._scalar(connection, newest_epoch)
        found = f"{row.state} in epoch {row.epoch}, the newest epoch is {newest}"
        return StaleWriter(
            f"checkpoint {checkpoint_id} is not as epoch {number} left it: {found}",
            checkpoint_id=checkpoint_id,
            epoch=number,
            found=found,
        )

    def _mark(self, connection: Connection, marks: Iterable[RetirementMark], now: float) -> None:
        for mark in marks:
            row = self._row(connection, mark.checkpoint_id)
            if row.state != COMMITTED:
                why = f"it is {row.state}"
            elif row.retire_started_at is not None:
                why = "it is retiring already"
            elif row.has_pin:
                why = "it is pinned"
            else:
                connection.execute(
                    update(checkpoint)
                    .where(checkpoint.c.id == mark.checkpoint_id)
                    .values(retire_started_at=now, retire_reason=mark.reason)
                )
                continue
            raise JournalError(
                f"checkpoint {mark.checkpoint_id} (step {row.step} of {row.series}) cannot be retired: {why}",
                hint="plan again from the journal as it is now",
            )


def _note_transition(
    connection: Connection,
    checkpoint_id: int,
    source: CheckpointState | None,
    dest: CheckpointState,
    **facts: Any,
) -> None:
    connection.execute(
        insert(transition).values(
            checkpoint_id=checkpoint_id, source=None if source is None else source.value, dest=dest.value, **facts
        )
    )


def _add_files(connection: Connection, checkpoint_id: int, files: Iterable[FileEntry]) -> None:
    rows = [{"checkpoint_id": checkpoint_id, **vars(entry)} for entry in files]
    if rows:
        connection.execute(insert(file), rows)


def _decide(
    connection: Connection, decided_by: int, decisions: Iterable[tuple[int, str, tuple[str, ...]]], now: float
) -> None:
    rows = [
        {
            "checkpoint_id": checkpoint_id,
            "decided_by": decided_by,
            "verdict": verdict,
            "reasons": _json(list(reasons), "reasons"),
            "at": now,
        }
        for checkpoint_id, verdict, reasons in decisions
    ]
    if rows:
        statement = upsert(retirement_decision)
        new = {name: statement.excluded[name] for name in ("decided_by", "verdict", "reasons", "at")}
        connection.execute(statement.on_conflict_do_update(index_elements=["checkpoint_id"], set_=new), rows)


def _json(value: Any, what: str) -> str:
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"{what} cannot be kept in the journal: {error}") from error
    if len(text) > database.MAX_VALUE_BYTES // 2:
        raise InvalidArgument(f"{what} cannot be kept in the journal: {len(text)} characters are too many")
    return text


def _number(value: int, what: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_NUMBER:
        raise InvalidArgument(f"{what} must be a whole number from {least} to {MAX_NUMBER}, not {value!r}")
    return value


def _require_plain(series: str) -> None:
    if not is_plain_relative(series) or "/" in series or series.startswith("."):
        raise InvalidArgument(f"{series!r} is no name for a series: it must be one plain directory name")
