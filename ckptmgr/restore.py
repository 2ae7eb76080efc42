"""
What `resume` does once the ranks have met: rank 0 chooses, all compare and load, or choose again.

What a checkpoint is worth is decided in `resume`, from the journal's rows and what was found on disk; here those are
fetched, newest first and no more of them than the answer takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ckptmgr import recovery, verify
from ckptmgr import resume as resumption
from ckptmgr.answers import Resumed
from ckptmgr.commit import Leader
from ckptmgr.errors import CheckpointError, UnsafeResume
from ckptmgr.journal import Journal
from ckptmgr.manifest import FileEntry
from ckptmgr.ranks import Ranks
from ckptmgr.rundir import RunDirectory
from ckptmgr.writers import loading

log = logging.getLogger("ckptmgr")

#: Mismatches of one verification that the journal keeps.
_NOTED = 100


@dataclasses.dataclass(frozen=True)
class Choice:
    """What rank 0 has chosen: the answer if all goes well, its directory below the run's, and its files."""

    resumed: Resumed
    directory: str
    files: tuple[FileEntry, ...]


@dataclasses.dataclass(frozen=True)
class Restored:
    """What was loaded: the answer, the plain values of the state, and what the files of it were."""

    resumed: Resumed
    plain: Mapping[str, Any]
    files: Mapping[str, int]
    same_world: bool


class Restore:
    """
    One call of ``resume``.

    Args:
        ranks: This rank among the others.
        rundir: The run directory.
        meet_every_s: In seconds; ranks that read wait for each other so often.
        journal: Of rank 0; None on the others.
        leader: Of rank 0; None on the others.
    """

    def __init__(
        self,
        ranks: Ranks,
        rundir: RunDirectory,
        *,
        meet_every_s: float,
        journal: Journal | None,
        leader: Leader | None,
    ) -> None:
        self._ranks = ranks
        self._rundir = rundir
        self._meet_every_s = meet_every_s
        self._journal = journal
        self._leader = leader

    def run(
        self,
        state: Mapping[str, Any],
        series: str,
        step: int | None,
        *,
        strict: Sequence[str],
        allow_older: bool,
        verify_digests: bool | Literal["meanwhile"],
    ) -> Restored | None:
        """
        Choose, compare and load into *state*, all but its plain values. All ranks must call.

        Args:
            state: What to load into.
            series: Which series.
            step: A certain step instead of the newest.
            strict: The per-rank values of *state* that only as many ranks can load as have saved them.
            allow_older: Whether an older one may be loaded if the newest is not safe.
            verify_digests: As for `CheckpointManager.resume`.

        Returns:
            What was loaded, or None if there is nothing and *step* is None.

        Raises:
            CheckpointError: As `CheckpointManager.resume`.
        """
        with contextlib.nullcontext() if self._leader is None else self._leader.resuming():
            restored = self._run(state, series, step, strict, allow_older=allow_older, verify_digests=verify_digests)
            if restored is not None and self._leader is not None:
                self._leader.resumed(series, restored.resumed.checkpoint_id)
        return restored

    def _run(
        self,
        state: Mapping[str, Any],
        series: str,
        step: int | None,
        strict: Sequence[str],
        *,
        allow_older: bool,
        verify_digests: bool | Literal["meanwhile"],
    ) -> Restored | None:
        verified: dict[int, tuple[str, ...]] = {}
        while True:
            decided: Choice | None = None
            error: Exception | None = None
            if self._ranks.rank == 0:
                try:
                    decided = self._choose(
                        series, step, strict, verified, allow_older=allow_older, unread=verify_digests is False
                    )
                except Exception as problem:  # noqa: BLE001 - told to every rank in the next line
                    error = problem
            self._ranks.all_or_none(error, f"choosing what to resume from {series}")
            choice: Choice | None = self._ranks.broadcast(decided)
            if choice is None:
                return None
            load = _Load(self._rundir.absolute(choice.directory), choice, state, self._ranks)
            if not (wrong := self._load_what_is_intact(choice, load, verify_digests)):
                break
            # One that turns out to be damaged is judged again with what is known now.
            verified[choice.resumed.checkpoint_id] = wrong
        resumed = choice.resumed
        if self._ranks.rank == 0 and resumed.passed_over:
            why = "; ".join(f"{finding.id} {finding.text}" for finding in resumed.passed_over)
            log.warning("resuming from the older %s step %d: %s", series, resumed.step, why)
        load.finish()
        self._ranks.all_or_none(load.error, f"loading {resumed.path}")
        return Restored(resumed, load.plain, load.files, load.same_world)

    def _choose(
        self,
        series: str,
        step: int | None,
        strict: Sequence[str],
        verified: Mapping[int, tuple[str, ...]],
        *,
        allow_older: bool,
        unread: bool,
    ) -> Choice | None:
        """
        Rank 0 only: which checkpoint to load, from the journal.

        *verified* has what differs in those whose bytes were compared, by attempt; of the others the sizes are,
        newest first, as far as it takes to find a safe one. Where the bytes stay *unread*, what their last
        verification has found counts.
        """
        assert self._journal is not None
        assert self._leader is not None
        report, files = self._judged(
            series, step, 1, self._leader.directories(series), strict=strict, verified=verified, unread=unread
        )
        if not report.newest_is_safe or report.chosen != self._leader.newest(series, step):
            # Any answer but the one that is expected: only from a journal of which everything was compared again.
            self._journal.require_intact()
            known = self._journal.live_directories(series)
            for count in resumption.looks(len(known)):
                report, files = self._judged(
                    series, step, count, known, strict=strict, verified=verified, unread=unread
                )
                if report.chosen is not None:
                    break
        record = report.chosen
        if report.verdict is resumption.Verdict.NONE and step is None:
            return None
        if record is None or not (report.newest_is_safe or allow_older):
            errors = report.passed_over or report.findings
            text = "; ".join(f"{finding.id} {finding.text}" for finding in errors[:3])
            # Asked without, the command would answer about another series, or that it is safe.
            asked = f"--series {series} --world-size {self._ranks.world_size}"
            hint = f"run `ckptmgr check RUN {asked}`; pass allow_older=True to fall back to the next safe checkpoint"
            raise UnsafeResume(f"not resuming from {series}: {text}", hint=hint, report=report)
        path = self._rundir.absolute(record.directory)
        metrics = dict(record.metrics)
        resumed = Resumed(series, record.step, path, record.world_size, metrics, record.id, report.passed_over)
        return Choice(resumed, record.directory, tuple(files[record.id]))

    def _judged(
        self,
        series: str,
        step: int | None,
        newest: int,
        known: frozenset[str],
        *,
        strict: Sequence[str],
        verified: Mapping[int, tuple[str, ...]],
        unread: bool,
    ) -> tuple[resumption.ResumeReport, Mapping[int, Sequence[FileEntry]]]:
        """Rank 0 only: what the *newest* few are worth, and their files; *known* are the directories of all live."""
        assert self._journal is not None
        asked = resumption.asked_of(self._journal, series, step, newest)
        looked = {r.directory: r for r in asked if r.is_live and step in (None, r.step)}
        at = {r.directory: verified[r.id] for r in looked.values() if r.id in verified}
        besides = known - looked.keys()
        found = self._rundir.listing([series], sizes_for=looked.keys(), besides=besides)
        files = {r.id: self._journal.files(r.id) for r in looked.values()}
        report = resumption.check(
            recovery.with_traces(self._journal, asked, found),
            [dataclasses.replace(one, mismatches=at.get(one.path, one.mismatches)) for one in found],
            series=series, step=step, world_size=self._ranks.world_size, per_rank_used=strict, live_epoch=True,
            files=files, besides=besides,
        )  # fmt: skip
        if unread:
            report = resumption.recall(report, self._journal.newest_verifications(r.id for r in looked.values()))
        return report, files

    def _load_what_is_intact(
        self, choice: Choice, load: _Load, verify_digests: bool | Literal["meanwhile"]
    ) -> tuple[str, ...]:
        """Load, unless something differs; that is returned. All ranks must call."""
        if verify_digests == "meanwhile":
            return self._verify(choice, meanwhile=load)
        wrong = self._verify(choice) if verify_digests else ()
        if not wrong:
            load()
        return wrong

    def _verify(self, choice: Choice, meanwhile: Callable[[], None] | None = None) -> tuple[str, ...]:
        """What differs in a checkpoint from what was committed, every byte of it. All ranks must call."""
        as_saved = choice.resumed.world_size == self._ranks.world_size
        wrong = verify.together(
            self._ranks,
            self._rundir,
            choice.directory,
            choice.files,
            as_saved=as_saved,
            meet_every_s=self._meet_every_s,
            meanwhile=meanwhile,
        )
        if self._ranks.rank == 0:
            self._note_verification(choice.resumed.checkpoint_id, wrong)
        return wrong

    def _note_verification(self, checkpoint_id: int, mismatches: Sequence[str]) -> None:
        assert self._journal is not None
        try:
            self._journal.record_verification(
                checkpoint_id, level="digest", ok=not mismatches, mismatches=mismatches[:_NOTED]
            )
        except CheckpointError as problem:
            # A full disk must not keep a run from resuming.
            log.warning("the journal does not say that attempt %d was verified: %s", checkpoint_id, problem)


class _Load:
    """Loads the tensors of what was chosen, once it is called, and the rest by `finish`; or what went wrong."""

    def __init__(self, directory: Path, choice: Choice, state: Mapping[str, Any], ranks: Ranks) -> None:
        self.files = {entry.path: entry.size for entry in choice.files}
        self.same_world = choice.resumed.world_size == ranks.world_size
        self.plain: dict[str, Any] = {}
        self.error: Exception | None = None
        self._directory, self._state, self._rank = directory, state, ranks.rank
        self._hand_over: Callable[[], dict[str, Any]] | None = None

    def __call__(self) -> None:
        try:
            self._hand_over = loading.begin(
                self._directory, self._state, self._rank, files=self.files, same_world=self.same_world
            )
        except Exception as problem:  # noqa: BLE001 - told to every rank by who called
            self.error = problem

    def finish(self) -> None:
        """Once nothing speaks against it: give the objects in the state what was read."""
        try:
            if self._hand_over is not None:
                self.plain = self._hand_over()
        except Exception as problem:  # noqa: BLE001 - told to every rank by who called
            self.error = problem
