"""
A journal that is lost or damaged, written anew from the manifests on disk.

Only published directories count, each with every file of its manifest there; what cannot be taken in
is reported with the reason and left alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckptmgr.errors import CorruptCheckpoint, InvalidArgument, JournalError, UnsafePath
from ckptmgr.manifest import Manifest, is_run_id
from ckptmgr.recovery import Found, FoundKind, ReportStranger, as_dict

if TYPE_CHECKING:
    from ckptmgr.journal import Journal
    from ckptmgr.rundir import RunDirectory


#: Far above what a run can reach, and far below `MAX_NUMBER`, so that whatever follows has room.
MAX_REBUILT = 10**15


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A published directory that a new journal can take in: its path, its manifest and the manifest's digest."""

    path: str
    manifest: Manifest
    manifest_digest: str


@dataclasses.dataclass(frozen=True)
class RebuildReport:
    """What a rebuilt journal holds, or would hold."""

    run_id: str | None
    #: In commit order, oldest first.
    checkpoints: tuple[Candidate, ...]
    #: Directories that stay where they are and are not taken in.
    skipped: tuple[ReportStranger, ...]
    #: The newest epoch that the disk knows of, also by what is unfinished; the next one must be newer.
    newest_epoch: int
    applied: bool

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able facts."""
        return {
            "applied": self.applied,
            "run_id": self.run_id,
            "checkpoints": [
                {"path": item.path, "series": item.manifest.series, "step": item.manifest.step}
                for item in self.checkpoints
            ],
            "skipped": [as_dict(item) for item in self.skipped],
        }


def preview_rebuild(rundir: RunDirectory) -> RebuildReport:
    """
    Say what a journal rebuilt from the manifests on disk would hold, and do nothing.

    Only published directories count, each with every file of its manifest there in its size;
    ``ckptmgr check --deep`` compares the bytes. They count as committed in the order in which they
    were begun, the only order a manifest knows.

    Raises:
        InvalidArgument: Nothing says which run this is, and the manifests name several.
    """
    readable: list[tuple[Found, Manifest, str]] = []
    skipped: list[ReportStranger] = []
    everything = _everything(rundir)
    for item in everything:
        if item.kind is not FoundKind.FINAL or not item.is_directory:
            continue
        try:
            readable.append((item, *rundir.read_manifest(item.path)))
        except (CorruptCheckpoint, UnsafePath, OSError) as error:
            skipped.append(ReportStranger(item.path, f"its manifest cannot be used: {error}"))
    run_id = rundir.run_id()
    if run_id is None:
        named = sorted({manifest.run_id for _, manifest, _ in readable})
        if len(named) > 1:
            raise InvalidArgument(
                f"{rundir.path} holds checkpoints of {len(named)} runs ({', '.join(named)})",
                hint="move those that do not belong here out of the run directory",
            )
        run_id = named[0] if named else None
    accepted: list[Candidate] = []
    for item, manifest, digest in sorted(
        readable, key=lambda each: (each[1].created_at, each[1].step, each[1].attempt)
    ):
        why = _why_not_taken_in(item, manifest, run_id, [other.manifest for other in accepted])
        if why is None:
            wrong = rundir.verify(item.path, manifest.files, digests=False)
            why = f"it is damaged ({wrong[0]})" if wrong else None
        if why is None:
            accepted.append(Candidate(item.path, manifest, digest))
        else:
            skipped.append(ReportStranger(item.path, why))
    epochs = [item.epoch or 0 for item in everything] + [item.manifest.epoch for item in accepted]
    epochs = [number for number in epochs if number <= MAX_REBUILT]
    return RebuildReport(
        run_id, tuple(accepted), tuple(sorted(skipped, key=lambda s: s.path)), max(epochs, default=0), applied=False
    )


def rebuild(journal: Journal, rundir: RunDirectory, *, epoch: int, host: str, pid: int) -> RebuildReport:
    """
    Fill a new journal from the manifests on disk; see `preview_rebuild` for what is taken in. Durable on return.

    Rank 0 only, under the run lock. A rebuild that was interrupted goes on where it stopped.

    Raises:
        JournalError: The journal knows other checkpoints than those a rebuild would have put there.
    """
    report = preview_rebuild(rundir)
    there = [record.manifest_digest for record in sorted(journal.checkpoints(), key=lambda r: r.commit_seq or 0)]
    if there != [item.manifest_digest for item in report.checkpoints[: len(there)]]:
        raise JournalError(
            f"{journal.path} has checkpoints of its own, so it is not rebuilt",
            hint="only a lost or damaged journal is rebuilt; move this one away first if it is",
        )
    if report.run_id is not None:
        if journal.run_id != report.run_id:
            journal.set_run_id(report.run_id)
        if rundir.run_id() is None:
            rundir.write_run_id(report.run_id)
    for item in report.checkpoints[len(there) :]:
        # Crash here: the first checkpoints are in the journal, in order; rebuilding again adds the rest.
        journal.insert_rebuilt(
            item.manifest,
            epoch=epoch,
            manifest_digest=item.manifest_digest,
            committed_at=item.manifest.created_at,
            host=host,
            pid=pid,
        )
    return dataclasses.replace(report, applied=True)


def _everything(rundir: RunDirectory) -> list[Found]:
    """What stands below every directory that can be a series, for a journal that knows no series."""
    return rundir.listing(rundir.series_on_disk())


def _why_not_taken_in(item: Found, manifest: Manifest, run_id: str | None, taken: Sequence[Manifest]) -> str | None:
    numbers = (manifest.step, manifest.attempt, manifest.epoch)
    this = (manifest.series, manifest.step)
    reasons = {
        f"it belongs to run {manifest.run_id}": manifest.run_id != run_id,
        "its manifest names no run": not is_run_id(manifest.run_id),
        f"its manifest says it is {manifest.series} step {manifest.step}": (
            f"{manifest.series}/{manifest.format.directory_name(manifest.step)}" != item.path
        ),
        "its manifest has no attempt, epoch or world size": not (
            manifest.attempt and manifest.epoch and manifest.world_size
        ),
        "its step, attempt or epoch is larger than any that ckptmgr gives out": max(numbers) > MAX_REBUILT,
        f"another directory holds attempt {manifest.attempt} too": any(
            other.attempt == manifest.attempt for other in taken
        ),
        f"another directory holds step {manifest.step} of {manifest.series} too": any(
            (other.series, other.step) == this for other in taken
        ),
    }
    return next((why for why, applies in reasons.items() if applies), None)
