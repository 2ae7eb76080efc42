"""
Tests as several ranks: real processes, real Gloo over a file store, no port, no mock.

``@on_ranks(2)`` runs a test function in two processes at once. Processes are forked from a server
that has imported torch once, so a rank costs a tenth of a second and not three. Whatever happens,
every join has a deadline, every process is reaped, and a writer process that outlives its rank is a
failure. A rank that fails is reported with its traceback, the values of its local variables and the
end of what it printed.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import functools
import importlib
import inspect
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_server = multiprocessing.get_context("forkserver")
# Everything slow but nothing of ours, so that the code under test is the one of this working tree.
_server.set_forkserver_preload(
    [
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
        "transformers.core_model_loading",
        "safetensors.torch",
        "sqlalchemy.dialects.sqlite",
        "alembic.command",
        "filelock",
        "transitions",
        "psutil",
    ]
)
_TOKEN = "CKPTMGR_TEST_TOKEN"
_GRACE_S = 5.0


class RankFailed(AssertionError):
    """A rank raised, died, hung, or left a process behind; the message has all of it."""


class Here:
    """
    What a test function is given on its rank.

    ``tell`` and ``ask`` pass small values between ranks (and the test's own process) through files, so
    that they work whatever state torch.distributed is in.
    """

    def __init__(self, rank: int, world_size: int, tmp_path: Path, world: str) -> None:
        self.rank = rank
        self.world_size = world_size
        self.tmp_path = tmp_path
        self._notes = tmp_path / f"notes-{world}"
        self._meetings = 0

    @property
    def run_dir(self) -> Path:
        """The run directory, the same for every rank and every world of one test."""
        return self.tmp_path / "run"

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def tell(self, name: str, value: Any = None) -> None:
        """Leave a value under *name* for whoever asks."""
        scratch = self._notes / f".{name}.{os.getpid()}"
        scratch.write_text(json.dumps(value))
        scratch.rename(self._notes / name)

    def ask(self, name: str, timeout_s: float = 20.0) -> Any:
        """The value told under *name*, waited for."""
        deadline = time.monotonic() + timeout_s
        while not (self._notes / name).exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody told {name!r} within {timeout_s:g} s")
            time.sleep(0.005)
        return json.loads((self._notes / name).read_text())

    def told(self, name: str) -> bool:
        """Whether *name* has been told."""
        return (self._notes / name).exists()

    def meet(self, timeout_s: float = 20.0) -> None:
        """Wait for every rank, without torch.distributed."""
        self._meetings += 1
        self.tell(f"meeting-{self._meetings}-{self.rank}")
        for rank in range(self.world_size):
            self.ask(f"meeting-{self._meetings}-{rank}", timeout_s)

    def everyone(self, name: str, value: Any) -> list[Any]:
        """Every rank's value (JSON), on every rank; fails where one does not arrive."""
        self.tell(f"{name}-{self.rank}", value)
        return [self.ask(f"{name}-{rank}") for rank in range(self.world_size)]


class World:
    """Ranks that run. Made by `start_ranks`."""

    def __init__(self, processes: Sequence[BaseProcess], pipes: Sequence[Connection], here: Here, logs: Sequence[Path]):
        self._processes = processes
        self._pipes = pipes
        self._logs = logs
        self.here = here

    def pid(self, rank: int) -> int:
        """The process id of *rank*."""
        pid = self._processes[rank].pid
        assert pid is not None
        return pid

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send *rank* a signal."""
        os.kill(self.pid(rank), number)

    def join(self, timeout_s: float = 60.0, *, dead: Sequence[int] = ()) -> list[Any]:
        """
        Wait for every rank to end and return what the function returned on each (None for the dead).

        Args:
            timeout_s: For all of them together.
            dead: Ranks that are meant to die without a word.
        """
        __tracebackhide__ = True
        deadline = time.monotonic() + timeout_s
        words: dict[int, tuple[str, Any]] = {}
        open_pipes = dict(zip(self._pipes, range(len(self._pipes)), strict=True))
        while open_pipes and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(open_pipes), left):
                assert isinstance(pipe, Connection)
                rank = open_pipes.pop(pipe)
                try:
                    words[rank] = pipe.recv()
                except (EOFError, ConnectionError):
                    self._processes[rank].join(_GRACE_S)
                    words[rank] = ("died", f"exit code {self._processes[rank].exitcode}")
                if words[rank][0] == "failed" or (words[rank][0] == "died" and rank not in dead):
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        for rank in open_pipes.values():
            words[rank] = ("hung", "did not end in time")
            # The stacks of a rank that hangs are what one wants to see; see faulthandler in `_be_rank`.
            with contextlib.suppress(ProcessLookupError):
                self.signal(rank, signal.SIGCONT)
                self.signal(rank, signal.SIGUSR1)
        if open_pipes:
            time.sleep(0.3)
        self.kill()
        bad = [rank for rank in sorted(words) if words[rank][0] not in (("died",) if rank in dead else ("ok",))]
        if bad:
            raise RankFailed("\n".join(self._words(rank, *words[rank]) for rank in bad))
        return [words[rank][1] if words[rank][0] == "ok" else None for rank in range(len(self._processes))]

    def kill(self) -> None:
        """End every rank and reap it."""
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join(_GRACE_S)
            assert not process.is_alive(), f"{process.name} cannot be killed"
        for pipe in self._pipes:
            pipe.close()

    def _words(self, rank: int, what: str, text: str) -> str:
        log = self._logs[rank].read_text(errors="replace")[-6000:]
        return f"--- rank {rank} {what} ---\n{text}\n--- what rank {rank} printed ---\n{log}"


@contextlib.contextmanager
def start_ranks(
    number: int,
    function: Callable[..., Any],
    tmp_path: Path,
    *,
    distributed: bool | None = None,
    timeout_s: float = 60.0,
    environ: Mapping[str, str] | None = None,
    **arguments: Any,
) -> Iterator[World]:
    """
    Run ``function(here, **arguments)`` on *number* ranks; a module-level function of an importable file.

    Args:
        number: How many ranks.
        function: What each of them does.
        tmp_path: A folder they share.
        distributed: Whether they form a Gloo world; by default if there are several.
        timeout_s: A rank that lives longer dumps its stacks and dies.
        environ: Set in every rank.
        arguments: Handed on; must be picklable.

    Leaving the block ends the ranks and fails if a process they started is still there.
    """
    world = uuid.uuid4().hex[:12]
    (tmp_path / f"notes-{world}").mkdir()
    logs = [tmp_path / f"rank-{rank}.{world}.log" for rank in range(number)]
    pipes, processes = [], []
    for rank in range(number):
        ours, theirs = _server.Pipe(duplex=False)
        process = _server.Process(
            target=_be_rank,
            args=(function.__module__, function.__qualname__, rank, number, str(tmp_path), world),
            kwargs={
                "distributed": number > 1 if distributed is None else distributed,
                "arguments": arguments,
                "pipe": theirs,
                "log": str(logs[rank]),
                "timeout_s": timeout_s,
                "environ": {**(environ or {}), _TOKEN: world},
            },
            name=f"rank {rank}",
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    started = World(processes, pipes, Here(-1, number, tmp_path, world), logs)
    try:
        yield started
    finally:
        started.kill()
        assert not (left := _left_behind(world)), f"processes outlived their rank: {left}"


def run_on_ranks(number: int, function: Callable[..., Any], tmp_path: Path, **arguments: Any) -> list[Any]:
    """`start_ranks`, waited for; returns what the function returned on each rank."""
    __tracebackhide__ = True
    timeout_s = arguments.get("timeout_s", 60.0)
    with start_ranks(number, function, tmp_path, **arguments) as world:
        return world.join(timeout_s + _GRACE_S)


def on_ranks(number: int, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """
    Make a test function run on *number* ranks. Its first parameter is `Here`; others are pytest's.

    Options are those of `start_ranks`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(function)
        def test(tmp_path: Path, **arguments: Any) -> None:
            __tracebackhide__ = True
            run_on_ranks(number, function, tmp_path, **options, **arguments)

        parameters = list(inspect.signature(function).parameters.values())[1:]
        own = inspect.Parameter("tmp_path", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        test.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
        return test

    return decorate


def _left_behind(world: str, patience_s: float = 2.5) -> list[str]:
    """Processes that a rank of *world* started and that are still there; they are killed."""
    mark = f"{_TOKEN}={world}".encode()
    deadline = time.monotonic() + patience_s
    while True:
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append((int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()))
        if not found:
            return []
        if time.monotonic() > deadline:
            for pid, _ in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return [f"{pid}: {command}" for pid, command in found]
        time.sleep(0.02)


def _be_rank(
    module: str,
    name: str,
    rank: int,
    world_size: int,
    tmp_path: str,
    world: str,
    *,
    distributed: bool,
    arguments: Mapping[str, Any],
    pipe: Connection,
    log: str,
    timeout_s: float,
    environ: Mapping[str, str],
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - for the whole process
    faulthandler.register(signal.SIGUSR1)
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    os.environ.update(environ)
    warnings.simplefilter("error", ResourceWarning)
    here = Here(rank, world_size, Path(tmp_path), world)
    try:
        word = "ok", _act(module, name, here, distributed, arguments)
    except BaseException as error:
        word = "failed", _trace(error)
    try:
        pipe.send(word)
    except Exception as error:
        pipe.send(("failed", _trace(error)))
    # A finalizer thread that a test left stuck on purpose must not keep the process.
    sys.stderr.flush()
    os._exit(0)


def _act(module: str, name: str, here: Here, distributed: bool, arguments: Mapping[str, Any]) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(here.rank)
    function: Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    function = inspect.unwrap(function)
    if distributed:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(here._notes / "store"), here.world_size),
            rank=here.rank,
            world_size=here.world_size,
            timeout=datetime.timedelta(seconds=30),
        )
    value = function(here, **arguments)
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("ckptmgr")]
    assert not left, f"threads are left: {left}"
    if distributed and dist.is_initialized():
        # Whoever leaves first takes its sockets along.
        here.meet()
        dist.destroy_process_group()
    return value


def _trace(error: BaseException) -> str:
    told = traceback.TracebackException.from_exception(error, capture_locals=True, lookup_lines=True, compact=True)
    # Our own frames and torch's explain nothing by their locals; the test's and ckptmgr's do.
    chained: traceback.TracebackException | None = told
    while chained is not None:
        for frame in chained.stack:
            if frame.locals is not None:
                ours = frame.filename == __file__
                inside = not ours and ("/tests/" in frame.filename or "/ckptmgr/" in frame.filename)
                frame.locals = {k: v[:160] for k, v in frame.locals.items()} if inside else None
        chained = chained.__cause__ or chained.__context__
    return "".join(told.format())
