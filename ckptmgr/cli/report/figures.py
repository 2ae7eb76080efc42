"""
From the rows of a journal to the numbers of a chart, never more of them than a chart can show.

Pure. A journal from elsewhere may hold any finite number, so that times and durations are taken only as far as
they can be true.
"""

from __future__ import annotations

import bisect
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence

from ckptmgr.lifecycle import CheckpointRecord, CheckpointState

#: The year 3000, and three years: nothing later or longer is believed.
_LATEST = 32_503_680_000.0
_LONGEST_S = 1e8


@dataclasses.dataclass(frozen=True)
class Bin:
    """Some checkpoints in the order of their attempts: from which step to which, and the values that they have."""

    first_step: int
    last_step: int
    count: int
    low: float
    middle: float
    high: float


@dataclasses.dataclass(frozen=True)
class Lane:
    """When the attempts of one series ended or began: moments, in Unix seconds, with how many fall on each."""

    series: str
    kept: Sequence[tuple[float, int]]
    gone: Sequence[tuple[float, int]]
    failed: Sequence[tuple[float, int]]
    in_flight: Sequence[tuple[float, int]]


def moment(at: float | None) -> float | None:
    """A time that can be true, else None."""
    return at if at is not None and 0 < at < _LATEST else None


def seconds(took: float | None) -> float | None:
    """A duration that can be true, else None."""
    return took if took is not None and 0 <= took < _LONGEST_S else None


def binned(
    records: Iterable[CheckpointRecord], value: Callable[[CheckpointRecord], float | None], *, most: int
) -> list[Bin]:
    """The *value* of each record that has one, in at most *most* bins of about as many records each."""
    known = [(record.step, found) for record in records if (found := value(record)) is not None]
    size = max(1, -(-len(known) // most))
    bins = []
    for start in range(0, len(known), size):
        chunk = known[start : start + size]
        steps, values = [step for step, _ in chunk], [found for _, found in chunk]
        bins.append(Bin(min(steps), max(steps), len(chunk), min(values), statistics.median(values), max(values)))
    return bins


def span(records: Iterable[CheckpointRecord], others: Iterable[float | None] = ()) -> tuple[float, float] | None:
    """From the first to the last moment that *records* or *others* tell of, at least a second; None without any."""
    told = [other for other in map(moment, others) if other is not None]
    for record in records:
        for at in (record.created_at, record.finished_at, record.retired_at):
            if (known := moment(at)) is not None:
                told.append(known)
    return (min(told), max(*told, min(told) + 1.0)) if told else None


def lane(series: str, records: Sequence[CheckpointRecord], within: tuple[float, float], *, most: int) -> Lane:
    """The lane of *series*, whose *records* these are, with at most *most* different moments of each kind."""

    def ended(wanted: Callable[[CheckpointRecord], bool]) -> list[tuple[float, int]]:
        times = [record.finished_at or record.created_at for record in records if wanted(record)]
        return thinned([at for at in map(moment, times) if at is not None], within, most=most)

    return Lane(
        series,
        kept=ended(lambda record: record.is_live),
        gone=ended(lambda record: record.state is CheckpointState.COMMITTED and not record.is_live),
        failed=ended(lambda record: record.state is CheckpointState.FAILED),
        in_flight=ended(lambda record: record.is_in_flight),
    )


def thinned(times: Iterable[float], within: tuple[float, float], *, most: int) -> list[tuple[float, int]]:
    """The *times*, those too close together to be told apart as one, with how many each stands for."""
    low, high = within
    found: dict[int, list[float]] = {}
    for at in times:
        found.setdefault(min(most - 1, int((at - low) / (high - low) * most)), []).append(at)
    return [(statistics.fmean(group), len(group)) for _, group in sorted(found.items())]


def disk_use(
    records: Iterable[CheckpointRecord], names: Sequence[str], until: float, *, most: int
) -> list[tuple[float, tuple[int, ...]]]:
    """
    How many bytes of committed checkpoints stood on disk, by series, from each moment on.

    Args:
        records: Of the run.
        names: Its series; what is of another one counts for the last.
        until: When to end.
        most: Moments to give; where there are more, the fullest of each stretch.
    """
    changes: list[tuple[float, int, int]] = []
    for record in records:
        committed = moment(record.committed_at)
        if committed is None or not record.bytes:
            continue
        place = names.index(record.series) if record.series in names else len(names) - 1
        changes.append((committed, place, record.bytes))
        if (gone := moment(record.retired_at)) is not None:
            changes.append((max(gone, committed), place, -record.bytes))
    changes.sort(key=lambda change: change[0])
    now = [0] * len(names)
    points: list[tuple[float, tuple[int, ...]]] = []
    for at, place, count in changes:
        now[place] += count
        points.append((at, tuple(now)))
    if not points:
        return []
    if len(points) > most:
        points = _fullest(points, most)
    return [*points, (max(until, points[-1][0]), tuple(now))]


def _fullest(points: Sequence[tuple[float, tuple[int, ...]]], most: int) -> list[tuple[float, tuple[int, ...]]]:
    times = [at for at, _ in points]
    low, high = times[0], times[-1]
    found, start = [], 0
    for number in range(1, most + 1):
        end = len(points) if number == most else bisect.bisect_right(times, low + (high - low) * number / most)
        if end > start:
            found.append(max(points[start:end], key=lambda point: sum(point[1])))
            start = end
    return found


def share(counts: Sequence[tuple[int, int]], *, most: int) -> list[tuple[int, int, int, int]]:
    """Ranks with a number each, as at most *most* stretches of ranks: first, last, least and most of each."""
    size = max(1, -(-len(counts) // most))
    chunks = [counts[start : start + size] for start in range(0, len(counts), size)]
    return [(c[0][0], c[-1][0], min(n for _, n in c), max(n for _, n in c)) for c in chunks]
