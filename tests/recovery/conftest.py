from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptmgr.journal import Journal
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, Format, RetirementMark
from ckptmgr.manifest import Digest, FileEntry, Manifest
from ckptmgr.recovery import RecoveryReport, preview, recover
from ckptmgr.rundir import RunDirectory

S = CheckpointState


class Run:
    """A run with a real journal and a real directory, saved one durable step at a time, as a manager does it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rundir = RunDirectory(path)
        self.open()

    def open(self) -> None:
        """Start again, as after a crash: a fresh connection and a new epoch."""
        self.journal = Journal.open(self.rundir.journal_path)
        self.rundir.pair(self.journal.run_id)
        self.epoch = self.journal.begin_epoch(host="h", pid=os.getpid(), command="test", versions={})

    def restart(self) -> None:
        self.journal.close()
        self.open()

    def path(self, relative: str) -> Path:
        return self.rundir.path / relative

    def row(self, record: CheckpointRecord) -> CheckpointRecord:
        return self.journal.checkpoint(record.id)

    def names(self, series: str = "checkpoint") -> set[str]:
        return {path.name for path in self.path(series).iterdir()}

    def recover(self) -> RecoveryReport:
        return recover(self.journal, self.rundir, epoch=self.epoch, host="h", pid=os.getpid())

    def preview(self) -> RecoveryReport:
        return preview(self.journal, self.rundir)

    # The commit order, up to any point

    def advance(self, record: CheckpointRecord, source: CheckpointState, dest: CheckpointState, **facts):
        return self.journal.advance(record.id, source, dest, epoch=self.epoch, host="h", pid=1, **facts)

    def prewritten(self, step: int, *, overwrite: bool = False, series: str = "checkpoint") -> CheckpointRecord:
        record = self.journal.begin(
            series=series,
            step=step,
            format=Format.DCP,
            epoch=self.epoch,
            world_size=2,
            overwrite=overwrite,
            host="h",
            pid=1,
            metrics={"loss": 1.0 / (step + 1)},
            per_rank=("data",),
        )
        self.rundir.create_staging(record)
        return record

    def writing(self, step: int, **how) -> CheckpointRecord:
        record = self.advance(self.prewritten(step, **how), S.PREWRITTEN, S.WRITING)
        for name in ("a.bin", "b.bin"):
            (self.path(record.staging_directory) / name).write_bytes(f"{name} of attempt {record.id}".encode())
        return record

    def gathered(self, step: int, **how) -> CheckpointRecord:
        record = self.writing(step, **how)
        staging = self.path(record.staging_directory)
        files = tuple(
            FileEntry(path.name, path.stat().st_size, Digest(path.read_bytes()).text, rank)
            for rank, path in enumerate(sorted(staging.iterdir()))
        )
        manifest = Manifest(
            run_id=self.journal.run_id,
            series=record.series,
            step=step,
            attempt=record.id,
            epoch=record.epoch,
            format=record.format,
            world_size=2,
            created_at=record.created_at,
            files=files,
            per_rank=record.per_rank,
            metrics=record.metrics,
            versions={"torch": "2.13"},
        )
        digest = self.rundir.seal(record, manifest)
        return self.advance(record, S.WRITING, S.GATHERED, manifest_digest=digest, files=files, bytes=manifest.bytes)

    def committed(self, step: int, **how) -> CheckpointRecord:
        record = self.gathered(step, **how)
        old = self.row_of(record.overwrites)
        self.rundir.publish(record, old)
        record = self.advance(record, S.GATHERED, S.COMMITTED)
        if old is not None:
            self.rundir.retire(self.row(old))
            self.journal.finish_retirement(old.id, epoch=self.epoch)
        return record

    def retiring(self, step: int) -> CheckpointRecord:
        record = self.committed(step)
        self.journal.mark_retiring([RetirementMark(record.id, "no rule keeps it")], epoch=self.epoch)
        return self.row(record)

    def row_of(self, id: int | None) -> CheckpointRecord | None:
        return None if id is None else self.journal.checkpoint(id)

    def is_intact(self, record: CheckpointRecord) -> bool:
        """Whether the final name holds exactly this attempt's bytes."""
        manifest, digest = self.rundir.read_manifest(record.directory)
        wrong = self.rundir.verify(record.directory, manifest.files, digests=True)
        return (manifest.attempt, digest, wrong) == (record.id, record.manifest_digest, ())


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "alpha")
    yield run
    run.journal.close()
