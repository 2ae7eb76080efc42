"""The writer process from outside: how it starts, what it refuses, and how it ends whatever happens."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from ckptmgr.manifest import Digest
from ckptmgr.options import WriterOptions
from ckptmgr.writers.arena import Arena, Copy, Layout
from ckptmgr.writers.jobs import DigestJob, FileJob, Segment, WriteJob
from ckptmgr.writers.process import WriterProcess

SLOTS = f"ckptmgr-test-{os.getpid()}"


@pytest.fixture
def process():
    process = WriterProcess(WriterOptions(nice=0))
    yield process
    process.stop(0)


@pytest.fixture
def arena():
    arena = Arena(0)
    arena.adopt(Layout(64, (), (Copy("x", 0, torch.float32, (16,)),), ()))
    arena.capture({"x": torch.arange(16.0)})
    yield arena
    arena.close()


BYTES = torch.arange(16.0).numpy().tobytes()


def job(directory: Path, *files: FileJob, slots: int = 0, patience_s: float = 5) -> WriteJob:
    whole = (FileJob("x.bin", 64, own=True, segments=(Segment(0, 0, 64),)),)
    return WriteJob(str(directory), 0, files or whole, 2, SLOTS, slots, patience_s)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def assert_gone(pid: int, within_s: float = 3) -> None:
    deadline = time.monotonic() + within_s
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there after {within_s} s"
        time.sleep(0.005)


def test_a_writer_writes_what_the_arena_holds_and_digests_it(process, arena, tmp_path):
    assert process.share(arena, 30) is None
    answer = process.do(job(tmp_path), 10)

    assert answer.cause is None
    assert (tmp_path / "x.bin").read_bytes() == BYTES
    (entry,) = answer.files
    assert (entry.path, entry.size, entry.digest, entry.rank) == ("x.bin", 64, Digest(BYTES).text, 2)


@pytest.mark.parametrize("rate", [0, 320])
def test_a_writer_writes_no_faster_than_it_may(process, arena, tmp_path, rate):
    assert process.share(arena, 30) is None
    answer = process.do(dataclasses.replace(job(tmp_path), max_bytes_per_second=rate), 10)

    assert (tmp_path / "x.bin").read_bytes() == BYTES
    assert answer.write_s >= (64 / rate if rate else 0)


def test_a_writer_has_no_torch_in_it(process):
    assert process.start(30) is None
    maps = Path(f"/proc/{process.pid}/maps").read_text()

    assert "libpython" in maps or "python" in maps
    assert "torch" not in maps
    assert "numpy" not in maps


def test_a_writer_ignores_the_trainers_ctrl_c(process, arena, tmp_path):
    assert process.share(arena, 30) is None
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.1)

    assert process.do(job(tmp_path), 10).cause is None


def test_a_writer_ends_when_it_is_told_to(process):
    assert process.start(30) is None
    pid = process.pid
    process.stop(5)

    assert not Path(f"/proc/{pid}").exists()
    assert process.pid is None


def test_a_writer_ends_when_its_pipe_does(process):
    assert process.start(30) is None
    pid = process.pid
    process._pipe.close()

    assert_gone(pid)


TRAINER = """
    import os, sys, threading, time
    from ckptmgr.options import WriterOptions
    from ckptmgr.writers.process import WriterProcess
    process = WriterProcess(WriterOptions(nice=0))
    assert process.start(30) is None
    print(process.pid, flush=True)
    {then}
    time.sleep(60)
"""


@pytest.mark.parametrize(
    "then",
    [
        "os.kill(os.getpid(), 9)",
        "os._exit(3)",
        # A child that shares the pipe lives on; the pipe alone would not tell the writer.
        "os.fork() and os.kill(os.getpid(), 9)",
    ],
)
def test_a_writer_dies_with_its_trainer(then):
    code = textwrap.dedent(TRAINER).format(then=then)
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as trainer:
        pid = int(trainer.stdout.readline())
        try:
            trainer.wait(20)
            assert_gone(pid)
        finally:
            os.killpg(trainer.pid, signal.SIGKILL) if "fork" in then else None


def test_a_writer_dies_with_the_thread_that_started_it():
    """PR_SET_PDEATHSIG is per thread; the handle must be used by one that lives as long as the manager."""
    code = textwrap.dedent(
        """
        import threading, time
        from ckptmgr.options import WriterOptions
        from ckptmgr.writers.process import WriterProcess
        process = WriterProcess(WriterOptions(nice=0))
        thread = threading.Thread(target=process.start, args=(30,))
        thread.start(); thread.join()
        process._process.wait(10)
        print(process._process.returncode)
        """
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, timeout=60, check=True)

    assert done.stdout.split() == [b"-9"]


def test_a_writer_that_was_replaced_has_no_arena_and_says_so(process, arena, tmp_path):
    """The process dies between being asked to map the arena and being given the job: no bytes are invented."""
    assert process.share(arena, 30) is None
    os.kill(process.pid, signal.SIGKILL)
    process._process.wait(10)
    answer = process.do(job(tmp_path), 10)

    assert answer.cause is not None
    assert answer.files == ()
    # A process that never mapped it refuses as well.
    assert process.start(30) is None
    answer = process.do(job(tmp_path, FileJob("y.bin", 64, own=True, segments=(Segment(0, 0, 64),))), 10)
    assert answer.cause is not None
    assert answer.files == ()


def test_a_job_that_needs_more_than_the_arena_has_is_refused(process, arena, tmp_path):
    assert process.share(arena, 30) is None
    for segment in (Segment(0, 1, 64), Segment(0, 0, 16, count=5, stride=16), Segment(0, 64, 1)):
        answer = process.do(
            job(tmp_path, FileJob(f"{segment.length}-{segment.arena_offset}", 80, own=True, segments=(segment,))), 10
        )
        assert answer.cause is not None, segment


def test_a_writer_that_died_is_replaced_and_maps_again(process, arena, tmp_path):
    assert process.share(arena, 30) is None
    first = process.pid
    os.kill(first, signal.SIGKILL)
    process._process.wait(10)
    assert process.share(arena, 30) is None
    answer = process.do(job(tmp_path), 10)

    assert answer.cause is None
    assert process.pid != first
    assert (tmp_path / "x.bin").read_bytes() == BYTES


def takes_for_ever(path: Path) -> None:
    """A file without end, nearly, for a writer to read."""
    path.touch()
    os.truncate(path, 1 << 43)


def test_death_in_the_middle_of_a_job_is_an_answer_that_names_the_signal(process, arena, tmp_path):
    takes_for_ever(tmp_path / "stuck")
    assert process.share(arena, 30) is None
    pid = process.pid
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -9 {pid}"])
    answer = process.do(DigestJob(str(tmp_path), ("stuck",), 0), 20)
    killer.wait()

    assert "signal 9" in answer.cause
    assert process.pid is None
    assert process.share(arena, 30) is None
    assert process.do(job(tmp_path), 10).cause is None


def test_a_writer_that_does_not_answer_in_time_is_killed_and_replaced(process, arena, tmp_path):
    takes_for_ever(tmp_path / "stuck")
    assert process.share(arena, 30) is None
    pid = process.pid
    started = time.monotonic()
    answer = process.do(DigestJob(str(tmp_path), ("stuck",), 0), 0.3)

    assert "did not answer within 0.3 s" in answer.cause
    assert time.monotonic() - started < 5
    assert_gone(pid)
    assert process.share(arena, 30) is None
    assert process.do(job(tmp_path), 10).cause is None


def test_a_stopped_writer_is_killed_too(process):
    assert process.start(30) is None
    pid = process.pid
    os.kill(pid, signal.SIGSTOP)
    answer = process.do(DigestJob("/", (), 0), 0.3)

    assert "did not answer" in answer.cause
    assert_gone(pid)


def test_a_stopped_writer_that_does_not_take_a_long_job_is_killed_too(process, tmp_path):
    """The buffer between trainer and writer holds less than the job of a large state."""
    assert process.start(30) is None
    pid = process.pid
    os.kill(pid, signal.SIGSTOP)
    answer = process.do(job(tmp_path, FileJob("long", 1 << 20, own=True, data=bytes(1 << 20))), 0.3)

    assert "did not take its job within 0.3 s" in answer.cause
    assert_gone(pid)
    assert process.start(30) is None
    assert process.do(DigestJob(str(tmp_path), (), 0), 30).cause is None


def test_a_writer_that_stops_within_its_answer_is_killed_too(process, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    assert process.start(30) is None
    pid = process.pid

    def stop_it_halfway() -> None:
        assert process._pipe.poll(20)
        os.kill(pid, signal.SIGSTOP)

    answer = process.do(DigestJob(str(tmp_path), ("file",) * 10_000, 0), 3, meanwhile=stop_it_halfway)

    assert "did not answer within 3 s" in answer.cause
    assert_gone(pid)


def test_a_stopped_writer_is_killed_also_where_no_file_can_be_opened_any_more(process, tmp_path):
    assert process.start(30) is None
    pid = process.pid
    os.kill(pid, signal.SIGSTOP)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first = os.dup(0)
    opened = [first]
    killed = threading.Timer(20, os.kill, (pid, signal.SIGKILL))  # so that a failure does not take for ever
    killed.start()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (first + 20, hard))
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.dup(0))
        answer = process.do(DigestJob(str(tmp_path), (), 0), 0.3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in opened:
            os.close(descriptor)
        killed.cancel()

    assert answer.cause == "the writer process did not answer within 0.3 s"
    assert_gone(pid)


def test_a_default_timeout_of_the_sockets_of_the_training_is_none_of_the_writer(process, arena, tmp_path):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        assert process.share(arena, 30) is None
        answer = process.do(job(tmp_path), 10)
    finally:
        socket.setdefaulttimeout(before)

    assert answer.cause is None
    assert (tmp_path / "x.bin").read_bytes() == BYTES


@pytest.mark.parametrize("when", ["start", "do", "stop"])
def test_no_answer_is_taken_for_another_where_no_thread_can_be_started(process, tmp_path, monkeypatch, when):
    (tmp_path / "file").write_bytes(b"x")
    digest = DigestJob(str(tmp_path), ("file",), 0)
    if when != "start":
        assert process.start(30) is None

    def refuse(_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Timer, "start", refuse)
        if when == "start":
            assert "can't start new thread" in process.start(30)
        elif when == "do":
            assert "can't start new thread" in process.do(digest, 30).cause
        else:
            pid = process.pid
            process.stop(0.1)
            assert_gone(pid)
    assert process.pid is None
    assert process.start(30) is None
    assert [entry.path for entry in process.do(digest, 30).files] == ["file"]


def test_killing_from_another_thread_ends_the_wait(process, tmp_path):

    takes_for_ever(tmp_path / "stuck")
    assert process.start(30) is None
    threading.Timer(0.3, process.kill).start()
    started = time.monotonic()
    answer = process.do(DigestJob(str(tmp_path), ("stuck",), 0), 30)

    assert "died" in answer.cause
    assert time.monotonic() - started < 10


def test_an_error_of_the_disk_is_an_answer_with_the_file(process, arena, tmp_path):
    assert process.share(arena, 30) is None
    (tmp_path / "x.bin").write_bytes(b"somebody else's")
    answer = process.do(job(tmp_path), 10)

    assert "FileExistsError" in answer.cause
    assert "x.bin" in answer.cause
    assert (tmp_path / "x.bin").read_bytes() == b"somebody else's"
    assert process.do(job(tmp_path, FileJob("y.bin", 3, own=True, data=b"abc")), 10).cause is None


def test_a_link_in_the_place_of_a_file_is_not_followed(process, arena, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"v" * 64)
    (tmp_path / "x.bin").symlink_to(victim)
    assert process.share(arena, 30) is None
    own = process.do(job(tmp_path), 10)
    shared = process.do(job(tmp_path, FileJob("x.bin", 64, own=False, segments=(Segment(0, 0, 64),))), 10)

    assert own.cause is not None
    assert shared.cause is not None
    assert victim.read_bytes() == b"v" * 64


def test_parts_of_a_shared_file_land_where_they_belong(process, arena, tmp_path):
    (tmp_path / "shared").write_bytes(b"." * 40)
    assert process.share(arena, 30) is None
    comb = Segment(file_offset=8, arena_offset=4, length=4, count=3, stride=8)
    answer = process.do(job(tmp_path, FileJob("shared", 40, own=False, segments=(comb,))), 10)

    assert answer.cause is None
    assert answer.files == ()
    expected = bytearray(b"." * 40)
    for index in range(3):
        expected[8 + 8 * index : 12 + 8 * index] = BYTES[4 + 4 * index : 8 + 4 * index]
    assert (tmp_path / "shared").read_bytes() == bytes(expected)


def test_files_read_back_have_the_digest_of_what_is_on_disk(process, tmp_path):
    big = os.urandom((8 << 20) + 17)
    (tmp_path / "big").write_bytes(big)
    (tmp_path / "empty").write_bytes(b"")
    assert process.start(30) is None
    answer = process.do(DigestJob(str(tmp_path), ("big", "empty"), 5), 30)

    assert [(file.path, file.size, file.digest, file.rank) for file in answer.files] == [
        ("big", len(big), Digest(big).text, 5),
        ("empty", 0, Digest().text, 5),
    ]


def test_no_more_writers_than_slots_write_at_once(arena, tmp_path):
    """A slot is held by the process that writes; whoever waits too long fails, and a dead holder frees it."""
    first, second = WriterProcess(WriterOptions(nice=0)), WriterProcess(WriterOptions(nice=0))
    import socket

    try:
        assert first.share(arena, 30) is None
        assert second.share(arena, 30) is None
        with socket.socket(socket.AF_UNIX) as other:
            other.bind("\0" + f"{SLOTS}-0")
            for name in ("one", "two"):
                (tmp_path / name).mkdir()
            refused = first.do(job(tmp_path / "one", slots=1, patience_s=0.2), 10)
            free = second.do(job(tmp_path / "two", slots=2, patience_s=0.2), 10)

        assert "no write slot was free within 0.2 s" in refused.cause
        assert list((tmp_path / "one").iterdir()) == []
        assert free.cause is None
        assert first.do(job(tmp_path / "one", slots=1, patience_s=0.2), 10).cause is None
    finally:
        first.stop(0)
        second.stop(0)


def test_an_arena_that_grew_is_mapped_anew(process, tmp_path):
    arena = Arena(0)
    try:
        for size in (16, 4096):
            tensor = torch.arange(float(size))
            arena.adopt(Layout(4 * size, (), (Copy("x", 0, torch.float32, (size,)),), ()))
            arena.capture({"x": tensor})
            assert process.share(arena, 30) is None
            name = f"{size}.bin"
            answer = process.do(
                job(tmp_path, FileJob(name, 4 * size, own=True, segments=(Segment(0, 0, 4 * size),))), 10
            )
            assert answer.cause is None
            assert (tmp_path / name).read_bytes() == tensor.numpy().tobytes()
    finally:
        arena.close()


def test_a_writer_is_as_nice_as_it_is_told_to_be():
    process = WriterProcess(WriterOptions(nice=7, io_class="idle"))
    try:
        assert process.start(30) is None
        import psutil

        assert psutil.Process(process.pid).nice() == psutil.Process().nice() + 7
        assert psutil.Process(process.pid).ionice().ioclass == psutil.IOPRIO_CLASS_IDLE
    finally:
        process.stop(0)


def test_a_writer_imports_nothing_from_the_working_directory(tmp_path, monkeypatch, process):
    (tmp_path / "mmap.py").write_text("raise RuntimeError('imported from the working directory')")
    (tmp_path / "xxhash.py").write_text("raise RuntimeError('imported from the working directory')")
    monkeypatch.chdir(tmp_path)

    assert process.start(30) is None
