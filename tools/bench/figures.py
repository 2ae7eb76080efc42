"""What a run's samples say: medians with their range, and ratios between peers."""

from __future__ import annotations

import dataclasses
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
        values: dict[tuple[str, str, str], list[float]] = {}
        for row in results.samples:
            values.setdefault((row["workload"], row["peer"], row["measure"]), []).append(row["value"])
        self._figures = {key: Figure.of(found) for key, found in values.items()}

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

    def state_bytes(self, workload: str) -> float | None:
        """Bytes of the tensors of a workload."""
        sizes = [
            about["state_bytes"] for about in self.results.peers.get(workload, {}).values() if "state_bytes" in about
        ]
        return float(sizes[0]) if sizes else None

    def ratio(self, workload: str, measure: str, peer: str, others: Iterable[str]) -> tuple[float, str] | None:
        """
        How many times the median of *peer* is that of the best of *others*, and which one that is.

        Those that fail the snapshot check are no rivals. Training lost counts as the stall at least: that nothing was
        lost by a save is noise.
        """
        mine = self._at_least_stall(workload, peer, measure)
        rivals = [
            (value, name)
            for name in others
            if not self.results.peers.get(workload, {}).get(name, {}).get("wrong_tensors")
            and (value := self._at_least_stall(workload, name, measure)) is not None
        ]
        if mine is None or not rivals:
            return None
        value, name = min(rivals)
        return mine / max(value, 1e-9), name

    def _at_least_stall(self, workload: str, peer: str, measure: str) -> float | None:
        value = self.median(workload, peer, measure)
        stall = self.median(workload, peer, "training_stall_s") if measure == "lost_s" else None
        return max(value, stall) if value is not None and stall is not None else value
