"""The plan against every combination of row and disk that a crash, a bug or a person may leave."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random

import pytest
from disk_model import OTHER_DIGEST, Entry, World, found, record

from ckptmgr.errors import InvalidArgument
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, Format
from ckptmgr.recovery import (
    FinishRetirement,
    Found,
    FoundKind,
    GiveUp,
    RecoveryReport,
    RemoveLeftover,
    ReportMissing,
    ReportStranger,
    Restore,
    RollBack,
    RollForward,
    plan,
    traces,
)

S = CheckpointState
NEW, OLD, FAILED, RETIRING, BYSTANDER, UNKNOWN = 7, 3, 4, 2, 1, 99

CONTENTS: dict[str, Entry | None] = {
    "nothing": None,
    "this attempt, intact": Entry("", holds=NEW),
    "this attempt, damaged": Entry("", holds=NEW, intact=False),
    "this attempt, another manifest": Entry("", holds=NEW, same_manifest=False),
    "the overwritten attempt": Entry("", holds=OLD),
    "a failed attempt": Entry("", holds=FAILED),
    "a retiring attempt": Entry("", holds=RETIRING),
    "an unknown attempt": Entry("", holds=UNKNOWN),
    "a directory without manifest": Entry(""),
    "a directory whose manifest has rotted": Entry("", rotten=True),
    "a directory that cannot be read": Entry("", unreadable=True),
    "a link": Entry("", kind="link"),
    "a file": Entry("", kind="file"),
}
AT_A_RETIRED_NAME = (
    "nothing",
    "a directory without manifest",
    "a directory that cannot be read",
    "the overwritten attempt",
    "an unknown attempt",
    "a file",
)
AT_MY_RETIRED_NAME = (
    "nothing",
    "a directory without manifest",
    "this attempt, intact",
    "the overwritten attempt",
    "a link",
)

#: (this attempt, what it overwrites): every pair that the journal's constraints allow.
LIVE = {"state": S.COMMITTED}
IS_RETIRING = {"state": S.COMMITTED, "retire_started_at": 2.5, "retire_reason": "no rule keeps it"}
IS_RETIRED = {**IS_RETIRING, "retired_at": 2.6}
ROWS = {
    "PREWRITTEN": {"state": S.PREWRITTEN},
    "WRITING": {"state": S.WRITING},
    "GATHERED": {"state": S.GATHERED},
    "live": LIVE,
    "retiring": IS_RETIRING,
    "retired": IS_RETIRED,
    "FAILED": {"state": S.FAILED},
}
OVERWRITES = {"nothing": None, "live": LIVE, "retiring": IS_RETIRING, "retired": IS_RETIRED}
PAIRS = [
    (this, that)
    for this, that in itertools.product(ROWS, OVERWRITES)
    # A live row of the same step beside a committed one cannot be: overwriting retires it.
    if not (that == "live" and this == "live")
]


@functools.cache
def rows_of(this: str, that: str) -> tuple[CheckpointRecord, CheckpointRecord, list[CheckpointRecord]]:
    new = record(NEW, 5, epoch=2, overwrites=None if that == "nothing" else OLD, **ROWS[this])
    rows = [
        record(BYSTANDER, 1, S.COMMITTED),
        record(RETIRING, 5, **IS_RETIRING),
        record(FAILED, 5, S.FAILED),
        new,
    ]
    old = record(OLD, 5, **(OVERWRITES[that] or LIVE))
    if that != "nothing":
        rows.append(old)
    return new, old, rows


def world_of(this: str, that: str, final: str, staging: str, my_retired: str, old_retired: str) -> World:
    new, old, rows = rows_of(this, that)
    disk = {"checkpoint/step-1": Entry("the bystander", holds=BYSTANDER)}
    places = {
        new.directory: final,
        new.staging_directory: staging,
        new.retired_directory: my_retired,
        old.retired_directory: old_retired,
    }
    for path, name in places.items():
        content = CONTENTS[name]
        if content is not None:
            disk[path] = dataclasses.replace(content, identity=f"{name} at {path}")
    return World(rows, disk)


def everything(contents=tuple(CONTENTS), mine=AT_MY_RETIRED_NAME, olds=AT_A_RETIRED_NAME):
    for pair in PAIRS:
        for places in itertools.product(contents, contents, mine, olds):
            yield (*pair, *places)


def check_invariants(before: World, after: World) -> None:
    new, was = after.rows[NEW], before.rows[NEW]
    at_start = {entry.identity: (path, entry) for path, entry in before.disk.items()}
    at_end = {entry.identity: path for path, entry in after.disk.items()}

    # Every row ends where the rules say.
    copies = [before.disk.get(was.directory), before.disk.get(was.staging_directory)]
    has_intact = any(c is not None and c.holds == NEW and c.intact and c.same_manifest for c in copies)
    if was.state is S.GATHERED:
        assert new.state is (S.COMMITTED if has_intact else S.FAILED)
        assert new.is_live == has_intact
        assert not has_intact or after.disk[new.directory].holds == NEW
    elif was.is_in_flight:
        assert new.state is S.FAILED
    else:
        assert (new.state, new.is_live) == (was.state, was.is_live)
    for row in after.rows.values():
        assert not row.is_in_flight
        places = (after.disk.get(name) for name in (row.directory, row.retired_directory))
        unreadable = any(entry is not None and entry.unreadable for entry in places)
        assert row.retire_started_at is None or row.retired_at is not None or unreadable

    # The bystander is as it was.
    assert after.disk["checkpoint/step-1"] == before.disk["checkpoint/step-1"]
    assert after.rows[BYSTANDER] == before.rows[BYSTANDER]

    for identity, (path, entry) in at_start.items():
        # What the journal does not know is still there, and where it was unless it was in the way.
        ours = entry.kind == "directory" and (
            entry.holds in before.rows or (entry.holds is None and (".incomplete" in path or ".retired" in path))
        )
        assert ours or identity in at_end
        # A live checkpoint that stays live still stands at its name, if a directory of it was anywhere we look.
        holder = before.rows.get(entry.holds)
        if holder is not None and holder.is_live:
            stays = after.rows[holder.id]
            assert not stays.is_live or identity in at_end
            if stays.is_live and path in (
                stays.directory,
                stays.retired_directory,
                stays.staging_directory,
                *(r.staging_directory for r in before.rows.values() if r.overwrites == stays.id),
            ):
                assert after.disk[stays.directory].holds == stays.id
    # Nothing is left to do and nothing stays unsaid: what is left is a live checkpoint at its name, or reported.
    told = set()
    for action in after.plan():
        assert not action.changes, action.text
        told.add(action.record.directory if isinstance(action, ReportMissing) else action.path)
    for path, entry in after.disk.items():
        owned = any(r.is_live and r.directory == path and r.id == entry.holds for r in after.rows.values())
        assert owned != (path in told), path


@pytest.mark.parametrize("this", ROWS)
def test_whatever_is_found_the_plan_keeps_every_rule_and_leaves_nothing_to_do(this):
    count = 0
    for case in everything():
        if case[0] != this:
            continue
        before = world_of(*case)
        after = before.copy()
        try:
            for action in after.plan():
                for _ in after.carry_out(action):
                    pass
            check_invariants(before, after)
        except AssertionError as error:
            error.add_note(f"case: {case}\nplan: {[a.text for a in before.plan()]}")
            raise
        count += 1

    assert count >= len(CONTENTS) ** 2 * len(AT_MY_RETIRED_NAME) * len(AT_A_RETIRED_NAME)


@pytest.mark.parametrize("this", ["PREWRITTEN", "WRITING", "GATHERED", "live", "retiring", "FAILED"])
def test_crashing_after_any_step_and_recovering_again_ends_the_same(this):
    few = ("nothing", "a directory without manifest", "the overwritten attempt")
    for case in everything(mine=few[:2], olds=few):
        if case[0] != this:
            continue
        before = world_of(*case)
        straight = before.copy()
        old_existed = any(entry.holds == OLD for entry in before.disk.values())
        steps = 0
        for action in straight.plan():
            for _ in straight.carry_out(action):
                steps += 1
        for crash_after in range(1, steps):
            crashed = before.copy()
            walk = (step for action in crashed.plan() for step in crashed.carry_out(action))
            for _ in range(crash_after):
                next(walk)
            old = crashed.rows.get(OLD)
            try:
                if old is not None and old.is_live and old_existed:
                    assert any(entry.holds == OLD for entry in crashed.disk.values()), "the old one is lost"
                for action in crashed.plan():
                    for _ in crashed.carry_out(action):
                        pass
                check_invariants(before, crashed)
                assert crashed.rows.keys() == straight.rows.keys()
                assert [r.state for r in crashed.rows.values()] == [r.state for r in straight.rows.values()]
                assert [r.is_live for r in crashed.rows.values()] == [r.is_live for r in straight.rows.values()]
            except AssertionError as error:
                error.add_note(f"case: {case}, crashed after {crash_after} of {steps} steps")
                raise


@pytest.mark.slow
def test_rows_that_are_gone_and_have_left_no_trace_change_no_plan():
    """So that a start need not read the whole history of a long run."""
    left_out = 0
    for case in everything():
        world = world_of(*case)
        names = [found(path, entry) for path, entry in world.disk.items()]
        rows = [*world.rows.values()]
        standing = [row for row in rows if row.state is not S.FAILED and row.retired_at is None]
        numbers, staging, steps = traces(standing, names)
        needed = [
            row
            for row in rows
            if row in standing or row.id in numbers or row.staging_directory in staging
            or (row.series, row.step) in steps
        ]  # fmt: skip
        left_out += len(world.rows) - len(needed)

        assert plan(needed, names) == world.plan(), case
    assert left_out > 1000


def test_the_plan_does_not_depend_on_the_order_of_its_input():
    shuffle = random.Random(5).shuffle
    for case in itertools.islice(everything(), 0, None, 97):
        world = world_of(*case)
        rows = list(world.rows.values())
        names = [found(path, entry) for path, entry in world.disk.items()]
        expected = plan(rows, names)
        shuffle(rows)
        shuffle(names)

        assert expected == plan(rows, names), case


# --- single rules, in words ------------------------------------------------------------------


def actions(rows, disk):
    return list(World(rows, disk).plan())


def test_an_empty_run_needs_nothing():
    assert plan([], []) == ()


def test_writing_is_rolled_back_however_whole_its_directory_looks():
    row = record(7, 5, S.WRITING)
    [action] = actions([row], {row.staging_directory: Entry("x", holds=7)})

    assert action == RollBack(row, (row.staging_directory,), action.reason)
    assert "WRITING" in action.reason


def test_a_directory_of_an_attempt_that_was_not_gathered_is_not_taken_from_its_final_name():
    row = record(7, 5, S.WRITING)
    rolled_back, reported = actions([row], {row.directory: Entry("x", holds=7)})

    assert rolled_back == RollBack(row, (), rolled_back.reason)
    assert reported == ReportStranger(row.directory, reported.why)


def test_gathered_and_published_is_only_committed():
    row = record(7, 5, S.GATHERED)

    assert [RollForward(row, published=True)] == actions([row], {row.directory: Entry("x", holds=7)})


def test_gathered_and_not_published_is_published_and_committed():
    row = record(7, 5, S.GATHERED)

    assert [RollForward(row, published=False)] == actions([row], {row.staging_directory: Entry("x", holds=7)})


def test_gathered_without_the_digest_in_the_journal_is_given_up():
    row = record(7, 5, S.GATHERED, manifest_digest=None)
    [action] = actions([row], {row.staging_directory: Entry("x", holds=7)})

    assert action == GiveUp(row, (row.staging_directory,), action.reason)
    assert "another ckptmgr.json" in action.reason


def test_a_damaged_gathered_attempt_is_given_up_and_says_what_is_wrong():
    row = record(7, 5, S.GATHERED)
    there = [
        dataclasses.replace(
            found(row.staging_directory, Entry("x", holds=7)),
            mismatches=("digest: a has other bytes", "size: b", "missing: c"),
        )
    ]
    action, *rest = plan([row], there)

    assert action == GiveUp(row, (row.staging_directory,), action.reason)
    assert rest == []
    assert "digest: a has other bytes and 2 more" in action.reason
    assert f"{row.directory} does not exist" in action.reason


def test_what_stands_in_the_way_of_a_gathered_attempt_is_set_aside_not_removed():
    row = record(7, 5, S.GATHERED)
    disk = {row.staging_directory: Entry("x", holds=7), row.directory: Entry("mine", kind="file")}

    assert [RollForward(row, published=False, set_aside=(row.directory,))] == actions([row], disk)


def overwriting(state: CheckpointState = S.GATHERED) -> tuple[CheckpointRecord, CheckpointRecord]:
    return record(3, 5, S.COMMITTED), record(7, 5, state, overwrites=3, epoch=2)


def test_an_overwritten_checkpoint_makes_way_and_is_retired_after_the_commit():
    old, new = overwriting()
    disk = {old.directory: Entry("old", holds=3), new.staging_directory: Entry("new", holds=7)}

    assert [
        RollForward(new, published=False, replaces=3),
        FinishRetirement(old, (old.retired_directory,)),
    ] == actions([old, new], disk)


def test_an_exchange_that_was_cut_short_is_finished():
    old, new = overwriting()
    disk = {new.directory: Entry("new", holds=7), new.staging_directory: Entry("old", holds=3)}

    assert [
        RollForward(new, published=True),
        FinishRetirement(old, (new.staging_directory,)),
    ] == actions([old, new], disk)


def test_a_name_that_the_old_directory_will_need_is_freed_first():
    old, new = overwriting()
    disk = {
        old.directory: Entry("old", holds=3),
        new.staging_directory: Entry("new", holds=7),
        old.retired_directory: Entry("mine", kind="file"),
    }

    assert [
        RollForward(new, published=False, replaces=3, set_aside=(old.retired_directory,)),
        FinishRetirement(old, (old.retired_directory,)),
    ] == actions([old, new], disk)


def test_an_overwritten_checkpoint_of_another_format_is_retired_from_its_own_name():
    old = record(3, 5, S.COMMITTED, format=Format.HUGGINGFACE, directory="checkpoint/hf-5")
    new = record(7, 5, S.GATHERED, overwrites=3)
    disk = {"checkpoint/hf-5": Entry("old", holds=3), new.staging_directory: Entry("new", holds=7)}

    assert [
        RollForward(new, published=False),
        FinishRetirement(old, ("checkpoint/hf-5",)),
    ] == actions([old, new], disk)


@pytest.mark.parametrize("state", [S.PREWRITTEN, S.WRITING, S.FAILED])
def test_an_old_checkpoint_that_was_moved_aside_is_restored_before_anything_else(state):
    old, new = overwriting(state)
    first, *rest = actions([old, new], {new.staging_directory: Entry("old", holds=3)})

    assert first == Restore(old, new.staging_directory)
    assert all(not isinstance(action, RemoveLeftover) for action in rest)


def test_a_live_checkpoint_under_the_retired_name_of_another_is_restored():
    gone = record(3, 5, S.COMMITTED, retire_started_at=1.0)
    live = record(7, 5, S.COMMITTED, commit_seq=2)
    finish, restore = actions([gone, live], {gone.retired_directory: Entry("live", holds=7)})

    assert finish == FinishRetirement(gone, ())
    assert restore == Restore(live, gone.retired_directory)


def test_a_damaged_overwrite_is_set_aside_and_the_old_one_restored():
    old, new = overwriting()
    disk = {new.directory: Entry("new", holds=7, intact=False), new.staging_directory: Entry("old", holds=3)}
    restore, give_up = actions([old, new], disk)

    assert restore == Restore(old, new.staging_directory, (old.directory,))
    assert give_up == GiveUp(new, (), give_up.reason)


def test_a_damaged_overwrite_whose_old_one_is_gone_too_leaves_its_name():
    old, new = overwriting()
    give_up, missing = actions([old, new], {new.directory: Entry("new", holds=7, intact=False)})

    assert give_up == GiveUp(new, (new.directory,), give_up.reason)
    assert missing == ReportMissing(old, missing.why)
    assert "holds attempt 7" in missing.why


def test_a_retiring_checkpoint_goes_from_its_final_name_last():
    row = record(3, 5, **IS_RETIRING)
    disk = {row.directory: Entry("whole", holds=3), row.retired_directory: Entry("half")}

    assert [FinishRetirement(row, (row.retired_directory, row.directory))] == actions([row], disk)


def test_a_retiring_checkpoint_whose_retired_name_is_taken_stays_and_is_reported():
    row = record(3, 5, **IS_RETIRING)
    disk = {row.directory: Entry("whole", holds=3), row.retired_directory: Entry("mine", kind="file")}
    finish, *strangers = actions([row], disk)

    assert finish == FinishRetirement(row, ())
    assert {row.directory, row.retired_directory} == {stranger.path for stranger in strangers}


def test_a_directory_without_manifest_at_the_name_of_a_retiring_checkpoint_is_not_removed():
    row = record(3, 5, **IS_RETIRING)
    finish, stranger = actions([row], {row.directory: Entry("mine")})

    assert finish == FinishRetirement(row, ())
    assert stranger == ReportStranger(row.directory, stranger.why)


def test_a_directory_that_rotted_at_the_name_of_a_retiring_checkpoint_is_set_aside():
    row = record(3, 5, **IS_RETIRING)

    assert [FinishRetirement(row, (), (row.directory,))] == actions([row], {row.directory: Entry("", rotten=True)})


def test_what_rotted_at_a_name_that_another_checkpoint_has_by_now_is_that_ones():
    row, later = record(3, 5, **IS_RETIRING), record(7, 5, S.COMMITTED)
    finish, missing = actions([row, later], {row.directory: Entry("", rotten=True)})

    assert finish == FinishRetirement(row, ())
    assert missing == ReportMissing(later, missing.why)


@pytest.mark.parametrize("place", ["directory", "retired_directory"])
def test_a_retirement_waits_for_a_disk_that_cannot_say_what_stands_there(place):
    row = record(3, 5, **IS_RETIRING)
    (stranger,) = actions([row], {getattr(row, place): Entry("", unreadable=True)})

    assert stranger == ReportStranger(getattr(row, place), stranger.why)
    assert "see to the disk" in stranger.why


def test_leftovers_of_a_failed_attempt_are_removed_from_both_of_its_names():
    row = record(7, 5, S.FAILED)
    disk = {row.staging_directory: Entry("a"), row.retired_directory: Entry("b", holds=7)}

    assert [
        RemoveLeftover(row, row.staging_directory),
        RemoveLeftover(row, row.retired_directory),
    ] == actions([row], disk)


def settle(rows, disk) -> World:
    """Carry the plan out and check that nothing is left to do."""
    world = World(rows, disk)
    for action in world.plan():
        for _ in world.carry_out(action):
            pass

    assert world.changes() == []
    return world


@pytest.mark.parametrize("state", [S.PREWRITTEN, S.WRITING])
def test_an_attempt_that_this_plan_fails_is_removed_from_the_names_of_failed_ones_too(state):
    failed, row = record(4, 6, S.FAILED), record(7, 5, state)

    assert settle([failed, row], {failed.staging_directory: Entry("x", holds=7)}).disk == {}


def test_a_checkpoint_that_this_plan_retires_is_removed_from_the_names_of_failed_ones_too():
    failed, (old, new) = record(4, 6, S.FAILED), overwriting()
    disk = {failed.staging_directory: Entry("copy", holds=3), new.staging_directory: Entry("new", holds=7)}

    assert settle([failed, old, new], disk).disk.keys() == {new.directory}


@pytest.mark.parametrize("holder", [1, 7])
def test_a_failed_attempts_name_that_holds_what_lives_on_is_left_alone(holder):
    failed, live, row = record(4, 6, S.FAILED), record(1, 1, S.COMMITTED), record(7, 5, S.GATHERED)
    disk = {
        live.directory: Entry("live", holds=1),
        row.staging_directory: Entry("new", holds=7),
        failed.staging_directory: Entry("copy", holds=holder),
    }

    assert failed.staging_directory in settle([failed, live, row], disk).disk


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (None, "does not exist"),
        (Entry("x", kind="link"), "is a link or a file"),
        (Entry("x"), "has no readable ckptmgr.json"),
        (Entry("x", holds=99), "holds attempt 99"),
    ],
)
def test_a_live_checkpoint_that_is_not_at_its_name_is_reported_once(entry, why):
    row = record(3, 5, S.COMMITTED)
    [action] = actions([row], {row.directory: entry} if entry else {})

    assert action == ReportMissing(row, action.why)
    assert why in action.why


def test_our_own_link_and_live_checkpoints_are_not_mentioned():
    row = record(3, 5, S.COMMITTED)
    link = Found(path="checkpoint/hf-latest", series="checkpoint", kind=FoundKind.LINK, is_directory=False)

    assert plan([row], [found(row.directory, Entry("x", holds=3)), link]) == ()


@pytest.mark.parametrize(
    ("path", "entry", "why"),
    [
        ("checkpoint/step-9", Entry("x"), "no row of the journal accounts for it"),
        ("checkpoint/step-9", Entry("x", holds=99), "the journal does not know"),
        ("checkpoint/step-9", Entry("x", holds=4), "which is FAILED"),
        ("checkpoint/step-9", Entry("x", holds=2), "which is retired"),
        ("checkpoint/step-9", Entry("x", kind="file"), "it is a link or a file"),
        ("checkpoint/.step-9.e1.a9.incomplete", Entry("x"), "no row of the journal accounts for it"),
        ("checkpoint/.step-9.e1.a9.quarantined", Entry("x", holds=4), "set aside for inspection"),
        ("checkpoint/notes.txt", Entry("x", kind="file"), "it is a link or a file"),
    ],
)
def test_what_no_row_accounts_for_is_reported_with_what_it_is(path, entry, why):
    rows = [record(2, 5, **IS_RETIRED), record(4, 6, S.FAILED)]
    [action] = actions(rows, {path: entry})

    assert action == ReportStranger(path, action.why)
    assert why in action.why


def test_a_copy_that_was_not_verified_is_refused():
    row = record(7, 5, S.GATHERED)
    there = dataclasses.replace(found(row.staging_directory, Entry("x", holds=7)), mismatches=None)

    with pytest.raises(InvalidArgument, match="was not verified"):
        plan([row], [there])


def test_an_overwritten_row_that_the_journal_does_not_know_is_no_obstacle():
    row = record(7, 5, S.GATHERED, overwrites=55)

    assert [RollForward(row, published=False)] == actions([row], {row.staging_directory: Entry("x", holds=7)})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([record(1, 5, S.FAILED), record(1, 6, S.FAILED)], "listed twice"),
        ([record(1, 5, S.COMMITTED), record(2, 5, S.COMMITTED)], "two live checkpoints"),
        ([record(1, 5, S.WRITING), record(2, 6, S.GATHERED)], "two attempts in flight"),
        ([record(1, 5, S.COMMITTED), record(2, 5, S.WRITING)], "was not saved to overwrite"),
    ],
)
def test_rows_that_contradict_each_other_are_refused(rows, message):
    with pytest.raises(InvalidArgument, match=message):
        plan(rows, [])


def test_a_path_that_is_found_twice_is_refused():
    twice = [found("checkpoint/step-5", Entry("x"))] * 2

    with pytest.raises(InvalidArgument, match="listed twice"):
        plan([], twice)


def test_series_do_not_disturb_each_other():
    rows = [record(1, 5, S.WRITING), record(2, 5, S.GATHERED, series="hf")]
    disk = {rows[0].staging_directory: Entry("a"), rows[1].staging_directory: Entry("b", holds=2)}
    back, forward = actions(rows, disk)

    assert (back.record.id, back.remove) == (1, (rows[0].staging_directory,))
    assert forward == RollForward(rows[1], published=False)


def test_a_manifest_that_the_journal_did_not_record_is_no_intact_copy():
    row = record(7, 5, S.GATHERED, manifest_digest=OTHER_DIGEST)
    [action] = actions([row], {row.directory: Entry("x", holds=7)})

    assert action == GiveUp(row, (row.directory,), action.reason)


def test_a_report_tells_changes_from_reports_and_is_plain_data():
    old, new = overwriting()
    disk = {
        new.directory: Entry("new", holds=7, intact=False),
        new.staging_directory: Entry("old", holds=3),
        "checkpoint/notes": Entry("n", kind="file"),
    }
    report = RecoveryReport(World([old, new], disk).plan(), applied=False)

    assert [action.name for action in report.changes] == ["restore", "give_up"]
    assert [action.name for action in report.reports] == ["report_stranger"]
    assert report.to_dict()["actions"][0] == {
        "action": "restore",
        "changes": True,
        "text": "restore checkpoint step 5 (attempt 3) from checkpoint/.step-5.e2.a7.incomplete; "
        "set aside checkpoint/step-5",
        "checkpoint_id": 3,
        "series": "checkpoint",
        "step": 5,
        "path": "checkpoint/.step-5.e2.a7.incomplete",
        "set_aside": ["checkpoint/step-5"],
    }


def test_every_kind_of_action_says_in_words_what_it_does():
    row = record(7, 5, S.GATHERED)
    texts = [
        (FinishRetirement(row, ("a", "b")), "finish retiring checkpoint step 5 (attempt 7): remove a, b"),
        (FinishRetirement(row, ()), "finish retiring checkpoint step 5 (attempt 7): nothing to remove"),
        (RollBack(row, (), "why"), "roll back checkpoint step 5 (attempt 7), why: nothing to remove"),
        (RollForward(row, True), "roll forward checkpoint step 5 (attempt 7): commit it"),
        (
            RollForward(row, False, 3, ("a",)),
            "roll forward checkpoint step 5 (attempt 7): publish and commit it in place of attempt 3; set aside a",
        ),
        (GiveUp(row, ("a",), "why"), "give up checkpoint step 5 (attempt 7), why; set aside a"),
        (RemoveLeftover(row, "a"), "remove a, left by checkpoint step 5 (attempt 7)"),
        (ReportMissing(row, "x is gone"), "checkpoint step 5 (attempt 7) is COMMITTED but not on disk: x is gone"),
        (ReportStranger("a", "why"), "a is left alone: why"),
    ]

    for action, text in texts:
        assert text == action.text
