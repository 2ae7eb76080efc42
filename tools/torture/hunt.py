"""
``make mutants``: let every kept mutant loose, and see that each technique that is named with it catches it.

What a mutant is and the list of them stand in tests/mutants. A technique tries its points first on the
product as it is, in a copy like the mutants' own, and must find nothing there; then on the mutant, until
it finds what it is expected to find.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mutants import Mutant, Overlay, StaleMutant, Tests, Torture, failed_test, reads_as, run_tests, stem

from torture import faults, powerloss, shim
from torture.faults import Ground


@dataclasses.dataclass(frozen=True)
class Hunted:
    """One technique after one mutant: where it showed, or why it counts as not caught; points tried, seconds."""

    mutant: str
    technique: str
    caught: bool
    where: str
    points: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Tried:
    """One point: what it is, in words, and what was violated there, or nothing."""

    where: str
    violation: str


def hunt(mutants: Sequence[Mutant], workers: int) -> list[Hunted]:
    """Try the control of every technique, then every technique on its mutants; what came of each."""
    techniques = list(dict.fromkeys(technique for mutant in mutants for technique in mutant.caught))
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with _Stems() as stems:
            bad = _controls(folder / "control", stems, techniques, workers)

            def after(mutant: Mutant) -> list[Hunted]:
                found = _after(folder / mutant.name, stems, mutant, bad)
                for one in found:
                    print(
                        f"{'caught' if one.caught else 'SURVIVED'}: {mutant.name} by {one.technique}", file=sys.stderr
                    )
                return found

            with ThreadPoolExecutor(workers) as pool:
                return [one for found in pool.map(after, mutants) for one in found]


class _Stems:
    """What everything is forked from: with the shim for torture, without it for tests that bring their own tools."""

    def __enter__(self) -> _Stems:
        self.torture = stem({"LD_PRELOAD": str(shim.build())})
        self.tests = stem()
        return self

    def __exit__(self, *_: object) -> None:
        self.torture.close()
        self.tests.close()


def table(found: Sequence[Hunted]) -> str:
    """Mutant × technique, as Markdown."""
    lines = ["| mutant | technique | caught at | points | seconds |", "| --- | --- | --- | ---: | ---: |"]
    for one in found:
        where = one.where if one.caught else f"**SURVIVED** ({one.where.partition(chr(10))[0]})"
        lines.append(f"| {one.mutant} | {one.technique} | {where} | {one.points} | {one.seconds:.0f} |")
    return "\n".join(lines)


def _controls(
    folder: Path, stems: _Stems, techniques: Sequence[Torture | Tests], workers: int
) -> dict[Torture | Tests, str]:
    """Every technique on the product as it is: those that find something there, and what."""
    overlay = Overlay(folder / "overlay", None)
    bad: dict[Torture | Tests, str] = {}
    sweeps = [one for one in techniques if isinstance(one, Torture)]
    tests = [one for one in techniques if isinstance(one, Tests)]
    with _ground(folder, stems, overlay) as ground:

        def by_torture(job: tuple[int, Torture]) -> None:
            number, technique = job
            for tried in _tortured(ground, folder / str(number), technique):
                if tried.violation:
                    bad[technique] = f"control: {tried.where}: {tried.violation}"

        def by_tests(batch: Sequence[Tests]) -> None:
            nodes = tuple(dict.fromkeys(node for one in batch for node in one.nodes))
            ended = run_tests(stems.tests, overlay, nodes, timeout_s=600)
            if ended.status:
                bad.update(dict.fromkeys(batch, f"control: {ended.output}"))

        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(by_tests, batch) for n in range(workers) if (batch := tests[n::workers])]
            jobs += [pool.submit(by_torture, job) for job in enumerate(sweeps)]
            for job in jobs:
                job.result()
    return bad


def _after(folder: Path, stems: _Stems, mutant: Mutant, bad: dict[Torture | Tests, str]) -> list[Hunted]:
    try:
        overlay = Overlay(folder / "overlay", mutant)
    except StaleMutant as error:
        return [Hunted(mutant.name, one.technique, False, str(error), 0, 0.0) for one in mutant.caught]
    found = []
    with _ground(folder, stems, overlay) as ground:
        for number, technique in enumerate(mutant.caught):
            began = time.monotonic()
            where, points, caught = "nothing was found", 0, False
            if technique in bad:
                where = bad[technique]
            elif isinstance(technique, Tests):
                ended = run_tests(stems.tests, overlay, technique.nodes)
                points = len(technique.nodes)
                caught = failed_test(ended, technique.sign) is not None
                where = failed_test(ended, technique.sign) or ended.output
            else:
                for tried in _tortured(ground, folder / str(number), technique):
                    points += 1
                    caught = reads_as(tried.violation, technique.sign)
                    where = tried.where if caught else tried.violation or where
                    if caught:
                        break
            if caught and (missing := overlay.never_imported()):
                where, caught = f"never imported: {', '.join(missing)}", False
            found.append(Hunted(mutant.name, technique.technique, caught, where, points, time.monotonic() - began))
    return found


def _tortured(ground: Ground, folder: Path, technique: Torture) -> Iterator[_Tried]:
    """The technique's points, one after the other; if not even a run without a fault is right, that alone."""
    (sweep,) = (one for one in (*faults.sweeps(), *powerloss.sweeps()) if one.name == technique.sweep)
    try:
        prepared: Sequence[Any] = ground.whole(sweep)
    except AssertionError as error:
        yield _Tried("a run without any fault", str(error))
        return
    phases = technique.phases.split()
    points = [n for n in sweep.points(prepared) if sweep.phase(n, prepared) in phases]
    assert points, f"{technique.sweep} has no point in {technique.phases}"
    random.Random(technique.sweep).shuffle(points)  # what is close together often says the same
    for n in points[: technique.most]:
        outcome = sweep.strike(ground, folder / str(n), n, prepared)
        words, _, rest = outcome.violation.partition(": ")
        yield _Tried(f"{outcome.phase.lower()}: {words}", rest)


@contextlib.contextmanager
def _ground(folder: Path, stems: _Stems, overlay: Overlay) -> Iterator[Ground]:
    ground = Ground(folder, shim.build(), path=(overlay.folder,), stem=stems.torture.address)
    try:
        yield ground
    finally:
        ground.close()
