"""``ckptmgr why``: each fate that a checkpoint can have, in words, with the command that comes next."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from run_on_disk import NO_PROCESS, Call, Run, S

from ckptmgr.lifecycle import Format, RetirementMark


def attempts(ckptmgr: Call, run: Run, step: int, *words: str) -> list[dict[str, Any]]:
    done = ckptmgr("why", run.directory, step, *words, "--json")
    assert done.code == 0, done
    return done.json["attempts"]


def only(ckptmgr: Call, run: Run, step: int, *words: str) -> dict[str, Any]:
    (attempt,) = attempts(ckptmgr, run, step, *words)
    return attempt


def test_why_says_which_rules_keep_a_checkpoint_and_which_commit_asked_them(run: Run, ckptmgr: Call) -> None:
    first = run.save(500)
    second = run.save(1000, decisions=[(first.id, "keep", ("last 2", "every 500 steps"))])
    case = only(ckptmgr, run, 500)

    assert (case["verdict"], case["newest"], case["pin"]) == ("kept", False, None)
    assert case["reasons"] == ["last 2", "every 500 steps"]
    decision = case["decision"]
    assert (decision["verdict"], decision["checkpoint_id"], decision["step"]) == ("keep", second.id, 1000)
    assert f"ckptmgr pin {run.directory} 500 --series checkpoint" in case["hint"]

    text = ckptmgr("why", run.directory, 500).out
    for part in ("kept", "last 2", "by the commit of step 1000", "names and sizes are as committed"):
        assert part in text


def test_why_knows_the_newest_without_any_decision(run: Run, ckptmgr: Call) -> None:
    first = run.save(500)
    run.save(1000, decisions=[(first.id, "keep", ("newest committed",))])
    older, newest = only(ckptmgr, run, 500), only(ckptmgr, run, 1000)

    # What was the newest when that was decided is not any more.
    assert (older["reasons"], older["newest"]) == ([], False)
    assert (newest["reasons"], newest["newest"], newest["decision"]) == (["newest committed"], True, None)
    assert "ckptmgr latest" in newest["hint"]
    assert "no retention decision" in ckptmgr("why", run.directory, 500).out


def test_why_tells_a_pin_with_its_note(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(1000)
    run.journal.pin("checkpoint", 500, note="shipped as 1.2")
    case = only(ckptmgr, run, 500)

    assert (case["reasons"], case["pin"]["note"]) == (["pinned"], "shipped as 1.2")
    assert "ckptmgr unpin" in case["hint"]
    assert "shipped as 1.2" in ckptmgr("why", run.directory, 500).out


def test_why_says_by_which_commit_a_checkpoint_was_let_go_and_when(run: Run, ckptmgr: Call) -> None:
    first = run.save(500)
    run.save(
        1000,
        retire=[RetirementMark(first.id, "no rule keeps it (last 1)")],
        decisions=[(first.id, "drop", ("no rule keeps it (last 1)",))],
    )
    retiring = only(ckptmgr, run, 500)

    assert (retiring["verdict"], retiring["reasons"]) == ("retiring", ["no rule keeps it (last 1)"])
    assert (retiring["decision"]["verdict"], retiring["decision"]["step"]) == ("drop", 1000)
    assert f"epoch {run.epoch} deletes it" in retiring["hint"]

    run.journal.finish_retirement(first.id, epoch=run.epoch)
    text = ckptmgr("why", run.directory, 500).out

    assert only(ckptmgr, run, 500)["verdict"] == "retired"
    for part in ("let go", "deleted", "by the commit of step 1000", "ckptmgr latest"):
        assert part in text


def test_a_retirement_that_a_crash_cut_short_is_left_to_recovery(run: Run, ckptmgr: Call) -> None:
    first = run.save(500)
    run.save(1000, retire=[RetirementMark(first.id, "old")])
    run.crash()

    assert f"ckptmgr recover {run.directory} --apply" in only(ckptmgr, run, 500)["hint"]


def test_a_decision_that_was_overruled_is_not_told(run: Run, ckptmgr: Call) -> None:
    first = run.save(500)
    run.save(1000, decisions=[(first.id, "keep", ("all",))])
    run.journal.mark_retiring([RetirementMark(first.id, "`ckptmgr prune` of pid 1 on n")], epoch=run.epoch)
    case = only(ckptmgr, run, 500)

    assert (case["decision"], case["reasons"]) == (None, ["`ckptmgr prune` of pid 1 on n"])


def test_why_names_the_rank_that_failed_its_host_and_the_cause(run: Run, ckptmgr: Call) -> None:
    failures = [
        {"rank": 3, "host": "node-7", "cause": "OSError: No space left on device", "silent": False},
        {"rank": 5, "host": "node-8", "cause": "no status within 60 s", "silent": True},
    ]
    run.save(500, until=S.FAILED, reason="rank 3 on node-7 failed", failures=failures)
    case = only(ckptmgr, run, 500)
    text = ckptmgr("why", run.directory, 500).out

    assert (case["verdict"], case["reasons"]) == ("failed", ["rank 3 on node-7 failed"])
    assert case["checkpoint"]["failures"] == failures
    assert "rank 3     on node-7: OSError: No space left on device" in text
    assert "rank 5     on node-8, silent: no status within 60 s" in text


def test_why_says_what_is_in_flight_and_what_a_crash_interrupted(run: Run, ckptmgr: Call) -> None:
    run.save(500, until=S.WRITING)
    case = only(ckptmgr, run, 500)

    assert case["verdict"] == "in flight"
    assert "WRITING" in case["reasons"][0]
    assert "--follow" in case["hint"]

    run.start(pid=NO_PROCESS)
    interrupted = only(ckptmgr, run, 500)

    assert interrupted["verdict"] == "interrupted"
    assert "ckptmgr recover" in interrupted["hint"]


@pytest.mark.parametrize("damage", ["directory", "file", "manifest"])
def test_why_says_what_keeps_a_checkpoint_from_being_resumed(run: Run, ckptmgr: Call, damage: str) -> None:
    record = run.save(500)
    place = run.directory / record.directory
    if damage == "directory":
        shutil.rmtree(place)
    elif damage == "file":
        (place / "model.bin").write_bytes(b"short")
    else:
        (place / "ckptmgr.json").write_text("{")
    case = only(ckptmgr, run, 500)

    id = {"directory": "R002", "file": "R004", "manifest": "R003"}[damage]
    assert (case["verdict"], [finding["id"] for finding in case["findings"]]) == ("not resumable", [id])
    assert case["hint"].startswith(case["findings"][0]["hint"] + "; `ckptmgr check ")
    assert case["reasons"][0].startswith(id)
    done = ckptmgr("why", run.directory, 500)
    assert (done.code, id in done.out) == (0, True)


def test_all_attempts_are_told_and_the_one_that_counts_comes_first(run: Run, ckptmgr: Call) -> None:
    run.save(500, until=S.FAILED)
    first = run.save(500)
    run.save(500, overwrite=True, until=S.FAILED)
    cases = attempts(ckptmgr, run, 500)

    assert [case["verdict"] for case in cases] == ["kept", "failed", "failed"]
    assert [case["checkpoint"]["checkpoint_id"] for case in cases] == [first.id, 3, 1]
    assert ckptmgr("why", run.directory, 500).out.count("attempt ") == 3


def test_a_step_that_was_never_saved_ends_with_3_and_names_where_it_is(run: Run, ckptmgr: Call) -> None:
    run.save(500, series="hf", layout=Format.HUGGINGFACE)
    run.save(1000)
    done = ckptmgr("why", run.directory, 500)

    assert (done.code, done.out) == (3, "")
    assert "--series hf" in done.err
    assert ckptmgr("why", run.directory, 500, "--series", "hf").code == 0
    assert ckptmgr("why", run.directory, "x").code == 2


def test_a_full_disk_and_damage_name_what_helps(run: Run, ckptmgr: Call) -> None:
    run.save(100)
    run.save(200)
    run.save(300, until=S.FAILED, reason="rank 0 on n1: OSError: [Errno 28] No space left on device")
    (run.directory / "checkpoint/step-200/model.bin").write_bytes(b"")

    assert f"once there is space: `ckptmgr stats {run.directory}` says what" in ckptmgr("why", run.directory, 300).out
    words = f"ckptmgr check {run.directory} --series checkpoint"
    assert f"`{words}` says what is safe" in ckptmgr("why", run.directory, 200).out
    assert "/step-100\n" in ckptmgr(*words.split()[1:]).out


def test_why_says_how_far_its_bytes_can_be_trusted(run: Run, ckptmgr: Call) -> None:
    record = run.save(100)
    assert "trust" not in ckptmgr("why", run.directory, 100).out

    run.journal.record_verification(record.id, level="digest", ok=True, mismatches=[])
    assert "  trust      verified 0 s ago\n" in ckptmgr("why", run.directory, 100).out
