"""
A small model of journal and disk, in which a plan can be carried out one step at a time.

Each step keeps to what the real run directory and journal do, and asserts what they would refuse:
renaming over something, removing what is no directory of ours. Every entry has an identity, so that
a test can follow one directory through all renames.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, Format
from ckptmgr.recovery import (
    Action,
    FinishRetirement,
    Found,
    FoundKind,
    GiveUp,
    RemoveLeftover,
    Restore,
    RollBack,
    RollForward,
    plan,
)

S = CheckpointState
DIGEST = "xxh3_128:" + "0" * 32
OTHER_DIGEST = "xxh3_128:" + "f" * 32


def record(
    id: int, step: int, state: CheckpointState, *, series: str = "checkpoint", epoch: int = 1, **facts
) -> CheckpointRecord:
    committed = state is S.COMMITTED
    known = {
        "format": Format.DCP,
        "world_size": 2,
        "directory": f"{series}/step-{step}",
        "staging_directory": f"{series}/.step-{step}.e{epoch}.a{id}.incomplete",
        "created_at": 1000.0 + id,
        "manifest_digest": DIGEST,
        "committed_at": 2000.0 + id if committed else None,
        "commit_seq": id if committed else None,
        "reason": "a rank died" if state is S.FAILED else None,
    }
    return CheckpointRecord(id=id, series=series, step=step, state=state, epoch=epoch, **{**known, **facts})


@dataclasses.dataclass(frozen=True)
class Entry:
    """What stands at one name. ``identity`` tells it from every other entry, whatever its name."""

    identity: str
    kind: str = "directory"  # "file" and "link" otherwise
    holds: int | None = None
    intact: bool = True
    same_manifest: bool = True
    #: Where it holds nothing: whether its manifest is no longer one, or the disk refuses to read it.
    rotten: bool = False
    unreadable: bool = False


def kind_of(path: str) -> FoundKind:
    name = path.rpartition("/")[2]
    if name.startswith("step-"):
        return FoundKind.FINAL
    for suffix, kind in (("incomplete", "staging"), ("retired", "retired"), ("quarantined", "quarantined")):
        if f".{suffix}" in name:
            return FoundKind(kind)
    return FoundKind.OTHER


@functools.cache
def found(path: str, entry: Entry) -> Found:
    directory = entry.kind == "directory"
    readable = directory and entry.holds is not None
    return Found(
        path=path,
        series=path.partition("/")[0],
        kind=kind_of(path),
        is_directory=directory,
        holds=entry.holds if directory else None,
        mismatches=None if not readable else () if entry.intact else ("size: a has 1 bytes, 2 were committed",),
        manifest_digest=(DIGEST if entry.same_manifest else OTHER_DIGEST) if readable else None,
        rotten=entry.rotten,
        unreadable=entry.unreadable,
    )


class World:
    """The rows of a journal and the names on a disk."""

    def __init__(self, rows: list[CheckpointRecord], disk: dict[str, Entry]) -> None:
        self.rows = {row.id: row for row in rows}
        self.disk = dict(disk)

    def copy(self) -> World:
        return World(list(self.rows.values()), self.disk)

    def plan(self) -> tuple[Action, ...]:
        return plan(list(self.rows.values()), [found(path, entry) for path, entry in self.disk.items()])

    def changes(self) -> list[Action]:
        return [action for action in self.plan() if action.changes]

    # What the real thing does, one durable step at a time; a yield is a place to crash.

    def carry_out(self, action: Action) -> Iterator[None]:
        match action:
            case FinishRetirement():
                yield from self._set_aside(action.set_aside)
                for path in action.remove:
                    if path == action.record.directory:
                        self._rename(path, action.record.retired_directory)
                        yield
                        self._remove(action.record.retired_directory)
                    else:
                        self._remove(path)
                    yield
                row = self.rows[action.record.id]
                assert row.retire_started_at is not None, "finished a retirement that was never started"
                self._set(row.id, retired_at=3.0)
            case Restore():
                yield from self._set_aside(action.set_aside)
                self._rename(action.path, action.record.directory)
            case RollBack():
                for path in action.remove:
                    self._remove(path)
                    yield
                assert self.rows[action.record.id].state in (S.PREWRITTEN, S.WRITING)
                self._set(action.record.id, state=S.FAILED, reason=action.reason)
            case RollForward():
                yield from self._set_aside(action.set_aside)
                yield from self._publish(action)
                self._commit(action.record.id)
            case GiveUp():
                yield from self._set_aside(action.quarantine)
                assert self.rows[action.record.id].state is S.GATHERED
                self._set(action.record.id, state=S.FAILED, reason=action.reason)
            case RemoveLeftover():
                self._remove(action.path)
            case _:
                assert not action.changes
        yield

    def _publish(self, action: RollForward) -> Iterator[None]:
        new = action.record
        assert action.published == (new.directory in self.disk and self.disk[new.directory].holds == new.id)
        if action.published:
            return
        if action.replaces is None:
            self._rename(new.staging_directory, new.directory)
            yield
            return
        old = self.rows[action.replaces]
        assert self.disk[new.directory].holds == old.id, "replaced something that is not the overwritten checkpoint"
        disk = self.disk
        disk[new.directory], disk[new.staging_directory] = disk[new.staging_directory], disk[new.directory]
        yield
        self._rename(new.staging_directory, old.retired_directory)
        yield

    def _commit(self, id: int) -> None:
        row = self.rows[id]
        assert row.state is S.GATHERED, "committed a row that is not GATHERED"
        entry = self.disk[row.directory]
        assert (entry.kind, entry.holds) == ("directory", id), "committed what is not published"
        assert (entry.intact, entry.same_manifest) == (True, True), "committed what is not intact"
        if row.overwrites in self.rows and self.rows[row.overwrites].is_live:
            self._set(row.overwrites, retire_started_at=3.0)
        rivals = [r for r in self.rows.values() if r.is_live and (r.series, r.step) == (row.series, row.step)]
        assert not rivals, "two live checkpoints of one step"
        self._set(id, state=S.COMMITTED, committed_at=3.0, commit_seq=1000 + id)

    def _set_aside(self, paths: tuple[str, ...]) -> Iterator[None]:
        for path in paths:
            assert not self._is_whole_live(path), f"{path} is a live checkpoint and was set aside"
            self._rename(path, f"{path.rpartition('/')[0]}/.{path.rpartition('/')[2]}.quarantined.{len(self.disk)}")
            yield

    def _remove(self, path: str) -> None:
        entry = self.disk.get(path)
        if entry is None:
            return
        names = {name for row in self.rows.values() for name in (row.staging_directory, row.retired_directory)}
        assert path in names, f"{path} was removed and no row has given out that name"
        assert entry.kind == "directory", f"{path} is a {entry.kind} and was removed"
        assert not entry.unreadable, f"{path} could not be read and was removed"
        if entry.holds is not None:
            holder = self.rows.get(entry.holds)
            assert holder is not None, f"{path} holds an unknown attempt and was removed"
            assert not holder.is_live, f"{path} holds a live checkpoint and was removed"
            assert holder.state is not S.GATHERED, f"{path} holds a GATHERED checkpoint and was removed"
        del self.disk[path]

    def _rename(self, source: str, target: str) -> None:
        assert source in self.disk, f"{source} does not exist and was renamed"
        assert target not in self.disk, f"{target} exists and was renamed over"
        assert not self._is_whole_live(source), f"{source} is a live checkpoint at its name and was renamed"
        self.disk[target] = self.disk.pop(source)

    def _is_whole_live(self, path: str) -> bool:
        entry = self.disk[path]
        return any(r.is_live and r.directory == path and r.id == entry.holds for r in self.rows.values())

    def _set(self, id: int, **facts: object) -> None:
        self.rows[id] = dataclasses.replace(self.rows[id], **facts)
