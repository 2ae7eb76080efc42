"""Storage that does not answer, and doctors that are interrupted or killed: nothing hangs, nothing is left unsaid."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from real_storage import Mounts, doctor, made_in, rows, running, trials_of, until, with_fault

from ckptmgr.doctor import examine


def test_storage_that_does_not_answer_at_all_is_a_finding_and_no_hang(mounts: Mounts) -> None:
    point, behind, server = mounts.bindfs()
    server.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    seen = doctor(point, "--timeout", "1")

    assert time.monotonic() - began < 30
    assert (seen.code, seen.levels()["D005"]) == (3, "error")
    assert "no answer within 1 s: looking at the directory" in seen.text("D005")
    # What can be told without touching it.
    assert (seen.levels()["D002"], "FUSE" in seen.text("D002")) == ("warning", True)
    assert list(behind.iterdir()) == []


def test_storage_that_stops_answering_in_the_middle_is_a_finding_and_what_stays_is_named(mounts: Mounts) -> None:
    point, behind, server = mounts.bindfs()
    with running(point, "--timeout", "1") as child:
        (name,) = until(lambda: made_in(behind))
        server.send_signal(signal.SIGSTOP)
        out, err = child.communicate(timeout=60)

    assert (child.returncode, err) == (3, "")
    (row,) = rows(out, "D005")
    assert row.startswith("error")
    assert "no answer within 1 s" in row
    assert [str(point / name) in line for line in rows(out, "D025")] == [True]
    server.send_signal(signal.SIGCONT)
    until(lambda: not trials_of(point))
    # Its process is gone, and the next doctor says whose that was.
    again = doctor(point)
    assert f"a doctor that was killed left {name}" in again.text("D025")
    assert made_in(behind) == [name]


def test_storage_whose_server_has_gone_is_a_finding(mounts: Mounts) -> None:
    point, _, server = mounts.bindfs()
    server.kill()
    server.wait(60)
    seen = doctor(point)

    assert (seen.code, seen.levels()["D004"], seen.levels()["D002"]) == (3, "error", "warning")
    assert "not connected" in seen.text("D004")
    assert "FUSE" in seen.text("D002")


def test_a_journal_that_hangs_does_not_keep_the_run_from_being_tried(mounts: Mounts, tmp_path: Path) -> None:
    point, _, server = mounts.bindfs()
    (tmp_path / "run").mkdir()
    server.send_signal(signal.SIGSTOP)
    seen = doctor(tmp_path / "run", "--journal", point / "j.db", "--timeout", "2")

    assert [place["holds"] for place in seen.document["places"]] == [["run"], ["journal"]]
    assert (seen.levels(0)["D005"], seen.levels(1)["D005"]) == ("ok", "error")
    assert seen.document["places"][1]["path"] == str(point)


def test_a_lock_that_never_comes_is_a_finding_and_no_hang(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    seen = with_fault("flock:delay_enter=5000000", tmp_path / "trace", place, "--timeout", "2")

    assert seen.code == 3
    assert seen.levels()["D017"] == "error" or seen.levels()["D005"] == "error"
    assert list(place.iterdir()) == []


def test_slow_storage_is_tried_to_the_end(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    seen = with_fault("fsync:delay_exit=100000", tmp_path / "trace", place)

    assert seen.levels()["D005"] == "ok"
    assert "D020" in seen.levels()
    assert seen.document["places"][0]["fsync_file_s"] >= 0.1


def test_storage_on_which_everything_together_takes_too_long_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckptmgr.doctor._STEPS_AT_MOST", 0.001)
    (place,) = examine(str(tmp_path), timeout_s=30)

    assert place.stuck_because == "all of it takes more than 0.03 s"
    assert place.left_behind is None
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_removes_what_was_made_and_ends_with_130(mounts: Mounts) -> None:
    point, behind, server = mounts.bindfs()
    with running(point) as child:
        until(lambda: made_in(behind))
        server.send_signal(signal.SIGSTOP)
        child.send_signal(signal.SIGINT)
        time.sleep(0.3)
        server.send_signal(signal.SIGCONT)
        _, err = child.communicate(timeout=60)

    assert child.returncode == 130
    assert "Traceback" not in err
    assert made_in(behind) == []
    assert trials_of(point) == []


def test_an_interrupt_of_a_doctor_that_is_stuck_ends_soon(mounts: Mounts) -> None:
    point, behind, server = mounts.bindfs()
    with running(point, "--timeout", "1") as child:
        until(lambda: made_in(behind))
        server.send_signal(signal.SIGSTOP)
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=60)

    assert child.returncode == 130


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_doctor_that_is_killed_leaves_nothing_as_its_child_cleans_up(mounts: Mounts, number: int) -> None:
    point, behind, server = mounts.bindfs()
    with running(point) as child:
        until(lambda: made_in(behind))
        server.send_signal(signal.SIGSTOP)
        child.send_signal(number)
        child.wait(60)
        server.send_signal(signal.SIGCONT)
        until(lambda: not trials_of(point))

    assert made_in(behind) == []


def test_a_doctor_that_is_killed_with_all_its_processes_is_recognised_by_the_next(tmp_path: Path) -> None:
    with running(tmp_path) as child:
        (name,) = until(lambda: made_in(tmp_path) or (child.poll() is not None and [""]))
        assert name
        for pid in trials_of(tmp_path):
            os.kill(pid, signal.SIGSTOP)
        child.kill()
        child.wait(60)
        for pid in trials_of(tmp_path):
            os.kill(pid, signal.SIGKILL)
        until(lambda: not trials_of(tmp_path))
    seen = doctor(tmp_path)

    assert seen.levels()["D025"] == "warning"
    assert f"a doctor that was killed left {name}" in seen.text("D025")
    assert made_in(tmp_path) == [name]


def test_a_trial_that_is_killed_is_a_finding_and_what_it_made_is_removed(tmp_path: Path) -> None:
    with running(tmp_path) as child:
        (name,) = until(lambda: made_in(tmp_path) or (child.poll() is not None and [""]))
        assert name
        for pid in trials_of(tmp_path):
            os.kill(pid, signal.SIGKILL)
        out, err = child.communicate(timeout=60)

    assert (child.returncode, err) == (3, "")
    (row,) = rows(out, "D005")
    assert "the process was killed" in row
    assert made_in(tmp_path) == []
