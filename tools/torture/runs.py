"""
What the processes under torture do. Everything here runs in children of the fork server.

A run of the crash tests (`crash_run`) on one or two ranks: open, save as told, hear of failures, and
after the fault save once more. What each rank was told stands beside the run, for the judge.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import enum
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import crash_run
import torch
import torch.distributed as dist
from crash_run import Save, Scenario
from torch.distributed.tensor import Shard, distribute_tensor

from ckptmgr import commit, recovery
from ckptmgr.cli import main
from ckptmgr.errors import CheckpointError, SaveFailed
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import Lifecycle
from ckptmgr.manager import CheckpointManager
from ckptmgr.options import Timeouts
from ckptmgr.rundir import RunDirectory
from torture import mounts, namespaces, shim
from torture.shim import Armed, Phase

#: The save that must work once the fault is over.
AFTERWARDS = 40
#: The same where the wire is cut: every point waits for all of it.
BETWEEN_HOSTS = crash_run.PATIENCE.replace(write_s=3, gather_s=1)

#: What `judge_disk` prints before it judges: what comes behind is no fault of the mount.
MOUNTED = "mounted again"
#: Who is told why there was no second manager.
HEIR = "heir"
#: Longest that a rank may wait for one that is gone or stopped: gather and collective_s below, and the work itself.
HEARD_WITHIN_S = 12.0

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

crash_run.PATIENCE = Timeouts(
    setup_s=20, write_s=5, gather_s=2, collective_s=6, close_s=10, close_on_error_s=5
)  # the same for every run here: short enough that a stopped rank costs seconds


@dataclasses.dataclass(frozen=True)
class Trouble:
    """
    What makes a disk small without the shim, and how it ends. Both may be called by every rank.

    *begin* is called when the manager is open, *end* before the save that must work; each with *args*.
    """

    begin: Callable[..., None] | None
    end: Callable[..., None]
    args: tuple[Any, ...]


def live(
    run: Path,
    orders: Path,
    scenario: Scenario,
    world: int = 1,
    afterwards: bool = True,
    trouble: Trouble | None = None,
    networks: tuple[int, ...] = (),
) -> None:
    """
    Go on with the run under *orders*, on *world* ranks, all in this process group.

    Args:
        run: The run directory.
        orders: The shim's.
        scenario: Its saves are made.
        world: Ranks.
        afterwards: End the fault, and *trouble*, and save once more, as those who survive it must be able to.
        trouble: What comes besides the shim.
        networks: One process for each rank, in whose network namespace it lives.
    """
    if world == 1:
        _rank(run, orders, scenario, 0, 1, afterwards, trouble)
        return
    ranks = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                if networks:
                    crash_run.PATIENCE = BETWEEN_HOSTS
                    namespaces.enter_network(networks[rank])
                _rank(run, orders, scenario, rank, world, afterwards, trouble)
                status = 0
            except BaseException:  # noqa: BLE001 - whatever it was, the other ranks' statuses matter too
                traceback.print_exc()
            finally:
                os._exit(status)
        ranks.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    tell(run, "world", "ended", *statuses)


class Members:
    """
    Processes that one child of the fork server has started, each in a group of its own, as different jobs are.

    They end when the child does, stopped ones as well.
    """

    def __enter__(self) -> Self:
        # A stopped process whose parent has died belongs to the child then. Where it belonged to init, its group would
        # have nobody to wake it, so the kernel would hang up and wake it at once.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._alive: set[int] = set()
        return self

    def __exit__(self, *_: object) -> None:
        for pid in list(self._alive):
            os.killpg(pid, signal.SIGKILL)
            self.end_of(pid)

    def start(self, function: Callable[..., Any], *args: Any) -> int:
        """Call *function* in a process; its id, which is its group's too."""
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.setpgid(0, 0)
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                function(*args)
                status = 0
            except BaseException:  # noqa: BLE001 - its status is all that matters
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)  # whoever comes first
        self._alive.add(pid)
        return pid

    def stopped(self, pid: int, orders: Path) -> bool:
        """Wait until the shim has struck and stopped *pid* and its writer; False if it ends before."""
        while not (shim.struck(orders).times and all(state_of(one) == "T" for one in shim.pids(orders).values())):
            if state_of(pid) in "Z":
                return False
            time.sleep(0.005)
        return True

    def go_on(self, pid: int) -> None:
        """Let a stopped one and its writer go on."""
        os.killpg(pid, signal.SIGCONT)

    def paused(self, pid: int) -> bool:
        """Wait until *pid* has stopped itself; False if it ends before."""
        while (state := state_of(pid)) not in "TZ":
            time.sleep(0.005)
        return state == "T"

    def end_of(self, pid: int) -> int:
        """Wait for its end; its exit status."""
        self._alive.discard(pid)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def state_of(pid: int) -> str:
    """The letter that the kernel has for what a process does; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def limit_files(orders: Path, role: int, size: int) -> None:
    """From now on no file that this process, or its writer, makes or changes may be larger than *size* bytes."""
    if role == shim.trainer(0):
        # What it prints goes into a file as well, so somebody else writes it.
        mouth = subprocess.Popen(["cat"], stdin=subprocess.PIPE).stdin
        assert mouth is not None
        os.dup2(mouth.fileno(), 1)
        os.dup2(mouth.fileno(), 2)
    resource.prlimit(shim.pids(orders)[role], resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def lift_limit(orders: Path, role: int, size: int) -> None:
    """Undo it; who has died meanwhile was replaced by one without limit."""
    del size
    with contextlib.suppress(ProcessLookupError):
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(shim.pids(orders)[role], resource.RLIMIT_FSIZE, unlimited)


def await_word(path: Path, orders: Path) -> None:
    """Wait until somebody outside has written *path*, as happens when the shim has struck."""
    deadline = time.monotonic() + 60
    while shim.struck(orders).times and not path.exists():
        assert time.monotonic() < deadline, f"nobody has written {path}"
        time.sleep(0.01)


def recover(run: Path, orders: Path, exchange: bool = True) -> None:
    """Open the run as the next start does, under *orders*, and close it."""
    if not exchange:
        crash_run.without_exchange()
    armed = Armed(orders, 0)
    _follow(armed)
    with contextlib.suppress(CheckpointError, OSError), crash_run.manager(run):
        pass


class Pause(enum.Enum):
    """Where `take_over` stops itself, in words."""

    REMOVING = "before a directory that was emptied is removed"
    PUBLISHING = "before what is new gets its name"


def take_over(run: Path, series: str, step: int = 1, locks: bool = False, pause: Pause | None = None) -> None:
    """
    Start a second manager while the first is stopped, or after it has died, and save anew.

    Args:
        run: The run directory.
        series: The format's word.
        step: What is saved; with 1 under a name that the first may be about to publish or to delete.
        locks: Whether the run lock is taken; without, all is as where locks are local to a mount.
        pause: Where this process stops, once, until somebody lets it go on.
    """
    if pause is not None:
        _stop_before(*((os, "rmdir") if pause is Pause.REMOVING else (RunDirectory, "publish")))
    if not locks:
        RunDirectory.acquire = lambda *_, **__: None  # type: ignore[method-assign]
    save = Save(series, step, gen=5, overwrite=True)
    try:
        with crash_run.manager(run) as opened:
            crash_run.note(run, "begun", save)
            pending = opened.save(step, crash_run.state(series, step, 5), series, overwrite=True, metrics={"gen": 5})
            assert pending is not None
            pending.wait()
            crash_run.note(run, "acknowledged", save)
    except CheckpointError as error:
        # The stopped one may hold SQLite's lock, or the directory may be half renamed: refusing is right.
        tell(run, HEIR, type(error).__name__, str(error))


def _stop_before(owner: Any, name: str) -> None:
    real = getattr(owner, name)

    @functools.wraps(real)
    def stopping(*args: Any, **kwargs: Any) -> Any:
        setattr(owner, name, real)
        os.kill(os.getpid(), signal.SIGSTOP)
        return real(*args, **kwargs)

    setattr(owner, name, stopping)


def create(run: Path, orders: Path) -> None:
    """The very first start of a run: directories, journal, schema, epoch; then one save."""
    live(run, orders, Scenario((), (Save("dcp", 1),)), 1, False)


def judge(run: Path, *, set_aside: bool = False, twice: bool = True) -> None:
    """Everything that must hold after a crash, by opening, resuming and saving again on one rank."""
    begun = run.is_dir() and RunDirectory(run).journal_path.exists()
    if begun:
        crash_run.assert_nothing_untrue(run)
    crash_run.check(run, twice=twice and begun, set_aside=set_aside)


def judge_recovery(run: Path) -> None:
    """The same with `ckptmgr recover --apply` alone, without a manager: quicker."""
    if not run.is_dir() or not RunDirectory(run).journal_path.exists():
        assert not any(word == "acknowledged" for word, *_ in crash_run.notes(run)), "the run or its journal is gone"
        judge(run)
        return
    crash_run.assert_nothing_untrue(run)
    assert main(["recover", str(run), "--apply"]) == 0
    before = crash_run.tree(run), crash_run.rows(run)
    assert main(["recover", str(run), "--apply"]) == 0
    assert (crash_run.tree(run), crash_run.rows(run)) == before, "a second recovery changed something"
    crash_run.assert_sound(run)


def judge_disk(kind: str, store: Path, run: Path, left: Path, whole: bool) -> None:
    """Unmount the disk in *store*, mount it again, judge, and discard it; what was violated is copied to *left*."""
    mounts.replay(kind, store)
    print(MOUNTED, flush=True)
    try:
        (judge if whole else judge_recovery)(run)
    except BaseException:
        mounts.copy(store / "disk", left)
        raise
    finally:
        mounts.discard(store)


def _rank(
    run: Path, orders: Path, scenario: Scenario, rank: int, world: int, afterwards: bool, trouble: Trouble | None
) -> None:
    if world > 1:
        signal.alarm(120)  # whatever happens, this process ends
        store = dist.FileStore(str(run.with_name("meeting")), world)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=20)
        )
    if not scenario.exchange:
        crash_run.without_exchange()
    armed = Armed(orders, rank)
    _follow(armed)
    began = time.monotonic()
    saves = scenario.now
    try:
        opened = crash_run.manager(run, keep=scenario.keep)
    except (OSError, CheckpointError) as error:
        tell(run, rank, "refused", type(error).__name__, str(error), time.monotonic() - began)
        if trouble is None:
            return
        trouble.end(*trouble.args)
        opened, saves = crash_run.manager(run, keep=scenario.keep), ()
    with opened:
        if trouble and trouble.begin:
            trouble.begin(*trouble.args)
        # Where the kernel itself refuses, it may still do so, and a transaction cannot even be undone.
        calm = trouble is None and not armed.is_watching
        worked = [_save(run, opened, save, rank, world, armed, calm=calm) for save in saves]
        if afterwards:
            armed.calm()
            if trouble:
                trouble.end(*trouble.args)
                if rank == 0 and not all(worked):
                    # Rolling a transaction back may have needed space as well, so this connection does it.
                    crash_run.assert_what_was_acknowledged_is_whole(run, Journal.open)
            series = scenario.now[-1].series
            if not _save(run, opened, Save(series, AFTERWARDS), rank, world, armed) and all(worked):
                # The fault came too late for the saves before: a writer that died when it had nothing to do.
                _save(run, opened, Save(series, AFTERWARDS + 1), rank, world, armed)
    if rank == 0:
        armed.phase = Phase.END


def _save(
    run: Path, opened: CheckpointManager, save: Save, rank: int, world: int, armed: Armed, *, calm: bool = True
) -> bool:
    if rank == 0:
        crash_run.note(run, "begun", save)
    began = time.monotonic()
    try:
        pending = opened.save(
            save.step, _state(save, world), save.series, overwrite=save.overwrite, metrics={"gen": save.gen}
        )
        assert pending is not None
        pending.wait()
    except SaveFailed as failed:
        where = [[failure.rank, failure.cause] for failure in failed.failures]
        tell(run, rank, "failed", save.step, where, time.monotonic() - began)
        if rank == 0:
            crash_run.note(run, "failed", save)
            if calm and armed.is_over:
                crash_run.assert_what_was_acknowledged_is_whole(run)
        return False
    except CheckpointError as error:
        tell(run, rank, "error", save.step, type(error).__name__, time.monotonic() - began)
        raise
    else:
        tell(run, rank, "acknowledged", save.step, save.gen, time.monotonic() - began)
        if rank == 0:
            if armed.is_over:
                crash_run.assert_is_whole(run, save)
            crash_run.note(run, "acknowledged", save)
        return True


def _state(save: Save, world: int) -> dict[str, Any]:
    """The state of the crash tests; on several ranks each holds a part of every weight."""
    state = crash_run.state(save.series, save.step, save.gen)
    if world > 1:
        mesh = dist.init_device_mesh("cpu", (world,))
        for module in state["model"].modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(
                    name, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
                )
    return state


def tell(run: Path, rank: int | str, *words: Any) -> None:
    """Write down what a rank, or somebody else, was told."""
    with run.with_name(f"told-{rank}").open("a") as stream:
        stream.write(json.dumps(words) + "\n")


def require_all_saved(run: Path) -> None:
    """Without any fault no save of rank 0 fails; a defect that makes it fail would pass for a fault that struck."""
    failed = [words for words in told(run, 0) if words[0] != "acknowledged"]
    assert not failed, f"without any fault: {failed}"


def told(run: Path, rank: int | str) -> list[list[Any]]:
    """What a rank wrote down of what it was told."""
    path = run.with_name(f"told-{rank}")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- phases ------------------------------------------------------------------------------------


def _follow(armed: Armed) -> None:
    """Tell the shim where the run is, whenever rank 0 enters or leaves a step of the commit order."""
    for owner, name, phase, then in (
        (commit.Leader, "begin", Phase.PREWRITTEN, Phase.SHARDS),
        (Lifecycle, "start_writing", Phase.WRITING, None),
        (commit.Leader, "commit", Phase.GATHERED, None),
        (RunDirectory, "publish", Phase.RENAME, None),
        (Lifecycle, "commit", Phase.COMMITTED, None),
        (commit.Leader, "project", Phase.PROJECTION, None),
        (commit.Leader, "fail", Phase.FAILED, None),
        (commit.Leader, "_retire_one", Phase.DELETION, None),
        (recovery, "recover", Phase.RECOVERY, None),
    ):
        setattr(owner, name, _followed(armed, getattr(owner, name), phase, then))


def _followed(armed: Armed, real: Callable[..., Any], phase: Phase, then: Phase | None) -> Callable[..., Any]:
    @functools.wraps(real)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        before, armed.phase = armed.phase, phase
        try:
            return real(*args, **kwargs)
        finally:
            armed.phase = before if then is None else then

    return wrapper
