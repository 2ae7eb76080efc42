"""The harness itself: it must notice every way in which a rank can go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rank_processes import Here, RankFailed, on_ranks, run_on_ranks, start_ranks


@on_ranks(2)
def test_ranks_form_one_gloo_world(here: Here) -> None:
    import torch
    import torch.distributed as dist

    total = torch.tensor([here.rank + 1])
    dist.all_reduce(total)
    assert (total.item(), dist.get_backend(), dist.get_world_size()) == (3, "gloo", 2)
    assert here.everyone("ranks", here.rank) == [0, 1]


def _fail_on_both(here: Here) -> None:
    odd_value = 40 + here.rank
    assert odd_value < 0, f"rank {here.rank} is unhappy"


def _hang_on_one(here: Here) -> None:
    if here.rank == 1:
        time.sleep(60)


def _die_on_one(here: Here) -> None:
    if here.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def _leave_a_process(here: Here) -> None:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)


def test_every_failed_rank_is_told_with_its_traceback_and_locals(tmp_path: Path) -> None:
    # Without a world: a rank that fails at once takes down the other's, which may not have formed yet.
    with pytest.raises(RankFailed) as caught:
        run_on_ranks(2, _fail_on_both, tmp_path, distributed=False)
    for rank in (0, 1):
        assert f"rank {rank} is unhappy" in str(caught.value)
        assert f"odd_value = {40 + rank}" in str(caught.value)


def test_a_rank_that_hangs_is_ended_and_its_stack_told(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 hung.*_hang_on_one"), start_ranks(2, _hang_on_one, tmp_path) as w:
        w.join(2.0)


def test_a_rank_that_dies_is_told(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"rank 1 died ---\nexit code -9"):
        run_on_ranks(2, _die_on_one, tmp_path, distributed=False)


def test_a_process_that_outlives_its_rank_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="outlived their rank"):
        run_on_ranks(1, _leave_a_process, tmp_path)
