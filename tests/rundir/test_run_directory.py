"""The run directory: what is recognised in it, what is changed, and what is never touched."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import UnixFileLock

from ckptmgr import durable, reach
from ckptmgr.errors import (
    CorruptCheckpoint,
    ForeignJournal,
    InvalidArgument,
    JournalNotFound,
    LockUnsupported,
    RunLocked,
    UnsafePath,
)
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, Format
from ckptmgr.manifest import MANIFEST_NAME, Digest, FileEntry, Manifest
from ckptmgr.recovery import Found, FoundKind
from ckptmgr.rundir import LATEST_NAME, MAX_JOURNAL_PATH_BYTES, META_NAME, RUN_ID_NAME, RunDirectory

RUN_ID = "5" * 32


@pytest.fixture
def rundir(run_dir: Path) -> RunDirectory:
    directory = RunDirectory(run_dir)
    directory.pair(RUN_ID)
    return directory


def _record(attempt: int, step: int = 5, series: str = "checkpoint", **changes: Any) -> CheckpointRecord:
    layout = changes.pop("format", Format.DCP)
    name = layout.directory_name(step)
    return CheckpointRecord(
        id=attempt, series=series, step=step, format=layout, state=CheckpointState.WRITING, epoch=1, world_size=1,
        directory=f"{series}/{name}", staging_directory=f"{series}/.{name}.e1.a{attempt}.incomplete", created_at=1.0,
        **changes,
    )  # fmt: skip


def _fill(directory: Path, files: dict[str, bytes]) -> tuple[FileEntry, ...]:
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return tuple(FileEntry(name, len(data), Digest(data).text, 0) for name, data in files.items())


def _manifest(record: CheckpointRecord, files: tuple[FileEntry, ...], run_id: str = RUN_ID) -> Manifest:
    return Manifest(
        run_id=run_id, series=record.series, step=record.step, attempt=record.id, epoch=record.epoch,
        format=record.format, world_size=1, created_at=1.0, files=files,
    )  # fmt: skip


FILES = {"__0_0.distcp": b"weights" * 100, ".metadata": b"meta", "sub/config.json": b"{}"}


def _stage(
    rundir: RunDirectory, record: CheckpointRecord, files: dict[str, bytes] | None = None
) -> tuple[FileEntry, ...]:
    staging = rundir.create_staging(record)
    entries = _fill(staging, files or FILES)
    rundir.seal(record, _manifest(record, entries))
    return entries


def _publish(rundir: RunDirectory, record: CheckpointRecord, files: dict[str, bytes] | None = None) -> CheckpointRecord:
    _stage(rundir, record, files)
    rundir.publish(record, None)
    return record


def _names(rundir: RunDirectory, series: str = "checkpoint") -> list[str]:
    return sorted(path.name for path in (rundir.path / series).iterdir())


# -- places and identity -----------------------------------------------------------------------------


def test_journal_and_lock_stand_beside_the_run_directory(tmp_path: Path) -> None:
    found = RunDirectory(tmp_path / "runs" / "alpha")
    assert found.journal_path == tmp_path / "runs" / "alpha.journal.db"
    assert found.lock_path == tmp_path / "runs" / "alpha.journal.lock"
    by_journal = RunDirectory(tmp_path / "runs" / "alpha.journal.db")
    assert (by_journal.path, by_journal.journal_path) == (found.path, found.journal_path)
    elsewhere = RunDirectory(tmp_path / "runs" / "alpha", tmp_path / "j" / "x.db")
    assert (elsewhere.journal_path, elsewhere.lock_path) == (tmp_path / "j" / "x.db", tmp_path / "j" / "x.lock")
    assert not list(tmp_path.iterdir()), "looking makes nothing"


def test_links_in_the_path_are_resolved_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    found = RunDirectory(tmp_path / "link" / "alpha")
    assert found.path == tmp_path / "real" / "alpha"
    assert found.journal_path == tmp_path / "real" / "alpha.journal.db"


def test_a_journal_whose_path_is_too_long_is_refused_and_the_longest_is_not(tmp_path: Path) -> None:
    def of_length(length: int) -> RunDirectory:
        return RunDirectory(tmp_path / "run", f"{tmp_path}/{'j' * (length - len(os.fsencode(tmp_path)) - 1)}")

    of_length(MAX_JOURNAL_PATH_BYTES).check_journal_path()
    with pytest.raises(InvalidArgument, match=f"{MAX_JOURNAL_PATH_BYTES + 1} bytes.* no more than") as raised:
        of_length(MAX_JOURNAL_PATH_BYTES + 1).check_journal_path()
    assert "journal=" in raised.value.hint
    with pytest.raises(InvalidArgument, match="bytes"):
        # Bytes are what counts, not characters.
        RunDirectory(tmp_path / "run", tmp_path / ("ü" * 120) / ("ü" * 120)).check_journal_path()


def test_neither_the_root_nor_nothing_is_a_run_directory() -> None:
    with pytest.raises(InvalidArgument):
        RunDirectory("/")
    with pytest.raises(InvalidArgument, match="unset"):
        RunDirectory("")


def test_directory_and_journal_of_two_runs_are_told_apart(rundir: RunDirectory) -> None:
    assert rundir.run_id() == RUN_ID
    assert (rundir.path / RUN_ID_NAME).read_text() == RUN_ID + "\n"
    rundir.pair(RUN_ID)
    with pytest.raises(ForeignJournal) as caught:
        rundir.pair("6" * 32)
    assert (caught.value.found, caught.value.expected) == ("6" * 32, RUN_ID)
    assert rundir.run_id() == RUN_ID


def test_a_directory_that_lost_its_mark_is_refused_where_checkpoints_are_expected(run_dir: Path) -> None:
    unmounted = RunDirectory(run_dir)
    with pytest.raises(ForeignJournal, match="mounted"):
        unmounted.pair(RUN_ID, managed=True)
    assert not run_dir.exists()


@pytest.mark.parametrize("kind", ["link", "dangling link", "directory", "fifo"])
def test_a_mark_that_is_no_plain_file_is_refused_and_stays(rundir: RunDirectory, tmp_path: Path, kind: str) -> None:
    mark = rundir.path / RUN_ID_NAME
    mark.rename(tmp_path / "elsewhere")
    if kind == "fifo":
        os.mkfifo(mark)
    elif kind == "directory":
        mark.mkdir()
    else:
        mark.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nothing"))
    before = mark.lstat()
    for call in (rundir.run_id, rundir.require_journal, lambda: rundir.pair(RUN_ID), lambda: rundir.require_pair("6")):
        with pytest.raises(UnsafePath, match="not a regular file") as caught:
            call()
        assert "put it back" in caught.value.hint
    assert mark.lstat() == before


def test_a_directory_that_has_lost_its_journal_is_refused(rundir: RunDirectory) -> None:
    with pytest.raises(JournalNotFound, match="--rebuild --apply"):
        rundir.require_journal()
    rundir.journal_path.touch()
    rundir.require_journal()


# -- the lock ------------------------------------------------------------------------------------------


def test_one_holder_at_a_time_and_it_is_named(run_dir: Path) -> None:
    first, second = RunDirectory(run_dir), RunDirectory(run_dir)
    assert second.holder() == "an unknown process"
    first.acquire("trainer")
    began = time.monotonic()
    with pytest.raises(RunLocked) as caught:
        second.acquire("another")
    assert time.monotonic() - began < 1
    assert re.fullmatch(
        rf"trainer, pid {os.getpid()} on {re.escape(socket.gethostname())}, since [-0-9]+ [:0-9]+Z", caught.value.holder
    )
    first.release()
    first.release()
    second.acquire("another")
    assert "another" in first.holder()
    second.release()
    assert second.lock_path.exists(), "removing the file would let two holders in"


@pytest.mark.parametrize("above", ["a file", "no place for files"])
def test_a_lock_that_cannot_be_made_is_an_error_that_says_so(tmp_path: Path, above: str) -> None:
    (tmp_path / "a file").touch()
    place = {"a file": tmp_path / "a file", "no place for files": Path("/proc/nowhere")}[above]
    rundir = RunDirectory(tmp_path / "run", place / "run.journal.db")

    with pytest.raises(LockUnsupported, match=f"cannot make the run lock {place}/run.journal.lock: ") as raised:
        rundir.acquire("trainer")
    assert raised.value.path == str(rundir.lock_path)
    assert raised.value.reason in raised.value.message


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_lock_that_may_not_be_written_is_no_question_of_locking(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """On a mount that is read-only, or as another user than the run's."""

    def refuse(lock: UnixFileLock) -> None:
        raise OSError(number, os.strerror(number), str(lock.lock_file))

    monkeypatch.setattr(UnixFileLock, "_acquire", refuse)
    with pytest.raises(LockUnsupported) as raised:
        RunDirectory(run_dir).acquire("trainer")
    assert os.strerror(number) in raised.value.message
    assert "flock" not in raised.value.hint
    assert "writable" in raised.value.hint


@pytest.mark.parametrize(
    "note", ["", "garbage", "[]", '{"pid": "x"}', '{"command": "c", "pid": 1, "host": "h", "since": 1e99}']
)
def test_a_lock_file_with_another_note_is_an_unknown_holder(run_dir: Path, note: str) -> None:
    directory = RunDirectory(run_dir)
    directory.lock_path.write_text(note)
    assert directory.holder() == "an unknown process"


# -- what is recognised --------------------------------------------------------------------------------


def test_a_listing_tells_ours_from_everything_else(rundir: RunDirectory) -> None:
    _publish(rundir, _record(1, 5))
    _stage(rundir, _record(2, 6))
    _publish(rundir, _record(9, 7), {"a": b"1"})
    other_run = _record(3, 8)
    staging = rundir.create_staging(other_run)
    rundir.seal(other_run, _manifest(other_run, _fill(staging, FILES), run_id="7" * 32))
    series = rundir.path / "checkpoint"
    (series / "step-10").mkdir()
    (series / "step-11").write_text("a file")
    (series / "step-12").symlink_to("step-5")
    (series / ".step-13.e2.a14.retired").mkdir()
    (series / ".step-14.e2.a15.quarantined").mkdir()
    (series / ".step-14.e2.a15.quarantined.2").mkdir()
    strange = [
        "step-05", "step--1", "step-5 ", "step-", "Step-5", "step-5.incomplete", ".step-5.e0.a1.incomplete", "hf-x",
        ".step-5.e1.a1.incomplete~", ".step-5.e1.incomplete", "step-" + "9" * 30, ".step-1.e1.a1.retired.2", "notes",
    ]  # fmt: skip
    for name in strange:
        (series / name).mkdir()
    (series / LATEST_NAME).symlink_to("step-5")
    found = {item.path.partition("/")[2]: item for item in rundir.listing(["checkpoint", "missing"])}
    kinds = {name: item.kind for name, item in found.items() if name not in strange}
    assert kinds == {
        "step-5": FoundKind.FINAL,
        ".step-6.e1.a2.incomplete": FoundKind.STAGING,
        "step-7": FoundKind.FINAL,
        ".step-8.e1.a3.incomplete": FoundKind.STAGING,
        "step-10": FoundKind.FINAL,
        "step-11": FoundKind.FINAL,
        "step-12": FoundKind.FINAL,
        ".step-13.e2.a14.retired": FoundKind.RETIRED,
        ".step-14.e2.a15.quarantined": FoundKind.QUARANTINED,
        ".step-14.e2.a15.quarantined.2": FoundKind.QUARANTINED,
        LATEST_NAME: FoundKind.LINK,
    }
    assert all(found[name].kind is FoundKind.OTHER for name in strange)
    assert {name for name, item in found.items() if item.holds is not None} == {
        "step-5", ".step-6.e1.a2.incomplete", "step-7",
    }  # fmt: skip
    assert (found["step-5"].holds, found["step-7"].holds) == (1, 9)
    assert not found["step-11"].is_directory
    assert not found["step-12"].is_directory
    item = found[".step-13.e2.a14.retired"]
    assert (item.step, item.epoch, item.attempt) == (13, 2, 14)
    assert all(item.mismatches is None for item in found.values())


def test_a_listing_verifies_what_it_is_asked_to(rundir: RunDirectory) -> None:
    _publish(rundir, _record(1, 5))
    _publish(rundir, _record(2, 6))
    (rundir.path / "checkpoint" / "step-5" / "__0_0.distcp").write_bytes(b"WEIGHTS" * 100)

    def look(**what: Any) -> dict[str, Found]:
        return {item.path: item for item in rundir.listing(["checkpoint"], **what)}

    both = ["checkpoint/step-5", "checkpoint/step-6"]
    by_size, by_digest = look(sizes_for=both), look(deep_for=both)
    assert [by_size[path].mismatches for path in both] == [(), ()]
    assert [len(by_digest[path].mismatches or ()) for path in both] == [1, 0]
    assert str(by_digest[both[0]].mismatches).count("digest: __0_0.distcp") == 1


def test_a_listing_leaves_out_what_it_is_not_asked_for(rundir: RunDirectory) -> None:
    for number, step in enumerate((5, 6, 7), 1):
        _publish(rundir, _record(number, step))
    found = rundir.listing(["checkpoint"], besides={"checkpoint/step-5", "checkpoint/step-7", "other/step-6"})

    assert [(item.path, item.holds) for item in found] == [("checkpoint/step-6", 2)]


@pytest.mark.parametrize("beside", ["incomplete", "retired", "quarantined", "quarantined.2"])
def test_what_stands_beside_a_working_name_of_its_step_is_read_in_any_case(rundir: RunDirectory, beside: str) -> None:
    """It may have been moved; and a name that is no directory is never taken for one."""
    for number, step in enumerate((5, 50, 6, 7), 1):
        _publish(rundir, _record(number, step))
    (rundir.path / "checkpoint" / f".step-5.e1.a9.{beside}").mkdir()
    (rundir.path / "checkpoint" / "step-8").symlink_to("step-7")
    unread = {f"checkpoint/step-{step}" for step in (5, 50, 6, 8)}
    found = {item.path: item for item in rundir.listing(["checkpoint"], unread=unread)}

    assert {path for path, item in found.items() if item.unread} == {"checkpoint/step-50", "checkpoint/step-6"}
    assert (found["checkpoint/step-5"].holds, found["checkpoint/step-7"].holds) == (1, 4)
    assert all(item.holds is None for item in found.values() if item.unread)


def test_a_series_that_is_a_link_or_no_plain_name_is_refused(rundir: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (rundir.path / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePath, match="link"):
        rundir.listing(["linked"])
    with pytest.raises(InvalidArgument):
        rundir.listing(["../elsewhere"])


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "../x", "/etc", "a/../b", "a//b", "a/./b", "a\0b", "a\\b", "checkpoint/../../x", "a" * 5000],
    ids=lambda path: repr(path)[:20],
)
def test_a_path_that_leaves_the_run_directory_is_refused_everywhere(rundir: RunDirectory, path: str) -> None:
    record = dataclasses.replace(_record(1), directory=path, staging_directory=path)
    for call in (
        lambda: rundir.absolute(path),
        lambda: rundir.exists(path),
        lambda: rundir.read_manifest(path),
        lambda: rundir.verify(path, (), digests=False),
        lambda: rundir.create_staging(record),
        lambda: rundir.publish(record, None),
        lambda: rundir.retire(record),
        lambda: rundir.remove(path),
        lambda: rundir.quarantine(path, _record(1)),
        lambda: rundir.restore(_record(1), path),
        lambda: rundir.point_latest(path, None),
    ):
        with pytest.raises(UnsafePath):
            call()


def test_a_link_on_the_way_is_never_followed(rundir: RunDirectory, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    _publish(rundir, _record(1))
    (rundir.path / "checkpoint").rename(elsewhere)
    (rundir.path / "checkpoint").symlink_to(elsewhere)
    before = sorted(elsewhere.iterdir())
    for call in (
        lambda: rundir.create_staging(_record(2, 6)),
        lambda: rundir.read_manifest("checkpoint/step-5"),
        lambda: rundir.retire(_record(1)),
        lambda: rundir.remove("checkpoint/.step-5.e1.a1.retired"),
        lambda: rundir.point_latest("checkpoint", _record(1)),
    ):
        with pytest.raises((UnsafePath, OSError)):
            call()
    assert sorted(elsewhere.iterdir()) == before


# -- verifying -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "word", "deep_only"),
    [
        (lambda d: (d / ".metadata").unlink(), "missing: .metadata", False),
        (lambda d: (d / ".metadata").write_bytes(b"met"), "size: .metadata", False),
        (lambda d: (d / ".metadata").write_bytes(b"meta!"), "size: .metadata", False),
        (lambda d: (d / ".metadata").write_bytes(b"atem"), "digest: .metadata", True),
        (lambda d: ((d / ".metadata").unlink(), (d / ".metadata").mkdir()), "missing: .metadata", False),
        (lambda d: ((d / ".metadata").rename(d / "m"), (d / ".metadata").symlink_to("m")), "missing: .metadata", False),
        (lambda d: ((d / "sub").rename(d / "s"), (d / "sub").symlink_to("s")), "missing: sub/config.json", False),
        (lambda d: ((d / ".metadata").unlink(), os.mkfifo(d / ".metadata")), "missing: .metadata", False),
        (lambda d: (d / "sub" / "config.json").unlink(), "missing: sub/config.json", False),
        (lambda d: d.rename(d.with_name("gone")), "missing: ", False),
    ],
    ids=["gone", "shorter", "longer", "changed", "directory", "link", "linked-parent", "fifo", "deep-gone", "all-gone"],
)
def test_verifying_finds_every_kind_of_damage(rundir: RunDirectory, damage: Any, word: str, deep_only: bool) -> None:
    record = _record(1)
    files = _stage(rundir, record)
    rundir.publish(record, None)
    assert rundir.verify(record.directory, files, digests=True) == ()
    damage(rundir.path / record.directory)
    shallow = rundir.verify(record.directory, files, digests=False)
    deep = rundir.verify(record.directory, files, digests=True)
    assert any(text.startswith(word) for text in deep), deep
    assert bool(shallow) is not deep_only, shallow


def test_what_is_read_from_disk_is_not_what_memory_has_of_it_and_is_not_kept_there(rundir: RunDirectory) -> None:
    record = _record(1)
    files = _stage(rundir, record, {"a": b"x" * (8 << 20)})
    path = rundir.absolute(record.staging_directory) / "a"
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)

        def in_memory() -> bool:
            try:
                return os.preadv(descriptor, [bytearray(4096)], 4 << 20, os.RWF_NOWAIT) > 0
            except BlockingIOError:
                return False
            except OSError as error:
                pytest.skip(f"this file system does not say what it has in memory: {error}")

        assert rundir.verify(record.staging_directory, files, digests=True) == ()
        if not in_memory():
            pytest.skip("what was just read is not in memory")
        rundir.verify(record.staging_directory, files, digests=True, from_disk=True)
        kept = in_memory()
        assert rundir.verify(record.staging_directory, files, digests=True) == ()
        if not in_memory():
            pytest.skip("what was just read is not in memory")
    finally:
        os.close(descriptor)

    assert not kept


def test_what_is_written_leaves_out_what_is_only_reserved_links_and_what_is_gone(rundir: RunDirectory) -> None:
    staging = rundir.create_staging(_record(1))
    (staging / "sub").mkdir()
    (staging / "sub" / "whole").write_bytes(b"x" * 5000)
    (staging / "link").symlink_to("sub/whole")
    with durable.new_file(staging / "begun", mode=None) as descriptor:
        reserved = durable.set_size(descriptor, 8 << 20)
        durable.write_at(descriptor, memoryview(b"y" * (1 << 20)), 4 << 20)
        found = rundir.written(_record(1).staging_directory)

    assert found["sub/whole"] in (5000, 8192)
    assert found["begun"] == 1 << 20 or not reserved
    assert found.keys() == {"sub/whole", "begun"}
    assert rundir.written("checkpoint/.step-9.e1.a9.incomplete") == {}


def test_verifying_tells_how_many_bytes_it_has_read(rundir: RunDirectory) -> None:
    record = _record(1)
    files = _stage(rundir, record)
    read: list[int] = []
    assert rundir.verify(record.staging_directory, files, digests=True, progress=read.append) == ()
    assert sum(read) == sum(len(data) for data in FILES.values())


@pytest.mark.parametrize("size", [2 << 20, (2 << 20) + 1, (10 << 20) - 1, 10 << 20])
def test_every_byte_of_a_large_file_is_digested_once_and_in_order(rundir: RunDirectory, size: int) -> None:
    """It is read ahead, by a thread of its own, in blocks of 2 MiB."""
    data = b"".join(number.to_bytes(4, "big") for number in range(-(-size // 4)))[:size]
    folder = rundir.path / "checkpoint" / "step-1"
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(data)
    files = [FileEntry("file", size, Digest(data).text, 0)]
    read: list[int] = []
    assert rundir.verify("checkpoint/step-1", files, digests=True, progress=read.append) == ()
    assert sum(read) == size
    with (folder / "file").open("r+b") as file:
        file.seek(size - 1)
        file.write(b"?")
    assert len(rundir.verify("checkpoint/step-1", files, digests=True)) == 1
    assert not [one for one in threading.enumerate() if one.name.startswith("ckptmgr-read")]


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"format_version": 99}'])
def test_a_manifest_that_cannot_be_trusted_makes_a_directory_nobodys(rundir: RunDirectory, text: str) -> None:
    record = _publish(rundir, _record(1))
    (rundir.path / record.directory / MANIFEST_NAME).write_text(text)
    with pytest.raises(CorruptCheckpoint):
        rundir.read_manifest(record.directory)
    (item,) = rundir.listing(["checkpoint"], sizes_for=[record.directory])
    assert (item.holds, item.mismatches) == (None, None)


# -- the commit order --------------------------------------------------------------------------------------


def test_a_staging_directory_is_made_once_and_not_where_the_final_name_is_taken(rundir: RunDirectory) -> None:
    assert rundir.create_staging(_record(1)).is_dir()
    with pytest.raises(FileExistsError):
        rundir.create_staging(_record(1))
    (rundir.path / "checkpoint" / "step-6").symlink_to("nowhere")
    with pytest.raises(UnsafePath, match="never deletes or replaces what it did not write"):
        rundir.create_staging(_record(2, 6))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda d: (d / "surprise").touch(), "unknown: surprise"),
        (lambda d: (d / ".metadata").unlink(), "missing: .metadata"),
        (lambda d: (d / ".metadata").write_bytes(b"short" * 3), "size: .metadata"),
    ],
    ids=["unknown", "missing", "size"],
)
def test_only_a_directory_that_holds_exactly_what_was_reported_is_sealed(
    rundir: RunDirectory, change: Any, word: str
) -> None:
    record = _record(1)
    staging = rundir.create_staging(record)
    files = _fill(staging, FILES)
    change(staging)
    with pytest.raises(CorruptCheckpoint) as caught:
        rundir.seal(record, _manifest(record, files))
    assert any(text.startswith(word) for text in caught.value.mismatches)
    assert not (staging / MANIFEST_NAME).exists()


def test_the_seal_is_the_digest_of_the_manifest_that_is_found_later(rundir: RunDirectory) -> None:
    record = _record(1)
    staging = rundir.create_staging(record)
    manifest = _manifest(record, _fill(staging, FILES))
    digest = rundir.seal(record, manifest)
    rundir.publish(record, None)
    found, found_digest = rundir.read_manifest(record.directory)
    assert (found.to_json(), found_digest) == (manifest.to_json(), digest)


@pytest.mark.parametrize("occupant", ["full", "empty", "file", "link", "dangling", "other-attempt"])
def test_publishing_never_goes_over_something_that_exists(rundir: RunDirectory, occupant: str) -> None:
    record = _record(2)
    _stage(rundir, record)
    final = rundir.path / record.directory
    if occupant == "other-attempt":
        other = dataclasses.replace(_record(1), directory="checkpoint/step-9")
        _publish(rundir, other)
        (rundir.path / other.directory).rename(final)
    elif occupant in ("full", "empty"):
        final.mkdir()
        if occupant == "full":
            (final / "mine").touch()
    elif occupant == "file":
        final.write_text("mine")
    else:
        final.symlink_to("." if occupant == "link" else "nowhere")
    inode = final.lstat().st_ino
    with pytest.raises(UnsafePath, match="taken"):
        rundir.publish(record, None)
    assert final.lstat().st_ino == inode
    assert (rundir.path / record.staging_directory).is_dir()


def test_publishing_twice_is_publishing_once(rundir: RunDirectory) -> None:
    record = _publish(rundir, _record(1))
    before = (rundir.path / record.directory).stat().st_ino
    rundir.publish(record, None)
    assert (rundir.path / record.directory).stat().st_ino == before
    assert _names(rundir) == ["step-5"]


def test_an_overwrite_swaps_the_new_one_in_and_sets_the_old_one_aside_unharmed(rundir: RunDirectory) -> None:
    old = _publish(rundir, _record(1), {"f": b"old"})
    new = _record(2, overwrites=1)
    _stage(rundir, new, {"f": b"new"})
    rundir.publish(new, old)
    assert (rundir.path / new.directory / "f").read_bytes() == b"new"
    assert (rundir.path / old.retired_directory / "f").read_bytes() == b"old"
    rundir.publish(new, old)
    rundir.retire(old)
    assert _names(rundir) == ["step-5"]
    assert (rundir.path / new.directory / "f").read_bytes() == b"new"


@pytest.mark.parametrize("crashed_after", ["exchange", "set-aside"])
def test_an_overwrite_that_a_crash_cut_is_finished(rundir: RunDirectory, crashed_after: str) -> None:
    old = _publish(rundir, _record(1), {"f": b"old"})
    new = _record(2, overwrites=1)
    _stage(rundir, new, {"f": b"new"})
    final, staging = rundir.path / new.directory, rundir.path / new.staging_directory
    if crashed_after == "exchange":
        final.rename(rundir.path / "x")
        staging.rename(final)
        (rundir.path / "x").rename(staging)
    else:
        final.rename(rundir.path / old.retired_directory)
    rundir.publish(new, old)
    assert (final / "f").read_bytes() == b"new"
    assert (rundir.path / old.retired_directory / "f").read_bytes() == b"old"
    assert _names(rundir) == sorted(["step-5", Path(old.retired_directory).name])


def test_an_overwrite_given_up_puts_the_old_one_back_and_never_over_something(rundir: RunDirectory) -> None:
    old = _publish(rundir, _record(1), {"f": b"old"})
    (rundir.path / old.directory).rename(rundir.path / old.retired_directory)
    rundir.restore(old, old.retired_directory)
    assert (rundir.path / old.directory / "f").read_bytes() == b"old"
    (rundir.path / old.directory).rename(rundir.path / old.retired_directory)
    (rundir.path / old.directory).mkdir()
    with pytest.raises(FileExistsError):
        rundir.restore(old, old.retired_directory)


def test_retiring_takes_the_final_name_first_and_only_from_its_own(rundir: RunDirectory) -> None:
    record = _publish(rundir, _record(1))
    rundir.retire(record)
    rundir.retire(record)
    assert _names(rundir) == []
    other = _publish(rundir, _record(2))
    rundir.retire(record)
    assert _names(rundir) == ["step-5"], "another attempt of the same step stands there now"
    (rundir.path / other.directory / MANIFEST_NAME).unlink()
    rundir.retire(other)
    assert _names(rundir) == ["step-5"], "nobody knows whose that is"
    half = _record(3, 6)
    (rundir.path / half.retired_directory).mkdir()
    (rundir.path / half.retired_directory / "rest").touch()
    rundir.retire(half)
    assert _names(rundir) == ["step-5"]


def test_retiring_sets_aside_what_has_rotted_so_that_its_step_can_be_saved_again(rundir: RunDirectory) -> None:
    record = _publish(rundir, _record(1), {"f": b"bytes"})
    (rundir.path / record.directory / MANIFEST_NAME).write_bytes(b"{")
    rundir.retire(record)
    rundir.retire(record)
    aside = Path(record.staging_directory).name.replace("incomplete", "quarantined")
    assert _names(rundir) == [aside]
    assert (rundir.path / "checkpoint" / aside / "f").read_bytes() == b"bytes"
    rundir.create_staging(_record(2))


def test_retiring_waits_for_a_disk_that_cannot_be_read(rundir: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    record = _publish(rundir, _record(1))
    with monkeypatch.context() as patch:
        patch.setattr(reach, "read", _refused)
        with pytest.raises(OSError, match="Input/output"):
            rundir.retire(record)
        (found,) = rundir.listing(["checkpoint"])
        assert (found.unreadable, found.holds) == (True, None)
    assert _names(rundir) == ["step-5"]
    rundir.retire(record)
    assert _names(rundir) == []


def _refused(path: Path, limit: int) -> bytes:
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


@pytest.mark.parametrize(
    "name",
    ["step-5", "notes", "hf-latest", ".step-5.e1.a1.quarantined", ".step-5.e1.a1.incomplete.bak", "ckptmgr.json"],
)
def test_only_staging_and_retired_names_are_removed(rundir: RunDirectory, name: str) -> None:
    (rundir.path / "checkpoint" / name).mkdir(parents=True)
    with pytest.raises(UnsafePath, match="refusing"):
        rundir.remove(f"checkpoint/{name}")
    assert _names(rundir) == [name]
    for working in (".step-5.e1.a1.incomplete", ".step-5.e1.a1.retired"):
        (rundir.path / "checkpoint" / working).mkdir()
        rundir.remove(f"checkpoint/{working}")
        rundir.remove(f"checkpoint/{working}")
    assert _names(rundir) == [name]
    rundir.remove("never-was/.step-5.e1.a1.retired")


def test_what_is_set_aside_gets_a_name_nobody_resumes_from_each_its_own(rundir: RunDirectory) -> None:
    record = _publish(rundir, _record(1))
    _stage(rundir, dataclasses.replace(record, directory="checkpoint/step-99"))
    (rundir.path / "checkpoint" / "link").symlink_to("nowhere")
    names = [
        rundir.quarantine(record.directory, record),
        rundir.quarantine(record.staging_directory, record),
        rundir.quarantine("checkpoint/link", record),
    ]
    assert len(set(names)) == 3
    found = rundir.listing(["checkpoint"])
    assert [item.kind for item in found] == [FoundKind.QUARANTINED] * 3
    assert (rundir.path / names[0] / ".metadata").read_bytes() == b"meta", "set aside means kept"


# -- projections ---------------------------------------------------------------------------------------------


def test_meta_lists_every_series_oldest_commit_first(rundir: RunDirectory) -> None:
    live = [_record(3, 30, commit_seq=1), _record(1, 10, commit_seq=2), _record(2, 20, series="snap", commit_seq=3)]
    rundir.write_meta(RUN_ID, live, ["checkpoint", "hf"])
    assert json.loads((rundir.path / META_NAME).read_text()) == {
        "run_id": RUN_ID,
        "checkpoint_list": ["checkpoint/step-30", "checkpoint/step-10"],
        "hf_list": [],
        "snap_list": ["snap/step-20"],
    }
    inode = (rundir.path / META_NAME).stat().st_ino
    rundir.write_meta(RUN_ID, live, ["checkpoint", "hf"])
    assert (rundir.path / META_NAME).stat().st_ino == inode, "what is right is not written again"


def test_the_latest_link_is_swapped_and_never_takes_the_place_of_something_else(rundir: RunDirectory) -> None:
    for attempt, step in ((1, 1), (2, 2)):
        record = _publish(rundir, _record(attempt, step, "hf", format=Format.HUGGINGFACE))
        rundir.point_latest("hf", record)
        assert (rundir.path / "hf" / LATEST_NAME).readlink() == Path(f"hf-{step}")
    rundir.point_latest("hf", None)
    assert _names(rundir, "hf") == ["hf-1", "hf-2"]
    (rundir.path / "hf" / LATEST_NAME).mkdir()
    with pytest.raises(UnsafePath, match="not a link"):
        rundir.point_latest("hf", _record(2, 2, "hf", format=Format.HUGGINGFACE))
    assert (rundir.path / "hf" / LATEST_NAME).is_dir()
