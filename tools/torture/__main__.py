"""
``make torture``: every fault at every place, and one table.

    python tools/torture [--seed N] [--budget SECONDS] [--only WORDS] [--report FILE] [--again POINT]
    python tools/torture --mutants [--only WORDS]

Every sweep gets its share of the time; within a sweep the seed decides which points come first. A
report that was begun with the same seed and code is gone on with, so a second call tries other points.
Exit status 1 if anything was violated, or if a mutant survived; 2 if nothing could be tried.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), *(str(ROOT / "tests" / name) for name in ("crash", "mutants", ""))]

import kept  # noqa: E402

from torture import (  # noqa: E402
    bitrot,
    faults,
    fulldisks,
    hosts,
    hunt,
    locks,
    memory,
    orphans,
    powerloss,
    realdisks,
    shim,
)
from torture.report import NotTried, Report, Result, table  # noqa: E402


class Technique(Protocol):
    """One fault on one run. *prepared* is what `prepare` returns; sweeps that are the `same` share it."""

    fault: str

    @property
    def name(self) -> str:
        """Unique."""

    @property
    def same(self) -> object:
        """Equal where what is prepared can be shared."""

    def prepare(self, ground: faults.Ground, folder: Path) -> Sequence[Any]:
        """Let the run go by, to know its points. Raises `NotTried` where this machine lacks something."""

    def points(self, prepared: Sequence[Any]) -> Iterator[int]:
        """All points."""

    def strike(self, ground: faults.Ground, folder: Path, n: int, prepared: Sequence[Any]) -> faults.Outcome:
        """The fault at one point, and what came of it."""


def main() -> int:
    """Torture, print the table, say what was violated."""
    parser = argparse.ArgumentParser(prog="torture", description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="which points come first (default 1)")
    parser.add_argument("--budget", type=float, default=1500, help="seconds for all of it (default 1500)")
    parser.add_argument("--only", default="", help="only sweeps whose name contains these words")
    parser.add_argument("--report", type=Path, default=ROOT / "runs" / "torture.jsonl", help="where results are kept")
    parser.add_argument("--again", help="one point by its name, whatever the report says; what is left of it stays")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="points at a time")
    parser.add_argument("--mutants", action="store_true", help="let the kept mutants loose, to see that each is caught")
    options = parser.parse_args()
    if reason := shim.why_not():
        print(f"nothing was tried: {reason}", file=sys.stderr)
        return 2
    if options.mutants:
        return _mutants(options)
    report = Report(options.report, f"{options.seed} {_code()}")
    with tempfile.TemporaryDirectory(prefix="torture-", ignore_cleanup_errors=True) as folder:
        ground = faults.Ground(Path(folder), shim.build())
        try:
            if options.again:
                return _again(ground, options.again)
            possible = _torture(ground, report, options)
        finally:
            ground.close()
    print(table(report.results.values(), (*faults.TRANSITIONS, *bitrot.OUTCOMES), possible))
    for name, reason in report.not_tried.items():
        print(f"not tried: {name}: {reason}")
    for result in report.violations:
        print(f"\nVIOLATED: {result.point}\n{result.violation}")
    return 1 if report.violations else 0 if report.results else 2


def _torture(ground: faults.Ground, report: Report, options: argparse.Namespace) -> dict[str, int]:
    began = time.monotonic()
    sweeps = [sweep for sweep in _sweeps() if options.only in sweep.name]
    possible: dict[str, int] = {}
    plans = []
    with ThreadPoolExecutor(options.workers) as pool:
        whole = list(pool.map(lambda sweep: _prepared(ground, sweep), sweeps))
    for sweep, prepared in zip(sweeps, whole, strict=True):
        if isinstance(prepared, NotTried):
            report.leave_out(sweep.fault, str(prepared))
            continue
        points = list(sweep.points(prepared))
        possible[sweep.fault] = possible.get(sweep.fault, 0) + len(points)
        todo = [n for n in points if f"{sweep.name} | {n}" not in report.results]
        random.Random(f"{options.seed} {sweep.name}").shuffle(todo)
        plans.append(_Plan(sweep, prepared, todo))
    _say(f"{len(sweeps)} sweeps, {sum(possible.values())} points, {time.monotonic() - began:.0f} s to prepare")
    random.Random(options.seed).shuffle(plans)
    choosing = threading.Lock()

    def strike() -> None:
        while time.monotonic() - began < options.budget:
            with choosing:
                left = [plan for plan in plans if plan.todo]
                if not left:
                    return
                # Whoever had the least time: every sweep has had its share whenever the budget ends.
                plan = min(left, key=lambda one: one.spent_s)
                n = plan.todo.pop(0)
                plan.spent_s += plan.last_s
                if len(report.results) % 500 == 499:
                    so_far = f"{len(report.results) + 1} points, {len(report.violations)} violations"
                    _say(f"{so_far}, {time.monotonic() - began:.0f} s")
            started = time.monotonic()
            outcome = plan.sweep.strike(ground, ground.folder / f"{id(plan)}-{n}", n, plan.prepared)
            took = time.monotonic() - started
            with choosing:
                plan.spent_s += took - plan.last_s
                plan.last_s = took
            name = f"{plan.sweep.name} | {n}"
            report.add(Result(name, plan.sweep.fault, outcome.phase, outcome.violation, took, outcome.caught))
            if outcome.violation:
                _say(f"VIOLATED: {name}")

    with ThreadPoolExecutor(options.workers) as pool:
        for done in [pool.submit(strike) for _ in range(options.workers)]:
            done.result()
    return possible


@dataclasses.dataclass
class _Plan:
    """A sweep, its points that are left in the order of the seed, and the seconds it has had."""

    sweep: Technique
    prepared: Sequence[Any]
    todo: list[int]
    spent_s: float = 0.0
    last_s: float = 0.0


def _prepared(ground: faults.Ground, sweep: Technique) -> Sequence[Any] | NotTried:
    try:
        return ground.whole(sweep)
    except NotTried as reason:
        return reason


def _mutants(options: argparse.Namespace) -> int:
    began = time.monotonic()
    chosen = [mutant for mutant in kept.MUTANTS if options.only in mutant.name]
    found = hunt.hunt(chosen, options.workers)
    survived = [one for one in found if not one.caught]
    print(hunt.table(found))
    for one in survived:
        print(f"\nSURVIVED: {one.mutant}, by {one.technique}\n{one.where}")
    caught = len({one.mutant for one in found} - {one.mutant for one in survived})
    print(f"\n{caught} of {len(chosen)} mutants caught by all that is named, {time.monotonic() - began:.0f} s")
    return 1 if survived else 0 if found else 2


def _again(ground: faults.Ground, name: str) -> int:
    wanted, _, n = name.rpartition(" | ")
    (sweep,) = (one for one in _sweeps() if one.name == wanted)
    prepared = ground.whole(sweep)
    outcome = sweep.strike(ground, Path(tempfile.mkdtemp(prefix="torture-point-")), int(n), prepared)
    found = "caught, as it must be" if outcome.caught else "nothing was violated"
    print(f"{outcome.phase}: {outcome.violation or found}")
    return 1 if outcome.violation else 0


def _sweeps() -> list[Technique]:
    return [
        sweep
        for module in (faults, powerloss, realdisks, fulldisks, hosts, locks, orphans, memory, bitrot)
        for sweep in module.sweeps()
    ]


def _code() -> str:
    """A fingerprint of everything that is tested and of what tests it."""
    digest = hashlib.sha256()
    folders = (ROOT / "ckptmgr", ROOT / "migrations", ROOT / "tools" / "torture", ROOT / "tests" / "crash")
    for path in sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".c")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
