"""
Capture: what `save` does to the state, from the user's objects to a `Job`.

One `Capture` per series and rank holds the format's writer, the memory, and the layout that all ranks
agreed on. As long as the state keeps its names, shapes and placements, a save is one copy into memory
that is there already; otherwise the ranks plan anew. That copy is done when `save` returns, or, where
it overlaps with training, read by a thread of its own: see `writers.reading`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptmgr.commit import Job
from ckptmgr.errors import CheckpointError, InvalidArgument
from ckptmgr.ranks import FRAME, Ranks
from ckptmgr.series import Series
from ckptmgr.writers.arena import Arena
from ckptmgr.writers.reading import Reading

if TYPE_CHECKING:
    import torch

log = logging.getLogger("ckptmgr")


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
        self._signature = None
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
        self, taken: Any, *, number: int, step: int, metrics: Mapping[str, float], overwrite: bool, overlap: bool
    ) -> Job:
        """
        Copy the state to memory; what goes wrong here fails the save, for which the other ranks are on their way.

        With *overlap* the tensors are only about to be read when this returns; everything else is copied.
        """
        started = time.monotonic()
        files: Sequence[Any] = ()
        report = cause = reading = None
        try:
            self.arena.adopt(self._layout)
            small, report = self._writer.small_files(taken, self._ranks.rank)
            sources = self._writer.sources(taken)
            if overlap:
                # Aliases: a parameter whose data is replaced meanwhile is read from the memory that it had.
                copy = self.arena.begin({key: tensor.detach() for key, tensor in sources.items()})
                reading = self._reading(copy, _watched(self._writer.watched(taken), sources))
                if reading is None:
                    copy()
            else:
                self.arena.capture(sources)
            files = (*self._layout.files, *small)
        except Exception as error:
            log.exception("capturing %s step %d failed", self._series.name, step)
            cause = f"{type(error).__name__}: {error}"
        return Job(
            number=number, series=self._series.name, step=step, keep=self._series.keep, writer=self._writer,
            arena=self.arena, reading=reading, files=tuple(files), report=report, stage_s=time.monotonic() - started,
            metrics=metrics, per_rank=taken.per_rank_names, overwrite=overwrite, frame=self._frame, cause=cause,
        )  # fmt: skip

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
