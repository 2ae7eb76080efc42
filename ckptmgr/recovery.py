"""
What a crash left, and how to bring journal and disk into agreement again.

`plan` decides purely: the rows of the journal and the names found in the run directory in, actions
out. `recover` carries the actions out, under the run lock and before any save; `preview` shows
them.

The rules that hold for every plan:

- GATHERED is the point of no return: before it a row is rolled back however whole its directory
  looks, from it on a row with an intact copy is rolled forward.
- The directory that holds a live committed checkpoint is never removed and never replaced by
  anything but the checkpoint that was saved to overwrite it.
- Nothing is removed but names that a row of ours has given out, and no directory is removed that
  says it holds a live checkpoint or an attempt the journal does not know. What stands in the way is
  set aside, what is unknown is reported.
- The file system comes first, the row that says it is done last; so a crash at any point leaves a
  row that makes the next recovery do the rest.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, assert_never

from ckptmgr.errors import InvalidArgument, printable
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, Format, Lifecycle
from ckptmgr.manifest import MANIFEST_NAME, Manifest

if TYPE_CHECKING:
    from ckptmgr.journal import Journal, Questions
    from ckptmgr.rundir import RunDirectory

S = CheckpointState


class FoundKind(enum.StrEnum):
    """What a name inside a series directory claims to be."""

    FINAL = "final"
    STAGING = "staging"
    RETIRED = "retired"
    QUARANTINED = "quarantined"
    #: The ``hf-latest`` link that ckptmgr itself swaps.
    LINK = "link"
    OTHER = "other"


@dataclasses.dataclass(frozen=True)
class Found:
    """One name inside a series directory, as the run directory saw it. Links are not followed."""

    #: Relative to the run directory, say ``checkpoint/.step-5.e1.a2.incomplete``.
    path: str
    series: str
    kind: FoundKind
    #: Parsed from the name; None where the name does not say.
    step: int | None = None
    epoch: int | None = None
    attempt: int | None = None
    #: False for files and for links, also for links to directories.
    is_directory: bool = True
    #: The attempt in its readable manifest of this run; None if there is none, or of another run.
    holds: int | None = None
    #: None: not verified. Empty: every file of the manifest is there as listed.
    mismatches: tuple[str, ...] | None = None
    manifest_digest: str | None = None
    #: The manifest that says what it holds.
    manifest: Manifest | None = None
    #: Where it was verified: names in it that its manifest does not list.
    extra: tuple[str, ...] = ()
    #: Its manifest is there, but nobody can tell any more what it says.
    rotten: bool = False
    #: The disk refuses to say right now what its manifest says.
    unreadable: bool = False
    #: Nobody has looked what its manifest says: it stands at the name of a live checkpoint, and nothing beside it
    #: says that it was moved.
    unread: bool = False

    @property
    def is_our_link(self) -> bool:
        """Whether this is the ``latest`` link that ckptmgr itself keeps."""
        return self.kind is FoundKind.LINK


# --- actions ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FinishRetirement:
    """A retirement was started and not finished: remove what is left of it, then say so in the journal."""

    name: ClassVar[str] = "finish_retirement"
    changes: ClassVar[bool] = True
    record: CheckpointRecord
    remove: tuple[str, ...]
    #: Where it should stand, and its manifest no longer says so.
    set_aside: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return f"finish retiring {_label(self.record)}: {_removing(self.remove)}{_setting_aside(self.set_aside)}"


@dataclasses.dataclass(frozen=True)
class Restore:
    """A live checkpoint was moved aside by an overwrite that did not commit: give it its name back."""

    name: ClassVar[str] = "restore"
    changes: ClassVar[bool] = True
    record: CheckpointRecord
    path: str
    #: What stands at its name and is set aside first.
    set_aside: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return f"restore {_label(self.record)} from {self.path}{_setting_aside(self.set_aside)}"


@dataclasses.dataclass(frozen=True)
class RollBack:
    """No proof that every rank finished: the attempt is FAILED and what it wrote is removed."""

    name: ClassVar[str] = "roll_back"
    changes: ClassVar[bool] = True
    record: CheckpointRecord
    remove: tuple[str, ...]
    reason: str

    @property
    def text(self) -> str:
        return f"roll back {_label(self.record)}, {self.reason}: {_removing(self.remove)}"


@dataclasses.dataclass(frozen=True)
class RollForward:
    """Everything was durable: publish it unless it stands under its final name already, then commit."""

    name: ClassVar[str] = "roll_forward"
    changes: ClassVar[bool] = True
    record: CheckpointRecord
    published: bool
    #: The attempt whose directory stands at the final name and makes way for this one.
    replaces: int | None = None
    #: What is in the way and is set aside first.
    set_aside: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        how = "commit it" if self.published else "publish and commit it"
        over = f" in place of attempt {self.replaces}" if self.replaces is not None else ""
        return f"roll forward {_label(self.record)}: {how}{over}{_setting_aside(self.set_aside)}"


@dataclasses.dataclass(frozen=True)
class GiveUp:
    """GATHERED, but no intact copy is left: a bug or a media fault. FAILED; the bytes are kept for inspection."""

    name: ClassVar[str] = "give_up"
    changes: ClassVar[bool] = True
    record: CheckpointRecord
    quarantine: tuple[str, ...]
    reason: str

    @property
    def text(self) -> str:
        return f"give up {_label(self.record)}, {self.reason}{_setting_aside(self.quarantine)}"


@dataclasses.dataclass(frozen=True)
class RemoveLeftover:
    """A finished attempt left a directory of its own behind: remove it."""

    name: ClassVar[str] = "remove_leftover"
    changes: ClassVar[bool] = True
    record: CheckpointRecord
    path: str

    @property
    def text(self) -> str:
        return f"remove {self.path}, left by {_label(self.record)}"


@dataclasses.dataclass(frozen=True)
class ReportMissing:
    """A live checkpoint does not stand at its name. Nothing is done about it."""

    name: ClassVar[str] = "report_missing"
    changes: ClassVar[bool] = False
    record: CheckpointRecord
    why: str

    @property
    def text(self) -> str:
        return f"{_label(self.record)} is COMMITTED but not on disk: {self.why}"


@dataclasses.dataclass(frozen=True)
class ReportStranger:
    """Something the journal does not account for. Nothing is done about it."""

    name: ClassVar[str] = "report_stranger"
    changes: ClassVar[bool] = False
    path: str
    why: str

    @property
    def text(self) -> str:
        return printable(f"{self.path} is left alone: {self.why}")


Action: TypeAlias = (
    FinishRetirement | Restore | RollBack | RollForward | GiveUp | RemoveLeftover | ReportMissing | ReportStranger
)


def _label(record: CheckpointRecord) -> str:
    return f"{record.series} step {record.step} (attempt {record.id})"


def _removing(paths: Iterable[str]) -> str:
    listed = ", ".join(paths)
    return f"remove {listed}" if listed else "nothing to remove"


def _setting_aside(paths: Iterable[str]) -> str:
    listed = ", ".join(paths)
    return f"; set aside {listed}" if listed else ""


def as_dict(action: Action) -> dict[str, Any]:
    """One action as JSON-able facts."""
    body: dict[str, Any] = {"action": action.name, "changes": action.changes, "text": action.text}
    for field in dataclasses.fields(action):
        value = getattr(action, field.name)
        if isinstance(value, CheckpointRecord):
            body |= {"checkpoint_id": value.id, "series": value.series, "step": value.step}
        else:
            body[field.name] = list(value) if isinstance(value, tuple) else value
    return body


# --- the decision ----------------------------------------------------------------------------


def plan(records: Sequence[CheckpointRecord], found: Sequence[Found]) -> tuple[Action, ...]:
    """
    Decide what to do about what a crash left. Pure, deterministic, and independent of input order.

    Carrying out the whole plan leaves nothing to do but reports; so does carrying out a part of it,
    crashing, and carrying out the plan that is made then.

    Args:
        records: The rows of the journal: all, or at least those that are not gone and those with `traces`.
        found: All names in the directories of their series. Both places where a GATHERED row may
            stand (its final and its staging directory) must have been verified with digests.

    Raises:
        InvalidArgument: The rows contradict each other (an id twice, two live rows for one
            directory, two in flight in a series), a path is listed twice, or a copy of a GATHERED
            row was not verified.
    """
    return _Planner(records, found).actions()


def traces(
    records: Iterable[CheckpointRecord], found: Iterable[Found]
) -> tuple[frozenset[int], frozenset[str], frozenset[tuple[str, int]]]:
    """
    What tells which attempts besides *records* have left something in what was *found*.

    A row that is missing among them, say FAILED or retired and deleted, matters to `plan` only if it has one of these.

    Returns:
        The numbers in manifests, the staging directories of names, and the series and steps of final names.
    """
    known = {record.id for record in records}
    directories = {record.directory for record in records if record.is_live}
    numbers, names, steps = set(), set(), set()
    for item in found:
        if item.holds is not None:
            numbers.add(item.holds)
        if item.kind in (FoundKind.STAGING, FoundKind.RETIRED):
            names.add(item.path.removesuffix(".retired").removesuffix(".incomplete") + ".incomplete")
        elif item.kind is FoundKind.FINAL and item.step is not None and item.path not in directories:
            steps.add((item.series, item.step))
    return frozenset(numbers - known), frozenset(names), frozenset(steps)


class _Planner:
    """Journal and disk side by side, and what the actions chosen so far have already dealt with."""

    def __init__(self, records: Sequence[CheckpointRecord], found: Sequence[Found]) -> None:
        _check_rows(records)
        self._rows = sorted(records, key=lambda record: record.id)
        self._by_id = {record.id: record for record in self._rows}
        self._live_at = {record.directory: record.id for record in self._rows if record.is_live}
        self._at = {item.path: item for item in found}
        if len(self._at) != len(found):
            raise InvalidArgument("a path is listed twice")
        #: GATHERED rows that will be committed, and whether each stands at its final name already.
        self._forward: dict[int, bool] = {}
        for record in self._rows:
            if record.state is S.GATHERED:
                published = self._intact(record, record.directory)
                if self._intact(record, record.staging_directory) or published:
                    self._forward[record.id] = published
        #: Live rows that such a commit retires.
        self._superseded = {old.id for id in self._forward if (old := self._overwritten(self._by_id[id]))}
        #: Where publishing an overwriting attempt may have moved a row's directory, besides its own names.
        self._moved_to: dict[int, list[str]] = {}
        for record in self._rows:
            if record.overwrites is not None:
                self._moved_to.setdefault(record.overwrites, []).append(record.staging_directory)
        self._accounted: set[str] = set()
        self._restored: set[int] = set()

    def actions(self) -> tuple[Action, ...]:
        """The whole plan, in the order in which it must be carried out."""
        actions: list[Action] = []
        reports: list[Action] = []
        for record in self._rows:
            if record.state is S.COMMITTED and not record.is_live and record.retired_at is None:
                if self._must_wait(record):
                    continue
                places = self._take(self._retiring_places(record))
                actions.append(FinishRetirement(record, places, self._take(self._rotten_places(record))))
        # Before any attempt in flight is decided: what it moved aside must be safe first.
        for record in self._rows:
            if record.is_live and record.id not in self._superseded:
                for action in self._look_after(record):
                    (actions if action.changes else reports).append(action)
        for record in self._rows:
            if record.state in (S.PREWRITTEN, S.WRITING):
                actions.append(self._roll_back(record))
            elif record.id in self._forward:
                actions += self._roll_forward(record)
            elif record.state is S.GATHERED:
                actions.append(self._give_up(record))
        # Last, when every row is where this plan takes it.
        for record in self._rows:
            actions += self._leftovers(record)
        return (*actions, *reports, *self._strangers())

    # What stands where

    def _free(self, path: str) -> Found | None:
        """What was found at *path*, unless an action of this plan deals with it already."""
        return None if path in self._accounted else self._at.get(path)

    def _holds(self, record: CheckpointRecord, path: str) -> bool:
        """Whether a directory at *path* says it is this attempt; or need not be asked, for it was never moved."""
        item = self._at.get(path)
        if item is not None and item.unread:
            return record.is_live and path == record.directory
        return item is not None and item.is_directory and item.holds == record.id

    def _intact(self, record: CheckpointRecord, path: str) -> bool:
        """Whether *path* holds this attempt exactly as it was when its manifest went into the journal."""
        if not self._holds(record, path):
            return False
        item = self._at[path]
        if item.mismatches is None:
            raise InvalidArgument(f"{path} holds attempt {record.id}, which is GATHERED, and was not verified")
        same = item.manifest_digest is not None and item.manifest_digest == record.manifest_digest
        return same and not item.mismatches

    def _overwritten(self, record: CheckpointRecord) -> CheckpointRecord | None:
        """The live row that *record* was saved to replace."""
        old = self._by_id.get(record.overwrites) if record.overwrites is not None else None
        return old if old is not None and old.is_live else None

    def _is_dead(self, id: int, *, after: bool) -> bool:
        """Whether the journal knows this attempt and says it is gone: now, or *after* this plan is carried out."""
        row = self._by_id.get(id)
        if row is None:
            return False
        if row.is_live:
            return after and id in self._superseded
        if row.is_in_flight:
            return after and id not in self._forward
        return True

    def _removable(self, path: str, owner: CheckpointRecord, *, after: bool = False) -> bool:
        """Whether what stands at a name that *owner* gave out is a directory that nobody needs."""
        item = self._free(path)
        if item is None or not item.is_directory:
            return False
        # Not while the disk cannot say what it is: a manager that came too late may have moved a live one there.
        if item.unreadable:
            return False
        return item.holds is None or self._is_dead(item.holds, after=after or item.holds == owner.id)

    def _take(self, paths: Iterable[str]) -> tuple[str, ...]:
        taken = tuple(dict.fromkeys(paths))
        self._accounted.update(taken)
        return taken

    # One kind of row each

    def _retiring_places(self, record: CheckpointRecord) -> list[str]:
        places = [p for p in (record.retired_directory, record.staging_directory) if self._removable(p, record)]
        # The final name last: it is renamed to the retired name, which must be free by then. If that
        # name is taken by something we may not remove, the directory stays and is reported.
        blocked = record.retired_directory in self._at and record.retired_directory not in places
        places += [path for path in self._moved_to.get(record.id, ()) if self._holds(record, path)]
        if self._holds(record, record.directory) and self._unclaimed(record) and not blocked:
            places.append(record.directory)
        return places

    def _rotten_places(self, record: CheckpointRecord) -> list[str]:
        item = self._free(record.directory)
        return [record.directory] if item is not None and item.rotten and self._unclaimed(record) else []

    def _must_wait(self, record: CheckpointRecord) -> bool:
        """Whether the disk refuses to say what stands at a name of a retiring row that nobody else will take."""
        names = [record.retired_directory]
        if self._unclaimed(record) and not any(self._by_id[id].directory == record.directory for id in self._forward):
            names.append(record.directory)
        return any(name in self._at and self._at[name].unreadable for name in names)

    def _unclaimed(self, record: CheckpointRecord) -> bool:
        """Whether no other row is live under its final name."""
        return self._live_at.get(record.directory, record.id) == record.id

    def _look_after(self, record: CheckpointRecord) -> list[Action]:
        """A live row that stays live."""
        if self._holds(record, record.directory):
            self._take([record.directory])
            return []
        there = self._at.get(record.directory)
        own = (record.retired_directory, *self._moved_to.get(record.id, ()), record.staging_directory)
        for path in (*own, *self._under_names_of_others(record)):
            if self._holds(record, path):
                self._take([path])
                self._restored.add(record.id)
                return [Restore(record, path, self._take([record.directory] if there is not None else []))]
        holder = self._by_id.get(there.holds) if there is not None and there.holds is not None else None
        if holder is None or holder.state is not S.GATHERED:
            # The name is this row's, so what stands there is part of this report. Only an attempt that
            # published over it and is given up takes its directory away itself.
            self._take([record.directory])
        return [ReportMissing(record, f"{record.directory} {_what(there)}")]

    def _under_names_of_others(self, record: CheckpointRecord) -> list[str]:
        """Where a manager that came too late may have moved it: see `RunDirectory._move_aside`."""
        retired = (item for item in self._at.values() if item.kind is FoundKind.RETIRED)
        return sorted(item.path for item in retired if item.series == record.series)

    def _roll_back(self, record: CheckpointRecord) -> Action:
        places = (record.staging_directory, record.retired_directory)
        remove = self._take([path for path in places if self._removable(path, record)])
        return RollBack(
            record, remove, f"interrupted while {record.state}, so not every rank is known to have finished"
        )

    def _roll_forward(self, record: CheckpointRecord) -> list[Action]:
        published = self._forward[record.id]
        old = self._overwritten(record)
        replaces = None
        in_the_way = []
        if not published and self._free(record.directory) is not None:
            if old is not None and self._holds(old, record.directory):
                replaces = old.id
                # Publishing renames the old directory to its retired name, never over anything.
                in_the_way += [old.retired_directory] if self._free(old.retired_directory) else []
            else:
                in_the_way.append(record.directory)
        set_aside = self._take(in_the_way)
        self._take([record.directory] if published else [record.directory, record.staging_directory])
        actions: list[Action] = [RollForward(record, published, replaces, set_aside)]
        if old is not None:
            places = [p for p in self._retiring_places(old) if self._free(p) is not None]
            places += [old.retired_directory] if replaces is not None else []
            actions.append(FinishRetirement(old, self._take(places)))
        return actions

    def _give_up(self, record: CheckpointRecord) -> Action:
        places = []
        if self._free(record.directory) is not None and self._holds(record, record.directory):
            places.append(record.directory)
        for path in (record.staging_directory, record.retired_directory):
            item = self._free(path)
            if item is not None and item.is_directory:
                places.append(path)
        why = (f"{path} {self._complaint(record, path)}" for path in (record.directory, record.staging_directory))
        return GiveUp(record, self._take(places), "no intact copy is left: " + "; ".join(why))

    def _complaint(self, record: CheckpointRecord, path: str) -> str:
        """Why *path* is not an intact copy of *record*."""
        item = self._at.get(path)
        if item is None or not self._holds(record, path):
            return _what(item)
        if item.mismatches:
            more = f" and {len(item.mismatches) - 1} more" if len(item.mismatches) > 1 else ""
            return f"is damaged ({item.mismatches[0]}{more})"
        return f"has another {MANIFEST_NAME} than the journal recorded"

    def _leftovers(self, record: CheckpointRecord) -> list[Action]:
        """What a row that is finished, or will be when the rest is carried out, has left under its own names."""
        if self._is_dead(record.id, after=True):
            places = [record.staging_directory, record.retired_directory]
        elif record.id in self._restored or self._holds(record, record.directory):
            # It is published, so its staging name can hold no more than what it replaced.
            places = [record.staging_directory]
        else:
            places = []
        left = self._take([path for path in places if self._removable(path, record, after=True)])
        return [RemoveLeftover(record, path) for path in left]

    def _strangers(self) -> list[Action]:
        return [
            ReportStranger(path, self._why_strange(item))
            for path, item in sorted(self._at.items())
            if path not in self._accounted and not item.is_our_link
        ]

    def _why_strange(self, item: Found) -> str:
        if item.kind is FoundKind.QUARANTINED:
            return "it was set aside for inspection; remove it when you have looked at it"
        if not item.is_directory:
            return f"it {_what(item)}"
        if item.unreadable:
            return f"its {MANIFEST_NAME} cannot be read; see to the disk and start again"
        if item.holds is None:
            return "no row of the journal accounts for it"
        row = self._by_id.get(item.holds)
        if row is None:
            return f"it holds attempt {item.holds}, which the journal does not know"
        state = "retired" if row.state is S.COMMITTED and not row.is_live else row.state
        return f"it holds {_label(row)}, which is {state}"


def _check_rows(records: Sequence[CheckpointRecord]) -> None:
    """Refuse rows that the journal's own constraints exclude; no plan for them could be trusted."""
    live = {(record.series, record.step): record for record in records if record.is_live}
    in_flight = [record for record in records if record.is_in_flight]
    if len({record.id for record in records}) != len(records):
        raise InvalidArgument("an attempt is listed twice")
    if len(live) != sum(record.is_live for record in records):
        raise InvalidArgument("two live checkpoints claim one step of a series")
    if len({record.series for record in in_flight}) != len(in_flight):
        raise InvalidArgument("a series has two attempts in flight")
    for record in in_flight:
        rival = live.get((record.series, record.step))
        if rival is not None and rival.id != record.overwrites:
            raise InvalidArgument(
                f"attempt {record.id} was not saved to overwrite attempt {rival.id}, which is committed"
            )


def _what(item: Found | None) -> str:
    """What stands at a name, as the end of a sentence that starts with the name."""
    if item is None:
        return "does not exist"
    if not item.is_directory:
        return "is a link or a file, not a directory"
    if item.unreadable:
        return f"cannot be read: the disk refuses its {MANIFEST_NAME}"
    if item.holds is None:
        return f"has no readable {MANIFEST_NAME} of this run"
    return f"holds attempt {item.holds}"


# --- carrying it out -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RecoveryReport:
    """What recovery did, or would do."""

    actions: tuple[Action, ...]
    #: False for a preview.
    applied: bool
    #: Directories set aside for inspection: the name each had → the name it has now.
    set_aside: Mapping[str, str] = dataclasses.field(default_factory=dict)
    #: Every attempt that was not gone; where there are no changes they are as they are now.
    standing: tuple[CheckpointRecord, ...] = dataclasses.field(default=(), repr=False, compare=False)

    @property
    def changes(self) -> tuple[Action, ...]:
        """The actions that change disk or journal; empty when there is nothing to recover."""
        return tuple(action for action in self.actions if action.changes)

    @property
    def reports(self) -> tuple[Action, ...]:
        """The actions that only tell something."""
        return tuple(action for action in self.actions if not action.changes)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able facts."""
        return {
            "applied": self.applied,
            "actions": [as_dict(action) for action in self.actions],
            "set_aside": dict(self.set_aside),
        }


def preview(journal: Questions, rundir: RunDirectory) -> RecoveryReport:
    """
    Say what `recover` would do, and do nothing. A read-only journal is enough, and no lock.

    While a manager has the run open its attempts in flight look like those of a crash; ask it, or
    the run lock, first.

    Raises:
        InvalidArgument: The rows contradict each other; see `plan`.
    """
    records = journal.standing()
    return RecoveryReport(_look(journal, rundir, records), applied=False, standing=tuple(records))


def recover(journal: Journal, rundir: RunDirectory, *, epoch: int, host: str, pid: int) -> RecoveryReport:
    """
    Bring journal and disk into agreement after a crash. Everything it did is durable on return.

    Rank 0 only, under the run lock, with *epoch* taken for this start, before any save. Idempotent:
    it may be interrupted anywhere and run again.

    Raises:
        JournalCorrupt: The journal is not what was written; nothing was done.
        StaleWriter: A newer epoch has taken over; what was done until then is correct.
        OSError: The disk refused; what was done until then is correct, and running it again goes on.
        InvalidArgument: The rows contradict each other; see `plan`.
    """
    hands = _Hands(journal, rundir, epoch=epoch, host=host, pid=pid)
    records = journal.standing()
    actions = _look(journal, rundir, records)
    for action in actions:
        hands.carry_out(action)
    return RecoveryReport(actions, applied=True, set_aside=hands.set_aside, standing=tuple(records))


def project(run_id: str, live: Sequence[CheckpointRecord], rundir: RunDirectory, *, series: Iterable[str]) -> None:
    """
    Bring ``meta.json`` and the ``latest`` links up to the journal, whose projections they are. Durable on return.

    Rank 0 only, under the run lock.

    Args:
        run_id: The run's.
        live: All live checkpoints, as the journal has them.
        rundir: What is brought up to it.
        series: All series: those of the journal, and any that get a list in ``meta.json`` while they are empty.
    """
    rundir.write_meta(run_id, live, series)
    for name in dict.fromkeys(record.series for record in live if record.format is Format.HUGGINGFACE):
        exports = [record for record in live if record.series == name]
        rundir.point_latest(name, max(exports, key=lambda record: record.commit_seq or 0))


def _look(journal: Questions, rundir: RunDirectory, records: Sequence[CheckpointRecord]) -> tuple[Action, ...]:
    gathered = [record for record in records if record.state is S.GATHERED]
    # A size is no proof: after a power cut a file may have its full size and hold only zeros.
    deep_for = [path for record in gathered for path in (record.directory, record.staging_directory)]
    # Thousands of manifests would be read, of checkpoints that nothing has happened to: whose step has no other row
    # that could have moved them. The run directory looks for names that say so.
    busy = {(record.series, record.step) for record in records if not record.is_live}
    quiet = {r.directory for r in records if r.is_live and (r.series, r.step) not in busy}
    found = rundir.listing(journal.series(), deep_for=deep_for, unread=quiet)
    for item in found:
        # A disk that cannot be read right now says nothing about what is on it: do not give up a copy for that.
        if item.path in deep_for and (errors := [m for m in item.mismatches or () if m.startswith("unreadable:")]):
            raise OSError(errno.EIO, errors[0], item.path)
    return plan(with_traces(journal, records, found), found)


def with_traces(
    journal: Questions, records: Iterable[CheckpointRecord], found: Iterable[Found]
) -> list[CheckpointRecord]:
    """
    Add to *records* those that have left a trace in what was *found*; in order of their numbers.

    A run has a long history, of which nothing else is read.
    """
    records = list(records)
    by_id = {record.id: record for record in journal.traced(*traces(records, found))}
    by_id |= {record.id: record for record in records}
    return [by_id[id] for id in sorted(by_id)]


class _Hands:
    """Carries out one action at a time: disk first and synced, then the row."""

    def __init__(self, journal: Journal, rundir: RunDirectory, *, epoch: int, host: str, pid: int) -> None:
        self._journal = journal
        self._rundir = rundir
        self._epoch = epoch
        self._host = host
        self._pid = pid
        self.set_aside: dict[str, str] = {}

    def carry_out(self, action: Action) -> None:
        """Do one action; durable on return."""
        match action:
            case FinishRetirement():
                self._finish_retirement(action)
            case Restore():
                self._set_aside(action.set_aside, action.record)
                # Crash here: a live checkpoint stands aside and its name is free; recovery restores it.
                self._rundir.restore(action.record, action.path)
            case RollBack():
                self._roll_back(action)
            case RollForward():
                self._roll_forward(action)
            case GiveUp():
                lifecycle = self._adopt(action.record)
                self._set_aside(action.quarantine, action.record)
                # Crash here: GATHERED without any copy; recovery gives it up.
                lifecycle.fail(reason=action.reason)
            case RemoveLeftover():
                self._rundir.remove(action.path)
            case ReportMissing() | ReportStranger():
                pass
            case _:
                assert_never(action)

    def _finish_retirement(self, action: FinishRetirement) -> None:
        self._set_aside(action.set_aside, action.record)
        for path in action.remove:
            if path == action.record.directory:
                self._rundir.retire(action.record)
            else:
                self._rundir.remove(path)
        # Crash here: retiring, and nothing of it on disk; recovery only says so in the journal.
        self._journal.finish_retirement(action.record.id, epoch=self._epoch)

    def _roll_back(self, action: RollBack) -> None:
        lifecycle = self._adopt(action.record)
        # The directory goes before the row: a FAILED row must not have its directory come back
        # after a power cut, and on a full disk removing makes the room that the row needs.
        for path in action.remove:
            self._rundir.remove(path)
        # Crash here: in flight without a directory; recovery rolls it back.
        lifecycle.fail(reason=action.reason)

    def _roll_forward(self, action: RollForward) -> None:
        lifecycle = self._adopt(action.record)
        for path in action.set_aside:
            self._set_aside([path], action.record)
        replaces = self._journal.checkpoint(action.replaces) if action.replaces is not None else None
        # Also when it stands at its final name: the rename may not have been synced before the crash.
        self._rundir.publish(action.record, replaces)
        # Crash here: GATHERED and published; recovery commits it.
        lifecycle.commit()

    def _set_aside(self, paths: Iterable[str], record: CheckpointRecord) -> None:
        for path in paths:
            self.set_aside[path] = self._rundir.quarantine(path, record)

    def _adopt(self, record: CheckpointRecord) -> Lifecycle:
        """Take an attempt of an older epoch over, so that this epoch's compare-and-swap holds for it."""
        self._journal.adopt(record.id, epoch=self._epoch)
        # Crash here: as before, but of this epoch; the next start adopts it again.

        def advance(source: CheckpointState, dest: CheckpointState, facts: Mapping[str, Any]) -> None:
            self._journal.advance(
                record.id, source, dest, epoch=self._epoch, host=self._host, pid=self._pid, note="recovery", **facts
            )

        return Lifecycle(record.state, advance)
