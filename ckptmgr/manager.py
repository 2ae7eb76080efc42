"""
`CheckpointManager`: the only room a trainer enters.

Here is what happens on the training thread: agreeing with the other ranks, capturing the state, and
hearing of failures. Everything after the capture happens in `finalizer` and `commit`; everything that
is decided, in `retention`, `recovery` and `resume`.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ckptmgr import recovery
from ckptmgr.answers import PendingSave, Resumed
from ckptmgr.calls import Calls, fingerprint, instance, metrics_of, one_of, step_of
from ckptmgr.capture import Capture, Loan
from ckptmgr.commit import AFTER_COMMIT, Committed, Job, Leader
from ckptmgr.doctor import words_at_start
from ckptmgr.errors import (
    CheckpointError,
    InvalidArgument,
    ManagerClosed,
    SaveFailed,
    SaveInFlight,
    StepAlreadySaved,
    WaitTimeout,
)
from ckptmgr.finalizer import Finalizer, Ticks
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import Format
from ckptmgr.options import Permissions, Timeouts, WriterOptions
from ckptmgr.ranks import Ranks
from ckptmgr.restore import Restore, Restored
from ckptmgr.rundir import RunDirectory
from ckptmgr.series import Series, by_name
from ckptmgr.writers import dcp
from ckptmgr.writers.arena import available_bytes
from ckptmgr.writers.state import split

log = logging.getLogger("ckptmgr")

OnFailure = Literal["raise", "warn", "terminate"]
WhenBusy = Literal["wait", "skip", "raise"]
CaptureMode = Literal["sync", "overlap"]
Hook = Callable[[Committed], Any]

_GO, _SKIP, _BUSY, _SAVED = range(4)


class CheckpointManager:
    """
    Saves and resumes the checkpoints of one run.

    All ranks must create it together, with the same arguments. Rank 0 takes the run lock, opens the
    journal, recovers what a crash left, and from then on is the only one to change journal and run
    directory. The lock, the Gloo groups and the writer process are set up here and fail here, with the
    same error on every rank.

    Args:
        run_dir: The run directory; created if missing. It must be on storage that all ranks share.
        series: One or more `Series`; by default one named "checkpoint" in `DCP` format that keeps all.
        journal: The journal's file, if it is not to be ``<run_dir>.journal.db``.
        on_failure: What a failed save does at the next ``save`` or ``poll``, on every rank at the same
            call: raise `SaveFailed`, warn, or send this process SIGTERM.
        when_busy: What ``save`` does while the series has a save in flight: wait, skip, or raise.
        capture: When the state may change again: ``"sync"``, as soon as ``save`` returns; ``"overlap"``, inside
            of ``updating()`` only, and ``save`` returns before the tensors have been read.
        on_commit: Called on rank 0, in the background, with a `Committed` after each commit. What a hook
            raises is logged and undoes nothing.
        timeouts: How long anything may wait, in seconds.
        writers: How the writer processes treat the machine.
        permissions: The modes of everything that is created; by default the umask decides.

    Raises:
        RunLocked: Another process manages this run.
        JournalError: The journal cannot be used; the subclass says why.
        SetupFailed: A rank could not be set up.
        UnsafePath: What stands at a name of ours may be somebody else's.
        InvalidArgument: The arguments make no sense.
        RanksDisagree: The ranks gave different *series*, *on_failure*, *when_busy*, *capture*, *timeouts* or
            *permissions*, or did not all come.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        series: Sequence[Series] | None = None,
        *,
        journal: str | os.PathLike[str] | None = None,
        on_failure: OnFailure = "raise",
        when_busy: WhenBusy = "wait",
        capture: CaptureMode = "sync",
        on_commit: Hook | Iterable[Hook] = (),
        timeouts: Timeouts | None = None,
        writers: WriterOptions | None = None,
        permissions: Permissions | None = None,
    ) -> None:
        self._timeouts = timeouts if isinstance(timeouts, Timeouts) else Timeouts()
        self._ranks = Ranks(self._timeouts)
        self._calls = Calls(self._ranks)
        try:
            instance("timeouts", timeouts, Timeouts | None)
            instance("writers", writers, WriterOptions | None)
            instance("permissions", permissions, Permissions | None)
            instance("run_dir", run_dir, str | os.PathLike)
            instance("journal", journal, str | os.PathLike | None)
            hooks = [on_commit] if callable(on_commit) else list(instance("on_commit", on_commit, Iterable))
            if not all(callable(hook) for hook in hooks):
                raise InvalidArgument(f"on_commit is {on_commit!r}; it must be a function, or several")
            self._series = by_name(series)
            self._calls = Calls(self._ranks, list(self._series))
            self._on_failure: OnFailure = one_of("on_failure", on_failure, ("raise", "warn", "terminate"))
            self._when_busy: WhenBusy = one_of("when_busy", when_busy, ("wait", "skip", "raise"))
            self._overlap = one_of("capture", capture, ("sync", "overlap")) == "overlap"
            self._rundir = RunDirectory(run_dir, journal, permissions=permissions)
            self._rundir.check_journal_path()
        except CheckpointError as error:
            try:
                self._calls.meet("CheckpointManager", (0,), error)
            finally:
                self._ranks.close()
            raise
        self._pid = os.getpid()
        self._closed = False
        self._busy = threading.Lock()
        self._number = 0
        self._journal: Journal | None = None
        self._epoch = 0
        self._leader: Leader | None = None
        self._finalizer: Finalizer | None = None
        self._in_flight: dict[str, Job] = {}
        self._captures = {
            name: Capture(one, number, self._ranks) for number, (name, one) in enumerate(self._series.items())
        }
        self._ticks = Ticks(self._timeouts)
        self._hook: Any = None
        try:
            self._set_up(hooks, writers or WriterOptions())
            if self._overlap:
                self._hook = register_optimizer_step_pre_hook(self._before_step)
        except BaseException:
            self._tear_down(0.0)
            raise
        atexit.register(self._at_exit)

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._rundir.path

    @property
    def writer_pid(self) -> int | None:
        """The process id of this rank's writer process, None if it is not running."""
        return self._finalizer.writer_pid if self._finalizer is not None else None

    # -- saving ---------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        series: str = "checkpoint",
        *,
        metrics: Mapping[str, float] | None = None,
        overwrite: bool = False,
        when_busy: WhenBusy | None = None,
    ) -> PendingSave | None:
        """
        Capture *state* and save it in the background. All ranks must call.

        When this returns the state may change: it has been copied to host memory (with ``capture="overlap"``
        its tensors may change inside of ``updating()`` only). Nothing is durable yet; the checkpoint commits
        as soon as the last rank has written and synced its part.

        Args:
            step: The optimiser step, 0 or more.
            state: Names to objects with ``state_dict`` (model, optimizer, …), tensors, `PerRank`, or plain
                values. For an export: a model, the modules of a composed model by name prefix, or named tensors.
            series: Which series.
            metrics: Numbers for `KeepBest`; rank 0's count.
            overwrite: Replace this step if it is committed; the old one stays until the new one is committed.
            when_busy: Overrides the manager's.

        Returns:
            The pending save, or None if it was skipped because the series has one in flight.

        Raises:
            SaveFailed: An earlier save failed (with ``on_failure="raise"``); this one was not begun.
            StepAlreadySaved: The step is committed and *overwrite* is False.
            SaveInFlight: The series has a save in flight and ``when_busy`` is "raise".
            InvalidArgument: The state cannot be saved, on the same call on every rank.
            RanksDisagree: The ranks did not make the same call.
            WaitTimeout: A capture still reads after ``Timeouts.write_s``, or a save before is still in flight.
        """
        # Failures are heard between calls: a handler of the SIGTERM that `on_failure` asks for may close this manager.
        with self._calling():
            failed = self._ticks.tick()
        self._hear(failed)
        with self._calling():
            failed = self._wait_for_turn(series, when_busy)
        self._hear(failed)
        with self._calling():
            return self._save(step, state, series, metrics, overwrite=overwrite, when_busy=when_busy)[0]

    def save_together(
        self,
        step: int,
        states: Mapping[str, Mapping[str, Any]],
        *,
        metrics: Mapping[str, float] | None = None,
        overwrite: bool = False,
        when_busy: WhenBusy | None = None,
    ) -> dict[str, PendingSave | None]:
        """
        Capture several series at once and save each in the background. All ranks must call.

        As one ``save`` per series, checkpoints first, but an export does not copy again what the checkpoint has
        captured already with the same dtype: its files are written from there, and it takes no memory for it.
        Each of them commits or fails by itself, but for a state that changes while it is read. What raises keeps
        the series behind it from being saved, and those before it are on their way.

        Args:
            step: As for ``save``.
            states: By series what ``save`` would be given; in the same order on every rank.
            metrics: As for ``save``, for every series.
            overwrite: As for ``save``.
            when_busy: As for ``save``. A checkpoint is in flight as long as an export that was saved with it.

        Returns:
            What ``save`` would, by series.

        Raises:
            CheckpointError: As for ``save``.
        """
        with self._calling():
            failed = self._ticks.tick()
        self._hear(failed)
        # What is no mapping is a series that there is not, so that every rank hears of it.
        given: list[tuple[Any, Any]] = list(states.items()) if isinstance(states, Mapping) and states else [(None, {})]
        given.sort(key=lambda one: self._is_export(one[0]))
        for series, _ in given:
            with self._calling():
                failed = self._wait_for_turn(series, when_busy)
            self._hear(failed)
        saved: dict[str, PendingSave | None] = {}
        with self._calling():
            loan: Loan | None = None
            for series, state in given:
                mine = loan if self._is_export(series) else None
                saved[series], lent = self._save(
                    step, state, series, metrics, overwrite=overwrite, when_busy=when_busy, loan=mine,
                    lends=loan is None and not self._is_export(series),
                )  # fmt: skip
                loan = loan or lent
        return saved

    def _save(
        self,
        step: int,
        state: Mapping[str, Any],
        series: str,
        metrics: Mapping[str, float] | None,
        *,
        overwrite: bool,
        when_busy: WhenBusy | None,
        loan: Loan | None = None,
        lends: bool = False,
    ) -> tuple[PendingSave | None, Loan | None]:
        """`save` after what was to be heard and waited for; with what the series *lends* to others of this call."""
        error: Exception | None = None
        taken: Any = None
        previous: Job | None = None
        busy: WhenBusy = "wait"
        numbers: dict[str, float] = {}
        try:
            capture = self._capture_of(series)
            step = step_of(step)
            busy = one_of("when_busy", when_busy or self._when_busy, ("wait", "skip", "raise"))
            numbers = metrics_of(metrics) if self._ranks.rank == 0 else {}
            previous = next(reversed(self._all_with(series)), None)
        except InvalidArgument as problem:
            error = problem
        if error is None:
            taken, error = capture.take(state)
        changed = taken is None or not capture.is_planned(taken)
        word = self._rank_0_word(series, step, previous, busy, overwrite=overwrite) if error is None else _GO
        call = self._calls.arguments(series, step, overwrite)
        anew, broken, word = self._calls.meet("save", call, error, extra=(changed, self._ranks.broken, word))
        self._obey(word, series, step, previous)
        if word == _SKIP:
            return None, None
        if previous is not None:
            self._settle(previous)
        if broken:
            self._rebuild()
        if loan is None:
            self._finish_reading()
        if anew:
            capture.plan(taken)
        self._number += 1
        job = capture.job(
            taken, number=self._number, step=step, metrics=numbers, overwrite=overwrite, overlap=self._overlap,
            loan=loan,
        )  # fmt: skip
        self._in_flight[series] = job
        assert self._finalizer is not None
        self._finalizer.submit(job)
        return PendingSave(job, self._patience_s), capture.loan(taken, job) if lends else None

    def poll(self) -> list[PendingSave]:
        """
        Hear of failed saves. All ranks must call, once per step say; costs no message.

        Returns:
            The saves that are in flight.

        Raises:
            SaveFailed: A save failed; raised on every rank at the same call (with ``on_failure="raise"``).
        """
        with self._calling():
            failed = self._ticks.tick()
        self._hear(failed)
        return [PendingSave(job, self._patience_s) for job in self._in_flight.values() if not job.settled.is_set()]

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """
        Put around in-place updates of the state, such as ``optimizer.step()``.

        With ``capture="overlap"`` it waits until the captures under way have read the state. Otherwise a
        capture is complete when ``save`` returns, and there is nothing to wait for.

        Raises:
            WaitTimeout: A capture still reads after ``Timeouts.write_s``.
        """
        if not self._closed and os.getpid() == self._pid:
            self._finish_reading()
        yield

    def warm_up(self, state: Mapping[str, Any], series: str = "checkpoint") -> None:
        """
        Do before training what the first save would have to: plan, allocate and touch memory. All ranks must call.

        Args:
            state: As it will be given to ``save``.
            series: Which series.

        Raises:
            InvalidArgument: The state cannot be saved.
            SetupFailed: A rank has no memory for its part.
        """
        with self._calling():
            self._warm_up(state, series)

    def _warm_up(self, state: Mapping[str, Any], series: str) -> None:
        error: Exception | None = None
        taken: Any = None
        try:
            capture = self._capture_of(series)
        except InvalidArgument as problem:
            error = problem
        else:
            for previous in self._all_with(series):
                self._settle(previous)
            taken, error = capture.take(state)
        self._calls.meet("warm_up", self._calls.arguments(series), error)
        self._finish_reading()
        capture.plan(taken)
        try:
            capture.warm_up(taken)
            assert self._finalizer is not None
            if (cause := self._finalizer.start_writer([capture.arena])) is not None:
                error = CheckpointError(cause)
        except MemoryError as problem:
            error = problem
        self._ranks.all_or_none(error, "warming up")

    # -- resuming -------------------------------------------------------------------------------

    def resume(
        self,
        state: MutableMapping[str, Any] | Mapping[str, Any],
        step: int | None = None,
        series: str = "checkpoint",
        *,
        allow_older: bool = False,
        verify_digests: bool | Literal["meanwhile"] = True,
    ) -> Resumed | None:
        """
        Load the newest committed checkpoint into *state*, in place. All ranks must call.

        Rank 0 decides from the journal alone and tells the others; directories without a committed row
        are never loaded. Before anything is loaded, every byte of the checkpoint is compared with what was
        committed: each file is read once, by one of the ranks. Tensors are read by several threads, straight
        into those of *state*, and resharded to how it is sharded now.

        Then the memory of the next save is made in the background, as much as this checkpoint took, unless
        that is more than half of what this host has to spare.

        Args:
            state: As given to ``save``, or less. Plain values are put back into it if it is mutable.
            step: A certain step instead of the newest.
            series: Which series.
            allow_older: Fall back to the next older safe checkpoint, with a warning, if the newest is not.
            verify_digests: ``"meanwhile"`` compares while it loads, which takes less time; if a byte differs, *state*
                holds it by then, and is good for nothing before another checkpoint is loaded into it. False
                compares names and sizes only, and hands damaged bytes to the training.

        Returns:
            What was loaded, or None if the series has no committed checkpoint and *step* is None.

        Raises:
            InvalidArgument: *series* or *step* makes no sense, or the series holds exports.
            RanksDisagree: The ranks did not make the same call.
            UnsafeResume: The newest (or *step*) is damaged or does not fit this number of ranks; ``report`` says why.
                *state* is untouched, except with ``verify_digests="meanwhile"``.
            StateMismatch: *state* asks for something the checkpoint does not have.
            JournalCorrupt: The journal is not what was written.
            CorruptCheckpoint: A file cannot be read.
        """
        with self._calling():
            return self._resume(state, step, series, allow_older=allow_older, verify_digests=verify_digests)

    def _resume(
        self,
        state: Mapping[str, Any],
        step: int | None,
        series: str,
        *,
        allow_older: bool,
        verify_digests: bool | Literal["meanwhile"],
    ) -> Resumed | None:
        error: Exception | None = None
        strict: list[str] = []
        try:
            self._capture_of(series)
            if self._series[series].format.kind is not Format.DCP:
                raise InvalidArgument(f"series {series!r} holds exports; load them with from_pretrained")
            step = None if step is None else step_of(step)
            if type(verify_digests) is not bool and verify_digests != "meanwhile":
                raise InvalidArgument(f"verify_digests is {verify_digests!r}, not True, False or 'meanwhile'")
            _, per_rank = split(state)
            strict = [name for name, value in per_rank.items() if value.when_resized == "refuse"]
        except InvalidArgument as problem:
            error = problem
        self._calls.meet("resume", self._calls.arguments(series, step, allow_older, verify_digests), error)
        for previous in self._all_with(series):
            # What it commits is the newest, and what it retires must not be deleted while it is read.
            self._settle(previous)
        self._finish_reading()
        restore = Restore(
            self._ranks,
            self._rundir,
            # A quarter: ranks that read wait for each other as in any other call, and must not pass for missing.
            meet_every_s=self._timeouts.collective_s / 4,
            journal=self._journal,
            leader=self._leader,
        )
        restored = restore.run(
            state, series, step, strict=strict, allow_older=allow_older, verify_digests=verify_digests
        )
        if restored is None:
            return None
        if isinstance(state, MutableMapping):
            state.update(restored.plain)
        self._warm_up_later(self._captures[series], restored)
        return restored.resumed

    def _warm_up_later(self, capture: Capture, restored: Restored) -> None:
        """
        Have memory ready for the next save: as much as the checkpoint took that was loaded.

        Nobody has asked for it, so it calls no object of the user's and no other rank, leaves memory to others,
        and is no error where it cannot be done.
        """
        ranks = self._ranks
        try:
            size = dcp.arena_bytes(
                restored.files, ranks.rank, world_size=ranks.world_size, same_world=restored.same_world
            )
            if size <= available_bytes() // (2 * ranks.on_this_host):
                capture.arena.warm_up_later(size)
            else:
                log.info("the first save makes its memory: %d bytes are more than half of what there is", size)
        except Exception:
            log.exception("the first save makes its memory: it could not be made in advance")

    # -- closing --------------------------------------------------------------------------------

    def close(self, timeout: float | None = None) -> None:
        """
        Finish what is in flight, then leave nothing behind: no process, thread, memory or lock. All ranks must call.

        Args:
            timeout: In seconds; by default ``Timeouts.close_s``. What is still in flight then has failed.

        Raises:
            SaveFailed: A save failed that nobody was told of yet (with ``on_failure="raise"``).
            WaitTimeout: A save in flight could not even be ended in time; everything else is closed.
        """
        if self._closed:
            return
        with self._calling():
            self._tear_down(self._timeouts.close_s if timeout is None else timeout)
        self._hear(self._ticks.rest())
        if left := [job for job in self._in_flight.values() if not job.settled.is_set()]:
            raise WaitTimeout(
                f"{left[0].series} step {left[0].step} was still in flight; it will be FAILED at the next start",
                hint="run `ckptmgr log RUN` to see how far it came",
                what="the save in flight",
                timeout_s=self._timeouts.close_s if timeout is None else timeout,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif not self._closed and os.getpid() == self._pid:
            self._tear_down(self._timeouts.close_on_error_s)
            for job in self._ticks.rest():
                log.error("%s", job.failure)

    # -- inside ---------------------------------------------------------------------------------

    def _set_up(self, hooks: Sequence[Hook], options: WriterOptions) -> None:
        about = [(one.name, one.format.kind) for one in self._series.values()]
        agreed = (about, self._on_failure, self._when_busy, self._overlap, self._timeouts, self._rundir.permissions)
        self._calls.meet("CheckpointManager", (fingerprint(*agreed),), None)
        error: Exception | None = None
        if self._ranks.rank == 0:
            try:
                self._take_over(hooks)
            except Exception as problem:  # noqa: BLE001 - told to every rank in the next line
                error = problem
        self._ranks.all_or_none(error, "opening the run")
        run_id = self._journal.run_id if self._journal is not None else ""
        run_id, *places = self._ranks.broadcast((run_id, str(self._rundir.path), str(self._rundir.journal_path)))
        if self._ranks.rank:
            # Rank 0's places, by the names that have no link in them on this host.
            self._rundir = RunDirectory(*places, permissions=self._rundir.permissions)
        self._finalizer = Finalizer(
            self._ranks,
            self._ticks,
            self._timeouts,
            options,
            run_id=run_id,
            root=self._rundir.path,
            file_mode=self._rundir.permissions.file_mode,
            journal_path=self._rundir.journal_path,
            leader=self._leader,
        )
        cause = self._finalizer.start_writer()
        self._ranks.all_or_none(CheckpointError(cause) if cause is not None else None, "starting the writer process")

    def _take_over(self, hooks: Sequence[Hook]) -> None:
        """Rank 0 only: lock, journal, epoch, recovery, projections."""
        self._rundir.acquire("CheckpointManager", timeout_s=0.0)
        self._rundir.require_journal()
        self._journal = Journal.open(self._rundir.journal_path, file_mode=self._rundir.permissions.file_mode)
        self._rundir.pair(self._journal.run_id, managed=bool(self._journal.series()))
        for name, one in self._series.items():
            if (known := self._journal.format_of(name)) not in (None, one.format.kind):
                raise InvalidArgument(f"series {name!r} holds {known} checkpoints, not {one.format.kind}")
        for word in words_at_start(self._rundir):
            log.warning("storage: %s; `ckptmgr doctor %s` tries what can be tried", word, self._rundir.path)
        versions = _versions()
        self._epoch = self._journal.begin_epoch(
            host=self._ranks.host, pid=self._pid, command=Path(sys.argv[0] or "python").name, versions=versions
        )
        report = recovery.recover(self._journal, self._rundir, epoch=self._epoch, host=self._ranks.host, pid=self._pid)
        for action in (*report.changes, *report.reports):
            log.warning("recovery: %s", action.text)
        self._leader = Leader(
            self._journal, self._rundir, self._epoch,
            host=self._ranks.host, series=list(self._series), versions=versions, hooks=hooks,
            standing=None if report.changes else report.standing,
        )  # fmt: skip
        self._leader.project()

    def _tear_down(self, timeout_s: float) -> None:
        """The one place where everything is taken down; every step whatever became of the one before."""
        self._closed = True
        atexit.unregister(self._at_exit)
        with contextlib.ExitStack() as last:
            # In reverse: what is named last happens first, and an error in it keeps none of the others from happening.
            last.callback(self._rundir.release)
            last.callback(self._close_journal)
            for capture in self._captures.values():
                last.callback(capture.close)
            last.callback(self._stop, timeout_s)
            if self._hook is not None:
                last.callback(self._hook.remove)

    def _stop(self, timeout_s: float) -> None:
        idle = True
        deadline = time.monotonic() + timeout_s
        for capture in self._captures.values():
            capture.stop_reading(max(0.0, deadline - time.monotonic()))
        if self._finalizer is not None:
            idle = self._finalizer.close(max(0.0, deadline - time.monotonic()))
            if not idle:
                log.error("a save in flight did not end within %g s; it will be FAILED at the next start", timeout_s)
        elif self._leader is not None:
            self._leader.close(timeout_s)
        if idle:
            self._ranks.close()

    def _close_journal(self) -> None:
        if self._journal is None:
            return
        with contextlib.suppress(CheckpointError):
            if self._epoch:
                self._journal.end_epoch(self._epoch)
        self._journal.close()

    def _at_exit(self) -> None:
        if os.getpid() == self._pid and not self._closed:
            log.warning("a CheckpointManager was not closed; closing it now")
            self._tear_down(self._timeouts.close_on_error_s)

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        """One call at a time: two would capture into the same memory, and ranks could not follow their order."""
        if self._closed:
            raise ManagerClosed
        if os.getpid() != self._pid:
            raise ManagerClosed("this manager belongs to the process that this one was forked from")
        if threading.current_thread().name == AFTER_COMMIT:
            raise InvalidArgument(
                "an on_commit hook cannot call its manager",
                hint="tell the training loop, and let it call; the other ranks have to call too",
            )
        if not self._busy.acquire(blocking=False):
            raise InvalidArgument(
                "another call of this manager is under way, in another thread or below this one",
                hint="call save, poll, resume and close from one thread, one after the other",
            )
        try:
            yield
        finally:
            self._busy.release()

    def _capture_of(self, series: str) -> Capture:
        if not isinstance(series, str) or series not in self._captures:
            raise InvalidArgument(f"there is no series {series!r}; there are {', '.join(self._series)}")
        return self._captures[series]

    @property
    def _patience_s(self) -> float:
        """Longer than a save can take by its own timeouts: queueing, writing, reading back, and the messages."""
        return len(self._series) * (
            4 * self._timeouts.write_s + 6 * self._timeouts.gather_s + self._timeouts.collective_s
        )

    def _wait_for_turn(self, series: str, when_busy: WhenBusy | None) -> list[Job]:
        """Wait for what *series* has in flight, where that is wanted; it is returned if its failure is news."""
        if (when_busy or self._when_busy) != "wait":
            return []
        users = self._all_with(series)
        for job in users:
            self._settle(job)
        return [job for job in users if job.failure is not None and not job.failure_seen]

    def _all_with(self, series: Any) -> list[Job]:
        """The saves that use the memory of *series*, in the order in which they end."""
        in_flight = self._in_flight.values() if series is not None else ()
        users = [job for job in in_flight if series in (job.series, job.borrows_from)]
        return sorted(users, key=lambda job: job.number)

    def _is_export(self, series: Any) -> bool:
        return series in self._series and self._series[series].format.kind is Format.HUGGINGFACE

    def _settle(self, job: Job) -> None:
        """Wait until *job* is over."""
        if not job.settled.wait(self._patience_s):
            raise WaitTimeout(
                f"{job.series} step {job.step} is still in flight after {self._patience_s:g} s",
                what="the save in flight",
                timeout_s=self._patience_s,
            )

    def _finish_reading(self) -> None:
        """Wait until no capture reads the state any more."""
        for name, capture in self._captures.items():
            if capture.reading is not None:
                if not capture.reading.finish(self._timeouts.write_s):
                    raise WaitTimeout(
                        f"a capture of {name} still reads after {self._timeouts.write_s:g} s",
                        what="the capture under way",
                        timeout_s=self._timeouts.write_s,
                    )
                capture.reading = None

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if os.getpid() == self._pid:
            for capture in self._captures.values():
                if (reading := capture.reading) is not None:
                    reading.before_step(optimizer)

    def _hear(self, failed: Sequence[Job]) -> None:
        failures = []
        for job in failed:
            job.failure_seen = True
            assert job.failure is not None
            failures.append(job.failure)
        if not failures:
            return
        if self._on_failure == "raise":
            raise _as_one(failures)
        if self._on_failure == "terminate":
            log.critical("%s; terminating this process, as on_failure says", failures[0])
            signal.raise_signal(signal.SIGTERM)
        warnings.warn(str(failures[0]), RuntimeWarning, stacklevel=3)

    def _rank_0_word(self, series: str, step: int, previous: Job | None, busy: WhenBusy, *, overwrite: bool) -> int:
        """What rank 0 says to this save; the other ranks have no word, which is the lowest."""
        if self._leader is None:
            return _GO
        if previous is not None and not previous.settled.is_set():
            return _SKIP if busy == "skip" else _BUSY
        return _SAVED if not overwrite and self._leader.is_saved(series, step) else _GO

    def _obey(self, word: int, series: str, step: int, previous: Job | None) -> None:
        if word == _BUSY:
            other = previous.step if previous is not None else -1
            raise SaveInFlight(f"{series} has step {other} in flight", series=series, step=step, in_flight_step=other)
        if word == _SAVED:
            path = self._rundir.absolute(f"{series}/{self._series[series].format.kind.directory_name(step)}")
            raise StepAlreadySaved(f"{series} step {step} is saved at {path}", series=series, step=step, path=str(path))

    def _rebuild(self) -> None:
        """Replace broken background groups, once no rank's finalizer uses them any more."""
        for job in self._in_flight.values():
            self._settle(job)
        self._ranks.agree([0])
        self._ranks.rebuild()


def _as_one(failures: Sequence[SaveFailed]) -> SaveFailed:
    """The first of *failures* with a note of each other one; a new one, so that its traceback is the caller's alone."""
    first = copy.copy(failures[0])
    for other in failures[1:]:
        first.add_note(f"and: {other}")
    return first


def _versions() -> dict[str, str]:
    return {
        "ckptmgr": metadata.version("ckptmgr"),
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }
