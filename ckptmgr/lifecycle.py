"""
The life of a checkpoint: five states, one transition table, and what is known about each one.

This file owns the words. It touches no disk, no clock and no database: `Lifecycle` is given a
``record`` function that makes a transition durable (in production the journal's compare-and-swap)
and changes its own state only after that function has returned.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any

from ckptmgr.errors import IllegalTransition


class CheckpointState(enum.StrEnum):
    """Where a checkpoint is in its life. At most one of a series is in flight; the journal enforces it."""

    #: The row exists; metadata may stand in the staging directory; no writer has started.
    #: After a crash: FAILED, staging directory removed.
    PREWRITTEN = "PREWRITTEN"
    #: Ranks may have bytes in the staging directory.
    #: After a crash: FAILED, staging directory removed.
    WRITING = "WRITING"
    #: Every byte, directory entry and the manifest are durable; only rename and commit are left.
    #: The point of no return. After a crash: verified, then rolled forward.
    GATHERED = "GATHERED"
    #: Published under its final name, safe to resume from. Final.
    COMMITTED = "COMMITTED"
    #: Will never be resumed from; the row says why, per rank. Final.
    FAILED = "FAILED"


S = CheckpointState
IN_FLIGHT = (S.PREWRITTEN, S.WRITING, S.GATHERED)

#: The whole state machine. The diagram in docs/reference/states.md is drawn from it.
TRANSITIONS: tuple[dict[str, Any], ...] = (
    {"trigger": "start_writing", "source": S.PREWRITTEN, "dest": S.WRITING},
    {"trigger": "gather", "source": S.WRITING, "dest": S.GATHERED},
    {"trigger": "commit", "source": S.GATHERED, "dest": S.COMMITTED},
    {"trigger": "fail", "source": list(IN_FLIGHT), "dest": S.FAILED},
)


class Format(enum.StrEnum):
    """How the files of a checkpoint are laid out."""

    DCP = "dcp"
    HUGGINGFACE = "hf"

    def directory_name(self, step: int) -> str:
        """The final directory of *step* inside its series: ``step-N``, for Hugging Face ``hf-N``."""
        return f"hf-{step}" if self is Format.HUGGINGFACE else f"step-{step}"


class _Cell:
    """What the machine drives: an object that holds a state and nothing else."""

    state: CheckpointState


class Lifecycle:
    """
    One checkpoint's walk through the states.

    The journal leads and memory follows: each trigger first calls ``record(source, dest, facts)``;
    if that raises, the state stays where it was.

    Args:
        state: The state to start from.
        record: Makes a transition durable, or raises.
    """

    def __init__(
        self,
        state: CheckpointState,
        record: Callable[[CheckpointState, CheckpointState, Mapping[str, Any]], None],
    ) -> None:
        from transitions import Machine

        self._record = record
        self._cell = _Cell()
        self._machine = Machine(
            model=self._cell,
            states=CheckpointState,
            transitions=[dict(row) for row in TRANSITIONS],
            initial=state,
            auto_transitions=False,
            send_event=True,
            before_state_change=self._journal,
        )

    @property
    def state(self) -> CheckpointState:
        """Where the checkpoint is now, as far as this process has made durable."""
        return self._cell.state

    def start_writing(self, **facts: Any) -> None:
        """PREWRITTEN → WRITING: writers may start once this has returned."""
        self._trigger("start_writing", facts)

    def gather(self, **facts: Any) -> None:
        """WRITING → GATHERED: every rank's bytes and the manifest are durable."""
        self._trigger("gather", facts)

    def commit(self, **facts: Any) -> None:
        """GATHERED → COMMITTED: published under its final name."""
        self._trigger("commit", facts)

    def fail(self, **facts: Any) -> None:
        """Any state in flight → FAILED."""
        self._trigger("fail", facts)

    def _trigger(self, name: str, facts: Mapping[str, Any]) -> None:
        from transitions import MachineError

        try:
            self._machine.dispatch(name, facts=facts)
        except MachineError as error:
            raise IllegalTransition(
                f"a checkpoint that is {self.state} cannot {name.replace('_', ' ')}",
                source=str(self.state),
                trigger=name,
            ) from error

    def _journal(self, event: Any) -> None:
        source = CheckpointState[event.transition.source]
        dest = CheckpointState[event.transition.dest]
        self._record(source, dest, event.kwargs["facts"])


@dataclasses.dataclass(frozen=True)
class CheckpointRecord:
    """
    What the journal knows of one attempt to save one step. Times are Unix seconds, sizes bytes.

    ``id`` is the attempt number: unique in the journal and part of the staging name. Rows are
    numbered in the order in which saves began; ``commit_seq`` in the order in which they committed,
    which is the order retention and resume use.
    """

    id: int
    series: str
    step: int
    format: Format
    state: CheckpointState
    epoch: int
    world_size: int
    directory: str
    staging_directory: str
    created_at: float
    bytes: int = 0
    manifest_digest: str | None = None
    committed_at: float | None = None
    commit_seq: int | None = None
    finished_at: float | None = None
    stage_s: float | None = None
    write_s: float | None = None
    gather_s: float | None = None
    commit_s: float | None = None
    reason: str | None = None
    failures: tuple[dict[str, Any], ...] = ()
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    per_rank: tuple[str, ...] = ()
    overwrites: int | None = None
    retire_started_at: float | None = None
    retire_reason: str | None = None
    retired_at: float | None = None
    pinned: bool = False

    @property
    def is_live(self) -> bool:
        """Committed and not being retired: may be listed, kept and resumed from."""
        return self.state is CheckpointState.COMMITTED and self.retire_started_at is None

    @property
    def is_in_flight(self) -> bool:
        """PREWRITTEN, WRITING or GATHERED."""
        return self.state in IN_FLIGHT

    @property
    def retired_directory(self) -> str:
        """Where the directory stands while it is being deleted, relative to the run directory."""
        return self.staging_directory.removesuffix(".incomplete") + ".retired"


@dataclasses.dataclass(frozen=True)
class TransitionRecord:
    """One line of the append-only history."""

    id: int
    checkpoint_id: int
    series: str
    step: int
    source: CheckpointState | None
    dest: CheckpointState
    at: float
    epoch: int
    host: str
    pid: int
    note: str


@dataclasses.dataclass(frozen=True)
class EpochRecord:
    """One start of a manager, or of a command that changes the run. ``epoch`` is the fencing token."""

    epoch: int
    started_at: float
    host: str
    pid: int
    command: str
    versions: Mapping[str, str]
    ended_at: float | None = None


@dataclasses.dataclass(frozen=True)
class RetirementMark:
    """That one committed checkpoint may go, and why no keep rule protects it."""

    checkpoint_id: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Verified:
    """
    How the files of one checkpoint compared with the journal, and what differs if they are not as committed.

    *after* is the last verification that was known before they were read, 0 if none was; None: nothing can have come
    in between.
    """

    checkpoint_id: int
    ok: bool
    mismatches: tuple[str, ...] = ()
    after: int | None = None
