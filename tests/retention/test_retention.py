"""Every combination of keep rules on small sets, against a brute-force reading of what each rule says."""

from __future__ import annotations

import functools
import itertools
import math
import operator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.errors import InvalidArgument
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, Format, RetirementMark
from ckptmgr.retention import (
    Dropped,
    KeepAll,
    KeepAny,
    KeepBest,
    KeepEvery,
    KeepFor,
    KeepLast,
    KeepRule,
    plan,
    unsettled,
)

NOW = 1_000_000.0
HOUR = 3600.0


def checkpoint(seq: int, step: int | None = None, *, loss: float | None = None, age_h: float = 0.0, **facts):
    """The *seq*-th commit of series s. Its id runs against the commit order, so that nothing may rely on it."""
    known = {
        "id": 100 - seq,
        "series": "s",
        "step": seq if step is None else step,
        "format": Format.DCP,
        "state": CheckpointState.COMMITTED,
        "epoch": 1,
        "world_size": 1,
        "directory": f"s/step-{seq}",
        "staging_directory": f"s/.step-{seq}.e1.a{seq}.incomplete",
        "created_at": 0.0,
        "committed_at": NOW - age_h * HOUR,
        "commit_seq": seq,
        "metrics": {} if loss is None else {"loss": loss},
    }
    return CheckpointRecord(**{**known, **facts})


RULES = (
    KeepAll(),
    KeepLast(1),
    KeepLast(2),
    KeepEvery(10),
    KeepBest(1, "loss"),
    KeepBest(2, "loss", "max"),
    KeepFor(2),
)
COMBINATIONS = [
    functools.reduce(operator.or_, chosen)
    for size in range(1, len(RULES) + 1)
    for chosen in itertools.combinations(RULES, size)
]


def says(rule: KeepRule, one: CheckpointRecord, everyone: list[CheckpointRecord]) -> str | None:
    """The reason that *rule* gives for keeping *one*, read off its words; None if it gives none."""
    match rule:
        case KeepAll():
            return "all"
        case KeepLast():
            newer = sum(other.commit_seq > one.commit_seq for other in everyone)
            return f"last {rule.n}" if newer < rule.n else None
        case KeepEvery():
            return f"every {rule.steps} steps" if one.step % rule.steps == 0 else None
        case KeepFor():
            return f"younger than {rule.hours} h" if NOW - one.committed_at < rule.hours * HOUR else None
        case KeepBest():
            mine = one.metrics.get(rule.metric, math.nan)
            if not math.isfinite(mine):
                return None
            ahead = 0
            for other in everyone:
                value = other.metrics.get(rule.metric, math.nan)
                better = value < mine if rule.mode == "min" else value > mine
                ahead += math.isfinite(value) and (better or (value == mine and other.commit_seq > one.commit_seq))
            return f"best {rule.n} by {rule.metric} ({rule.mode})" if ahead < rule.n else None
    raise AssertionError(rule)


def expected(records, rule, protected=None):
    """id → reasons, for what must stay."""
    stays = {}
    for one in records:
        reasons = [reason for part in rule.parts if (reason := says(part, one, records)) is not None]
        reasons += ["newest committed"] if all(other.commit_seq <= one.commit_seq for other in records) else []
        reasons += ["pinned"] if one.pinned else []
        reasons += [protected[one.id]] if protected and one.id in protected else []
        if reasons:
            stays[one.id] = tuple(reasons)
    return stays


def assert_planned(records, rule, protected=None):
    result = plan(records, rule, now=NOW, protected=protected or {})
    stays = expected(records, rule, protected)

    assert stays == {kept.record.id: kept.reasons for kept in result.keep}
    assert {record.id for record in records} - stays.keys() == {dropped.record.id for dropped in result.drop}
    assert len(records) == len(result.keep) + len(result.drop)
    for part in (result.keep, result.drop):
        order = [item.record.commit_seq for item in part]
        assert sorted(order, reverse=True) == order
    assert not records or result.keep, "everything was dropped"


def test_every_combination_of_rules_with_every_combination_of_metrics():
    for size in range(5):
        for losses in itertools.product((None, 1.0, 2.0, math.nan), repeat=size):
            records = [checkpoint(seq, 10 * seq + 5, loss=loss, age_h=9) for seq, loss in enumerate(losses, 1)]
            for rule in COMBINATIONS:
                assert_planned(records, rule)


def test_every_combination_of_rules_with_every_order_of_steps_and_of_input():
    for steps in itertools.permutations((0, 5, 10, 15)):
        records = [checkpoint(seq, step, age_h=9) for seq, step in enumerate(steps, 1)]
        for rule in COMBINATIONS:
            assert_planned(records, rule)
            assert plan(records, rule, now=NOW) == plan(records[::-1], rule, now=NOW)


def test_every_combination_of_rules_with_every_combination_of_ages_pins_and_protection():
    for ages in itertools.product((0.0, 1.99, 2.0, 5.0), repeat=3):
        for pinned, guarded in itertools.product(range(8), (None, 1, 2, 3)):
            records = [
                checkpoint(seq, 10 * seq + 5, age_h=age, pinned=bool(pinned >> seq & 1)) for seq, age in enumerate(ages)
            ]
            protected = {} if guarded is None else {records[guarded - 1].id: "resumed from"}
            for rule in (KeepFor(2), KeepLast(1), KeepEvery(10), KeepFor(2) | KeepBest(1, "loss")):
                assert_planned(records, rule, protected)


LOSSES = st.one_of(st.none(), st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan]), st.floats())


@settings(max_examples=200, deadline=None)
@given(
    seqs=st.lists(st.integers(0, 30), unique=True, max_size=8),
    rule=st.sampled_from(COMBINATIONS),
    data=st.data(),
)
def test_sets_of_up_to_eight_agree_with_the_words_of_the_rules(seqs, rule, data):
    records = [
        checkpoint(
            seq,
            data.draw(st.integers(0, 40)),
            loss=data.draw(LOSSES),
            age_h=data.draw(st.floats(-1, 5)),
            pinned=data.draw(st.booleans()),
        )
        for seq in seqs
    ]

    assert_planned(records, rule)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 40), st.sampled_from([None, 0.5, 1.0, 2.0]), st.floats(0, 3), st.booleans()
        ),
        min_size=2, max_size=12, unique_by=lambda one: one[0],
    ),
    st.sampled_from(COMBINATIONS),
)  # fmt: skip
@settings(max_examples=300)
def test_commit_after_commit_only_the_unsettled_need_be_asked_about_again(commits, rule):
    live, told, again, now = [], {}, None, NOW
    for seq, (step, loss, hours, pinned) in enumerate(commits, start=1):
        now += hours * HOUR
        new = checkpoint(seq, step, loss=loss, committed_at=now, pinned=pinned)
        whole = plan([*live, new], rule, now=now)
        part = plan([*(live if again is None else again), new], rule, now=now)

        assert part.drop == whole.drop
        told |= {one.record.id: one.reasons for one in part.keep}
        for one in part.drop:
            told.pop(one.record.id, None)
        assert told == {one.record.id: one.reasons for one in whole.keep}

        live = [one.record for one in whole.keep]
        again = unsettled(part.keep, rule)


def test_of_thousands_that_are_kept_for_good_only_the_newest_is_asked_about_again():
    class Mine(KeepAll):
        """A rule of somebody's own may think again."""

    many = [checkpoint(seq, 10 * seq, id=seq) for seq in range(1, 1000)]
    for rule, again in ((KeepAll(), [999]), (KeepEvery(10) | KeepLast(2), [999, 998]), (Mine() | KeepEvery(10), None)):
        found = unsettled(plan(many, rule, now=NOW).keep, rule)
        assert (found and [record.id for record in found]) == again


def kept(records, rule, **how):
    return {item.record.commit_seq: item.reasons for item in plan(records, rule, now=NOW, **how).keep}


def test_nothing_to_keep_is_an_empty_plan():
    result = plan([], KeepLast(1), now=NOW)

    assert (result.keep, result.drop, result.marks, result.decisions) == ((), (), (), ())


def test_newest_is_by_commit_order_not_by_step():
    """After a run was set back to step 100, its newest checkpoint has the lowest step."""
    records = [checkpoint(1, 500), checkpoint(2, 1000), checkpoint(3, 100)]

    assert kept(records, KeepLast(1)) == {3: ("last 1", "newest committed")}


def test_the_newest_stays_even_if_no_rule_keeps_it():
    assert kept([checkpoint(1, age_h=9), checkpoint(2, age_h=9)], KeepFor(1)) == {2: ("newest committed",)}


def test_a_bool_or_text_or_huge_metric_is_never_best():
    records = [
        checkpoint(1, metrics={"loss": True}),
        checkpoint(2, metrics={"loss": "0.1"}),
        checkpoint(3, metrics={"loss": 10**400}),
        checkpoint(4, loss=5.0),
        checkpoint(5, metrics={"accuracy": 1.0}),
    ]

    assert kept(records, KeepBest(9, "loss")) == {5: ("newest committed",), 4: ("best 9 by loss (min)",)}


def test_a_whole_number_is_a_metric():
    records = [checkpoint(1, metrics={"loss": 1}), checkpoint(2, loss=1.5), checkpoint(3, loss=2.5)]

    assert kept(records, KeepBest(1, "loss")).keys() == {1, 3}


def test_of_equally_good_checkpoints_the_newer_is_kept():
    records = [checkpoint(1, loss=1.0), checkpoint(2, loss=1.0), checkpoint(3, loss=9.0)]

    assert kept(records, KeepBest(1, "loss")).keys() == {2, 3}


def test_step_zero_is_a_multiple_of_everything():
    assert kept([checkpoint(1, 0), checkpoint(2, 1)], KeepEvery(7))[1] == ("every 7 steps",)


def test_a_clock_that_went_back_keeps_rather_than_drops():
    records = [checkpoint(1, age_h=-5), checkpoint(2)]

    assert kept(records, KeepFor(0.5))[1] == ("younger than 0.5 h",)


def test_a_protected_checkpoint_that_is_not_there_changes_nothing():
    assert kept([checkpoint(1)], KeepAll(), protected={7: "resumed from"}) == {1: ("all", "newest committed")}


def test_the_same_rule_twice_gives_its_reason_once():
    assert kept([checkpoint(1)], KeepLast(2) | KeepLast(2))[1] == ("last 2", "newest committed")


def test_a_dropped_checkpoint_names_the_rules_that_did_not_keep_it():
    records = [checkpoint(1, 5), checkpoint(2, 15)]
    result = plan(records, KeepLast(1) | KeepEvery(10), now=NOW)

    assert (Dropped(records[0], "no rule keeps it (last 1 | every 10 steps)"),) == result.drop


def test_a_plan_is_what_the_journal_takes():
    records = [checkpoint(1), checkpoint(2)]
    result = plan(records, KeepLast(1), now=NOW)

    assert (RetirementMark(99, "no rule keeps it (last 1)"),) == result.marks
    assert result.decisions == (
        (98, "keep", ("last 1", "newest committed")),
        (99, "drop", ("no rule keeps it (last 1)",)),
    )


def test_rules_combine_flat_and_in_order():
    rule = (KeepLast(1) | KeepEvery(5)) | (KeepFor(1) | KeepAll())

    assert KeepAny((KeepLast(1), KeepEvery(5), KeepFor(1), KeepAll())) == rule
    assert rule.text == "last 1 | every 5 steps | younger than 1 h | all"
    assert KeepAny((rule,)).parts == rule.parts


def test_a_combination_keeps_what_any_part_keeps():
    records = [checkpoint(3), checkpoint(2), checkpoint(1)]

    assert (KeepLast(1) | KeepEvery(2)).keeps(records, now=NOW) == {97, 98}


@pytest.mark.parametrize(
    "make",
    [
        *(lambda n=n: KeepLast(n) for n in (0, -1, True, 1.0, "3", None, math.nan)),
        *(lambda n=n: KeepEvery(n) for n in (0, -5, False, 2.5, "1", None, math.inf)),
        *(lambda n=n: KeepBest(n, "loss") for n in (0, True, 1.5, None)),
        *(lambda m=m: KeepBest(1, m) for m in ("", None, 3, b"loss")),
        *(lambda m=m: KeepBest(1, "loss", m) for m in ("MIN", "", None, 1)),
        *(lambda h=h: KeepFor(h) for h in (0, -1, math.nan, math.inf, True, "24", None, 10**400)),
        lambda: KeepAny(()),
        lambda: KeepAny([KeepAll()]),
        lambda: KeepAny((KeepAll(), 3)),
        lambda: KeepAny(None),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(make):
    with pytest.raises(InvalidArgument):
        make()


@pytest.mark.parametrize("other", [3, None, "all", KeepLast])
def test_a_rule_combines_with_rules_only(other):
    with pytest.raises(TypeError):
        KeepAll() | other


@pytest.mark.parametrize("rule", [None, 3, KeepLast, [KeepAll()]])
def test_planning_without_a_rule_is_refused(rule):
    with pytest.raises(InvalidArgument, match="not a keep rule"):
        plan([checkpoint(1)], rule, now=NOW)


@pytest.mark.parametrize("now", [None, math.nan, math.inf, "now", True])
def test_planning_without_a_time_is_refused(now):
    with pytest.raises(InvalidArgument, match="Unix seconds"):
        plan([checkpoint(1)], KeepAll(), now=now)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([checkpoint(1, state=CheckpointState.FAILED)], "not a live"),
        ([checkpoint(1, state=CheckpointState.GATHERED)], "not a live"),
        ([checkpoint(1, retire_started_at=1.0)], "not a live"),
        ([checkpoint(1, commit_seq=None)], "not a live"),
        ([checkpoint(1, committed_at=None)], "not a live"),
        ([checkpoint(1), checkpoint(1, id=5)], "share a commit number"),
        ([checkpoint(1), checkpoint(2, id=99)], "listed twice"),
        ([checkpoint(1), checkpoint(2, series="t")], "more than one series"),
    ],
)
def test_records_that_are_not_the_live_ones_of_one_series_are_refused(records, message):
    with pytest.raises(InvalidArgument, match=message):
        plan(records, KeepAll(), now=NOW)
