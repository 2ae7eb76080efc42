"""What a run's samples say: medians with their range, and ratios between peers."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

from bench.rounds import Results


@dataclasses.dataclass(frozen=True)
class Figure:
    """The samples of one measure of one peer."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """The figure of some values, at least one."""
        return cls(statistics.median(values), min(values), max(values), len(values))


class Figures:
    """All figures of a run."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self._values: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
        for row in results.samples:
            key = (row["workload"], row["peer"], row["measure"])
            self._values.setdefault(key, []).append((row["round"], row["value"]))
        self._figures = {key: Figure.of([value for _, value in found]) for key, found in self._values.items()}

    def get(self, workload: str, peer: str, measure: str) -> Figure | None:
        """One figure, None if there is no sample."""
        return self._figures.get((workload, peer, measure))

    def median(self, workload: str, peer: str, measure: str) -> float | None:
        """One median, None if there is no sample."""
        found = self.get(workload, peer, measure)
        return found.median if found is not None else None

    def peers(self, workload: str) -> list[str]:
        """The peers of a workload, in the order in which they were started."""
        return list(self.results.peers.get(workload, {}))

    def workloads(self, beginning: str = "") -> list[str]:
        """The workloads whose names begin so."""
        return [name for name in self.results.peers if name.startswith(beginning)]

    def histories(self) -> list[str]:
        """The workloads of runs that hold many checkpoints, the fewest first; they are measured in random order."""
        return sorted(self.workloads("journal"), key=lambda name: int(name.rpartition(" ")[2]))

    def state_bytes(self, workload: str) -> float | None:
        """Bytes of the tensors of a workload."""
        sizes = [
            about["state_bytes"] for about in self.results.peers.get(workload, {}).values() if "state_bytes" in about
        ]
        return float(sizes[0]) if sizes else None

    def ratio(self, workload: str, measure: str, peer: str, others: Iterable[str]) -> tuple[float, str] | None:
        """
        How many times the median of *peer* is that of the best of *others*, and which one that is.

        Only rounds that both were measured in count, so that a peer that sat out is not compared with an hour in which
        the machine was busier. Those that fail the snapshot check are no rivals. Training lost counts as the stall at
        least: that nothing was lost by a save is noise.
        """
        found = []
        for name in others:
            if self.results.peers.get(workload, {}).get(name, {}).get("wrong_tensors"):
                continue
            rounds = self._rounds(workload, peer, measure) & self._rounds(workload, name, measure)
            mine, theirs = (self._in_rounds(workload, one, measure, rounds) for one in (peer, name))
            if mine is not None and theirs is not None:
                found.append((mine / max(theirs, 1e-9), name))
        return max(found, default=None)

    def _rounds(self, workload: str, peer: str, measure: str) -> set[int]:
        return {number for number, _ in self._values.get((workload, peer, measure), ())}

    def _in_rounds(self, workload: str, peer: str, measure: str, rounds: set[int]) -> float | None:
        """The median over some rounds, or over all if there are none; the stall at least where it is training lost."""
        values = self._values.get((workload, peer, measure), [])
        chosen = [value for number, value in values if number in rounds] or [value for _, value in values]
        if not chosen:
            return None
        stall = self._in_rounds(workload, peer, "training_stall_s", rounds) if measure == "lost_s" else None
        return max(statistics.median(chosen), stall or -math.inf)
