"""
Checkpoints of other libraries under a journal: linked or copied into a run, digested, and committed like any other.

Their own directories are only read. What is taken in walks through the same states as a save, so that a crash leaves
what a crash in a save leaves; from then on it is listed, verified, pinned and retired with everything else. Only what
the manager can load later, or `from_pretrained`, is taken in: DCP, and weights in the layout of Hugging Face.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptmgr import durable, reach
from ckptmgr.errors import CheckpointError, CorruptCheckpoint, InvalidArgument, StaleWriter
from ckptmgr.foreign import copied, dcp, hf_trainer, huggingface, xtuner
from ckptmgr.foreign.ground import Folder, Kind
from ckptmgr.foreign.report import Candidate, ForeignReport, Judged
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, Format, Lifecycle
from ckptmgr.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Digest, FileEntry, Manifest, is_plain_relative

if TYPE_CHECKING:
    from ckptmgr.journal import Journal
    from ckptmgr.rundir import RunDirectory

_RANK = re.compile(r"__([0-9]{1,9})_[0-9]+\.distcp", re.ASCII)
_BLOCK_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True)
class Source:
    """
    A checkpoint that can be taken in.

    Args:
        path: Where it stands, absolute.
        layout: Whose it is.
        series: What it becomes.
        step: What it becomes.
        format: What it becomes.
        files: What its files will be called, and where they stand below *path*, with their bytes.
        world_size: How many ranks saved it, as far as its files tell.
        per_rank: Names of state that differs by rank.
        metrics: What was known of it.
        digests: Of its files, where its own manifest has them: no other bytes are taken in.
    """

    path: Path
    layout: str
    series: str
    step: int
    format: Format
    files: Mapping[str, tuple[str, int]]
    world_size: int = 1
    per_rank: tuple[str, ...] = ()
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(size for _, size in self.files.values())


@dataclasses.dataclass(frozen=True)
class Left:
    """A checkpoint that is not taken in, and why."""

    path: Path
    step: int | None
    why: str


def plan(
    report: ForeignReport,
    *,
    saved: Mapping[str, Sequence[CheckpointRecord]],
    is_taken: Callable[[str], bool],
    series: str | None = None,
    step: int | None = None,
    as_step: int | None = None,
) -> tuple[list[Source], list[Left]]:
    """
    Which checkpoints of *report* can be taken in, in the order in which they are to be committed, and why others not.

    Args:
        report: What stands in the other directory, judged.
        saved: The live checkpoints of the run, oldest first, by series.
        is_taken: Whether something stands at a path of the run.
        series: Only this one.
        step: Only this one; then it may also be older than what the run has.
        as_step: The step of the only one that there is, whatever its name says.
    """
    sources: list[Source] = []
    left: list[Left] = []
    layouts = [each for each in report.layouts if series in (None, _series(_format(each)))]
    count = sum(len(judged.candidates) for judged in layouts)
    if as_step is not None and count > 1:
        raise InvalidArgument(
            f"--as-step is about one checkpoint, and there are {count} in {report.directory}",
            hint="give the directory of the one that you mean",
        )
    for judged in layouts:
        for candidate in reversed(judged.candidates):
            at = report.absolute(candidate)
            number = candidate.step if as_step is None else as_step
            if step not in (None, number):
                continue
            try:
                found = _source(judged, candidate, at, number)
                _require_place(found, saved.get(found.series, ()), is_taken, by_name=step is not None)
            except (CheckpointError, OSError) as error:
                left.append(Left(at, candidate.step, getattr(error, "message", None) or str(error)))
            else:
                again = [one for one in sources if (one.series, one.step) == (found.series, found.step)]
                left += [Left(one.path, one.step, f"{at} is of the same step, and newer") for one in again]
                sources = [one for one in sources if one not in again] + [found]
    return sources, left


def _require_place(
    source: Source, live: Sequence[CheckpointRecord], is_taken: Callable[[str], bool], *, by_name: bool
) -> None:
    if live and live[-1].format is not source.format:
        raise InvalidArgument(f"the series {source.series} of the run has the format {live[-1].format}")
    if any(record.step == source.step for record in live):
        raise InvalidArgument(f"the run has step {source.step} of {source.series} already")
    if live and source.step < live[-1].step and not by_name:
        # What is committed last is what a run is resumed from.
        raise InvalidArgument(
            f"the run has step {live[-1].step} of {source.series} already, and would go on from this one:"
            f" give --step {source.step} if that is meant"
        )
    place = f"{source.series}/{source.format.directory_name(source.step)}"
    if is_taken(place):
        raise InvalidArgument(f"{place} is there in the run and no checkpoint of it: `ckptmgr recover` says what it is")


def _source(judged: Judged, candidate: Candidate, at: Path, step: int | None) -> Source:
    """
    Raises:
        CheckpointError: It cannot be taken in.
        OSError: It cannot be looked at.
    """
    layout = _format(judged)
    if layout is None:
        raise InvalidArgument(f"nothing of ckptmgr could load a checkpoint of {judged.layout}")
    if not candidate.complete:
        wrong = next(finding.text for finding in candidate.findings if finding.level == "error")
        raise CorruptCheckpoint(wrong, directory=str(at), mismatches=(wrong,))
    if not at.is_dir():
        raise InvalidArgument(f"{judged.layout}: it is no directory")
    if step is None:
        raise InvalidArgument("its name says no step: give it with --as-step N")
    files = dict(_files(Folder(at)))
    facts: dict[str, Any] = {}
    if judged.layout == copied.LAYOUT:
        manifest = Manifest.from_json(reach.read(at / MANIFEST_NAME, MAX_MANIFEST_BYTES), where=str(at))
        kept = {entry.path: entry.digest for entry in manifest.files}
        files = {name: of for name, of in files.items() if name in kept}
        facts = {"world_size": manifest.world_size, "per_rank": manifest.per_rank, "metrics": manifest.metrics}
        facts["digests"] = kept
        if manifest.format is not layout:
            raise InvalidArgument(f"its manifest says that it is of the format {manifest.format}, its name another one")
    elif layout is Format.DCP:
        files = _weights_on_top(files) if judged.layout == xtuner.LAYOUT else files
        if dcp.INDEX not in files:
            raise InvalidArgument(f"{judged.layout}: it has no {dcp.INDEX} that is of all of it")
        facts = {"world_size": 1 + max((_rank(name) for name in files), default=0)}
    if MANIFEST_NAME in files:
        raise InvalidArgument(f"it has a file {MANIFEST_NAME}, which is what ckptmgr calls its own")
    return Source(at, judged.layout, _series(layout), step, layout, files, **facts)


def _series(layout: Format | None) -> str:
    return "checkpoint" if layout is Format.DCP else "hf"


def _format(judged: Judged) -> Format | None:
    """What a checkpoint of this layout becomes, or None if nothing here could load it."""
    if judged.layout in (huggingface.LAYOUT, hf_trainer.LAYOUT):
        return Format.HUGGINGFACE
    if judged.layout in (dcp.LAYOUT, xtuner.LAYOUT, copied.LAYOUT):
        return Format.DCP if judged.trains else Format.HUGGINGFACE
    return None


def _files(folder: Folder) -> Iterator[tuple[str, tuple[str, int]]]:
    """
    All files of a checkpoint, by the names that they have in it.

    Raises:
        InvalidArgument: Something is neither file nor directory, or has a name that a manifest cannot hold.
    """
    for name, entry in folder.entries.items():
        path = f"{folder.path}/{name}" if folder.path else name
        if not is_plain_relative(path):
            raise InvalidArgument(f"{path!a} is no name that a manifest can hold")
        if folder.link(name) is not None:
            raise InvalidArgument(f"{path} is a link, and is not followed")
        if entry.kind is Kind.FILE:
            yield path, (path, entry.size)
        elif entry.kind is Kind.DIRECTORY:
            yield from _files(folder.folder(name))
        else:
            raise InvalidArgument(f"{path} is a {entry.kind.value}, and is not followed")


def _weights_on_top(files: Mapping[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
    """The files of a checkpoint of xtuner, as DCP looks for them: those of ``weights`` beside all others."""
    found: dict[str, tuple[str, int]] = {}
    for name, of in files.items():
        new = name.removeprefix("weights/")
        if new in found:
            raise InvalidArgument(f"it has two files {new}")
        found[new] = of
    return found


def _rank(name: str) -> int:
    match = _RANK.fullmatch(name.rpartition("/")[2])
    return int(match[1]) if match else 0


def take_in(
    journal: Journal,
    rundir: RunDirectory,
    source: Source,
    *,
    copy: bool,
    epoch: int,
    host: str,
    pid: int,
    progress: Callable[[int], None],
) -> CheckpointRecord:
    """
    Take one checkpoint in: COMMITTED and durable on return. Under the run lock.

    Args:
        journal: Open for writing, with no attempt in flight.
        rundir: The run directory.
        source: Of `plan`.
        copy: Give it bytes of its own; else its files get second names, and share what is in them.
        epoch: The caller's epoch.
        host: This machine's name.
        pid: This process.
        progress: Called with the number of bytes just read.

    Raises:
        CorruptCheckpoint: A file changed meanwhile, or has other bytes than a manifest of its own says.
        OSError: A file cannot be read, linked or written. The attempt is FAILED then.
    """
    who: dict[str, Any] = {"epoch": epoch, "host": host, "pid": pid}
    note = f"adopted from {os.fsencode(source.path).decode(errors='backslashreplace')}"
    record = journal.begin(
        series=source.series, step=source.step, format=source.format, world_size=source.world_size,
        metrics=source.metrics, per_rank=source.per_rank, note=note, **who,
    )  # fmt: skip

    def recorder(before: CheckpointState, after: CheckpointState, facts: Mapping[str, Any]) -> None:
        journal.advance(record.id, before, after, **who, **facts)

    lifecycle = Lifecycle(record.state, recorder)
    began = time.monotonic()
    try:
        # Crash here: an adoption PREWRITTEN without a staging directory; recovery marks it FAILED.
        staging = rundir.create_staging(record)
        lifecycle.start_writing()
        # Crash here: an adoption WRITING with none of its files; recovery removes the staging directory.
        entries = [_one(rundir, source, staging, name, copy=copy, progress=progress) for name in sorted(source.files)]
        manifest = Manifest(
            run_id=journal.run_id, series=record.series, step=record.step, attempt=record.id, epoch=epoch,
            format=record.format, world_size=record.world_size, created_at=record.created_at, files=tuple(entries),
            per_rank=record.per_rank, metrics=record.metrics, versions={"adopted from": source.layout},
        )  # fmt: skip
        digest = rundir.seal(record, manifest)
        # Crash here: an adoption WRITING with a durable manifest; recovery removes it.
        lifecycle.gather(
            manifest_digest=digest, bytes=manifest.bytes, files=manifest.files, write_s=time.monotonic() - began
        )
    except BaseException as error:
        rundir.remove(record.staging_directory)
        # Crash here: an adoption that failed, in flight without its staging directory; recovery marks it FAILED.
        lifecycle.fail(reason=f"{type(error).__name__}: {error}")
        raise
    # Crash here: an adoption GATHERED with a complete staging directory; recovery publishes and commits it.
    if (newest := journal.current_epoch()) != epoch:
        text = f"epoch {newest} has taken over this run; epoch {epoch} may change nothing any more"
        raise StaleWriter(text, checkpoint_id=record.id, epoch=epoch, found=f"epoch {newest}")
    rundir.publish(record, None)
    # Crash here: an adoption GATHERED and published durably; recovery commits it.
    lifecycle.commit()
    return journal.checkpoint(record.id)


def _one(
    rundir: RunDirectory, source: Source, staging: Path, name: str, *, copy: bool, progress: Callable[[int], None]
) -> FileEntry:
    """One file into the staging directory, synced, and what is in it."""
    target = staging / name
    path, size = source.files[name]
    at_source = source.path / path
    durable.ensure_directory(target.parent, mode=rundir.permissions.directory_mode)
    digest = Digest()
    with reach.naming(at_source), reach.directory(source.path) as folder, reach.regular(folder, path) as descriptor:
        before = os.fstat(descriptor)
        if copy:
            with durable.new_file(target, mode=rundir.permissions.file_mode) as written:
                at = 0
                for data in _blocks(descriptor, progress):
                    digest.update(data)
                    durable.write_at(written, data, at)
                    at += len(data)
        else:
            for data in _blocks(descriptor, progress):
                digest.update(data)
            durable.second_name(descriptor, target)
        after = os.fstat(descriptor)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or after.st_size != size:
        text = f"{at_source} changed while it was read"
        raise CorruptCheckpoint(text, directory=str(source.path), mismatches=(text,))
    if digest.text != source.digests.get(name, digest.text):
        text = f"{at_source} has other bytes than its manifest says"
        raise CorruptCheckpoint(text, directory=str(source.path), mismatches=(text,))
    return FileEntry(name, size, digest.text, _rank(name))


def _blocks(descriptor: int, progress: Callable[[int], None]) -> Iterator[memoryview]:
    buffer = bytearray(_BLOCK_BYTES)
    at = 0
    while count := os.preadv(descriptor, [buffer], at):
        yield memoryview(buffer)[:count]
        progress(count)
        at += count
