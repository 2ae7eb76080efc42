"""What passes between ranks belongs to one save, and is not taken for another's."""

from __future__ import annotations

import time

import pytest
from rank_processes import Here, on_ranks
from saving_ranks import timeouts

from ckptmgr.errors import RanksDisagree
from ckptmgr.ranks import Ranks


@on_ranks(2)
def test_a_message_of_an_earlier_save_is_passed_over(here: Here) -> None:
    """Whoever gave up on a save for a reason of its own has left messages of it unread."""
    ranks = Ranks(timeouts())
    try:
        if here.is_leader:
            ranks.order(1, 4, "the outcome of save 1", 10)
            ranks.order(2, 0, "write save 2", 10)
            ranks.order(2, 4, "the outcome of save 2", 10)
            assert ranks.collect(2, 1, "mine", 10) == {0: "mine", 1: "save 2 is written"}
        else:
            assert ranks.await_order(2, (0,), 10) == (0, "write save 2")
            assert ranks.await_order(2, (2, 4), 10) == (4, "the outcome of save 2")
            ranks.report(1, 1, "save 1 is written", 10)
            ranks.report(2, 1, "save 2 is written", 10)
        here.meet()
    finally:
        ranks.close()


@on_ranks(2)
def test_a_message_of_a_later_save_is_not_taken_for_this_ones(here: Here) -> None:
    ranks = Ranks(timeouts())
    try:
        if here.is_leader:
            ranks.order(3, 0, "write save 3", 10)
            assert ranks.collect(2, 1, "mine", 10) == {0: "mine"}
        else:
            with pytest.raises(TimeoutError, match="at save 3"):
                ranks.await_order(2, (0,), 10)
            ranks.report(3, 1, "save 3 is written", 10)
        here.meet()
    finally:
        ranks.close()


@on_ranks(5)
def test_every_rank_learns_the_lowest_and_the_highest_of_all_and_each_ones_where_it_asks(here: Here) -> None:
    ranks = Ranks(timeouts())
    try:
        for odd in range(here.world_size):
            mine = [1, -7, 2**62, 5] if here.rank == odd else [0, 7, 0, 5]
            assert ranks.agree(mine) == ([0, -7, 0, 5], [1, 7, 2**62, 5])
        assert ranks.rows([here.rank, 5]) == [[rank, 5] for rank in range(here.world_size)]
    finally:
        ranks.close()


@on_ranks(3)
def test_a_rank_that_does_not_come_is_missed_by_the_others_in_time(here: Here) -> None:
    ranks = Ranks(timeouts(collective_s=5))
    try:
        if here.rank == 1:
            here.meet()
            return
        began = time.monotonic()
        with pytest.raises(RanksDisagree, match="not all ranks arrived"):
            ranks.agree([1])
        assert time.monotonic() - began < 20
        here.meet()
    finally:
        ranks.close()
