"""One rank of several cannot do its part: every rank hears the same, at the same poll, and the next save works."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from rank_processes import Here, on_ranks, run_on_ranks, start_ranks
from saving_ranks import (
    assert_failed,
    hear_alike,
    journal_records,
    manager_on,
    poll_until_failure,
    rows,
    timeouts,
    waits_for_its_writer,
)

from ckptmgr import DCP, CheckpointManager, CheckpointState, HuggingFace, PerRank, SaveFailed, Series, durable
from ckptmgr.errors import InvalidArgument, RanksDisagree, RunLocked, SetupFailed
from ckptmgr.rundir import RunDirectory

HOST = socket.gethostname()


def _state(here: Here, size: int = 20_000) -> dict[str, Any]:
    """Something that every rank has a part of: a plain tensor per rank, per-rank state, a number."""
    return {f"part-{here.rank}": torch.full((size,), float(here.rank)), "own": PerRank(here.rank), "step": 0}


def _nothing_in_flight_on_disk(here: Here) -> None:
    left = [path.name for path in (here.run_dir / "checkpoint").iterdir() if path.name.startswith(".")]
    assert not left, f"a failed save left {left}"


def _fails_and_recovers(
    here: Here, manager: CheckpointManager, step: int, victim: int, sabotage: Callable[[int], Iterator[None]]
) -> SaveFailed:
    """
    Save one that fails on *victim*, hear of it alike, save the next one, which commits.

    *sabotage* gets the pid of the victim's writer; it yields where the save is called and where its failure is heard.
    """
    doing: Iterator[None] = iter(())
    if here.rank == victim:
        assert manager.writer_pid is not None
        doing = sabotage(manager.writer_pid)
    next(doing, None)
    pending = manager.save(step, _state(here))
    assert pending is not None
    next(doing, None)
    failure = hear_alike(here, manager)
    next(doing, None)
    assert (failure.series, failure.step) == ("checkpoint", step)
    assert [f.rank for f in failure.failures] == [victim]
    assert failure.failures[0].host == HOST
    assert pending.state is CheckpointState.FAILED
    manager.poll()  # told once, not again
    here.meet()
    _commits(here, manager, step + 1)
    manager.poll()
    return failure


def _commits(here: Here, manager: CheckpointManager, step: int) -> None:
    good = manager.save(step, _state(here))
    assert good is not None
    good.wait()
    assert good.state is CheckpointState.COMMITTED


def _kill_while_it_writes(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    waits = waits_for_its_writer()
    yield
    # A writer that dies idle is replaced without a word; this one must have its job.
    assert waits.wait(20)
    os.kill(pid, signal.SIGKILL)


def _let_it_hang(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    yield


def _no_room(pid: int) -> Iterator[None]:
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    yield
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@on_ranks(2)
def test_a_killed_writer_fails_its_save_on_every_rank_and_the_next_commits(here: Here) -> None:
    with manager_on(here) as manager:
        for step, victim in ((1, 1), (11, 0)):
            failure = _fails_and_recovers(here, manager, step, victim, _kill_while_it_writes)
            assert "signal 9" in failure.failures[0].cause
            assert not failure.failures[0].silent
    if here.is_leader:
        found = rows(here)
        assert_failed(found[1], 1, "the writer process died (signal 9)", HOST)
        assert_failed(found[11], 0, "the writer process died (signal 9)", HOST)
        assert [found[step].state for step in (2, 12)] == [CheckpointState.COMMITTED] * 2
        _nothing_in_flight_on_disk(here)


@on_ranks(4)
def test_with_four_ranks_the_failed_one_is_named_and_all_hear_at_the_same_poll(here: Here) -> None:
    with manager_on(here) as manager:
        failure = _fails_and_recovers(here, manager, 1, 2, _kill_while_it_writes)
    assert [f.rank for f in failure.failures] == [2]
    if here.is_leader:
        assert_failed(rows(here)[1], 2, "signal 9", HOST)
        assert rows(here)[2].world_size == 4


@on_ranks(2)
def test_a_writer_that_hangs_is_ended_after_write_s(here: Here) -> None:
    with manager_on(here, wait=timeouts(write_s=1.0)) as manager:
        # The first save of a series has the writer map its memory, later ones do not: both waits must end.
        for step, victim in ((1, 1), (11, 0), (21, 1)):
            before = manager.writer_pid
            failure = _fails_and_recovers(here, manager, step, victim, _let_it_hang)
            assert "did not answer within" in failure.failures[0].cause
            assert (manager.writer_pid != before) == (here.rank == victim), "only the hung writer is replaced"
    if here.is_leader:
        assert_failed(rows(here)[1], 1, "did not answer", HOST)
        _nothing_in_flight_on_disk(here)


@on_ranks(2)
def test_a_full_disk_on_one_rank_fails_the_save_there_and_nothing_is_published(here: Here) -> None:
    with manager_on(here) as manager:
        for step, victim in ((1, 1), (11, 0)):
            failure = _fails_and_recovers(here, manager, step, victim, _no_room)
            assert "File too large" in failure.failures[0].cause
            assert f"__{victim}_0.distcp" in failure.failures[0].cause, "the cause names the file"
    if here.is_leader:
        assert_failed(rows(here)[1], 1, "File too large", HOST)
        assert sorted(path.name for path in (here.run_dir / "checkpoint").iterdir()) == ["step-12", "step-2"]


def _no_descriptor_left(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 1, before[1])
    )
    held = []
    with contextlib.suppress(OSError):
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    yield
    yield
    for descriptor in held:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@on_ranks(2)
def test_a_trainer_without_a_descriptor_for_a_new_writer_says_so_to_every_rank(here: Here) -> None:
    with manager_on(here) as manager:
        _commits(here, manager, 1)  # Python opens files of its own when it does something for the first time.
        failure = _fails_and_recovers(here, manager, 2, 1, _no_descriptor_left)
        assert "Too many open files" in failure.failures[0].cause
        assert not failure.failures[0].silent


@on_ranks(2)
def test_a_link_in_the_place_of_a_series_fails_the_save_alike_on_every_rank(here: Here) -> None:
    series, real = here.run_dir / "checkpoint", here.run_dir / "real"
    with manager_on(here) as manager:
        _commits(here, manager, 1)
        here.meet()
        if here.is_leader:
            series.rename(real)
            series.symlink_to("real")
        here.meet()
        manager.save(2, _state(here))
        failure = hear_alike(here, manager)
        assert [f.rank for f in failure.failures] == [0]
        assert "is a link" in failure.failures[0].cause
        here.meet()
        if here.is_leader:
            series.unlink()
            real.rename(series)
        here.meet()
        _commits(here, manager, 3)


class _Unsafe:
    """Nothing that could be read back without running code."""


@on_ranks(2)
def test_a_value_that_one_rank_cannot_store_is_refused_on_every_rank(here: Here) -> None:
    with manager_on(here) as manager:
        for step, name in ((1, "own"), (2, "step")):
            state = _state(here)
            if here.rank == 1:
                state[name] = PerRank(_Unsafe()) if name == "own" else _Unsafe()
            with pytest.raises(InvalidArgument, match="cannot be stored safely"):
                manager.save(step, state)
        _commits(here, manager, 1)
    if here.is_leader:
        assert len(rows(here)) == 1, "a refused save leaves no row"


@on_ranks(2)
def test_a_state_that_one_rank_cannot_take_is_refused_on_every_rank_and_leaves_no_row(here: Here) -> None:
    with manager_on(here) as manager:
        bad: dict[Any, Any] = _state(here)
        if here.rank == 1:
            bad[7] = "no text for a name"
        with pytest.raises(InvalidArgument, match="the name 7"):
            manager.save(1, bad)
        _commits(here, manager, 1)
    if here.is_leader:
        assert len(rows(here)) == 1


def _one_trainer_stops(here: Here, victim: int) -> list[Any]:
    with manager_on(here, wait=timeouts(write_s=3.0, gather_s=1.0)) as manager:
        _commits(here, manager, 1)
        assert manager.writer_pid is not None
        if here.rank == victim:
            # Its writer stops first, so that the trainer cannot have reported when it stops too.
            os.kill(manager.writer_pid, signal.SIGSTOP)
        waits = waits_for_its_writer()
        manager.save(2, _state(here))
        if here.rank == victim:
            assert waits.wait(20)
            here.tell("victim", [os.getpid(), manager.writer_pid])
        count, failure = poll_until_failure(here, manager)
        here.meet()
        _commits(here, manager, 3)
        manager.poll()
        return [count, [[f.rank, f.host, f.cause, f.silent] for f in failure.failures]]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_trainer_that_stops_is_named_silent_on_every_rank_and_the_next_save_commits(
    tmp_path: Path, world_size: int
) -> None:
    with start_ranks(world_size, _one_trainer_stops, tmp_path, victim=1) as world:
        trainer, writer = world.here.ask("victim")
        os.kill(trainer, signal.SIGSTOP)
        time.sleep(6.0)
        os.kill(writer, signal.SIGCONT)
        os.kill(trainer, signal.SIGCONT)
        told = world.join(40)
    for _, failures in told:
        assert failures == told[0][1], f"the ranks heard different failures: {told}"
    ((rank, host, cause, silent),) = told[0][1]
    assert (rank, host, silent) == (1, HOST, True)
    assert "silent" in cause
    others = [count for rank, (count, _) in enumerate(told) if rank != 1]
    assert len(set(others)) == 1, f"ranks that did not stop heard at different polls: {others}"
    found = rows(world.here)
    assert_failed(found[2], 1, "silent", HOST)
    assert found[3].state is CheckpointState.COMMITTED


def _long_report_and_one_stops(here: Here) -> list[Any]:
    # Thousands of small values make every rank's report longer than one message frame.
    state = _state(here) | {f"values-{here.rank}": {f"k{i}": i for i in range(3000)}}
    with manager_on(here, wait=timeouts(write_s=2.0, gather_s=1.0)) as manager:
        first = manager.save(1, state)
        assert first is not None
        first.wait()
        if here.rank == 1:
            assert manager.writer_pid is not None
            os.kill(manager.writer_pid, signal.SIGSTOP)
        waits = waits_for_its_writer()
        manager.save(2, state)
        if here.rank == 1:
            assert waits.wait(20)
            here.tell("victim", [os.getpid(), manager.writer_pid])
        _, failure = poll_until_failure(here, manager)
        here.meet()
        return [f.rank for f in failure.failures]


def test_a_silent_rank_takes_no_other_along_even_where_reports_are_long(tmp_path: Path) -> None:
    with start_ranks(3, _long_report_and_one_stops, tmp_path) as world:
        trainer, writer = world.here.ask("victim")
        os.kill(trainer, signal.SIGSTOP)
        time.sleep(5.0)
        os.kill(writer, signal.SIGCONT)
        os.kill(trainer, signal.SIGCONT)
        told = world.join(40)
    assert told[0] == [1], "rank 0 blames ranks that had reported"
    assert told[2] == [1], "rank 2 heard something else than rank 0"


def _stop_self_at(name: str) -> None:
    """Let this process stop for good before its next durable call of that name, as on a machine that freezes there."""
    real = getattr(durable, name)

    def stop(*arguments: Any) -> Any:
        setattr(durable, name, real)
        os.kill(os.getpid(), signal.SIGSTOP)
        return real(*arguments)

    setattr(durable, name, stop)


def _leader_stops_in_commit(here: Here, at: str) -> list[Any]:
    with manager_on(here, wait=timeouts(write_s=1.0, gather_s=1.0, collective_s=12.0), on_failure="warn") as manager:
        _commits(here, manager, 1)
        if here.is_leader:
            _stop_self_at(at)
        pending = manager.save(2, _state(here))
        assert pending is not None
        outcome = "COMMITTED"
        try:
            pending.wait(30)
        except SaveFailed:
            outcome = "FAILED"
        here.meet()
        _commits(here, manager, 3)
        return [outcome]


@pytest.mark.parametrize("at", ["sync_directories", "rename_new"])
def test_when_rank_0_stops_on_its_way_to_the_commit_all_ranks_say_what_the_journal_says(
    tmp_path: Path, at: str
) -> None:
    with start_ranks(2, _leader_stops_in_commit, tmp_path, at=at) as world:
        deadline = time.monotonic() + 60
        while psutil.Process(world.pid(0)).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline, "rank 0 does not stop"
            time.sleep(0.05)
        time.sleep(5.0)  # the other rank has given up by then
        world.signal(0, signal.SIGCONT)
        told = world.join(60)
    state = rows(world.here)[2].state
    assert told == [[str(state)], [str(state)]], f"the journal says {state}, the ranks {told}"


def _leader_stops(here: Here, waiting_for: int) -> list[Any]:
    with manager_on(here, wait=timeouts(write_s=1.0, gather_s=1.0, collective_s=12.0), on_failure="warn") as manager:
        _commits(here, manager, 1)
        assert manager.writer_pid is not None
        if here.rank == waiting_for:
            os.kill(manager.writer_pid, signal.SIGSTOP)
        waits = waits_for_its_writer()
        pending = manager.save(2, _state(here))
        assert pending is not None
        assert waits.wait(20)
        here.tell(f"pids-{here.rank}", [os.getpid(), manager.writer_pid])
        outcome = "COMMITTED"
        try:
            pending.wait(30)
        except SaveFailed as failure:
            outcome = f"FAILED {[[f.rank, f.silent] for f in failure.failures]}"
        here.meet()
        _commits(here, manager, 3)
        return [outcome]


@pytest.mark.parametrize("waiting_for", [0, 1])
def test_when_rank_0_stops_the_ranks_still_agree_on_what_became_of_the_save(tmp_path: Path, waiting_for: int) -> None:
    with start_ranks(2, _leader_stops, tmp_path, waiting_for=waiting_for) as world:
        pids = [world.here.ask(f"pids-{rank}") for rank in (0, 1)]
        time.sleep(0.5)  # rank 0 waits for its own writer, or has heard from it and waits for rank 1's report
        world.signal(0, signal.SIGSTOP)
        os.kill(pids[waiting_for][1], signal.SIGCONT)
        time.sleep(5.0)
        world.signal(0, signal.SIGCONT)
        told = world.join(60)
    state = rows(world.here)[2].state
    assert all(outcome.startswith(str(state)) for (outcome,) in told), f"the journal says {state}, the ranks {told}"


def _one_trainer_dies(here: Here, victim: int) -> list[Any]:
    manager = manager_on(here, wait=timeouts(close_on_error_s=3.0))
    with pytest.raises(SaveFailed) as caught, manager:  # noqa: PT012 - leaving the block is what is tested
        _commits(here, manager, 1)
        assert manager.writer_pid is not None
        if here.rank == victim:
            os.kill(manager.writer_pid, signal.SIGSTOP)
        waits = waits_for_its_writer()
        manager.save(2, _state(here))
        assert waits.wait(20)
        here.meet()
        if here.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        _, failure = poll_until_failure(here, manager, 15.0)
        took = time.monotonic() - began
        raise failure
    closed = time.monotonic() - began
    dist.destroy_process_group()
    return [took, closed, [[f.rank, f.silent] for f in caught.value.failures]]


def _start_again(here: Here) -> None:
    with manager_on(here) as manager:
        resumed = manager.resume({"step": None})
        assert resumed is not None
        assert resumed.step == 1
        _commits(here, manager, 2)


@pytest.mark.parametrize("victim", [1, 0])
def test_a_trainer_that_is_killed_is_noticed_at_once_and_the_rest_can_close(tmp_path: Path, victim: int) -> None:
    with start_ranks(3, _one_trainer_dies, tmp_path, victim=victim) as world:
        told = world.join(40, dead=[victim])
    for rank in {0, 1, 2} - {victim}:
        took, closed, failures = told[rank]
        assert failures == [[victim, True]]
        assert took < 10, "a dead rank must not be waited for as long as a silent one"
        assert closed < 20
    found = rows(world.here)[2]
    if victim == 0:
        assert found.state is CheckpointState.WRITING, "only rank 0 writes the journal"
    else:
        assert found.state is CheckpointState.FAILED
        assert [entry["rank"] for entry in found.failures] == [1]
    assert not (world.here.run_dir / "checkpoint" / "step-2").exists()
    run_on_ranks(2, _start_again, tmp_path)
    states = [record.state for record in journal_records(world.here) if record.step == 2]
    assert states == [CheckpointState.FAILED, CheckpointState.COMMITTED]
    _nothing_in_flight_on_disk(world.here)


@on_ranks(2)
def test_one_rank_that_leaves_on_an_exception_does_not_hang_the_others(here: Here) -> None:
    began = time.monotonic()
    expected = ZeroDivisionError if here.rank == 1 else RanksDisagree
    with pytest.raises(expected), manager_on(here) as manager:  # noqa: PT012 - leaving the block is what is tested
        _commits(here, manager, 1)
        if here.rank == 1:
            raise ZeroDivisionError
        manager.save(2, _state(here))
    assert time.monotonic() - began < 15


@on_ranks(2)
def test_a_forked_child_that_leaves_the_block_takes_nothing_down(here: Here) -> None:
    """It has none of the threads, and the connections to the other ranks are its parent's."""
    with manager_on(here) as manager:
        pending = manager.save(1, _state(here))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that forking with threads is risky
            child = os.fork()
        if child == 0:
            manager.__exit__(SystemExit, SystemExit(), None)
            os._exit(42)
        deadline = time.monotonic() + 8
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        if ended == (0, 0):
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
        assert pending is not None
        pending.wait()
        _commits(here, manager, 2)
    assert os.waitstatus_to_exitcode(ended[1]) == 42


@on_ranks(2)
def test_ranks_that_save_different_things_are_told_so_and_can_go_on(here: Here) -> None:
    with manager_on(here) as manager:
        state = {"t": torch.zeros(4)}
        with pytest.raises(RanksDisagree) as caught:
            manager.save(1 + here.rank, state)
        assert [f"save({1 + rank}, series='checkpoint', overwrite=False)" for rank in (0, 1)] == list(
            caught.value.values
        )
        with pytest.raises(RanksDisagree):
            manager.save(1, state, series=["checkpoint", "hf"][here.rank])
        with pytest.raises(RanksDisagree):
            manager.save(1, state, overwrite=here.rank == 1)
        good = manager.save(1, state)
        assert good is not None
        good.wait()
        assert good.state is CheckpointState.COMMITTED
    if here.is_leader:
        assert [(r.step, r.state) for r in rows(here).values()] == [(1, CheckpointState.COMMITTED)]


@on_ranks(2)
def test_a_bad_argument_on_one_rank_is_refused_on_every_rank_at_the_same_call(here: Here) -> None:
    """Nobody waits for a rank that has raised, and the calls that follow are the same ones again."""
    state = {"t": torch.zeros(4)}
    bad = here.rank == 1
    began = time.monotonic()
    with manager_on(here, wait=timeouts(collective_s=60)) as manager:
        for call in (
            lambda: manager.save(-1 if bad else 1, state),
            lambda: manager.save(10**30 if bad else 1, state),
            lambda: manager.save(1, state, series="nonsense" if bad else "checkpoint"),
            lambda: manager.save(1, state, when_busy="never" if bad else "wait"),  # type: ignore[arg-type]
            lambda: manager.warm_up(state, "nonsense" if bad else "checkpoint"),
            lambda: manager.resume(state, step="1" if bad else None),  # type: ignore[arg-type]
            lambda: manager.resume(state, series="nonsense" if bad else "checkpoint"),
            lambda: manager.resume({} if bad else state),
        ):
            with pytest.raises(InvalidArgument):
                call()
        with pytest.raises(InvalidArgument, match="finite"):
            manager.save(1, state, metrics={"loss": float("nan") if here.is_leader else 1.0})
        nothing = torch.empty((), device="meta")  # PyTorch refuses to make a number of it with a RuntimeError
        with pytest.raises(InvalidArgument, match="finite"):
            manager.save(1, state, metrics={"loss": nothing if here.is_leader else 1.0})  # type: ignore[dict-item]
        with pytest.raises(InvalidArgument, match="whole number"):
            manager.save(nothing.long() if bad else 1, state)  # type: ignore[arg-type]
        # Rank 0's metrics are the ones that count, so nobody looks at these.
        _commits(here, manager, 1)
        good = manager.save(2, state, metrics={"loss": float("nan") if bad else 1.0})
        assert good is not None
        good.wait()
    assert time.monotonic() - began < 30
    if here.is_leader:
        assert [dict(r.metrics) for r in rows(here).values()] == [{}, {"loss": 1.0}]


@on_ranks(2)
def test_different_calls_and_different_arguments_are_told_and_the_ranks_can_go_on(here: Here) -> None:
    state = {"t": torch.zeros(4)}
    with manager_on(here) as manager:
        with pytest.raises(RanksDisagree, match="save, resume") as caught:
            manager.save(1, state) if here.is_leader else manager.resume(state)
        assert caught.value.values == ("save", "resume")
        with pytest.raises(RanksDisagree):
            manager.warm_up(state) if here.is_leader else manager.save(1, state)
        with pytest.raises(RanksDisagree) as caught:
            manager.resume(state, step=here.rank or None, verify_digests=True)
        assert caught.value.values == (
            "resume(series='checkpoint', allow_older=False, verify_digests=True)",
            "resume(1, series='checkpoint', allow_older=False, verify_digests=True)",
        )
        with pytest.raises(RanksDisagree) as caught:
            manager.resume(state, verify_digests="meanwhile" if here.rank else True)
        assert caught.value.values == (
            "resume(series='checkpoint', allow_older=False, verify_digests=True)",
            "resume(series='checkpoint', allow_older=False, verify_digests='meanwhile')",
        )
        _commits(here, manager, 1)
        assert manager.resume(_state(here)) is not None


@on_ranks(2)
def test_a_constructor_with_other_arguments_on_one_rank_fails_on_every_rank(here: Here) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidArgument, match="on_failure"):
        CheckpointManager(here.run_dir, on_failure="ignore" if here.rank else "raise")  # type: ignore[arg-type]
    for options in (
        {"series": [Series("a" if here.rank else "b", DCP())]},
        {"series": [Series("a", DCP() if here.rank else HuggingFace())]},
        {"on_failure": "warn" if here.rank else "raise"},
    ):
        with pytest.raises(RanksDisagree, match="different arguments"):
            CheckpointManager(here.run_dir, **options)  # type: ignore[arg-type]
    assert time.monotonic() - began < 30
    here.meet()
    manager_on(here).close()


@on_ranks(2)
def test_plain_values_that_differ_by_rank_are_told_and_the_lowest_ranks_are_stored(here: Here) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ckptmgr").addHandler(handler)
    with manager_on(here) as manager:
        pending = manager.save(1, {"step": here.rank + 5, "same": 3, "t": torch.zeros(2)})
        assert pending is not None
        pending.wait()
        state: dict[str, Any] = {"step": 0, "same": 0, "t": torch.ones(2)}
        manager.resume(state)
    assert (state["step"], state["same"]) == (5, 3)
    if here.is_leader:
        assert [line for line in said if line.startswith("step differs by rank")], said
        assert not [line for line in said if "same" in line]


@on_ranks(2)
def test_a_rank_that_does_not_come_to_save_is_an_error_in_time(here: Here) -> None:
    manager = manager_on(here, wait=timeouts(collective_s=1.5))
    began = time.monotonic()
    if here.rank == 0:
        with pytest.raises(RanksDisagree, match="not all ranks arrived"):
            manager.save(1, {"t": torch.zeros(4)})
        assert 1.0 < time.monotonic() - began < 8
    here.meet()
    manager.close()


@on_ranks(2)
def test_a_lock_that_is_held_is_the_same_error_on_every_rank(here: Here) -> None:
    other = RunDirectory(here.run_dir)
    if here.is_leader:
        other.acquire("another trainer")
    here.meet()
    with pytest.raises(RunLocked) as caught:
        manager_on(here)
    assert f"another trainer, pid {here.everyone('pid', os.getpid())[0]} on {HOST}, since " in caught.value.holder
    other.release()
    here.meet()
    manager_on(here).close()


@on_ranks(2)
def test_a_writer_that_cannot_start_on_one_rank_fails_the_constructor_with_that_rank_named(here: Here) -> None:
    real = sys.executable
    if here.rank == 1:
        sys.executable = "/nonexistent/python"
    with pytest.raises(SetupFailed) as caught:
        manager_on(here)
    assert [(f.rank, f.host) for f in caught.value.failures] == [(1, HOST)]
    assert "/nonexistent/python" in caught.value.failures[0].cause
    sys.executable = real
    here.meet()
    manager_on(here).close()


@on_ranks(2)
def test_a_failure_is_heard_by_the_next_save_and_by_close_too(here: Here) -> None:
    manager = manager_on(here)
    for step, victim in ((1, 1), (11, 0)):
        assert manager.writer_pid is not None
        doing = _kill_while_it_writes(manager.writer_pid) if here.rank == victim else iter(())
        next(doing, None)
        manager.save(step, _state(here))
        next(doing, None)
        with pytest.raises(SaveFailed, match=f"step {step} failed"):
            manager.save(step + 1, _state(here))
        _commits(here, manager, step + 2)
    assert manager.writer_pid is not None
    doing = _kill_while_it_writes(manager.writer_pid) if here.rank == 1 else iter(())
    next(doing, None)
    manager.save(31, _state(here))
    next(doing, None)
    with pytest.raises(SaveFailed, match="step 31 failed"):
        manager.close()
    manager.close()
    if here.is_leader:
        assert sorted(rows(here)) == [1, 3, 11, 13, 31], "a save that raises for an earlier one has not begun"


@on_ranks(2)
def test_waiting_raises_the_same_failure_on_every_rank_and_poll_does_not_repeat_it(here: Here) -> None:
    with manager_on(here) as manager:
        assert manager.writer_pid is not None
        doing = _kill_while_it_writes(manager.writer_pid) if here.rank == 1 else iter(())
        next(doing, None)
        pending = manager.save(1, _state(here))
        assert pending is not None
        assert not pending.done()
        next(doing, None)
        with pytest.raises(SaveFailed) as caught:
            pending.wait()
        assert here.everyone("rank", [f.rank for f in caught.value.failures]) == [[1], [1]]
        for _ in range(5):
            manager.poll()
        here.meet()
