"""One fork server for all crash tests, and runs to start from, made once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import crash_run
import pytest
from child_process import ForkServer
from crash_run import Scenario


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    here = Path(__file__).parent
    server = ForkServer("ckptmgr.manager", "crash_run", path=(here / "in_writer", here))
    yield server
    server.close()


@pytest.fixture(scope="session")
def prepared(forks: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Scenario, Path], Path]:
    """Puts a copy of a run that has done *scenario*'s past at a place; the past is lived through once."""
    made: dict[object, Path] = {}
    making = threading.Lock()  # one thread of a test must not copy what another still lives through

    def put(scenario: Scenario, to: Path) -> Path:
        with making:
            run = made.get(scenario.before)
            if run is None:
                run = tmp_path_factory.mktemp("past") / "alpha"
                # Even a first save finds a journal: creating one takes longer than all the rest.
                forks.do(crash_run.prepare, run, scenario)
                forks.do(crash_run.recover_once, run)
                made[scenario.before] = run
        return crash_run.copy_of(run, to)

    return put
