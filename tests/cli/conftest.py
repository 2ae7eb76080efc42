"""A run on disk for the command to look at, and the command itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from run_on_disk import Call, Done, Run

from ckptmgr.cli import main


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run in ``runs/alpha`` with nothing in it but one epoch of this process."""
    made = Run(tmp_path / "runs" / "alpha")
    yield made
    made.journal.close()


@pytest.fixture
def ckptmgr(capfd: pytest.CaptureFixture[str]) -> Call:
    """Run the command in this process."""

    def call(*words: str | Path) -> Done:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Done(code, *capfd.readouterr())

    return call
