"""What `make torture` does with locks, memory and processes for real, in small: of each fault a point or two."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from torture import faults, locks, memory, orphans
from torture.report import NotTried

SWEEPS = {sweep.name: sweep for sweep in [*locks.sweeps(), *memory.sweeps(), *orphans.sweeps()]}
#: Name of the sweep, and in which transitions a point of it.
SUBSET = {
    "ENOLCK of a lock once | dcp steady | 1": "START GATHERED",
    "EIO of a lock sticky | dcp steady | 1": "COMMITTED",
    "ENOSYS under the run lock | dcp steady | 1": "START",
    "two managers, locks local to a mount | dcp steady | 1": "SHARDS DELETION",
    "OOM kill of the trainer | dcp steady | 1 | rank 0": "GATHERED",
    "OOM kill of the writer | hf overwrite | 1 | rank 0": "SHARDS",
    "OOM by the writer, the kernel chooses | hf steady | 1 | rank 0": "SHARDS",
    "a writer outlives its trainer | dcp steady | 1 | before a directory that was emptied is removed": "SHARDS",
    "a writer outlives its trainer | hf steady | 1 | before what is new gets its name": "SHARDS",
    "a writer outlives its trainer | dcp steady | 1 | afterwards": "SHARDS",
}


@pytest.mark.slow
@pytest.mark.xdist_group("torture")
@pytest.mark.parametrize("name", SUBSET, ids=lambda name: name.replace(" | ", "-").replace(" ", "_"))
def test_nothing_is_violated_for_real(ground: faults.Ground, tmp_path: Path, name: str):
    sweep = SWEEPS[name]
    try:
        prepared = ground.whole(sweep)
    except NotTried as reason:
        pytest.skip(str(reason))
    picked = random.Random(name)
    points = [
        picked.choice([n for n in sweep.points(prepared) if sweep.phase(n, prepared) == phase])
        for phase in SUBSET[name].split()
    ]
    outcomes = {n: sweep.strike(ground, tmp_path / str(n), n, prepared) for n in points}

    assert {n: one.violation for n, one in outcomes.items() if one.violation} == {}
    assert faults.NOT_REACHED not in {one.phase for one in outcomes.values()}


def test_every_fault_that_is_real_is_in_the_subset():
    def kind(name: str) -> str:
        return re.sub(r"^E[A-Z]+ | once$| sticky$", "", SWEEPS[name].fault)

    assert {kind(name) for name in SWEEPS} == {kind(name) for name in SUBSET}
