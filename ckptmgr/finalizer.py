"""
The background half of a save: writing, gathering, committing. One thread per rank.

Rank 0's finalizer leads, with `commit.Leader` as its hands; the others follow its orders. All of them
drive their own writer process and agree on the call at which a failure is heard.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptmgr.commit import Go, Job, Leader, in_words
from ckptmgr.errors import (
    CheckpointError,
    ForeignJournal,
    RankFailure,
    SaveFailed,
    StaleWriter,
    StateChanged,
    disk_is_full,
)
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import CheckpointState
from ckptmgr.manifest import FileEntry
from ckptmgr.options import Timeouts, WriterOptions
from ckptmgr.ranks import Ranks
from ckptmgr.writers.arena import Arena
from ckptmgr.writers.jobs import Answer, DigestJob, WriteJob
from ckptmgr.writers.process import WriterProcess
from ckptmgr.writers.reading import Reading

log = logging.getLogger("ckptmgr")

#: Characters of a cause that travel between ranks.
MAX_CAUSE = 1000

_GO, _WRITTEN, _READ_BACK, _DIGESTS, _OUTCOME, _TICKS, _DUE = range(7)


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
        root: The run directory as this host knows it, without a link in it.
        file_mode: Of every file that the writer process creates; None leaves it to the umask.
        journal_path: Where a rank that has lost rank 0 looks what became of its save.
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
        root: Path,
        file_mode: int | None,
        journal_path: Path,
        leader: Leader | None,
    ) -> None:
        self._ranks = ranks
        self._root = root
        self._file_mode = file_mode
        self._journal_path = journal_path
        self._ticks = ticks
        self._timeouts = timeouts
        self._options = options
        self._slots = f"ckptmgr-{os.getuid()}-{run_id}"
        self._leader = leader
        self._writer = WriterProcess(options)
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
            causes.append(self._writer.start(self._timeouts.setup_s))
            causes.extend(self._writer.share(arena, self._timeouts.setup_s) for arena in arenas if arena.size)
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
            failures = (self._own_failure(in_words(error)),)
        if failures:
            text = f"saving {job.series} step {job.step} failed: " + "; ".join(map(str, failures))
            job.failure = SaveFailed(
                text, hint=_hint(failures, job.series, job.step), series=job.series, step=job.step, failures=failures
            )
            job.state = CheckpointState.FAILED
            log.error("%s", job.failure)
            self._agree_on_tick(job, failures)
        else:
            job.state = CheckpointState.COMMITTED
        job.settled.set()
        if self._leader is None or failures:
            job.finished.set()

    @property
    def _outcome_s(self) -> float:
        """
        How long a rank waits for the outcome after its own report; rank 0 decides earlier, or not for COMMITTED.

        Rank 0's own writing, then waiting for the slowest report, then what leads to GATHERED.
        """
        return 2 * self._timeouts.write_s + 2 * self._timeouts.gather_s

    # -- rank 0 -----------------------------------------------------------------------------------

    def _lead(self, job: Job, leader: Leader) -> tuple[RankFailure, ...]:
        attempt, go = leader.begin(job, self._ranks.world_size, self._own_failure)
        ordered = time.monotonic()
        self._ranks.order(job.number, _GO, go, self._timeouts.collective_s)
        mine = self._write(job, go, meanwhile=lambda: leader.plan_ahead(attempt, job) if attempt is not None else None)
        patience = self._timeouts.write_s + self._timeouts.gather_s
        asked = time.monotonic()
        written = self._ranks.collect(job.number, _WRITTEN, mine, patience, frame=job.frame)
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
                ordered = time.monotonic()
                more, failures = self._read_back(job, go, shared)
                files += more
            if not failures:
                statuses = [written[rank] for rank in sorted(written)]
                cause = leader.commit(
                    attempt, job, files, [status.report for status in statuses],
                    # No other rank began to wait for the outcome before it was told to write.
                    decide_by=ordered + self._outcome_s - 0.1 * self._timeouts.gather_s,
                    stage_s=max(status.stage_s for status in statuses),
                    write_s=max(status.answer.write_s for status in statuses),
                    gather_s=gather_s,
                )  # fmt: skip
                failures = (self._own_failure(cause),) if cause is not None else ()
        if failures and attempt is not None:
            leader.fail(attempt, failures)
        silent = {failure.rank for failure in failures if failure.silent}
        self._ranks.order(job.number, _OUTCOME, failures, self._timeouts.gather_s, silent=silent)
        if attempt is not None and not failures:
            leader.after_commit(attempt, job)
        return failures

    def _read_back(self, job: Job, go: Go, paths: Sequence[str]) -> tuple[list[FileEntry], tuple[RankFailure, ...]]:
        """Have the files that several ranks wrote read back and digested, spread over the ranks."""
        shares = [tuple(paths[rank :: self._ranks.world_size]) for rank in range(self._ranks.world_size)]
        self._ranks.order(job.number, _READ_BACK, shares, self._timeouts.gather_s)
        mine = self._digest(go, shares[0])
        patience = self._timeouts.write_s + self._timeouts.gather_s
        answers = self._ranks.collect(job.number, _DIGESTS, mine, patience, frame=job.frame)
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
        go = None
        try:
            _, go = self._ranks.await_order(job.number, (_GO,), self._timeouts.collective_s)
            written = self._write(job, go)
            stage, value = self._report(job, _WRITTEN, written, (_READ_BACK, _OUTCOME))
            if stage == _READ_BACK:
                _, value = self._report(job, _DIGESTS, self._digest(go, value[self._ranks.rank]), (_OUTCOME,))
        except TimeoutError as error:
            return self._ask_the_journal(go.attempt if go is not None else 0, f"no word from rank 0: {error}")
        failures: tuple[RankFailure, ...] = value
        return failures

    def _report(self, job: Job, stage: int, value: Any, then: Sequence[int]) -> tuple[int, Any]:
        """Report to rank 0 and await its next order, both within one limit: a link that is down eats no second one."""
        deadline = time.monotonic() + self._outcome_s
        self._ranks.report(job.number, stage, value, self._outcome_s, frame=job.frame)
        return self._ranks.await_order(job.number, then, max(0.001, deadline - time.monotonic()))

    def _ask_the_journal(self, attempt: int, doubt: str) -> tuple[RankFailure, ...]:
        """What became of a save whose outcome did not arrive. Rule L6: the journal knows, not this rank's exception."""
        deadline = time.monotonic() + self._timeouts.gather_s
        silent = (RankFailure(0, self._ranks.host_of(0), doubt, True),)
        while attempt:
            try:
                with Journal.open_read_only(self._journal_path) as journal:
                    record = journal.checkpoint(attempt)
            except CheckpointError as error:
                log.warning("cannot ask the journal what became of attempt %d: %s", attempt, error)
                break
            if record.state is CheckpointState.FAILED:
                return _known(record.failures) or silent
            if record.state is CheckpointState.COMMITTED:
                return ()
            if record.state is not CheckpointState.GATHERED:
                break
            if time.monotonic() > deadline:
                return ()  # the point of no return is behind it: whoever finishes it commits it
            time.sleep(0.1)
        return silent

    # -- all ranks ----------------------------------------------------------------------------------

    def _write(self, job: Job, go: Go, meanwhile: Callable[[], object] = lambda: None) -> _Written:
        try:
            answer = self._have_written(job, go, meanwhile)
        except Exception as error:  # a trainer without a descriptor left, say: it belongs into the report
            log.exception("cannot have %s step %d written", job.series, job.step)
            answer = Answer(cause=in_words(error))
        for reading in job.readings:
            reading.conclude()
            if answer.cause is None and reading.error is not None:
                answer = Answer(cause=in_words(reading.error))
        if answer.cause is not None:
            return _Written(dataclasses.replace(answer, files=(), cause=answer.cause[:MAX_CAUSE]), None, job.stage_s)
        return _Written(answer, job.report, job.stage_s)

    def _have_written(self, job: Job, go: Go, meanwhile: Callable[[], object]) -> Answer:
        answer = Answer(cause=go.cause or job.cause)
        # One limit for all that the writer does, or a rank that is still waiting for it would pass for silent.
        deadline = time.monotonic() + self._timeouts.write_s
        for reading in job.readings:
            if answer.cause is None:
                answer = Answer(cause=self._await_reading(job, reading))
        if self._closing and answer.cause is None:
            answer = Answer(cause="the manager is closing")
        if answer.cause is None and job.files:
            cause = self._writer.start(max(0.001, deadline - time.monotonic()))
            for arena in job.arenas:
                if cause is None and arena.size:
                    cause = self._writer.share(arena, max(0.001, deadline - time.monotonic()))
            write = WriteJob(
                directory=str(self._root / go.directory), arena=job.arenas[0].number, files=job.files,
                rank=self._ranks.rank, file_mode=self._file_mode,
                slots=self._slots, write_slots=self._options.write_slots, slot_timeout_s=0.9 * self._timeouts.write_s,
                max_bytes_per_second=self._options.max_bytes_per_second,
            )  # fmt: skip
            answer = (
                Answer(cause=cause)
                if cause is not None
                else self._writer.do(write, deadline - time.monotonic(), meanwhile=meanwhile)
            )
        return answer

    def _await_reading(self, job: Job, reading: Reading) -> str | None:
        """Wait until the state has been read; returns why that failed, or None."""
        limit = self._timeouts.write_s
        if not reading.wait(limit):
            return f"the state was not read within {limit:g} s"
        job.stage_s += reading.seconds
        return in_words(reading.error) if reading.error is not None else None

    def _digest(self, go: Go, paths: tuple[str, ...]) -> Answer:
        if not paths:
            return Answer()
        try:
            answer = Answer(cause=self._writer.start(self._timeouts.write_s))
            if answer.cause is None:
                digest = DigestJob(str(self._root / go.directory), paths, self._ranks.rank)
                answer = self._writer.do(digest, self._timeouts.write_s)
        except Exception as error:
            log.exception("cannot have %s read back", go.directory)
            answer = Answer(cause=in_words(error))
        return answer if answer.cause is None else Answer(cause=answer.cause[:MAX_CAUSE])

    def _agree_on_tick(self, job: Job, failures: Sequence[RankFailure]) -> None:
        mine = self._ticks.propose()
        due: int | None = None
        gone = {failure.rank for failure in failures if failure.silent}
        try:
            if self._ranks.world_size == 1:
                due = mine
            elif self._ranks.rank == 0:
                there = [rank for rank in range(self._ranks.world_size) if rank not in gone]
                proposals = self._ranks.collect(job.number, _TICKS, mine, self._timeouts.gather_s, of=there, late=True)
                due = max(proposals.values())
                self._ranks.order(job.number, _DUE, due, self._timeouts.gather_s, silent=gone)
            elif not {0, self._ranks.rank} & gone:
                self._ranks.report(job.number, _TICKS, mine, self._timeouts.gather_s, late=True)
                _, due = self._ranks.await_order(job.number, (_DUE,), self._timeouts.gather_s)
        except TimeoutError as error:
            log.warning("ranks may learn of the failed save at different steps: %s", error)
        finally:
            self._ticks.settle(job, due)

    def _own_failure(self, cause: str) -> RankFailure:
        return RankFailure(self._ranks.rank, self._ranks.host, cause)


def _known(failures: Sequence[Mapping[str, Any]]) -> tuple[RankFailure, ...]:
    """What rank 0 wrote down of each failed rank."""
    try:
        return tuple(RankFailure(**facts) for facts in failures)
    except TypeError:  # a row of another version, or of somebody else
        return ()


def _hint(failures: Sequence[RankFailure], series: str, step: int) -> str:
    if disk_is_full(failure.cause for failure in failures):
        return "free disk space; the next save will work, and older checkpoints are untouched"
    if any(failure.cause.startswith(StaleWriter.__name__) for failure in failures):
        return StaleWriter.hint
    if any(failure.cause.startswith(StateChanged.__name__) for failure in failures):
        return StateChanged.hint
    if any(failure.cause.startswith(ForeignJournal.__name__) for failure in failures):
        return "see that the run directory stands where it stood, mounted; the next save works as soon as it does"
    return f"the next save works; `ckptmgr show RUN {step} --series {series}` has the causes per rank"
