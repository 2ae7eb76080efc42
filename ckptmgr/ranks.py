"""
The ranks of a run, and all that passes between them. The only door to ``torch.distributed``.

Three Gloo groups of our own, each with its own explicit timeout, so that the checkpoint's messages
never mix with the training's and one that breaks does not take the others along:

- *calls*: collectives on the training thread (``save``, ``resume``, ``close``), where all ranks meet anyway;
- *reports*: from every rank's finalizer thread to rank 0's;
- *orders*: from rank 0's finalizer thread to every other rank's.

Reports and orders are point-to-point messages, so that rank 0 knows exactly who has answered when time
is up: a report is one frame, as long as the save's plan needs; an order that is longer has a second one.
Without ``torch.distributed`` there is one rank.
"""

from __future__ import annotations

import contextlib
import datetime
import pickle
import socket
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ckptmgr.errors import CheckpointError, RankFailure, RanksDisagree, SetupFailed
from ckptmgr.options import Timeouts

#: Bytes of an order, and of a report unless its save needs longer ones.
FRAME = 4096
_HEADER = 3  # int64: message number, round, length in bytes


class Ranks:
    """
    This rank among the others.

    All ranks must create it together, after ``torch.distributed`` was initialised (or not at all).

    Args:
        timeouts: How long calls, reports and orders may take.
    """

    def __init__(self, timeouts: Timeouts) -> None:
        self.host = socket.gethostname()
        self.rank = 0
        self.world_size = 1
        self.broken = False
        self._timeouts = timeouts
        self._hosts = [self.host]
        self._calls: Any = None
        self._reports: Any = None
        self._orders: Any = None
        #: Sends that nobody waits for; Gloo reads from their tensors until they are taken or their group is gone.
        self._unfinished: list[Any] = []
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank = dist.get_rank()
            self.world_size = dist.get_world_size()
            self._calls = self._group(timeouts.collective_s)
            self._open_background()
            hosts: list[Any] = [None] * self.world_size
            dist.all_gather_object(hosts, self.host, group=self._calls)
            self._hosts = hosts

    # -- on the training thread, all ranks together ----------------------------------------------

    def agree(self, values: Sequence[int]) -> tuple[list[int], list[int]]:
        """
        The lowest and the highest of every rank's integers, on every rank. All ranks must call, with as many values.

        A training waits for this at every save. What goes around all ranks, as Gloo's all-gather does, takes as many
        steps as there are ranks; rank 0's answer goes down a tree.

        Raises:
            RanksDisagree: A rank did not arrive in time.
        """
        if self.world_size == 1:
            return list(values), list(values)
        everyone = torch.tensor([values] * (self.world_size if self.rank == 0 else 1), dtype=torch.int64)
        into = list(everyone) if self.rank == 0 else None
        self._meet(lambda: dist.gather(everyone[0].clone(), into, dst=0, group=self._calls))
        extremes = torch.stack([everyone.amin(0), everyone.amax(0)])
        self._meet(lambda: dist.broadcast(extremes, src=0, group=self._calls))
        lowest, highest = extremes.tolist()
        return lowest, highest

    def rows(self, values: Sequence[int]) -> list[list[int]]:
        """Every rank's integers, on every rank. All ranks must call, with as many values."""
        if self.world_size == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        self._meet(lambda: dist.all_gather(everyone, mine, group=self._calls))
        return [row.tolist() for row in everyone]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's *value*, on every rank. All ranks must call."""
        if self.world_size == 1:
            return value
        box = [value]
        self._meet(lambda: dist.broadcast_object_list(box, src=0, group=self._calls))
        return box[0]

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's *value* on rank 0, None elsewhere. All ranks must call."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        self._meet(lambda: dist.gather_object(value, values, dst=0, group=self._calls))
        return values

    def scatter(self, values: Sequence[Any] | None) -> Any:
        """This rank's item of rank 0's *values*. All ranks must call."""
        if self.world_size == 1:
            assert values is not None
            return values[0]
        box: list[Any] = [None]
        given = list(values) if values is not None else None
        self._meet(lambda: dist.scatter_object_list(box, given, src=0, group=self._calls))
        return box[0]

    def all_or_none(self, error: Exception | None, what: str) -> None:
        """
        Go on only if every rank is fine. All ranks must call, with their error if they have one.

        Raises:
            CheckpointError: The same on every rank: the typed error that every failed rank had, the lowest
                one's, or `SetupFailed`, which names them all.
        """
        if self.world_size == 1:
            if error is None:
                return
            if isinstance(error, CheckpointError) and type(error) is not CheckpointError:
                raise error
            raise _setup_failed(what, [RankFailure(0, self.host, _words(error))]) from error
        _, (is_any,) = self.agree([int(error is not None)])
        if not is_any:
            return
        errors = self.broadcast(self.gather(_portable(error)))
        failed = {rank: e for rank, e in enumerate(errors) if e is not None}
        first = failed[min(failed)]
        kinds = {type(e) for e in failed.values()}
        if len(kinds) == 1 and isinstance(first, CheckpointError) and type(first) is not CheckpointError:
            raise first from error
        raise _setup_failed(what, [RankFailure(r, self.host_of(r), _words(e)) for r, e in failed.items()]) from error

    def rebuild(self) -> None:
        """Replace the background groups after one of them broke. All ranks must call, with their finalizers idle."""
        if self.world_size > 1:
            self._destroy(self._reports, self._orders)
            self._unfinished.clear()
            self._open_background()
        self.broken = False

    # -- on the finalizer threads ----------------------------------------------------------------

    def order(self, number: int, stage: int, value: Any, timeout_s: float, *, silent: Collection[int] = ()) -> None:
        """
        Rank 0 only: send *value* to the other ranks.

        Who does not take it within *timeout_s* seconds, or is gone, is skipped: it will not report either.
        For ranks in *silent* nobody waits; one that wakes up finds it.
        """
        frames = _frames(number, stage, value, FRAME)
        sent = {rank: self._send(frames, rank, self._orders) for rank in range(1, self.world_size)}
        for rank, works in sent.items():
            if rank in silent:
                self._unfinished.append((works, frames))
                continue
            for work in works:
                self._wait(work, timeout_s)

    def await_order(self, number: int, stages: Sequence[int], timeout_s: float) -> tuple[int, Any]:
        """
        What rank 0 ordered at one of *stages*, and which it was. Not on rank 0.

        Raises:
            TimeoutError: Nothing came within *timeout_s* seconds, or rank 0 is gone.
        """
        deadline = time.monotonic() + timeout_s
        return self._receive(0, self._orders, FRAME, number=number, stages=stages, deadline=deadline)

    def report(
        self, number: int, stage: int, value: Any, timeout_s: float, *, frame: int = FRAME, late: bool = False
    ) -> None:
        """
        Send *value* to rank 0, which may take *timeout_s* seconds to listen. Not on rank 0.

        Args:
            number: Which save.
            stage: Which of its messages.
            value: What to say; must fit into *frame* bytes.
            timeout_s: In seconds.
            frame: As rank 0 expects it.
            late: After the outcome, when a silent rank may have broken the reports' group: goes the orders' way.
        """
        group = self._orders if late else self._reports
        for work in self._send(_frames(number, stage, value, frame), 0, group):
            self._wait(work, timeout_s)

    def collect(
        self,
        number: int,
        stage: int,
        mine: Any,
        timeout_s: float,
        *,
        frame: int = FRAME,
        of: Collection[int] | None = None,
        late: bool = False,
    ) -> dict[int, Any]:
        """
        Rank 0 only: the reports of every rank (or those in *of*), with rank 0's own *mine*.

        A report is one frame, received where it was posted: Gloo gives up a whole group when one
        receive runs out of time, so nothing may be left to fetch from the ranks that have answered.

        Returns:
            The reports by rank. A rank that is missing was silent for *timeout_s* seconds, or is gone.
        """
        deadline = time.monotonic() + timeout_s
        found = {0: mine}
        group = self._orders if late else self._reports
        buffers = {rank: torch.empty(frame, dtype=torch.uint8) for rank in of or range(self.world_size) if rank}
        pending = {}
        for rank, buffer in buffers.items():
            with self._noticing():
                pending[rank] = dist.irecv(buffer, src=rank, group=group)
        for rank, work in pending.items():
            if self._wait(work, max(0.001, deadline - time.monotonic())):
                with contextlib.suppress(TimeoutError):
                    _, found[rank] = self._complete(
                        buffers[rank], rank, group, number=number, stages=(stage,), deadline=deadline
                    )
        return found

    def host_of(self, rank: int) -> str:
        """The host that *rank* runs on."""
        return self._hosts[rank] if rank < len(self._hosts) else ""

    @property
    def on_this_host(self) -> int:
        """How many ranks share this host's memory, this one among them."""
        return self._hosts.count(self.host)

    def close(self) -> None:
        """Destroy our groups. Not collective: each rank may do it in its own time."""
        self._destroy(self._calls, self._reports, self._orders)
        self._calls = self._reports = self._orders = None

    # -- inside ----------------------------------------------------------------------------------

    def _open_background(self) -> None:
        longest = self._timeouts.write_s + self._timeouts.gather_s
        self._reports = self._group(longest)
        self._orders = self._group(longest)

    def _group(self, timeout_s: float) -> Any:
        return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))

    def _destroy(self, *groups: Any) -> None:
        for group in groups:
            # The training may have destroyed everything already; then there is nothing left to do.
            if group is not None and dist.is_initialized():
                with contextlib.suppress(RuntimeError, ValueError, AssertionError):
                    dist.destroy_process_group(group)

    def _meet(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise RanksDisagree(
                f"rank {self.rank}: not all ranks arrived within {self._timeouts.collective_s:g} s: {error}",
                what="arrival",
                values=(),
            ) from error

    @contextlib.contextmanager
    def _noticing(self) -> Any:
        try:
            yield
        except (RuntimeError, ValueError, AssertionError):
            self.broken = True

    def _send(self, frames: list[torch.Tensor], rank: int, group: Any) -> list[Any]:
        sent = []
        with self._noticing():
            for frame in frames:
                sent.append(dist.isend(frame, dst=rank, group=group))
        return sent

    def _wait(self, work: Any, timeout_s: float) -> bool:
        with self._noticing():
            work.wait(datetime.timedelta(seconds=timeout_s))
            return True
        return False

    def _receive(
        self, rank: int, group: Any, frame: int, *, number: int, stages: Sequence[int], deadline: float
    ) -> tuple[int, Any]:
        buffer = torch.empty(frame, dtype=torch.uint8)
        work = None
        with self._noticing():
            work = dist.irecv(buffer, src=rank, group=group)
        if work is None or not self._wait(work, max(0.001, deadline - time.monotonic())):
            raise TimeoutError(f"rank {rank} on {self.host_of(rank)} is silent")
        return self._complete(buffer, rank, group, number=number, stages=stages, deadline=deadline)

    def _complete(
        self, buffer: torch.Tensor, rank: int, group: Any, *, number: int, stages: Sequence[int], deadline: float
    ) -> tuple[int, Any]:
        found, stage, length = buffer[: _HEADER * 8].view(torch.int64).tolist()
        body = buffer[_HEADER * 8 :]
        if length > len(body):
            rest = torch.empty(length - len(body), dtype=torch.uint8)
            work = None
            with self._noticing():
                work = dist.irecv(rest, src=rank, group=group)
            if work is None or not self._wait(work, max(0.001, deadline - time.monotonic())):
                raise TimeoutError(f"rank {rank} on {self.host_of(rank)} fell silent in the middle of a message")
            body = torch.cat([body, rest])
        if found == number and stage in stages:
            return stage, pickle.loads(body[:length].numpy().tobytes())  # noqa: S301 - from our own ranks
        if (found, stage) < (number, min(stages)):  # a late message of a save that has failed meanwhile
            return self._receive(rank, group, len(buffer), number=number, stages=stages, deadline=deadline)
        raise TimeoutError(f"rank {rank} is at save {found}, stage {stage}; expected {number}, {list(stages)}")


def _frames(number: int, stage: int, value: Any, size: int) -> list[torch.Tensor]:
    data = pickle.dumps(value)
    frame = torch.zeros(max(size, _HEADER * 8 + len(data)), dtype=torch.uint8)
    frame[: _HEADER * 8].view(torch.int64).copy_(torch.tensor([number, stage, len(data)]))
    frame[_HEADER * 8 : _HEADER * 8 + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return [part for part in (frame[:size], frame[size:]) if len(part)]


def _portable(error: Exception | None) -> Exception | str | None:
    if error is None or isinstance(error, CheckpointError):
        return error
    return _words(error)


def _setup_failed(what: str, failures: Sequence[RankFailure]) -> SetupFailed:
    return SetupFailed(f"{what} failed: {'; '.join(map(str, failures))}", failures=tuple(failures))


def _words(error: Any) -> str:
    untyped = isinstance(error, Exception) and type(error) is not CheckpointError
    return f"{type(error).__name__}: {error}" if untyped else str(error)
