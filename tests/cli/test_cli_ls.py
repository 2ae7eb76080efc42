"""``ckptmgr ls``: what is listed, what is hidden, and what the last column says."""

from __future__ import annotations

import socket

import pytest
from run_on_disk import NO_PROCESS, Call, Run, S

from ckptmgr.cli import ls
from ckptmgr.lifecycle import Format, RetirementMark


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()[1:]]


def test_an_empty_run_lists_nothing_and_says_so_on_stderr(run: Run, ckptmgr: Call) -> None:
    done = ckptmgr("ls", run.directory)

    assert (done.code, done.out) == (0, "")
    assert "no checkpoints yet" in done.err


def test_a_committed_checkpoint_has_its_series_step_state_size_and_reasons(run: Run, ckptmgr: Call) -> None:
    first = run.save(500)
    run.save(1000, decisions=[(first.id, "keep", ("last 2", "every 500 steps"))])

    (row, _) = rows(ckptmgr("ls", run.directory).out)

    assert row[:3] == ["checkpoint", "500", "COMMITTED"]
    assert row[5:7] == ["1.1", "kB"]
    assert " ".join(row[7:]) == "last 2, every 500 steps"


def test_a_pin_is_a_reason_before_the_next_commit_has_decided(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.journal.pin("checkpoint", 500)

    assert rows(ckptmgr("ls", run.directory).out)[0][-3:] == ["pinned,", "newest", "committed"]
    assert ckptmgr("ls", run.directory, "--json").json["checkpoints"][0]["kept_because"] == [
        "pinned",
        "newest committed",
    ]


def test_a_drop_decision_is_not_shown_as_a_reason_to_keep(run: Run, ckptmgr: Call) -> None:
    first = run.save(500)
    run.save(1000, decisions=[(first.id, "drop", ("no rule keeps it",))])

    assert ckptmgr("ls", run.directory, "--json").json["checkpoints"][0]["kept_because"] == []


def test_retiring_and_retired_are_told_apart_and_retired_is_hidden(run: Run, ckptmgr: Call) -> None:
    first = run.save(500)
    second = run.save(1000, retire=[RetirementMark(first.id, "no rule keeps it")])
    run.journal.finish_retirement(first.id, epoch=run.epoch)
    run.save(1500, retire=[RetirementMark(second.id, "no rule keeps it")])

    short, full = ckptmgr("ls", run.directory), ckptmgr("ls", run.directory, "--all")

    assert [(row[1], row[2]) for row in rows(short.out)] == [("1000", "retiring"), ("1500", "COMMITTED")]
    assert [row[2] for row in rows(full.out)] == ["retired", "retiring", "COMMITTED"]
    assert "1 retired or failed" in short.err
    assert full.err == ""
    assert "no rule keeps it" in short.out


def test_only_failures_before_the_newest_commit_of_their_series_are_hidden(run: Run, ckptmgr: Call) -> None:
    run.save(100, until=S.FAILED)
    run.save(100, series="hf", layout=Format.HUGGINGFACE, until=S.FAILED)
    run.save(200)
    run.save(300, until=S.FAILED, reason="No space left on device", failures=[{"rank": 3, "host": "n1", "cause": "x"}])

    done = ckptmgr("ls", run.directory)

    assert [(row[0], row[1]) for row in rows(done.out)] == [("checkpoint", "200"), ("checkpoint", "300"), ("hf", "100")]
    assert "No space left on device (rank 3)" in done.out
    assert ckptmgr("ls", run.directory, "--json").json["hidden"] == 1


def test_a_failure_is_not_hidden_by_a_commit_that_is_being_retired(run: Run, ckptmgr: Call) -> None:
    run.save(100, until=S.FAILED)
    only = run.save(200)
    run.journal.mark_retiring([RetirementMark(only.id, "by hand")], epoch=run.epoch)

    assert [row[1] for row in rows(ckptmgr("ls", run.directory).out)] == ["100", "200"]


def test_in_flight_says_whether_its_process_is_still_there(run: Run, ckptmgr: Call) -> None:
    run.save(500, until=S.WRITING)

    assert f"in flight, epoch {run.epoch}" in ckptmgr("ls", run.directory).out

    run.start(pid=NO_PROCESS)
    run.save(500, series="hf", layout=Format.HUGGINGFACE, until=S.WRITING)
    out = ckptmgr("ls", run.directory).out

    assert f"left unfinished by epoch {run.epoch - 1}" in out
    assert f"left unfinished by epoch {run.epoch}" in out


def test_in_flight_of_an_ended_epoch_was_left_unfinished(run: Run, ckptmgr: Call) -> None:
    run.save(500, until=S.WRITING)
    run.journal.end_epoch(run.epoch)

    assert "left unfinished" in ckptmgr("ls", run.directory).out


def test_in_flight_on_another_host_counts_as_running(run: Run, ckptmgr: Call) -> None:
    run.start(host=socket.gethostname() + "-other", pid=NO_PROCESS)
    run.save(500, until=S.WRITING)

    assert f"in flight, epoch {run.epoch}" in ckptmgr("ls", run.directory).out


def test_series_filters_and_an_unknown_one_is_a_usage_error_that_names_them(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(500, series="hf", layout=Format.HUGGINGFACE)

    assert [row[0] for row in rows(ckptmgr("ls", run.directory, "--series", "hf").out)] == ["hf"]

    wrong = ckptmgr("ls", run.directory, "--series", "nope")

    assert wrong.code == 2
    assert "checkpoint, hf" in wrong.err


def test_limit_shows_the_last_of_each_series_and_says_how_many_are_older(run: Run, ckptmgr: Call) -> None:
    for step in (1, 2, 3):
        run.save(step)
        run.save(step, series="hf", layout=Format.HUGGINGFACE)
    done = ckptmgr("ls", run.directory, "--limit", 2)

    shown = [(row[0], row[1]) for row in rows(done.out)]
    assert shown == [("checkpoint", "2"), ("checkpoint", "3"), ("hf", "2"), ("hf", "3")]
    assert "2 older" in done.err
    assert ckptmgr("ls", run.directory, "--limit", 2, "--all", "--json").json["hidden"] == 2
    assert ckptmgr("ls", run.directory, "--limit", 0).code == 2


def test_a_long_list_is_cut_unless_it_is_asked_for(run: Run, ckptmgr: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ls, "_MOST", 2)
    for step in (1, 2, 3):
        run.save(step)
    done = ckptmgr("ls", run.directory)

    assert [row[1] for row in rows(done.out)] == ["2", "3"]
    assert "1 older, or retired or failed before the newest commit: --all shows them" in done.err
    for flags in (["--all"], ["--limit", 9]):
        whole = ckptmgr("ls", run.directory, *flags)
        assert ([row[1] for row in rows(whole.out)], whole.err) == (["1", "2", "3"], "")
    document = ckptmgr("ls", run.directory, "--json").json
    assert [row["step"] for row in document["checkpoints"]] == [1, 2, 3]


def test_series_that_are_short_each_are_not_cut_together(
    run: Run, ckptmgr: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ls, "_MOST", 3)
    run.save(1, until=S.FAILED)
    for step in (2, 3):
        run.save(step)
        run.save(step, series="hf", layout=Format.HUGGINGFACE)

    assert "\n1 retired or failed before the newest commit: --all" in "\n" + ckptmgr("ls", run.directory).err


def test_the_journal_file_names_the_same_run_as_its_directory(run: Run, ckptmgr: Call) -> None:
    run.save(500)

    by_directory, by_journal = ckptmgr("ls", run.directory), ckptmgr("ls", run.journal_path)

    assert by_directory.out == by_journal.out
    assert by_journal.code == 0


def test_journal_flag_names_a_journal_elsewhere(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.journal.close()
    elsewhere = run.directory.parent.parent / "elsewhere.journal.db"
    run.journal_path.rename(elsewhere)

    assert ckptmgr("ls", run.directory).code == 10
    assert ckptmgr("ls", run.directory, "--journal", elsewhere).code == 0
    assert ckptmgr("ls", elsewhere, "--journal", elsewhere).code == 2


def test_only_what_may_be_resumed_from_has_a_path(run: Run, ckptmgr: Call) -> None:
    first = run.save(500)
    run.save(1000, retire=[RetirementMark(first.id, "old")])
    run.save(1500, until=S.GATHERED)

    documents = ckptmgr("ls", run.directory, "--json").json["checkpoints"]

    assert [None, str(run.directory / "checkpoint/step-1000"), None] == [each["path"] for each in documents]


def test_listing_works_when_the_run_directory_is_gone(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.directory.rename(f"{run.directory}.moved")

    assert ckptmgr("ls", run.directory).code == 0


def test_what_is_newest_is_asked_anew_where_no_keep_rule_was(run: Run, ckptmgr: Call) -> None:
    first = run.save(500)
    run.save(1000, decisions=[(first.id, "keep", ("last 2", "newest committed"))])  # as recovery commits

    assert [row[7:] for row in rows(ckptmgr("ls", run.directory).out)] == [["last", "2"], ["newest", "committed"]]
    kept = [one["kept_because"] for one in ckptmgr("ls", run.directory, "--json").json["checkpoints"]]
    assert kept == [["last 2"], ["newest committed"]]
    assert ckptmgr("show", run.directory, 1000, "--json").json["checkpoint"]["kept_because"] == ["newest committed"]


def test_what_was_rebuilt_says_so(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.journal.close()
    run.journal_path.unlink()
    assert ckptmgr("recover", run.directory, "--rebuild", "--apply").code == 0

    assert rows(ckptmgr("ls", run.directory).out)[0][7:] == ["rebuilt,", "newest", "committed"]


def test_a_failure_names_its_ranks_once(run: Run, ckptmgr: Call) -> None:
    failures = [{"rank": rank, "host": "n1", "cause": "x"} for rank in (1, 11)]
    run.save(300, until=S.FAILED, reason="rank 11 on n1: x", failures=failures)

    assert ckptmgr("ls", run.directory).out.rstrip().endswith("  rank 11 on n1: x (rank 1)")


def test_what_a_crash_left_names_the_command_for_this_run(run: Run, ckptmgr: Call) -> None:
    run.save(300, until=S.WRITING)
    run.start(pid=NO_PROCESS)

    told = f"see `ckptmgr recover {run.directory}`"
    assert f"left unfinished by epoch 1; {told}" in ckptmgr("ls", run.directory).out
    assert f"left unfinished; {told}" in ckptmgr("watch", run.directory).out


def test_what_goes_next_is_named_where_that_is_certain(run: Run, ckptmgr: Call) -> None:
    kept = {
        100: ("last 3", "every 100 steps"),
        110: ("last 3",),
        120: ("last 3",),
        130: ("last 3", "newest committed"),
    }
    records = [run.save(step) for step in kept]
    run.save(
        200,
        series="hf",
        layout=Format.HUGGINGFACE,
        decisions=[(record.id, "keep", why) for record, why in zip(records, kept.values(), strict=True)],
    )
    (hf,) = (one for one in run.journal.checkpoints(series="hf"))
    run.save(210, series="snapshot", decisions=[(hf.id, "keep", ("last 1", "newest committed"))])

    assert "the next commit of each series lets go of checkpoint 110, hf 200\n" in ckptmgr("ls", run.directory).err
    assert ckptmgr("ls", run.directory, "--json").json["next_to_go"] == [
        {"checkpoint_id": records[1].id, "series": "checkpoint", "step": 110},
        {"checkpoint_id": hf.id, "series": "hf", "step": 200},
    ]
    told = [ckptmgr("why", run.directory, step).out for step in (100, 110, 120)]
    assert ["next       the next commit of its series lets it go" in text for text in told] == [False, True, False]
    run.journal.pin("checkpoint", 110)
    assert [one["step"] for one in ckptmgr("ls", run.directory, "--json").json["next_to_go"]] == [200]
