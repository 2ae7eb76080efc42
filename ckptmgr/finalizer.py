"""
The background half of a save: writing, gathering, publishing, committing. One thread per rank.

Rank 0's finalizer leads and is the only one that touches journal and run directory; the others
follow its orders. `_Leader.save` is the commit order of docs/explanation/commit-order.md from top to
bottom. Hooks and deletions come after the commit on a second thread, so that a slow one never holds
up the next save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ckptmgr import durable, recovery, retention
from ckptmgr.errors import CheckpointError, RankFailure, SaveFailed, StaleWriter
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, Format, Lifecycle
from ckptmgr.manifest import Digest, FileEntry, Manifest
from ckptmgr.options import Timeouts, WriterOptions
from ckptmgr.ranks import Ranks
from ckptmgr.retention import KeepRule
from ckptmgr.rundir import RunDirectory
from ckptmgr.writers.arena import Arena
from ckptmgr.writers.jobs import Answer, DigestJob, FileJob, SharedFile, WriteJob
from ckptmgr.writers.process import WriterProcess

log = logging.getLogger("ckptmgr")

_GO, _WRITTEN, _READ_BACK, _DIGESTS, _OUTCOME, _TICKS, _DUE = range(7)


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
    """One save on its way through the finalizer. *number* counts saves and is the same on every rank."""

    number: int
    series: str
    step: int
    keep: KeepRule
    writer: Concluder
    arena: Arena
    files: tuple[FileJob, ...]
    report: Any
    stage_s: float
    metrics: Mapping[str, float]
    per_rank: tuple[str, ...]
    overwrite: bool
    cause: str | None = None
    state: CheckpointState | None = None
    failure: SaveFailed | None = None
    failure_seen: bool = False
    settled: threading.Event = dataclasses.field(default_factory=threading.Event)
    finished: threading.Event = dataclasses.field(default_factory=threading.Event)


@dataclasses.dataclass(frozen=True)
class _Go:
    """Rank 0's word to write: where, or why not."""

    directory: str
    cause: str | None = None


@dataclasses.dataclass(frozen=True)
class _Written:
    """One rank's status after writing."""

    answer: Answer
    report: Any
    stage_s: float


class Ticks:
    """
    Makes every rank learn of a failed save at the same call, without a collective in the training loop.

    Each ``save`` and ``poll`` is a tick. When a save has failed, the finalizers agree on a tick that no
    rank has begun yet; a rank whose training thread arrives meanwhile waits for that agreement, which
    takes two small messages.
    """

    def __init__(self, timeouts: Timeouts) -> None:
        self._patience_s = 3 * timeouts.gather_s
        self._changed = threading.Condition()
        self._count = 0
        self._agreeing = 0
        self._due: list[tuple[int, Job]] = []

    def tick(self) -> list[Job]:
        """Begin the next tick; returns the failed saves that are due by it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._agreeing, self._patience_s)
            self._count += 1
            due = [job for at, job in self._due if at <= self._count]
            self._due = [entry for entry in self._due if entry[0] > self._count]
            return [job for job in due if not job.failure_seen]

    def propose(self) -> int:
        """The first tick that this rank has not begun; `settle` must follow."""
        with self._changed:
            self._agreeing += 1
            return self._count + 1

    def settle(self, job: Job, at: int | None) -> None:
        """The failure of *job* is due at tick *at*, or at the next one where the ranks could not agree."""
        with self._changed:
            self._agreeing -= 1
            self._due.append((at if at is not None else self._count + 1, job))
            self._changed.notify_all()

    def rest(self) -> list[Job]:
        """Failures nobody has been told of yet; they are told now."""
        with self._changed:
            self._changed.wait_for(lambda: not self._agreeing, self._patience_s)
            due, self._due = [job for _, job in self._due], []
            return [job for job in due if not job.failure_seen]


class Finalizer:
    """
    The thread that takes saves to their end, and the writer process it owns.

    Args:
        ranks: This rank among the others.
        ticks: Where failures are announced to the training thread.
        timeouts: How long anything may take.
        options: How the writer process treats the machine.
        run_id: Names the host's write slots.
        leader: On rank 0 what leads, on the others None.
    """

    def __init__(
        self,
        ranks: Ranks,
        ticks: Ticks,
        timeouts: Timeouts,
        options: WriterOptions,
        *,
        run_id: str,
        leader: Leader | None,
    ) -> None:
        self._ranks = ranks
        self._ticks = ticks
        self._timeouts = timeouts
        self._options = options
        self._slots = f"ckptmgr-{os.getuid()}-{run_id}"
        self._leader = leader
        self._writer = WriterProcess(options, start_s=timeouts.setup_s)
        self._queue: queue.SimpleQueue[Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="ckptmgr-finalizer", daemon=True)
        self._thread.start()

    @property
    def writer_pid(self) -> int | None:
        """The process id of this rank's writer."""
        return self._writer.pid

    def start_writer(self, arenas: Sequence[Arena] = ()) -> str | None:
        """Start the writer process and let it map *arenas*; returns why that failed, or None."""
        causes: list[str | None] = []
        done = threading.Event()

        def start() -> None:
            causes.append(self._writer.start())
            causes.extend(self._writer.share(arena) for arena in arenas if arena.size)
            done.set()

        self._queue.put(start)
        if not done.wait(self._timeouts.setup_s):
            return f"the writer process was not ready within {self._timeouts.setup_s:g} s"
        return next((cause for cause in causes if cause is not None), None)

    def submit(self, job: Job) -> None:
        """Take *job* to its end in the background, after those submitted before it."""
        self._queue.put(job)

    def close(self, timeout_s: float) -> bool:
        """
        Finish what is in flight, at most *timeout_s* seconds, then end thread and writer process.

        Returns:
            Whether the thread has ended. Where it has not, it is stuck in a message to another rank.
        """
        deadline = time.monotonic() + timeout_s
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            # Out of time: what is in flight fails with the writer, and nothing new is begun.
            self._closing = True
            self._writer.kill()
            self._thread.join(max(1.0, min(10.0, timeout_s)))
        if self._leader is not None:
            self._leader.close(max(1.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while (job := self._queue.get()) is not None:
                if isinstance(job, Job):
                    self._take(job)
                else:
                    job()
        finally:
            self._writer.stop(5.0)

    def _take(self, job: Job) -> None:
        try:
            failures = self._lead(job, self._leader) if self._leader is not None else self._follow(job)
        except Exception as error:
            log.exception("save of %s step %d failed", job.series, job.step)
            failures = (self._own_failure(_words(error)),)
        if failures:
            text = f"saving {job.series} step {job.step} failed: " + "; ".join(map(str, failures))
            job.failure = SaveFailed(text, hint=_hint(failures), series=job.series, step=job.step, failures=failures)
            job.state = CheckpointState.FAILED
            log.error("%s", job.failure)
            self._agree_on_tick(job, failures)
        else:
            job.state = CheckpointState.COMMITTED
        job.settled.set()
        if self._leader is None or failures:
            job.finished.set()

    # -- rank 0 -----------------------------------------------------------------------------------

    def _lead(self, job: Job, leader: Leader) -> tuple[RankFailure, ...]:
        attempt, go = leader.begin(job, self._ranks.world_size, self._own_failure)
        self._ranks.order(job.number, _GO, go, self._timeouts.collective_s)
        mine = self._write(job, go)
        patience = self._timeouts.write_s + self._timeouts.gather_s
        asked = time.monotonic()
        written = self._ranks.collect(job.number, _WRITTEN, mine, patience)
        gather_s = time.monotonic() - asked
        if go.cause is not None:
            failures: tuple[RankFailure, ...] = (self._own_failure(go.cause),)
        else:
            failures = self._failures({rank: status.answer for rank, status in written.items()})
        assert attempt is not None or failures
        if not failures and attempt is not None:
            files = [entry for status in written.values() for entry in status.answer.files]
            shared = [file.path for file in job.writer.shared_files()]
            if shared:
                more, failures = self._read_back(job, go, shared)
                files += more
            if not failures:
                statuses = [written[rank] for rank in sorted(written)]
                cause = leader.commit(
                    attempt, job, files, [status.report for status in statuses],
                    stage_s=max(status.stage_s for status in statuses),
                    write_s=max(status.answer.write_s for status in statuses),
                    gather_s=gather_s,
                )  # fmt: skip
                failures = (self._own_failure(cause),) if cause is not None else ()
        if failures and attempt is not None:
            leader.fail(attempt, failures)
        heard = [rank for rank in written if rank != 0]
        self._ranks.order(job.number, _OUTCOME, failures, self._timeouts.gather_s, to=heard)
        if attempt is not None and not failures:
            leader.after_commit(attempt, job)
        return failures

    def _read_back(self, job: Job, go: _Go, paths: Sequence[str]) -> tuple[list[FileEntry], tuple[RankFailure, ...]]:
        """Have the files that several ranks wrote read back and digested, spread over the ranks."""
        shares = [tuple(paths[rank :: self._ranks.world_size]) for rank in range(self._ranks.world_size)]
        self._ranks.order(job.number, _READ_BACK, shares, self._timeouts.gather_s)
        mine = self._digest(go, shares[0])
        patience = self._timeouts.write_s + self._timeouts.gather_s
        answers = self._ranks.collect(job.number, _DIGESTS, mine, patience)
        failures = self._failures(answers)
        return [entry for answer in answers.values() for entry in answer.files], failures

    def _failures(self, answers: Mapping[int, Answer]) -> tuple[RankFailure, ...]:
        silent_s = self._timeouts.write_s + self._timeouts.gather_s
        failures = []
        for rank in range(self._ranks.world_size):
            host = self._ranks.host_of(rank)
            if rank not in answers:
                failures.append(RankFailure(rank, host, f"silent: gone, or no status within {silent_s:g} s", True))
            elif (cause := answers[rank].cause) is not None:
                failures.append(RankFailure(rank, host, cause))
        return tuple(failures)

    # -- every other rank ---------------------------------------------------------------------------

    def _follow(self, job: Job) -> tuple[RankFailure, ...]:
        longest = self._timeouts.write_s + 2 * self._timeouts.gather_s
        try:
            _, go = self._ranks.await_order(job.number, (_GO,), self._timeouts.collective_s)
            self._ranks.report(job.number, _WRITTEN, self._write(job, go), longest)
            stage, value = self._ranks.await_order(job.number, (_READ_BACK, _OUTCOME), longest)
            if stage == _READ_BACK:
                self._ranks.report(job.number, _DIGESTS, self._digest(go, value[self._ranks.rank]), longest)
                _, value = self._ranks.await_order(job.number, (_OUTCOME,), longest)
        except TimeoutError as error:
            return (RankFailure(0, self._ranks.host_of(0), f"no word from rank 0: {error}", True),)
        failures: tuple[RankFailure, ...] = value
        return failures

    # -- all ranks ----------------------------------------------------------------------------------

    def _write(self, job: Job, go: _Go) -> _Written:
        answer = Answer(cause=go.cause or job.cause)
        if self._closing and answer.cause is None:
            answer = Answer(cause="the manager is closing")
        if answer.cause is None and job.files:
            cause = self._writer.share(job.arena) if job.arena.size else self._writer.start()
            write = WriteJob(
                directory=go.directory, arena=job.arena.number, files=job.files, rank=self._ranks.rank,
                slots=self._slots, write_slots=self._options.write_slots, slot_timeout_s=0.9 * self._timeouts.write_s,
            )  # fmt: skip
            answer = Answer(cause=cause) if cause is not None else self._writer.do(write, self._timeouts.write_s)
        return _Written(answer, job.report, job.stage_s)

    def _digest(self, go: _Go, paths: tuple[str, ...]) -> Answer:
        if not paths:
            return Answer()
        if (cause := self._writer.start()) is not None:
            return Answer(cause=cause)
        return self._writer.do(DigestJob(go.directory, paths, self._ranks.rank), self._timeouts.write_s)

    def _agree_on_tick(self, job: Job, failures: Sequence[RankFailure]) -> None:
        mine = self._ticks.propose()
        due: int | None = None
        gone = {failure.rank for failure in failures if failure.silent}
        try:
            if self._ranks.world_size == 1:
                due = mine
            elif self._ranks.rank == 0 and not gone:
                proposals = self._ranks.collect(job.number, _TICKS, mine, self._timeouts.gather_s)
                due = max(proposals.values())
                self._ranks.order(job.number, _DUE, due, self._timeouts.gather_s)
            elif not gone:
                self._ranks.report(job.number, _TICKS, mine, self._timeouts.gather_s)
                _, due = self._ranks.await_order(job.number, (_DUE,), self._timeouts.gather_s)
        except TimeoutError as error:
            log.warning("ranks may learn of the failed save at different steps: %s", error)
        finally:
            self._ticks.settle(job, due)

    def _own_failure(self, cause: str) -> RankFailure:
        return RankFailure(self._ranks.rank, self._ranks.host, cause)


@dataclasses.dataclass
class Attempt:
    """One attempt as rank 0 leads it: its row, its walk through the states, what stands in staging already."""

    record: CheckpointRecord
    lifecycle: Lifecycle
    prewritten: list[FileEntry] = dataclasses.field(default_factory=list)


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
    ) -> None:
        self._journal = journal
        self._rundir = rundir
        self._epoch = epoch
        self._who: dict[str, Any] = {"host": host, "pid": os.getpid()}
        self._series = series
        self._versions = versions
        self._hooks = hooks
        self._deleting = threading.Lock()
        self._saved = {(record.series, record.step) for record in journal.checkpoints(live_only=True)}
        self._chores: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._do_chores, name="ckptmgr-after-commit", daemon=True)
        self._thread.start()

    def is_saved(self, series: str, step: int) -> bool:
        """Whether the step is committed and not being retired; from memory, for the training thread."""
        return (series, step) in self._saved

    def begin(self, job: Job, world_size: int, own_failure: Callable[[str], RankFailure]) -> tuple[Attempt | None, _Go]:
        """Steps 1 and 2 up to the writers' start: intent, staging directory, metadata, WRITING."""
        attempt = None
        try:
            self._settle_series(job.series)
            record = self._journal.begin(
                series=job.series, step=job.step, format=job.writer.kind, epoch=self._epoch, world_size=world_size,
                metrics=job.metrics, per_rank=job.per_rank, overwrite=job.overwrite, **self._who,
            )  # fmt: skip
            attempt = Attempt(record, Lifecycle(record.state, self._recorder(record.id)))
            # Crash here: PREWRITTEN without a staging directory; recovery marks it FAILED.
            staging = self._rundir.create_staging(record)
            # Crash here: PREWRITTEN with an empty staging directory; recovery removes it.
            for name, data in job.writer.prewrite(staging):
                attempt.prewritten.append(_write_small(staging, name, data))
            for file in job.writer.shared_files():
                with durable.new_file(staging / file.path) as descriptor:
                    durable.set_size(descriptor, file.size)
                    durable.write_at(descriptor, memoryview(file.header), 0)
            durable.sync_directory(staging)
            # Crash here: PREWRITTEN with metadata in the staging directory; recovery removes it.
            attempt.lifecycle.start_writing()
            # Crash here: WRITING with no rank's bytes; recovery removes the staging directory.
        except Exception as error:
            log.exception("cannot begin saving %s step %d", job.series, job.step)
            if attempt is not None:
                self.fail(attempt, (own_failure(_words(error)),))
            return None, _Go("", cause=_words(error))
        return attempt, _Go(str(staging))

    def commit(
        self,
        attempt: Attempt,
        job: Job,
        files: Sequence[FileEntry],
        reports: Sequence[Any],
        *,
        stage_s: float,
        write_s: float,
        gather_s: float,
    ) -> str | None:
        """Steps 3 to 6: manifest, GATHERED, rename, COMMITTED. Returns why it failed, or None."""
        record = attempt.record
        gathered = False
        started = time.monotonic()
        try:
            staging = self._rundir.absolute(record.staging_directory)
            concluded = [_write_small(staging, name, data) for name, data in job.writer.conclude(reports)]
            manifest = Manifest(
                run_id=self._journal.run_id, series=record.series, step=record.step, attempt=record.id,
                epoch=record.epoch, format=record.format, world_size=record.world_size, created_at=record.created_at,
                files=(*attempt.prewritten, *files, *concluded), per_rank=record.per_rank, metrics=record.metrics,
                versions=self._versions,
            )  # fmt: skip
            # Crash here: WRITING with every byte in the staging directory; recovery removes it, unproven.
            digest = self._rundir.seal(record, manifest)
            # Crash here: WRITING with a durable manifest; recovery removes it, the row does not vouch for it.
            attempt.lifecycle.gather(
                manifest_digest=digest, bytes=manifest.bytes, files=manifest.files,
                stage_s=stage_s, write_s=write_s, gather_s=gather_s,
            )  # fmt: skip
            gathered = True
            # Crash here: GATHERED with a complete staging directory; recovery publishes and commits it.
            self._check_epoch(record)
            replaces = self._journal.checkpoint(record.overwrites) if record.overwrites is not None else None
            self._rundir.publish(record, replaces)
            # Crash here: GATHERED and published durably; recovery commits it.
            keep = self._plan(record, job.keep)
            attempt.lifecycle.commit(commit_s=time.monotonic() - started, retire=keep.marks, decisions=keep.decisions)
            self._saved.add((record.series, record.step))
            self._saved.difference_update((gone.record.series, gone.record.step) for gone in keep.drop)
            # Crash here: COMMITTED with a stale meta.json and link; both are made anew at start.
        except Exception as error:
            log.exception("committing %s step %d failed", record.series, record.step)
            if gathered and not isinstance(error, StaleWriter) and self._finish(attempt):
                return None
            return _words(error)
        return None

    def fail(self, attempt: Attempt, failures: Sequence[RankFailure]) -> None:
        """Rule D2: staging directory first, then FAILED with the reason of every rank."""
        if attempt.lifecycle.state not in (CheckpointState.PREWRITTEN, CheckpointState.WRITING):
            return
        reason = "; ".join(map(str, failures))
        facts = [dataclasses.asdict(failure) for failure in failures]
        try:
            self._rundir.remove(attempt.record.staging_directory)
        except OSError as error:
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
            live = self._journal.checkpoints(live_only=True)
            self._rundir.write_meta(self._journal.run_id, live, self._series)
            for series in dict.fromkeys(record.series for record in live if record.format is Format.HUGGINGFACE):
                exports = [record for record in live if record.series == series]
                self._rundir.point_latest(series, max(exports, key=lambda record: record.commit_seq or 0))
        except (OSError, CheckpointError):
            log.exception("meta.json or a latest link is stale; the journal is right and both are made anew at start")

    def close(self, timeout_s: float) -> None:
        """Finish hooks and deletions, at most *timeout_s* seconds; what is left is done at the next start."""
        self._chores.put(None)
        self._thread.join(timeout_s)

    # -- inside -----------------------------------------------------------------------------------

    def _recorder(self, checkpoint_id: int) -> Callable[[CheckpointState, CheckpointState, Mapping[str, Any]], None]:
        def record(source: CheckpointState, dest: CheckpointState, facts: Mapping[str, Any]) -> None:
            self._journal.advance(checkpoint_id, source, dest, epoch=self._epoch, **self._who, **facts)

        return record

    def _check_epoch(self, record: CheckpointRecord) -> None:
        newest = self._journal.current_epoch()
        if newest != self._epoch:
            raise StaleWriter(
                f"epoch {newest} has taken over this run; epoch {self._epoch} may not publish any more",
                checkpoint_id=record.id,
                epoch=self._epoch,
                found=f"epoch {newest}",
            )

    def _settle_series(self, series: str) -> None:
        """Deal with a row that an earlier failure left in flight, as after a crash, so that the next save works."""
        if any(record.is_in_flight for record in self._journal.checkpoints(series=series)):
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
        with self._deleting:
            recovery.recover(self._journal, self._rundir, epoch=self._epoch, **self._who)

    def _plan(self, record: CheckpointRecord, rule: KeepRule) -> retention.RetentionPlan:
        """What the keep rule says once *record* is committed."""
        live = self._journal.checkpoints(series=record.series, live_only=True)
        newest = max((other.commit_seq or 0 for other in live), default=0) + 1
        now = time.time()
        committed = dataclasses.replace(
            record, state=CheckpointState.COMMITTED, committed_at=now, commit_seq=newest, finished_at=now
        )
        others = [other for other in live if other.id != record.overwrites]
        return retention.plan([*others, committed], rule, now=now)

    def _retire(self, series: str) -> None:
        try:
            for record in self._journal.checkpoints(series=series):
                if record.retire_started_at is None or record.retired_at is not None:
                    continue
                with self._deleting:
                    self._check_epoch(record)
                    # Crash here: COMMITTED and retiring under its final name; recovery finishes it.
                    self._rundir.retire(record)
                    # Crash here: the directory is gone, the row still says retiring; recovery finishes it.
                    self._journal.finish_retirement(record.id, epoch=self._epoch)
        except (OSError, CheckpointError):
            log.exception("retiring checkpoints of %s stopped; it goes on after the next commit", series)

    def _do_chores(self) -> None:
        while (chore := self._chores.get()) is not None:
            with contextlib.suppress(Exception):
                chore()


def _write_small(staging: Path, name: str, data: bytes) -> FileEntry:
    path = staging / name
    durable.ensure_directory(path.parent)
    durable.write_new(path, data)
    return FileEntry(name, len(data), Digest(data).text, 0)


def _call(hook: Callable[[Committed], Any], event: Committed) -> None:
    try:
        hook(event)
    except Exception:
        log.exception("the on_commit hook %r failed for %s step %d", hook, event.series, event.step)


def _hint(failures: Sequence[RankFailure]) -> str:
    if any("No space left" in failure.cause or "Disk quota" in failure.cause for failure in failures):
        return "free disk space; the next save will work, and older checkpoints are untouched"
    return "the next save works; `ckptmgr show RUN STEP` has the causes per rank"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
