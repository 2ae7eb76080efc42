"""`make torture` in small: of each fault on one run, a fixed choice of points with one of every transition."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torture import bitrot, faults, powerloss
from torture.shim import Phase

SWEEPS = {sweep.name: sweep for sweep in [*faults.sweeps(), *powerloss.sweeps()]}
#: Name of the sweep, and how many points of each transition.
SUBSET = {
    "SIGKILL of all | create | 1": 1,
    "SIGKILL of the trainer only | dcp steady | 1": 1,
    "SIGKILL of one writer | hf overwrite | 1": 2,
    "SIGKILL of one rank | hf overwrite | 2 | rank 0": 1,
    "torn write, then SIGKILL | hf overwrite-aside | 1": 1,
    "short write | hf steady | 1": 1,
    "ENOSPC sticky | hf overwrite | 1": 1,
    "EIO once | dcp overwrite | 1": 1,
    "EIO at close | hf overwrite | 1": 1,
    "EDQUOT once | hf overwrite | 1": 1,
    "ESTALE sticky | dcp steady | 1": 1,
    "SIGSTOP past a takeover | dcp overwrite | 1": 1,
    "SIGKILL of all | dcp overwrite | 1 | recovery after: GATHERED with a published directory": 2,
    "EIO once | hf steady | 1 | recovery after: COMMITTED with a stale meta.json and link": 2,
    "power loss, posix | hf overwrite | 1": 3,
    "power loss, posix | dcp steady | 2": 2,
    "power loss, ext4 | dcp steady | 1": 4,
    "power loss, posix | dcp large | 1": 1,
    "power loss, posix, while recovering | dcp overwrite | 1"
    " | after: GATHERED with a complete staging directory": 4,
    "power loss, ext4, while recovering | hf steady | 1 | after: COMMITTED with a stale meta.json and link": 2,
}  # fmt: skip


def chosen(sweep: Any, prepared: Sequence[Any], each: int) -> list[int]:
    """Points of every transition, the same ones wherever the run makes the same calls."""
    by_phase: dict[str, list[int]] = {}
    for n in sweep.points(prepared):
        what = prepared[n] if isinstance(sweep, powerloss.PowerLoss) else prepared[n - 1]
        phase = what.phase.name if isinstance(what.phase, Phase) else what.phase
        by_phase.setdefault(phase, []).append(n)
    picked = random.Random(sweep.name)
    return [n for mine in by_phase.values() for n in picked.sample(mine, min(each, len(mine)))]


@pytest.mark.slow
@pytest.mark.xdist_group("torture")
@pytest.mark.parametrize("name", SUBSET, ids=lambda name: name.replace(" | ", "-").replace(" ", "_"))
def test_nothing_is_violated(ground: faults.Ground, tmp_path: Path, name: str):
    sweep = SWEEPS[name]
    prepared = sweep.prepare(ground, tmp_path / "whole")
    points = chosen(sweep, prepared, SUBSET[name])
    violations = {n: sweep.strike(ground, tmp_path / str(n), n, prepared).violation for n in points}

    assert len(points) >= SUBSET[name]
    assert {n: text for n, text in violations.items() if text} == {}


@pytest.mark.slow
@pytest.mark.xdist_group("torture")
@pytest.mark.parametrize("words", ["checkpoint", "hf", "journal"])
def test_all_that_can_rot_has_points_and_one_of_them_is_judged(ground: faults.Ground, tmp_path: Path, words: str):
    sweeps = [sweep for sweep in bitrot.sweeps() if (sweep.words, sweep.world) == (words, 1)]
    prepared = ground.whole(sweeps[0])
    points = {sweep.fault: list(sweep.points(prepared)) for sweep in sweeps}
    n = random.Random(words).choice(points[sweeps[0].fault])
    outcome = sweeps[0].strike(ground, tmp_path / str(n), n, prepared)

    assert all(points.values())
    assert sum(map(len, points.values())) == len(prepared), "no row has them"
    assert outcome.violation == ""
    assert outcome.phase in bitrot.OUTCOMES


def test_every_fault_of_the_matrix_is_in_the_subset():
    def kind(name: str) -> str:
        return SWEEPS[name].fault.removesuffix(" once").removesuffix(" sticky")

    assert {kind(name) for name in SWEEPS} == {kind(name) for name in SUBSET}
