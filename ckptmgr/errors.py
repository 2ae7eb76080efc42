"""
Every error ckptmgr raises, in one tree.

Each leaf states its facts as attributes and carries a ``hint`` that names the next command or
call. The facts are keyword arguments, so an error survives pickling between ranks unchanged.

    CheckpointError                     .hint
    ├── InvalidArgument                 (ValueError)
    ├── IllegalTransition               .source .trigger
    ├── JournalError
    │   ├── JournalNotFound             .path                    (FileNotFoundError)
    │   ├── JournalCorrupt              .path .reason
    │   ├── JournalSchemaMismatch       .path .found .expected
    │   ├── ForeignJournal              .path .found .expected   (journal and directory of two runs)
    │   └── StaleWriter                 .checkpoint_id .epoch .found
    ├── RunLocked                       .path .holder            (TimeoutError)
    ├── LockUnsupported                 .path .reason            (OSError)
    ├── SetupFailed                     .failures
    ├── SaveFailed                      .series .step .failures
    ├── SaveInFlight                    .series .step .in_flight_step
    ├── StepAlreadySaved                .series .step .path      (FileExistsError)
    ├── RanksDisagree                   .what .values
    ├── WaitTimeout                     .what .timeout_s         (TimeoutError)
    ├── ManagerClosed
    ├── CheckpointNotFound              .series .step            (FileNotFoundError)
    ├── CorruptCheckpoint               .directory .mismatches
    ├── StateMismatch                   .missing
    ├── StateChanged                    .what
    ├── UnsafeResume                    .report
    ├── UnsafePath                      .path .reason            (ValueError)
    └── MissingLibrary                  .library .extra          (ImportError)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptmgr.resume import ResumeReport


class CheckpointError(Exception):
    """Something about checkpoints went wrong."""

    hint: str = ""

    def __init__(self, message: str | None = None, *, hint: str | None = None, **facts: Any) -> None:
        self.message = printable(message or (type(self).__doc__ or "").strip().splitlines()[0])
        self.facts = facts
        if hint is not None:
            self.hint = hint
        for name, value in facts.items():
            setattr(self, name, value)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.hint, self.facts)


def printable(text: str) -> str:
    """*text* with every character spelled out that could steer a terminal; names and reasons may come from anybody."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def _rebuild(kind: type[CheckpointError], message: str, hint: str, facts: dict[str, Any]) -> CheckpointError:
    return kind(message, hint=hint, **facts)


@dataclasses.dataclass(frozen=True)
class RankFailure:
    """Why one rank could not do its part. A silent rank gave no answer within the timeout."""

    rank: int
    host: str
    cause: str
    silent: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host or 'unknown host'}: {self.cause}"


def disk_is_full(causes: Iterable[str]) -> bool:
    """Whether any of the *causes* of a failed save is that there is no room for it."""
    return any("No space left" in cause or "Disk quota" in cause for cause in causes)


class InvalidArgument(CheckpointError, ValueError):
    """An argument cannot be used."""


class IllegalTransition(CheckpointError):
    """The state machine has no such transition."""

    source: str
    trigger: str


class JournalError(CheckpointError):
    """The journal cannot be used."""


class JournalNotFound(JournalError, FileNotFoundError):
    """There is no journal here."""

    hint = "give a run directory that a CheckpointManager has opened, or its .journal.db file"
    path: str


class JournalCorrupt(JournalError):
    """The journal is damaged."""

    hint = "run `ckptmgr recover RUN --rebuild --apply` to reconstruct it from the manifests on disk"
    path: str
    reason: str


class JournalSchemaMismatch(JournalError):
    """The journal has another schema than this version of ckptmgr reads."""

    path: str
    found: str | None
    expected: str


class ForeignJournal(JournalError):
    """The journal and the run directory belong to two different runs."""

    hint = "name the run directory's own journal: journal= in code, --journal PATH on the command line"
    path: str
    found: str
    expected: str


class StaleWriter(JournalError):
    """The row was moved by someone else, or belongs to another epoch; nothing was changed."""

    hint = "another manager has taken over this run; stop this one"
    checkpoint_id: int
    epoch: int
    found: str


class RunLocked(CheckpointError, TimeoutError):
    """Another process manages this run."""

    hint = "stop that process first; the lock is free as soon as it ends"
    path: str
    holder: str


class LockUnsupported(CheckpointError, OSError):
    """The file system cannot lock files, or not make the lock's, so two managers could not be kept apart."""

    hint = "put the journal on a file system with working flock, with journal="
    path: str
    reason: str


class SetupFailed(CheckpointError):
    """The manager could not be set up on every rank."""

    failures: tuple[RankFailure, ...]


class SaveFailed(CheckpointError):
    """A save failed; the checkpoint is FAILED and will never be resumed from. The next save works."""

    series: str
    step: int
    failures: tuple[RankFailure, ...]


class SaveInFlight(CheckpointError):
    """The series has a save in flight."""

    hint = "wait for the pending save, or use when_busy='wait' or 'skip'"
    series: str
    step: int
    in_flight_step: int


class StepAlreadySaved(CheckpointError, FileExistsError):
    """This step of the series is committed already."""

    hint = "pass overwrite=True to replace it; the old one stays until the new one is committed"
    series: str
    step: int
    path: str


class RanksDisagree(CheckpointError):
    """The ranks did not make the same call."""

    hint = "all ranks must call save, poll, resume and close in the same order with the same arguments"
    what: str
    values: tuple[Any, ...]


class WaitTimeout(CheckpointError, TimeoutError):
    """A wait ended before what it waited for."""

    what: str
    timeout_s: float


class ManagerClosed(CheckpointError):
    """The manager is closed."""

    hint = "open a new CheckpointManager"


class CheckpointNotFound(CheckpointError, FileNotFoundError):
    """There is no such committed checkpoint."""

    hint = "run `ckptmgr ls RUN` to see what there is"
    series: str
    step: int | None


class CorruptCheckpoint(CheckpointError):
    """The files of a checkpoint are not what was committed."""

    hint = "run `ckptmgr check RUN --deep` to see which checkpoints are intact"
    directory: str
    mismatches: tuple[str, ...]


class StateMismatch(CheckpointError):
    """The checkpoint does not have what the state asks for, or has it in another shape."""

    hint = "resume with the same model and optimizer, or leave out what the checkpoint does not have"
    missing: tuple[str, ...]


class StateChanged(CheckpointError):
    """The state was changed while a capture read it, so what was read may be of two steps; it is not kept."""

    hint = "put updating() around all that changes the state in place, or leave capture at 'sync'"
    what: str


class UnsafeResume(CheckpointError):
    """Resuming from the newest checkpoint is not safe."""

    hint = "run `ckptmgr check RUN`; pass allow_older=True to fall back to the next safe checkpoint"
    report: ResumeReport


class UnsafePath(CheckpointError, ValueError):
    """A path leaves the run directory or passes through a link, or something stands there that is not ours."""

    path: str
    reason: str


class MissingLibrary(CheckpointError, ImportError):
    """A library that only some commands need is not installed."""

    library: str
    extra: str
