"""A run on disk for the command to look at: a real journal, real files, real digests."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ckptmgr.journal import Journal
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, Format, RetirementMark
from ckptmgr.manifest import MANIFEST_NAME, Digest, FileEntry, Manifest
from ckptmgr.rundir import RunDirectory

S = CheckpointState
#: Above the highest process id that Linux gives out.
NO_PROCESS = 2**22 + 1
FILES = {"model.bin": b"weights" * 100, "optim/rank-0.bin": b"moments" * 50}


class Run:
    """A run that a test fills: each `save` walks one checkpoint as far as it is told to."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.rundir = RunDirectory(directory)
        self.journal_path = self.rundir.journal_path
        self.journal = Journal.open(self.journal_path)
        self.rundir.pair(self.journal.run_id)
        self.who: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
        self.epoch = 0
        self.start()

    def start(self, *, host: str | None = None, pid: int | None = None) -> None:
        """Begin an epoch, of this process unless said otherwise."""
        self.who = {"host": host or socket.gethostname(), "pid": pid or os.getpid()}
        self.epoch = self.journal.begin_epoch(**self.who, command="train.py", versions={"torch": "2.13"})

    def save(
        self,
        step: int,
        *,
        series: str = "checkpoint",
        layout: Format = Format.DCP,
        files: Mapping[str, bytes] = FILES,
        until: CheckpointState = S.COMMITTED,
        world_size: int = 2,
        per_rank: Sequence[str] = (),
        metrics: Mapping[str, float] | None = None,
        reason: str = "No space left on device",
        failures: Sequence[Mapping[str, Any]] = (),
        retire: Sequence[RetirementMark] = (),
        decisions: Sequence[tuple[int, str, tuple[str, ...]]] = (),
        overwrite: bool = False,
        published: bool | None = None,
    ) -> CheckpointRecord:
        """Save *step* until it is in the state *until*; FAILED fails while WRITING."""
        journal, common = self.journal, {"epoch": self.epoch, **self.who}
        record = journal.begin(
            series=series, step=step, format=layout, world_size=world_size, per_rank=per_rank,
            metrics=metrics or {}, overwrite=overwrite, **common,
        )  # fmt: skip
        staging = self.directory / record.staging_directory
        staging.mkdir(parents=True)
        if until is S.PREWRITTEN:
            return record
        journal.advance(record.id, S.PREWRITTEN, S.WRITING, **common, stage_s=0.25)
        for name, data in files.items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_bytes(data)
        if until is S.WRITING:
            return journal.checkpoint(record.id)
        if until is S.FAILED:
            return journal.advance(record.id, S.WRITING, S.FAILED, **common, reason=reason, failures=failures)
        entries = tuple(
            FileEntry(name, len(data), Digest(data).text, rank)
            for rank, (name, data) in enumerate(sorted(files.items()))
        )
        manifest = Manifest(
            run_id=journal.run_id, series=series, step=step, attempt=record.id, epoch=self.epoch, format=layout,
            world_size=world_size, created_at=record.created_at, files=entries, per_rank=tuple(per_rank),
            metrics=metrics or {}, versions={"ckptmgr": "0.1.0"},
        )  # fmt: skip
        text = manifest.to_json().encode()
        (staging / MANIFEST_NAME).write_bytes(text)
        journal.advance(
            record.id, S.WRITING, S.GATHERED, **common, manifest_digest=Digest(text).text, files=entries,
            bytes=sum(entry.size for entry in entries), write_s=12.0, gather_s=0.5,
        )  # fmt: skip
        final = self.directory / record.directory
        if published or (published is None and until is S.COMMITTED):
            if overwrite and final.exists():
                final.rename(self.directory / journal.checkpoint(record.overwrites or 0).retired_directory)
            staging.rename(final)
        if until is S.GATHERED:
            return journal.checkpoint(record.id)
        return journal.advance(
            record.id, S.GATHERED, S.COMMITTED, **common, commit_s=0.1, retire=retire, decisions=decisions
        )

    def crash(self) -> None:
        """Close the journal and leave everything else as it is; the epoch's process is gone."""
        self.start(pid=NO_PROCESS)
        self.journal.close()


@dataclasses.dataclass
class Done:
    """What one command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its one JSON document."""
        return json.loads(self.out)


class Call(Protocol):
    """Runs the command with these words."""

    def __call__(self, *words: str | Path, **options: Any) -> Done: ...


def start(*words: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Start the command in a child process, its output in pipes unless *options* say otherwise."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "-m", "ckptmgr", *map(str, words)], **options)


def in_child(*words: str | Path, **options: Any) -> Done:
    """Run the command in a child process."""
    with start(*words, **options) as child:
        try:
            out, err = child.communicate(timeout=60)
        finally:
            child.kill()
    return Done(child.returncode, out, err)
