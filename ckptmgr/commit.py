"""
The commit order: rank 0's hands on journal and run directory, from intent to COMMITTED and after.

`Leader.begin`, `Leader.commit` and `Leader.after_commit` are docs/explanation/commit-order.md from top
to bottom. Every place where a crash matters says what it leaves behind. Hooks and deletions come after
the commit on a thread of their own, so that a slow one never holds up the next save. There, too, rank 0 looks
for what commands ask of a live run (`requests`), and does it between two commits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ckptmgr import durable, recovery, requests, retention
from ckptmgr.errors import CheckpointError, CheckpointNotFound, InvalidArgument, RankFailure, SaveFailed, StaleWriter
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, Format, Lifecycle
from ckptmgr.manifest import Digest, FileEntry, Manifest
from ckptmgr.retention import KeepRule
from ckptmgr.rundir import RunDirectory
from ckptmgr.writers.arena import Arena
from ckptmgr.writers.jobs import FileJob, SharedFile
from ckptmgr.writers.reading import Reading

log = logging.getLogger("ckptmgr")

#: The thread that hooks run on.
AFTER_COMMIT = "ckptmgr-after-commit"
#: Seconds between two looks for what commands ask for, and after one that failed.
LOOK_EVERY_S = 2.0
LOOK_AGAIN_S = 60.0
#: Steps in one line of the log.
_NAMED = 20


class Concluder(Protocol):
    """What rank 0's finalizer asks of a format's writer."""

    kind: Format

    def prewrite(self, scratch: Path) -> Iterable[tuple[str, bytes]]:
        """Small files that stand before any rank writes; *scratch* is a directory to make them in."""

    def shared_files(self) -> Sequence[SharedFile]:
        """Files that several ranks fill in."""

    def conclude(self, reports: Sequence[Any]) -> Iterable[tuple[str, bytes]]:
        """Small files that need every rank's report."""


@dataclasses.dataclass(frozen=True)
class Committed:
    """What a hook is told: a checkpoint that is COMMITTED and stands at *path*."""

    series: str
    step: int
    path: Path
    record: CheckpointRecord


@dataclasses.dataclass
class Job:
    """
    One save on its way through the finalizer.

    *number* counts saves; *frame* is how long a rank's report may be, in bytes. Both are the same on every rank.
    *arenas* are its own and the one that it may borrow from, which is that of the series *borrows_from* on every
    rank; *readings* are what still fills them.
    """

    number: int
    series: str
    step: int
    keep: KeepRule
    writer: Concluder
    arenas: tuple[Arena, ...]
    readings: tuple[Reading, ...]
    borrows_from: str | None
    files: tuple[FileJob, ...]
    report: Any
    stage_s: float
    metrics: Mapping[str, float]
    per_rank: tuple[str, ...]
    overwrite: bool
    frame: int
    cause: str | None = None
    state: CheckpointState | None = None
    failure: SaveFailed | None = None
    failure_seen: bool = False
    settled: threading.Event = dataclasses.field(default_factory=threading.Event)
    finished: threading.Event = dataclasses.field(default_factory=threading.Event)


@dataclasses.dataclass(frozen=True)
class Go:
    """Rank 0's word to write: where (relative to the run directory), or why not."""

    directory: str
    attempt: int = 0
    cause: str | None = None


@dataclasses.dataclass(frozen=True)
class Planned:
    """
    What the keep rule says once an attempt is committed.

    *live* and *pinned* are what it was asked about; *plan* is about those of which it could say something new, and
    *news* are the decisions that the journal has not been told.
    """

    live: Mapping[int, CheckpointRecord]
    pinned: frozenset[int]
    plan: retention.RetentionPlan
    news: Sequence[tuple[int, str, tuple[str, ...]]]


@dataclasses.dataclass
class Attempt:
    """One attempt as rank 0 leads it: its row, its walk through the states, what stands in staging already."""

    record: CheckpointRecord
    lifecycle: Lifecycle
    prewritten: list[FileEntry] = dataclasses.field(default_factory=list)
    planned: Planned | None = None


class Leader:
    """
    Rank 0's hands on journal and run directory.

    Args:
        journal: Open for writing, at the current epoch.
        rundir: The run directory, locked.
        epoch: This start's fencing token.
        series: Every series of the manager, for ``meta.json``.
        versions: Written into every manifest.
        hooks: Called after each commit, on this process only.
        standing: What the journal has of attempts that are not gone, if that was read just now.
    """

    def __init__(
        self,
        journal: Journal,
        rundir: RunDirectory,
        epoch: int,
        *,
        host: str,
        series: Sequence[str],
        versions: Mapping[str, str],
        hooks: Sequence[Callable[[Committed], Any]],
        standing: Sequence[CheckpointRecord] | None = None,
    ) -> None:
        self._journal = journal
        self._rundir = rundir
        self._epoch = epoch
        self._who: dict[str, Any] = {"host": host, "pid": os.getpid()}
        # Also those that earlier managers have saved; no other process adds one while this one holds the lock.
        self._series = tuple(dict.fromkeys([*series, *journal.series()]))
        self._versions = versions
        self._hooks = hooks
        self._deleting = threading.Lock()
        #: Held from asking what is live until the journal and memory say what became of it; before `_deleting`.
        self._deciding = threading.RLock()
        self._resuming = 0
        #: What was resumed from and is not superseded yet, by series.
        self._resumed: dict[str, int] = {}
        self._remember(journal.standing() if standing is None else standing)
        self._look_at = 0.0
        with contextlib.suppress(OSError):
            requests.sweep(rundir.path)
        self._chores: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._do_chores, name=AFTER_COMMIT, daemon=True)
        self._thread.start()

    def is_saved(self, series: str, step: int) -> bool:
        """Whether the step is committed and not being retired; from memory, for the training thread."""
        return step in self._live.get(series, ())

    def newest(self, series: str, step: int | None = None) -> CheckpointRecord | None:
        """The live checkpoint that was committed last, or that of *step*; from memory."""
        live = self._live.get(series, {})
        return next(reversed(live.values()), None) if step is None else live.get(step)

    def directories(self, series: str) -> frozenset[str]:
        """The directories of all live checkpoints of *series*; from memory."""
        return frozenset(record.directory for record in self._live.get(series, {}).values())

    @contextlib.contextmanager
    def resuming(self) -> Iterator[None]:
        """While it is chosen and read what to resume from, nothing is let go because a command asks for it."""
        with self._deciding:
            self._resuming += 1
        try:
            yield
        finally:
            with self._deciding:
                self._resuming -= 1

    def resumed(self, series: str, checkpoint_id: int) -> None:
        """Note what was resumed from: until it is superseded, no command has it let go."""
        with self._deciding:
            self._resumed[series] = checkpoint_id

    def begin(self, job: Job, world_size: int, own_failure: Callable[[str], RankFailure]) -> tuple[Attempt | None, Go]:
        """Steps 1 and 2 up to the writers' start: intent, staging directory, metadata, WRITING."""
        attempt = None
        try:
            self._require_home()
            self._settle_series(job.series)
            with self._deciding:  # what it overwrites must not be let go by a command that has looked before
                record = self._journal.begin(
                    series=job.series, step=job.step, format=job.writer.kind, epoch=self._epoch,
                    world_size=world_size, metrics=job.metrics, per_rank=job.per_rank, overwrite=job.overwrite,
                    **self._who,
                )  # fmt: skip
            attempt = Attempt(record, Lifecycle(record.state, self._recorder(record.id)))
            # Crash here: PREWRITTEN without a staging directory; recovery marks it FAILED.
            self._clear_name(record)
            staging = self._rundir.create_staging(record)
            # Crash here: PREWRITTEN with an empty staging directory; recovery removes it.
            for name, data in job.writer.prewrite(staging):
                attempt.prewritten.append(self._write_small(staging, name, data))
            for file in job.writer.shared_files():
                with durable.new_file(staging / file.path, mode=self._rundir.permissions.file_mode) as descriptor:
                    durable.set_size(descriptor, file.size)
                    durable.write_at(descriptor, memoryview(file.header), 0)
            durable.sync_directory(staging)
            # Crash here: PREWRITTEN with metadata in the staging directory; recovery removes it.
            attempt.lifecycle.start_writing()
            # Crash here: WRITING with no rank's bytes; recovery removes the staging directory.
        except Exception as error:
            log.exception("cannot begin saving %s step %d", job.series, job.step)
            if attempt is not None:
                self.fail(attempt, (own_failure(in_words(error)),))
            return None, Go("", cause=in_words(error))
        return attempt, Go(record.staging_directory, record.id)

    def plan_ahead(self, attempt: Attempt, job: Job) -> None:
        """
        Ask the keep rule while the ranks write; with thousands of checkpoints it takes its time.

        What goes wrong here is met again by the commit, which asks then, as it does if the answer is out of date.
        """
        with contextlib.suppress(Exception):
            attempt.planned = self._plan(attempt.record, job.keep, self._journal.pinned(job.series))

    def commit(
        self,
        attempt: Attempt,
        job: Job,
        files: Sequence[FileEntry],
        reports: Sequence[Any],
        *,
        decide_by: float,
        stage_s: float,
        write_s: float,
        gather_s: float,
    ) -> str | None:
        """
        Steps 3 to 6: manifest, GATHERED, rename, COMMITTED. Returns why it failed, or None.

        After *decide_by* (of the monotonic clock) the other ranks may have given up; then nothing is gathered.
        """
        record = attempt.record
        gathered = False
        started = time.monotonic()
        try:
            staging = self._rundir.absolute(record.staging_directory)
            concluded = [self._write_small(staging, name, data) for name, data in job.writer.conclude(reports)]
            manifest = Manifest(
                run_id=self._journal.run_id, series=record.series, step=record.step, attempt=record.id,
                epoch=record.epoch, format=record.format, world_size=record.world_size, created_at=record.created_at,
                files=(*attempt.prewritten, *files, *concluded), per_rank=record.per_rank, metrics=record.metrics,
                versions=self._versions,
            )  # fmt: skip
            # Crash here: WRITING with every byte in the staging directory; recovery removes it, unproven.
            digest = self._rundir.seal(record, manifest)
            # Crash here: WRITING with a durable manifest; recovery removes it, the row does not vouch for it.
            if time.monotonic() > decide_by:
                raise TimeoutError("rank 0 came too late: the other ranks may have given up")
            attempt.lifecycle.gather(
                manifest_digest=digest, bytes=manifest.bytes, files=manifest.files,
                stage_s=stage_s, write_s=write_s, gather_s=gather_s,
            )  # fmt: skip
            gathered = True
            # Crash here: GATHERED with a complete staging directory; recovery publishes and commits it.
            self._check_epoch(record.id)
            replaces = self._journal.checkpoint(record.overwrites) if record.overwrites is not None else None
            self._rundir.publish(record, replaces)
            # Crash here: GATHERED and published durably; recovery commits it.
            with self._deciding:
                planned = self._planned(attempt, job.keep)
                attempt.lifecycle.commit(
                    commit_s=time.monotonic() - started, retire=planned.plan.marks, decisions=planned.news
                )
                self._note_commit(record, planned)
            # Crash here: COMMITTED with a stale meta.json and link; both are made anew at start.
        except Exception as error:
            log.exception("committing %s step %d failed", record.series, record.step)
            if gathered and not isinstance(error, StaleWriter) and self._finish(attempt):
                return None
            return in_words(error)
        return None

    def fail(self, attempt: Attempt, failures: Sequence[RankFailure]) -> None:
        """Rule D2: staging directory first, then FAILED with the reason of every rank."""
        if attempt.lifecycle.state not in (CheckpointState.PREWRITTEN, CheckpointState.WRITING):
            return
        reason = "; ".join(map(str, failures))
        facts = [dataclasses.asdict(failure) for failure in failures]
        try:
            self._rundir.remove(attempt.record.staging_directory)
        except (OSError, CheckpointError) as error:  # the other ranks wait to be told, whatever stands there now
            log.warning("%s stays until the next recovery: %s", attempt.record.staging_directory, error)
        # Crash here: WRITING without its staging directory; recovery marks it FAILED.
        try:
            attempt.lifecycle.fail(reason=reason, failures=facts)
        except CheckpointError:
            log.exception("cannot record that %s step %d failed", attempt.record.series, attempt.record.step)

    def after_commit(self, attempt: Attempt, job: Job) -> None:
        """The rest of step 6, and step 7 in the background: projections, hooks, retirement."""
        self.project()

        def rest() -> None:
            try:
                record = self._journal.checkpoint(attempt.record.id)
                event = Committed(record.series, record.step, self._rundir.absolute(record.directory), record)
                for hook in self._hooks:
                    _call(hook, event)
                self._retire(record.series)
            finally:
                job.finished.set()

        self._chores.put(rest)

    def project(self) -> None:
        """Bring ``meta.json`` and the ``latest`` links up to the journal. A failure is reported and undoes nothing."""
        try:
            with self._deciding:  # one at a time, and the last one says what is live by then
                live = [record for of_series in self._live.values() for record in of_series.values()]
                recovery.project(self._journal.run_id, live, self._rundir, series=self._series)
        except Exception:
            log.exception("meta.json or a latest link is stale; the journal is right and both are made anew at start")

    def close(self, timeout_s: float) -> None:
        """Finish hooks and deletions, at most *timeout_s* seconds; what is left is done at the next start."""
        self._chores.put(None)
        self._thread.join(timeout_s)

    # -- inside -----------------------------------------------------------------------------------

    def _write_small(self, staging: Path, name: str, data: bytes) -> FileEntry:
        path = staging / name
        durable.ensure_directory(path.parent, mode=self._rundir.permissions.directory_mode)
        durable.write_new(path, data, mode=self._rundir.permissions.file_mode)
        return FileEntry(name, len(data), Digest(data).text, 0)

    def _recorder(self, checkpoint_id: int) -> Callable[[CheckpointState, CheckpointState, Mapping[str, Any]], None]:
        def record(source: CheckpointState, dest: CheckpointState, facts: Mapping[str, Any]) -> None:
            self._journal.advance(checkpoint_id, source, dest, epoch=self._epoch, **self._who, **facts)

        return record

    def _clear_name(self, record: CheckpointRecord) -> None:
        """Delete what is being retired under this very name now, instead of after the hooks of an earlier commit."""
        if record.overwrites is None and self._rundir.exists(record.directory):
            for old in self._retiring(record.series):
                if old.directory == record.directory:
                    self._retire_one(old)

    def _check_epoch(self, checkpoint_id: int) -> None:
        newest = self._journal.current_epoch()
        if newest != self._epoch:
            raise StaleWriter(
                f"epoch {newest} has taken over this run; epoch {self._epoch} may change nothing any more",
                checkpoint_id=checkpoint_id,
                epoch=self._epoch,
                found=f"epoch {newest}",
            )

    def _require_home(self) -> None:
        """
        Refuse to go on where the run directory is another one by now: moved away, or its file system unmounted.

        A save would make it anew, and let go, one after the other, what stands in the one that is gone.
        """
        self._rundir.require_pair(self._journal.run_id, managed=True)

    def _settle_series(self, series: str) -> None:
        """Deal with a row that an earlier failure left in flight, as after a crash, so that the next save works."""
        if self._journal.in_flight(series) is not None:
            self._recover()

    def _finish(self, attempt: Attempt) -> bool:
        """After GATHERED the only way is forward: try what recovery would do; whether it is committed now."""
        try:
            self._recover()
            return self._journal.checkpoint(attempt.record.id).state is CheckpointState.COMMITTED
        except Exception:
            log.exception("%s step %d stays GATHERED until the next start", attempt.record.series, attempt.record.step)
            return False

    def _recover(self) -> None:
        with self._deciding:
            try:
                with self._deleting:
                    self._require_home()
                    self._journal.require_intact()  # opened long ago
                    recovery.recover(self._journal, self._rundir, epoch=self._epoch, **self._who)
            finally:
                self._remember(self._journal.standing())

    def _remember(self, standing: Sequence[CheckpointRecord]) -> None:
        """
        Take from what is standing what is live, oldest first, and what was let go and nobody has deleted: id → series.

        Kept beside the journal because reading so many rows anew would take longer with every save. Nobody else
        changes them while this epoch is the newest; the pins are asked for all the same before anything is let go.
        """
        live: dict[str, dict[int, CheckpointRecord]] = {}
        for record in sorted(standing, key=lambda record: record.commit_seq or 0):
            if record.is_live:
                live.setdefault(record.series, {})[record.step] = record
        self._live = live  # at once: the training thread looks at it
        self._let_go = {record.id: record.series for record in standing if record.retire_started_at is not None}
        #: What this manager has told the journal about each, so that it tells only what is new.
        self._decided: dict[int, tuple[str, tuple[str, ...]]] = {}
        #: By series, for the commit before: of most checkpoints the next one says the same.
        self._planned_before: dict[str, Planned] = {}

    def _note_commit(self, record: CheckpointRecord, planned: Planned) -> None:
        """What `_remember` would find now."""
        live = self._live.setdefault(record.series, {})
        for gone in planned.plan.drop:
            del live[gone.record.step]
            self._let_go[gone.record.id] = record.series
            self._decided.pop(gone.record.id, None)
        if record.overwrites is not None:
            self._let_go[record.overwrites] = record.series
            self._decided.pop(record.overwrites, None)
        live.pop(record.step, None)
        live[record.step] = self._journal.checkpoint(record.id)
        self._planned_before[record.series] = planned
        self._resumed.pop(record.series, None)
        self._decided.update((id, (word, reasons)) for id, word, reasons in planned.news if word == "keep")

    def _retiring(self, series: str) -> list[CheckpointRecord]:
        """What *series* has let go and still has to delete, as the journal has it now."""
        rows = [self._journal.checkpoint(id) for id, of in tuple(self._let_go.items()) if of == series]
        for row in rows:
            if row.retired_at is not None:
                self._let_go.pop(row.id, None)
        return [row for row in rows if row.retire_started_at is not None and row.retired_at is None]

    def _planned(self, attempt: Attempt, rule: KeepRule) -> Planned:
        """What the keep rule says now; nothing is let go by what a damaged journal says."""
        record, planned = attempt.record, attempt.planned
        pinned = self._journal.pinned(record.series)
        if planned is None or planned.live is not self._live.get(record.series) or planned.pinned != pinned:
            planned = self._plan(record, rule, pinned)
        leaving = [gone.record.id for gone in planned.plan.drop]
        self._journal.require_intact(leaving if record.overwrites is None else [*leaving, record.overwrites])
        return planned

    def _plan(self, record: CheckpointRecord, rule: KeepRule, pinned: frozenset[int]) -> Planned:
        """What the keep rule says once *record* is committed, of those of which it may say something new."""
        live = self._live.get(record.series, {})
        before = self._planned_before.get(record.series)
        others: Iterable[CheckpointRecord] | None = None
        if before is not None and before.live is live and before.pinned == pinned and record.overwrites is None:
            again = retention.unsettled(before.plan.keep, rule)
            others = None if again is None else [live[one.step] for one in again]
        if others is None:
            for step, other in live.items():
                if other.pinned != (step in pinned):
                    live[step] = dataclasses.replace(other, pinned=step in pinned)
            others = (other for other in live.values() if other.id != record.overwrites)
        newest = next((other.commit_seq or 0 for other in reversed(live.values())), 0) + 1
        now = time.time()
        committed = dataclasses.replace(
            record, state=CheckpointState.COMMITTED, committed_at=now, commit_seq=newest, finished_at=now
        )
        plan = retention.plan([*others, committed], rule, now=now)
        news = [one for one in plan.decisions if self._decided.get(one[0]) != one[1:]]
        return Planned(live, pinned, plan, news)

    def _retire(self, series: str) -> None:
        try:
            for record in self._retiring(series):
                self._retire_one(record)
        except (OSError, CheckpointError):
            log.exception("retiring checkpoints of %s stopped; it goes on after the next commit", series)

    def _retire_one(self, record: CheckpointRecord) -> None:
        with self._deleting:
            self._check_epoch(record.id)
            self._require_home()
            # Crash here: COMMITTED and retiring under its final name; recovery finishes it.
            self._rundir.retire(record)
            # Crash here: the directory is gone, the row still says retiring; recovery finishes it.
            self._journal.finish_retirement(record.id, epoch=self._epoch)

    def _do_chores(self) -> None:
        while True:
            if time.monotonic() >= self._look_at:
                self._answer_requests()
            try:
                chore = self._chores.get(timeout=max(0.0, self._look_at - time.monotonic()))
            except queue.Empty:
                continue
            if chore is None:
                return
            with contextlib.suppress(BaseException):  # nothing that a hook does may end this thread
                chore()

    # -- what commands ask for --------------------------------------------------------------------

    def _answer_requests(self) -> None:
        """Do what commands have asked of this manager."""
        self._look_at = time.monotonic() + LOOK_EVERY_S
        with self._looking_again():
            for id in requests.waiting(self._rundir.path):
                with self._looking_again():  # one that cannot be answered keeps no other one waiting
                    self._answer_request(id)

    @contextlib.contextmanager
    def _looking_again(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            log.exception("cannot answer what a command asks of this manager; looking again in %g s", LOOK_AGAIN_S)
            self._look_at = time.monotonic() + LOOK_AGAIN_S

    def _answer_request(self, id: str) -> None:
        run = self._rundir.path
        request: requests.Request | None = None
        answer = requests.Answer(requests.REFUSED)
        try:
            if (request := requests.read(run, id)) is None or request.epoch > self._epoch:
                return  # withdrawn, or to the manager that has taken over
            if request.epoch < self._epoch or not request.is_wanted(time.time()):
                log.info("nobody waits any more for %s of %s", request.kind, request.series)
                requests.remove(run, id)
                return
        except InvalidArgument as error:
            answer = dataclasses.replace(answer, text=error.message)
        with self._deciding:
            if request is not None and request.kind == requests.PRUNE and self._resuming:
                return  # it waits until nobody chooses or reads any more
            if not requests.take(run, id):
                return
            if request is not None:
                try:
                    answer = self._do_request(request)
                except Exception as error:
                    foreseen = isinstance(error, CheckpointError | OSError)
                    log.warning(
                        "refusing what `ckptmgr %s` asks of %s: %s",
                        request.kind, request.series, error, exc_info=not foreseen,
                    )  # fmt: skip
                    answer = dataclasses.replace(answer, text=in_words(error))
        # Crash here: a request is done and nobody has said so; who asked looks into the journal.
        requests.give(run, id, answer, self._rundir.permissions)
        if request is not None and answer.drop:
            log.info("retiring %d checkpoints of %s, as a command has asked", len(answer.drop), request.series)
            self._retire(request.series)

    def _do_request(self, request: requests.Request) -> requests.Answer:
        self._require_home()
        self._check_epoch(0)
        if request.kind == requests.VERIFY:
            return self._record_verified(request)
        if request.series not in self._series:
            raise InvalidArgument(f"there is no series {request.series!r} in this run")
        if request.rule is not None:
            return self._prune(request, request.rule)
        assert request.step is not None
        if request.kind == requests.PIN:
            self._journal.pin(request.series, request.step, note=request.note)
            return requests.Answer(requests.DONE, "pinned")
        try:
            self._journal.unpin(request.series, request.step)
        except CheckpointNotFound:
            return requests.Answer(requests.DONE, "was not pinned")
        return requests.Answer(requests.DONE, "unpinned")

    def _record_verified(self, request: requests.Request) -> requests.Answer:
        """Record what a command has found in checkpoints of one series: all of it, or nothing."""
        live = {record.id: record for record in self._live.get(request.series, {}).values()}
        damaged = []
        for one in request.verified:
            record = live.get(one.checkpoint_id) or self._journal.checkpoint(one.checkpoint_id)
            # What was let go since it was read does no harm.
            if record.series != request.series or record.state is not CheckpointState.COMMITTED:
                raise InvalidArgument(f"attempt {record.id} is no checkpoint of series {request.series!r}")
            if not one.ok:
                damaged.append(record.step)
        outdated = self._journal.record_verifications(request.verified, level="digest")
        if damaged:
            more = f" and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
            log.warning(
                "%s is damaged at step %s, as `ckptmgr verify` of pid %d on %s has found",
                request.series, ", ".join(map(str, damaged[:_NAMED])) + more, request.pid, request.host,
            )  # fmt: skip
        return requests.Answer(requests.DONE, "recorded", keep=dict.fromkeys(outdated, (requests.OUTDATED,)))

    def _prune(self, request: requests.Request, rule: KeepRule) -> requests.Answer:
        """Let go what *rule* does not keep: marked in the journal, forgotten here, and no longer in ``meta.json``."""
        live = self._live.get(request.series, {})
        pinned = self._journal.pinned(request.series)
        protected = {} if request.safe is None else {request.safe: requests.SAFE}
        if request.series in self._resumed:
            protected[self._resumed[request.series]] = requests.RESUMED
        attempt = self._journal.in_flight(request.series)
        if attempt is not None and attempt.overwrites is not None:
            protected[attempt.overwrites] = requests.OVERWRITTEN
        records = [dataclasses.replace(record, pinned=step in pinned) for step, record in live.items()]
        plan = retention.plan(records, rule, now=time.time(), protected=protected)
        leaving = [gone.record.id for gone in plan.drop]
        self._journal.require_intact(leaving)
        marks = requests.marks(plan, request.host, request.pid)
        if marks:
            try:
                self._journal.mark_retiring(marks, epoch=self._epoch)
            except CheckpointError:
                # Whether the journal took it may not be known.
                self._remember(self._journal.standing())
                raise
            # Crash here: what a command wants to be rid of is marked, and stands in meta.json; recovery deletes it.
            self._live = {
                **self._live,
                # Another mapping: what was planned ahead for the save under way is out of date.
                request.series: {step: record for step, record in live.items() if record.id not in leaving},
            }
            for id in reversed(leaving):
                self._let_go[id] = request.series
                self._decided.pop(id, None)
            self.project()
        return requests.Answer(
            requests.DONE,
            keep={kept.record.id: kept.reasons for kept in plan.keep},
            drop={mark.checkpoint_id: mark.reason for mark in marks},
        )


def _call(hook: Callable[[Committed], Any], event: Committed) -> None:
    mine = os.getpid()
    try:
        hook(event)
    except BaseException:
        if os.getpid() == mine:
            log.exception("the on_commit hook %r failed for %s step %d", hook, event.series, event.step)
    if os.getpid() != mine:
        os._exit(0)  # the hook has forked; what comes now is its parent's, and Python aborts a child that ends here


def in_words(error: BaseException) -> str:
    """An error as the cause that goes into journal and messages."""
    return f"{type(error).__name__}: {error}"
