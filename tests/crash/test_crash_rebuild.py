"""A journal that is damaged, and a rebuild of it that dies on the way."""

from __future__ import annotations

from pathlib import Path

import crash_run
import pytest
from child_process import AtComment
from crash_run import Save, Scenario, as_left
from ledger import REBUILDING

KEPT = Scenario((Save("dcp", 1), Save("dcp", 2), Save("dcp", 3), Save("hf", 3)), (), keep=5)


@pytest.fixture
def damaged(prepared, tmp_path) -> Path:
    """Four checkpoints and a journal with a page of nonsense."""
    run = prepared(KEPT, tmp_path / "run")
    path = run.with_name("alpha.journal.db")
    data = bytearray(path.read_bytes())
    data[4096:8192] = bytes(range(256)) * 16
    path.write_bytes(data)
    return run


@pytest.mark.parametrize("at", REBUILDING, ids=lambda at: f"{at.comment.replace(' ', '-')}-{at.nth}")
def test_a_rebuild_that_died_is_rebuilt_again(forks, damaged, at: AtComment):
    forks.crash(crash_run.rebuild, damaged, at)
    forks.do(crash_run.rebuild, damaged)

    rows = sorted(as_left(damaged)[0], key=lambda row: row.commit_seq)
    assert [(row.series, row.step, row.state) for row in rows] == [
        ("dcp", 1, "COMMITTED"),
        ("dcp", 2, "COMMITTED"),
        ("dcp", 3, "COMMITTED"),
        ("hf", 3, "COMMITTED"),
    ]
    forks.do(crash_run.check, damaged, True)
    # The damaged one is kept, once, for whoever wants to look at it.
    assert len(list(damaged.parent.glob("alpha.journal.db.corrupt-*Z"))) == 1
