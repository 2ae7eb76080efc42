"""Every public method of the journal, on real files."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import threading
import time

import pytest
from journal_steps import FILES, WALK, S, Steps

from ckptmgr.errors import (
    CheckpointNotFound,
    IllegalTransition,
    InvalidArgument,
    JournalError,
    SaveInFlight,
    StaleWriter,
    StepAlreadySaved,
)
from ckptmgr.journal import Journal
from ckptmgr.lifecycle import TRANSITIONS, Format, RetirementMark, Verified
from ckptmgr.manifest import MAX_NUMBER, FileEntry, Manifest

IN_FLIGHT = WALK[:3]


def newer(steps: Steps) -> Steps:
    """A manager that took over; *steps* does not know yet."""
    return Steps(steps.journal)


def test_a_fresh_journal_is_empty_and_names_its_run(journal):
    assert len(journal.run_id) == 32
    assert int(journal.run_id, 16)
    assert journal.current_epoch() == 0
    assert journal.checkpoints() == []
    assert journal.epochs() == []
    assert journal.series() == []
    assert journal.transitions() == []
    assert journal.decisions() == {}


def test_the_run_id_stays_when_opened_again(journal):
    run_id = journal.run_id
    journal.close()

    with Journal.open(journal.path) as again, Journal.open_read_only(journal.path) as reader:
        assert again.run_id == run_id == reader.run_id
        assert (again.read_only, reader.read_only) == (False, True)


def test_two_journals_are_two_runs(tmp_path):
    with Journal.open(tmp_path / "a.journal.db") as a, Journal.open(tmp_path / "b.journal.db") as b:
        assert a.run_id != b.run_id


def test_run_id_is_taken_over_only_before_the_first_checkpoint(steps):
    steps.journal.set_run_id("f" * 32)
    steps.begin(1)
    with pytest.raises(JournalError, match="run id stays"):
        steps.journal.set_run_id("e" * 32)

    assert steps.journal.run_id == "f" * 32
    steps.journal.close()
    with Journal.open_read_only(steps.journal.path) as reader:
        assert reader.run_id == "f" * 32


def test_an_empty_run_id_is_refused(journal):
    with pytest.raises(InvalidArgument):
        journal.set_run_id("")


def test_epochs_count_up_and_remember_who_started(journal):
    before = time.time()
    numbers = [
        journal.begin_epoch(host=f"node-{n}", pid=n, command="train.py", versions={"torch": "2.13.0"})
        for n in (1, 2, 3)
    ]
    journal.end_epoch(2)

    assert numbers == [1, 2, 3]
    assert journal.current_epoch() == 3
    first, second, third = journal.epochs()
    assert (first.epoch, first.host, first.pid, first.command) == (1, "node-1", 1, "train.py")
    assert first.versions == {"torch": "2.13.0"}
    assert before <= first.started_at <= time.time()
    assert first.ended_at is None
    assert third.ended_at is None
    assert second.started_at <= second.ended_at


def test_the_first_end_of_an_epoch_counts(steps):
    steps.journal.end_epoch(steps.epoch)
    ended_at = steps.journal.epochs()[0].ended_at
    time.sleep(0.01)
    steps.journal.end_epoch(steps.epoch)

    assert steps.journal.epochs()[0].ended_at == ended_at


def test_begin_writes_a_prewritten_row_with_its_names(steps):
    record = steps.begin(500, metrics={"loss": 1.5}, per_rank=("data", "rng"), note="first")

    assert record.state is S.PREWRITTEN
    assert (record.id, record.series, record.step, record.epoch, record.world_size) == (1, "checkpoint", 500, 1, 2)
    assert record.directory == "checkpoint/step-500"
    assert record.staging_directory == "checkpoint/.step-500.e1.a1.incomplete"
    assert record.retired_directory == "checkpoint/.step-500.e1.a1.retired"
    assert record.metrics == {"loss": 1.5}
    assert record.per_rank == ("data", "rng")
    assert record.overwrites is None
    assert steps.journal.checkpoint(1) == record
    (line,) = steps.journal.transitions()
    assert (line.source, line.dest, line.note, line.host, line.pid) == (None, S.PREWRITTEN, "first", "node-1", 4242)
    assert (line.checkpoint_id, line.series, line.step, line.epoch) == (1, "checkpoint", 500, 1)
    assert line.at == record.created_at


def test_hugging_face_directories_have_their_own_name(steps):
    record = steps.begin(7, "hf", format=Format.HUGGINGFACE)

    assert record.format is Format.HUGGINGFACE
    assert record.directory == "hf/hf-7"
    assert record.staging_directory == "hf/.hf-7.e1.a1.incomplete"


@pytest.mark.parametrize("state", IN_FLIGHT)
def test_a_second_save_in_flight_in_a_series_is_refused(steps, state):
    steps.to(state, 1)
    with pytest.raises(SaveInFlight) as caught:
        steps.begin(2)

    assert (caught.value.series, caught.value.step, caught.value.in_flight_step) == ("checkpoint", 2, 1)
    assert len(steps.journal.checkpoints()) == 1


def test_two_series_may_be_in_flight_at_once(steps):
    assert steps.begin(1, "checkpoint").state is S.PREWRITTEN
    assert steps.begin(1, "snapshot").state is S.PREWRITTEN


@pytest.mark.parametrize("final", [S.COMMITTED, S.FAILED])
def test_a_final_row_lets_the_next_save_begin(steps, final):
    steps.to(final, 1)

    assert steps.begin(2).id == 2


def test_a_committed_step_is_saved_again_only_when_told_to(steps):
    old = steps.commit(5)
    with pytest.raises(StepAlreadySaved) as caught:
        steps.begin(5)
    new = steps.begin(5, overwrite=True)

    assert (caught.value.series, caught.value.step, caught.value.path) == ("checkpoint", 5, "checkpoint/step-5")
    assert new.overwrites == old.id
    assert steps.journal.find("checkpoint", 5) == old


def test_a_failed_step_may_be_saved_again(steps):
    steps.to(S.FAILED, 5)

    assert steps.begin(5).overwrites is None


def test_a_retiring_step_may_be_saved_again(steps):
    steps.retired(5)

    assert steps.begin(5).overwrites is None


@pytest.mark.parametrize(
    "facts",
    [
        {"step": -1},
        {"step": True},
        {"step": 1.5},
        {"step": MAX_NUMBER + 1},
        {"world_size": 0},
        {"series": ""},
        {"series": "../elsewhere"},
        {"series": "/etc"},
        {"series": "a/b"},
        {"series": ".hidden"},
        {"series": "a\0b"},
        {"metrics": {"loss": math.nan}},
        {"metrics": {"loss": object()}},
        {"note": "\udcff"},
    ],
)
def test_begin_refuses_what_it_cannot_hold(steps, facts):
    with pytest.raises(InvalidArgument):
        steps.begin(**{"step": 1} | facts)

    assert steps.journal.checkpoints() == []


def test_begin_of_a_stale_epoch_changes_nothing(steps):
    after = newer(steps)
    with pytest.raises(StaleWriter) as caught:
        steps.begin(1)

    assert (caught.value.checkpoint_id, caught.value.epoch, caught.value.found) == (0, 1, "epoch 2")
    assert steps.journal.checkpoints() == []
    assert after.begin(1).epoch == 2


def test_a_checkpoint_walks_to_committed_with_its_facts(steps):
    record = steps.begin(5)
    record = steps.move(record, S.PREWRITTEN, S.WRITING, stage_s=0.5)
    record = steps.move(record, S.WRITING, S.GATHERED, bytes=300, write_s=2.0, gather_s=0.25, manifest_digest="d")
    assert (record.committed_at, record.commit_seq, record.finished_at) == (None, None, None)
    record = steps.move(record, S.GATHERED, S.COMMITTED, commit_s=0.125, note="published")

    assert record.state is S.COMMITTED
    assert (record.stage_s, record.write_s, record.gather_s, record.commit_s) == (0.5, 2.0, 0.25, 0.125)
    assert (record.bytes, record.manifest_digest, record.commit_seq) == (300, "d", 1)
    assert record.created_at <= record.committed_at == record.finished_at
    assert record.is_live
    assert steps.journal.files(record.id) == list(FILES)
    lines = steps.journal.transitions(record.id)
    assert [(line.source, line.dest) for line in lines] == list(itertools.pairwise((None, *WALK)))
    assert lines[-1].at == record.committed_at
    assert lines[-1].note == "published"


def test_a_fact_that_is_not_given_stays(steps):
    record = steps.to(S.GATHERED, 5)
    after = steps.move(record, S.GATHERED, S.COMMITTED)

    assert after.manifest_digest == record.manifest_digest
    assert after.bytes == record.bytes


@pytest.mark.parametrize("state", IN_FLIGHT)
def test_a_failure_says_why_per_rank(steps, state):
    record = steps.to(state, 5)
    failures = ({"rank": 1, "host": "node-2", "cause": "ENOSPC", "silent": False},)
    record = steps.move(record, state, S.FAILED, reason="rank 1 failed", failures=failures)

    assert record.state is S.FAILED
    assert record.reason == "rank 1 failed"
    assert record.failures == failures
    assert record.finished_at is not None
    assert (record.committed_at, record.commit_seq) == (None, None)


def test_a_failure_without_a_reason_takes_the_note(steps):
    assert steps.move(steps.begin(1), S.PREWRITTEN, S.FAILED, note="rolled back").reason == "rolled back"
    assert steps.move(steps.begin(1), S.PREWRITTEN, S.FAILED).reason == "no reason was given"


def test_the_journal_takes_exactly_the_transitions_of_the_state_machine(steps):
    legal = set()
    for row in TRANSITIONS:
        sources = row["source"] if isinstance(row["source"], list) else [row["source"]]
        legal |= {(source, row["dest"]) for source in sources}
    series = itertools.count()
    for source, dest in itertools.product(S, S):
        record = steps.to(source, 1, f"series-{next(series)}")
        if (source, dest) in legal:
            assert steps.move(record, source, dest).state is dest
        else:
            with pytest.raises(IllegalTransition):
                steps.move(record, source, dest)
            assert steps.journal.checkpoint(record.id) == record


def test_a_gathered_checkpoint_must_have_a_manifest_digest(steps):
    record = steps.to(S.WRITING, 1)
    with pytest.raises(InvalidArgument, match="manifest_digest"):
        steps.move(record, S.WRITING, S.GATHERED, manifest_digest=None)

    assert steps.journal.checkpoint(record.id) == record


def test_a_wrong_source_state_changes_nothing(steps):
    record = steps.to(S.WRITING, 1)
    lines = steps.journal.transitions()
    with pytest.raises(StaleWriter) as caught:
        steps.move(record, S.PREWRITTEN, S.WRITING)

    assert (caught.value.checkpoint_id, caught.value.epoch) == (record.id, steps.epoch)
    assert caught.value.found == "WRITING in epoch 1, the newest epoch is 1"
    assert steps.journal.checkpoint(record.id) == record
    assert steps.journal.transitions() == lines


@pytest.mark.parametrize("state", IN_FLIGHT)
@pytest.mark.parametrize("claims", ["its own epoch", "the newest epoch"])
def test_a_stale_epoch_cannot_move_a_checkpoint(steps, state, claims):
    victim = steps.commit(1)
    record = steps.to(state, 2)
    after = newer(steps)
    dest = WALK[WALK.index(state) + 1]
    # The old manager with its own number, and one that took a number without adopting the row.
    number = steps.epoch if claims == "its own epoch" else after.epoch
    # Its plan is as old as itself: that the mark is impossible by now must not be what it hears.
    steps.journal.pin("checkpoint", 1)
    retire = [RetirementMark(victim.id, "not kept")] if dest is S.COMMITTED else []
    before = (steps.journal.checkpoints(), steps.journal.transitions())
    with pytest.raises(StaleWriter):
        steps.move(record, state, dest, epoch=number, retire=retire)

    assert (steps.journal.checkpoints(), steps.journal.transitions()) == before
    if dest is S.GATHERED:
        assert steps.journal.files(record.id) == []


def test_an_attempt_that_does_not_exist_is_not_found(steps):
    with pytest.raises(CheckpointNotFound):
        steps.journal.checkpoint(7)
    with pytest.raises(CheckpointNotFound):
        steps.journal.advance(7, S.PREWRITTEN, S.WRITING, epoch=1, host="h", pid=1)
    with pytest.raises(CheckpointNotFound):
        steps.journal.adopt(7, epoch=1)
    with pytest.raises(CheckpointNotFound):
        steps.journal.finish_retirement(7, epoch=1)
    with pytest.raises(CheckpointNotFound):
        steps.journal.mark_retiring([RetirementMark(7, "?")], epoch=1)
    with pytest.raises(CheckpointNotFound):
        steps.journal.record_verification(7, level="size", ok=True, mismatches=())


def test_an_adopted_attempt_belongs_to_the_new_epoch_under_its_old_name(steps):
    record = steps.to(S.GATHERED, 1)
    after = newer(steps)
    adopted = steps.journal.adopt(record.id, epoch=after.epoch)

    assert adopted == dataclasses.replace(record, epoch=2)
    assert after.move(adopted, S.GATHERED, S.COMMITTED).state is S.COMMITTED
    assert steps.journal.adopt(after.begin(2).id, epoch=after.epoch).epoch == 2


def test_a_stale_epoch_cannot_adopt(steps):
    record = steps.begin(1)
    after = newer(steps)
    with pytest.raises(StaleWriter):
        steps.journal.adopt(record.id, epoch=steps.epoch)
    with pytest.raises(StaleWriter):
        steps.journal.adopt(record.id, epoch=after.epoch + 1)

    assert steps.journal.checkpoint(record.id) == record


@pytest.mark.parametrize("final", [S.COMMITTED, S.FAILED])
def test_a_final_row_cannot_be_adopted(steps, final):
    record = steps.to(final, 1)
    with pytest.raises(StaleWriter):
        steps.journal.adopt(record.id, epoch=newer(steps).epoch)

    assert steps.journal.checkpoint(record.id) == record


def test_a_commit_retires_in_the_same_transaction(steps):
    first, second = steps.commit(1), steps.commit(2)
    third = steps.to(S.GATHERED, 3)
    steps.move(
        third,
        S.GATHERED,
        S.COMMITTED,
        retire=[RetirementMark(first.id, "not among the last 2")],
        decisions=[(first.id, "drop", ("not among the last 2",)), (second.id, "keep", ("last 2",))],
    )
    first = steps.journal.checkpoint(first.id)

    assert not first.is_live
    assert first.retire_reason == "not among the last 2"
    assert first.retire_started_at == steps.journal.checkpoint(third.id).committed_at
    assert first.retired_at is None
    assert [record.step for record in steps.journal.checkpoints(live_only=True)] == [2, 3]
    assert steps.journal.decisions() == {
        first.id: ("drop", ("not among the last 2",)),
        second.id: ("keep", ("last 2",)),
    }
    assert steps.journal.decisions([second.id, third.id]) == {second.id: ("keep", ("last 2",))}
    assert steps.journal.decisions([]) == {}


def test_the_last_decision_on_a_checkpoint_counts(steps):
    first = steps.commit(1)
    for step, verdict in ((2, "keep"), (3, "drop")):
        record = steps.to(S.GATHERED, step)
        steps.move(record, S.GATHERED, S.COMMITTED, decisions=[(first.id, verdict, (f"at step {step}",))])

    assert steps.journal.decisions() == {first.id: ("drop", ("at step 3",))}


def test_a_commit_retires_what_it_overwrites(steps):
    old = steps.commit(5)
    new = steps.begin(5, overwrite=True)
    new = steps.move(new, S.PREWRITTEN, S.WRITING)
    new = steps.move(new, S.WRITING, S.GATHERED)
    assert steps.journal.checkpoint(old.id).is_live
    # Retention may name the overwritten row as well; that it is overwritten is the better reason.
    new = steps.move(new, S.GATHERED, S.COMMITTED, retire=[RetirementMark(old.id, "not kept")])
    old = steps.journal.checkpoint(old.id)

    assert new.is_live
    assert not old.is_live
    assert old.retire_reason == f"overwritten by attempt {new.id}"
    assert old.retired_directory != new.retired_directory


def test_a_failed_overwrite_leaves_the_old_one_live(steps):
    old = steps.commit(5)
    steps.to(S.FAILED, 5, overwrite=True)

    assert steps.journal.find("checkpoint", 5) == old
    assert old.is_live


@pytest.mark.parametrize("flaw", ["pinned", "in flight", "failed", "retiring", "itself", "twice"])
def test_a_bad_retirement_mark_changes_nothing(steps, flaw):
    good = steps.commit(1)
    if flaw == "pinned":
        bad = steps.commit(2).id
        steps.journal.pin("checkpoint", 2)
    elif flaw == "in flight":
        bad = steps.begin(1, "snapshot").id
    elif flaw == "failed":
        bad = steps.to(S.FAILED, 2).id
    elif flaw == "retiring":
        bad = steps.retired(2).id
    elif flaw == "twice":
        bad = good.id
    record = steps.to(S.GATHERED, 9)
    if flaw == "itself":
        bad = record.id
    marks = [RetirementMark(good.id, "not kept"), RetirementMark(bad, "not kept")]
    before = (steps.journal.checkpoints(), steps.journal.transitions())
    with pytest.raises(JournalError, match="cannot be retired"):
        steps.move(record, S.GATHERED, S.COMMITTED, retire=marks)
    with pytest.raises(JournalError, match="cannot be retired"):
        steps.journal.mark_retiring(marks, epoch=steps.epoch)

    assert (steps.journal.checkpoints(), steps.journal.transitions()) == before
    assert steps.move(record, S.GATHERED, S.COMMITTED, retire=marks[:1]).is_live


def test_only_a_commit_retires(steps):
    old = steps.commit(1)
    record = steps.begin(2)
    with pytest.raises(InvalidArgument):
        steps.move(record, S.PREWRITTEN, S.WRITING, retire=[RetirementMark(old.id, "not kept")])

    assert steps.journal.checkpoint(old.id) == old


def test_retirement_starts_and_ends(steps):
    record = steps.retired(1)
    assert (record.state, record.is_live, record.retired_at) == (S.COMMITTED, False, None)
    steps.journal.finish_retirement(record.id, epoch=steps.epoch)
    gone = steps.journal.checkpoint(record.id)
    time.sleep(0.01)
    steps.journal.finish_retirement(record.id, epoch=steps.epoch)

    assert gone.retire_started_at <= gone.retired_at
    assert steps.journal.checkpoint(record.id) == gone


def test_a_live_checkpoint_cannot_be_retired_without_a_mark(steps):
    record = steps.commit(1)
    with pytest.raises(JournalError, match="not retiring"):
        steps.journal.finish_retirement(record.id, epoch=steps.epoch)

    assert steps.journal.checkpoint(record.id) == record


def test_a_stale_epoch_cannot_retire(steps):
    live, retiring = steps.commit(1), steps.retired(2)
    newer(steps)
    with pytest.raises(StaleWriter):
        steps.journal.mark_retiring([RetirementMark(live.id, "not kept")], epoch=steps.epoch)
    with pytest.raises(StaleWriter):
        steps.journal.finish_retirement(retiring.id, epoch=steps.epoch)

    assert steps.journal.checkpoints() == [live, retiring]


def test_commit_order_is_not_begin_order(steps):
    slow = steps.begin(1, "checkpoint")
    fast = steps.commit(1, "snapshot")
    slow = steps.move(slow, S.PREWRITTEN, S.WRITING)
    slow = steps.move(slow, S.WRITING, S.GATHERED)
    slow = steps.move(slow, S.GATHERED, S.COMMITTED)

    assert slow.id < fast.id
    assert fast.commit_seq < slow.commit_seq


def test_find_prefers_the_live_one_then_the_newest(steps):
    first = steps.to(S.FAILED, 5)
    assert steps.journal.find("checkpoint", 5) == first
    second = steps.to(S.FAILED, 5)
    assert steps.journal.find("checkpoint", 5) == second
    live = steps.commit(5)
    steps.to(S.FAILED, 5, overwrite=True)

    assert steps.journal.find("checkpoint", 5) == live
    with pytest.raises(CheckpointNotFound) as caught:
        steps.journal.find("checkpoint", 6)
    assert (caught.value.series, caught.value.step) == ("checkpoint", 6)


def test_lists_are_filtered_and_ordered(steps):
    steps.commit(2, "snapshot")
    steps.commit(9)
    steps.to(S.FAILED, 1)
    steps.commit(3)

    assert [record.id for record in steps.journal.checkpoints()] == [1, 2, 3, 4]
    assert [record.step for record in steps.journal.checkpoints(series="checkpoint")] == [9, 1, 3]
    assert [record.step for record in steps.journal.checkpoints(live_only=True)] == [2, 9, 3]
    assert [record.step for record in steps.journal.checkpoints(series="checkpoint", live_only=True)] == [9, 3]
    assert steps.journal.checkpoints(series="nobody") == []
    assert steps.journal.series() == ["snapshot", "checkpoint"]


def a_long_life(steps: Steps) -> Journal:
    """Attempts in every state, in two series, some of them more than once for a step."""
    journal = steps.journal
    for series in ("checkpoint", "hf"):
        for step in range(4):
            steps.to(S.FAILED, step, series)
            old = steps.commit(step, series)
            steps.to(S.FAILED, step, series, overwrite=True)
            if step < 2:
                journal.mark_retiring([RetirementMark(old.id, "no rule keeps it")], epoch=steps.epoch)
            if step < 1:
                journal.finish_retirement(old.id, epoch=steps.epoch)
        steps.to(S.FAILED, 9, series)
    steps.commit(3, overwrite=True)
    steps.to(S.FAILED, 4)
    steps.to(S.GATHERED, 5)
    return journal


def test_what_is_standing_is_everything_but_what_is_gone(steps):
    journal = a_long_life(steps)
    everything = journal.checkpoints()
    standing = [row for row in everything if row.state is not S.FAILED and row.retired_at is None]

    assert {row.state for row in standing} == {S.GATHERED, S.COMMITTED}
    assert {row.is_live for row in standing} == {True, False}
    assert journal.standing() == standing
    assert journal.standing("hf") == [row for row in standing if row.series == "hf"]
    for series in ("checkpoint", "hf", "never seen"):
        live = {row.directory for row in standing if row.series == series and row.is_live}
        assert journal.live_directories(series) == live
        ordered = sorted(
            (row for row in standing if row.series == series and row.is_live), key=lambda row: row.commit_seq
        )
        assert journal.live_lists().get(series, []) == [row.directory for row in ordered]


def test_what_a_number_a_name_or_a_step_tells_of(steps):
    journal = a_long_life(steps)
    rows = journal.checkpoints()
    each = range(1, len(rows) + 1)
    of_step_3 = [row for row in rows if (row.series, row.step) == ("hf", 3)]

    assert journal.traced(each, (), ()) == rows
    assert journal.traced((), [row.staging_directory for row in rows], ()) == rows
    assert journal.traced((), (), {(row.series, row.step) for row in rows}) == rows
    assert journal.traced([rows[3].id, 999], [rows[0].staging_directory, rows[1].directory], ()) == [rows[0], rows[3]]
    assert journal.traced((), (), [("hf", 3), ("hf", 99), ("none", 3)]) == of_step_3
    assert len(of_step_3) == 3
    assert journal.traced((), (), ()) == []
    many = [*range(1000, 3000), rows[0].id], map(str, range(900)), [("x", step) for step in range(900)]
    assert journal.traced(*many) == rows[:1], "more than one query takes"


def test_what_is_in_flight_in_a_series(steps):
    journal = a_long_life(steps)

    assert journal.in_flight("checkpoint") == journal.checkpoints()[-1]
    assert journal.in_flight("hf") is None


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_the_newest_what_is_in_flight_and_what_failed_since(steps, count):
    journal = a_long_life(steps)
    rows = journal.checkpoints()
    for series, since in (("checkpoint", [4]), ("hf", [3, 9])):
        of_series = [row for row in rows if row.series == series]
        live = sorted((row for row in of_series if row.is_live), key=lambda row: row.commit_seq)
        failed = [row for row in of_series if row.state is S.FAILED]
        failed = [row for row in failed if row.id > live[-1].id] if count else failed
        busy = [row for row in of_series if row.is_in_flight]
        expected = [*(live[-count:] if count else []), *failed, *busy]

        assert journal.newest(series, count) == sorted(expected, key=lambda row: row.id)
        assert not count or [row.step for row in failed] == since
    steps.to(S.FAILED, 1, "never committed")
    assert [row.step for row in journal.newest("never committed", count)] == [1]


def test_the_newest_commit_is_the_last_in_commit_order(steps):
    slow = steps.begin(1, "slow")
    steps.commit(2)
    for source, dest in itertools.pairwise(WALK):
        slow = steps.move(slow, source, dest)
    steps.to(S.FAILED, 3, "slow")
    assert [row.step for row in steps.journal.newest("slow", 1)] == [1, 3]


def test_every_attempt_of_a_step(steps):
    journal = a_long_life(steps)
    for series, step in itertools.product(("checkpoint", "hf", "nobody"), range(10)):
        rows = [row for row in journal.checkpoints(series=series) if row.step == step]

        assert journal.of_step(series, step) == rows


def test_the_format_of_a_series_is_known_from_its_first_save_on(steps):
    assert steps.journal.format_of("hf") is None
    steps.begin(1, "hf", format=Format.HUGGINGFACE)
    steps.commit(1)

    assert steps.journal.format_of("hf") is Format.HUGGINGFACE
    assert steps.journal.format_of("checkpoint") is Format.DCP


def test_the_history_can_be_followed(steps):
    steps.commit(1)
    seen = steps.journal.transitions()
    steps.to(S.WRITING, 2)
    more = steps.journal.transitions(after_id=seen[-1].id)

    assert [(line.step, line.dest) for line in more] == [(2, S.PREWRITTEN), (2, S.WRITING)]
    assert steps.journal.transitions() == seen + more
    assert steps.journal.transitions(1, after_id=seen[2].id) == seen[3:]


def test_files_of_an_attempt_without_any_are_none(steps):
    assert steps.journal.files(steps.begin(1).id) == []


def test_many_files_come_back_sorted(steps):
    digest = FILES[0].digest
    files = [FileEntry(f"__{rank}_{n}.distcp", rank * n, digest, rank) for rank in range(64) for n in range(20)]
    record = steps.to(S.WRITING, 1)
    steps.move(record, S.WRITING, S.GATHERED, files=files[::-1])

    assert steps.journal.files(record.id) == sorted(files, key=lambda entry: entry.path)


def test_a_file_named_twice_changes_nothing(steps):
    record = steps.to(S.WRITING, 1)
    with pytest.raises(JournalError):
        steps.move(record, S.WRITING, S.GATHERED, files=[FILES[0], FILES[0]])

    assert steps.journal.checkpoint(record.id) == record
    assert steps.journal.files(record.id) == []


def test_a_pin_shows_on_the_live_row_only(steps):
    failed, record = steps.to(S.FAILED, 1), steps.commit(1)
    steps.journal.pin("checkpoint", 1, note="best so far")
    steps.journal.pin("checkpoint", 1, note="still the best")

    assert steps.journal.checkpoint(record.id).pinned
    assert not steps.journal.checkpoint(failed.id).pinned
    assert [r.pinned for r in steps.journal.checkpoints()] == [False, True]
    steps.journal.unpin("checkpoint", 1)
    assert not steps.journal.find("checkpoint", 1).pinned
    with pytest.raises(CheckpointNotFound):
        steps.journal.unpin("checkpoint", 1)


def test_a_pin_holds_the_step_through_an_overwrite(steps):
    old = steps.commit(1)
    steps.journal.pin("checkpoint", 1)
    new = steps.commit(1, overwrite=True)

    assert new.pinned
    assert not steps.journal.checkpoint(old.id).pinned


@pytest.mark.parametrize("state", [S.WRITING, S.FAILED, None])
def test_only_a_live_checkpoint_can_be_pinned(steps, state):
    if state is not None:
        steps.to(state, 1)
    with pytest.raises(CheckpointNotFound):
        steps.journal.pin("checkpoint", 1)


def test_a_retiring_checkpoint_cannot_be_pinned(steps):
    steps.retired(1)
    with pytest.raises(CheckpointNotFound):
        steps.journal.pin("checkpoint", 1)


def test_verifications_are_kept_in_order(steps):
    record = steps.commit(1)
    steps.journal.record_verification(record.id, level="size", ok=True, mismatches=())
    steps.journal.record_verification(record.id, level="digest", ok=False, mismatches=("digest: __0_0.distcp",))
    first, second = steps.journal.verifications(record.id)

    assert (first.level, first.ok, first.mismatches) == ("size", True, ())
    assert (second.level, second.ok, second.mismatches) == ("digest", False, ("digest: __0_0.distcp",))
    assert first.checkpoint_id == record.id
    assert first.at <= second.at
    assert steps.journal.verifications(99) == []


def test_what_was_intact_before_damage_was_found_takes_no_damage_back(steps):
    first, second = steps.commit(1), steps.commit(2)
    record = functools.partial(steps.journal.record_verifications, level="digest")
    steps.journal.record_verification(first.id, level="size", ok=False, mismatches=("size: a",))
    assert record([Verified(first.id, False, ("digest: a",), 0), Verified(second.id, True, (), 0)]) == ()
    (damaged,) = steps.journal.newest_verifications([first.id]).values()

    assert record([Verified(first.id, True, (), 1), Verified(second.id, True, (), 1)]) == (first.id,)
    assert record([Verified(first.id, False, ("digest: b",), 1)]) == ()
    again = steps.journal.newest_verifications([first.id])[first.id]
    assert (again.ok, again.id > damaged.id) == (False, True)
    assert record([Verified(first.id, True, (), damaged.id)]) == (first.id,)
    assert record([Verified(first.id, True, (), again.id)]) == ()
    assert [one.ok for one in steps.journal.verifications(first.id)] == [False, False, False, True]
    assert [one.ok for one in steps.journal.verifications(second.id)] == [True, True]


def manifest(step: int, attempt: int, **facts) -> Manifest:
    return Manifest(
        **{
            "run_id": "f" * 32,
            "series": "checkpoint",
            "step": step,
            "attempt": attempt,
            "epoch": 3,
            "format": Format.DCP,
            "world_size": 4,
            "created_at": 1000.0 + step,
            "files": FILES,
            "per_rank": ("data",),
            "metrics": {"loss": 0.5},
        }
        | facts
    )


def rebuild(steps: Steps, found: Manifest):
    return steps.journal.insert_rebuilt(
        found, epoch=steps.epoch, manifest_digest="d", committed_at=2000.0, host="h", pid=1
    )


def test_a_rebuilt_checkpoint_is_live_with_the_facts_of_its_manifest(steps):
    record = rebuild(steps, manifest(5, 9))

    assert record.is_live
    assert (record.id, record.series, record.step, record.world_size, record.bytes) == (9, "checkpoint", 5, 4, 300)
    assert (record.epoch, record.commit_seq, record.manifest_digest) == (steps.epoch, 1, "d")
    assert (record.created_at, record.committed_at, record.finished_at) == (1005.0, 2000.0, 2000.0)
    assert (record.per_rank, record.metrics) == (("data",), {"loss": 0.5})
    assert record.directory == "checkpoint/step-5"
    assert record.staging_directory == "checkpoint/.step-5.e3.a9.incomplete"
    assert steps.journal.files(record.id) == list(FILES)
    (line,) = steps.journal.transitions(record.id)
    assert (line.source, line.dest) == (None, S.COMMITTED)


def test_rebuilt_checkpoints_keep_the_order_of_calls_and_later_attempts_are_new(steps):
    seqs = [rebuild(steps, manifest(step, attempt)).commit_seq for step, attempt in ((1, 2), (2, 7), (3, 5))]
    fresh = steps.begin(2, overwrite=True)

    assert seqs == [1, 2, 3]
    assert fresh.id == 8
    assert len({r.staging_directory for r in steps.journal.checkpoints()}) == 4


@pytest.mark.parametrize("attempt", [0, 2])
def test_a_manifest_whose_attempt_is_taken_gets_a_new_number(steps, attempt):
    rebuild(steps, manifest(1, 2))
    record = rebuild(steps, manifest(2, attempt, epoch=4))

    assert record.id == 3
    assert record.staging_directory == f"checkpoint/.step-2.e4.a{attempt}.incomplete"


def test_a_step_is_rebuilt_once(steps):
    rebuild(steps, manifest(1, 2))
    with pytest.raises(StepAlreadySaved):
        rebuild(steps, manifest(1, 3))

    assert len(steps.journal.checkpoints()) == 1


def test_a_hostile_manifest_cannot_name_a_place_elsewhere(steps):
    with pytest.raises(InvalidArgument):
        rebuild(steps, manifest(1, 2, series="../../etc"))

    assert steps.journal.checkpoints() == []


def test_a_stale_epoch_cannot_rebuild(steps):
    newer(steps)
    with pytest.raises(StaleWriter):
        rebuild(steps, manifest(1, 2))


def test_a_reader_changes_nothing(steps):
    record = steps.begin(1)
    with Journal.open_read_only(steps.journal.path) as reader:
        for attempt in (
            lambda: reader.begin_epoch(host="h", pid=1, command="c", versions={}),
            lambda: reader.end_epoch(1),
            lambda: reader.set_run_id("f" * 32),
            lambda: reader.adopt(record.id, epoch=1),
            lambda: reader.mark_retiring([], epoch=1),
            lambda: reader.finish_retirement(1, epoch=1),
            lambda: reader.pin("checkpoint", 1),
            lambda: reader.unpin("checkpoint", 1),
            lambda: reader.record_verification(1, level="size", ok=True, mismatches=()),
            lambda: reader.advance(record.id, S.PREWRITTEN, S.WRITING, epoch=1, host="h", pid=1),
        ):
            with pytest.raises(JournalError, match="reading only"):
                attempt()
        assert reader.checkpoints() == [record]


def test_a_reader_sees_what_the_writer_does_next(steps):
    with Journal.open_read_only(steps.journal.path) as reader:
        record = steps.commit(1)
        assert reader.checkpoints() == [record]
        record = steps.to(S.WRITING, 2)
        assert reader.find("checkpoint", 2) == record


def test_a_closed_journal_says_so(journal):
    journal.close()
    journal.close()
    with pytest.raises(JournalError, match="closed"):
        journal.checkpoints()


def test_threads_share_a_journal(steps):
    """Ten threads, ten series: every save gets its own number and none is lost."""
    failures = []

    def save(series: str) -> None:
        try:
            for step in range(5):
                steps.commit(step, series)
                steps.journal.checkpoints()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(f"series-{n}",)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    records = steps.journal.checkpoints()

    assert failures == []
    assert sorted(record.id for record in records) == list(range(1, 51))
    assert sorted(record.commit_seq for record in records) == list(range(1, 51))
