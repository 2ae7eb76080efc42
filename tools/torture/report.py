"""What torture found: one line per point in a file that a later call goes on with, and one table for people."""

from __future__ import annotations

import collections
import dataclasses
import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: How the rows begin that must fail: what they do cannot be survived, so whoever finds nothing is blind.
CONTROL = "control: "


class NotTried(Exception):
    """A sweep cannot be tried on this machine; says what is missing."""


@dataclasses.dataclass(frozen=True)
class Result:
    """
    One point: which one (unique), the table's row and column, what was wrong (or empty), what it took.

    *caught*: at a point of a control, whether the judge found what must be found.
    """

    point: str
    fault: str
    transition: str
    violation: str
    seconds: float
    caught: bool = False


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
        self.not_tried: dict[str, str] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and json.loads(lines[0]) == {"key": key}:
            for facts in map(json.loads, lines[1:]):
                if "not tried" not in facts:
                    self.results[facts["point"]] = Result(**facts)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"key": key}) + "\n")
        self._path = path

    def add(self, result: Result) -> None:
        """Take down one more result."""
        with self._lock:
            self.results[result.point] = result
            self._write(dataclasses.asdict(result))

    def leave_out(self, sweep: str, reason: str) -> None:
        """Take down that a sweep cannot be tried here, and why."""
        self.not_tried[sweep] = reason
        self._write({"not tried": sweep, "reason": reason})

    def _write(self, facts: dict[str, Any]) -> None:
        with self._path.open("a") as stream:
            stream.write(json.dumps(facts) + "\n")

    @property
    def violations(self) -> list[Result]:
        """All points where something did not hold, and the controls of which no point was caught."""
        found = [result for result in self.results.values() if result.violation]
        for fault, mine in _by_fault(self.results.values()).items():
            if fault.startswith(CONTROL) and not any(result.caught for result in mine):
                found.append(Result(fault, fault, "", f"none of {len(mine)} points was caught: the judge is blind", 0))
        return found


def table(results: Iterable[Result], columns: Iterable[str], possible: dict[str, int]) -> str:
    """
    Fault × transition: points tried in each; then of how many, violations, seconds. As Markdown.

    Args:
        results: All results.
        columns: The transitions, in order.
        possible: Fault → how many points it has.
    """
    by_fault = _by_fault(results)
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
        bad: int | str = sum(bool(result.violation) for result in mine)
        if fault.startswith(CONTROL):
            bad = f"{bad}; caught {sum(result.caught for result in mine)}"
        took = sum(result.seconds for result in mine)
        lines.append(f"| {fault} | {' | '.join(cells)} | {len(mine)} | {of} | {bad} | {took:.0f} |")
    return "\n".join(lines)


def _by_fault(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = collections.defaultdict(list)
    for result in results:
        found[result.fault].append(result)
    return found
