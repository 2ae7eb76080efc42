"""
Capture: what `save` does to the state, from the user's objects to a `Job`.

One `Capture` per series and rank holds the format's writer, the memory, and the layout that all ranks
agreed on. As long as the state keeps its names, shapes and placements, a save is one copy into memory
that is there already; otherwise the ranks plan anew. That copy is done when `save` returns, or, where
it overlaps with training, read by a thread of its own: see `writers.reading`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptmgr.commit import Job
from ckptmgr.errors import CheckpointError, InvalidArgument
from ckptmgr.ranks import FRAME, Ranks
from ckptmgr.series import Series
from ckptmgr.writers.arena import Arena, memory_of
from ckptmgr.writers.huggingface import HuggingFaceWriter
from ckptmgr.writers.reading import Reading

if TYPE_CHECKING:
    import torch

log = logging.getLogger("ckptmgr")


@dataclasses.dataclass(frozen=True)
class Loan:
    """
    What one series has captured, for the others that are saved by the same call: they need not copy it again.

    Args:
        series: Whose it is.
        arena: Where it lies; not to be written to before every save that borrows from it is over.
        reading: What still fills that, if anything does.
        places: Where in it the bytes of a tensor lie, by what tells that two tensors are the same memory.
        tensors: Those tensors. While they live, no other one can lie where they do.
    """

    series: str
    arena: Arena
    reading: Reading | None
    places: Mapping[Any, int]
    tensors: Collection[torch.Tensor]


class Capture:
    """
    One series on this rank.

    Args:
        series: Which.
        number: What the writer process calls its memory.
        ranks: This rank among the others.
    """

    def __init__(self, series: Series, number: int, ranks: Ranks) -> None:
        self.arena = Arena(number)
        self.reading: Reading | None = None
        self._series = series
        self._ranks = ranks
        self._writer = series.format.writer()
        self._layout: Any = None
        self._beside: tuple[Any, Any] | None = None
        self._frame = FRAME
        self._signature: bytes | None = None
        self._has_warned = False

    def take(self, state: Mapping[str, Any]) -> tuple[Any, Exception | None]:
        """Look at the state, copying nothing. An error is a value here: all ranks agree on it before anyone raises."""
        try:
            return self._writer.take(state, self._ranks.rank), None
        except CheckpointError as error:
            return None, error
        except Exception as error:  # noqa: BLE001 - whatever the user's state_dict raises
            wrapped = InvalidArgument(f"the state cannot be taken: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            return None, wrapped

    def is_planned(self, taken: Any) -> bool:
        """Whether *taken* has the names, shapes and placements that the ranks planned for."""
        return taken is not None and taken.signature == self._signature

    def plan(self, taken: Any) -> None:
        """
        Plan anew: every rank says what it has, rank 0 says who writes what. All ranks must call.

        Raises:
            InvalidArgument: The ranks' parts do not fit together.
            SetupFailed: The plan cannot be laid out on a rank.
        """
        writer, ranks = self._writer, self._ranks
        error: Exception | None = None
        shares: list[Any] | None = None
        self._signature = self._beside = None
        plans = ranks.gather(writer.local_plan(taken))
        if plans is not None:
            try:
                shares = writer.plan_globally(plans)
            except Exception as problem:  # noqa: BLE001 - told to every rank in the next line
                error = problem
        ranks.all_or_none(error, "planning")
        mine = ranks.scatter(shares)
        place = None
        try:
            self._layout, place = writer.lay_out(mine, ranks.rank)
        except Exception as problem:  # noqa: BLE001 - agreed upon in the next line
            error = problem
        ranks.all_or_none(error, "laying out")
        places = ranks.gather(place)
        if places is not None:
            writer.accept_layouts(places)
        _, (extra,) = ranks.agree([writer.report_bytes(taken)])
        self._frame = FRAME + extra
        self._signature = taken.signature

    def warm_up(self, taken: Any) -> None:
        """
        Make the memory for the plan and touch it, and let a GPU that has tensors of *taken* copy to it.

        Raises:
            MemoryError: There is not enough.
        """
        self.arena.adopt(self._layout)
        if any(tensor.is_cuda for tensor in self._writer.sources(taken).values()):
            self.arena.pin()

    def job(
        self,
        taken: Any,
        *,
        number: int,
        step: int,
        metrics: Mapping[str, float],
        overwrite: bool,
        overlap: bool,
        loan: Loan | None = None,
    ) -> Job:
        """
        Copy the state to memory; what goes wrong here fails the save, for which the other ranks are on their way.

        With *overlap* the tensors are only about to be read when this returns; everything else is copied. What is
        in the *loan* is not copied.
        """
        started = time.monotonic()
        files: Sequence[Any] = ()
        report = cause = reading = None
        try:
            layout = self._layout if loan is None else self._layout_beside(loan, self._writer.sources(taken))
            self.arena.adopt(layout)
            small, report = self._writer.small_files(taken, self._ranks.rank)
            sources = self._writer.sources(taken)
            if layout is not self._layout and not layout.copies:
                pass  # all of it is lent
            elif overlap:
                # Aliases: a parameter whose data is replaced meanwhile is read from the memory that it had.
                copy = self.arena.begin({key: tensor.detach() for key, tensor in sources.items()})
                reading = self._reading(copy, _watched(self._writer.watched(taken), sources))
                if reading is None:
                    copy()
            else:
                self.arena.capture(sources)
            files = (*layout.files, *small)
        except Exception as error:
            log.exception("capturing %s step %d failed", self._series.name, step)
            cause = f"{type(error).__name__}: {error}"
        return Job(
            number=number, series=self._series.name, step=step, keep=self._series.keep, writer=self._writer,
            arenas=(self.arena,) if loan is None else (self.arena, loan.arena),
            readings=tuple(one for one in (loan.reading if loan is not None else None, reading) if one is not None),
            borrows_from=loan.series if loan is not None else None,
            files=tuple(files), report=report, stage_s=time.monotonic() - started,
            metrics=metrics, per_rank=taken.per_rank_names, overwrite=overwrite, frame=self._frame, cause=cause,
        )  # fmt: skip

    def loan(self, taken: Any, job: Job) -> Loan:
        """What *job* has captured of *taken*, or is about to read; nothing if that has failed on this rank."""
        sources = self._writer.sources(taken)
        copies = self._layout.copies if job.cause is None else ()
        places = {memory_of(sources[copy.key]): copy.offset for copy in copies if sources[copy.key].dtype == copy.dtype}
        reading = job.readings[0] if job.readings else None
        # Aliases: a parameter whose data is replaced meanwhile must not let its memory go.
        alive = [tensor.detach() for tensor in sources.values()]
        return Loan(self._series.name, self.arena, reading, places, alive)

    def _layout_beside(self, loan: Loan, sources: Mapping[object, torch.Tensor]) -> Any:
        """The layout without what is lent; the same object as long as the same is lent."""
        lent = {
            copy.key: loan.places[memory]
            for copy in self._layout.copies
            if sources[copy.key].dtype == copy.dtype and (memory := memory_of(sources[copy.key])) in loan.places
        }
        if not lent:
            return self._layout
        assert isinstance(self._writer, HuggingFaceWriter), "only an export borrows"
        if self._beside is None or self._beside[0] != (lent, loan.arena.number):
            self._beside = ((lent, loan.arena.number), self._writer.lay_out_beside(lent, loan.arena.number))
        return self._beside[1]

    def stop_reading(self, timeout_s: float) -> None:
        """Give a capture that still reads *timeout_s* seconds to end; then its save has failed."""
        if self.reading is not None and not self.reading.finish(timeout_s):
            self.reading.abandon(CheckpointError("the manager was closed while the state was read"))

    def close(self) -> None:
        """Give the memory back."""
        if self.reading is not None and self.reading.is_running:
            log.error("a capture of %s still reads; its memory stays until this process ends", self._series.name)
        else:
            self.arena.close()

    def _reading(self, copy: Callable[[], None], tensors: Sequence[tuple[str, torch.Tensor]]) -> Reading | None:
        """A capture in the background, or None where a change of the state could not be seen."""
        try:
            reading = Reading(copy, tensors)
        except RuntimeError as error:
            if not self._has_warned:
                log.warning("%s is captured before save returns: %s", self._series.name, error)
                self._has_warned = True
            return None
        self.reading = reading
        reading.start()
        return reading


def _watched(
    state: list[tuple[str, torch.Tensor]], sources: Mapping[object, torch.Tensor]
) -> list[tuple[str, torch.Tensor]]:
    """The state's own tensors, and those that are read where they are others."""
    own = {id(tensor) for _, tensor in state}
    return state + [(str(key), tensor) for key, tensor in sources.items() if id(tensor) not in own]
