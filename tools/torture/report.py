"""What torture found: one line per point in a file that a later call goes on with, and one table for people."""

from __future__ import annotations

import collections
import dataclasses
import json
import threading
from collections.abc import Iterable
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Result:
    """One point: which one (unique), the table's row and column, what was wrong (or empty), what it took."""

    point: str
    fault: str
    transition: str
    violation: str
    seconds: float


class Report:
    """
    Results so far, in a file of JSON lines, so that a torture that was stopped goes on where it was.

    Args:
        path: The file. What it holds of the same *key* is taken over; else it starts anew.
        key: What the results depend on: the seed and the code under test.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._lock = threading.Lock()
        self.results: dict[str, Result] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and json.loads(lines[0]) == {"key": key}:
            for line in lines[1:]:
                result = Result(**json.loads(line))
                self.results[result.point] = result
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"key": key}) + "\n")
        self._path = path

    def add(self, result: Result) -> None:
        """Take down one more result."""
        with self._lock:
            self.results[result.point] = result
            with self._path.open("a") as stream:
                stream.write(json.dumps(dataclasses.asdict(result)) + "\n")

    @property
    def violations(self) -> list[Result]:
        """All points where something did not hold."""
        return [result for result in self.results.values() if result.violation]


def table(results: Iterable[Result], columns: Iterable[str], possible: dict[str, int]) -> str:
    """
    Fault × transition: points tried in each; then of how many, violations, seconds. As Markdown.

    Args:
        results: All results.
        columns: The transitions, in order.
        possible: Fault → how many points it has.
    """
    by_fault: dict[str, list[Result]] = collections.defaultdict(list)
    for result in results:
        by_fault[result.fault].append(result)
    columns = [one for one in columns if any(result.transition == one for each in by_fault.values() for result in each)]
    lines = [
        "| fault | " + " | ".join(one.lower() for one in columns) + " | points | of | violations | seconds |",
        "| --- |" + " ---: |" * (len(columns) + 4),
    ]
    rows = [(fault, by_fault[fault], possible.get(fault, 0)) for fault in possible if by_fault[fault]]
    rows.append(("**all**", [one for each in by_fault.values() for one in each], sum(possible.values())))
    for fault, mine, of in rows:
        count = collections.Counter(result.transition for result in mine)
        cells = [str(count[one]) if count[one] else "" for one in columns]
        bad = sum(bool(result.violation) for result in mine)
        took = sum(result.seconds for result in mine)
        lines.append(f"| {fault} | {' | '.join(cells)} | {len(mine)} | {of} | {bad} | {took:.0f} |")
    return "\n".join(lines)
