"""The soak's own modules, and a fork server with everything imported, under the shim where that can be built."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from child_process import Ended, ForkServer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools")]

from soak import trainer  # noqa: E402
from torture import shim  # noqa: E402


@pytest.fixture(scope="session")
def soak() -> Iterator[Callable[..., Ended]]:
    """Lives one life on one rank in a folder, of so many moves; other facts as of `soak.trainer.Life`."""
    faults = shim.why_not() is None
    environment = {"LD_PRELOAD": str(shim.build())} if faults else {}
    forks = ForkServer("soak.trainer", path=(ROOT / "tools",), environment=environment)

    def live(folder: Path, moves: int, **facts: Any) -> Ended:
        shim.give(folder / "orders", folder / "run", shim.Orders())
        known = {"seed": 1, "every": 5, "first": 0, "until": 1e12, "number": 0, "faults": faults, "one_life": True}
        life = trainer.Life(folder=str(folder), rank=0, world=1, moves=moves, **known | facts)
        return forks.run(trainer.live, life, timeout_s=250)

    yield live
    forks.close()
