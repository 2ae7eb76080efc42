"""Every state with every trigger, and who leads: the record, never memory."""

from __future__ import annotations

import itertools

import pytest

from ckptmgr.errors import CheckpointError, IllegalTransition
from ckptmgr.lifecycle import (
    IN_FLIGHT,
    TRANSITIONS,
    CheckpointRecord,
    CheckpointState,
    Format,
    Lifecycle,
)

S = CheckpointState
TRIGGERS = ("start_writing", "gather", "commit", "fail")
#: The picture in words, independent of the table under test.
LEGAL = {
    (S.PREWRITTEN, "start_writing"): S.WRITING,
    (S.WRITING, "gather"): S.GATHERED,
    (S.GATHERED, "commit"): S.COMMITTED,
    (S.PREWRITTEN, "fail"): S.FAILED,
    (S.WRITING, "fail"): S.FAILED,
    (S.GATHERED, "fail"): S.FAILED,
}
EVERY = list(itertools.product(S, TRIGGERS))


class Ledger(list):
    """A record function that only remembers, and can be told to refuse."""

    refuse: BaseException | None = None

    def __call__(self, source, dest, facts):
        self.append((source, dest, dict(facts)))
        if self.refuse is not None:
            raise self.refuse


@pytest.mark.parametrize(("state", "trigger"), EVERY)
def test_a_trigger_does_what_the_table_says_or_is_refused(state, trigger):
    ledger = Ledger()
    lifecycle = Lifecycle(state, ledger)
    if (state, trigger) in LEGAL:
        getattr(lifecycle, trigger)(reason="r", count=3)

        assert lifecycle.state is LEGAL[state, trigger]
        assert ledger == [(state, LEGAL[state, trigger], {"reason": "r", "count": 3})]
    else:
        with pytest.raises(IllegalTransition) as caught:
            getattr(lifecycle, trigger)(reason="r")

        assert lifecycle.state is state
        assert ledger == []
        assert (caught.value.source, caught.value.trigger) == (state.value, trigger)


@pytest.mark.parametrize(("state", "trigger"), LEGAL)
@pytest.mark.parametrize("refusal", [CheckpointError("lost"), OSError("disk full"), KeyboardInterrupt()])
def test_a_record_that_raises_leaves_the_state_and_lets_it_be_tried_again(state, trigger, refusal):
    ledger = Ledger()
    ledger.refuse = refusal
    lifecycle = Lifecycle(state, ledger)

    with pytest.raises(type(refusal)):
        getattr(lifecycle, trigger)()
    assert lifecycle.state is state

    ledger.refuse = None
    getattr(lifecycle, trigger)()
    assert lifecycle.state is LEGAL[state, trigger]
    assert len(ledger) == 2


@pytest.mark.parametrize(("state", "trigger"), LEGAL)
def test_memory_still_shows_the_old_state_while_the_record_is_being_made(state, trigger):
    seen = []
    lifecycle = Lifecycle(state, lambda source, dest, facts: seen.append(lifecycle.state))
    getattr(lifecycle, trigger)()

    assert seen == [state]


@pytest.mark.parametrize("state", [S.COMMITTED, S.FAILED])
def test_final_states_have_no_way_out(state):
    sources = {
        source
        for row in TRANSITIONS
        for source in (row["source"] if isinstance(row["source"], list) else [row["source"]])
    }

    assert state not in sources
    assert state not in IN_FLIGHT


def test_a_walk_from_the_first_state_to_the_last():
    ledger = Ledger()
    lifecycle = Lifecycle(S.PREWRITTEN, ledger)
    lifecycle.start_writing()
    lifecycle.gather(manifest_digest="d")
    lifecycle.commit()

    assert lifecycle.state is S.COMMITTED
    assert [(source, dest) for source, dest, _ in ledger] == [
        (S.PREWRITTEN, S.WRITING),
        (S.WRITING, S.GATHERED),
        (S.GATHERED, S.COMMITTED),
    ]


def test_there_are_no_automatic_transitions():
    lifecycle = Lifecycle(S.PREWRITTEN, Ledger())
    machine = lifecycle._machine

    assert sorted(machine.events) == sorted(TRIGGERS)
    assert not [
        name for state in S for name in (f"to_{state.name}", f"to_{state.value}") if hasattr(lifecycle._cell, name)
    ]


def test_the_table_has_the_triggers_of_the_methods_and_no_others():
    assert sorted(row["trigger"] for row in TRANSITIONS) == sorted(TRIGGERS)


def test_every_state_is_in_the_table():
    ends = {row["dest"] for row in TRANSITIONS} | {S.PREWRITTEN}

    assert set(S) == ends
    assert {S.PREWRITTEN, S.WRITING, S.GATHERED} == set(IN_FLIGHT)


def test_two_lifecycles_do_not_share_a_state():
    first, second = Lifecycle(S.PREWRITTEN, Ledger()), Lifecycle(S.PREWRITTEN, Ledger())
    first.start_writing()

    assert (first.state, second.state) == (S.WRITING, S.PREWRITTEN)


def test_making_a_lifecycle_leaves_the_table_as_it_is():
    before = repr(TRANSITIONS)
    Lifecycle(S.WRITING, Ledger()).gather()

    assert before == repr(TRANSITIONS)


@pytest.mark.parametrize(("format", "name"), [(Format.DCP, "step-7"), (Format.HUGGINGFACE, "hf-7")])
def test_a_format_names_its_directories(format, name):
    assert name == format.directory_name(7)


def row(state: CheckpointState, **facts) -> CheckpointRecord:
    return CheckpointRecord(
        id=9,
        series="s",
        step=7,
        format=Format.DCP,
        state=state,
        epoch=2,
        world_size=1,
        directory="s/step-7",
        staging_directory="s/.step-7.e2.a9.incomplete",
        created_at=1.0,
        **facts,
    )


@pytest.mark.parametrize("state", S)
def test_only_a_committed_row_that_is_not_retiring_is_live(state):
    assert row(state).is_live == (state is S.COMMITTED)
    assert not row(state, retire_started_at=5.0).is_live


@pytest.mark.parametrize("state", S)
def test_a_row_is_in_flight_until_its_state_is_final(state):
    assert row(state).is_in_flight == (state in (S.PREWRITTEN, S.WRITING, S.GATHERED))


def test_the_retired_name_is_as_unique_as_the_staging_name():
    assert row(S.COMMITTED).retired_directory == "s/.step-7.e2.a9.retired"
