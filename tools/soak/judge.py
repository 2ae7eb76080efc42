"""
Whether something grows with the number of saves. Pure: measured values in, verdicts out.

Two looks at each measure, and only what both find is called growth: the slope of Theil and Sen (the
median of the slopes between all pairs, which a few wild values do not move), and the medians of the
first and of the last third.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Sequence

#: Of the values of a life, the share that belongs to warming up: caches fill, memory is laid out.
_WARM_UP = 0.1
#: Fewer values than this tell nothing.
_FEWEST = 9


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """
    What one measure may grow by in 1000 saves and still not be said to grow: the larger of two.

    Args:
        absolute: In the measure's unit.
        relative: Of its value at first.
    """

    absolute: float
    relative: float = 0.0

    def of(self, first: float) -> float:
        """The slope per 1000 saves that is tolerated."""
        return max(self.absolute, self.relative * abs(first))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One measure: medians of the first and the last third, the slope per 1000 saves, and what it comes to."""

    measure: str
    first: float
    last: float
    slope: float
    tolerated: float
    values: int
    grows: bool


def judge(measure: str, values: Iterable[tuple[float, float]], tolerance: Tolerance) -> Verdict | None:
    """
    Judge one measure of one life.

    Args:
        measure: Its name.
        values: (number of saves before it, value), in order.
        tolerance: What it may grow by.

    Returns:
        None if there are too few values to tell.
    """
    points = list(values)
    points = points[int(_WARM_UP * len(points)) :]
    if len(points) < _FEWEST:
        return None
    third = len(points) // 3
    first = statistics.median(value for _, value in points[:third])
    last = statistics.median(value for _, value in points[-third:])
    slope = 1000 * theil_sen(points)
    tolerated = tolerance.of(first)
    apart = statistics.median(at for at, _ in points[-third:]) - statistics.median(at for at, _ in points[:third])
    grows = slope > tolerated and last - first > tolerated * apart / 1000
    return Verdict(measure, first, last, slope, tolerated, len(points), grows)


def theil_sen(points: Sequence[tuple[float, float]]) -> float:
    """The median slope of all pairs of points; 0 where there is none."""
    slopes = [(b - a) / (y - x) for (x, a), (y, b) in itertools.combinations(points, 2) if y != x]
    return statistics.median(slopes) if slopes else 0.0


def table(verdicts: Iterable[Verdict]) -> str:
    """The verdicts as a Markdown table."""
    lines = [
        "| measure | first third | last third | per 1000 saves | tolerated | values | verdict |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for one in verdicts:
        numbers = " | ".join(_number(value) for value in (one.first, one.last, one.slope, one.tolerated))
        lines.append(f"| {one.measure} | {numbers} | {one.values} | {'**grows**' if one.grows else 'no growth'} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
